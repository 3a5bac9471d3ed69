"""How well a step fills 8, 64 and 512 GPUs: a small simulation fed with measured lengths and times.

    python experiments/scaling.py               # measures on CPU, then simulates; two minutes

Measured on tiny: the lengths and verdicts of real rollouts, and how long a decode step takes by the number of
rows, a repair and an update by their tokens. Simulated: W ranks of 8 problems x 8 samples each draw such
groups at random. All wait for the slowest rank after the update, and then for the links. Efficiency is the
time in which a rank works over the time of the step. "As they are": all wait after the rollouts too, and each
rank keeps its groups; "dealt out": --balance tokens, groups change hands there; "queue": --balance queue,
each goes on with its own groups at once and then takes what others have ready (runtime/balance.py). What it
costs to hand a group over is left out.

The second table is on paper: a 3B model on H200 GPUs. Reckoned there, not measured: a decode step reads all
weights at 60 % of 4.8 TB/s, an update makes 8 operations a parameter and token (with --remat) at 40 % of 990
TFLOP/s, a repair costs as much as 3 % of a group's rollouts, lengths are log-normal (median 400, sigma 0.6)
and end at 2,048. Links: 400 GB/s a GPU within a node of 8, 50 GB/s across nodes; fp32 gradients go to their
owners, bf16 weights come back, and no transfer hides behind work.
"""
import argparse
import heapq
import json
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from runtime.balance import CIRCLE, deal, work  # noqa: E402
from runtime.flags import parse_flags  # noqa: E402

PROBLEMS, GROUP = 8, 8                                      # a rank
WORLDS = (8, 64, 512)


def seconds(function):
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def measure(steps: int) -> tuple[list, dict]:
    """(groups, costs) of some steps of 64 problems. A group: its lengths, whether it has a gradient, whether
    it is repaired. Costs: seconds of a decode step (fixed part, part a row), of a repaired group, of a token
    in the update."""
    trainer = train.Trainer(parse_flags(train.TrainConfig, [
        "--data", "tiny:steps=9", "--max_new_tokens", "110", "--eval_problems", "0", "--device", "cpu"]))
    groups, decode, repairs, updates = [], [], [], []
    for _ in tqdm(range(steps), desc="measuring"):
        problems, prompts = trainer.encode(trainer.step)
        for count in (1, PROBLEMS):                         # two batch sizes: two equations
            trainer.places = trainer.share[:count]
            few = lambda: trainer.roll_out(problems[:count], prompts[:count])
            spent, found = seconds(few)
            lengths = [len(t.ids) for group in found for t in group]
            decode.append((max(lengths), sum(lengths), spent))
        trainer.places = trainer.share
        rolled = trainer.roll_out(problems, prompts)
        trainer.score(rolled)
        chosen = trainer.to_rectify(rolled, 0.0)
        spent, (after, _, _) = seconds(lambda: trainer.repair(rolled, 0.0))
        repairs.append(spent / max(1, len(chosen)))
        trainer.assign_advantages(after)
        trainer.assign_credit(after)
        varied = [len({t.rewards["total"] for t in group}) > 1 for group in after]
        tokens = sum(len(t.ids) for group, v in zip(after, varied) for t in group if v)
        spent, _ = seconds(lambda: trainer.update(after, prompts, 0.0))
        updates.append(spent / max(1, tokens))
        groups += [([len(t.ids) for t in group], v, n in chosen)
                   for n, (group, v) in enumerate(zip(after, varied))]
        trainer.step += 1
    rows = np.array(decode)
    fixed, a_row = np.linalg.lstsq(rows[:, :2], rows[:, 2], rcond=None)[0]
    return groups, {"step": max(0.0, fixed), "row": max(0.0, a_row), "repair": float(np.median(repairs)),
                    "token": float(np.median(updates)), "links": lambda world: 0.0}


