"""The study: GRPO, GRPO with larger groups, StepGRPO and IVR-R1 from the same warm start, at equal generated
tokens.

    python experiments/compare.py         # all runs that are not in results/compare.json yet, then the report
    python experiments/compare.py --arms ivr grpo --horizons 20 --seeds 1
    python experiments/compare.py --ablations         # the ablations, into results/ablations.json
    python experiments/compare.py --report            # tables and plot only, from the results

A run is one `train.py` on tiny problems of one length ("horizon") until the horizon's budget of generated
tokens is spent: rollouts, checks, looks, restarts, whatever became of them. Held-out accuracy is sampled at
temperature 1, along the run (`curve`) and, on all held-out problems, at its end. One thread a run, so that
runs side by side do not disturb one another; a stopped study goes on where it stopped.

The warm start is tiny's after 100 more supervised steps with deeper erosion (a wrong reading at 20 % of first
and 70 % of ninth steps), made here first: it solves about a quarter of the problems of 3 steps and none of
12. """
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
BUDGET = {3: 30_000, 6: 60_000, 9: 180_000, 12: 240_000, 20: 500_000}    # generated tokens a run, by horizon
KINDS = "tiles+path+bars"                   # what the warm start can read; it can not count
WARM = ("--stage sft --data tiny:steps=3-20,forms=free+check+free+relook+free --batch 48 "
        "--max_new_tokens 256 --max_steps 100 --lr 3e-4 --lr_end 0.2 --erosion_first 0.2 --erosion_ninth 0.7 "
        "--freeze_vision --eval_problems 0 --save_every 0 --device cpu")
COMMON = ("--batch 16 --group_size 8 --lr 2e-4 --warmup_steps 1 --freeze_vision --save_every 0 --keep 1 "
          "--print_every 0 --eval_problems 150 --eval_samples 4 --device cpu")
ARMS = {"grpo": "--algo grpo", "grpo_large": "--algo grpo --group_size 12", "stepgrpo": "--algo stepgrpo",
        "ivr": "--algo ivr"}
ABLATED = 9                                # the horizon of the ablations
ABLATIONS = {
    "ivr": "", "random cut": "--localiser random", "oracle cut": "--localiser oracle",
    "A2 margin": "--localiser margin", "A3 dependence": "--localiser dependence",
    "A4 Monte Carlo": "--localiser monte_carlo",
    "restarts only": "--relook none", "looks only": "--relook only",
    "look without the image": "--relook text", "masked prefix": "--mask_prefix", "with std": "--use_std",
    "plain w": "--gamma 0", "no annealing": "--anneal 0", "all-wrong groups only": "--rectify_below 0",
    "credit only": "--rectify_below -1", "repair only": "--credit rollout",
    "whole steps": "--credit step", "grpo": "--algo grpo",
}


