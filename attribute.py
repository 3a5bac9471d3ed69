"""Where a failed rollout lost the image: screening, steps, the signal A1, and the verifier that applies it.

Takes: rollouts with their rewards, the policy, and the reader: a frozen model, the pristine visual prior.
Gives: `steps` and `checks` on each trajectory; the first suspect step is where rereason.py looks at the image
again.

The paper says: a reward-driven screening finds flawed rollouts, and a step-level attribution inside the
multimodal context finds where the reasoning lost the image, since a long chain of text erodes it. How is our
choice:

    A1 re-reading       the reader scores a step's own tokens without the chain that led there: after image,
                        question and the last `window` steps alone. A token is suspect where the image has a
                        say, and what the chain or language made easy is not what the reader sees

That is forward passes only; it counts as one generated token a step all the same. Nothing is asked: there is
no instruction to follow and no reply to parse. Left out: the answer's margin (A2), visual dependence (A3),
Monte-Carlo restarts (A4), random and oracle localisers, all in experiments/localisers.py.

Worked example: "blue 7 9" stands ninth in a chain. The policy wrote the 7 with probability 0.9. The reader,
with image and question alone, gives it 0.05 after "blue", and 0.3 where the image is masked: its prediction
moves by KL = 2 nats, and the gap is log 0.9 - log 0.05 = 2.9 > 0.5: suspect. The reader would have begun with
"red", but so it would without the image (KL = 0): which thing is read next is not the image's to say.
"""
import bisect
import re
from dataclasses import dataclass, replace

import torch

import reward
import rollout

DOUBT = 0.5                             # nats; a token with a larger gap is suspect ...
SAY = 0.5                               # ... if KL(with the image || without) there is larger than this


# ---- Screening and steps

@dataclass
class Step:
    """One step of a completion: tokens [start, stop), its line break included, and its text without it."""
    start: int
    stop: int
    text: str


HEADER = re.compile(r"^[ \t]*(?:#{1,4} +\S|(?:\*\*)?Step \d{1,3}\b|\*\*[^*\n]+\*\*:?[ \t]*$)", re.M | re.I)
ITEM = re.compile(r"^\d{1,3}[.)] +\S", re.M)
DISPLAY = re.compile(r"\$\$|(?<!\\)\\[\[\]]")       # $$, \[ and \], but not the \\[4pt] of a table
FORMULA = re.compile(r"\$[^$\n]+\$|\\\([^\n]*?\\\)|\$\$[^$]*\$\$|\\\[.*?\\\]", re.S)
SENTENCE_END = re.compile(r"(?<!\b[Ff]ig)(?<!\b[Ee]q)(?<!\bDr)(?<!\bvs)(?<!e\.g)(?<!i\.e)(?<!\bcf)"
                          r"[.!?][\"')*]*(?=\s+[^\sa-z])|[。！？]")
ANSWER = re.compile(r"\W*(?:(?:so|thus|therefore|hence)\b\W*)?(?:the |my )?(?:final |correct )?answer\b"
                    r"|[^\n]{,100}\\boxed\{", re.I)
FILLER = re.compile(r"\W*(?:(?:so|now|first|next|then|okay|ok|well|alright|hmm+|wait|yes)\b\W*)*"
                    r"(?:(?:let me|let'?s|let us|i(?:'ll| will| need to| should| have to)|we (?:need|have) to"
                    r"|to (?:solve|find|answer))\b|$)", re.I)
CLAIM = re.compile(r"\d|[=<>$\\]|\b(?:is|are|was|shows?|has|have|says?|reads?|there|must)\b", re.I)


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


def style_of(text: str) -> str:
    """How a completion's chain is written: in "headers", a numbered "list", "lines", or else "sentences"."""
    begin, end = thoughts_of(text)
    for style in ("headers", "list", "lines"):
        if len(step_starts(text[begin:end], style)) > 1:
            return style
    return "sentences"


