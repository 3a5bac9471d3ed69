"""Visual tasks drawn by Pillow: each a chain of readings from the image followed by logic, with a step
oracle.

    python tiny/shapes.py --out shapes_preview --count 12     # write pictures and a problems.jsonl to look at
    python tiny/shapes.py --guess                              # the guess rate of every task

Four kinds, each with 1 to 20 steps (one step a line: what is looked up, what it shows, what follows from it):

kind  | the image                                  | a step        | the answer
------|--------------------------------------------|---------------|------------------------------------------
tiles | coloured tiles with a digit                | `red 4 6`     | colour and shifted digit of each tile
count | coloured circles, squares, triangles       | `red 3`       | attribute and how many of each
path  | tiles with a digit and a dot: the next tile| `red 4 blue`  | colour and digit along the path
bars  | a bar chart, a colour a bar                | `red 6 yes`   | height and verdict of each bar

Three forms: `free` (the answer itself), `choice` (a letter among four), `yesno`. The free answer carries
every reading, so guessing does not pay: a reward by luck would teach guessing instead of looking. Train and
held-out problems share no image: a checksum of what an image shows decides on which side it lies.

Everything here is our choice; the paper trains on natural images. `demonstrate` plants visual erosion: the
chance of a wrong reading grows with depth, and the rest of the chain stays consistent with the wrong reading.
"""
import argparse
import json
import random
import sys
import zlib
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attribute
import rereason
from data.reading import Problem

COLOURS = {"red": (230, 25, 45), "green": (40, 160, 60), "yellow": (250, 220, 30), "blue": (20, 80, 220),
           "orange": (245, 130, 30), "purple": (130, 30, 170), "cyan": (60, 220, 240),
           "magenta": (240, 50, 220), "lime": (180, 245, 50), "pink": (250, 190, 205), "teal": (0, 120, 125),
           "violet": (200, 170, 255), "brown": (130, 70, 25), "cream": (255, 245, 200),
           "maroon": (100, 0, 10), "mint": (150, 255, 195), "olive": (120, 120, 0), "navy": (0, 0, 100),
           "black": (10, 10, 10), "white": (255, 255, 255)}
NAMES = tuple(COLOURS)
SHAPES = ("circle", "square", "triangle")
KINDS = ("tiles", "count", "path", "bars")
FORMS = ("free", "choice", "yesno")
SECOND_LOOKS = ("check", "relook")     # what attribute.py and rereason.py ask; stage 5 of build.py teaches it
MAX_STEPS = 20
DEFAULT_STEPS = "5"                         # where the warm start mostly fails and yet often enough is right
CELL = 28                                   # pixels; one merged image token of the tiny model
UNIT = 8                                    # pixels a unit of bar height; a chart row is three cells high


# ------------------------------------------------------------------------------------------------------------
# What an image shows (facts), and the chain that follows from it


def make_facts(kind: str, steps: int, rng: random.Random) -> dict:
    """Draw the content of one problem. JSON-friendly; `show` maps each name asked about (and distractors) to
    its reading, `ask` lists the names in the order of the chain."""
    names = rng.sample(NAMES, len(NAMES))
    ask, rest = names[:steps], names[steps:steps + rng.randint(0, min(3, MAX_STEPS - steps))]
    if kind == "tiles":
        return {"kind": kind, "ask": ask, "shift": rng.randint(1, 2),
                "show": {n: rng.randint(0, 9) for n in ask + rest}}
    if kind == "bars":
        return {"kind": kind, "ask": ask, "limit": rng.randint(1, 3),
                "show": {n: rng.randint(1, 9) for n in ask + rest}}
    if kind == "count":
        objects = [(n, rng.choice(SHAPES)) for n in ask + rest for _ in range(rng.randint(0, 3))]
        show = {n: sum(c == n for c, _ in objects) for n in ask + rest}
        for shape in SHAPES:                # some questions count a shape instead of a colour
            n = sum(s == shape for _, s in objects)
            if n <= 4 and rng.random() < 0.3:
                ask[rng.randrange(steps)] = shape
                show[shape] = n
        ask = list(dict.fromkeys(ask))
        ask += [n for n in names if n not in ask][:steps - len(ask)]
        return {"kind": kind, "ask": ask, "show": {**{n: 0 for n in ask}, **show}, "objects": objects}
    # path: ask[0] -> ask[1] -> ... -> end; distractors lead to a tile further on, so every walk ends
    order = ask[:]
    for n in rest:
        order.insert(rng.randrange(len(order)), n)
    following = {n: rng.choice(order[order.index(n) + 1:]) for n in rest}
    following.update(zip(ask, ask[1:] + ["end"]))
    return {"kind": kind, "ask": ask, "next": following, "show": {n: rng.randint(0, 9) for n in order}}


