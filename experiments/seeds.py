"""The default run over several seeds and algorithms: held-out accuracy before and after.

    python experiments/seeds.py --seeds 3 --algos ivr grpo [flags of train.py]

Each is one `python train.py --algo A --seed S`, all but the first algorithm until they have generated as many
tokens as the first with that seed; finished runs in the folder are not repeated, stopped ones continue. The
figures go to results/seeds.json.
"""
import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import percent  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from train import TrainConfig, parse_flags, read_jsonl, write_text  # noqa: E402


def held_out(out: Path, flags: list) -> dict:
    """{"before", "after"}: the accuracies of a run, which is made or finished first; "curve": of each of its
    steps [tokens generated so far, accuracy of the step's rollouts, all of new problems]."""
    file, config = out / "heldout.json", asdict(parse_flags(TrainConfig, [*flags, "--out", str(out)]))
    if (out / "config.json").is_file():
        saved = json.loads((out / "config.json").read_text())
        for name in ("lr", "max_pixels", "activation_checkpointing"):       # chosen by the run if not given
            if config[name] == getattr(TrainConfig, name):
                config[name] = saved[name]
        if {**saved, "resume": ""} != config:
            sys.exit(f"error: {out} is a run with other flags; choose another --folder")
    if not file.is_file() or json.loads(file.read_text())["after"] is None:
        where = ["--resume" if list(out.glob("checkpoint-*")) else "--out", str(out)]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *where, *flags], check=True)
    found = json.loads(file.read_text())
    if found["after"] is None:
        sys.exit(f"error: {out} has no held-out figures")
    accuracies = {"before": {}, "after": {}}
    for when, figures in accuracies.items():
        for name, value in found[when].items():
            if name == "greedy" or name.startswith(("avg@", "pass@")):
                figures[name] = value
    rows = read_jsonl(out / "metrics.jsonl")
    curve = [[row["generated_tokens"], round(row["accuracy"], 4)] for row in rows]
    return {**accuracies, "curve": curve, "seconds": round(sum(row["seconds"] for row in rows))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds")
    parser.add_argument("--algos", nargs="+", default=["ivr", "grpo"], help="values of train.py's --algo")
    parser.add_argument("--folder", default="runs/seeds", help="where the runs go")
    parser.add_argument("--results", default=ROOT / "experiments" / "results" / "seeds.json", type=Path,
                        help="JSON file of the figures")
    args, flags = parser.parse_known_args()           # the rest goes to train.py, which refuses unknown flags
    runs, rows, tokens = [], [], {}
    for algo in args.algos:
        for seed in range(args.seeds):
            more = ["--algo", algo, "--seed", str(seed)]
            if seed in tokens:
                more += ["--max_tokens", str(tokens[seed])]
            run = held_out(Path(args.folder) / f"{algo}-{seed}", [*flags, *more])
            tokens.setdefault(seed, run["curve"][-1][0])
            runs.append({"algo": algo, "seed": seed, **run})
    for run in runs:
        for name, after in run["after"].items():
            before = run["before"][name]
            gain = 100 * (after["mean"] - before["mean"])
            rows.append([run["algo"], run["seed"], name, percent(before), percent(after), f"{gain:+.1f}"])
    print(markdown(["--algo", "seed", "", "before", "after", "gain"], rows))
    command = " ".join(["python experiments/seeds.py", *sys.argv[1:]])
    write_text(args.results, json.dumps({"command": command, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