def step_starts(thoughts: str, style: str) -> list[int]:
    """Where steps begin in a style; what stands before the first header or item is a step as well."""
    starts = [0] if thoughts.strip() else []
    if style == "sentences":
        formulas = FORMULA.sub(lambda m: "x" * len(m[0]), thoughts)     # a formula is never split
        for m in SENTENCE_END.finditer(formulas):
            number = re.fullmatch(r"\s*\d+\.", thoughts[starts[-1]:m.end()])     # "2." begins an item
            if not number and thoughts[m.end():].strip():
                starts.append(m.end())
    elif style == "lines":
        starts, in_formula = [], False
        for line in re.finditer(r"[^\n]*\n?", thoughts):
            if not in_formula and line[0].strip():
                starts.append(line.start())
            if len(DISPLAY.findall(line[0])) % 2 == 1:      # a display formula is one line
                in_formula = not in_formula
    else:
        found = [m.start() for m in (HEADER if style == "headers" else ITEM).finditer(thoughts)]
        if len(found) < 2:
            return []
        preamble = bool(thoughts[:found[0]].strip())
        starts = [0] * preamble + found
        if style == "list":                                 # paragraphs after the list are no part of it
            after = re.finditer(r"\n\s*\n(?!\s|[*-] )", thoughts)
            starts += [m.end() for m in after if m.end() > found[-1]]
    return starts


def thoughts_of(text: str) -> tuple[int, int]:
    """Where the thoughts begin and end: from <think> (or the start) to </think> (or the answer), without
    lines that announce the answer."""
    begin = text.find("<think>") + len("<think>") if "<think>" in text else 0
    ends = [text.find(tag, begin) for tag in ("</think>", "<answer>", "### The final answer")]
    end = min((place for place in ends if place >= 0), default=len(text))
    while True:
        last_line = text.rfind("\n", begin, begin + len(text[begin:end].rstrip())) + 1
        if last_line <= begin or not ANSWER.match(text, last_line, end):
            return begin, end
        end = last_line


def split_steps(ids: list, codec, style: str = "") -> list[Step]:
    """Steps of a completion at token boundaries, without a last one that announces the answer. A token
    belongs to the step of its first character. Our choice: R1-VL's headers, numbered lists, a step a line,
    sentences; style: which of these ("" = as the text is written)."""
    if ids and ids[-1] in codec.eos_ids:
        ids = ids[:-1]
    text, offsets = text_and_offsets(ids, codec)
    begin, end = thoughts_of(text)
    starts = step_starts(text[begin:end], style or style_of(text))
    steps, token = [], 0
    for a, b in zip(starts, starts[1:] + [end - begin]):
        start = token = bisect.bisect_left(offsets, begin + a, token, len(ids))
        token = bisect.bisect_left(offsets, begin + b, token, len(ids))
        if token > start:
            steps.append(Step(start, token, text[begin + a:begin + b].strip()))
    while steps and ANSWER.match(steps[-1].text):
        steps.pop()
    return steps


def parts_of(step: Step, ids: list, codec) -> tuple[int, str, str]:
    """How many tokens of a step lie within its text; the end of the text that these leave to another token;
    what follows the text in the step's tokens: white space, or the beginning of a tag."""
    whole, offsets = text_and_offsets(ids[step.start:step.stop], codec)
    end = len(whole.rstrip())
    while end and not (whole[:end].endswith(step.text) or step.text.endswith(whole[:end].lstrip())):
        end -= 1                                            # (the token before may hold its first characters)
    stops = [offset for offset in [*offsets[1:], len(whole)] if offset <= end]
    while stops and stops[-1] == offsets[len(stops) - 1]:
        stops.pop()                                         # a character that is not complete yet
    covered = stops[-1] if stops else 0
    return len(stops), whole[covered:end], whole[end:]


