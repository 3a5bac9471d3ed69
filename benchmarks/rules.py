"""When an answer to a benchmark question counts as right: three sets of rules, none with a judge model.

Place in the pipeline: `eval.py --bench` scores here what formats.py has loaded.

    strict     reward.py's matcher, with each benchmark's number format; the default
    vlmeval    VLMEvalKit's rule-based part (where it asks a judge model, only what comes before that)
    official   the rules of the benchmarks' own scripts

The figures of different rules, and so of different harnesses, can not be compared. In all three, what can not
be read is wrong and counted (`extracted` None): nothing is drawn at random and no nearest option is taken, as
some official scripts do. In vlmeval and official, the text behind </think> is read, or what the last <answer>
or \\boxed{} there holds, for those scripts know no tags. Sources: the scripts of VLMEvalKit, MathVista,
MathVerse, MATH-V, MMMU, MMMU-Pro and MMStar, as they were in 2024 to 2026; what they do is written anew.
Where VLMEvalKit takes "the answer is about 5" for option A, we do not.

Worked example: "... so it is (B)." with options red, blue. strict: B. vlmeval: the one letter among the last
four words, B. official MMStar, gold B: "(b" stands in the text, right.
"""
import re

from benchmarks.formats import LETTERS, Item
from answers.equal import number
from reward import answers_match, declared_answer, extract_answer

RULES = ("strict", "vlmeval", "official")
REFUSALS = ("I can't help with images of people", "can't process this file", "without the image provided",
            "Cannot determine the answer")
MISSING = {"None", "NA", "N/A", "null", "nan", "n/a", "NaN", "NULL", "<NA>"}    # cells that pandas loses


def grade(item: Item, text: str, rules: str = "strict") -> tuple[str | None, bool]:
    """(the answer found or None, whether it is right) of a completion."""
    by_rules = {"strict": strict, "vlmeval": vlmeval, "official": official}[rules]
    extracted, right = by_rules(item, text)
    return extracted or None, bool(extracted) and right


def said(text: str) -> str:
    """What a script without tags gets to read: the last tag's or box's content, else all behind </think>."""
    rest, declared = declared_answer(text)
    return (rest if declared is None else declared).strip()[-20000:]


def rounded(text: str, digits: int) -> float | None:
    """A number to so many decimals; None where it is none."""
    value = number(text)
    return None if value is None else round(float(value), digits)


# ------------------------------------------------------------------------------------------------------------
# strict


def strict(item: Item, text: str):
    """Our matcher. MathVista's floats are rounded to the precision asked for; MMMU's open answers and any of
    several golds may also agree to two decimals."""
    found = extract_answer(text, item.choices)
    if found is None or item.choices:
        return found, any(answers_match(found, g, item.choices) for g in item.golds)
    right = any(answers_match(found, g) for g in item.golds)
    if item.benchmark == "MathVista" and item.answer_type == "float" and item.precision:
        right = rounded(found, item.precision) == rounded(item.answer, item.precision) is not None
    if item.benchmark == "MMMU":
        right = right or any(rounded(found, 2) == rounded(g, 2) is not None for g in item.golds)
    return found, right


# ------------------------------------------------------------------------------------------------------------
# vlmeval


