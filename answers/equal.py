"""Whether two short answers have the same value: LaTeX and plain notation brought to one form, evaluated by a
small parser of our own, compared exactly or at sample points.

Place in the pipeline: under reward.py, which finds the answers and decides what they earn; pure functions of
strings. Answers are hostile input: no `eval`, no sympy, and bounds on length, tokens, brackets and digits.
Ours, made against tools in use (math_verify, mathruler, VLMEvalKit).

Worked example: "x = \frac12" against "0.5": the label x = goes, \frac12 is the fraction 1/2 and so is 0.5.
"""
import math
import operator
import re
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from random import Random
from unicodedata import normalize

MAX_LENGTH, MAX_TOKENS, MAX_BRACKETS, MAX_DIGITS = 2000, 300, 80, 60
# of an answer: a longer one never matches; with more tokens, brackets or digits only verbatim

# ------------------------------------------------------------------------------------------------------------
# Normalisation
LATEX = dict(p.split(":") for p in r"""pi:π times:* cdot:* div:/ dfrac:\frac tfrac:\frac cfrac:\frac circ:°
    degree:° pm:± le:≤ leq:≤ leqslant:≤ ge:≥ geq:≥ geqslant:≥ ne:≠ neq:≠ lt:< gt:> approx:= in:= infty:∞ cup:∪
    angle:∠ triangle:△ theta:θ alpha:α beta:β left: right: displaystyle: lvert:| rvert:| vert:|""".split())
UNITS = {alias: names.split()[0] for names in """mm millimeter|cm centimeter|m meter|km kilometer|mi mile
    |in inch inche|ft foot feet|yd yard|g gram|kg kilogram|mg milligram|lb pound|oz ounce|s sec second
    |min minute|h hr hour|day|week|month|year|L l liter|ml milliliter|N newton|J joule|W watt|V volt|pa pascal
    |hz hertz|mol|dollar usd|cent|unit|degc|degf|rad radian|mph|ohm|people person|student|item|time"""
    .split("|") for alias in names.split()}
UNIT = re.compile(r"(.*[0-9)}π])(?: |(?<=\})|(?=[A-Za-z]{2}))([A-Za-z/^23]+)")      # 5m is a product
WORDS = r"(?:[A-Za-z\s$.,:;=*~]|\\[()\[\]]|\\(?:text|mathrm)\{[A-Za-z\s~]*\})*"
REWRITES = [(re.compile(pattern), new) for pattern, new in (            # the order matters
    (rf"(?s)^{WORDS}\\boxed\{{(.*)\}}{WORDS}$", r"\1"),                 # "The area is \boxed{5} cm." is 5
    ("[¼-¾⅐-⅞]", r" \g<0>"),                                            # 1½ is 1 1/2, not 11/2
    ("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}"), ("[₀-₉]+", r"_\g<0>"), ("º", "°"),  # x² is x^2; NFKC makes º an o
    (r"(?<=\d)([\u202f\u2009]|\\[,!]|\{,\})(?=\d{3}(?!\d))", ""),       # 1{,}234 and 1\,234 are 1234
    ("(?s).+", lambda m: normalize("NFKC", m[0])[:2000]),               # full-width letters, ½ as 1⁄2
    (r"(?<=\d)\\(?=text|math)", r" \\"),                                # 8\text{cm} is 8 cm
    (r"\\(?:text\w*|math[a-z]+|mbox|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[()\[\],;:!\\ ]|~", " "),                                      # LaTeX spaces; \( \) around formulas
    (r"\\([A-Za-z]+)", lambda m: LATEX.get(m[1], m[0])), (r"\\([{}%$&#_|])", r"\1"),    # \pi is π, \% is %
    ("[$€£]", ""), ("[−–—‐‑]", "-"), ("[×·⋅∗]", "*"), ("[÷⁄∕]", "/"), ("[“”]", '"'), (r"√|\\sqrt", "sqrt "),
    ("<=|⩽", "≤"), (">=|⩾", "≥"), ("!=", "≠"), ("[≈∈]", "="),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"), (r"\*\*", ""),                # 3**2 is a power, **blue** is bold
    (r"(?<=\d)\s*\{([A-Za-z]+)\}", r" \1"),                             # 69{degrees}
    (r"(?<=[\d}] )sq(?:uare|\.)? (\w+)", r"\1^2"), (r"(?<=[\d}] )cubic (\w+)", r"\1^3"),        # 8 square cm
    (r"\^ ?\{?°\}?|(?<=\d)\s*deg(?:ree)?s?\b", "°"),                    # 70^\circ and 70 degrees are 70°
    (r"(?<=\d)\s*percent\b", "%"), (r"° ?([CF])\b", r" deg\1"),         # °C is a unit
    (r"(sin|cos|tan)((?:\^\{?\d\}?)?) ?\(?(\d+)°\)?", r"\1\2(\3*π/180)"), ("°", ""),    # sin 90° is 1; 90° 90
    (r"(?<=\d)\s*[xX]\s*(?=10\^)", "*"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),  # 6 x 10^23; \frac12
    (r"(?<![\w.^)}/])(\d{1,9})(?: +| *\\frac\{)(\d{1,9})(?:/|\}\{)(\d{1,9})(?![\d.])\}?",
     lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0]),   # 1 1/2; but 2\frac{3}{2} is 3
    (r"_\{(\w+)\}(?=\d)", r"_\1 "), (r"([\^_])\{(-?\w+)\}", r"\1\2"),   # \log_{2}8 is \log_2 8, x^{2} is x^2
    (r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)",                          # 1,234; but (1,234) is a pair
     lambda m: m[0] if re.search(r"[(\[{]", m.string[:m.start()]) else m[0].replace(",", "")),
    (r"^[\s*`]+|[\s*`.,;:]+$", ""), (r"^([\"'])(.*)\1$", r"\2"),        # *blue*, blue. and "blue" are blue
    (r"(?<=[A-Za-z]{2})[!?]+$", ""),                                    # so is blue!, but 5! is not 5
    (r"(?i)^(?:(?:so|thus|therefore),? )?(?:the |my )?(?:final |correct )?answer\s*(?:is\b|[:=])[\s:]*", ""),
    (r"\s+(?:and|or)\s+", ","), (r"\s+", " "),                          # 1 and 2 is 1,2
    (r" ?([-+*/^=<>≤≥≠±(),;:{}\[\]|∪]) ?", r"\1"), (r"^[+ ]| $", ""))]