def replace_end(t, k: int, stem: int, new_ids: list, new_logps: list, codec):
    """The trajectory whose step k is, from token `stem` on, the one that the new tokens begin with; None
    where these do not end a step. What follows the step's text is the new tokens' own line break, or else
    what stood there; where that was part of another token, it is forced."""
    old, style, chain = t.steps[k], style_of(t.text), t.ids[:stem] + new_ids
    step = next((s for s in split_steps(chain, codec, style) if s.start == old.start), None)
    if not step or (step.stop == len(chain) and chain[-1] not in codec.newline_ids):
        return None
    inner, rest, after = parts_of(step, chain, codec)
    old_inner, old_rest, old_after = parts_of(old, t.ids, codec)
    if not after.strip() and ("\n" in after) == ("\n" in old_after):
        inner, rest, tail = step.stop - step.start, "", old.stop
    elif rest or old_rest:
        rest, tail = rest + old_after, old.stop
    else:
        tail = old.start + old_inner
    count, seam = max(0, old.start + inner - stem), rollout.token_ids(rest, codec)
    ids = t.ids[:stem] + new_ids[:count] + seam + t.ids[tail:]
    logps = t.logps[:stem] + new_logps[:count] + [0.0] * len(seam) + t.logps[tail:]
    sampled = t.sampled[:stem] + [1] * count + [0] * len(seam) + t.sampled[tail:]
    for place in sorted({stem + count, stem + count + len(seam)}, reverse=True):
        mend_seam(ids, logps, sampled, place, codec)
    text = codec.tokenizer.decode(ids[:-1] if t.finished else ids, skip_special_tokens=False)
    steps, want = split_steps(ids, codec, style), [s.text for s in t.steps]
    want[k] = step.text
    if [s.text for s in steps] != want:
        return None
    return replace(t, ids=ids, logps=logps, sampled=sampled, text=text, steps=steps, checks=None)


def mend_seam(ids: list, logps: list, sampled: list, place: int, codec):
    """Make the tokens around a seam, in place, those that the tokenizer gives their text; new ones are
    forced. No control token comes of words that spell one."""
    added = codec.tokenizer.added_tokens_decoder
    for n in range(1, 5):
        start, stop = max(0, place - n), min(len(ids), place + n)
        old = ids[start:stop]
        own = rollout.token_ids(codec.tokenizer.decode(old, skip_special_tokens=False), codec)
        if own == old or any(i in added and added[i].special for i in set(own) - set(old)):
            return
        if n > 1 and own[0] == old[0] and own[-1] == old[-1]:
            ids[start + 1:stop - 1] = own[1:-1]
            logps[start + 1:stop - 1] = [0.0] * (len(own) - 2)
            sampled[start + 1:stop - 1] = [0] * (len(own) - 2)
            return


def claims_nothing(text: str) -> bool:
    """Whether a step says nothing that an image could contradict: "Let me check." """
    opening = FILLER.match(text)
    return bool(opening) and not CLAIM.search(text, opening.end())


def select_groups(groups, keys: list[str], config, progress: float) -> list[int]:
    """Indices of the groups worth rectifying: accuracy up to `rectify_below`, at least two wrong. Of these a
    share that falls to 0 over the last `anneal` of the training (progress: the share that is done)."""
    share = min(1.0, (1 - progress) / config.anneal) if config.anneal else 1.0
    chosen = []
    for n, group in enumerate(groups):
        right = sum(t.rewards["accuracy"] for t in group)
        is_hard = right <= config.rectify_below * len(group) and len(group) - right >= 2
        if is_hard and rollout.uniforms(f"anneal/{keys[n]}", 1, 1).item() < share:
            chosen.append(n)
    return chosen


def locatable_failures(group: list) -> list:
    """Screening: failures that can be located: wrong, ended by themselves, readable, two steps or more."""
    found = []
    for t in group:
        wrong = t.rewards["accuracy"] == 0 and t.finished
        if wrong and len(t.steps) >= 2 and reward.extract_answer(t.text, t.problem.choices):
            found.append(t)
    return found


def is_right(t) -> bool:
    """The verifier of restarts and repairs: the training reward's own accuracy."""
    return reward.reward_parts(t.text, t.problem.answer, t.problem.choices, t.finished)["accuracy"] == 1


# ---- A1

@dataclass
class Check:
    """What A1 says of a step: its largest gap, in nats, and its first suspect token (None: none is)."""
    gap: float
    token: int | None = None

    @property
    def is_suspect(self) -> bool:
        return self.gap > DOUBT


def first_suspect(checks: list) -> int | None:
    """The first suspect step (0-based); None without one."""
    return next((k for k, check in enumerate(checks) if check.is_suspect), None)


def faulty_tokens(step: Step, check: Check) -> tuple[int, int]:
    """The tokens (start, stop) to blame for a suspect step: the first suspect one; all if none is known."""
    if check.token is None:
        return step.start, step.stop
    return step.start + check.token, step.start + check.token + 1


