"""The default run over several seeds: held-out accuracy before and after, as a table.

    python experiments/seeds.py --seeds 3 [any flag of train.py]

Each seed is one `python train.py --seed s`; runs already in the folder are not repeated.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.figures import accuracies, percent  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--folder", default="runs/seeds", help="where the runs go")
    args, flags = parser.parse_known_args()           # the rest goes to train.py, which refuses unknown flags
    rows = []
    for seed in range(args.seeds):
        out = Path(args.folder) / f"seed-{seed}"
        if (not (out / "heldout.json").is_file()
                or json.loads((out / "heldout.json").read_text())["after"] is None):
            subprocess.run([sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--out", str(out),
                            *flags], check=True)
        rows.append(json.loads((out / "heldout.json").read_text()))
    names = accuracies(rows[0]["before"])
    print("| seed | " + " | ".join(f"{n} before | {n} after" for n in names)
          + " |\n|---" + "|---" * (2 * len(names)) + "|")
    for seed, row in enumerate(rows):
        print(f"| {seed} | " + " | ".join(f"{percent(row['before'][n])} | {percent(row['after'][n])}"
                                          for n in names) + " |")
    for n in names:
        gains = [100 * (row["after"][n]["mean"] - row["before"][n]["mean"]) for row in rows]
        print(f"{n}: gain {sum(gains) / len(gains):+.1f} points "
              f"(seeds: {', '.join(f'{g:+.1f}' for g in gains)})")


if __name__ == "__main__":
    main()
