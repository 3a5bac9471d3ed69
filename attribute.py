"""Where a failed rollout lost the image: screening, steps, four signals, and the localiser that combines
them.

Place in the pipeline: after the reward, before rereason.py. Reads from model.py, rollout.py, reward.py.
The paper says: a reward-driven screening finds flawed rollouts, and a step-level attribution inside the
multimodal context finds where the reasoning lost the image. How is our choice. The gold answer only scores
(A2, A4); it never enters a prompt.

    A1 pristine check     P(the policy, shown the image and this step alone, repeats it), least likely token
    A2 answer margin      log p(gold) - log p(own answer) after each step: where the chain turns wrong
    A3 visual dependence  KL(pi(. | image) || pi(. | image with patches dropped)) in each step
    A4 Monte Carlo        successes among K restarts after each step, by binary search

A1, A2 and A3 are forward passes only; A1 counts as one generated token a check all the same. A1 asks each
distinct statement of a problem once, for all its rollouts. Sources: A2 is ours; A3 is VPPO's token dependency
(KL; the mean of the most dependent 40 %); A4 is OmegaPRM's search (arXiv 2406.06592).

Worked example: a chain of four steps whose checks are 0.98, 0.95, 0.02, 0.90. The first below 0.5 is the
third, so the fault is there, with confidence 0.98 * 0.95 * (1 - 0.02) = 0.91.
"""
import bisect
import math
import re
import zlib
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import reward
import rollout

CHECK = "\nCheck this step against the image: repeat it if it is right, correct it if not.\n"
DOUBT = 0.5                         # a step repeated with less than this probability is doubted
SLOT = "\u241e"                     # stands for the step while the chat template is rendered


# ------------------------------------------------------------------------------------------------------------
# Screening and steps


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


def split_steps(ids: list, codec) -> list[Step]:
    """Steps of a completion at token boundaries. They lie between <think> and </think> (or from the start to
    the answer). Where lines begin with "Step 1", "### Step 1", each such header opens a step; otherwise
    each non-empty line is one, and the lines of a display formula stay together. A token belongs to the step
    of its first character. Our choice, as in R1-VL's headers and in one-step-a-line chains."""
    ids = ids[:-1] if ids and ids[-1] in codec.eos_ids else ids
    text, offsets = text_and_offsets(ids, codec)
    begin = text.find("<think>") + 7 if "<think>" in text else 0
    ends = [e for e in (text.find(tag, begin) for tag in ("</think>", "<answer>", "### The final answer"))
            if e >= 0]
    region = text[begin:min(ends, default=len(text))]
    cuts = [m.start() for m in HEADER.finditer(region)]
    if not cuts:
        in_formula = False
        for m in re.finditer(r"[^\n]*\n?", region):
            if not in_formula and m[0].strip():
                cuts.append(m.start())
            in_formula ^= len(DISPLAY.findall(m[0])) % 2 == 1
    steps, token = [], 0
    for a, b in zip(cuts, cuts[1:] + [len(region)]):
        start = token = bisect.bisect_left(offsets, begin + a, token, len(ids))
        token = bisect.bisect_left(offsets, begin + b, token, len(ids))
        if token > start:
            steps.append(Step(start, token, region[a:b].strip()))
    return steps


def flawed(group: list) -> list:
    """Screening: the rollouts of a group whose failure can be located: wrong, ended by themselves, with an
    answer that can be read, and at least two steps (`steps` must be set)."""
    return [t for t in group if t.rewards["accuracy"] == 0 and t.finished and len(t.steps) >= 2
            and reward.extract_answer(t.text, t.problem.choices)]


# ------------------------------------------------------------------------------------------------------------
# A1


@dataclass
class Check:
    """What A1 says of a step: the probability of the token at which the policy would most likely have written
    something else, and that token (counted from the step's first). Of one token, not of all: a long step is
    no more doubtful than a short one."""
    same: float
    token: int | None = None            # None: not known which

    @property
    def doubted(self) -> bool:
        return self.same < DOUBT


def in_chain(check: Check, step: Step, ids: list, codec) -> Check:
    """The check of a step with its token counted among the step's own tokens in a chain, where white space
    may stand before it and the same text may fall into other tokens than when it was asked alone."""
    if check.token is None or not check.doubted:            # nobody asks for the token of the others
        return check
    alone, own = rollout.token_ids(rollout.plain(step.text, codec), codec), ids[step.start:step.stop]
    if own[:len(alone)] == alone:
        return check
    text, offsets = text_and_offsets(own, codec)
    character = text_and_offsets(alone, codec)[1][check.token] + len(text) - len(text.lstrip())
    return Check(check.same, max(n for n, at in enumerate(offsets) if at <= character))


