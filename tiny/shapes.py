"""Visual tasks drawn by Pillow: chains of 1 to 20 readings from an image, and an oracle for every step.

kind  | the image                                  | a step says      | the answer
------|--------------------------------------------|------------------|--------------------------------------
tiles | coloured tiles with a digit                | digit + shift    | colour and shifted digit of each tile
path  | tiles with a digit and a dot: the next tile| digit, next tile | colour and digit along the path
bars  | a bar chart, a colour a bar                | height, verdict  | height and verdict of each bar
total | coloured tiles with a digit up to 4        | digit, sum so far| the sum alone

Two dialects: "sentences", a chain in one of eight wordings, in lines, with blank lines or as a list, now and
then with a sentence that claims nothing; "short", `red 4 6`. There are too many answers to guess one: reward
by luck would teach guessing instead of looking. Train and held-out problems share no image: a checksum of
what an image shows decides on which side it lies.
The paper's public abstract names no such tasks; all is our choice. Left out: natural images.

Worked example: make_problem("tiles", 3, "short") is a Problem whose question is "<image>Add 1 to the digit
of each tile: mint, cream, purple." In its image the mint tile says 8, the cream one 6, the purple one 7. Its
key_steps are "mint 8 9", "cream 6 7", "purple 7 8", its answer is "mint 9 cream 7 purple 8"; its oracle is
what the image shows.
"""
import json
import random
import re
import string
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rollout import INSTRUCTION, Problem

COLOURS = {"red": (230, 25, 45), "green": (40, 160, 60), "yellow": (250, 220, 30), "blue": (20, 80, 220),
           "orange": (245, 130, 30), "purple": (130, 30, 170), "cyan": (60, 220, 240),
           "magenta": (240, 50, 220), "lime": (180, 245, 50), "pink": (250, 190, 205), "teal": (0, 120, 125),
           "violet": (200, 170, 255), "brown": (130, 70, 25), "cream": (255, 245, 200),
           "maroon": (100, 0, 10), "mint": (150, 255, 195), "olive": (120, 120, 0), "navy": (0, 0, 100),
           "black": (10, 10, 10), "white": (255, 255, 255)}
NAMES = tuple(COLOURS)
KINDS = ("tiles", "path", "bars", "total")
DIALECTS = ("sentences", "short")
QUESTIONS = {"tiles": "Add {shift} to the digit of each tile: {names}.",
             "path": "Follow the dots from {ask[0]}, tile by tile.",
             "bars": "Is each bar over {limit}: {names}?",
             "total": "Start at {start} and add the digit of each tile: {names}."}
