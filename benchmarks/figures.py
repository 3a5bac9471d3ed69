"""Figures of an evaluation: accuracies with intervals, over all problems and by group; those of a step.

Place in the pipeline: after the verdicts; eval.py and train.py report with it. Definitions in eval.py.
"""
import math

import torch

from grpo import group_shares


def interval(values: list[float]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of per-problem values in [0, 1]. Values between 0 and 1 (several samples
    a problem) count for more than one yes/no each: the effective number of problems is mean (1 - mean) /
    variance of the mean, which is their plain number when all are 0 or 1. Source: Wilson 1927; the correction
    is our choice."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / n ** 2
    n = mean * (1 - mean) / variance if variance > 1e-12 else n
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def outcome(t) -> tuple:
    """What `of_rollouts` needs of a trajectory."""
    return (t.rewards["total"], t.rewards["accuracy"], t.rewards["format"], len(t.ids), t.finished,
            sum(t.sampled))


def of_rollouts(rows: list) -> dict:
    """What a step's rollouts were like. rows: B groups of G outcomes."""
    figures = torch.tensor(rows, dtype=torch.float64)                                          # (B, G, 6)
    names = ("reward", "accuracy", "format", "length", "finished")
    return {**dict(zip(names, figures.mean((0, 1)).tolist())), **group_shares(figures[..., 1]),
            "rollout_tokens": int(figures[..., 5].sum())}


def of_repairs(rows: list, checks: int) -> dict:
    """What the Re-Reasoning Loop did. rows: (repaired, tokens, looks) of each try; checks: the tokens that
    localisation wrote."""
    by_looks = lambda rows: [sum(min(looks, 3) == n for _, _, looks in rows) for n in range(4)]
    done = [r for r in rows if r[0]]
    return {"parents": len(rows), "repaired": len(done), "tried_by_looks": by_looks(rows),
            "repaired_by_looks": by_looks(done), "repair_tokens": checks + sum(r[1] for r in rows),
            "check_tokens": checks, "looks": sum(r[2] for r in done) / max(1, len(done))}


def summarise(records: list[dict]) -> dict:
    """Figures of some records: {name: {"mean", "low", "high"}} and n, the number of problems."""
    out = {"n": len({r["id"] for r in records})}

    def add(name, values):
        out[name] = dict(zip(("mean", "low", "high"), (sum(values) / len(values), *interval(values))))

    for mode in ("greedy", "sample"):
        by_problem = {}
        for r in records:
            if r["mode"] == mode:
                by_problem.setdefault(r["id"], []).append(r)
        if not by_problem:
            continue
        groups = list(by_problem.values())
        n = len(groups[0])
        mean = lambda key: [sum(map(key, g)) / n for g in groups]
        add("greedy" if mode == "greedy" else f"avg@{n}", mean(lambda r: r["correct"]))
        if mode == "sample":
            for k in (k for k in (2 ** j for j in range(1, 20)) if k <= n):
                add(f"pass@{k}", [pass_at_k(n, sum(r["correct"] for r in g), k) for g in groups])
        add(f"{mode} format", mean(lambda r: r["format"]))
        add(f"{mode} parse fail", mean(lambda r: r["extracted"] is None))
    return out


def report(records: list[dict]) -> str:
    """The table people read: all problems, then by group. Percent, with 95 % intervals."""
    groups = {"all": records}
    for key in dict.fromkeys(k for r in records for k in r["groups"]):
        of = lambda r: r["groups"][key] if isinstance(r["groups"][key], list) else [r["groups"][key]]
        values = sorted({v for r in records for v in of(r) if v})
        if len(values) > 1:
            groups.update({f"{key} {v}": [r for r in records if v in of(r)] for v in values})
    tables = {name: summarise(rows) for name, rows in groups.items()}
    columns = [c for c in tables["all"] if c != "n"]
    lines = [f"| {'':18} | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, table in tables.items():
        cells = [percent(table[c]) if c in table else "" for c in columns]
        lines.append(f"| {name:18} | {table['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracies(figures: dict) -> list[str]:
    """The names of a summary's accuracies: greedy, avg@k, pass@k."""
    return [n for n in figures if n == "greedy" or n.startswith(("avg@", "pass@"))]


def percent(figure: dict) -> str:
    return f"{100 * figure['mean']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def headline(figures: dict) -> str:
    """'greedy 50.0 % [..], avg@4 30.0 % [..], n 200' of a summary."""
    parts = [f"{name} {percent(figures[name])}" for name in accuracies(figures)]
    return ", ".join(parts) + f", {figures['n']} problems"
