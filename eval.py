"""Evaluation: greedy accuracy, avg@k, pass@k, format and parse-fail rates, with intervals, by task and by
steps.

    python eval.py --model tiny --data tiny:steps=5 --greedy --samples 4 --out results.jsonl
    python eval.py --model Qwen/Qwen2.5-VL-3B-Instruct --data my_benchmark.jsonl --greedy
    python eval.py --localise --data tiny:steps=9          # how well attribute.py finds the first wrong step

Place in the pipeline: before and after training (`train.py` calls `evaluate` and `summarise`). Reads from
model.py, rollout.py, reward.py. The paper names no evaluation protocol; the definitions are the field's usual
ones:
  avg@k   mean accuracy of k samples at temperature 1, averaged over problems
  pass@k  chance that at least one of k samples is right, unbiased from n >= k (Chen et al., arXiv 2107.03374)
  interval  95 %, Wilson's; the k samples of a problem are not independent, so they count as one problem

Worked example: two problems with 4 samples each, 4 and 0 of them right: avg@4 = 0.5, pass@1 = 0.5, pass@4 =
0.5, and the interval is that of 1 success in 2, not of 4 in 8.
"""
import argparse
import inspect
import json
import math
import random
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

import attribute
import rollout
from model import load_model
from reward import answers_match, extract_answer, format_ok, reward_parts
from tiny import shapes


@dataclass
class EvalConfig:
    """Flags of `python eval.py`; without --greedy and --samples it does both, with 4 samples."""
    model: str = "tiny"                 # folder or hub id of the checkpoint
    data: str = "tiny"       # JSONL file, or "tiny" (held-out split), e.g. "tiny:steps=3-9,forms=free+choice"
    image_dir: str = ""                 # folder that image paths are relative to ("" = the folder of --data)
    instruction: str = rollout.INSTRUCTION  # text appended to each question of a JSONL file (may be empty)
    problems: int = 0                   # evaluate the first so many problems (0 = all of a file, 256 of tiny)
    greedy: bool = False                # greedy accuracy, one completion a problem
    localise: bool = False              # score every localiser of attribute.py against the step oracle (tiny)
    flawed: int = 2000                  # flawed rollouts to score them on
    samples: int = 0                    # k: samples a problem at temperature 1, for avg@k and pass@k
    max_new_tokens: int = 0             # length limit of a completion (0 = 2048 for a file, 256 for tiny)
    max_prompt_tokens: int = 16384      # a longer prompt is an error
    max_pixels: int = 0                 # larger images are scaled down to this area (0 = the checkpoint's)
    batch: int = 32                     # prompts sampled together
    seed: int = 0                       # random numbers of the samples
    device: str = "auto"                # cpu, cuda, cuda:1 ... (auto = cuda where there is one)
    dtype: str = "auto"                 # float32, bfloat16 (auto = bfloat16 on cuda, float32 on cpu)
    out: str = ""                       # JSONL file for one row a completion


def parse_flags(config_class, argv=None, defaults: dict | None = None):
    """A dataclass as a command line: every field a --flag, its comment the help text. Unknown flags exit with
    code 2. `defaults` replaces default values by field name (a saved configuration)."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=config_class.__doc__, allow_abbrev=False)
    for f in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if f.type in (bool, "bool") else {"type": f.type}
        help_text = f"{comments.get(f.name, '')} [{f.default}]".replace("%", "%%")
        default = (defaults or {}).get(f.name, f.default)
        parser.add_argument(f"--{f.name}", default=default, help=help_text, **kind)
    return config_class(**vars(parser.parse_args(argv)))


def device_and_dtype(device: str, dtype: str):
    """Resolve "auto": cuda and bfloat16 where there is a GPU, else cpu and float32. ValueError for others."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "auto" and device.partition(":")[0] not in ("cpu", found):
        raise ValueError(f"--device {device}: there is no such device here, only {found}")
    device = torch.device(found if device == "auto" else device)
    names = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32,
             "bfloat16": torch.bfloat16}
    if dtype not in names:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(names)}")
    return device, names[dtype]