VALUES = {"tiles": range(10), "path": range(10), "bars": range(1, 10), "total": range(5)}       # of a reading
# How a step is said; the first is the short dialect. out: what the step comes to.
WORDINGS = {
    "tiles": ("{name} {value} {out}",
              "The tile in {name} shows {value}, and {value} + {shift} = {out}.",
              "{name}: {value} + {shift} = {out}",
              "On {name} I read {value}, which makes {out}.",
              "The {name} tile says {value}, so we get {out}.",
              "For {name} it is {value}; plus {shift} that is {out}.",
              "Next comes {name} with {value}, hence {out}.",
              "The digit on {name} is {value}, plus {shift} gives {out}.",
              "I find {name}, see {value} and write {out}."),
    "path": ("{name} {value} {out}",
             "The tile in {name} shows {value}, and its dot is {out}.",
             "{name}: {value}, then {out}",
             "On {name} I read {value}, and the dot leads to {out}.",
             "The {name} tile says {value} and points to {out}.",
             "For {name} it is {value}; we go on to {out}.",
             "Next comes {name} with {value}, followed by {out}.",
             "The digit on {name} is {value}, the dot beside it {out}.",
             "I find {name}, see {value} and follow {out}."),
    "bars": ("{name} {value} {out}",
             "The bar in {name} shows {value}, and over {limit} is {out}.",
             "{name}: {value}, {out}",
             "On {name} I read {value}, which means {out}.",
             "The {name} bar says {value}, so we get {out}.",
             "For {name} it is {value}; over {limit} that is {out}.",
             "Next comes {name} with {value}, hence {out}.",
             "The height of {name} is {value}, so {out}.",
             "I find {name}, see {value} and write {out}."),
    "total": ("{name} {before} + {value} = {out}",
              "The tile in {name} shows {value}, and {before} + {value} = {out}.",
              "{name}: {before} + {value} = {out}",
              "On {name} I read {value}, which makes {before} + {value} = {out}.",
              "The {name} tile says {value}, so we get {before} + {value} = {out}.",
              "For {name} it is {value}; {before} + {value} = {out}.",
              "Next comes {name} with {value}, hence {before} + {value} = {out}.",
              "The digit on {name} is {value}, in all {before} + {value} = {out}.",
              "I find {name}, see {value} and write {before} + {value} = {out}."),
}
FILLERS = ("Let me look at the picture.", "Now the next one.", "Let us go on.", "So far so good.")
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
    elif kind == "total":
        facts["start"] = rng.randint(10, 39)
    elif kind == "path":                # asked[0] -> asked[1] -> ... -> end
        shown = asked[:]
        for name in distractors:
            shown.insert(rng.randrange(len(shown)), name)
        facts["next"] = dict(zip(asked, asked[1:] + ["end"]))
        for name in distractors:        # they lead to a tile further on, so every walk ends
            facts["next"][name] = rng.choice(shown[shown.index(name) + 1:])
    facts["show"] = {name: rng.choice(VALUES[kind]) for name in shown}
    return facts


def conclusion(facts: dict, name: str, value: int, before: int) -> str:
    """What a step comes to that read `value` of `name`, where the chain stood at `before` (total)."""
    if facts["kind"] == "tiles":
        return str(value + facts["shift"])
    if facts["kind"] == "bars":
        return "yes" if value > facts["limit"] else "no"
    return facts["next"][name] if facts["kind"] == "path" else str(before + value)


def chain(facts: dict, wrong: dict | None = None, wording: int = 0) -> list[str]:
    """The steps that look up all that is asked; `wrong` maps depths (0-based) to readings that are not so."""
    steps, before = [], facts.get("start", 0)
    for depth, name in enumerate(facts["ask"]):
        value = (wrong or {}).get(depth, facts["show"][name])
        out = conclusion(facts, name, value, before)
        template = WORDINGS[facts["kind"]][wording]
        steps.append(template.format(**facts, name=name, value=value, before=before, out=out))
        before += value
    return steps


def parse_step(facts: dict, text: str) -> dict | None:
    """{"name", "value", "out"} and, of a running total, "before", of a step in any wording; None where it is
    in none."""
    text = re.sub(r"^\d{1,2}\. ", "", text)               # an item of a list
    fields = {"name": r"(?P<name>[a-z]+)", "value": r"(?P<value>\d)", "out": r"(?P<out>[a-z]+|\d{1,3})",
              "before": r"(?P<before>\d{1,3})"}
    for template in WORDINGS[facts["kind"]]:
        pattern, seen = "", set()
        for literal, field, _, _ in string.Formatter().parse(template):
            pattern += re.escape(literal)
            if field in fields:
                pattern += f"(?P={field})" if field in seen else fields[field]
                seen.add(field)
            elif field:
                pattern += str(facts[field])
        if match := re.fullmatch(pattern, text):
            return match.groupdict()
    return None


def prior(facts: dict, name: str) -> int:
    """What language alone says of a name, whatever the image shows: erosion reads this."""
    values = VALUES[facts["kind"]]
    return values[zlib.crc32(name.encode()) % len(values)]


def wrong_values(facts: dict, name: str) -> list[int]:
    return [value for value in VALUES[facts["kind"]] if value != facts["show"][name]]


