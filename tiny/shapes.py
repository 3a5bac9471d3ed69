"""Visual tasks drawn by Pillow: chains of 1 to 20 readings from an image, and an oracle for every step.

kind  | the image                                  | a step        | the answer
------|--------------------------------------------|---------------|------------------------------------------
tiles | coloured tiles with a digit                | `red 4 6`     | colour and shifted digit of each tile
count | coloured circles, squares, triangles       | `red 3`       | attribute and how many of each
path  | tiles with a digit and a dot: the next tile| `red 4 blue`  | colour and digit along the path
bars  | a bar chart, a colour a bar                | `red 6 yes`   | height and verdict of each bar

Three forms: `free` (the answer itself), `choice` (a letter among four), `yesno`. The free answer carries
every reading, so guessing does not pay: a reward by luck would teach guessing instead of looking. Train and
held-out problems share no image: a checksum of what an image shows decides on which side it lies.
The paper's public abstract names no such tasks; all is our choice. Left out: natural images and language.

Worked example: make_problem("tiles", 3) is a Problem whose question is "<image>Shift each digit by 2: black
white red". In its image the black tile says 1, the white one 9, the red one 2. Its key_steps are "black 1 3",
"white 9 1", "red 2 4"; its answer is "black 3 white 1 red 4"; its oracle is what the image shows.
"""
import json
import random
import zlib
from operator import eq

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rollout import Problem

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
QUESTIONS = {"tiles": "Shift each digit by {shift}: {names}", "count": "Count each: {names}",
             "path": "Follow the dots from {ask[0]}", "bars": "Is each bar over {limit}: {names}"}
VALUES = {"tiles": range(10), "count": range(5), "path": range(10), "bars": range(1, 10)}     # of a reading
ANSWER_WORDS = {"tiles": (0, 2), "count": (0, 1), "path": (0, 1), "bars": (0, 1, 2)}          # out of a step
MAX_STEPS = 20
CELL = 28                               # pixels; one merged image token of the tiny model
UNIT = 8                                # pixels a unit of bar height; a chart row is three cells high
FONTS = {size: ImageFont.load_default(size=size) for size in range(14, 21)}


def make_facts(kind: str, steps: int, rng: random.Random) -> dict:
    """Draw the content of one problem. JSON-friendly; `show` maps each name asked about (and distractors) to
    its reading, `ask` lists the names in the order of the chain."""
    names = rng.sample(NAMES, len(NAMES))
    asked = names[:steps]
    distractors = names[steps:steps + rng.randint(0, min(3, MAX_STEPS - steps))]
    facts = {"kind": kind, "ask": asked}
    shown = asked + distractors
    if kind == "tiles":
        facts["shift"] = rng.randint(1, 2)
    elif kind == "bars":
        facts["limit"] = rng.randint(1, 3)
    elif kind == "path":                # asked[0] -> asked[1] -> ... -> end
        shown = asked[:]
        for name in distractors:
            shown.insert(rng.randrange(len(shown)), name)
        facts["next"] = dict(zip(asked, asked[1:] + ["end"]))
        for name in distractors:        # they lead to a tile further on, so every walk ends
            facts["next"][name] = rng.choice(shown[shown.index(name) + 1:])
    if kind != "count":
        facts["show"] = {name: rng.choice(VALUES[kind]) for name in shown}
        return facts
    facts["show"], facts["objects"] = {}, []
    for name in shown:
        facts["show"][name] = rng.randint(0, 3)
        for _ in range(facts["show"][name]):
            facts["objects"].append((name, rng.choice(SHAPES)))
    for shape in SHAPES:                # some questions count a shape instead of a colour
        number = sum(shape in thing for thing in facts["objects"])
        if number <= 4 and rng.random() < 0.3:
            asked[rng.randrange(steps)] = shape
            facts["show"][shape] = number
    return facts


def step_text(facts: dict, name: str, value: int, follow: str | None = None) -> str:
    """One step: `name` was looked up and `value` read; path: `follow` was the next tile (default: it is)."""
    if facts["kind"] == "tiles":
        return f"{name} {value} {(value + facts['shift']) % 10}"
    if facts["kind"] == "bars":
        return f"{name} {value} {'yes' if value > facts['limit'] else 'no'}"
    if facts["kind"] == "path":
        return f"{name} {value} {follow or facts['next'][name]}"
    return f"{name} {value}"


