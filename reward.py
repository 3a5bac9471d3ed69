r"""The rule-based reward: find the answer in a completion, decide whether it is right, check the format.

Strings in, numbers out; no model: total = (1 - w) * accuracy + w * format. The paper's abstract, all that is
public, gives no rule: rules and weight are our choice, made against tools in use (math_verify, mathruler,
VLMEvalKit). Completions are untrusted: nothing is eval'ed, sizes are bounded. `extract_answer`, for
benchmarks, is kind (the last tag, box, "answer is", formula or number); `reward_parts`, for training, is
strict (one <answer> block, or no tag and one box), as a policy exploits generosity. Answers are equal if
`normalise` gives them one spelling, or if their values agree: exact fractions; with variables, at three
sample points. Left out: conversion of units (5 m and 500 cm), numbers in words, systems of equations.

Worked example: "<think>6 / 12 is half.</think><answer>x = \frac12</answer>", gold "0.5". The label x = goes,
\frac12 is the fraction 1/2 and so is 0.5: accuracy 1, format 1, total 0.9 * 1 + 0.1 * 1 = 1.
"""
import math
import operator
import re
from fractions import Fraction
from functools import lru_cache
from random import Random
from unicodedata import normalize as unicode_normalise

MAX_LENGTH, MAX_TOKENS, MAX_BRACKETS, MAX_DIGITS = 2000, 300, 80, 60   # a larger answer matches only verbatim
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"                                      # of options

# ---- Finding the answer ------------------------------------------------------------------------------------
CUE = re.compile(r"\banswer\b[*_ ]*(?:is\b|[:=：])[*_: ]*|####", re.I)
FORMULA = r"\$[^$\n]+\$(?!\d)|\\\([^\n]{,99}?\\\)"
NUMBER = (r"(?<![\w.)^_{\\+*/-])(?<![-+*/^] )-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?%?"
          r"(?![\w%(^\\√+*/-]|\.\d|,\d{3}|\s[-+*/^\\√π])")                  # no part of "16 - 8\pi"


def declared_answer(text: str) -> tuple[str, str | None]:
    """The text after the thoughts; what its last tag or box holds: "" if malformed, None if absent."""
    if text.rfind("<think>") > text.rfind("</think>"):
        return "", None                                                 # still thinking
    text = text.rpartition("</think>")[2]
    before, opening, after = text.rpartition("<answer>")
    content, closing, _ = after.partition("</answer>")
    if opening or closing:
        nested = before.rfind("<answer>") > before.rfind("</answer>")
        return text, content.strip() if opening and closing and not nested else ""
    _, box, body = text.rpartition("\\boxed{")
    depth = 1
    for token in re.finditer(r"(?s)\\.|[{}]", body[:MAX_LENGTH]):       # \{ and \} do not count as braces
        depth += (token[0] == "{") - (token[0] == "}")
        if box and depth == 0:
            return text, body[:token.start()].strip()
    return text, "" if box else None


def extract_answer(text: str, choices: list | None = None) -> str | None:
    """The answer a completion gives, for benchmarks, or None; with choices a letter ("A") or None."""
    text, declared = declared_answer(text)
    if declared is not None:                            # "": malformed or empty, no answer
        return (choose(declared, choices) if choices else declared) or None
    text = text[-4000:].strip()
    last_line = text.rpartition("\n")[2]
    pieces = CUE.split(text)
    cued = pieces[-1].strip(" \n*").split("\n")[0] if len(pieces) > 1 else ""   # after "the answer is"
    if choices:
        return choose(cued, choices) or choose(last_line, choices) or choose(text[-300:], choices)
    line = (re.split(r"[.!?]\s", cued)[0] if cued else last_line).rstrip(" .")
    wordless = re.search(r"\w", line) and not re.search(r"(?<!\\)\b[A-Za-z]{2,}", line)
    if len(line) <= MAX_TOKENS and (wordless or value_of(split_unit(normalise(line))[0], 0)):
        return line
    place = (line if cued else text).replace("**", "")
    found = list(re.finditer(FORMULA, place)) or list(re.finditer(NUMBER, place))
    if found:
        leads = cued and found[0].start() == 0          # "7, since 3 + 4 = 7" but "the sum of 3 and 4 is 7"
        return found[0 if leads else -1][0].strip("$ ")
    return line if 0 < len(line) <= 100 else None