def on_paper(rng) -> tuple[list, dict]:
    """The same for a 3B model on H200 GPUs, reckoned."""
    lengths = np.minimum(2048, np.exp(rng.normal(np.log(400), 0.6, (4000, GROUP)))).astype(int)
    groups = [(row.tolist(), rng.random() < 0.6, rng.random() < 0.25) for row in lengths]
    size = 3.75e9
    step = 2 * size / (0.6 * 4.8e12)
    link = lambda world: (4 + 2) * size / (400e9 if world <= 8 else 50e9)
    return groups, {"step": step, "row": 0.0, "repair": 0.03 * 700 * step, "token": 8 * size / (0.4 * 990e12),
                    "links": link}


def queue(rolled, repairs, updates) -> float:
    """When the last of a circle of ranks is through, each of which repairs its own groups once its rollouts
    are done, then updates on them, the largest first, then on those that others have left. rolled (ranks,);
    repairs, updates (ranks, groups): seconds."""
    ready = rolled + repairs.sum(1)
    left = {r: sorted(own) for r, own in enumerate(updates)}
    ranks, last = [(t, r) for r, t in enumerate(ready)], 0.0
    heapq.heapify(ranks)
    while any(left.values()):
        now, r = heapq.heappop(ranks)
        there = [o for o in sorted(left, key=lambda o: (o != r, ready[o])) if left[o] and ready[o] <= now]
        if there:
            now += left[there[0]].pop()
        else:
            now = min(ready[o] for o in left if left[o])
        last = max(last, now)
        heapq.heappush(ranks, (now, r))
    return last


def simulate(groups: list, cost: dict, world: int, rng, steps: int = 40) -> dict:
    """Shares of a step in which a rank works, for each way to spread groups; and what is waited for where
    they are dealt out by tokens."""
    spent = {"rollouts": 0.0, "update, as they are": 0.0, "update, dealt": 0.0, "queue": 0.0}
    useful = {"rollouts": 0.0, "update": 0.0}
    for _ in range(steps):
        drawn = [groups[i] for i in rng.integers(len(groups), size=world * PROBLEMS)]
        lengths = np.array([g[0] for g in drawn]).reshape(world, -1)
        rollouts = cost["step"] * lengths.max(1) + cost["row"] * lengths.sum(1)
        holders = [n // PROBLEMS for n in range(len(drawn))]
        tokens = [work(*g) for g in drawn]
        repairs = np.array([cost["repair"] * chosen for _, _, chosen in drawn])
        updates = np.array([cost["token"] * sum(own) * varied for own, varied, _ in drawn])
        took = repairs + updates
        load = lambda owners: np.bincount(owners, took, world)
        spent["rollouts"] += rollouts.max()
        spent["update, as they are"] += load(holders).max()
        spent["update, dealt"] += load(deal(tokens, holders, world)).max()
        circles = zip(*(np.split(a.reshape(world, -1), range(CIRCLE, world, CIRCLE))
                        for a in (rollouts, repairs, updates)))
        spent["queue"] += max(queue(a[:, 0], b, c) for a, b, c in circles)
        useful["rollouts"] += rollouts.mean()
        useful["update"] += sum(took) / world
    links = cost["links"](world) * steps
    whole = sum(useful.values())
    return {"GPUs": world, "as they are": whole / (spent["rollouts"] + spent["update, as they are"] + links),
            "dealt out": whole / (spent["rollouts"] + spent["update, dealt"] + links),
            "queue": whole / (spent["queue"] + links),
            "waits for rollouts": (spent["rollouts"] - useful["rollouts"]) / whole,
            "waits for repairs and update": (spent["update, dealt"] - useful["update"]) / whole,
            "waits for links": links / whole}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of 64 problems")
    args = parser.parse_args()
    rng, found = np.random.default_rng(0), {}
    for name, (groups, cost) in (("tiny, measured", measure(args.steps)),
                                 ("3B on H200, on paper", on_paper(rng))):
        print(f"\n{name}: a decode step {1000 * cost['step']:.2f} ms and {1000 * cost['row']:.3f} ms a row, "
              f"a repaired group {1000 * cost['repair']:.0f} ms, a token in the update "
              f"{1e6 * cost['token']:.0f} us")
        rows = [simulate(groups, cost, world, rng) for world in WORLDS]
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for r in rows:
            print("| " + " | ".join(str(v) if v == r["GPUs"] else f"{v:.0%}" for v in r.values()) + " |")
        found[name] = rows
    (ROOT / "experiments" / "results" / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