def answer_from_steps(facts: dict, steps: list[str]) -> str:
    """The free-form answer that a chain of steps implies, right or wrong: every name with what it came to; of
    a total the last."""
    parts = []
    for step in steps:
        said = parse_step(facts, step)
        parts.append({"tiles": "{name} {out}", "path": "{name} {value}", "bars": "{name} {value} {out}",
                      "total": "{out}"}[facts["kind"]].format(**said))
    return parts[-1] if facts["kind"] == "total" else " ".join(parts)


def fresh_facts(kind: str, steps: int, split: str, rng: random.Random) -> dict:
    """The content of a problem of this side of the split."""
    while True:
        facts = make_facts(kind, steps, rng)
        shown = json.dumps([kind, sorted(facts["show"].items()), sorted(facts.get("next", {}).items())])
        if (zlib.crc32(shown.encode()) % 8 == 0) == (split == "heldout"):
            return facts


def make_problem(kind: str, steps: int, dialect="sentences", split="train", seed=0, index=0) -> Problem:
    """The `index`-th problem of a stream; the same arguments give the same problem. split: "train" or
    "heldout". ValueError where there is no such task."""
    if (kind not in KINDS or dialect not in DIALECTS or not 1 <= steps <= MAX_STEPS
            or split not in ("train", "heldout")):
        raise ValueError(f"no such task: kind {kind!r}, steps {steps}, dialect {dialect!r}, split {split!r}")
    rng = random.Random(f"{kind}/{steps}/{split}/{seed}/{index}")
    facts = {**fresh_facts(kind, steps, split, rng), "dialect": dialect}
    question = "<image>" + QUESTIONS[kind].format(names=", ".join(facts["ask"]), **facts)
    if dialect == "sentences":
        question += "\n" + INSTRUCTION
    key_steps = chain(facts)
    return Problem(id=f"{kind}-{steps}-{dialect}-{split}-{seed}-{index}", question=question,
                   answer=answer_from_steps(facts, key_steps), images=[draw(facts, rng)], task=kind,
                   key_steps=key_steps, oracle=facts)