def value_range(facts: dict) -> range:
    """The values a reading can have."""
    return {"bars": range(1, 10), "count": range(5)}.get(facts["kind"], range(10))


def step_text(facts: dict, name: str, value: int, follow: str | None = None) -> str:
    """One step: `name` was looked up and `value` read; `follow` is the next tile read (path only)."""
    if facts["kind"] == "tiles":
        return f"{name} {value} {(value + facts['shift']) % 10}"
    if facts["kind"] == "bars":
        return f"{name} {value} {'yes' if value > facts['limit'] else 'no'}"
    return f"{name} {value}" if facts["kind"] == "count" else f"{name} {value} {follow}"


def true_steps(facts: dict) -> list[str]:
    return [step_text(facts, n, facts["show"][n], facts.get("next", {}).get(n)) for n in facts["ask"]]


def answer_from_steps(facts: dict, steps: list[str]) -> str:
    """The free-form answer that a chain of steps implies, right or wrong: every name with what it came to."""
    parts = []
    for step in steps:
        name, value, *more = step.split()
        if facts["kind"] == "tiles":
            value = more[0]
        parts.append(step if facts["kind"] == "bars" else f"{name} {value}")
    return " ".join(parts)


QUESTIONS = {"tiles": "Shift each digit by {shift}: {ask}", "bars": "Is each bar over {limit}: {ask}",
             "count": "Count each: {ask}", "path": "Follow the dots from {start}"}


def ask(facts: dict) -> str:
    return "<image>" + QUESTIONS[facts["kind"]].format(**{**facts, "ask": " ".join(facts["ask"]),
                                                          "start": facts["ask"][0]})


def second_look(kind: str, facts: dict, form: str, rng: random.Random, name: str) -> Problem:
    """A demonstration of what the tiny model must be able to do besides solving: repeat a step that is right
    and correct one that is not, alone (`attribute.CHECK`) or at the end of a chain
    (`rereason.relook_problem`). Half the steps have a wrong reading, one in ten a wrong conclusion."""
    steps, k = true_steps(facts), rng.randrange(len(facts["ask"]))
    suspect = corrupt(facts, {k} if rng.random() < 0.5 else set(), rng)[k]
    if rng.random() < 0.1:
        suspect = slip(facts, suspect, rng)
    problem = Problem(id=name, question=ask(facts), answer=steps[k], images=[draw(facts, rng)],
                      task=f"{kind}/{form}", demonstration=steps[k], oracle=facts)
    if form == "relook":
        return rereason.relook_problem(problem, "<think>" + "".join(s + "\n" for s in steps[:k]), suspect)
    return replace(problem, question=problem.question + attribute.CHECK + suspect)


def slip(facts: dict, step: str, rng: random.Random) -> str:
    """The step with another conclusion from the same reading (tiles and bars; others conclude nothing)."""
    words = step.split()
    if facts["kind"] == "tiles":
        words[2] = str((int(words[2]) + rng.randint(1, 9)) % 10)
    elif facts["kind"] == "bars":
        words[2] = "no" if words[2] == "yes" else "yes"
    return " ".join(words)