def true_steps(facts: dict) -> list[str]:
    return [step_text(facts, name, facts["show"][name]) for name in facts["ask"]]


def corrupt(facts: dict, wrong: dict) -> list[str]:
    """A chain with other readings than the image shows: `wrong` maps depths (0-based) to them."""
    steps = []
    for depth, name in enumerate(facts["ask"]):
        steps.append(step_text(facts, name, wrong.get(depth, facts["show"][name])))
    return steps


def prior(facts: dict, name: str) -> int:
    """What language alone says of a name, whatever the image shows: erosion reads this."""
    values = VALUES[facts["kind"]]
    return values[zlib.crc32(name.encode()) % len(values)]


def wrong_values(facts: dict, name: str) -> list[int]:
    return [value for value in VALUES[facts["kind"]] if value != facts["show"][name]]


def answer_from_steps(facts: dict, steps: list[str]) -> str:
    """The free-form answer that a chain of steps implies, right or wrong: every name with what it came to."""
    parts = []
    for step in steps:
        words = step.split()
        parts += [words[k] for k in ANSWER_WORDS[facts["kind"]]]
    return " ".join(parts)


def make_problem(kind: str, steps: int, form="free", split="train", seed=0, index=0) -> Problem:
    """The `index`-th problem of a stream; the same arguments give the same problem. split: "train" or
    "heldout". ValueError where there is no such task."""
    if (kind not in KINDS or form not in FORMS or not 1 <= steps <= MAX_STEPS
            or split not in ("train", "heldout")):
        raise ValueError(f"no such task: kind {kind!r}, steps {steps}, form {form!r}, split {split!r}")
    rng = random.Random(f"{kind}/{steps}/{form}/{split}/{seed}/{index}")
    while True:
        facts = make_facts(kind, steps, rng)
        shown = json.dumps([kind, sorted(facts["show"].items()), sorted(facts.get("next", {}).items())])
        if (zlib.crc32(shown.encode()) % 8 == 0) == (split == "heldout"):
            break
    question = "<image>" + QUESTIONS[kind].format(names=" ".join(facts["ask"]), **facts)
    problem = Problem(id=f"{kind}-{steps}-{form}-{split}-{seed}-{index}", question=question, answer="",
                      images=[], task=f"{kind}/{form}", oracle=facts)
    problem.key_steps = true_steps(facts)
    problem.answer = gold = answer_from_steps(facts, problem.key_steps)
    if form == "choice":
        problem.choices = make_options(facts, rng)
        problem.answer = "ABCD"[problem.choices.index(gold)]
        for letter, option in zip("ABCD", problem.choices):
            problem.question += f"\n{letter}. {option}"
    elif form == "yesno":
        facts["offer"] = gold
        if rng.random() < 0.5:
            depth = rng.randrange(steps)
            wrong = rng.choice(wrong_values(facts, facts["ask"][depth]))
            facts["offer"] = answer_from_steps(facts, corrupt(facts, {depth: wrong}))
        problem.answer = "yes" if facts["offer"] == gold else "no"
        problem.question += f"\nIs it {facts['offer']}?"
    problem.images = [draw(facts, rng)]
    return problem


def make_options(facts: dict, rng: random.Random) -> list[str]:
    """Four answers in random order: the true one, one with a wrong reading, one with another, and one with
    both (a single step: four values). Each is as like the others as any: the true one does not stand out."""
    names = rng.sample(facts["ask"], min(2, len(facts["ask"])))     # whose readings differ
    wrong = [rng.sample(wrong_values(facts, name), 3) for name in names]
    if len(names) == 1:
        changes = [{}, *({names[0]: value} for value in wrong[0])]
    else:
        one, two = {names[0]: wrong[0][0]}, {names[1]: wrong[1][0]}
        changes = [{}, two, one, one | two]
    options = []
    for change in changes:
        imagined = facts | {"show": facts["show"] | change}         # the image where this option is right
        options.append(answer_from_steps(imagined, true_steps(imagined)))
    return rng.sample(options, 4)