class Stream:
    """Endless problems by index. spec: "tiny" (8 steps, all kinds but total, whose answers can be guessed now
    and then) or, say, "tiny:steps=4-6,kinds=tiles+path,dialect=short". `run` neighbours have the same number
    of steps (less padding in a batch). ValueError for a bad spec."""

    def __init__(self, spec: str = "tiny", split: str = "train", seed: int = 0, run: int = 1):
        self.split, self.seed, self.run = split, seed, run
        options = {"steps": "8", "kinds": "tiles+path+bars", "dialect": "sentences"}
        name, _, settings = spec.partition(":")
        for setting in filter(None, settings.split(",")):
            key, _, value = setting.partition("=")
            if key not in options:
                raise ValueError(f"{spec!r}: unknown setting {key!r} (known: {', '.join(options)})")
            options[key] = value
        self.kinds, self.dialects = options["kinds"].split("+"), options["dialect"].split("+")
        for given, known in (([name], ("tiny",)), (self.kinds, KINDS), (self.dialects, DIALECTS)):
            if not set(given) <= set(known):
                raise ValueError(f"{spec!r}: {'+'.join(given)} is not among {', '.join(known)}")
        low, _, high = options["steps"].partition("-")
        high = high or low
        if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= MAX_STEPS):
            raise ValueError(f"{spec!r}: steps must be a number or a range like 4-6, from 1 to {MAX_STEPS}")
        self.steps = range(int(low), int(high) + 1)

    def __getitem__(self, index: int) -> Problem:
        """Every kind in turn, so any stretch of the stream is balanced; a run has one dialect."""
        steps = random.Random(f"{self.split}/{self.seed}/{index // self.run}").choice(self.steps)
        kind = self.kinds[index % len(self.kinds)]
        dialect = self.dialects[index // max(self.run, len(self.kinds)) % len(self.dialects)]
        return make_problem(kind, steps, dialect, self.split, self.seed, index)


def demonstrate(problem: Problem, erosion: tuple[float, float], rng: random.Random) -> str:
    """A completion for supervised training: a chain and the answer that follows from it as written. `erosion`
    is the chance of a step read from language instead of the image, at the first three steps and from the
    fifth on (at the fourth the mean of both). In seven of ten such steps that is the `prior`, else what the
    step before read."""
    facts, (first, last), wrong, lines, value = problem.oracle, erosion, {}, [], 0
    for depth, name in enumerate(facts["ask"]):
        before, value = value, facts["show"][name]
        if rng.random() < first + (last - first) * max(0, min(depth, 4) - 2) / 2:
            value = wrong[depth] = before if depth and rng.random() < 0.3 else prior(facts, name)
    sentences = facts["dialect"] == "sentences"
    steps = chain(facts, wrong, rng.randint(1, 8) if sentences else 0)
    form = rng.choice(("lines", "lines", "blank lines", "list")) if sentences else "lines"
    for n, step in enumerate(steps, start=1):
        if sentences and form != "list" and rng.random() < (0.2 if n == 1 else 0.03):
            lines.append(FILLERS[0] if n == 1 else rng.choice(FILLERS[1:]))
        lines.append(f"{n}. {step}" if form == "list" else step)
    thoughts = ("\n\n" if form == "blank lines" else "\n").join(lines)
    return f"<think>{thoughts}</think><answer>{answer_from_steps(facts, steps)}</answer>"


def check_steps(problem: Problem, steps: list[str]) -> list[str]:
    """The oracle, a verdict a step. "true": true of the image, and called for after the step before (or it
    claims nothing); "logic": a true reading, but a false conclusion or not called for; "misread": not true of
    the image; "unparsed"."""
    facts, found = problem.oracle, []
    due = list(facts["ask"])                                # the names to be looked up
    before = facts.get("start", 0)                          # the total so far
    for step in steps:
        if step in FILLERS:
            found.append("true")
            continue
        said = parse_step(facts, step)
        called_for, due = (due or [None])[0], due[1:]
        if not said or said["name"] not in NAMES:
            found.append("unparsed")
            continue
        name, value = said["name"], int(said["value"])
        leads_to = facts.get("next", {}).get(name, said["out"])
        if value != facts["show"].get(name) or said["out"] != leads_to and facts["kind"] == "path":
            found.append("misread")
        elif (name != called_for or said["out"] != conclusion(facts, name, value, before)
              or int(said.get("before", before)) != before):
            found.append("logic")
        else:
            found.append("true")
        if facts["kind"] == "path":     # a walk continues where its last step points
            due = [said["out"]]
        before = int(said["out"]) if said["out"].isdecimal() else before
    return found


def verdicts(t) -> list[str]:
    """`check_steps` of a trajectory that was split into steps."""
    return check_steps(t.problem, [step.text for step in t.steps])


def is_right(problem: Problem, step: str) -> bool:
    """Whether a step is true of the image, wherever it stands in the chain, and concludes rightly."""
    facts, said = problem.oracle, parse_step(problem.oracle, step)
    if not said or said["name"] not in facts["show"]:
        return False
    name, value, out = said["name"], int(said["value"]), said["out"]
    before = int(said.get("before", 0))
    return value == facts["show"][name] and out == conclusion(facts, name, value, before)


def draw(facts: dict, rng: random.Random, grid=None) -> Image.Image:
    """The picture: whole cells, everything inside them varied (order, offset, size, shade, shape, background,
    noise). grid: rows and columns of things (None: 8 to 10, bars in three rows). Notes in facts["cells"] what
    lies where: ((row, column), thing)."""
    things = list(facts["show"])
    rng.shuffle(things)
    height, rows, cols = 1, rng.randint(8, 10), rng.randint(8, 10)
    if facts["kind"] == "bars":
        height, rows = 3, 3                                         # a bar is three cells high
    rows, cols = grid or (rows, cols)
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


def _draw_thing(pen, left, top, facts, name, rng):
    """A tile or bar, in the cell whose upper left corner is the pixel (left, top)."""
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