@lru_cache(4096)
def normalise(text: str) -> str:
    """One spelling: plain symbols, no box, no "answer:", no decoration. Words keep their case and spaces."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text


def split_unit(text: str) -> tuple[str, str]:
    """("5", "m/s2") of "5 metres/second^2"; the unit is "" where there is none that we know."""
    m = UNIT.fullmatch(text)
    words = re.findall("[A-Za-z]+", m[2].replace("metre", "meter").replace("litre", "liter")) if m else []
    words = [w if len(w) == 1 else w.lower() for w in words]                       # N is a unit, n a variable
    names = [UNITS.get(w) or UNITS.get(w.removesuffix("s")) for w in words]
    return (m[1], "/".join(names) + "".join(re.findall("[23]", m[2]))) if names and all(names) else (text, "")


# ------------------------------------------------------------------------------------------------------------
# Evaluation
def _power(base, exponent):
    """base ^ exponent, exact for small whole exponents; ValueError where it is complex."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) <= 64 and max(map(int.bit_length, base.as_integer_ratio())) <= 256:
            return base ** int(exponent)
    return math.pow(base, exponent)


TOKEN = re.compile(r"((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z.]))?)"
                   r"|\\?([A-Za-z]+|[^\W\d_])(_[0-9]+|_[A-Za-z]+)?|\S")
CONSTANTS, CLOSING = {"pi": math.pi, "π": math.pi, "e": math.e}, {"(": ")", "{": "}", "[": "]", "|": "|"}
FUNCTIONS = {"sqrt": math.sqrt, "sin": math.sin, "cos": math.cos, "tan": math.tan, "ln": math.log,
             "log": math.log10, "exp": math.exp, "abs": abs, "arcsin": math.asin, "arccos": math.acos,
             "arctan": math.atan}
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul),
             "/": (2, operator.truediv), "^": (4, _power), "%": (5, operator.truediv)}