def check_of(step: Step, t, readings: list[tuple]) -> Check:
    """The check of a step from its tokens' readings (log p with the image, log p without, the image's say).
    The gap of a token is max(log mu, log p without) - log p with, where the image has a say, else 0."""
    largest, first = 0.0, None
    for n, (seen, masked, say) in enumerate(readings, start=step.start):
        gap = max(t.logps[n], masked) - seen
        if t.sampled[n] and say > SAY and gap > largest:
            largest = gap
            if first is None and gap > DOUBT:
                first = n - step.start
    return Check(largest, first)


@torch.no_grad()
def read_steps(reader, codec, claims: list[tuple], masked: dict, budget: int = 16384) -> dict:
    """A1's reading. claims: (prompt, tokens before the step, tokens of the step) -> by claim, for each token
    of the step its log-prob under the reader with the image and with it masked, and KL(with || without) of
    the predictions there. Claims of a prompt share it, computed once; at most `budget` tokens go through the
    model together. masked: the prompts with their images masked, added to where one is not in it yet."""
    found, place = {}, {}
    for prompt, _, _ in claims:
        place.setdefault(prompt, len(place))                            # neighbours share their prompt
        masked[prompt] = masked.get(prompt) or rollout.mask_image(prompt)
    claims = sorted(claims, key=lambda claim: (place[claim[0]], len(claim[2])))
    for batch in rollout.token_batches([2 * (len(before) + len(step)) for _, before, step in claims], budget):
        part = claims[batch.start:batch.stop]
        prompts, rows = [prompt for prompt, _, _ in part], [before + step for _, before, step in part]
        prompts += [masked[prompt] for prompt in prompts]
        hidden, targets, mask = rollout.completion_hidden(reader, prompts, rows * 2, codec.pad_id)
        seen, blind = hidden[mask].chunk(2)                                             # (N, D) each
        targets, readings = targets[mask][:len(seen)], []
        for one, other, target in zip(seen.split(1024), blind.split(1024), targets.split(1024)):
            logps = torch.stack([rollout.next_logps(reader, codec, h) for h in (one, other)])
            own = logps.gather(2, target.expand(2, -1)[:, :, None])[:, :, 0]        # (2, N, V) -> (2, N)
            say = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)                  # (N,)
            readings += zip(*own.tolist(), say.tolist())
        for claim, row in zip(part, rows):
            found[claim] = readings[len(row) - len(claim[2]):len(row)]
            readings = readings[len(row):]
    return found


class Verifier:
    """Fills in the `checks` of trajectories that have steps, by A1; reads nothing twice. For a signal of your
    own override `__call__`. window: steps before a step to read with it. tokens: one for each step read."""

    def __init__(self, reader, codec, window: int = 1):
        self.reader, self.codec, self.window = reader, codec, window
        self.known, self.masked, self.tokens = {}, {}, 0

    def context(self, t, k: int) -> list:
        """What the reader has before it reads step k: the chain's opening and the last `window` steps."""
        opening, first = t.ids[:t.steps[0].start], max(0, k - self.window)
        return opening + t.ids[t.steps[first].start:t.steps[k].start]

    def __call__(self, trajectories: list):
        work = []
        for t in trajectories:
            t.checks = [Check(0.0)] * len(t.steps)
            for k, step in enumerate(t.steps):
                if not claims_nothing(step.text):
                    work.append((t, k, self.claim(t, k)))
        unknown = dict.fromkeys(claim for _, _, claim in work if claim not in self.known)
        self.tokens += len(unknown)
        self.known |= read_steps(self.reader, self.codec, list(unknown), self.masked)
        for t, k, claim in work:
            t.checks[k] = check_of(t.steps[k], t, self.known[claim])

    def claim(self, t, k: int) -> tuple:
        """What is read of step k: the prompt, the tokens before, the tokens of its text."""
        start, length = t.steps[k].start, parts_of(t.steps[k], t.ids, self.codec)[0]
        return t.prompt, tuple(self.context(t, k)), tuple(t.ids[start:start + length])


def choose_source(group: list):
    """The failed rollout that is easiest to repair: one that A1 has located, with few suspect steps, the
    first of them late; None where no failure can be located."""
    def difficulty(t):
        suspects = sum(check.is_suspect for check in t.checks)
        return suspects == 0, suspects, -(first_suspect(t.checks) or 0)

    return min(locatable_failures(group), key=difficulty, default=None)


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