def is_guessable(gold: str, choices: list | None = None) -> bool:
    """Whether a lucky answer is likely: options, yes or no, a number up to 20, one word."""
    small_number = gold.isdecimal() and len(gold) < 3 and int(gold) <= 20
    return bool(choices) or small_number or re.fullmatch("[A-Za-z]+", gold) is not None


# ---- Multiple choice ---------------------------------------------------------------------------------------
LABELLED = r"(?s)(?:[Oo]ption|[Cc]hoice)? ?(?:\((?=.\)))?([A-Z])[).:] ?(.+)"                   # "B) 12"
MENTION = (r"(?:\b(?:[Oo]ption|[Cc]hoice) ?\(?|(?<![\w'-])(?<!\d )\(?)([A-Z])(?![\w'-])"
           r"(?!(?<!ion A)(?<!ice A)(?<=[AI]) (?!is\b)[a-z])")              # no "5 A", "A frog", "I think"
REFUTED = (r"\(?\b[A-Z]\b\)?(?:,{1,2}\(?[A-Z]\b\)?){,11} ?(?:is|are)(?: (?:also |clearly |ruled )?"
           r"(?:wrong|incorrect|false|out)|(?:n't| not) (?:right|correct))\b[^.;,]*[.;,]?\s*")


def choose(text: str, choices: list, strict: bool = False) -> str | None:
    """The letter of the option that a text gives: letter, text or both; unless strict, in a sentence too."""
    letters = LETTERS[:len(choices)]
    options = []                                                            # without letters of their own
    for letter, choice in zip(letters, choices):
        options.append(normalise(re.sub(rf"^\(?{letter}[).:]\s+", "", str(choice)[:MAX_LENGTH])))
    text = normalise(text) if len(text) <= MAX_LENGTH else ""
    alone = re.fullmatch(r"(?:option|choice)? ?[(\[{]?([A-Z])[)\]}]?", text, re.I)
    is_letter = alone and alone[1].upper() in letters
    named = [alone[1].upper()] if is_letter else equal_options(text, letters, options)
    if len(named) == 1:
        return named[0]
    if not strict:
        text = re.sub(REFUTED, "", text)                                    # "A is wrong."
    labelled = re.match(LABELLED, text)
    if labelled and labelled[1] in letters:
        named = equal_options(labelled[2], letters, options)
        listing = re.search(r"(?<!\w)(?:\([A-Z]\)|[A-Z][).:])", labelled[2])
        explained = not (named or listing or strict)                        # "B. It is that one"
        return labelled[1] if labelled[1] in named or explained else None
    if strict:
        return None
    # A sentence: the one letter in its first clause, else in all of it, else the one option's text.
    negated = re.search(r"\b(?:not|neither|never)\b|n't\b", text, re.I)
    clause = re.split(r"[.;] |,(?=[a-z])|\b(?:since|because|not|[Nn]either)\b", text)[0]
    for part in [clause] if negated else [clause, text]:
        found = set(re.findall(MENTION, part)) & set(letters)
        if found:
            return found.pop() if len(found) == 1 else None
    hits = [option for option in options if (len(option) > 1 or option.isdigit())
            and re.search(rf"(?<![\w.^/-]){re.escape(option)}(?![\w^/]|[.,]\d)", text, re.I)]
    whole = [option for option in hits if "\n".join(hits).count(option) == 1]       # no "red" in "dark red"
    return letters[options.index(whole[0])] if len(whole) == 1 and not negated else None


