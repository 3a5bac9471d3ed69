r"""The rule-based reward: find the answer in a completion, decide whether it is right, weigh in the format.

Place in the pipeline: after the rollout, before GRPO (train.py); eval.py scores with it. Functions of strings
only. The paper names an accuracy and a format part and no more: rules and weight are our choice, made against
tools in use (math_verify, mathruler, VLMEvalKit). Completions are hostile input: no eval, all sizes bounded.

Two readers, on purpose. `extract_answer`, for benchmarks, is kind: the last tag, else the last box, else what
follows the last "answer is", else the last formula or number. `reward_parts`, for training, is strict: one
<answer> block, or no tag and one box. So several answers, one only thought of or a copied question earn none.
`step_reward_parts` is another method's reward, to compare with: that of StepGRPO (R1-VL), which also pays for
steps: key steps found, and steps and answer complete and in order.

Worked example: "<think>6 / 12 is half.</think><answer>x = \frac12</answer>", gold "0.5". The label x = goes,
\frac12 is the fraction 1/2 and so is 0.5: accuracy 1, format 1, total 0.9 * 1 + 0.1 * 1 = 1.
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
# Extraction
CUE = re.compile(r"\banswer\b[*_ ]*(?:is\b|[:=：])[*_: ]*|####", re.I)
PLAIN_NUMBER = re.compile(r"(?<![\w.)^_{\\+*/-])(?<![-+*/^] )"                      # no part of "16 - 8\pi"
                          r"-?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?%?"
                          r"(?![\w%(^\\√+*/-]|\.\d|,\d{3}|\s[-+*/^\\√π])")


def extract_answer(text: str, choices: list | None = None) -> str | None:
    """The answer a completion gives, for benchmarks, or None. With choices a letter ("A") or None, no guess.
    Reads behind the last </think>; an open <think> or a malformed or empty tag or box is no answer."""
    text, declared = declared_answer(text)
    if declared is not None:
        return (_choose(declared, choices) if choices else declared) or None
    text = text[-4000:].strip()
    cue = (CUE.split(text)[1:] or [""])[-1].strip(" \n*").split("\n")[0]
    last_line = text[text.rfind("\n") + 1:]
    if choices:
        return next(filter(None, (_choose(t, choices) for t in (cue, last_line, text[-300:]))), None)
    line = (re.split(r"[.!?]\s", cue)[0] if cue else last_line).rstrip(" .")
    wordless = re.search(r"\w", line) and not re.search(r"(?<!\\)\b[A-Za-z]{2,}", line)
    if len(line) <= MAX_TOKENS and (wordless or _value(_split_unit(_normalise(line))[0], 0)):
        return line
    where = (line if cue else text).replace("**", "")
    formulas = list(re.finditer(r"\$[^$\n]+\$(?!\d)|\\\([^\n]{,99}?\\\)", where))
    if found := formulas or list(PLAIN_NUMBER.finditer(where)):
        leads = cue and found[0].start() == 0           # "7, since 3 + 4 = 7" but "the sum of 3 and 4 is 7"
        return found[0 if leads else -1][0].strip("$ ")
    return line if 0 < len(line) <= 100 else None


def declared_answer(text: str) -> tuple[str, str | None]:
    """The text behind the thoughts; what its last tag holds, else box: "" if malformed, None if absent."""
    close = text.rfind("</think>")
    text = "" if text.rfind("<think>") > close else text[close + 8:] if close >= 0 else text
    start, end = text.rfind("<answer>"), text.rfind("</answer>")
    if max(start, end) >= 0:
        nested = start > 0 and text.rfind("<answer>", 0, start) > text.rfind("</answer>", 0, start)
        if nested or not 0 <= start < end:
            return text, ""
        return text, text[start + 8:text.find("</answer>", start)].strip()
    start = text.rfind("\\boxed{") + 7
    body = text[start:start + MAX_LENGTH]               # \{ and \} do not count as braces
    depths = list(accumulate((c == "{") - (c == "}") for c in re.sub(r"(?s)\\.", "..", body)))
    return text, None if start < 7 else body[:depths.index(-1)].strip() if -1 in depths else ""


# ------------------------------------------------------------------------------------------------------------
# Multiple choice
OPENING = re.compile(r"(?:[Oo]ption|[Cc]hoice)? ?(?:\(([A-Z])\)|([A-Z])[).:]) ?(.+)", re.S)        # "B) 12"
MENTION = re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice) ?\(?|(?<![\w'-])(?<!\d )\(?)([A-Z])(?![\w'-])"
                     r"(?!(?<!ion A)(?<!ice A)(?<=[AI]) (?!is\b)[a-z])")    # no "5 A", "A frog", "I think"
REFUTED = re.compile(r"\(?\b[A-Z]\b\)?(?:,{1,2}\(?[A-Z]\b\)?){,11} ?(?:is|are)"     # "A is wrong."
                     r"(?: (?:also |clearly |ruled )?(?:wrong|incorrect|false|out)"
                     r"|(?:n't| not) (?:right|correct))\b[^.;,]*[.;,]?\s*")


def _choose(text: str, choices: list, strict: bool = False) -> str | None:
    """The letter that `text` names, or None: a letter alone; one option's text or value; a letter and its
    option's text. Unless strict, also the one letter in a sentence (no "A is wrong") or one option's text."""
    letters = [chr(65 + i) for i in range(min(len(choices), 26))]
    unlettered = [re.sub(rf"^\(?{a}[).:]\s+", "", str(c)[:MAX_LENGTH]) for a, c in zip(letters, choices)]
    options = [_normalise(c) for c in unlettered]

    def naming(s):                                      # two equal texts: the first, two equal values: none
        verbatim = [a for a, option in zip(letters, options) if s.lower() == option.lower() != ""]
        return verbatim[:1] or [a for a, option in zip(letters, options) if answers_match(s, option)]

    text = _normalise(text) if len(text) <= MAX_LENGTH else ""
    alone = re.fullmatch(r"(?:option|choice)? ?[(\[{]?([A-Z])[)\]}]?", text, re.I)
    named = [alone[1].upper()] if alone and alone[1].upper() in letters else naming(text)
    if len(named) == 1:
        return named[0]
    text = text if strict else REFUTED.sub("", text)
    opening = OPENING.match(text)
    if opening and (letter := opening[1] or opening[2]) in letters:
        named = naming(opening[3])
        listing = re.search(r"(?<!\w)(?:\([A-Z]\)|[A-Z][).:])", opening[3])
        return letter if letter in named or not (named or listing or strict) else None
    if strict:
        return None
    negated = re.search(r"\b(?:not|neither|never)\b|n't\b", text, re.I)
    clause = re.split(r"[.;] |,(?=[a-z])|\b(?:since|because|not|[Nn]either)\b", text)[0]
    for part in (clause,) if negated else (clause, text):
        if found := {m[1] for m in MENTION.finditer(part)} & set(letters):
            return found.pop() if len(found) == 1 else None
    hits = [i for i, o in enumerate(options) if (len(o) > 1 or o.isdigit())
            and re.search(rf"(?<![\w.^/-]){re.escape(o)}(?![\w^/]|[.,]\d)", text, re.I)]
    hits = [i for i in hits if not any(options[i] in options[j] for j in hits if j != i)]
    return letters[hits[0]] if len(hits) == 1 and not negated else None


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
def _normalise(text: str) -> str:
    """One spelling: plain symbols, no box, no "answer:", no decoration. Words keep their case and spaces."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    return text


