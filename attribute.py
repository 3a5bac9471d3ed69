"""Where a failed rollout lost the image: screening, steps, two signals, and the verifier that applies them.

Takes: rollouts with their rewards, and the policy. Gives: `steps` and `checks` on each trajectory; the first
suspect step is where rereason.py looks at the image again.

The paper says: a reward-driven screening finds flawed rollouts, and a step-level attribution inside the
multimodal context finds where the reasoning lost the image. How is our choice:

    A1 pristine check   P(the policy, shown the image and this step alone, repeats it): its least likely token
    A2 answer margin    log p(gold) - log p(own answer) after each step: where the chain turns wrong

Both are forward passes only; A1 counts as one generated token a check all the same. The gold answer only
scores (A2); it never enters a prompt that is generated from. Left out: visual dependence (A3), Monte-Carlo
restarts (A4), random and oracle localisers, all in experiments/localisers.py.

Worked example: a chain of four steps whose checks are 0.98, 0.95, 0.02, 0.90. The first below 0.5 is the
third.
"""
import bisect
import math
import re
from dataclasses import dataclass, replace

import torch

import reward
import rollout

CHECK = "\nCheck this step against the image: repeat it if it is right, correct it if not.\n"
SUSPECT_BELOW = 0.5                     # a step repeated with less than this probability is suspect
PLACEHOLDER = "\u241e"                  # stands for the step while the chat template is rendered


# ---- Screening and steps

@dataclass
class Step:
    """One step of a completion: tokens [start, stop), its line break included, and its text without it."""
    start: int
    stop: int
    text: str


HEADER = re.compile(r"^[ \t]*(?:#{1,4} |\*\*)?Step \d{1,3}\b", re.M | re.I)
DISPLAY = re.compile(r"\$\$|(?<!\\)\\[\[\]]")       # $$, \[ and \], but not the \\[4pt] of a table


def text_and_offsets(ids: list, codec) -> tuple[str, list[int]]:
    """The text of some tokens, and where in it each token begins."""
    text, offsets, run = "", [], []
    for i in ids:                                           # a character takes up to four tokens
        offsets.append(len(text))
        run.append(i)
        piece = codec.tokenizer.decode(run)
        if len(run) == 4 or not piece.endswith("\ufffd"):
            text, run = text + piece, []
    return text + codec.tokenizer.decode(run), offsets


def step_starts(thoughts: str) -> list[int]:
    """Where steps begin: at "Step 1" headers if there are any, else at each line with text (a display
    formula is one line)."""
    starts = [m.start() for m in HEADER.finditer(thoughts)]
    if starts:
        return starts
    in_formula = False
    for line in re.finditer(r"[^\n]*\n?", thoughts):
        if not in_formula and line[0].strip():
            starts.append(line.start())
        if len(DISPLAY.findall(line[0])) % 2 == 1:
            in_formula = not in_formula
    return starts


def split_steps(ids: list, codec) -> list[Step]:
    """Steps of a completion at token boundaries, between <think> and </think> (or from the start to the
    answer). A token belongs to the step of its first character. Our choice: R1-VL's headers and
    one-step-a-line chains."""
    if ids and ids[-1] in codec.eos_ids:
        ids = ids[:-1]
    text, offsets = text_and_offsets(ids, codec)
    begin = text.find("<think>") + len("<think>") if "<think>" in text else 0
    end = len(text)
    for tag in ("</think>", "<answer>", "### The final answer"):
        if begin <= text.find(tag, begin) < end:
            end = text.find(tag, begin)
    starts = step_starts(text[begin:end])
    steps, token = [], 0
    for a, b in zip(starts, starts[1:] + [end - begin]):
        start = token = bisect.bisect_left(offsets, begin + a, token, len(ids))
        token = bisect.bisect_left(offsets, begin + b, token, len(ids))
        if token > start:
            steps.append(Step(start, token, text[begin + a:begin + b].strip()))
    return steps