def train(out: Path, flags: list):
    """`train.py` on one thread, with its log beside the run folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    with open(f"{out}.log", "w") as log:
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--out", str(out), *flags], check=True,
                       env=env, stdout=log, stderr=log)


def warm_start() -> Path:
    """The checkpoint all runs start from."""
    out = ROOT / "runs" / "compare-warm"
    if not list(out.glob("checkpoint-000100")):
        train(out, ["--model", str(ROOT / "tiny"), *WARM.split()])
    return out / "checkpoint-000100"


def run(out: Path, warm: Path, horizon: int, seed: int, flags: str) -> dict:
    """One training run -> its object for the results."""
    rollouts = 16 * 8 * (6.4 * horizon + 4)                             # tokens a step, about
    every = max(1, round(BUDGET[horizon] / rollouts / 50))             # an evaluation every 2 % of the budget
    train(out, ["--model", str(warm), "--data", f"tiny:steps={horizon},kinds={KINDS}",
                "--max_tokens", str(BUDGET[horizon]), "--max_new_tokens", str(10 * horizon + 20),
                "--eval_every", str(every), "--seed", str(seed), *COMMON.split(), *flags.split()])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held = json.loads((out / "heldout.json").read_text())
    accuracy = lambda figures: next(v["mean"] for k, v in figures.items() if k.startswith("avg@"))
    tail = rows[-max(1, len(rows) // 10):]
    known = lambda key: [r[key] for r in tail if r[key] is not None]    # no entropy where nothing is trained
    mean = lambda key: sum(known(key)) / len(known(key)) if known(key) else None
    return {"horizon": horizon, "seed": seed, "warm_accuracy": accuracy(held["before"]),
            "accuracy": accuracy(held["after"]), "greedy": held["after"]["greedy"]["mean"],
            "generated_tokens": rows[-1]["generated_tokens"], "steps": len(rows),
            "wall_s": round(sum(r["seconds"] for r in rows), 1),
            "curve": [[0, accuracy(held["before"])]] +
                     [[r["generated_tokens"], accuracy(r["heldout"])] for r in rows if "heldout" in r],
            "rollout_share": sum(r["rollout_tokens"] for r in rows) / rows[-1]["generated_tokens"],
            "entropy": mean("entropy"), "length": mean("length"), "format": mean("format"),
            "problems": held["after"]["problems"]}


def study(file: Path, arms: dict, horizons: list, seeds: int, jobs: int):
    """Run what is not in `file` yet, `jobs` runs at a time; `file` is written after each."""
    results = json.loads(file.read_text()) if file.is_file() else []
    done = {(r["algo"], r["horizon"], r["seed"]) for r in results}
    todo = [(name, h, s) for s in range(seeds) for h in horizons for name in arms if (name, h, s) not in done]

    def one(task):
        name, horizon, seed = task
        out = ROOT / "runs" / file.stem / f"{name.replace(' ', '-')}-{horizon}-{seed}"
        return {"algo": name, **run(out, warm, horizon, seed, arms[name])}

    warm = warm_start() if todo else None
    with ThreadPoolExecutor(jobs) as pool:
        for n, future in enumerate(as_completed([pool.submit(one, task) for task in todo]), start=1):
            result = future.result()
            results.append(result)
            results.sort(key=lambda r: (r["horizon"], r["algo"], r["seed"]))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
            print(f"{n}/{len(todo)}  {result['algo']}  {result['horizon']} steps  seed {result['seed']}  "
                  f"accuracy {100 * result['warm_accuracy']:.1f} -> {100 * result['accuracy']:.1f} %  "
                  f"{result['generated_tokens']:,} tokens  {result['wall_s']:.0f} s", flush=True)
    return results


# ------------------------------------------------------------------------------------------------------------
# The report


def at(curve: list, tokens: float) -> float:
    """Accuracy of a curve [[tokens, accuracy], ...] at a budget, between its points linearly."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if tokens <= x1:
            return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
    return curve[-1][1]


def mean_curve(runs: list, budget: int) -> list:
    """The mean over runs on a grid of 200 budgets, smoothed over a twentieth of the budget to either side
    (less at the ends): a point is one sample of each of 75 problems."""
    grid = [budget * n / 200 for n in range(201)]
    raw = [sum(at(r["curve"], x) for r in runs) / len(runs) for x in grid]
    half = [min(10, n, 200 - n) for n in range(201)]
    return [[x, sum(raw[n - w:n + w + 1]) / (2 * w + 1)] for n, (x, w) in enumerate(zip(grid, half))]


def reached(curve: list, accuracy: float) -> float:
    """The tokens from which on a curve is never more than two points below an accuracy it has then reached;
    inf if it never does."""
    for n, (x, y) in enumerate(curve):
        if y >= accuracy and min(y for _, y in curve[n:]) >= accuracy - 0.02:
            return x
    return float("inf")


def bootstrap(groups: list, statistic, times: int = 1000) -> tuple[float, float]:
    """95 % interval of `statistic` (of a list like `groups`, drawn with replacement), percentile
    bootstrap. With few seeds it is on the narrow side."""
    rng = random.Random(0)
    values = sorted(statistic([rng.choice(groups) for _ in groups]) for _ in range(times))
    return values[int(0.025 * times)], values[int(0.975 * times) - 1]


