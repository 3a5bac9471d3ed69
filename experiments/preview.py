"""See the embedded tasks: pictures with a problems.jsonl, and how often each can be guessed without looking.

    python experiments/preview.py --out runs/preview --steps 5      # a problem of each kind and form
    python experiments/preview.py --guess                           # the table of guess rates

problems.jsonl has a row a problem, in the form that `--data` of train.py and eval.py reads.
"""
import argparse
import json
import random
import sys
from operator import eq
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import shapes  # noqa: E402


def guess_rate(kind: str, steps: int, form: str = "free", trials: int = 1000) -> float:
    """How often a guesser who never sees the image is right. Free: the right names, readings as the task
    draws them. Choice: the option most like the others. Yes/no: always no."""
    rng, hits = random.Random(0), 0
    for index in range(trials):
        if form == "free":
            facts, other = shapes.make_facts(kind, steps, rng), shapes.make_facts(kind, steps, rng)
            guess = []
            for name, name_there in zip(facts["ask"], other["ask"]):
                guess.append(shapes.step_text(facts, name, other["show"][name_there]))
            answer = shapes.answer_from_steps(facts, shapes.true_steps(facts))
            hits += shapes.answer_from_steps(facts, guess) == answer
            continue
        problem = shapes.make_problem(kind, steps, form, "train", 1, index)
        guess = "no" if form == "yesno" else most_alike(problem.choices)
        hits += problem.answer == guess
    return hits / trials


def most_alike(options: list[str]) -> str:
    """The letter of the option that shares most words, place by place, with the others."""
    shared = []
    for option in options:
        shared.append(0)
        for other in options:
            shared[-1] += sum(map(eq, option.split(), other.split()))
    return "ABCD"[shared.index(max(shared))]


def write_problems(folder: Path, count: int, steps: int, split: str):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for index in range(count):
            kind, form = shapes.KINDS[index % 4], shapes.FORMS[index // 4 % 3]
            problem = shapes.make_problem(kind, steps, form, split, 0, index)
            problem.images[0].save(folder / f"{index:04d}.png")
            row = {"id": problem.id, "images": [f"{index:04d}.png"], "problem": problem.question,
                   "answer": problem.answer, "key_steps": problem.key_steps}
            if problem.choices:
                row["choices"] = problem.choices
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
        print("| kind | 1 step | 3 steps | 5 steps | choice, 3 | yes/no, 3 |\n|---|---|---|---|---|---|")
        for kind in shapes.KINDS:
            rates = []
            for steps, form in ((1, "free"), (3, "free"), (5, "free"), (3, "choice"), (3, "yesno")):
                rates.append(f"{100 * guess_rate(kind, steps, form):.1f} %")
            print(f"| {kind} | " + " | ".join(rates) + " |")
    if args.out:
        write_problems(Path(args.out), args.count, args.steps, args.split)


if __name__ == "__main__":
    main()