def _split_unit(text: str) -> tuple[str, str]:
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
def _value(text: str, point: int):
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
    text = _normalise(text) if len(text) <= MAX_LENGTH else ""
    found = _value(text, 0) if _small(text) else None
    return found[0] if found and not found[1] else None


def _small(text: str) -> bool:
    """Whether a normalised text may be evaluated at all."""
    return len(TOKEN.findall(text)) <= MAX_TOKENS and sum(map(text.count, "([{")) <= MAX_BRACKETS


# ------------------------------------------------------------------------------------------------------------
# Equality
RELATIONS = "=<>≤≥≠"
LABEL = re.compile(r"(?:[^\W\d]|[∠△\\])[\w\s'(){}\\∠△,.]*|")


def answers_match(prediction: str | None, gold: str, choices: list | None = None) -> bool:
    """True if two answers say the same: the same words in the same order, or the same value, tuple, set or
    relation. With choices either may be a letter or an option's text. Empty or None never matches."""
    if not prediction or not gold or max(len(prediction), len(gold)) > MAX_LENGTH:
        return False
    if choices:
        got, want = _choose(prediction, choices, strict=True), _choose(gold, choices, strict=True)
        text, right = (str(choices[ord(letter) - 65]) if letter else gold for letter in (got, want))
        return got is not None and (got == want or text.strip() == right.strip() != "")
    a, b = _normalise(prediction), _normalise(gold)
    return a.lower() == b.lower() != "" or (_small(a) and _small(b) and _same(a, b))


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
    (a, unit_a), (b, unit_b) = _split_unit(items_a[0]), _split_unit(items_b[0])
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
    pairs = [[_value(f"({x})-({y})", point) for x, y in (sides_a[:2], sides_b[:2])] for point in range(3)]
    if len(signs_a) > 1 or not all(x and y and x[1] and x[0] != 0 != y[0] for x, y in pairs):
        return False
    ratios = [x[0] / y[0] for x, y in pairs]
    return all(abs(r / ratios[0] - 1) < 1e-6 for r in ratios) and (signs_a[0] in "=≠" or ratios[0] > 0)