# ------------------------------------------------------------------------------------------------------------
# Running a model


def evaluate(model, codec, problems, greedy: bool, samples: int, max_new_tokens: int, seed: int = 0,
             batch: int = 32, progress: bool = True) -> list[dict]:
    """One record a completion: id, task, steps, mode, completion, extracted, gold, correct, format, finished,
    tokens. A problem's random numbers depend on `seed` and its id alone, so the same problem gives the same
    samples in any company."""
    lengths = [len(rollout.encode_prompt(p, codec, pixels=False).ids) for p in problems]
    order = sorted(range(len(problems)), key=lengths.__getitem__)                   # similar lengths together
    records = [[] for _ in problems]
    modes = [("greedy", 1, 0.0)] * greedy + [("sample", samples, 1.0)] * (samples > 0)
    total = len(modes) * len(problems)
    bar = tqdm(total=total, desc="evaluating", leave=False, disable=None if progress else True)
    for mode, group_size, temperature in modes:
        for at in range(0, len(order), batch):
            part = order[at:at + batch]
            numbers = [rollout.uniforms(f"eval/{seed}/{problems[i].id}", group_size, max_new_tokens)
                       for i in part]
            groups = rollout.sample(model, [problems[i] for i in part], codec, group_size, max_new_tokens,
                                    temperature, torch.cat(numbers))
            for i, group in zip(part, groups):
                records[i] += [{**judge(t), "mode": mode, "sample": k} for k, t in enumerate(group)]
            bar.update(len(part))
    bar.close()
    return [r for rows in records for r in rows]


def judge(trajectory) -> dict:
    """What one completion is worth."""
    problem = trajectory.problem
    extracted = extract_answer(trajectory.text, problem.choices)
    return {"id": problem.id, "task": problem.task, "steps": len(problem.key_steps or []),
            "completion": trajectory.text, "extracted": extracted, "gold": problem.answer,
            "correct": extracted is not None and answers_match(extracted, problem.answer, problem.choices),
            "format": trajectory.finished and format_ok(trajectory.text), "finished": trajectory.finished,
            "tokens": len(trajectory.ids)}


# ------------------------------------------------------------------------------------------------------------
# Figures


