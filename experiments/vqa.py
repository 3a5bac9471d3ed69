"""Images and questions made by others: the tiny model on easy-VQA (Victor Zhou, MIT licence), a set of 5,000
drawn 64 x 64 images and 48,248 questions that ships inside the Python package easy-vqa.

    pip install --no-deps easy-vqa
    python experiments/vqa.py --seeds 3

Everything goes the way of a user's own data: JSONL files, `train.py --stage sft`, then `--algo grpo` and
`--algo ivr` from that warm start at equal generated tokens, scored on images of the package's test split. The
set has no chains, so demonstrations are made from its own answers: the shape and the color of an image, as
its other questions tell them, one a line. A third of the supervised rows ask to check such a line
(attribute.CHECK), half of these hold a wrong one. Supervised and reinforced images are different ones. The
baseline "without the image" answers each question as most often in training.
"""
import argparse
import collections
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from attribute import CHECK  # noqa: E402
from benchmarks.figures import interval  # noqa: E402

SHAPES = ("circle", "rectangle", "triangle")
OUT = ROOT / "runs" / "easy-vqa"
SFT = ("--stage sft --batch 64 --max_steps 400 --lr 1e-3 --lr_end 0.1 --max_new_tokens 48 --eval_problems 0 "
       "--save_every 0 --keep 1")
RL = ("--batch 16 --group_size 8 --max_new_tokens 48 --lr 1e-4 --max_tokens 60000 --eval_problems 300 "
      "--eval_samples 4 --save_every 0 --keep 1 --print_every 10")


def load(split: str) -> dict:
    """{image file: {question: answer}} of the package's split."""
    spec = find_spec("easy_vqa")
    if spec is None:
        sys.exit("error: this experiment needs the package easy-vqa: pip install --no-deps easy-vqa")
    folder, found = Path(spec.origin).parent / "data" / split, {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        found.setdefault(str(folder / "images" / f"{image}.png"), {})[question] = answer
    return found


def kind(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"


def facts(answers: dict) -> dict | None:
    """{"shape": "circle", "color": "red"} of an image, if its questions tell both."""
    told = {kind(a): a for a in answers.values() if kind(a) != "yes/no"}
    return told if len(told) == 2 else None


def rows_of(images: dict, rng: random.Random) -> list[dict]:
    """Plain questions: one of each kind an image has, so that yes/no does not prevail."""
    rows = []
    for image, answers in images.items():
        for name in ("shape", "color", "yes/no"):
            of_kind = sorted(q for q, a in answers.items() if kind(a) == name)
            if of_kind:
                question = rng.choice(of_kind)
                rows.append({"image": image, "problem": question, "answer": answers[question], "task": name})
    rng.shuffle(rows)
    return rows


def supervised(images: dict, rng: random.Random) -> list[dict]:
    """Rows with demonstrations, a third of them checks of one line."""
    rows, values = [], {n: sorted({facts(a)[n] for a in images.values()}) for n in ("shape", "color")}
    for row in rows_of(images, rng):
        told = facts(images[row["image"]])
        lines = [f"{name} {told[name]}" for name in ("shape", "color")]
        chain = "\n".join(lines)
        row["demonstration"] = f"<think>{chain}</think><answer>{row['answer']}</answer>"
        if rng.random() < 1 / 3:
            name = rng.choice(("shape", "color"))
            shown = rng.choice((told[name], rng.choice([v for v in values[name] if v != told[name]])))
            row = {**row, "problem": f"{row['problem']}{CHECK}{name} {shown}", "task": "check",
                   "answer": f"{name} {told[name]}", "demonstration": f"{name} {told[name]}"}
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def train(out: Path, *flags):
    """One `train.py`; nothing where the run is there already, and the rest of it where it was stopped."""
    log, figures = out / "metrics.jsonl", out / "heldout.json"
    steps = len(log.read_text().splitlines()) if log.is_file() else 0
    done = steps == 400 or (figures.is_file() and json.loads(figures.read_text())["after"])
    if not done:
        flags = (*flags, "--resume", str(out)) if list(out.glob("checkpoint-*")) else flags
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--instruction", "",
                   "--outside_images"]
        subprocess.run([*command, *flags], check=True)
    return sorted(out.glob("checkpoint-*"))[-1]


def blind(train_rows: dict, test: list[dict]) -> list[float]:
    """Right or not, of the answer a question has most often in training."""
    counts = {}
    for answers in train_rows.values():
        for q, a in answers.items():
            counts.setdefault(q, collections.Counter())[a] += 1
    return [float(counts[r["problem"]].most_common(1)[0][0] == r["answer"]) for r in test]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the reinforced runs")
    seeds = parser.parse_args().seeds
    images, rng = load("train"), random.Random(0)
    told = [i for i, answers in images.items() if facts(answers)]
    taught = {i: images[i] for i in told[:len(told) * 3 // 4]}
    sft = write(OUT / "sft.jsonl", supervised(taught, rng))
    rl = write(OUT / "train.jsonl", rows_of({i: a for i, a in images.items() if i not in taught}, rng))
    test = [{"id": f"test-{n:03d}", **r} for n, r in enumerate(rows_of(load("test"), rng)[:300])]
    held_out = write(OUT / "test.jsonl", test)
    warm = train(OUT / "warm", "--model", str(ROOT / "tiny"), "--data", str(sft), *SFT.split())
    guesses = blind(images, test)
    columns = ("all", "shape", "color", "yes/no")
    lines = ["| | " + " | ".join(columns) + " | tokens | repaired |", "|---" * 7 + "|"]

    def line(name, values, *more):
        parts = [[v for v, r in zip(values, test) if k in ("all", r["task"])] for k in columns]
        cells = []
        for part in parts:
            low, high = interval(part)
            cells.append(f"{100 * sum(part) / len(part):.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append(f"| {name} | " + " | ".join([*cells, *more]) + " |")

    line("without the image", guesses, "", "")
    for algo in ("grpo", "ivr"):
        befores, afters, tokens, repaired = [], [], [], [0, 0]
        for seed in range(seeds):
            out = OUT / f"{algo}-{seed}"
            train(out, "--model", str(warm), "--data", str(rl), "--eval_data", str(held_out), "--algo", algo,
                  "--seed", str(seed), *RL.split())
            figures = json.loads((out / "heldout.json").read_text())
            log = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
            befores.append(figures["before"]["problems"])
            afters.append(figures["after"]["problems"])
            tokens.append(log[-1]["generated_tokens"])
            repaired = [repaired[0] + sum(r.get("repaired", 0) for r in log),
                        repaired[1] + sum(r.get("parents", 0) for r in log)]
        mean = lambda runs: [sum(values) / len(values) for values in zip(*runs)]
        if algo == "grpo":
            line("warm start", mean(befores), "", "")
        line(algo, mean(afters), f"{sum(tokens) / seeds / 1000:.0f} k",
             f"{repaired[0]} of {repaired[1]}" if algo == "ivr" else "")
    print(f"easy-VQA, {len(test)} test questions, avg@4, mean of {seeds} seeds\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