def make_problem(kind: str, steps: int, form: str = "free", split: str = "train", seed: int = 0,
                 index: int = 0) -> Problem:
    """The `index`-th problem of a stream; the same arguments give the same problem. split: "train" or
    "heldout"."""
    if (kind not in KINDS or form not in (*FORMS, *SECOND_LOOKS) or not 1 <= steps <= MAX_STEPS
            or split not in ("train", "heldout")):
        raise ValueError(f"no such task: kind {kind!r}, steps {steps}, form {form!r}, split {split!r}")
    rng = random.Random(f"{kind}/{steps}/{form}/{split}/{seed}/{index}")
    while True:
        facts = make_facts(kind, steps, rng)
        shown = json.dumps([kind, sorted(facts["show"].items()), sorted(facts.get("next", {}).items())])
        if (zlib.crc32(shown.encode()) % 8 == 0) == (split == "heldout"):
            break
    if form in SECOND_LOOKS:
        return second_look(kind, facts, form, rng, f"{kind}-{steps}-{form}-{split}-{seed}-{index}")
    gold = answer_from_steps(facts, true_steps(facts))
    question = ask(facts)
    answer, choices = gold, None
    if form == "choice":
        choices = make_options(facts, rng)
        answer = "ABCD"[choices.index(gold)]
        question += "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", choices))
    elif form == "yesno":
        offer = gold
        if rng.random() < 0.5:
            while offer == gold:
                offer = answer_from_steps(facts, corrupt(facts, {rng.randrange(steps)}, rng))
        facts["offer"] = offer
        answer = "yes" if offer == gold else "no"
        question += f"\nIs it {offer}?"
    return Problem(id=f"{kind}-{steps}-{form}-{split}-{seed}-{index}", question=question, answer=answer,
                   images=[draw(facts, rng)], choices=choices, task=f"{kind}/{form}",
                   key_steps=true_steps(facts), oracle=facts)


def make_options(facts: dict, rng: random.Random) -> list[str]:
    """Four answers in random order: the true one, one with a wrong reading, one with another, and one with
    both (a single step: four values). Each is as like the others as any: the true one does not stand out."""
    places = rng.sample(range(len(facts["ask"])), min(2, len(facts["ask"])))
    true = {k: facts["show"][facts["ask"][k]] for k in places}
    wrong = {k: rng.sample([v for v in value_range(facts) if v != true[k]], 3) for k in places}
    if len(places) == 1:
        changes = [{0: v} for v in (true[0], *wrong[0])]
    else:
        changes = [{k: (true[k], wrong[k][0])[bit] for k, bit in zip(places, bits)}
                   for bits in ((0, 0), (0, 1), (1, 0), (1, 1))]
    chains = [[step_text(facts, n, change.get(k, facts["show"][n]), facts.get("next", {}).get(n))
               for k, n in enumerate(facts["ask"])] for change in changes]
    return rng.sample([answer_from_steps(facts, chain) for chain in chains], 4)


