"""The study: GRPO, larger groups, StepGRPO and IVR-R1 from the shipped model, at equal generated tokens.

    python experiments/compare.py         # all runs that are not in results/compare.json yet, then the report
    python experiments/compare.py --arms ivr grpo --horizons 20 --seeds 1
    python experiments/compare.py --ablations           # the ablations, into results/ablations.json
    python experiments/compare.py --report              # tables and plot only, from the results
    python experiments/compare.py --one ARM [flags of train.py]         # a single run of an arm

A run is one training on tiny problems of one length ("horizon") until the horizon's budget of generated
tokens is spent: rollouts, checks, revisions, restarts, whatever became of them. Held-out accuracy is sampled
at temperature 1, along the run (`curve`) and, on all held-out problems, at its end. One thread a run, so that
runs side by side do not disturb one another; a stopped study continues where it stopped. Intervals are those
of tables.py.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from experiments import localisers, stepgrpo  # noqa: E402
from experiments.tables import markdown, percent  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
BUDGET = {horizon: 50_000 * horizon for horizon in (3, 6, 9, 12, 20)}      # generated tokens a run
COMMON = {"batch": 16, "group_size": 8, "lr": 1e-4, "warmup_steps": 1, "freeze_vision": True, "save_every": 0,
          "keep": 1, "show_every": 0, "eval_problems": 150, "eval_samples": 4, "device": "cpu"}
ARMS = {"grpo": {"algo": "grpo"}, "grpo_large": {"algo": "grpo", "group_size": 12},
        "stepgrpo": stepgrpo.PRESET, "ivr": {"algo": "ivr"}, "reader policy": {"reader": "policy"},
        "restarts only": {"revise": False}, "grpo 2e-4": {"algo": "grpo", "lr": 2e-4},
        "ivr 2e-4": {"lr": 2e-4}, "reader policy 2e-4": {"reader": "policy", "lr": 2e-4}}
ABLATED = 9                                 # the horizon of the ablations
ABLATIONS = {
    "ivr": {}, "random cut": {}, "oracle cut": {}, "A2 margin": {}, "A3 dependence": {}, "A4 Monte Carlo": {},
    "window 0": {"reader_window": 0}, "window 2": {"reader_window": 2},
    "with std": {"use_std": True}, "plain w": {"gamma": 0.0},
    "no annealing": {"anneal": 0.0}, "all-wrong groups only": {"rectify_below": 0.0},
    "credit only": {"rectify_below": -1.0}, "repair only": {"credit": "rollout"},
    "whole steps": {"credit": "step"}, "grpo": {"algo": "grpo"},
}
LOCALISERS = {"random cut": localisers.RandomStep, "oracle cut": localisers.Oracle,
              "A2 margin": localisers.Margin, "A3 dependence": localisers.Dependence,
              "A4 Monte Carlo": localisers.MonteCarlo}


def trainer_of(arm: str):
    """The class that trains an arm: train.Trainer, StepGRPO, or a Trainer with another verifier."""
    class Localised(train.Trainer):
        def verifier_class(self, reader, codec, window):        # a method: it knows policy and step
            verifier = LOCALISERS[arm](reader, codec, window)
            verifier.policy, verifier.max_new_tokens = self.model, self.config.max_new_tokens
            verifier.key = f"locate/{self.config.seed}/{self.step}"
            return verifier

    if arm in LOCALISERS:
        return Localised
    return stepgrpo.StepGRPO if arm == "stepgrpo" else train.Trainer


# ---- Runs

def launch(out: Path, command: list):
    """A training process on one thread, its output in a log beside the run folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *command, "--out", str(out)]
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log:
        subprocess.run(command, check=True, env=env, stdout=log, stderr=log)


