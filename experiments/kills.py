"""Runs killed at random moments and resumed, against the same runs left alone: metrics, samples, weights and
optimiser state must be the same to the last bit.

    python experiments/kills.py --times 3           # 3 x (sft, grpo, ivr) x (1, 2 ranks); a few minutes
    python experiments/kills.py --times 100 --stages ivr --ranks 2

A kill is SIGKILL to one rank, then to the others, at a moment drawn from the length of the whole run, half of
the time while a checkpoint is being written. Each run is killed twice. The processes are forks of this one,
so that a run takes seconds. Needs a POSIX system.
"""
import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402

COMMON = ("--max_steps 3 --batch 2 --warmup_steps 1 --eval_problems 2 --eval_samples 1 --save_every 1 "
          "--keep 2 --trace_every 1 --print_every 0 --device cpu")
RL = "--data tiny:steps=5,kinds=tiles+bars --group_size 4 --max_new_tokens 60 --lr 1e-4"
STAGES = {"sft": "--stage sft --data tiny:steps=3 --max_new_tokens 60 --lr 1e-3",
          "grpo": f"--algo grpo {RL}", "ivr": f"--algo ivr --rectify_below 1 {RL}"}


def start(out: Path, stage: str, ranks: int) -> list[int]:
    """The process ids of a run's ranks; one with a checkpoint is resumed, as torchrun's restart does it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = ["--resume", str(out)] if list(out.glob("checkpoint-*")) else [
        "--model", str(ROOT / "tiny"), "--out", str(out), *COMMON.split(), *STAGES[stage].split()]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        with contextlib.suppress(BaseException), open(f"{out}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            try:
                train.main(flags)
                code = 0
            except BaseException as e:
                print(f"{type(e).__name__}: {e}", flush=True)
        os._exit(code)
    return pids


def finish(pids: list[int], out: Path):
    """Wait for the ranks; RuntimeError with the end of the log where one failed."""
    if any([os.waitpid(pid, 0)[1] for pid in pids]):
        raise RuntimeError(f"{out}: a run ended with an error:\n" + Path(f"{out}.log").read_text()[-2000:])


def kill(pids: list[int], out: Path, moment: float, while_saving: bool, rng: random.Random):
    """SIGKILL to a rank and, a little later, to the others."""
    time.sleep(moment)
    deadline = time.time() + 2
    while while_saving and time.time() < deadline and not (out / "unfinished-checkpoint").is_dir():
        time.sleep(0.0005)
    time.sleep(rng.random() * 0.02)
    for pid in rng.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
        time.sleep(rng.random() * 0.02)
    for pid in pids:
        os.waitpid(pid, 0)


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not share: metrics but for seconds, the traced groups, held-out figures, and
    every tensor of the last checkpoint."""
    rows = lambda out: [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                        for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = ["metrics.jsonl"] if rows(a) != rows(b) else []
    for name in ("groups.jsonl", "heldout.json"):
        texts = [(out / name).read_text() if (out / name).is_file() else "" for out in (a, b)]
        found += [name] if texts[0] != texts[1] else []
    last = [sorted(out.glob("checkpoint-*"))[-1] for out in (a, b)]
    for name in sorted({f.name for c in last for f in c.glob("*.safetensors")}):
        x, y = (load_file(c / name) for c in last)
        if x.keys() != y.keys() or not all(torch.equal(x[k], y[k]) for k in x):
            found.append(name)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1, help="killed runs of each kind")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), help="which")
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2], help="how many processes a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, bad = random.Random(args.seed), 0
    print("| run | ranks | killed with steps done | differs from the run left alone |\n|---|---|---|---|")
    for stage in args.stages:
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                whole, begun = Path(folder) / "whole", time.time()
                finish(start(whole, stage, ranks), whole)
                length = time.time() - begun
                for n in range(args.times):
                    out, done = Path(folder) / f"killed-{n}", []
                    for half in (0, 1):
                        kill(start(out, stage, ranks), out, length * rng.random(), half == 1, rng)
                        log = out / "metrics.jsonl"
                        done.append(log.read_text().count("\n") if log.is_file() else 0)
                    finish(start(out, stage, ranks), out)
                    wrong = differences(whole, out)
                    bad += bool(wrong)
                    print(f"| {stage} | {ranks} | {', '.join(map(str, done))} | "
                          f"{', '.join(wrong) or 'nothing'} |", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