class Stream:
    """Endless problems by index. `spec` is "tiny" or, say,
    "tiny:steps=4-6,kinds=tiles+path,forms=free+choice"; `run` neighbours have the same number of steps (a
    batch of one length has little padding). ValueError for a bad spec."""

    def __init__(self, spec: str = "tiny", split: str = "train", seed: int = 0, run: int = 1):
        options = {"steps": DEFAULT_STEPS, "kinds": "+".join(KINDS), "forms": "free"}
        name, _, text = spec.partition(":")
        for item in filter(None, text.split(",")):
            key, _, value = item.partition("=")
            if key not in options:
                raise ValueError(f"{spec!r}: unknown setting {key!r} (known: {', '.join(options)})")
            options[key] = value
        self.kinds, self.forms = options["kinds"].split("+"), options["forms"].split("+")
        low, _, high = options["steps"].partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()
                and 1 <= int(low) <= int(high or low) <= MAX_STEPS):
            raise ValueError(f"{spec!r}: steps must be a number or a range like 4-6, "
                             f"between 1 and {MAX_STEPS}")
        for given, known in ((self.kinds, KINDS), (self.forms, FORMS + SECOND_LOOKS), ([name], ("tiny",))):
            if not set(given) <= set(known):
                raise ValueError(f"{spec!r}: {'+'.join(given)} is not among {', '.join(known)}")
        self.steps, self.split, self.seed, self.run = range(int(low), int(high or low) + 1), split, seed, run

    def __getitem__(self, index: int) -> Problem:
        """Every kind and form in turn, so any stretch of the stream is balanced; a run has one form."""
        steps = random.Random(f"{self.split}/{self.seed}/{index // self.run}").choice(self.steps)
        kind, form = (self.kinds[index % len(self.kinds)],
                      self.forms[index // max(self.run, len(self.kinds)) % len(self.forms)])
        return make_problem(kind, steps, form, self.split, self.seed, index)


# ------------------------------------------------------------------------------------------------------------
# Demonstrations with planted erosion, and the oracle


def corrupt(facts: dict, wrong: set, rng: random.Random) -> list[str]:
    """A chain with wrong readings at the given depths (0-based), consistent with them ever after."""
    steps, name = [], facts["ask"][0]
    while len(steps) < MAX_STEPS and name != "end":
        value, follow = facts["show"][name], facts.get("next", {}).get(name)
        if len(steps) in wrong:
            if facts["kind"] == "path" and rng.random() < 0.3:      # the dot is misread; all walks still end
                order = list(facts["show"])
                follow = rng.choice([n for n in order[order.index(name) + 1:] if n != follow] or [follow])
            else:
                value = rng.choice([v for v in value_range(facts) if v != value])
        steps.append(step_text(facts, name, value, follow))
        if facts["kind"] == "path":
            name = follow
        else:
            name = facts["ask"][len(steps)] if len(steps) < len(facts["ask"]) else "end"
    return steps


def erosion_rate(depth: int, first: float, ninth: float) -> float:
    """Chance of a wrong reading at a step (depth 1, 2, ...): linear from `first` at 1 to `ninth` at 9, then
    constant."""
    return first + (ninth - first) * (min(depth, 9) - 1) / 8


def demonstrate(problem: Problem, erosion: tuple[float, float], rng: random.Random) -> str:
    """A completion for supervised training: the chain, each reading wrong with the erosion rate of its depth,
    and the answer that follows from the chain as written."""
    if problem.demonstration:
        return problem.demonstration
    facts = problem.oracle
    wrong = {k for k in range(MAX_STEPS) if rng.random() < erosion_rate(k + 1, *erosion)}
    steps = corrupt(facts, wrong, rng)
    answer = answer_from_steps(facts, steps)
    if problem.choices:                    # the chain's own answer, else the option that agrees in most words
        words = answer.split()
        agree = [(option == answer, sum(a == b for a, b in zip(words, option.split())))
                 for option in problem.choices]
        answer = "ABCD"[agree.index(max(agree))]
    elif "offer" in facts:
        answer = "yes" if answer == facts["offer"] else "no"
    return "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"


def check_steps(problem: Problem, steps: list[str]) -> list[str]:
    """The oracle. One verdict a step, each judged on its own words and the step before it:
    "true" - true of the image and the step the chain calls for; "misread" - not true of the image;
    "logic" - the reading is true, but what is concluded is not, or it is not the step called for;
    "unparsed"."""
    facts, verdicts, previous = problem.oracle, [], None
    for k, step in enumerate(steps):
        words = step.split()
        known = (len(words) >= 2 and words[0] in (*NAMES, *SHAPES)
                 and len(words[1]) == 1 and words[1] in "0123456789")
        if not known or len(words) != (2 if facts["kind"] == "count" else 3):
            verdicts.append("unparsed")
            previous = None
            continue
        name, value = words[0], int(words[1])
        follow = facts.get("next", {}).get(name)
        shown = facts["show"].get(name)
        if facts["kind"] == "count":                    # of what is not in the image there is none
            shown = sum(name in thing for thing in facts["objects"])
        if value != shown or (facts["kind"] == "path" and words[2] != follow):
            verdicts.append("misread")
        else:
            if facts["kind"] == "path":
                due = facts["ask"][0] if k == 0 else previous
            else:
                due = facts["ask"][k] if k < len(facts["ask"]) else None
            right = name == due and " ".join(words) == step_text(facts, name, value, follow)
            verdicts.append("true" if right else "logic")
        previous = words[2] if facts["kind"] == "path" else None
    return verdicts


def is_right(problem: Problem, step: str) -> bool:
    """Whether a step is true of the image and draws the right conclusion, wherever in the chain it stands."""
    name = step.split(" ")[0]
    return name in problem.oracle["show"] and step == step_text(
        problem.oracle, name, problem.oracle["show"][name], problem.oracle.get("next", {}).get(name))


# ------------------------------------------------------------------------------------------------------------
# Drawing


@lru_cache(maxsize=None)
def _font(size: int):
    return ImageFont.load_default(size=size)


def draw(facts: dict, rng: random.Random) -> Image.Image:
    """The picture: whole cells, everything inside them varied (order, offset, size, shade, shape, background,
    noise). Notes in facts["cells"] what lies where: ((row, column), thing)."""
    things = list(facts.get("objects", facts["show"]))
    rng.shuffle(things)
    per_row, height = (min(10, max(3, len(things))), 3) if facts["kind"] == "bars" else (None, 1)
    cols = per_row or rng.randint(max(2, int(len(things) ** 0.5)),
                                  min(8, max(3, int(len(things) ** 0.5) + 2)))
    rows = max(1, -(-len(things) // cols))
    rows += facts["kind"] != "bars" and rng.random() < 0.3
    cells = sorted(rng.sample(range(rows * cols), len(things)))
    shade = rng.choice([rng.randint(20, 70), rng.randint(140, 225)])
    facts["cells"] = [((c // cols * height, c % cols), thing) for c, thing in zip(cells, things)]
    background = tuple(shade + rng.randint(-12, 12) for _ in range(3))
    image = Image.new("RGB", (cols * CELL, rows * height * CELL), background)
    pen = ImageDraw.Draw(image)
    for thing, cell in zip(things, cells):
        x, y = cell % cols * CELL, cell // cols * height * CELL
        name = thing if isinstance(thing, str) else thing[0]
        rgb = tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in COLOURS[name])
        if facts["kind"] == "bars":
            _draw_bar(pen, x, y, rgb, facts["show"][name], rng)
        elif facts["kind"] == "count":
            _draw_object(pen, x, y, rgb, thing[1], rng)
        else:
            _draw_tile(pen, x, y, rgb, facts["show"][name], facts.get("next", {}).get(name), rng)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), (*image.size[::-1], 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _ink(rgb):
    return (0, 0, 0) if 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 110 else (255, 255, 255)


def _draw_tile(pen, x, y, rgb, digit, dot, rng):
    side = rng.randint(24, 27)
    x, y = x + rng.randint(0, CELL - side), y + rng.randint(0, CELL - side)
    pen.rounded_rectangle((x, y, x + side, y + side), radius=rng.choice([0, 3, 6]), fill=rgb,
                          outline=_ink(rgb))
    if dot is None:
        size, cx, cy = rng.randint(15, 20), x + side / 2, y + side / 2
    else:                                                           # room for the dot; a cross marks the end
        size, cx, cy = rng.randint(14, 16), x + side * 0.32, y + side * 0.45
        dx, dy, r = x + side * 0.74, y + side * 0.70, rng.uniform(4.2, 5.2)
        if dot == "end":
            for s in (-1, 1):
                pen.line((dx - r, dy - s * r, dx + r, dy + s * r), fill=_ink(rgb), width=2)
        else:
            pen.ellipse((dx - r, dy - r, dx + r, dy + r), fill=COLOURS[dot], outline=_ink(rgb))
    pen.text((cx + rng.uniform(-1, 1), cy + rng.uniform(-1, 1)), str(digit),
             fill=_ink(rgb), font=_font(size), anchor="mm")


def _draw_object(pen, x, y, rgb, shape, rng):
    r = rng.uniform(8, 12)
    cx, cy = x + CELL / 2 + rng.uniform(-1.5, 1.5), y + CELL / 2 + rng.uniform(-1.5, 1.5)
    box, edge = (cx - r, cy - r, cx + r, cy + r), _ink(rgb)
    if shape == "circle":
        pen.ellipse(box, fill=rgb, outline=edge)
    elif shape == "square":
        pen.rectangle(box, fill=rgb, outline=edge)
    else:
        pen.polygon([(cx, cy - r), (cx - r, cy + r), (cx + r, cy + r)], fill=rgb, outline=edge)


def _draw_bar(pen, x, y, rgb, value, rng):
    width, base = rng.randint(14, 22), y + 3 * CELL - 5
    left = x + (CELL - width) // 2 + rng.randint(-2, 2)
    pen.rectangle((left, base - value * UNIT, left + width, base), fill=rgb, outline=_ink(rgb))
    for u in range(1, value):                                       # a tick a unit
        pen.line((left, base - u * UNIT, left + width, base - u * UNIT), fill=_ink(rgb))
    pen.line((x, base, x + CELL, base), fill=(90, 90, 90), width=2)


# ------------------------------------------------------------------------------------------------------------
# Looking at it


def guess_rate(kind: str, steps: int, form: str = "free", trials: int = 1000) -> float:
    """How often a guesser who never sees the image is right. Free: the right names, readings drawn as the
    task draws them. Choice: the option most like the others. Yes/no: always no."""
    rng, hits = random.Random(0), 0
    for i in range(trials):
        if form == "free":
            a, b = make_facts(kind, steps, rng), make_facts(kind, steps, rng)
            blind = dict(zip(a["ask"], (b["show"][n] for n in b["ask"])))
            guess = [step_text(a, n, blind[n], a.get("next", {}).get(n)) for n in a["ask"]]
            hits += answer_from_steps(a, guess) == answer_from_steps(a, true_steps(a))
            continue
        problem = make_problem(kind, steps, form, "train", 1, i)
        words = [choice.split() for choice in problem.choices or []]
        unlike = [sum(x != y for other in words for x, y in zip(w, other)) for w in words]
        hits += problem.answer == ("no" if form == "yesno" else "ABCD"[unlike.index(min(unlike))])
    return hits / trials


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
        for kind in KINDS:
            rates = [guess_rate(kind, n) for n in (1, 3, 5)]
            rates += [guess_rate(kind, 3, form) for form in ("choice", "yesno")]
            print(f"| {kind} | " + " | ".join(f"{100 * r:.1f} %" for r in rates) + " |")
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "problems.jsonl", "w", encoding="utf-8") as f:
            for i in range(args.count):
                p = make_problem(KINDS[i % 4], args.steps, FORMS[i // 4 % 3], args.split, 0, i)
                p.images[0].save(folder / f"{i:04d}.png")
                row = {"id": p.id, "images": [f"{i:04d}.png"], "problem": p.question, "answer": p.answer,
                       "key_steps": p.key_steps, **({"choices": p.choices} if p.choices else {})}
                f.write(json.dumps(row) + "\n")
        print(f"{args.count} problems in {folder}")


if __name__ == "__main__":
    main()