def equal_options(text: str, letters: str, options: list[str]) -> list[str]:
    """The letters of the options that a text equals: of equal texts the first, else all of equal value."""
    verbatim = [letter for letter, option in zip(letters, options) if text.lower() == option.lower() != ""]
    return verbatim[:1] or [letter for letter, option in zip(letters, options) if equal(text, option)]


# ---- Equality ----------------------------------------------------------------------------------------------
COMMANDS = dict(c.split(":") for c in r"""pi:π times:* cdot:* div:/ dfrac:\frac tfrac:\frac cfrac:\frac circ:°
    degree:° pm:± le:≤ leq:≤ leqslant:≤ ge:≥ geq:≥ geqslant:≥ ne:≠ neq:≠ lt:< gt:> approx:= in:= infty:∞ cup:∪
    angle:∠ triangle:△ theta:θ alpha:α beta:β left: right: displaystyle: lvert:| rvert:| vert:|""".split())
RELATIONS = "=<>≤≥≠"
LABEL = re.compile(r"(?:[^\W\d]|[∠△\\])[\w\s'(){}\\∠△,.]*|")                # "x", "f(x)", "Area of ABC", ""
UNIT = re.compile(r"(.*[0-9)}π])(?: |(?<=\})|(?=[A-Za-z]{2}))([A-Za-z/^23]+)")      # 5m is a product
UNITS = {}                                                                          # each spelling: the first
for names in """mm millimeter|cm centimeter|m meter|km kilometer|mi mile|in inch inche|ft foot feet|yd yard
    |g gram|kg kilogram|mg milligram|lb pound|oz ounce|s sec second|min minute|h hr hour|day|week|month|year
    |L l liter|ml milliliter|N newton|J joule|W watt|V volt|pa pascal|hz hertz|mol|dollar usd|cent|unit|degc
    |degf|rad radian|mph|ohm|people person|student|item|time""".split("|"):
    UNITS.update(dict.fromkeys(names.split(), names.split()[0]))