def interval(values: list[float]) -> tuple[float, float]:
    """95 % Wilson interval of a mean of per-problem values in [0, 1]. Values between 0 and 1 (several samples
    a problem) count for more than one yes/no each: the effective number of problems is mean (1 - mean) /
    variance of the mean, which is their plain number when all are 0 or 1. Source: Wilson 1927; the correction
    is our choice."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / n ** 2
    n = mean * (1 - mean) / variance if variance > 0 else n
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right when c of n were: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


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
    """The table people read: all problems, then by task and by steps. Percent, with 95 % intervals."""
    groups = {"all": records}
    for key in ("task", "steps"):
        values = sorted({r[key] for r in records if r[key]})
        if len(values) > 1:
            groups.update({f"{key} {v}": [r for r in records if r[key] == v] for v in values})
    tables = {name: summarise(rows) for name, rows in groups.items()}
    columns = [c for c in tables["all"] if c != "n"]
    lines = [f"| {'':18} | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, table in tables.items():
        cells = [percent(table[c]) if c in table else "" for c in columns]
        lines.append(f"| {name:18} | {table['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Localisers against the step oracle of tiny


def flawed_rollouts(model, codec, stream, count: int, max_new_tokens: int, seed: int, group_size: int = 8):
    """Flawed rollouts of a tiny stream until there are `count` -> [(trajectory, its first wrong step,
    0-based)]. Those whose steps are all right (the answer alone is wrong) have no such step: their number is
    the second result."""
    found, slips, at = [], 0, 0
    bar = tqdm(total=count, desc="flawed rollouts", leave=False)
    while len(found) < count and at < 32 * count:       # a policy may fail too seldom
        problems = [stream[i] for i in range(at, at + 32)]
        at += 32
        numbers = [rollout.uniforms(f"localise/{seed}/{p.id}", group_size, max_new_tokens) for p in problems]
        for group in rollout.sample(model, problems, codec, group_size, max_new_tokens, 1.0,
                                    torch.cat(numbers)):
            for t in group:
                t.rewards = reward_parts(t.text, t.problem.answer, t.problem.choices, t.finished)
                t.steps = attribute.split_steps(t.ids, codec)
            for t in attribute.flawed(group):
                verdicts = shapes.check_steps(t.problem, [s.text for s in t.steps])
                wrong = next((k for k, v in enumerate(verdicts) if v != "true"), None)
                slips += wrong is None
                if wrong is not None and len(found) < count:
                    found.append((t, wrong))
                    bar.update()
    bar.close()
    return found, slips


def score_localisers(model, codec, found: list, max_new_tokens: int, batch: int = 128) -> list[dict]:
    """One record a localiser and rollout: signal, task, steps, off (steps between found and true), tokens."""
    records = []

    def note(signal, part, faults, tokens):
        records.extend({"signal": signal, "task": t.problem.task, "steps": len(t.problem.key_steps),
                        "off": abs(k - true), "tokens": tokens / len(part)}
                       for (t, true), k in zip(part, faults))

    for at in tqdm(range(0, len(found), batch), desc="localising", leave=False):
        part = found[at:at + batch]
        chains = [t for t, _ in part]
        locate = attribute.Locator(model, codec)
        locate(chains)
        margins = attribute.answer_margins(model, codec, chains)
        depends = attribute.visual_dependence(model, codec, chains)
        faults = [attribute.localise(t.checks, m, d, t.steps) for t, m, d in zip(chains, margins, depends)]
        note("A1, else A2 (default)", part, [f.step for f in faults], locate.tokens)
        note("A1 check", part, [attribute.localise(t.checks).step for t in chains], locate.tokens)
        note("A2 drop", part, [attribute.margin_drop(m) for m in margins], 0)
        note("A2 no return", part, [attribute.no_return(m) for m in margins], 0)
        note("A3 erosion", part, [attribute.most_eroded(d, t.steps) for t, d in zip(chains, depends)], 0)
        deaths, tokens = attribute.monte_carlo(model, codec, chains, max_new_tokens)
        note("A4 Monte Carlo", part, deaths, tokens)
        note("random", part, [random.Random(f"{at}/{n}").randrange(len(t.steps))
                              for n, t in enumerate(chains)], 0)
        note("last step", part, [len(t.steps) - 1 for t in chains], 0)
    return records


def planted_kinds(model, codec, stream, count: int) -> list[tuple[str, str]]:
    """(planted, found) kinds of error in chains with one planted error each: a wrong reading at the first two
    steps, where the policy still looks (misread), or at the last third, where erosion has set in (eroded); a
    wrong conclusion from a right reading (reasoning)."""
    chains, planted, rng = [], [], random.Random(0)
    for i in range(count):
        p, kind = stream[i], ("misread", "eroded", "reasoning")[i // 4 % 3]
        steps = shapes.true_steps(p.oracle)
        k = rng.randrange(2) if kind == "misread" else rng.randrange(len(steps) * 2 // 3, len(steps))
        if kind != "reasoning":
            steps = shapes.corrupt(p.oracle, {k}, rng)
        elif (slipped := shapes.slip(p.oracle, steps[k], rng)) != steps[k]:
            steps[k] = slipped
        else:
            continue                                    # counting and following dots conclude nothing
        answer = shapes.answer_from_steps(p.oracle, steps)
        text = f"<think>{chr(10).join(steps)}</think><answer>{answer}</answer>"
        ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
        t = rollout.Trajectory(p, ids, [1] * len(ids), [0.0] * len(ids), True, text)
        t.steps = attribute.split_steps(ids, codec)
        chains.append(t)
        planted.append(kind)
    found = []
    for at in range(0, len(chains), 64):
        part = chains[at:at + 64]
        attribute.Locator(model, codec)(part)
        depends = attribute.visual_dependence(model, codec, part)
        found += [attribute.localise(t.checks, None, d, t.steps).kind for t, d in zip(part, depends)]
    return list(zip(planted, found))


def localisation_report(records: list[dict]) -> str:
    """Exact hits, hits within one step, and tokens a rollout of each signal; exact hits by steps and by
    task."""
    columns = [("steps", n) for n in sorted({r["steps"] for r in records})]
    columns += [("task", n) for n in sorted({r["task"] for r in records})]
    columns = [c for c in columns if len({r[c[0]] for r in records}) > 1]
    lines = ["| localiser | exact | within 1 | tokens | " + " | ".join(f"{v} {k}" if k == "steps" else str(v)
                                                                         for k, v in columns) + " |",
             "|---" * (len(columns) + 4) + "|"]
    for signal in dict.fromkeys(r["signal"] for r in records):
        rows = [r for r in records if r["signal"] == signal]
        share = lambda rows, far: 100 * sum(r["off"] <= far for r in rows) / len(rows)
        low, high = interval([float(r["off"] == 0) for r in rows])
        cells = [f"{share([r for r in rows if r[k] == v], 0):.1f}" for k, v in columns]
        lines.append(f"| {signal} | {share(rows, 0):.1f} % [{100 * low:.1f}, {100 * high:.1f}] | "
                     f"{share(rows, 1):.1f} % | "
                     f"{sum(r['tokens'] for r in rows) / len(rows):.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracies(figures: dict) -> list[str]:
    """The names of a summary's accuracies: greedy, avg@k, pass@k."""
    return [n for n in figures if n == "greedy" or n.startswith(("avg@", "pass@"))]