def at_fault(step: Step, check: Check | None) -> tuple[int, int]:
    """The tokens of a chain to blame for a step that is doubted or unknown: the one that the policy would
    have written otherwise (what follows in the step follows from it), or all where none is known."""
    if check is None or check.token is None:
        return step.start, step.stop
    token = min(step.start + check.token, step.stop - 1)
    return token, token + 1


def first_doubt(checks: list) -> int | None:
    """The first step (0-based) at fault by its check; None where none is. A check may be None: unknown."""
    return next((k for k, c in enumerate(checks) if c and c.doubted), None)


@torch.no_grad()
def pristine_check(model, codec, claims: list[tuple], budget: int = 16384) -> list[Check]:
    """A1. claims: (problem, step text) pairs -> one Check each: how likely the policy, in a context of its
    own with the pristine image, repeats the very same step. Forward only; the steps of a problem share its
    image and question; at most `budget` tokens of steps go together. Low = the image (or a conclusion drawn
    from it) says otherwise."""
    tokens = lambda text: rollout.token_ids(text, codec)
    texts = [rollout.plain(text, codec) for _, text in claims]
    replies = [tokens(text) for text in texts]
    order = sorted(range(len(claims)), key=lambda i: (claims[i][0].id, len(replies[i])))
    found = [None] * len(claims)
    for chunk in rollout.chunks([2 * len(replies[i]) for i in order], budget):
        part = [order[n] for n in chunk]
        problems = {claims[i][0].id: claims[i][0] for i in part}
        place = {name: n for n, name in enumerate(problems)}
        halves = [rollout.render(replace(p, question=p.question + CHECK + SLOT), codec).rpartition(SLOT)
                  for p in problems.values()]
        prompts = [rollout.encode_prompt(p, codec, text=half[0])
                   for p, half in zip(problems.values(), halves)]
        prompt_of_row = [place[claims[i][0].id] for i in part]
        asked = [tokens(texts[i] + halves[n][2]) for i, n in zip(part, prompt_of_row)]
        logps, _, _ = rollout.completion_logps(model, prompts, prompt_of_row,
                                               [a + replies[i] for a, i in zip(asked, part)], codec)
        for i, a, row in zip(part, asked, logps.tolist()):
            row = row[len(a):len(a) + len(replies[i])]
            found[i] = Check(math.exp(max(-50.0, min(row))), row.index(min(row)))
    return found


# ------------------------------------------------------------------------------------------------------------
# A2


@torch.no_grad()
def answer_margins(model, codec, trajectories: list, last: bool = False,
                   budget: int = 32768) -> list[list[float]]:
    """A2. For each trajectory the margins M_0 .. M_T: mean log-prob of the gold answer minus that of its own
    answer, teacher-forced after the first k steps and the cue that opens an answer. Positive: from there the
    policy would still prefer the right answer. The gold answer only scores here. last: M_T alone."""
    work = []                                           # (trajectory, k, sign, tokens before, answer tokens)
    for n, t in enumerate(trajectories):
        cue = rollout.token_ids("</think><answer>" if "<think>" in t.text else "\nThe answer is ", codec)
        own = reward.extract_answer(t.text, t.problem.choices) or ""
        for sign, text in ((1, t.problem.answer), (-1, own)):
            answer = rollout.token_ids(rollout.plain(text, codec), codec)
            for k in range(len(t.steps) if last else 0, len(t.steps) + 1):
                end = t.steps[k].start if k < len(t.steps) else t.steps[-1].stop
                work.append((n, k, sign, t.ids[:end] + cue, answer))
    margins = [[0.0] * (1 if last else len(t.steps) + 1) for t in trajectories]
    for chunk in rollout.chunks([len(before) + len(answer) for *_, before, answer in work], budget):
        part = [work[n] for n in chunk]
        used = sorted({n for n, *_ in part})
        prompts = [rollout.encode_prompt(trajectories[n].problem, codec) for n in used]
        logps, _, _ = rollout.completion_logps(model, prompts, [used.index(n) for n, *_ in part],
                                               [before + answer for *_, before, answer in part], codec)
        for (n, k, sign, before, answer), row in zip(part, logps.tolist()):
            found = row[len(before):len(before) + len(answer)]
            margins[n][-1 if last else k] += sign * sum(found) / max(1, len(found))
    return margins


def margin_drop(margins: list[float]) -> int:
    """k_D: the step (0-based) with the largest drop of the margin."""
    return max(range(len(margins) - 1), key=lambda k: margins[k] - margins[k + 1])


def no_return(margins: list[float]) -> int:
    """k_V: the step (0-based) from which on the margin stays negative; the last where it never does."""
    k = len(margins)
    while k > 0 and margins[k - 1] < 0:
        k -= 1
    return len(margins) - 2 if k == len(margins) else max(0, k - 1)


