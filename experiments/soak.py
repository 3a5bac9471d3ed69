"""A long run watched from inside: memory, open files and pace must stay what they are.

    python experiments/soak.py --minutes 60              # IVR-R1 on tiny, CPU
    python experiments/soak.py --minutes 5 --algo grpo   # any flag of train.py behind it

After each step the resident memory, the number of open files and the seconds go into
experiments/results/soak.json. Slopes are least squares over all steps but the first fifth; pace is the
seconds a generated token: the tenth percentile over the steps, so that what else the machine does for a while
does not count. Needs Linux's /proc.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from runtime.flags import parse_flags  # noqa: E402


class Watched(train.Trainer):
    """A run that ends after `minutes` and writes down what it holds after each step."""
    minutes, began, rows = 60.0, None, []

    def rl_step(self):
        self.began, before = self.began or time.time(), time.time()
        m = super().rl_step()
        with open("/proc/self/statm") as f:
            pages = int(f.read().split()[1])
        self.rows.append({"minute": (time.time() - self.began) / 60, "seconds": time.time() - before,
                          "files": len(os.listdir("/proc/self/fd")),
                          "memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                          "tokens": m["rollout_tokens"] + m.get("repair_tokens", 0)})
        return m

    def progress(self) -> float:
        done = (time.time() - self.began) / 60 / self.minutes if self.began else 0.0
        return min(done, 0.5) if done < 1 else 1.0              # repairs are not annealed away


def slopes(rows: list) -> dict:
    """Change a minute of memory (MB) and of open files, and the pace of the second half over that of the
    first."""
    kept, half = rows[len(rows) // 5:], len(rows) // 2
    minutes = np.array([r["minute"] for r in kept])
    slope = lambda name: float(np.polyfit(minutes, [r[name] for r in kept], 1)[0])
    pace = lambda part: float(np.quantile([r["seconds"] / r["tokens"] for r in part], 0.1))
    return {"minutes": rows[-1]["minute"], "steps": len(rows), "files": rows[-1]["files"],
            "files_a_minute": slope("files"), "memory_mb": rows[-1]["memory_mb"],
            "memory_mb_a_minute": slope("memory_mb"),
            "pace_second_over_first_half": pace(rows[half:]) / pace(rows[:half])}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long")
    args, flags = parser.parse_known_args(argv)             # the rest goes to train.py's parser
    with tempfile.TemporaryDirectory() as folder:
        config = parse_flags(train.TrainConfig, [
            "--data", "tiny:steps=9", "--batch", "16", "--max_new_tokens", "110", "--max_steps", "1000000",
            "--eval_problems", "8", "--eval_every", "50", "--save_every", "20", "--trace_every", "20",
            "--print_every", "0", "--device", "cpu", "--out", folder, *flags])
        trainer = Watched(config)
        trainer.minutes, trainer.rows = args.minutes, []
        train.run(trainer)
    found = slopes(trainer.rows)
    out = ROOT / "experiments" / "results" / "soak.json"
    out.write_text(json.dumps({**found, "rows": trainer.rows}) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