class Stream:
    """Endless problems by index. spec: "tiny" or, say, "tiny:steps=4-6,kinds=tiles+path,forms=free+choice".
    `run` neighbours have the same number of steps (less padding in a batch). ValueError for a bad spec."""

    def __init__(self, spec: str = "tiny", split: str = "train", seed: int = 0, run: int = 1):
        self.split, self.seed, self.run = split, seed, run
        options = {"steps": "12", "kinds": "tiles+path+bars", "forms": "free"}
        name, _, settings = spec.partition(":")
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            if key not in options:
                raise ValueError(f"{spec!r}: unknown setting {key!r} (known: {', '.join(options)})")
            options[key] = value
        self.kinds, self.forms = options["kinds"].split("+"), options["forms"].split("+")
        for given, known in (([name], ("tiny",)), (self.kinds, KINDS), (self.forms, FORMS)):
            if not set(given) <= set(known):
                raise ValueError(f"{spec!r}: {'+'.join(given)} is not among {', '.join(known)}")
        low, _, high = options["steps"].partition("-")
        high = high or low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= MAX_STEPS):
            raise ValueError(f"{spec!r}: steps must be a number or a range like 4-6, from 1 to {MAX_STEPS}")
        self.steps = range(int(low), int(high) + 1)

    def __getitem__(self, index: int) -> Problem:
        """Every kind and form in turn, so any stretch of the stream is balanced; a run has one form."""
        steps = random.Random(f"{self.split}/{self.seed}/{index // self.run}").choice(self.steps)
        kind = self.kinds[index % len(self.kinds)]
        form = self.forms[index // max(self.run, len(self.kinds)) % len(self.forms)]
        return make_problem(kind, steps, form, self.split, self.seed, index)


def demonstrate(problem: Problem, erosion: tuple[float, float], rng: random.Random) -> str:
    """A completion for supervised training: a chain and the answer that follows from it as written. `erosion`
    is the chance of a step read from language (`prior`) instead of the image, at the first two steps and at
    the ninth; linear between, then constant."""
    facts, (first, ninth), wrong = problem.oracle, erosion, {}
    for depth, name in enumerate(facts["ask"]):
        if rng.random() < first + (ninth - first) * max(0, min(depth, 8) - 1) / 7:
            wrong[depth] = prior(facts, name)
    steps = corrupt(facts, wrong)
    answer = answer_from_steps(facts, steps)
    if problem.choices:                 # the option that shares most words with the chain's own answer
        shared = [sum(map(eq, answer.split(), option.split())) for option in problem.choices]
        answer = "ABCD"[shared.index(max(shared))]
    elif "offer" in facts:
        answer = "yes" if answer == facts["offer"] else "no"
    return "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"


def check_steps(problem: Problem, steps: list[str]) -> list[str]:
    """The oracle, a verdict a step. "true": true of the image, and called for after the step before; "logic":
    a true reading, but a false conclusion or not called for; "misread": not true of the image; "unparsed"."""
    facts, verdicts = problem.oracle, []
    length = 2 if facts["kind"] == "count" else 3
    due = facts["ask"] + [None] * (len(steps) + 1)      # the name that each step must look up
    for depth, step in enumerate(steps):
        words = step.split()
        name, digit = (words + ["", ""])[:2]
        shown = facts["show"].get(name)
        if facts["kind"] == "count":    # of what is not in the image there is none
            shown = sum(name in thing for thing in facts["objects"])
        if len(words) != length or name not in NAMES + SHAPES or digit not in tuple("0123456789"):
            verdicts.append("unparsed")
        elif digit != str(shown) or (facts["kind"] == "path" and words[2] != facts["next"][name]):
            verdicts.append("misread")
        elif name != due[depth] or " ".join(words) != step_text(facts, name, shown):
            verdicts.append("logic")
        else:
            verdicts.append("true")
        if facts["kind"] == "path":     # a walk continues where its last step points
            due[depth + 1] = words[2] if verdicts[depth] != "unparsed" else None
    return verdicts


def verdicts(t) -> list[str]:
    """`check_steps` of a trajectory that was split into steps."""
    return check_steps(t.problem, [step.text for step in t.steps])


def is_right(problem: Problem, step: str) -> bool:
    """Whether a step is true of the image and draws the right conclusion, wherever in the chain it stands."""
    name, facts = step.split(" ")[0], problem.oracle
    return name in facts["show"] and step == step_text(facts, name, facts["show"][name])


def draw(facts: dict, rng: random.Random) -> Image.Image:
    """The picture: whole cells, everything inside them varied (order, offset, size, shade, shape, background,
    noise). Notes in facts["cells"] what lies where: ((row, column), thing)."""
    things = list(facts.get("objects", facts["show"]))
    rng.shuffle(things)
    if facts["kind"] == "bars":
        height, cols = 3, min(10, max(3, len(things)))              # a bar is three cells high
        rows = -(-len(things) // cols)
    else:
        height, side = 1, int(len(things) ** 0.5)
        cols = rng.randint(max(2, side), min(8, max(3, side + 2)))
        rows = max(1, -(-len(things) // cols)) + (rng.random() < 0.3)
    places = sorted(rng.sample(range(rows * cols), len(things)))
    shade = rng.choice([rng.randint(20, 70), rng.randint(140, 225)])
    background = tuple(shade + rng.randint(-12, 12) for _ in range(3))
    image = Image.new("RGB", (cols * CELL, rows * height * CELL), background)
    pen = ImageDraw.Draw(image)
    facts["cells"] = []
    for thing, place in zip(things, places):
        row, col = place // cols * height, place % cols
        facts["cells"].append(((row, col), thing))
        _draw_thing(pen, col * CELL, row * CELL, facts, thing, rng)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), (*image.size[::-1], 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _draw_thing(pen, left, top, facts, thing, rng):
    """A tile, object or bar, in the cell whose upper left corner is the pixel (left, top)."""
    name = thing if isinstance(thing, str) else thing[0]
    rgb = tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in COLOURS[name])
    bright = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] > 110
    ink = (0, 0, 0) if bright else (255, 255, 255)
    if facts["kind"] == "bars":
        width, base = rng.randint(14, 22), top + 3 * CELL - 5
        edge = left + (CELL - width) // 2 + rng.randint(-2, 2)
        value = facts["show"][name]
        pen.rectangle((edge, base - value * UNIT, edge + width, base), fill=rgb, outline=ink)
        for height in range(UNIT, value * UNIT, UNIT):              # a tick a unit
            pen.line((edge, base - height, edge + width, base - height), fill=ink)
        pen.line((left, base, left + CELL, base), fill=(90, 90, 90), width=2)
    elif facts["kind"] == "count":
        radius = rng.uniform(8, 12)
        x = left + CELL / 2 + rng.uniform(-1.5, 1.5)
        y = top + CELL / 2 + rng.uniform(-1.5, 1.5)
        if thing[1] == "triangle":
            corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
            pen.polygon(corners, fill=rgb, outline=ink)
        else:
            draw_shape = pen.ellipse if thing[1] == "circle" else pen.rectangle
            draw_shape((x - radius, y - radius, x + radius, y + radius), fill=rgb, outline=ink)
    else:
        side = rng.randint(24, 27)
        x = left + rng.randint(0, CELL - side)
        y = top + rng.randint(0, CELL - side)
        pen.rounded_rectangle((x, y, x + side, y + side), radius=rng.choice([0, 3, 6]), fill=rgb, outline=ink)
        dot = facts.get("next", {}).get(name)
        if dot is None:
            size, digit_x, digit_y = rng.randint(15, 20), x + side / 2, y + side / 2
        else:                                                       # room for the dot; a cross marks the end
            size, digit_x, digit_y = rng.randint(14, 16), x + side * 0.32, y + side * 0.45
            dot_x, dot_y, radius = x + side * 0.74, y + side * 0.70, rng.uniform(4.2, 5.2)
            start, stop = (dot_x - radius, dot_y - radius), (dot_x + radius, dot_y + radius)
            if dot == "end":
                pen.line((start[0], stop[1], stop[0], start[1]), fill=ink, width=2)
                pen.line((start, stop), fill=ink, width=2)
            else:
                pen.ellipse((start, stop), fill=COLOURS[dot], outline=ink)
        middle = (digit_x + rng.uniform(-1, 1), digit_y + rng.uniform(-1, 1))
        pen.text(middle, str(facts["show"][name]), fill=ink, font=FONTS[size], anchor="mm")