# ------------------------------------------------------------------------------------------------------------
# A3


def drop_patches(prompt, merge: int, share: float, rng: torch.Generator):
    """The prompt with a random share of its image patches replaced by the mean colour. Whole merged patches
    go, else what is left of each would still tell."""
    if prompt.pixel_values is None:
        return prompt
    blocks = prompt.pixel_values.view(-1, merge ** 2, prompt.pixel_values.shape[1])
    keep = torch.rand(len(blocks), generator=rng) >= share
    return replace(prompt, pixel_values=(blocks * keep[:, None, None]).view_as(prompt.pixel_values))


@torch.no_grad()
def visual_dependence(model, codec, trajectories: list, share: float = 0.6, masks: int = 4,
                      budget: int = 32768) -> list[list[float]]:
    """A3. For each trajectory d_t of every token: how much what comes there depends on the image, KL(pi(. |
    image) || pi(. | masked image)), averaged over `masks` random masks. Zeros without images."""
    out = []
    for chunk in rollout.chunks([len(t.ids) for t in trajectories], budget):
        part = [trajectories[n] for n in chunk]
        problems = {t.problem.id: t.problem for t in part}
        prompts = [rollout.encode_prompt(p, codec) for p in problems.values()]
        rngs = [torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in problems]  # own masks
        place = {name: n for n, name in enumerate(problems)}
        rows, ids = [place[t.problem.id] for t in part], [t.ids for t in part]
        clean, _, mask = rollout.completion_hidden(model, prompts, rows, ids, codec.pad_id)
        total = 0.0
        for _ in range(masks):
            blind = [drop_patches(p, codec.image_config.merge_size, share, rng)
                     for p, rng in zip(prompts, rngs)]
            masked = rollout.completion_hidden(model, blind, rows, ids, codec.pad_id)[0]
            found = []
            for a, b in zip(clean[mask].split(1024), masked[mask].split(1024)):
                p, q = (F.linear(h, model.head_weight).float().log_softmax(-1) for h in (a, b))   # (chunk, V)
                found.append((p.exp() * (p - q)).sum(-1))
            total = total + torch.cat(found) / masks
        out += [d.tolist() for d in total.split([len(i) for i in ids])]
    return out


def step_dependence(d: list[float], steps: list[Step], top: float = 0.4) -> list[float]:
    """E_1 .. E_T: per step the mean of its most dependent tokens (the `top` share: few tokens are visual)."""
    out = []
    for s in steps:
        values = sorted(d[s.start:s.stop], reverse=True)[:max(1, round(top * (s.stop - s.start)))]
        out.append(sum(values) / len(values))
    return out


def erosion(dependence: list[float], k: int) -> float:
    """e_k = (max_{j <= k} E_j - E_k) / (std E + 0.1): how far step k (0-based) fell behind."""
    std = torch.tensor(dependence).std(unbiased=False).item()
    return (max(dependence[:k + 1]) - dependence[k]) / (std + 0.1)


def most_eroded(d: list[float], steps: list[Step]) -> int:
    """A3 as a localiser: the step (0-based) that fell furthest behind."""
    each = step_dependence(d, steps)
    return max(range(len(each)), key=lambda k: erosion(each, k))


# ------------------------------------------------------------------------------------------------------------
# A4


def search(steps: int, guess: int | None = None):
    """A4's binary search, as a generator: yields k, is sent whether restarts behind the first k steps ever
    succeed (0 < k < steps), and returns the step (0-based) before which they do and behind which they do not.
    Behind no step at all they are taken to succeed, behind all steps to fail. It looks around `guess` first;
    at most log2(steps) + 3 questions."""
    low, high = 0, steps
    hints = [] if guess is None else [guess, guess + 1]
    while high - low > 1:
        k = hints.pop(0) if hints else (low + high) // 2
        if low < k < high:
            low, high = (k, high) if (yield k) else (low, k)
    return high - 1


def monte_carlo(model, codec, trajectories: list, max_new_tokens: int, restarts: int = 4,
                guesses: list | None = None, key: str = "monte carlo") -> tuple[list[int], int]:
    """A4. For each trajectory the step (0-based) at which its chance of success dies, and the tokens
    generated to find out. All searches go on side by side, `restarts` completions a question."""
    searches = [search(len(t.steps), g) for t, g in zip(trajectories, guesses or [None] * len(trajectories))]
    found, tokens, answers = [None] * len(searches), 0, [None] * len(searches)
    while True:
        asked = []
        for n in (n for n, f in enumerate(found) if f is None):
            try:
                asked.append((n, searches[n].send(answers[n])))
            except StopIteration as end:
                found[n] = end.value
        if not asked:
            break
        problems = [trajectories[n].problem for n, _ in asked]
        prefixes = [trajectories[n].ids[:trajectories[n].steps[k].start] for n, k in asked]
        keys = [f"{key}/{p.id}/{prefix}" for p, prefix in zip(problems, prefixes)]
        numbers = torch.cat([rollout.uniforms(k, restarts, max_new_tokens) for k in keys])
        groups = rollout.sample(model, problems, codec, restarts, max_new_tokens, 1.0, numbers,
                                [p for p in prefixes for _ in range(restarts)])
        for (n, _), group in zip(asked, groups):
            tokens += sum(sum(t.sampled) for t in group)
            answers[n] = any(right(t) for t in group)
    return found, tokens


