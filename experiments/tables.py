"""The tables of README.md and experiments/README.md, from the files in experiments/results/.

    python experiments/tables.py            # print all
    python experiments/tables.py --write    # put them into both files, each after its <!-- table: NAME -->

A test fails where a table in either file is not the one made here. Intervals over seeds are Student's t, 95 %,
of runs or of differences paired by seed; with fewer than four runs the runs themselves are shown.
"""
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "experiments" / "README.md")
T_95 = (None, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)   # by degrees of freedom
ARMS = {"grpo": "GRPO", "grpo_large": "GRPO, groups of 12", "stepgrpo": "StepGRPO",
        "restarts only": "restarts only", "reader policy": "policy reads", "ivr": "IVR-R1",
        "grpo 2e-4": "GRPO, lr 2e-4", "reader policy 2e-4": "policy reads, lr 2e-4",
        "ivr 2e-4": "IVR-R1, lr 2e-4"}


def load(name: str):
    return json.loads((RESULTS / name).read_text())


def percent(values: list[float], signed: bool = False) -> str:
    """Mean and t-interval of runs, in percent."""
    shown = [f"{100 * v:+.1f}" if signed else f"{100 * v:.1f}" for v in values]
    if len(values) < 4:
        return ", ".join(shown)
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = T_95[len(values) - 1] * math.sqrt(variance / len(values))
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(100 * mean, 100 * (mean - half), 100 * (mean + half))


