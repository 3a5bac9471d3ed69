"""How well the localisers of attribute.py find the first wrong step, against the step oracle of tiny.

    python eval.py --localise --data tiny:steps=9

Place in the pipeline: beside it; `eval.py` calls `localisation`. Three parts: flawed rollouts of a policy
with their first wrong step, every signal scored on them, and planted errors of a known kind.

Worked example: of two flawed rollouts the fault is at step 3 and 5; a signal says 3 and 4: exact 50 %, within
one step 100 %.
"""
import random

import torch
from tqdm import tqdm

import attribute
import rollout
from benchmarks.figures import interval
from reward import reward_parts
from tiny import shapes


def flawed_rollouts(model, codec, stream, count: int, max_new_tokens: int, seed: int, group_size: int = 8):
    """Flawed rollouts of a tiny stream until there are `count` -> [(trajectory, its first wrong step,
    0-based)]. Those whose steps are all right (the answer alone is wrong) have no such step: their number is
    the second result."""
    found, slips, at = [], 0, 0
    bar = tqdm(total=count, desc="flawed rollouts", leave=False, disable=None)
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

    for at in tqdm(range(0, len(found), batch), desc="localising", leave=False, disable=None):
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


def planted_kinds(model, codec, stream, count: int) -> list[tuple[str, str, bool]]:
    """(planted kind, found kind, whether the step is found) of chains with one planted error each: a wrong
    reading at the first two steps, where the policy still looks (misread), or at the last third, where
    erosion has set in (eroded); a wrong conclusion from a right reading (reasoning)."""
    chains, planted, rng = [], [], random.Random(0)
    for i in range(count):
        p, kind = stream[i], ("misread", "eroded", "reasoning")[i // 4 % 3]     # tasks alternate by four
        steps = shapes.true_steps(p.oracle)
        k = rng.randrange(2) if kind == "misread" else rng.randrange(len(steps) * 2 // 3, len(steps))
        if kind != "reasoning":
            steps = shapes.corrupt(p.oracle, {k}, rng)
        elif (slipped := shapes.slip(p.oracle, steps[k], rng)) != steps[k]:
            steps[k] = slipped
        else:
            continue                                    # counting and following dots conclude nothing
        wrong = next((n for n, v in enumerate(shapes.check_steps(p, steps)) if v != "true"), None)
        if wrong is None:
            continue
        answer = shapes.answer_from_steps(p.oracle, steps)
        text = f"<think>{chr(10).join(steps)}</think><answer>{answer}</answer>"
        ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
        t = rollout.Trajectory(p, ids, [1] * len(ids), [0.0] * len(ids), True, text)
        t.steps = attribute.split_steps(ids, codec)
        chains.append(t)
        planted.append((kind, wrong))
    found = []
    for at in range(0, len(chains), 64):
        part = chains[at:at + 64]
        attribute.Locator(model, codec)(part)
        depends = attribute.visual_dependence(model, codec, part)
        found += [attribute.localise(t.checks, None, d, t.steps) for t, d in zip(part, depends)]
    return [(kind, fault.kind, fault.step == k) for (kind, k), fault in zip(planted, found)]


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


def localisation(model, codec, data: str, count: int, planted: int, max_new_tokens: int, seed: int) -> str:
    """The whole report."""
    stream = shapes.Stream(data, "heldout", seed)
    found, slips = flawed_rollouts(model, codec, stream, count, max_new_tokens, seed)
    if not found:
        return f"no flawed rollout found among {32 * count} problems"
    length = sum(len(t.ids) for t, _ in found) / len(found)
    kinds = ("eroded", "misread", "reasoning")
    pairs = planted_kinds(model, codec, stream, planted)
    lines = [f"{len(found)} flawed rollouts with a wrong step, {slips} more with only a wrong answer; "
             f"{length:.1f} tokens a rollout", "",
             localisation_report(score_localisers(model, codec, found, max_new_tokens)), "",
             "| planted | found " + " | ".join(kinds) + " | exact step |", "|---|---|---|---|---|"]
    for kind in kinds:
        hits = [hit for is_kind, _, hit in pairs if is_kind == kind]
        counts = [sum(pair[:2] == (kind, other) for pair in pairs) for other in kinds]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts))
                     + f" | {100 * sum(hits) / max(1, len(hits)):.1f} % |")
    return "\n".join(lines)