def right(t) -> bool:
    """The verifier of restarts and repairs: the training reward's own."""
    p = t.problem
    return reward.reward_parts(t.text, p.answer, p.choices, t.finished)["accuracy"] == 1


# ------------------------------------------------------------------------------------------------------------
# The localiser


LOCALISERS = ("check", "margin", "dependence", "monte_carlo", "random", "oracle")


class Locator:
    """Fills in the `checks` of chains (objects with problem, ids, text, steps), by one of the signals.

    check: A1, each distinct step of a problem asked once while this object lives. oracle: `oracle(problem,
    step text)` says what is true (tiny only). The others find one step and know nothing of those behind it:
    margin (A2), dependence (A3), monte_carlo (A4), random. tokens: generated so far, one for each A1
    check."""

    def __init__(self, model, codec, name: str = "check", oracle=None, max_new_tokens: int = 0,
                 key: str = ""):
        self.model, self.codec, self.name, self.oracle = model, codec, name, oracle
        self.max_new_tokens, self.key, self.known, self.tokens = max_new_tokens, key, {}, 0

    def __call__(self, chains: list):
        chains = [c for c in chains if c.steps and (c.checks is None or not settled(c.checks))]
        if self.name not in ("check", "oracle"):            # what these say of a chain is said at its end
            chains = [c for c in chains if c.finished]
        if not chains:
            return
        if self.name in ("check", "oracle"):
            claims = {(c.problem.id, s.text): (c.problem, s.text) for c in chains for s in c.steps}
            claims = {name: claim for name, claim in claims.items() if name not in self.known}
            if self.name == "oracle":
                found = [Check(float(self.oracle(*claim))) for claim in claims.values()]
            else:
                found = pristine_check(self.model, self.codec, list(claims.values()))
                self.tokens += len(claims)
            self.known.update(zip(claims, found))
            for c in chains:
                c.checks = [in_chain(self.known[c.problem.id, s.text], s, c.ids, self.codec) for s in c.steps]
            return
        if self.name == "margin":
            faults = [margin_drop(m) for m in answer_margins(self.model, self.codec, chains)]
        elif self.name == "dependence":
            depends = visual_dependence(self.model, self.codec, chains)
            faults = [most_eroded(d, c.steps) for d, c in zip(depends, chains)]
        elif self.name == "monte_carlo":
            faults, tokens = monte_carlo(self.model, self.codec, chains, self.max_new_tokens, key=self.key)
            self.tokens += tokens
        else:
            faults = [int(len(c.steps) * rollout.uniforms(f"{self.key}/{c.problem.id}/{c.ids}", 1, 1).item())
                      for c in chains]
        for c, k in zip(chains, faults):
            c.checks = [Check(1.0)] * k + [Check(0.0)] + [None] * (len(c.steps) - k - 1)


def settled(checks: list) -> bool:
    """Whether the first fault is known: no unknown check before the first doubted one."""
    return None not in checks[:first_doubt(checks)]


@dataclass
class Fault:
    """Where a rollout went wrong: its first step at fault (0-based), the kind, the confidence in [0, 1]."""
    step: int
    kind: str                           # eroded | misread | reasoning
    confidence: float


def localise(checks: list[Check], margins: list[float] | None = None, d: list[float] | None = None,
             steps: list[Step] | None = None) -> Fault:
    """The default localiser. The first step that A1 would not repeat; where it would repeat all of them, the
    step with the largest drop of A2's margin (the last step without margins). Kind by A3 (d, with steps):
    reasoning where no step is doubted, or where the doubted token hardly depends on the image; else
    eroded where the dependence of the step fell behind (e_k > 1); else misread."""
    k = first_doubt(checks)
    trust = math.prod(c.same for c in checks[:k])
    if k is None:
        return Fault(margin_drop(margins) if margins else len(checks) - 1, "reasoning", trust)
    confidence, kind = trust * (1 - checks[k].same), "misread"
    if d is not None:
        start, stop = at_fault(steps[k], checks[k])
        if max(d[start:stop]) <= 0.05 * max(d):
            kind = "reasoning"
        elif erosion(step_dependence(d, steps), k) > 1:
            kind = "eroded"
    return Fault(k, kind, confidence)