def difference(pairs: list, times: int = 1000) -> str:
    """Mean difference of final held-out accuracy in points, paired by seed and problem, with its interval.
    pairs: (run, baseline run) of the same seed. All runs have the same problems, so seeds and problems are
    drawn separately."""
    gaps = np.array([np.subtract(a["problems"], b["problems"]) for a, b in pairs])      # (seeds, problems)
    rng, (seeds, problems) = np.random.default_rng(0), gaps.shape
    drawn = [gaps[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()
             for _ in range(times)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{100 * gaps.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(results: list, baseline: str) -> str:
    """By horizon and arm: accuracy before and after; at the end, the paired difference from the baseline; the
    tokens after which the arm's mean curve is where the baseline ends (with those of the baseline's own
    curve); and the difference at the budget where the baseline is half-way up."""
    thousand = lambda x: "never" if x == float("inf") else f"{x / 1e3:.0f} k"
    lines = [f"| steps | arm | seeds | before | after | points over {baseline} at the end | "
             f"tokens to {baseline}'s end | points over {baseline} at its half-way | tokens | wall |",
             "|---" * 10 + "|"]
    for h in sorted({r["horizon"] for r in results}):
        base = [r for r in results if r["horizon"] == h and r["algo"] == baseline]
        for arm in dict.fromkeys(r["algo"] for r in results):
            runs = [r for r in results if r["horizon"] == h and r["algo"] == arm]
            if not runs:
                continue
            mean = lambda key: sum(r[key] for r in runs) / len(runs)
            low, high = bootstrap(runs, lambda rs: 100 * sum(r["accuracy"] for r in rs) / len(rs))
            end, when, half = "", "", ""
            if base:
                budget = min(r["curve"][-1][0] for r in runs + base)
                goal = mean_curve(base, budget)[-1][1]
                own = reached(mean_curve(base, budget), goal)
                start = sum(r["warm_accuracy"] for r in base) / len(base)
                climbs = goal > start + 0.02               # a baseline that stays at the bottom has no way up
                it = reached(mean_curve(runs, budget), goal)
                when = f"{thousand(it)} ({it / own:.2f} x)" if climbs and it < float("inf") else \
                    "never" if climbs else ""
            pairs = [(r, b) for r in runs for b in base if r["seed"] == b["seed"]]
            if pairs and arm != baseline:
                end = difference(pairs)
            if pairs and arm != baseline and climbs:
                middle = next(x for x, y in mean_curve(base, budget) if y >= (start + goal) / 2)
                height = lambda r: at(mean_curve([r], budget), middle)
                gap = lambda ps: 100 * sum(height(r) - height(b) for r, b in ps) / len(ps)
                half = f"{gap(pairs):+.1f} [{', '.join(f'{x:+.1f}' for x in bootstrap(pairs, gap, 100))}]"
            lines.append(f"| {h} | {arm} | {len(runs)} | {100 * mean('warm_accuracy'):.1f} % | "
                         f"{100 * mean('accuracy'):.1f} % [{low:.1f}, {high:.1f}] | {end} | {when} | "
                         f"{half} | {thousand(mean('generated_tokens'))} | {mean('wall_s'):.0f} s |")
    return "\n".join(lines)


def health(results: list) -> str:
    """Whether anything collapsed: figures of the last tenth of each run, worst over seeds; and the share of
    the generated tokens that were plain rollouts."""
    lines = ["| steps | arm | lowest entropy | lowest format | length | greedy | rollouts' share of tokens |",
             "|---" * 7 + "|"]
    for h, arm in sorted({(r["horizon"], r["algo"]) for r in results}):
        runs = [r for r in results if (r["horizon"], r["algo"]) == (h, arm)]
        mean = lambda key: sum(r[key] for r in runs) / len(runs)
        entropy = min((r["entropy"] for r in runs if r["entropy"] is not None), default=0)
        lines.append(f"| {h} | {arm} | {entropy:.3f} | "
                     f"{100 * min(r['format'] for r in runs):.1f} % | "
                     f"{min(r['length'] for r in runs):.0f} to {max(r['length'] for r in runs):.0f} | "
                     f"{100 * mean('greedy'):.1f} % | {100 * mean('rollout_share'):.0f} % |")
    return "\n".join(lines)


COLOURS = {"ivr": (200, 40, 40), "grpo": (40, 90, 200), "grpo_large": (90, 170, 230),
           "stepgrpo": (120, 120, 120)}


def plot(results: list, file: Path, width: int = 330, height: int = 250):
    """Accuracy over generated tokens (top) and over wall time (bottom), one panel a horizon: thin lines are
    seeds, thick ones means over seeds."""
    horizons = sorted({r["horizon"] for r in results})
    image = Image.new("RGB", (width * len(horizons), 2 * height + 24), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for column, h in enumerate(horizons):
        for row, axis in enumerate(("generated tokens", "seconds")):
            runs = [r for r in results if r["horizon"] == h]
            stretch = lambda r, x: x if row == 0 else x * r["wall_s"] / r["generated_tokens"]
            top = max(stretch(r, r["curve"][-1][0]) for r in runs)
            x0, y0, w, t = column * width + 38, 24 + row * height + 18, width - 50, height - 52
            place = lambda x, y: (x0 + w * x / top, y0 + t * (1 - y))
            pen.rectangle((x0, y0, x0 + w, y0 + t), outline=(180, 180, 180))
            for y in (0, 0.25, 0.5, 0.75, 1):
                pen.text((x0 - 4, y0 + t * (1 - y)), f"{100 * y:.0f}", fill="black", font=font, anchor="rm")
                pen.line((*place(0, y), *place(top, y)), fill=(235, 235, 235))
            label = f"{top / 1e6:.2f} M" if row == 0 else f"{top:.0f} s"
            pen.text((x0 + w, y0 + t + 4), label, fill="black", font=font, anchor="rt")
            pen.text((x0 + w / 2, y0 + t + 4), axis, fill="black", font=font, anchor="mt")
            pen.text((x0 + 4, y0 - 15), f"{h} steps: accuracy, %", fill="black", font=font)
            for arm, colour in COLOURS.items():
                mine = [r for r in runs if r["algo"] == arm]
                for r in mine:
                    points = [place(stretch(r, x), y) for x, y in r["curve"]]
                    pen.line(points, fill=tuple((c + 2 * 255) // 3 for c in colour), width=1)
                if mine:
                    end = min(stretch(r, r["curve"][-1][0]) for r in mine)
                    curves = [[[stretch(r, x), y] for x, y in r["curve"]] for r in mine]
                    grid = [end * n / 60 for n in range(61)]
                    points = [place(x, sum(at(c, x) for c in curves) / len(curves)) for x in grid]
                    pen.line(points, fill=colour, width=3)
    for n, (arm, colour) in enumerate(COLOURS.items()):
        pen.line((12 + 110 * n, 12, 36 + 110 * n, 12), fill=colour, width=3)
        pen.text((42 + 110 * n, 12), arm, fill="black", font=font, anchor="lm")
    image.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", help="which arms (all)")
    parser.add_argument("--horizons", nargs="*", type=int, help="which horizons (all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a setting")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--ablations", action="store_true", help=f"the ablations, at {ABLATED} steps")
    parser.add_argument("--report", action="store_true", help="no runs")
    args = parser.parse_args()
    arms, file = (ABLATIONS, "ablations.json") if args.ablations else (ARMS, "compare.json")
    if not args.report:
        study(RESULTS / file, {n: f for n, f in arms.items() if n in (args.arms or arms)},
              args.horizons or ([ABLATED] if args.ablations else list(BUDGET)), args.seeds, args.jobs)
    results = json.loads((RESULTS / file).read_text())
    print(table(results, "ivr" if args.ablations else "grpo"), health(results), sep="\n\n")
    if not args.ablations:
        plot(results, RESULTS / "compare.png")


if __name__ == "__main__":
    main()