def locatable_failures(group: list) -> list:
    """Screening: the rollouts whose failure can be located: wrong, ended by themselves, readable, two steps
    or more."""
    found = []
    for t in group:
        wrong = t.rewards["accuracy"] == 0 and t.finished
        if wrong and len(t.steps) >= 2 and reward.extract_answer(t.text, t.problem.choices):
            found.append(t)
    return found


def is_right(t) -> bool:
    """The verifier of restarts and repairs: the training reward's own accuracy."""
    p = t.problem
    return reward.reward_parts(t.text, p.answer, p.choices, t.finished)["accuracy"] == 1


# ---- A1

@dataclass
class Check:
    """What A1 says of a step: the probability of its least likely token (of one token, so a long step is no
    more suspect than a short one), and which token of the step that is (None: unknown)."""
    prob: float
    token: int | None = None

    @property
    def is_suspect(self) -> bool:
        return self.prob < SUSPECT_BELOW


def first_suspect(checks: list) -> int | None:
    """The first suspect step (0-based); None without one. A check may be None: unknown."""
    for k, check in enumerate(checks):
        if check is not None and check.is_suspect:
            return k
    return None


def fault_is_known(checks: list) -> bool:
    """Whether no unknown check stands before the first suspect step."""
    return None not in checks[:first_suspect(checks)]


def faulty_tokens(step: Step, check: Check | None) -> tuple[int, int]:
    """The tokens (start, stop) to blame for a step that is suspect or unknown: the one the policy would have
    written otherwise (the rest of the step follows from it), or all where none is known."""
    if check is None or check.token is None:
        return step.start, step.stop
    token = min(step.start + check.token, step.stop - 1)
    return token, token + 1


def align_check(check: Check, step: Step, ids: list, codec) -> Check:
    """A check counts its token in the step tokenised alone; find the token of the same character in `ids`,
    where white space may stand before it and the text may fall into other tokens."""
    if check.token is None or not check.is_suspect:
        return check
    alone = rollout.token_ids(rollout.escape_special(step.text, codec), codec)
    in_place = ids[step.start:step.stop]
    if in_place[:len(alone)] == alone:                      # tokenised alike
        return check
    _, offsets_alone = text_and_offsets(alone, codec)
    text, offsets = text_and_offsets(in_place, codec)
    leading_space = len(text) - len(text.lstrip())
    character = leading_space + offsets_alone[check.token]
    return Check(check.prob, bisect.bisect_right(offsets, character) - 1)


@torch.no_grad()
def check_steps(model, codec, claims: list[tuple], budget: int = 16384) -> list[Check]:
    """A1. claims: (problem, its prompt, step text). How likely the policy, shown only the image, the
    question and this step, repeats it. The steps of a problem share one computed prompt; at most `budget`
    tokens of steps go through the model together."""
    steps = [rollout.token_ids(rollout.escape_special(text, codec), codec) for _, _, text in claims]
    order = sorted(range(len(claims)), key=lambda i: (claims[i][0].id, len(steps[i])))
    checks, contexts = [None] * len(claims), {}
    for batch in rollout.token_batches([2 * len(steps[i]) for i in order], budget):
        prompts, rows, starts = [], [], []                  # a row: step, end of the turn, the step repeated
        for n in batch:
            problem, prompt, text = claims[order[n]]
            if problem.id not in contexts:
                contexts[problem.id] = check_context(problem, prompt, codec)
            head, end_of_turn = contexts[problem.id]
            shown = rollout.token_ids(rollout.escape_special(text, codec) + end_of_turn, codec)
            prompts.append(head)
            rows.append(shown + steps[order[n]])
            starts.append(len(shown))
        logps, _, _ = rollout.completion_logps(model, codec, prompts, rows)
        for n, start, row in zip(batch, starts, logps.tolist()):
            step_logps = row[start:start + len(steps[order[n]])]
            lowest = min(step_logps)
            checks[order[n]] = Check(math.exp(max(-50.0, lowest)), step_logps.index(lowest))
    return checks