WORDS = r"(?:[A-Za-z\s$.,:;=*~]|\\[()\[\]]|\\(?:text|mathrm)\{[A-Za-z\s~]*\})*"
CHARACTERS = str.maketrans("−–—‐‑×·⋅∗÷⁄∕“”⩽⩾", "-----****///\"\"≤≥", "$€£")
RULES = [                                                                   # the order matters
    (rf"(?s)^{WORDS}\\boxed\{{(.*)\}}{WORDS}$", r"\1"),                     # "The area is \boxed{5} cm." is 5
    ("[¼-¾⅐-⅞]", r" \g<0>"),                                                # 1½ is 1 1/2, not 11/2
    ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"), ("[₀-₉]+", r"_\g<0>"), ("º", "°"),      # x² is x^2
    (r"(?<=\d)([\u202f\u2009]|\\[,!]|\{,\})(?=\d{3}(?!\d))", ""),           # 1{,}234 and 1\,234 are 1234
    ("(?s).+", lambda m: unicode_normalise("NFKC", m[0])[:MAX_LENGTH]),     # full-width letters; ½ is 1⁄2
    (r"(?<=\d)\\(?=text|math)", r" \\"),                                    # 8\text{cm} is 8 cm
    (r"\\(?:text\w*|math[a-z]+|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[()\[\],;:!\\ ]|~", " "),                                          # spaces; \( \) around formulas
    (r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1], m[0])), (r"\\([{}%$&#_|])", r"\1"),   # \pi is π, \% is %
    ("(?s).+", lambda m: m[0].translate(CHARACTERS)),                       # one character for each sign
    (r"√|\\sqrt", "sqrt "), ("<=", "≤"), (">=", "≥"), ("!=", "≠"), ("[≈∈]", "="),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"), (r"\*\*", ""),                    # 3**2 is a power; **blue** is not
    (r"(?<=\d)\s*\{([A-Za-z]+)\}", r" \1"),                                 # 69{degrees}
    (r"(?<=[\d}] )sq(?:uare|\.)? (\w+)", r"\1^2"), (r"(?<=[\d}] )cubic (\w+)", r"\1^3"),     # square cm
    (r"\^ ?\{?°\}?|(?<=\d)\s*deg(?:ree)?s?\b", "°"),                        # 70^\circ and 70 degrees are 70°
    (r"(?<=\d)\s*percent\b", "%"), (r"° ?([CF])\b", r" deg\1"),             # °C is a unit
    (r"(sin|cos|tan)((?:\^\{?\d\}?)?) ?\(?(\d+)°\)?", r"\1\2(\3*π/180)"), ("°", ""),    # sin 90° is 1; 90° 90
    (r"(?<=\d)\s*[xX]\s*(?=10\^)", "*"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),  # 6 x 10^2; \frac12
    (r"(?<![\w.^)}/])(\d{1,9})(?: +| *\\frac\{)(\d{1,9})(?:/|\}\{)(\d{1,9})(?![\d.])\}?",   # 1 1/2, but
     lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0]),           # 2\frac{3}{2} is 3
    (r"_\{(\w+)\}(?=\d)", r"_\1 "), (r"([\^_])\{(-?\w+)\}", r"\1\2"),       # \log_{2}8 is \log_2 8; x^{2}
    (r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)",                              # 1,234; but (1,234) is a pair
     lambda m: m[0] if re.search(r"[(\[{]", m.string[:m.start()]) else m[0].replace(",", "")),
    (r"^[\s*`]+|[\s*`.,;:]+$", ""), (r"^([\"'])(.*)\1$", r"\2"),            # *blue*, blue., "blue" are blue
    (r"(?<=[A-Za-z]{2})[!?]+$", ""),                                        # so is blue!, but 5! is not 5
    (r"(?i)^(?:(?:so|thus|therefore),? )?(?:the |my )?(?:final |correct )?answer\s*(?:is\b|[:=])[\s:]*", ""),
    (r"\s+(?:and|or)\s+", ","), (r"\s+", " "),                              # 1 and 2 is 1,2
    (r" ?([-+*/^=<>≤≥≠±(),;:{}\[\]|∪]) ?", r"\1"), (r"^[+ ]| $", "")]


@lru_cache(4096)
def normalise(text: str) -> str:
    """One spelling: plain symbols, no box, no "answer:", no decoration. Words keep their case and spaces."""
    for pattern, new in RULES:
        text = re.sub(pattern, new, text)
    return text


def split_unit(text: str) -> tuple[str, str]:
    """("5", "m/s2") of "5 metres/second^2"; the unit is "" where there is none that we know."""
    match = UNIT.fullmatch(text)
    value, unit = match.groups() if match else (text, "")
    words = re.findall("[A-Za-z]+", unit.replace("metre", "meter").replace("litre", "liter"))
    words = [word.lower() if len(word) > 1 else word for word in words]             # N is a unit, n is not
    names = [UNITS.get(word) or UNITS.get(word.removesuffix("s")) for word in words]
    if not names or None in names:
        return text, ""
    return value, "/".join(names) + re.sub("[^23]", "", unit)


