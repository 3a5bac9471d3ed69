"""Images and questions made by others: the tiny model on easy-VQA (Victor Zhou, MIT licence), a set of 5,000
drawn 64 x 64 images and 48,248 questions that ships inside the Python package easy-vqa.

    pip install --no-deps easy-vqa
    python experiments/vqa.py --seeds 3

Everything goes the way of a user's own data: JSONL files, `train.py --stage sft`, then `--algo grpo` and
`--algo ivr` from that warm start at equal generated tokens, scored on images of the package's test split. The
set has no chains, so demonstrations are made from its own answers: the shape and the color of an image, as
its other questions tell them, one a line. Supervised and reinforced images are different ones. The baseline
"without the image" answers each question as most often in training.
"""
import argparse
import collections
import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from eval import figure, percent  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from train import append_jsonl, read_jsonl  # noqa: E402

OUT = ROOT / "runs" / "easy-vqa"
FACTS = ("shape", "color")
KINDS = {"circle": "shape", "rectangle": "shape", "triangle": "shape", "yes": "yes/no", "no": "yes/no"}
SFT = "--stage sft --batch 64 --max_steps 400 --lr 1e-3 --lr_end 0.1 --eval_problems 0"
RL = "--batch 16 --group_size 8 --lr 1e-4 --max_tokens 60000 --eval_problems 300 --eval_samples 4"
BOTH = "--max_new_tokens 48 --save_every 0 --keep 1"


def data_folder() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None:
        sys.exit("error: this experiment needs the package easy-vqa: pip install --no-deps easy-vqa")
    return Path(spec.origin).parent / "data"


def load(split: str) -> dict:
    """{image file: {question: answer}} of the package's split."""
    found = {}
    for question, answer, image in json.loads((data_folder() / split / "questions.json").read_text()):
        found.setdefault(f"{split}/images/{image}.png", {})[question] = answer
    return found


def facts(answers: dict) -> dict:
    """{"shape": "circle", "color": "red"} of an image, as far as its questions tell."""
    told = {KINDS.get(answer, "color"): answer for answer in answers.values()}
    told.pop("yes/no", None)
    return told


def rows_of(images: dict, rng: random.Random) -> list[dict]:
    """Plain questions: one of each kind an image has, so that yes/no does not prevail."""
    rows = []
    for image, answers in images.items():
        for name in (*FACTS, "yes/no"):
            of_kind = [q for q, answer in sorted(answers.items()) if KINDS.get(answer, "color") == name]
            if of_kind:
                question = rng.choice(of_kind)
                rows.append({"image": image, "problem": question, "answer": answers[question], "task": name})
    rng.shuffle(rows)
    return rows


def supervised(images: dict, rng: random.Random) -> list[dict]:
    """Rows with demonstrations."""
    rows = rows_of(images, rng)
    for row in rows:
        told = facts(images[row["image"]])
        chain = f"shape {told['shape']}\ncolor {told['color']}"
        row["demonstration"] = f"<think>{chain}</think><answer>{row['answer']}</answer>"
    return rows


def write(name: str, rows: list[dict]) -> str:
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / name).unlink(missing_ok=True)
    append_jsonl(OUT / name, rows)
    return str(OUT / name)


def train(out: Path, *flags) -> str:
    """One `train.py` -> its last checkpoint. Nothing where the run is finished, the rest where it stopped."""
    if not (out / "finished").is_file():
        where = "--resume" if list(out.glob("checkpoint-*")) else "--out"
        command = [sys.executable, str(ROOT / "train.py"), where, str(out), "--image_dir", str(data_folder())]
        subprocess.run([*command, "--instruction", "", *BOTH.split(), *flags], check=True)
        (out / "finished").touch()
    return str(sorted(out.glob("checkpoint-*"))[-1])


def blind(images: dict, test: list[dict]) -> list[float]:
    """Right or not, of the answer a question has most often in training."""
    counts, right = collections.defaultdict(collections.Counter), []
    for answers in images.values():
        for question, answer in answers.items():
            counts[question][answer] += 1
    for row in test:
        guess, _ = counts[row["problem"]].most_common(1)[0]
        right.append(float(guess == row["answer"]))
    return right


def cells(right: list[float], test: list[dict]) -> list[str]:
    """Accuracy on all questions and on those of each kind."""
    parts = {"all": [], "shape": [], "color": [], "yes/no": []}
    for value, row in zip(right, test):
        parts["all"].append(value)
        parts[row["task"]].append(value)
    return [percent(figure(part)) for part in parts.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the reinforced runs")
    seeds, images, rng, rows = parser.parse_args().seeds, load("train"), random.Random(0), []
    told, others = [image for image in images if len(facts(images[image])) == 2], dict(images)
    taught = {image: others.pop(image) for image in told[:len(told) * 3 // 4]}
    sft, rl = write("sft.jsonl", supervised(taught, rng)), write("train.jsonl", rows_of(others, rng))
    test = [{"id": f"test-{n:03d}", **row} for n, row in enumerate(rows_of(load("test"), rng)[:300])]
    held_out = write("test.jsonl", test)
    warm = train(OUT / "warm", "--model", str(ROOT / "tiny"), "--data", sft, *SFT.split())
    for algo in ("grpo", "ivr"):
        figures, tokens, repaired, sources = {"before": [], "after": []}, 0, 0, 0
        for seed in range(seeds):
            out = OUT / f"{algo}-{seed}"
            train(out, "--model", warm, "--data", rl, "--eval_data", held_out, "--algo", algo, "--seed",
                  str(seed), *RL.split())
            for when, found in json.loads((out / "heldout.json").read_text()).items():
                figures[when].append(found["problems"])
            for row in read_jsonl(out / "metrics.jsonl"):
                repaired, sources = repaired + row.get("repaired", 0), sources + row.get("sources", 0)
            tokens += row["generated_tokens"] / seeds
        before, after = np.mean(figures["before"], axis=0), np.mean(figures["after"], axis=0)
        rows.append([algo, *cells(after, test), f"{tokens / 1000:.0f} k", f"{repaired} of {sources}"])
    rows.insert(0, ["without the image", *cells(blind(images, test), test), "", ""])
    rows.insert(1, ["warm start", *cells(before, test), "", ""])
    print(f"easy-VQA, {len(test)} test questions, avg@4, mean of {seeds} seeds\n")
    print(markdown(["", "all", *FACTS, "yes/no", "tokens", "repaired"], rows))


if __name__ == "__main__":
    main()