class Evaluator:
    """Recursive descent by binding strength. Numbers are Fractions until a function or constant makes floats;
    a variable's value is fixed by its name and `point`. Raises if there is no expression or no real value."""

    def __init__(self, text: str, point: int):
        self.point, self.names, self.tokens = point, set(), []
        for m in TOKEN.finditer(text):
            name = m[2] or ""
            if len(name) < 2 or name in FUNCTIONS or name in CONSTANTS or m[0][0] == "\\":
                self.tokens.append(m[0].lstrip("\\"))
            elif len(name) > 3 or " " in text[max(m.start() - 1, 0):m.start()] + text[m.end():m.end() + 1]:
                raise ValueError("a word")
            else:                                       # xy is x * y, but "red" in "4 red" is no product
                self.tokens += [*name[:-1], name[-1] + (m[3] or "")]
        self.tokens = [""] + self.tokens[::-1]          # a stack; "" is the end

    def expression(self, floor: int = 0):
        """Operands joined by operators that bind more tightly than `floor`."""
        value = self.operand()
        while token := self.tokens[-1]:
            implicit = token[0].isalpha() or token in "({"        # a number never follows: "x2", "red 4"
            binding, apply = OPERATORS["*"] if implicit else OPERATORS.get(token, (0, None))
            if binding <= floor:
                break
            token = token if implicit else self.tokens.pop()      # below, 2^3^2 is 2^(3^2)
            value = apply(value, Fraction(100) if token == "%" else self.expression(binding - (token == "^")))
        return value

    def operand(self):
        token = self.tokens.pop()
        name, _, index = token.partition("_")
        if token in CLOSING:
            value = self.expression()
            if self.tokens.pop() != CLOSING[token]:
                raise ValueError("not closed")
            return abs(value) if token == "|" else value
        if token in ("+", "-"):
            return self.expression(2) * (-1 if token == "-" else 1)
        if token[:1] in tuple("0123456789."):
            return Fraction(token if len(token) <= MAX_DIGITS else "too long")
        if token == "frac":
            return self.operand() / self.operand()
        if not token[:1].isalpha():
            raise ValueError("no operand")
        if token in CONSTANTS:
            return CONSTANTS[token]
        if name not in FUNCTIONS:
            self.names.add(token)
            return Fraction(Random(f"{token}{self.point}").randrange(102, 999), 101) * (-1) ** self.point
        root = self.operand() if name == "sqrt" and self.tokens[-1] == "[" else 2   # sqrt[3]{x}
        powered = name != "sqrt" and self.tokens[-1] == "^" and self.tokens[-2].isdigit()   # sin^2 x
        power = self.operand() if powered and self.tokens.pop() else 1
        value = self.operand() if name == "sqrt" else self.argument()
        if root != 2:
            return -_power(-value, 1 / root) if value < 0 and root % 2 == 1 else _power(value, 1 / root)
        value = math.log(value, Fraction(index)) if index else FUNCTIONS[name](value)   # log_2 x
        return value if power == 1 else _power(value, power)

    def argument(self):
        """A bracket, else the implicit product that follows: sin 2x, sin 2(x+1), but sin x in sin x cos x."""
        if self.tokens[-1] in CLOSING:
            return self.operand()
        number = self.tokens[-1][:1].isdigit()                    # sin x(y+1) is sin(x) * (y+1)
        value = self.expression(2)
        while (token := self.tokens[-1]) and (token[0].isalpha() or (number and token in "({")):
            if token.partition("_")[0] in FUNCTIONS:
                break
            value, number = value * self.expression(2), False
        return value


@lru_cache(4096)
def value_of(text: str, point: int):
    """(value, names of its variables) of a normalised expression at a sample point, or None."""
    try:
        evaluator = Evaluator(text, point)
        value = evaluator.expression()
        bounded = value == 0 or 1e-150 < abs(value) < 1e150      # so that no quotient of two values overflows
        return (value, evaluator.names) if bounded and evaluator.tokens == [""] else None
    except (ValueError, ArithmeticError, IndexError, RecursionError):      # IndexError: an open bracket
        return None


def number(text: str) -> Fraction | float | None:
    r"""The value of an answer without variables ("\frac{3}{4}" is 3/4), or None."""
    text = normalise(text) if len(text) <= MAX_LENGTH else ""
    found = value_of(text, 0) if small(text) else None
    return found[0] if found and not found[1] else None


def small(text: str) -> bool:
    """Whether a normalised text may be evaluated at all."""
    return len(TOKEN.findall(text)) <= MAX_TOKENS and sum(map(text.count, "([{")) <= MAX_BRACKETS


# ------------------------------------------------------------------------------------------------------------
# Equality
RELATIONS = "=<>≤≥≠"
LABEL = re.compile(r"(?:[^\W\d]|[∠△\\])[\w\s'(){}\\∠△,.]*|")