def markdown(head: list, rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main_job() -> str:
    """A row an algorithm: held-out accuracy over seeds."""
    runs, rows = load("seeds.json")["runs"], []
    for algo in dict.fromkeys(run["algo"] for run in runs):
        own, row = [run for run in runs if run["algo"] == algo], []
        for name in ("greedy", "avg@4"):
            row += [percent([run[when][name]["mean"] for run in own]) for when in ("before", "after")]
        rows.append([algo, len(own), *row])
    return markdown(["--algo", "seeds", "greedy before", "after", "avg@4 before", "after"], rows)


def builds() -> str:
    """A row a build of the embedded model: what it can do, see `figures` in tiny/build.py."""
    rows = []
    for file in sorted(RESULTS.glob("build-*.json")):
        found, cells = load(file.name), []
        for name in ("greedy", "sampled"):
            cells.append(" ".join(f"{100 * share:.0f}" for share in found[name]["true"].values()))
        says = " ".join(f"{nats:.1f}" for nats in found["dependence"].values())
        alone = " ".join(f"{100 * share:.0f}" for share in found["alone"].values())
        rows.append([file.stem[6:], alone, *cells, says, found["rank correlation"]])
    head = ["seed", "alone, %: bars path tiles total", "true at step 1 to 8, greedy, %", "sampled, %"]
    return markdown([*head, "the image's say, nats", "rank correlation"], rows)


def study() -> str:
    """Two rows a length of chains, a column an arm that was run at all."""
    results, rows = load("compare.json"), []
    arms = [arm for arm in ARMS if any(r["algo"] == arm for r in results)]
    for horizon in sorted({r["horizon"] for r in results}):
        for name, figure in (("sampled", "accuracy"), ("greedy", "greedy")):
            runs = {arm: {r["seed"]: r[figure] for r in results if (r["algo"], r["horizon"]) == (arm, horizon)}
                    for arm in arms}
            gains = [runs["ivr"][seed] - runs["grpo"][seed] for seed in runs["ivr"] if seed in runs["grpo"]]
            cells = [percent(list(runs[arm].values())) for arm in arms]
            rows.append([f"{horizon}, {name}", *cells, percent(gains, signed=True)])
    return markdown(["steps", *(ARMS[arm] for arm in arms), "IVR-R1 - GRPO"], rows)


def digits() -> str:
    results, rows = load("digits.json"), []
    for arm in dict.fromkeys(r["algo"] for r in results):
        runs = [r for r in results if r["algo"] == arm]
        columns = [f"{name} {when}" for name in ("avg@4", "greedy") for when in ("before", "after")]
        rows.append([ARMS[arm], *(percent([r[column] for r in runs]) for column in columns)])
    return markdown(["arm", "sampled before", "after", "greedy before", "after"], rows)


def localisers(file: str = "localisers.json") -> str:
    columns = ["localiser", "exact", "within 1", "error", "tokens"]
    kinds, rows = ["tiles", "path", "bars", "total"], []
    for r in load(file)["summary"]:
        rows.append([r[column] for column in columns] + [r[f"task {kind}"] for kind in kinds])
    return markdown(columns + kinds, rows)


def localisers_greedy() -> str:
    return localisers("localisers_greedy.json")


def rates() -> str:
    """Where there are twenty steps or more."""
    rows = [list(r.values()) for r in load("localisers.json")["rates"] if r["right"] + r["wrong"] >= 20]
    return markdown(["steps by", "", "right", "wrong", "false alarms", "found"], rows)


def repairs() -> str:
    rows = []
    for r in load("repairs.json")["rows"]:
        share = eval.percent({**r, "mean": r["repaired"]})
        rows.append([r["setting"], r["n"], share, f"{r['tokens']:.0f}"])
    return markdown(["setting", "failed rollouts", "repaired", "tokens each"], rows)


def speed() -> str:
    rows = []
    for r in load("speed.json")["generate"]:
        ours = r.get("ours without oneDNN", r["ours"])      # once large products went to oneDNN; no more
        rows.append([r["model"], r["prompt"], f"{ours:,.0f}", f"{r['generate']:,.0f}",
                     f"{ours / r['generate']:.1f}"])
    return markdown(["model", "longest prompt, tokens", "ours, tokens/s", "`generate`", "ratio"], rows)


def mutants() -> str:
    by_file = {}
    for name, by in load("mutants.json").items():
        by_file.setdefault(name.partition(":")[0], []).append(bool(by))
    rows = [[file, len(noticed), sum(noticed)] for file, noticed in by_file.items()]
    rows.append(["all", sum(row[1] for row in rows), sum(row[2] for row in rows)])
    return markdown(["file", "faults", "noticed"], rows)


def gpu() -> str:
    """A row an update or a sampling at real size."""
    rows = []
    for name, r in load("gpu.json")["rows"].items():
        if "peak" in r:
            share = f"{100 * r['matmul_share']:.0f} %" if "matmul_share" in r else "-"
            reckoned = f"{r['reckoned']:.1f}" if "reckoned" in r else "-"
            rows.append([name, f"{r['peak']:.1f}", reckoned, r["limit"], f"{r['kernels']:,.0f}",
                         f"{1000 * r['seconds']:,.0f}", share, f"{r['syncs']:g}"])
    head = ["", "peak, GiB", "reckoned", "limit", "kernels", "modelled ms", "in matrix products", "halts"]
    return markdown(head, rows)


def attack() -> str:
    found = load("attack.json")
    rows = [[area, r["cases"], len(r["failures"]), r["seconds"]] for area, r in found.items()]
    totals = [sum(row[column] for row in rows) for column in (1, 2, 3)]
    return markdown(["area", "cases", "failures", "seconds"], [*rows, ["all", *totals]])


TABLES = {"attack": attack, "gpu": gpu, "main": main_job, "builds": builds, "study": study,
          "digits": digits, "localisers": localisers, "localisers_greedy": localisers_greedy, "rates": rates,
          "repairs": repairs, "speed": speed, "mutants": mutants}


def filled(text: str) -> str:
    """The text with each table after its marker replaced by the one made here."""
    def table(match):
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n"

    return re.sub(r"<!-- table: (\w+) -->\n(?:\|.*\n)*", table, text)


def main():
    for page in PAGES if "--write" in sys.argv else ():
        page.write_text(filled(page.read_text()))
    for name, table in TABLES.items():
        print(f"{name}\n{table()}\n")


if __name__ == "__main__":
    main()