def infer_option(text: str, letters) -> str | None:
    """The one option letter that is a word of the text, if it first comes among the last four words."""
    if "Failed to obtain answer via API" in text or any(r in text for r in REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    present = [a for a in letters if a in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - 5:
        return present[0]
    phrase = re.search(r"(?i:answer is) \**([A-D])\b", text)
    return phrase[1] if phrase and phrase[1] in letters else None


def infer(text: str, options: dict) -> str | None:
    """A letter, or the one option whose text is in a text that is not much longer than all options."""
    if letter := infer_option(text, options):
        return letter
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    hits = [a for a, o in options.items() if o and o.lower() in text.lower()]
    return hits[0] if len(hits) == 1 else None


def lettered_line(text: str) -> str:
    """MMMU-Pro with chain of thought: what the last line beginning "Answer:" says; else the whole text."""
    lines = [s.strip() for s in text.splitlines() if s.strip().startswith("Answer:")]
    if not lines:
        return text
    tail = lines[-1].removeprefix("Answer:").strip()
    letters = set(re.findall(r"[A-Z]", tail))
    return letters.pop() if len(letters) == 1 else tail


def vlmeval(item: Item, text: str):
    text, gold = said(text), item.answer
    lost = MISSING | {""} if item.benchmark in ("MMMU", "MMMU-Pro", "MMStar") else set()
    options = {a: c for a, c in zip(LETTERS, item.choices or []) if c not in lost or not any(item.choices)}
    if item.benchmark == "MMMU" and not item.choices:               # an open row as a choice of two
        options = {"A": str(item.golds) if len(item.golds) > 1 else gold, "B": "Other Answers"}
        found = infer(text, options)
        return found, found == (gold if re.fullmatch("[A-Z]", gold) else "A")
    if item.benchmark == "MMMU-Pro" and item.prompt == "cot":
        text = lettered_line(text)
    if item.choices and item.benchmark != "MathVerse":
        found = infer(text, options)
        return found, found == gold
    found = extract_answer(text, item.choices)
    if found is None or item.benchmark == "MathVerse":
        return found, found is not None and found.strip() == gold.strip()
    if item.benchmark == "MathVision":
        return found, close_values(found, gold, 1e-6)
    kinds = {"integer": int, "float": float}                # MathVista; "14.0" is no integer, no rounding
    try:
        kind = kinds.get(item.answer_type)
        return found, kind is not None and kind(found) == kind(gold)
    except ValueError:
        return found, False


def close_values(a: str, b: str, tolerance: float) -> bool:
    """Equal texts but for case and outer spaces, or numbers less than the tolerance apart."""
    a, b = a.strip().lower(), b.strip().lower()
    x, y = number(a), number(b)
    return a == b or (x is not None and y is not None and abs(x - y) < tolerance)


# ------------------------------------------------------------------------------------------------------------
# official


def official(item: Item, text: str):
    by_benchmark = {"MathVista": official_mathvista, "MathVerse": official_mathverse, "MMMU": official_mmmu,
                    "MathVision": official_mathvision, "MMMU-Pro": official_mmmu_pro,
                    "MMStar": official_mmstar}
    return by_benchmark[item.benchmark](item, said(text))


def official_mathvista(item: Item, text: str):
    """Choices by text, after the first "(x)" or a bare letter; integers cut off, floats rounded, both then
    compared as texts. Left out: the nearest option by edit distance."""
    if item.choices:
        options = dict(zip(LETTERS, item.choices))
        letter = re.search(r"\(([a-zA-Z])\)", text) or re.fullmatch(r"\s*([A-Z])\s*", text)
        same = next((c for c in item.choices if c == text), None)
        found = options.get(letter[1].upper()) if letter else same
        return found, found == options.get(item.answer, item.answer)
    found = extract_answer(text)
    try:
        if item.answer_type == "integer":
            return found, str(int(float(found))) == item.answer
        if item.answer_type == "float":
            return found, str(round(float(found), item.precision)) == item.answer
        return found, found is not None and re.sub(r"\s*,\s*", ", ", found) == item.answer
    except (TypeError, ValueError, OverflowError):
        return found, False


def official_mathverse(item: Item, text: str):
    """Equal texts (its --quick_match; else a judge model decides)."""
    found = extract_answer(text, item.choices)
    return found, found is not None and found.strip() == item.answer.strip()


def official_mathvision(item: Item, text: str):
    """A letter at the end or on the first line, else the number behind the last "is", else what follows "the
    answer is"; right if equal to the gold or its option's text, as numbers to two decimals."""
    letters = LETTERS[:len(item.choices or [])]
    found = next((c for c in letters if re.search(rf"(?: {c}| \({c}\))\.$", text)
                  or text.startswith((f"{c}\n", f"({c})\n")) or text.strip("(). ") == c), None)
    if found is None:
        numbers = re.findall(r"is\s+(-?\d+(?:\.\d+)?)", text)
        phrase = re.split(r"(?i)the (?:final |correct )?answer (?:is|should be)[: ]*", text)[1:]
        found = numbers[-1] if numbers else phrase[-1] if phrase else text
        found = re.split(r"=|\\approx", found)[-1].strip(" .\n$").lower()
        found = re.sub(r"\\text\{([^{}]*)\}|\^\{?\\circ\}?|\b(?:km|m\^3|units?)\b", r"\1", found).strip()
        if len(found) > 200:
            return None, False
    golds = [item.answer]
    if item.choices and item.answer in letters:
        golds.append(item.choices[letters.index(item.answer)])
    right = any(same_to_two_decimals(found, g) for g in golds)
    return found, right


def same_to_two_decimals(a: str, b: str) -> bool:
    """Equal texts, or equal numbers when rounded, or tuples of such."""
    a, b = (s.strip().lower().removeprefix("(").removesuffix(")") for s in (a, b))
    x, y = a.split(","), b.split(",")
    if len(x) > 1 and len(x) == len(y):
        return all(same_to_two_decimals(s, t) for s, t in zip(x, y))
    return a == b != "" or rounded(a, 2) == rounded(b, 2) is not None


def official_mmmu(item: Item, text: str):
    """Choice: "(B)", else " B ", else an option's text in an answer of more than five words; of several the
    last. Open: a gold in one of the phrases behind "is", "thus", ..., or an equal number, to two decimals.
    Left out: a random option where nothing is found."""
    text = text.strip(" .,!?;:'")
    if item.choices:
        padded, letters = f" {text} ", LETTERS[:len(item.choices)]
        places = {a: padded.rfind(f"({a})") for a in letters if f"({a})" in padded}
        places = places or {a: padded.rfind(f" {a} ") for a in letters if f" {a} " in padded}
        if not places and len(text.split()) > 5:
            places = {a: padded.lower().rfind(c.lower()) for a, c in zip(letters, item.choices)
                      if c and c.lower() in padded.lower()}
        found = max(places, key=places.get) if places else None
        return found, found in item.golds
    lines = [s for s in re.split(r"\.\s|\n", text) if s.strip()][-50:]
    phrases = []
    for n, s in enumerate(lines):
        cues = "could be|so|is|thus|therefore|final|answer|result" + ("|=" if n == len(lines) - 1 else "")
        tails = re.split(rf"(?:\b|(?==))(?:{cues})(?:\b|(?<==))", s, flags=re.I)[1:]
        phrases += [min((t.strip(" ,.:*") for t in tails if t.strip(" ,.:*")), key=len, default="")]
    phrases = [p for p in phrases if p] or [text]
    numbers = {round(float(n.replace(",", "")), 2)
               for p in phrases for n in re.findall(r"-?\d{1,30}(?:,\d{3})*(?:\.\d{1,30})?", p)}
    right = False
    for gold in item.golds:
        value, words = rounded(gold, 2), gold.lower()
        forms = (f" {words}", f"{words} ") if len(words) == 1 else (words,)     # a single sign needs a space
        right |= (value in numbers if value is not None else
                  any(form in f" {p.lower()} " for p in phrases for form in forms))
    return phrases[-1][:200], right


def official_mmmu_pro(item: Item, text: str):
    """Behind the last "Answer:" the one letter in it; else the last "(X)", "X " (also at a word's end: "USA "
    is A), "X."; else an option's text. Left out: a random option."""
    letters = LETTERS[:len(item.choices)]
    if "Answer:" in text:
        within = {c for c in text.rpartition("Answer:")[2] if c in letters}
        if len(within) == 1:
            found = within.pop()
            return found, found == item.answer
    for form in ("({})", "{} ", "{}."):
        places = {a: f"{text} ".rfind(form.format(a)) for a in letters if form.format(a) in f"{text} "}
        if places:
            found = max(places, key=places.get)
            return found, found == item.answer
    hits = {a: text.lower().rfind(c.lower()) for a, c in zip(letters, item.choices) if c}
    found = max(hits, key=hits.get) if max(hits.values(), default=-1) >= 0 else None
    return found, found == item.answer


def official_mmstar(item: Item, text: str):
    """The gold letter first, or "(x", "option x", "the answer is x"; whatever else is said is not looked at,
    but for the count of what can not be read."""
    named, text, gold = infer_option(text, LETTERS[:len(item.choices)]), text.lower(), item.answer.lower()
    right = (text[:1] == gold or f"({gold}" in text or f"option {gold}" in text
             or f"the answer is {gold}" in text)
    return item.answer if right else named, right
