"""See the embedded tasks: pictures with a problems.jsonl, and how often each can be guessed without looking.

    python experiments/preview.py --out runs/preview --steps 5      # a problem of each kind and form
    python experiments/preview.py --guess                           # the table of guess rates

problems.jsonl has a row a problem, in the form that `--data` of train.py and eval.py reads.
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import shapes  # noqa: E402


def guess_rate(kind: str, steps: int, trials: int = 1000) -> float:
    """How often a guesser who never sees the image is right: the right names, readings as the task draws
    them."""
    rng, hits = random.Random(0), 0
    for _ in range(trials):
        facts, other = shapes.make_facts(kind, steps, rng), shapes.make_facts(kind, steps, rng)
        guess = {}
        for depth, name in enumerate(other["ask"]):
            guess[depth] = other["show"][name]
        answers = [shapes.answer_from_steps(facts, shapes.chain(facts, wrong)) for wrong in ({}, guess)]
        hits += answers[0] == answers[1]
    return hits / trials


def write_problems(folder: Path, count: int, steps: int, split: str):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for index in range(count):
            kind, dialect = shapes.KINDS[index % 4], shapes.DIALECTS[index // 4 % 2]
            problem = shapes.make_problem(kind, steps, dialect, split, 0, index)
            problem.images[0].save(folder / f"{index:04d}.png")
            row = {"id": problem.id, "images": [f"{index:04d}.png"], "problem": problem.question,
                   "answer": problem.answer, "key_steps": problem.key_steps}
            file.write(json.dumps(row) + "\n")
    print(f"{count} problems in {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for pictures and problems.jsonl")
    parser.add_argument("--count", type=int, default=12, help="how many problems")
    parser.add_argument("--steps", type=int, default=5, help="steps a problem, 1 to 20")
    parser.add_argument("--split", default="train", choices=("train", "heldout"))
    parser.add_argument("--guess", action="store_true", help="print the guess rate of every task")
    args = parser.parse_args()
    if args.guess:
        print("| kind | 1 step | 3 steps | 5 steps | 12 steps |\n|---|---|---|---|---|")
        for kind in shapes.KINDS:
            rates = []
            for steps in (1, 3, 5, 12):
                rates.append(f"{100 * guess_rate(kind, steps):.1f} %")
            print(f"| {kind} | " + " | ".join(rates) + " |")
    if args.out:
        write_problems(Path(args.out), args.count, args.steps, args.split)


if __name__ == "__main__":
    main()