def power(base, exponent):
    """base ^ exponent, exact for small whole exponents; ValueError where it is complex."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) <= 64 and max(abs(base.numerator), base.denominator) < 2 ** 256:
            return base ** int(exponent)
    return math.pow(base, exponent)


TOKEN = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z.]))?"  # a number
                   r"|\\?([A-Za-z]+|[^\W\d_])(_[0-9]+|_[A-Za-z]+)?|\S")                     # a name; a sign
CONSTANTS, CLOSING = {"pi": math.pi, "π": math.pi, "e": math.e}, {"(": ")", "{": "}", "[": "]", "|": "|"}
FUNCTIONS = dict(sqrt=math.sqrt, sin=math.sin, cos=math.cos, tan=math.tan, exp=math.exp, ln=math.log, abs=abs,
                 log=math.log10, arcsin=math.asin, arccos=math.acos, arctan=math.atan)
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),  # how tightly each binds
             "/": (2, operator.truediv), "^": (4, power), "%": (5, operator.truediv)}


class Evaluator:
    """Recursive descent by binding strength. Numbers are Fractions until a function or constant makes floats;
    a variable's value is fixed by its name and `point`. Raises where there is no expression or real value."""

    def __init__(self, text: str, point: int):
        self.point, self.names, self.tokens = point, set(), []              # names: of variables met
        for match in TOKEN.finditer(text):
            name, index = match[1] or "", match[2] or ""
            if len(name) < 2 or name in FUNCTIONS or name in CONSTANTS or match[0][0] == "\\":
                self.tokens.append(match[0].lstrip("\\"))
            elif len(name) > 3 or " " in text[max(match.start() - 1, 0):match.end() + 1]:   # red in 4 red
                raise ValueError("a word")
            else:                                                           # xy is x * y
                self.tokens += [*name[:-1], name[-1] + index]
        self.tokens = [""] + self.tokens[::-1]                              # a stack; "" is the end

    def expression(self, floor: int = 0):
        """Operands joined by operators that bind more tightly than `floor`."""
        value = self.operand()
        while token := self.tokens[-1]:
            implicit = token[0].isalpha() or token in "({"                  # no number follows: "x2", "red 4"
            binding, apply = OPERATORS.get("*" if implicit else token, (0, None))
            if binding <= floor:
                break
            token = token if implicit else self.tokens.pop()
            right_floor = binding - (token == "^")                          # 2^3^2 is 2^(3^2)
            value = apply(value, Fraction(100) if token == "%" else self.expression(right_floor))
        return value

    def operand(self):
        """A bracket, number, fraction, constant, function or variable, maybe with a sign."""
        token = self.tokens.pop()
        name, _, index = token.partition("_")
        if token in CLOSING:
            value = self.expression()
            if self.tokens.pop() != CLOSING[token]:
                raise ValueError("not closed")
            return abs(value) if token == "|" else value
        if token in ("+", "-"):
            return self.expression(2) * (-1 if token == "-" else 1)
        if re.match("[0-9.]", token):
            return Fraction(token if len(token) <= MAX_DIGITS else "too long")
        if token == "frac":
            return self.operand() / self.operand()
        if not token[:1].isalpha():
            raise ValueError("no operand")
        if token in CONSTANTS:
            return CONSTANTS[token]
        if name in FUNCTIONS:
            return self.function(name, index)
        self.names.add(token)
        return Fraction(Random(f"{token}{self.point}").randrange(102, 999), 101) * (-1) ** self.point

    def function(self, name: str, index: str):
        """sqrt[3]{x}, log_2 x, sin^2 x and the like, after the name."""
        if name == "sqrt":
            degree = self.operand() if self.tokens[-1] == "[" else 2
            value = self.operand()
            return -power(-value, 1 / degree) if value < 0 and degree % 2 == 1 else power(value, 1 / degree)
        exponent = 1
        if self.tokens[-1] == "^" and self.tokens[-2].isdigit():
            self.tokens.pop()
            exponent = self.operand()
        value = self.argument()
        value = math.log(value, Fraction(index)) if index else FUNCTIONS[name](value)
        return value if exponent == 1 else power(value, exponent)

    def argument(self):
        """A bracket, else the implicit product that follows: sin 2x, sin 2(x+1), but sin x in sin x cos x."""
        if self.tokens[-1] in CLOSING:
            return self.operand()
        after_number = self.tokens[-1][:1].isdigit()                        # sin x(y+1) is sin(x) * (y+1)
        value = self.expression(2)
        while (token := self.tokens[-1]) and token.partition("_")[0] not in FUNCTIONS:
            if not token[0].isalpha() and not (after_number and token in "({"):
                break
            value, after_number = value * self.expression(2), False
        return value