def _same_value(a: str, b: str) -> bool:
    """Equal numbers, or equal at the sample points where both have a value. Fractions exactly, but a decimal
    may stand for a fraction without end (0.3333333 for 1/3); floats to 1e-6 of their size."""
    pairs = [(x[0], y[0]) for x, y in ((_value(a, point), _value(b, point)) for point in range(3)) if x and y]
    for x, y in pairs:
        close = abs(x - y) <= 1e-6 * max(abs(x), abs(y)) or (0 in (x, y) and abs(x - y) < 1e-12)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            ends = {10 ** 200 % v.denominator == 0 for v in (x, y)}
            close = x == y or (close and len(ends) == 2 and 1 not in (x.denominator, y.denominator))
        if not close:
            return False
    return len(pairs) > 1 and re.search(r"[-+*/^|π0-9\\]", a + b) is not None   # letters alone: no is not on


# ------------------------------------------------------------------------------------------------------------
# Reward
def format_ok(text: str) -> bool:
    """True if the text is just <think>..</think>, white space, <answer>..</answer>: each tag once, neither
    empty, no white space around. The counts come first: with single tags the pattern is linear."""
    single = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    m = re.fullmatch(r"(?s)<think>(.*)</think>\s*<answer>(.*)</answer>", text) if single else None
    return bool(m and m[1].strip() and m[2].strip())


def reward_parts(text: str, gold: str, choices=None, finished=True, format_weight: float = 0.1) -> dict:
    """The training reward: accuracy and format (each 0.0 or 1.0) and total = (1 - w) accuracy + w format.
    Stricter than `extract_answer`: one answer block in the whole completion, behind the thoughts, or no tag
    and a box; several boxes in a block match nothing. A completion cut off (not `finished`) earns nothing."""
    opened, closed, (tail, declared) = text.count("<answer>"), text.count("</answer>"), declared_answer(text)
    single = opened == closed == 1 or (opened == closed == 0 and tail.count("\\boxed{") == 1)
    right = finished and single and answers_match(declared, gold, choices)
    parts = {"accuracy": float(right), "format": float(finished and format_ok(text))}
    return {**parts, "total": (1 - format_weight) * parts["accuracy"] + format_weight * parts["format"]}


