"""trace.html: a training run to look at, one self-contained file, written anew while the run goes on.

Place in the pipeline: beside it; viewer/log.py hands over sampled groups (`group_record`) and calls `write`.
The page (page.html) holds no data and asks no network; what is put into it is JSON with every "<" escaped,
and it shows texts as text only, so that nothing a model writes can become markup.

Worked example: a completion "</script><b>" stands in the file as "\\u003c/script>\\u003cb>" and on the page
as the twelve characters it is.
"""
import base64
import io
import json
import math
from pathlib import Path

import attribute
import rereason
import reward
from data import reading
from runtime.files import rewrite, rows_of

PAGE = Path(__file__).with_name("page.html")
MAX_BYTES = 15_000_000              # of all group records; beyond it every second one of the older half goes
MAX_SIDE = 420                      # pixels of an image shown


def data_url(image) -> str:
    """An image, scaled down, as a data: url."""
    image = reading.open_image(image)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    small = image.width * image.height < 40_000
    image.save(out, "PNG") if small else image.save(out, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def rounded(values) -> list:
    """To three decimals; what is not finite as None, which JSON has."""
    return [round(float(v), 3) if v is not None and math.isfinite(v) else None for v in values]


def group_record(step: int, group: list, repairs: list, model, codec) -> dict:
    """Everything the page shows of one group: the problem, its rollouts with steps, signals, tokens, weights
    and ratios, and the turns of its repairs. Signals and ratios are of `model` as it is now, behind the
    update. Costs a few forward passes: A2 and A3 for the wrong rollouts, log-probs for the ratios."""
    problem, by_id = group[0].problem, {id(t): n for n, t in enumerate(group)}
    wrong = [t for t in group if t.rewards["accuracy"] == 0 and t.steps and t.text]
    signals = {}
    if wrong:
        margins = attribute.answer_margins(model, codec, wrong)
        signals = {id(t): (m, attribute.step_dependence(d, t.steps), d) for t, m, d in
                   zip(wrong, margins, attribute.visual_dependence(model, codec, wrong))}
    ratios = rereason.log_weights(model, codec, group)
    return {"step": step, "id": problem.id, "task": problem.task, "gold": problem.answer,
            "question": problem.question if isinstance(problem.question, str) else problem.question[-1],
            "images": [data_url(image) for image in problem.images],
            "rollouts": [rollout_record(t, by_id, signals.get(id(t)), ratio, codec)
                         for t, ratio in zip(group, ratios)],
            "repairs": [{"parent": by_id.get(id(r.parent)), "chain": by_id.get(id(r.chain)),
                         "tokens": r.tokens, "outcome": r.outcome, "turns": r.turns}
                        for r in repairs if r.parent.problem is problem]}


def rollout_record(t, by_id: dict, signals, log_ratio: list, codec) -> dict:
    """One trajectory. steps: token ranges with A1 (same), A2 (margin behind the step), A3 (dependence)."""
    steps, checks = t.steps or [], t.checks or [None] * len(t.steps or [])
    fault = None
    if signals and checks and all(checks):
        found = attribute.localise(checks, signals[0], signals[2], steps)
        fault = {"step": found.step, "kind": found.kind, "confidence": round(found.confidence, 3)}
    rows = [{"start": s.start, "stop": s.stop, "same": c and round(c.same, 3),
             "margin": signals and rounded([signals[0][k + 1]])[0],
             "dependence": signals and rounded([signals[1][k]])[0]}
            for k, (s, c) in enumerate(zip(steps, checks))]
    return {"tokens": [codec.tokenizer.decode([i]) for i in t.ids], "steps": rows,
            "sampled": t.sampled, "weights": rounded(t.weights or [1.0] * len(t.ids)), "mu": rounded(t.logps),
            "ratio": rounded(math.exp(min(x, 9.0)) if on else 1.0 for x, on in zip(log_ratio, t.sampled)),
            "rewards": {k: round(v, 3) for k, v in t.rewards.items()}, "advantage": round(t.advantage, 4),
            "provenance": t.provenance, "parent": by_id.get(id(t.parent)), "kept": t.kept,
            "finished": t.finished, "answer": reward.extract_answer(t.text, t.problem.choices),
            "fault": fault}


def write(folder: Path):
    """folder/trace.html from its config.json, metrics.jsonl and groups.jsonl."""
    groups = [json.dumps(row) for row in rows_of(folder / "groups.jsonl")]
    while sum(map(len, groups)) > MAX_BYTES and len(groups) > 2:
        half = len(groups) // 2
        groups = groups[:half:2] + groups[half:]
    metrics = [{k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in m.items()}
               for m in rows_of(folder / "metrics.jsonl")]
    data = json.dumps({"config": json.loads((folder / "config.json").read_text()), "metrics": metrics})
    data = data[:-1] + ', "groups": [' + ",".join(groups) + "]}"
    page = PAGE.read_text(encoding="utf-8").replace('"DATA"', data.replace("<", "\\u003c"))
    rewrite(folder / "trace.html", page)