def _split(text: str, separators: str) -> list[str]:
    """Parts of a text between the separators that stand outside all brackets."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    cuts = [i for i, (c, depth) in enumerate(zip(text, depths)) if depth == 0 and c in separators]
    return [text[i + 1:j] for i, j in zip([-1] + cuts, cuts + [len(text)])]


def _items(text: str) -> tuple[str, list[str]]:
    """("[)", ["1", "2"]) of "[1,2)"; ("", ["1", "2"]) of "1,2"; a single thing in () or {} is that thing."""
    if text[:1] not in tuple("([{") or _split(text, ")]}")[1:] != [""]:      # no bracket around it all
        return "", _split(text, ",;∪")
    items = _split(text[1:-1], ",;")
    return _items(items[0]) if len(items) == 1 and text[0] != "[" else (text[0] + text[-1], items)


def _same(a: str, b: str) -> bool:
    """Equality of two normalised answers."""
    if a.lower() == b.lower() or not a or not b:
        return a != "" and b != ""
    a, b = (f"{{{s.replace('±', '+')},{s.replace('±', '-')}}}" if s.count("±") == 1 and "," not in s else s
            for s in (a, b))
    (kind_a, items_a), (kind_b, items_b) = _items(a), _items(b)
    related = [len(_split(s, RELATIONS)) > 1 and len(_split(s, ",;∪")) == 1 for s in (a, b)]
    if all(related):
        return _same_relation(a, b)
    if any(related):
        return _same(*(_unlabelled(s) if is_relation else s for s, is_relation in zip((a, b), related)))
    if kind_a or kind_b or len(items_a) > 1 or len(items_b) > 1:
        labelled = all("=" in s for s in items_a + items_b)             # x=1, y=2
        ordered = "{}" not in (kind_a, kind_b) and "∪" not in a + b and not labelled
        for item in items_a if len(items_a) == len(items_b) else []:
            hits = [i for i, other in enumerate(items_b[:1] if ordered else items_b) if _same(item, other)]
            items_b = items_b[:hits[0]] + items_b[hits[0] + 1:] if hits else items_b
        return not items_b and (kind_a == kind_b or {kind_a, kind_b} == {"", "{}"})
    (a, unit_a), (b, unit_b) = split_unit(items_a[0]), split_unit(items_b[0])
    if unit_a and unit_b and unit_a != unit_b:          # 5 m is not 5 cm; 5 may be either
        return False
    return a == b or _same_value(a, b) or _same_value(a.removesuffix("%"), b.removesuffix("%"))   # 25%, 25


def _unlabelled(text: str) -> str:
    """The "5" of "x=5", "5=x" or "x=10/2=5", the "7" of "3+4=7"; "" of "7=8" and of inequalities."""
    sides = _split(text, "=")
    if LABEL.fullmatch(sides[0]):
        del sides[0]
    elif len(sides) == 2 and LABEL.fullmatch(sides[1]):
        del sides[1]
    agree = sides and len(_split(text, "<>≤≥≠")) == 1 and all(_same(side, sides[-1]) for side in sides)
    return sides[-1] if agree else ""


def _same_relation(a: str, b: str) -> bool:
    """The same sides, or left - right in a fixed proportion to the other's."""
    sides_a, sides_b = _split(a, RELATIONS), _split(b, RELATIONS)
    signs_a, signs_b = (re.findall(f"[{RELATIONS}]", s) for s in (a, b))
    if signs_a and signs_b and (signs_a[0] in ">≥") != (signs_b[0] in ">≥"):                # 5 > x is x < 5
        sides_b, signs_b = sides_b[::-1], ["=><≥≤≠"[RELATIONS.index(sign)] for sign in signs_b[::-1]]
    if signs_a != signs_b or all(map(_same, sides_a, sides_b)):
        return signs_a == signs_b
    pairs = [[value_of(f"({x})-({y})", point) for x, y in (sides_a[:2], sides_b[:2])] for point in range(3)]
    if len(signs_a) > 1 or not all(x and y and x[1] and x[0] != 0 != y[0] for x, y in pairs):
        return False
    ratios = [x[0] / y[0] for x, y in pairs]
    return all(abs(r / ratios[0] - 1) < 1e-6 for r in ratios) and (signs_a[0] in "=≠" or ratios[0] > 0)


def _same_value(a: str, b: str) -> bool:
    """Equal numbers, or equal at the sample points where both have a value. Fractions exactly, but a decimal
    may stand for a fraction without end (0.3333333 for 1/3); floats to 1e-6 of their size."""
    found = [(value_of(a, point), value_of(b, point)) for point in range(3)]
    pairs = [(x[0], y[0]) for x, y in found if x and y]
    for x, y in pairs:
        close = abs(x - y) <= 1e-6 * max(abs(x), abs(y)) or (0 in (x, y) and abs(x - y) < 1e-12)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            ends = {10 ** 200 % v.denominator == 0 for v in (x, y)}
            close = x == y or (close and len(ends) == 2 and 1 not in (x.denominator, y.denominator))
        if not close:
            return False
    return len(pairs) > 1 and re.search(r"[-+*/^|π0-9\\]", a + b) is not None   # letters alone: no is not on


def equal(a: str, b: str) -> bool:
    """Equality of two answers as they were written."""
    a, b = normalise(a), normalise(b)
    return a.lower() == b.lower() != "" or (small(a) and small(b) and _same(a, b))