# ------------------------------------------------------------------------------------------------------------
# StepGRPO: the step rewards of R1-VL (arXiv 2503.12937). Paper and released code differ; noted where they do.
# The rest of its objective is in the trainer's options: there A = (R - mean) / (std + 1e-4), KL weight 0.04.
MAX_STEP_TEXT, MAX_GROUPS, MAX_ALTERNATES, MAX_PHRASE = 20000, 200, 10, 200
SECTION = re.compile(r"(?m)^### (Image Description|Rationales|Step \d+|The final answer is):")
NUMBERED = re.compile(r"(?im)^[ \t]*(?:###[ \t]*)?step[ \t]+(\d+)[ \t]*:")
WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")      # 3.5 is one word, so 5 is not found in it


def _chain(text: str) -> tuple[str, str, bool]:
    """The steps; the text whose answer counts; whether both are complete and in order. Without <think> the
    form is R1-VL's: ### Image Description:, ### Rationales:, ### Step 1: and on, ### The final answer is:"""
    sections = [] if "<think>" in text else SECTION.split(text)[1:]
    if not sections:
        steps, closed, _ = text.partition("<think>")[2].partition("</think>")
        numbers = NUMBERED.findall(steps)
        valid = format_ok(text.strip()) and numbers == [str(k + 1) for k in range(len(numbers))]
        return steps if closed else "", text, valid
    names, bodies = sections[::2], [body.strip() for body in sections[1::2]]
    steps = [body for name, body in zip(names, bodies) if name.startswith("Step")]
    final = "\n".join(body for name, body in zip(names, bodies) if name == "The final answer is")
    tagged = text if "<answer>" in text else f"<answer>{final}</answer>"        # for reward_parts
    order = ["Image Description", "Rationales"] + [f"Step {k + 1}" for k in range(len(steps))]
    return "\n".join(steps), tagged, bool(steps) and names == [*order, "The final answer is"] and all(bodies)


def _words(text: str) -> str:
    """Lower-cased words and signs, a space before and behind each: whole words are then plain substrings."""
    return f" {' '.join(WORD.findall(text[:MAX_STEP_TEXT].lower()))} "


def step_rar(text: str, key_steps: list | None) -> float:
    """StepRAR: the share of key steps (a string, or a list of equivalent ones) that the steps contain, each
    counted once; 0.0 without any. Whole words are our choice: the code finds "5" in "15". Order is free."""
    groups = key_steps[:MAX_GROUPS] if isinstance(key_steps, list) else []
    groups = [g[:MAX_ALTERNATES] if isinstance(g, list) else [g] for g in groups]
    groups = {tuple(_words(a) for a in g if a.strip() and len(a) <= MAX_PHRASE)
              for g in groups if all(isinstance(a, str) for a in g)} - {()}
    steps = _words(_chain(text)[0])
    return sum(any(a in steps for a in g) for g in groups) / len(groups) if groups else 0.0


def step_rvr(text: str) -> float:
    """StepRVR: 1.0 if steps and answer are complete and in order, numbered ones 1..n, else 0.0. Background
    before steps is in the paper, not in the code; that no part is empty is our choice."""
    return float(_chain(text)[2])


def step_reward_parts(text: str, gold: str, choices=None, finished=True, key_steps=None,
                      alpha: float = 0.1) -> dict:
    """R1-VL's reward, total = accuracy + alpha rar + rvr; without an answer no alpha rar (the paper: the code
    pays it always). Accuracy and format (only logged) as `reward_parts`, so cut off earns nothing."""
    tagged = _chain(text)[1]
    parts = reward_parts(tagged, gold, choices, finished)
    rar, rvr = (step_rar(text, key_steps), step_rvr(text)) if finished else (0.0, 0.0)
    total = parts["accuracy"] + (alpha * rar if declared_answer(tagged)[1] else 0.0) + rvr
    return {**parts, "rar": rar, "rvr": rvr, "total": total}