@lru_cache(4096)
def value_of(text: str, point: int):
    """(value, names of its variables) of a normalised expression at a sample point, or None."""
    try:
        evaluator = Evaluator(text, point)
        value = evaluator.expression()
        bounded = value == 0 or 1e-150 < abs(value) < 1e150                 # so that no quotient overflows
        return (value, evaluator.names) if bounded and evaluator.tokens == [""] else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):       # IndexError: an open bracket
        return None


def is_small(text: str) -> bool:
    """Whether a normalised text may be evaluated at all."""
    return len(TOKEN.findall(text)) <= MAX_TOKENS and sum(map(text.count, "([{")) <= MAX_BRACKETS


def equal(a: str, b: str) -> bool:
    """Whether two answers say the same: the same text, value, tuple, set or relation."""
    if a.strip() == b.strip() != "":
        return True                                                         # whatever the length
    if max(len(a), len(b)) > MAX_LENGTH:
        return False
    a, b = normalise(a), normalise(b)
    return a.lower() == b.lower() != "" or (is_small(a) and is_small(b) and same(a, b))


def same(a: str, b: str) -> bool:
    """Equality of two normalised answers."""
    if not a or not b or a.lower() == b.lower():
        return a != "" and b != ""
    is_relation = [len(split_outside(s, RELATIONS)) > 1 and len(split_items(s)[1]) == 1 for s in (a, b)]
    if all(is_relation):
        return same_relation(a, b)
    if any(is_relation):
        return same(unlabelled(a) if is_relation[0] else a, unlabelled(b) if is_relation[1] else b)
    (brackets_a, items_a), (brackets_b, items_b) = split_items(a), split_items(b)
    brackets = {brackets_a, brackets_b}
    if brackets != {""} or len(items_a) > 1 or len(items_b) > 1:
        if len(items_a) != len(items_b) or brackets not in ({brackets_a}, {"", "{}"}):
            return False
        any_order = "{}" in brackets or "∪" in a + b or all("=" in item for item in items_a + items_b)
        for item in items_a:
            for candidate in items_b if any_order else items_b[:1]:
                if same(item, candidate):
                    items_b.remove(candidate)
                    break
        return not items_b
    (a, unit_a), (b, unit_b) = split_unit(items_a[0]), split_unit(items_b[0])
    if unit_a and unit_b and unit_a != unit_b:
        return False                                                        # 5 m is not 5 cm; 5 may be either
    return a == b or same_value(a, b) or same_value(a.removesuffix("%"), b.removesuffix("%"))


def split_outside(text: str, separators: str) -> list[str]:
    """Parts of a text between the separators that are outside all brackets."""
    depth, marked = 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        marked += "\n" if depth == 0 and character in separators else character
    return marked.split("\n")                           # a normalised text has no line breaks of its own


def split_items(text: str) -> tuple[str, list[str]]:
    """("[)", ["1", "2"]) of "[1,2)"; ("", ["1", "2"]) of "1,2"; a single thing in () or {} is that thing."""
    if text.count("±") == 1 and "," not in text:
        text = f"{{{text.replace('±', '+')},{text.replace('±', '-')}}}"                 # ±4 is {+4,-4}
    if text[:1] not in ("(", "[", "{") or split_outside(text, ")]}")[1:] != [""]:      # no bracket around all
        return "", split_outside(text, ",;∪")
    items = split_outside(text[1:-1], ",;")
    return split_items(items[0]) if len(items) == 1 and text[0] != "[" else (text[0] + text[-1], items)


def unlabelled(text: str) -> str:
    """The "5" of "x=5", "5=x" or "x=10/2=5", the "7" of "3+4=7"; "" of "7=8" and of inequalities."""
    sides = split_outside(text, "=")
    if LABEL.fullmatch(sides[0]):
        del sides[0]
    elif len(sides) == 2 and LABEL.fullmatch(sides[1]):
        del sides[1]
    agree = sides and len(split_outside(text, "<>≤≥≠")) == 1 and all(same(side, sides[-1]) for side in sides)
    return sides[-1] if agree else ""