def check_context(problem, prompt, codec) -> tuple:
    """The chat that asks for a check, split where the step goes: its first half as a prompt, its second as
    text."""
    question = replace(problem, question=problem.question + CHECK + PLACEHOLDER)
    head, _, end_of_turn = rollout.render_chat(question, codec).rpartition(PLACEHOLDER)
    return rollout.with_images_of(prompt, problem, codec, head), end_of_turn


class Verifier:
    """Fills in the `checks` of trajectories that have steps: A1, each distinct step of a problem asked once
    in this object's life. For a signal of your own override `check` or `__call__`. tokens: generated so
    far."""

    def __init__(self, model, codec):
        self.model, self.codec, self.known, self.tokens = model, codec, {}, 0

    def check(self, claims: list[tuple]) -> list[Check]:
        """claims: (problem, its prompt, step text) -> one Check each."""
        self.tokens += len(claims)
        return check_steps(self.model, self.codec, claims)

    def __call__(self, trajectories: list):
        claims, undecided = {}, []
        for t in trajectories:
            if t.steps and not (t.checks and fault_is_known(t.checks)):
                undecided.append(t)
        for t in undecided:
            for step in t.steps:
                if (t.problem.id, step.text) not in self.known:
                    claims[t.problem.id, step.text] = (t.problem, t.prompt, step.text)
        self.known.update(zip(claims, self.check(list(claims.values()))))
        for t in undecided:
            found = [self.known[t.problem.id, step.text] for step in t.steps]
            t.checks = [align_check(c, step, t.ids, self.codec) for c, step in zip(found, t.steps)]


def attribute(groups, hard: list[int], verifier: Verifier, codec, credit: str):
    """Split every rollout into steps; check those of locatable failures, where their group is to be
    rectified (`hard`) or has a gradient to place."""
    failures = []
    for n, group in enumerate(groups):
        for t in group:
            t.steps = split_steps(t.ids, codec)
        mixed = any(t.rewards["accuracy"] for t in group)
        if n in hard or (mixed and credit != "rollout"):
            failures += locatable_failures(group)
    verifier(failures)


# ---- A2

@torch.no_grad()
def answer_margins(model, codec, trajectories: list, last: bool = False,
                   budget: int = 32768) -> list[list[float]]:
    """A2. For each trajectory the margins M_0 .. M_T (last: M_T alone): mean log-prob of the gold answer
    minus that of its own answer, teacher-forced after the first k steps and the cue that opens an answer.
    Positive: from there the policy would still prefer the right answer."""
    work, margins = [], []                  # work: (trajectory, k, sign, tokens before, answer tokens)
    for n, t in enumerate(trajectories):
        cue = rollout.token_ids("</think><answer>" if "<think>" in t.text else "\nThe answer is ", codec)
        own = reward.extract_answer(t.text, t.problem.choices) or ""
        ends = [step.start for step in t.steps] + [t.steps[-1].stop]
        ends = ends[-1:] if last else ends
        margins.append([0.0] * len(ends))
        for sign, text in ((1, t.problem.answer), (-1, own)):
            answer = rollout.token_ids(rollout.escape_special(text, codec), codec)
            for k, end in enumerate(ends):
                work.append((n, k, sign, t.ids[:end] + cue, answer))
    for batch in rollout.token_batches([len(before) + len(answer) for *_, before, answer in work], budget):
        part = work[batch.start:batch.stop]
        prompts = [trajectories[n].prompt for n, *_ in part]
        rows = [before + answer for *_, before, answer in part]
        logps, _, _ = rollout.completion_logps(model, codec, prompts, rows)
        for (n, k, sign, before, answer), row in zip(part, logps.tolist()):
            found = row[len(before):len(before) + len(answer)]
            margins[n][k] += sign * sum(found) / max(1, len(found))
    return margins


def largest_margin_drop(margins: list[float]) -> int:
    """The step (0-based) with the largest drop of the margin; of equal ones the first."""
    drops = [before - after for before, after in zip(margins, margins[1:])]
    return drops.index(max(drops))
