"""What the reader costs: peak memory and seconds a step with a frozen one, with the policy, and without
(GRPO).

    python experiments/reader_cost.py [--model FOLDER] [--rounds 3] [flags of train.py]

Each round trains a few steps in a fresh process for each setting, in turn, on one thread; a figure is the
median over rounds. On the tiny model a process is mostly the interpreter, so memory is also told above a
process that only loads the model. A frozen copy costs its weights in the dtype of the model and nothing else.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from experiments.tables import markdown  # noqa: E402
from train import write_text  # noqa: E402

SETTINGS = {"frozen start": ["--reader", "start"], "policy": ["--reader", "policy"],
            "none (grpo)": ["--algo", "grpo"]}
CODE = """
import json, resource, sys, time
sys.path.insert(0, {root!r})
import train
trainer = train.Trainer(train.parse_flags(train.TrainConfig, {flags!r}))
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
trainer.rl_step()
started = time.time()
for trainer.step in (1, 2, 3):
    trainer.rl_step()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([peak, peak - loaded, (time.time() - started) / 3, trainer.size / 2 ** 18]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    found = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, own in SETTINGS.items():
            given = ["--model", args.model, "--eval_problems", "0", "--device", "cpu", *own, *flags]
            code = CODE.format(root=str(ROOT), flags=given)
            done = subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        peak, above, seconds, weights = map(statistics.median, zip(*runs))
        rows.append({"reader": name, "peak MiB": round(peak), "above loading, MiB": round(above),
                     "seconds a step": round(seconds, 2), "weights MiB": round(weights, 1)})
    print(markdown(list(rows[0]), map(dict.values, rows)))
    command = " ".join(["python experiments/reader_cost.py", *sys.argv[1:]])
    result = {"command": command, "rows": rows}
    write_text(ROOT / "experiments" / "results" / "reader_cost.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