def same_relation(a: str, b: str) -> bool:
    """The same sides, or left - right in a fixed proportion to the other's."""
    sides_a, sides_b = split_outside(a, RELATIONS), split_outside(b, RELATIONS)
    signs_a, signs_b = re.findall(f"[{RELATIONS}]", a), re.findall(f"[{RELATIONS}]", b)
    if (signs_a[0] in ">≥") != (signs_b[0] in ">≥"):                        # 5 > x is x < 5
        sides_b, signs_b = sides_b[::-1], ["=><≥≤≠"[RELATIONS.index(sign)] for sign in signs_b[::-1]]
    identical = signs_a == signs_b and all(map(same, sides_a, sides_b))
    if identical or signs_a != signs_b or len(signs_a) > 1:
        return identical
    ratios = []
    for point in range(3):
        found = [value_of(f"({left})-({right})", point) for left, right in (sides_a, sides_b)]
        if None in found or not all(value and names for value, names in found):
            return False                                                    # no value, zero, or no variables
        ratios.append(found[0][0] / found[1][0])
    proportional = all(abs(ratio / ratios[0] - 1) < 1e-6 for ratio in ratios)
    return proportional and (signs_a[0] in "=≠" or ratios[0] > 0)


def same_value(a: str, b: str) -> bool:
    """Equal where both have a value: Fractions exactly, but a decimal may stand for a fraction without end
    (0.3333333 for 1/3); floats to 1e-6 of their size."""
    found = [(value_of(a, point), value_of(b, point)) for point in range(3)]
    pairs = [(left[0], right[0]) for left, right in found if left and right]
    for x, y in pairs:
        close = abs(x - y) <= 1e-6 * max(abs(x), abs(y)) or (0 in (x, y) and abs(x - y) < 1e-12)
        if x != y and isinstance(x, Fraction) and isinstance(y, Fraction):
            one_ends = (10 ** 200 % x.denominator == 0) != (10 ** 200 % y.denominator == 0)
            close = close and one_ends and 1 not in (x.denominator, y.denominator)
        if not close:
            return False
    return len(pairs) > 1 and re.search(r"[-+*/^|π0-9\\]", a + b) is not None    # letters alone: no is not on


# ---- The reward --------------------------------------------------------------------------------------------
def answers_match(prediction: str | None, gold: str, choices: list | None = None) -> bool:
    """Whether a prediction is right; "" and None never are. With choices both may be a letter or a text."""
    if not prediction or not gold:
        return False
    if not choices:
        return equal(prediction, gold)
    said, wanted = choose(prediction, choices, strict=True), choose(gold, choices, strict=True)
    texts = [str(choices[LETTERS.index(letter)]) if letter else gold for letter in (said, wanted)]
    same_text = texts[0].strip() == texts[1].strip() != ""                  # two options may have one
    return said is not None and (said == wanted or same_text)


def format_ok(text: str) -> bool:
    """Exactly <think>..</think>, white space, <answer>..</answer>: each tag once, neither empty."""
    single = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    match = single and re.fullmatch(r"(?s)<think>(.*)</think>\s*<answer>(.*)</answer>", text)   # linear
    return bool(match and match[1].strip() and match[2].strip())


def reward_parts(text: str, gold: str, choices=None, finished=True, format_weight: float = 0.1) -> dict:
    """The training reward: {"accuracy", "format" (0.0 or 1.0), "total"}. Strict: one answer block, after the
    thoughts, or no tag and one box. A completion that was cut off (not `finished`) earns nothing."""
    after_thoughts, answer = declared_answer(text)
    tags = text.count("<answer>"), text.count("</answer>")
    is_single = tags == (1, 1) or (tags == (0, 0) and after_thoughts.count("\\boxed{") == 1)
    accuracy = float(finished and is_single and answers_match(answer, gold, choices))
    form = float(finished and format_ok(text))
    total = (1 - format_weight) * accuracy + format_weight * form
    return {"accuracy": accuracy, "format": form, "total": total}