def run(out: Path, arm: str, horizon: int, seed: int) -> dict:
    """One run of an arm -> its object for the results. length and format are those of its last tenth."""
    tokens_a_step = 16 * 8 * (17.5 * horizon + 10)                          # of rollouts, about
    every = max(1, round(BUDGET[horizon] / tokens_a_step / 50))             # an evaluation every 2 % of them
    launch(out, [__file__, "--one", arm, "--model", str(ROOT / "tiny"), "--seed", str(seed),
                 "--data", f"tiny:steps={horizon}", "--max_new_tokens", str(25 * horizon + 20),
                 "--max_tokens", str(BUDGET[horizon]), "--eval_every", str(every)])
    rows, held = train.read_jsonl(out / "metrics.jsonl"), json.loads((out / "heldout.json").read_text())
    before, after, tail = held["before"], held["after"], rows[-max(1, len(rows) // 10):]
    curve, generated = [[0, before["avg@4"]["mean"]]], rows[-1]["generated_tokens"]
    for row in rows:
        if "heldout" in row:
            curve.append([row["generated_tokens"], row["heldout"]["avg@1"]["mean"]])
    return {"algo": arm, "horizon": horizon, "seed": seed, "warm_accuracy": before["avg@4"]["mean"],
            "accuracy": after["avg@4"]["mean"], "greedy": after["greedy"]["mean"],
            "generated_tokens": generated, "steps": len(rows), "curve": curve,
            "wall_s": round(sum(column(rows, "seconds")), 1), "problems": after["problems"],
            "rollout_share": sum(column(rows, "rollout_tokens")) / generated,
            "length": mean(tail, "length"), "format": mean(tail, "format")}


def column(rows: list, name: str) -> list:
    return [row[name] for row in rows]


def mean(rows: list, name: str) -> float:
    return sum(column(rows, name)) / len(rows)


def study(file: Path, arms: list, horizons: list, seeds: int, jobs: int):
    """Run what is not in `file` yet, `jobs` runs at a time; `file` is written after each."""
    results, todo = json.loads(file.read_text()) if file.is_file() else [], []
    done = {(r["algo"], r["horizon"], r["seed"]) for r in results}
    for seed in range(seeds):
        for horizon in horizons:
            todo += [(arm, horizon, seed) for arm in arms if (arm, horizon, seed) not in done]
    if not todo:
        return
    futures = []
    with ThreadPoolExecutor(jobs) as pool:
        for arm, horizon, seed in todo:
            out = ROOT / "runs" / file.stem / f"{arm.replace(' ', '-')}-{horizon}-{seed}"
            futures.append(pool.submit(run, out, arm, horizon, seed))
        for n, future in enumerate(as_completed(futures), start=1):
            r = future.result()
            results.append(r)
            results.sort(key=lambda r: (r["horizon"], r["algo"], r["seed"]))
            lines = [json.dumps(result) for result in results]
            train.write_text(file, "[\n" + ",\n".join(lines) + "\n]\n")
            print(f"{n}/{len(todo)}  {r['algo']}  {r['horizon']} steps  seed {r['seed']}  accuracy "
                  f"{100 * r['warm_accuracy']:.1f} -> {100 * r['accuracy']:.1f} %  "
                  f"{r['generated_tokens']:,} tokens  {r['wall_s']:.0f} s", flush=True)


# ---- The report

def mean_curve(curves: list, end: float, points: int = 200, smooth: int = 10) -> tuple:
    """The mean of curves [[tokens, accuracy], ...] at `points` + 1 budgets up to `end`, smoothed over
    `smooth` points to either side (less at the ends): a point is one sample of each of 75 problems."""
    budgets = np.linspace(0, end, points + 1)
    heights = np.mean([np.interp(budgets, *zip(*curve)) for curve in curves], axis=0)
    averaged = []
    for n in range(points + 1):
        reach = min(smooth, n, points - n)
        averaged.append(heights[n - reach:n + reach + 1].mean())
    return budgets, np.array(averaged)


def reached(curve: tuple, accuracy: float) -> float:
    """The tokens from which on a mean curve is never more than two points below an accuracy it has then
    reached; inf if it never does."""
    budgets, heights = curve
    lowest_after = np.minimum.accumulate(heights[::-1])[::-1]
    stays = (heights >= accuracy) & (lowest_after >= accuracy - 0.02)
    return min(budgets[stays], default=np.inf)


def compared(runs: list, base: list) -> list[str]:
    """An arm against the baseline: points above it at the end; tokens until its mean curve is where the
    baseline's ends, and how that compares with the baseline's own; points above it at the budget where the
    baseline is half-way up. Points are paired by seed."""
    base_of_seed, ends, halves = {b["seed"]: b for b in base}, [], []
    budget = min(column(runs + base, "generated_tokens"))
    base_curve = mean_curve(column(base, "curve"), budget)
    start, goal = mean(base, "warm_accuracy"), base_curve[1][-1]
    middle = np.argmax(base_curve[1] >= (start + goal) / 2)         # the first such point of the grid
    for r in runs:
        if b := base_of_seed.get(r["seed"]):
            ends.append(r["accuracy"] - b["accuracy"])
            own, other = mean_curve([r["curve"]], budget), mean_curve([b["curve"]], budget)
            halves.append(own[1][middle] - other[1][middle])
    if goal <= start + 0.02:                        # a baseline that stays at the bottom has no way up
        return [percent(ends, signed=True), "", ""]
    tokens = reached(mean_curve(column(runs, "curve"), budget), goal)
    when = f"{tokens / 1e3:.0f} k ({tokens / reached(base_curve, goal):.2f} x)"
    return [percent(ends, signed=True), when if tokens < np.inf else "never", percent(halves, signed=True)]


def report(results: list, baseline: str) -> str:
    """A row by horizon and arm: accuracy, also against the baseline; and what shows a collapse."""
    head = ["steps", "arm", "seeds", "before", "after", f"over {baseline}", f"tokens to {baseline}'s end",
            f"over {baseline} at its half-way", "greedy", "length", "format", "rollouts' share", "wall"]
    by_arm, rows = {}, []
    for r in results:
        by_arm.setdefault((r["horizon"], r["algo"]), []).append(r)
    for (horizon, arm), runs in by_arm.items():
        base = by_arm.get((horizon, baseline), [])
        against = compared(runs, base) if base and arm != baseline else ["", "", ""]
        lengths, formats = column(runs, "length"), column(runs, "format")
        rows.append([horizon, arm, len(runs), f"{100 * mean(runs, 'warm_accuracy'):.1f}",
                     percent(column(runs, "accuracy")), *against, f"{100 * mean(runs, 'greedy'):.1f}",
                     f"{min(lengths):.0f} to {max(lengths):.0f}", f"{100 * min(formats):.1f}",
                     f"{100 * mean(runs, 'rollout_share'):.0f} %", f"{mean(runs, 'wall_s'):.0f} s"])
    return markdown(head, rows)


COLOURS = {"ivr": (200, 40, 40), "grpo": (40, 90, 200), "reader policy": (230, 150, 40),
           "restarts only": (120,) * 3}
FONT = ImageFont.load_default(size=11)


def draw_panel(pen, curves: dict, left: int, top: int, width: int, height: int, title: str, unit: str):
    """Accuracy over tokens or seconds: thin lines are seeds, thick ones means. curves: by arm."""
    end = max(curve[-1][0] for runs in curves.values() for curve in runs)
    right, bottom = left + width, top + height

    def line(points, colour, thickness):
        pen.line([(left + width * x / end, top + height * (1 - y)) for x, y in points], colour, thickness)

    pen.rectangle((left, top, right, bottom), outline=(180, 180, 180))
    for y in (0, 0.25, 0.5, 0.75, 1):
        pen.text((left - 4, top + height * (1 - y)), f"{100 * y:.0f}", fill="black", font=FONT, anchor="rm")
        line([(0, y), (end, y)], (235, 235, 235), 1)
    label = f"{end / 1e6:.2f} M" if unit == "generated tokens" else f"{end:.0f} s"
    pen.text((right, bottom + 4), label, fill="black", font=FONT, anchor="rt")
    pen.text((left + width / 2, bottom + 4), unit, fill="black", font=FONT, anchor="mt")
    pen.text((left + 4, top - 15), title, fill="black", font=FONT)
    for arm, colour in COLOURS.items():
        runs = curves.get(arm, [])
        pale = tuple((value + 2 * 255) // 3 for value in colour)
        for curve in runs:
            line(curve, pale, 1)
        if runs:
            shortest = min(curve[-1][0] for curve in runs)
            line(zip(*mean_curve(runs, shortest, 60, 0)), colour, 3)


def plot(results: list, file: Path, width: int = 330, height: int = 250):
    """Accuracy over generated tokens (top) and over wall time (bottom), a column a horizon."""
    horizons = sorted({r["horizon"] for r in results})
    image = Image.new("RGB", (width * len(horizons), 2 * height + 24), "white")
    pen = ImageDraw.Draw(image)
    for place, horizon in enumerate(horizons):
        for row, unit in enumerate(("generated tokens", "seconds")):
            curves = {}
            for r in results:
                if r["horizon"] == horizon:
                    scale = r["wall_s"] / r["generated_tokens"] if unit == "seconds" else 1
                    curves.setdefault(r["algo"], []).append([[x * scale, y] for x, y in r["curve"]])
            draw_panel(pen, curves, place * width + 38, row * height + 42, width - 50, height - 52,
                       f"{horizon} steps: accuracy, %", unit)
    for n, (arm, colour) in enumerate(COLOURS.items()):
        pen.line((12 + 110 * n, 12, 36 + 110 * n, 12), fill=colour, width=3)
        pen.text((42 + 110 * n, 12), arm, fill="black", font=FONT, anchor="lm")
    image.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", help="which arms (all)")
    parser.add_argument("--horizons", nargs="*", type=int, choices=BUDGET, help="which horizons (all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a setting")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--ablations", action="store_true", help=f"the ablations, at {ABLATED} steps")
    parser.add_argument("--report", action="store_true", help="no runs")
    parser.add_argument("--one", choices={**ARMS, **ABLATIONS}, help="one run of this arm, in this process")
    args, flags = parser.parse_known_args()
    if args.one:
        own_flags = {**ABLATIONS, **ARMS}[args.one]
        return train.start(flags, trainer_of(args.one), {**COMMON, **own_flags})
    known, horizons, name, baseline = ARMS, list(BUDGET), "compare", "grpo"
    if args.ablations:
        known, horizons, name, baseline = ABLATIONS, [ABLATED], "ablations", "ivr"
    arms, file = args.arms or list(known), RESULTS / f"{name}.json"
    if flags or not set(arms) <= set(known):
        parser.error(f"unknown: {' '.join([*flags, *set(arms) - set(known)])}")
    if not args.report:
        study(file, arms, args.horizons or horizons, args.seeds, args.jobs)
    results = json.loads(file.read_text())
    print(report(results, baseline))
    if not args.ablations:
        plot(results, RESULTS / "compare.png")


if __name__ == "__main__":
    main()
