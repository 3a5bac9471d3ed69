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
import re
from itertools import accumulate

from answers.equal import MAX_LENGTH, MAX_TOKENS, equal, normalise, split_unit, value_of

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
    if len(line) <= MAX_TOKENS and (wordless or value_of(split_unit(normalise(line))[0], 0)):
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
    options = [normalise(c) for c in unlettered]

    def naming(s):                                      # two equal texts: the first, two equal values: none
        verbatim = [a for a, option in zip(letters, options) if s.lower() == option.lower() != ""]
        return verbatim[:1] or [a for a, option in zip(letters, options) if answers_match(s, option)]

    text = normalise(text) if len(text) <= MAX_LENGTH else ""
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
# Reward
def answers_match(prediction: str | None, gold: str, choices: list | None = None) -> bool:
    """True if two answers say the same: the same words in the same order, or the same value, tuple, set or
    relation. With choices either may be a letter or an option's text. Empty or None never matches."""
    if not prediction or not gold or max(len(prediction), len(gold)) > MAX_LENGTH:
        return False
    if choices:
        got, want = _choose(prediction, choices, strict=True), _choose(gold, choices, strict=True)
        text, right = (str(choices[ord(letter) - 65]) if letter else gold for letter in (got, want))
        return got is not None and (got == want or text.strip() == right.strip() != "")
    return equal(prediction, gold)


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
    text = text[:10 * MAX_STEP_TEXT]                        # megabytes of tags: no answer, but no time either
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
