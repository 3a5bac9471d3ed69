"""Pictures by others: chains of nine readings from tiles with real handwriting, all through files, as with
any data.

    pip install scikit-learn && python experiments/digits.py --seeds 5

The 1,797 handwritten digits (UCI, public, 8 x 8 pixels) ship inside scikit-learn. They stand on coloured
tiles in the place of printed ones; training and held-out pictures share no digit's image. A warm start is
supervised from the tiny model on demonstrations that are eroded like its own, half of them with
rollout.INSTRUCTION in the prompt, and its vision tower learns handwriting; then each arm goes on from there
at equal generated tokens. The run's files hold no oracle: A1 and the reward are all there is. `--instruction`
counts the repairs of the warm start's failures with INSTRUCTION in the prompt and without
(results/instruction.json). """
import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attribute  # noqa: E402
import rereason  # noqa: E402
import rollout  # noqa: E402
from eval import figure  # noqa: E402
from experiments import tables  # noqa: E402
from experiments.compare import ARMS, launch  # noqa: E402
from model import load_model  # noqa: E402
from tiny import shapes  # noqa: E402
from train import append_jsonl, read_jsonl, write_text  # noqa: E402

OUT, STEPS = ROOT / "runs" / "digits", 9
RESULTS = ROOT / "experiments" / "results" / "digits.json"
SFT = ("--stage sft --batch 48 --max_steps 250 --lr 5e-4 --lr_end 0.1 --eval_problems 0 --save_every 0 "
       "--max_new_tokens 110 --device cpu --instruction").split() + [""]
RL = ("--batch 16 --group_size 8 --lr 1e-4 --warmup_steps 1 --freeze_vision --save_every 0 --keep 1 "
      "--show_every 0 --max_tokens 180000 --max_new_tokens 110 --eval_problems 150 --eval_samples 4 "
      "--device cpu "
      "--instruction").split() + [""]


def handwriting(held_out: bool) -> dict[int, list]:
    """Images (8, 8) of values 0 to 1 by digit, the last third of them held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("error: the digits ship in a package: pip install scikit-learn")
    images, labels = load_digits(return_X_y=True)
    part, by_digit = slice(1200, None) if held_out else slice(1200), {}
    for pixels, label in zip(images[part], labels[part]):
        by_digit.setdefault(int(label), []).append(pixels.reshape(8, 8) / 16)
    return by_digit


def draw(facts: dict, digits: dict, rng: random.Random) -> Image.Image:
    """Tiles in rows, in random order, each with a handwritten digit in black or white ink."""
    names, cols = list(facts["show"]), rng.randint(3, 5)
    rng.shuffle(names)
    rows = -(-len(names) // cols)
    picture = np.full((rows * shapes.CELL, cols * shapes.CELL, 3), rng.randint(60, 200), np.float32)
    for place, name in enumerate(names):
        digit = Image.fromarray(rng.choice(digits[facts["show"][name]]))
        ink = np.asarray(digit.resize((24, 24)))[:, :, None]
        colour = np.array(shapes.COLOURS[name], np.float32)
        dark = colour @ (0.3, 0.59, 0.11) > 110
        top, left = place // cols * shapes.CELL + 2, place % cols * shapes.CELL + 2
        picture[top:top + 24, left:left + 24] = colour * (1 - ink) + (0 if dark else 255) * ink
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def write_rows(name: str, count: int, held_out: bool, seed: int) -> str:
    """A JSONL file with its pictures beside it."""
    file, rows, digits = OUT / f"{name}.jsonl", [], handwriting(held_out)
    (OUT / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = random.Random(f"{name}/{seed}/{i}")
        facts = {**shapes.make_facts("tiles", STEPS, rng), "dialect": "short"}
        question = shapes.QUESTIONS["tiles"].format(names=", ".join(facts["ask"]), **facts)
        draw(facts, digits, rng).save(OUT / name / f"{i}.png")
        answer = shapes.answer_from_steps(facts, shapes.chain(facts))
        problem = rollout.Problem(str(i), question, answer, [], oracle=facts)
        eroded = shapes.demonstrate(problem, (0.0, 0.9), rng)
        if name == "sft" and i % 2:
            question += "\n" + rollout.INSTRUCTION
        row = {"id": f"{name}-{i}", "image": f"{name}/{i}.png", "problem": question, "answer": answer}
        rows.append(row | {"demonstration": eroded} if name == "sft" else row)
    file.unlink(missing_ok=True)
    append_jsonl(file, rows)
    return str(file)


def instruction(warm: Path, file: str) -> list[dict]:
    """A row with INSTRUCTION and one without: failed rollouts, the share repaired with its interval."""
    model, codec, rows = load_model(str(warm)).eval(), rollout.load_codec(str(warm)), []
    for text in ("", rollout.INSTRUCTION):
        problems, failures = rollout.load_problems(file, instruction=text), []
        for group in rollout.sample(model, problems, codec, 1, 110):
            for t in group:
                t.rewards = {"accuracy": float(attribute.is_right(t))}
                t.steps = attribute.split_steps(t.ids, codec)
            failures += attribute.locatable_failures(group)
        verifier, repairs = attribute.Verifier(model, codec), []
        verifier(failures)
        for n, t in enumerate(failures):
            repairs.append(rereason.Repair(t, replace(t), f"instruction/{n}", len(t.ids)))
        rereason.rectify(model, codec, repairs, verifier, 110, rereason.Rules())
        share = figure([float(r.outcome == "repaired") for r in repairs])
        rows.append({"INSTRUCTION": "yes" if text else "no", "failures": len(repairs), **share})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds an arm")
    arms = ["grpo", "ivr", "reader policy", "restarts only"]
    parser.add_argument("--arms", nargs="*", default=arms, choices=ARMS)
    parser.add_argument("--instruction", action="store_true", help="repairs with INSTRUCTION and without")
    args = parser.parse_args()
    warm = OUT / "warm" / "checkpoint-000250"
    if not warm.is_dir():
        sft = write_rows("sft", 3000, False, 0)
        launch(warm.parent, [str(ROOT / "train.py"), "--model", str(ROOT / "tiny"), "--data", sft, *SFT])
    if args.instruction:
        rows = instruction(warm, write_rows("test", 150, True, 2))
        write_text(RESULTS.with_name("instruction.json"), json.dumps(rows, indent=1) + "\n")
        return print(tables.instruction())
    files = ["--data", write_rows("train", 600, False, 1), "--eval_data", write_rows("test", 150, True, 2)]
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for seed in range(args.seeds):
        for arm in args.arms:
            if any((r["algo"], r["seed"]) == (arm, seed) for r in results):
                continue
            out = OUT / f"{arm.replace(' ', '-')}-{seed}"
            flags = [str(ROOT / "train.py"), "--model", str(warm), *files, *RL, "--seed", str(seed)]
            for name, value in ARMS[arm].items():
                flags += [f"--no-{name}"] if value is False else [f"--{name}", str(value)]
            launch(out, flags)
            held, run = json.loads((out / "heldout.json").read_text()), {"algo": arm, "seed": seed}
            for when in ("before", "after"):
                run |= {f"{name} {when}": held[when][name]["mean"] for name in ("greedy", "avg@4")}
            rows = read_jsonl(out / "metrics.jsonl")
            run["generated_tokens"] = rows[-1]["generated_tokens"]
            results.append(run | {"repaired": sum(row.get("repaired", 0) for row in rows)})
            write_text(RESULTS, "[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
            print(results[-1], flush=True)
    print(tables.digits())


if __name__ == "__main__":
    main()