def percent(figure: dict) -> str:
    return f"{100 * figure['mean']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def main(argv=None):
    config = parse_flags(EvalConfig, argv)
    try:
        for name in ("problems", "samples", "max_new_tokens", "max_pixels"):
            if getattr(config, name) < 0:
                raise ValueError(f"--{name} {getattr(config, name)}: must not be negative")
        if config.localise and not rollout.is_tiny(config.data):
            raise ValueError("--localise: only tiny has a step oracle")
        if config.batch < 1:
            raise ValueError(f"--batch {config.batch}: must be at least 1")
        if config.out:                                  # before the work, not after it
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            open(config.out, "a").close()
        if not (config.greedy or config.samples):
            config.greedy, config.samples = True, 4
        device, dtype = device_and_dtype(config.device, config.dtype)
        problems = rollout.load_data(config.data, "heldout", config.problems, config.image_dir,
                                     config.instruction)
        codec = rollout.load_codec(config.model, config.max_pixels)
        for p in problems:
            rollout.encode_prompt(p, codec, config.max_prompt_tokens, pixels=False)
        model = load_model(config.model, device, dtype).eval()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    if config.localise:
        stream = shapes.Stream(config.data, "heldout", config.seed)
        found, slips = flawed_rollouts(model, codec, stream, config.flawed, config.max_new_tokens or 256,
                                       config.seed)
        length = sum(len(t.ids) for t, _ in found) / len(found)
        print(f"{len(found)} flawed rollouts with a wrong step, {slips} more with only a wrong answer; "
              f"{length:.1f} tokens a rollout\n")
        print(localisation_report(score_localisers(model, codec, found, config.max_new_tokens or 256)))
        kinds = ("eroded", "misread", "reasoning")
        pairs = planted_kinds(model, codec, stream, 600)
        print("\n| planted | found " + " | ".join(kinds) + " |\n|---|---|---|---|")
        for kind in kinds:
            print(f"| {kind} | " + " | ".join(str(pairs.count((kind, other))) for other in kinds) + " |")
        return
    limit = config.max_new_tokens or (256 if rollout.is_tiny(config.data) else 2048)
    records = evaluate(model, codec, problems, config.greedy, config.samples, limit, config.seed,
                       config.batch)
    if config.out:
        with open(config.out, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
    print(report(records))


if __name__ == "__main__":
    main()
