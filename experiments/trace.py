"""A training run to look at: RUN/trace.html, one self-contained page.

    python experiments/trace.py runs/rl-20250101-120000 [--signals]

Takes: a run folder's config.json, metrics.jsonl and groups.jsonl (train.py writes a group every --show_every
steps), its model's tokenizer, its data. Gives: curves, and each of those groups with its image, rollouts,
checks, weights and repairs. --signals adds what the last checkpoint says: A2, A3 and the kind of the fault of
wrong rollouts (localisers.py), and each token's ratio to mu. The paper has no such page. Left out: comparing
runs. What goes into the template (trace.html) is JSON with every "<" escaped; the page asks no network and
shows texts as text only, control characters by their numbers: nothing a model writes can become markup.

Worked example: a completion "</script><b>" stands in the file as "\\u003c/script>\\u003cb>" and on the page
as the twelve characters it is; an escape character is shown as "\\u001b".
"""
import argparse
import base64
import contextlib
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rereason  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from attribute import DOUBT, Check, Step, text_and_offsets  # noqa: E402
from eval import is_tiny  # noqa: E402
from experiments.localisers import answer_margins, localise, step_dependence, visual_dependence  # noqa: E402
from model import load_model, reading  # noqa: E402
from reward import extract_answer  # noqa: E402
from tiny import shapes  # noqa: E402

TEMPLATE = Path(__file__).with_name("trace.html")
MAX_GROUPS = 50                     # on a page, evenly over the run


def find_problems(config: dict, ids: list[str]) -> dict:
    """The problems of a run by id, as far as they can be found: the embedded ones are drawn again."""
    if not is_tiny(config["data"]):
        problems = rollout.load_problems(config["data"], config["image_dir"], config["instruction"])
        return {problem.id: problem for problem in problems}
    found = {}
    for name in ids:
        with contextlib.suppress(ValueError):               # not one that shapes.make_problem has written
            kind, steps, dialect, split, rest = name.split("-", 4)
            seed, _, index = rest.rpartition("-")
            found[name] = shapes.make_problem(kind, int(steps), dialect, split, int(seed), int(index))
    return found


def data_url(image) -> str:
    """An image, scaled down, as a data: url."""
    image, out = rollout.open_image(image), io.BytesIO()
    image.thumbnail((420, 420))
    kind = "png" if image.width * image.height < 40_000 else "jpeg"
    image.save(out, kind)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def finite(value):
    """A JSON value with numbers of four digits, and null for what is no number in JSON."""
    if isinstance(value, float):
        value = float(f"{value:.4g}")
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return dict(zip(value, map(finite, value.values())))
    return list(map(finite, value)) if isinstance(value, list) else value


def add_signals(row: dict, problem, model, codec):
    """To each rollout of a row the ratios of its tokens under `model`; to wrong ones A2 and A3 by step and
    the fault. Of a check only its gap was kept, so its whole step counts as faulty."""
    prompt, trajectories, wrong = rollout.encode_prompt(problem, codec), [], []
    for r in row["rollouts"]:
        t = rollout.Trajectory(problem, prompt, r["ids"], r["sampled"], r["logps"], r["finished"], r["text"])
        t.steps = [Step(start, stop, "") for start, stop in r["steps"]]
        t.checks = list(map(Check, r["checks"]))
        trajectories.append(t)
        if r["rewards"]["accuracy"] == 0 and t.steps:
            wrong.append((r, t))
    for r, log_w in zip(row["rollouts"], rereason.log_weights(model, codec, trajectories)):
        r["ratio"] = [math.exp(min(x, 9.0)) for x in log_w[:len(r["ids"])]]
    for r, t in wrong:
        (margin,), (dependence,) = answer_margins(model, codec, [t]), visual_dependence(model, codec, [t])
        r["margins"], r["dependence"] = margin[1:], step_dependence(dependence, t.steps)
        if t.checks:
            r["fault"] = vars(localise(t.checks, margin, dependence, t.steps))


def write_page(run: Path, with_signals: bool = False):
    """RUN/trace.html. ValueError or OSError where the run, its model or its data can not be read."""
    config = json.loads((run / "config.json").read_text())
    codec = rollout.load_codec(config["model"], config["max_pixels"])
    model = load_model(train.last_intact(run)).eval() if with_signals else None
    rows = train.read_jsonl(run / "groups.jsonl")
    rows = rows[::1 + len(rows) // MAX_GROUPS]
    problems = find_problems(config, [row["id"] for row in rows])
    for row in rows:
        problem = problems.get(row["id"])
        row |= {"task": problem.task if problem else "", "images": []}
        for image in problem.images if problem else ():
            row["images"].append(data_url(image))
        if model and problem:
            add_signals(row, problem, model, codec)
        for r in row["rollouts"]:
            r["answer"] = extract_answer(r.pop("text"), problem.choices if problem else None)
            text, starts = text_and_offsets(r.pop("ids"), codec)
            r["tokens"] = [text[a:b] for a, b in zip(starts, starts[1:] + [len(text)])]
    data = {"config": config, "doubt": DOUBT, "groups": rows,
            "metrics": train.read_jsonl(run / "metrics.jsonl")}
    data = json.dumps(finite(data), allow_nan=False).replace("<", "\\u003c")
    train.write_text(run / "trace.html", TEMPLATE.read_text(encoding="utf-8").replace('"DATA"', data))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--signals", action="store_true", help="add A2, A3, ratios (of the last checkpoint)")
    args = parser.parse_args(argv)
    try:
        with reading(args.run):
            write_page(args.run, args.signals)
    except ValueError as e:
        train.fail(e)
    print(f"to look at: {args.run / 'trace.html'}")


if __name__ == "__main__":
    main()
