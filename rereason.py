"""The Re-Reasoning Loop: a failed rollout is repaired step by step against the pristine image.

Place in the pipeline: after attribute.py, before the advantages. Reads from attribute.py, rollout.py,
reward.py. The paper says: the loop cross-references intermediate states with the pristine image, again and
again, until the trajectory is right. How is our choice:

    look      at the first doubted step: a second turn shows the image again and asks for this step anew
    keep      the steps behind it that agree with the image and that the policy would still write after the
              correction; at the next doubted step look again
    continue  where nothing is left to keep, in the clean context; check the new steps as they come
    verify    with the reward. Wrong although every step agrees: a slip of reasoning, restart (without the
              image) where the answer's margin drops. A look that failed: restart one step to the left.
              Then regenerate the whole chain; then give up: no trajectory is forced.

So a chain with several errors is repaired one at a time, at a cost of about a step each: N / p, not p^-N.
What is stored is the trajectory in the clean context (the second turn is removed), each token with the
probability mu it was really sampled with. Neither the gold nor the wrong answer enters a prompt: not even the
fact that the answer was wrong.

Worked example: "red 4 6 / blue 3 5 / teal 9 1" with red doubted. The look replies "red 7 9" and ends: 3
tokens and the end. The 3 take the place of the chain's tokens 1 to 3 (0 is <think>), the rest is kept, and
the answer is sampled from the token on that no longer holds. A new rollout would have paid for the whole
chain.
"""
import re
from dataclasses import dataclass, field, replace

import torch

import attribute
import reward
import rollout

HINT_TALK = re.compile(r"\b(?:look(?:ed|ing)? (?:at the image )?again|second image|image again"
                       r"|as instructed|last step|correct(?:ed|ion)|re-?check)", re.I)


RELOOKS = ("image", "text", "none", "only")


@dataclass
class Rules:
    """When to go on and what to accept."""
    failures: int = 3                   # R: failed looks and verifications until the chain is made anew, once
    turns: int = 32                     # loop turns at most, whatever happens
    window: int = 2                     # steps sampled on before they are checked
    spend: float = 2.0                  # x the median length of the group: tokens at most for one repair
    min_log_w: float = -1.5          # nats a token, mean: what the clean context makes less likely is refused
    max_length: float = 1.5             # x the median length of the group
    votes: int = 2                      # right answers needed of three where there are five options or fewer
    relook: str = "image"            # image | text (without the image) | none (restarts) | only (no restarts)


@dataclass
class Repair:
    """One rollout under repair and what became of it."""
    parent: object                      # the failed Trajectory
    chain: object                       # the present one: a Trajectory with steps and checks (None = unknown)
    key: str                            # what its random numbers belong to
    median: float                       # median length of its group, tokens
    fresh: bool = False                 # the chain's answer follows from its steps (False: they were mended)
    changed: int = 10 ** 9              # the first token that is not the parent's
    looks: int = 0                      # steps corrected in a second look
    failed: int = 0
    stalled: int = 0                    # times it was sampled on without completing a step
    tokens: int = 0                     # generated for it (what locating costs is counted there)
    cuts: list = field(default_factory=list)        # steps (0-based) looked at or restarted from, in order
    turns: list = field(default_factory=list)       # for people: what, at which step, text before and after
    outcome: str = ""                   # "" = at work; "repaired"; else why it was given up


def relook_problem(problem, trusted: str, suspect: str, image: bool = True):
    """The second look, a chat of two turns: the question with its images; the trusted steps as the
    assistant's words; then the images again and the suspect step, to be written anew. image False: the same
    without any image (an ablation)."""
    trusted, suspect = (text.replace("<image>", "< image>") for text in (trusted, suspect))    # words, no tag
    again = attribute.CHECK.strip() + "\n" + suspect
    if image:
        return replace(problem, question=[problem.question, trusted, "<image>" * len(problem.images) + again],
                       images=problem.images * 2)
    return replace(problem, question=[problem.question.replace("<image>", ""), trusted, again], images=[])


def guessable(problem, options: int = 5) -> bool:
    """Whether a lucky answer is likely: yes/no, or few options."""
    return (problem.answer.lower() in ("yes", "no", "true", "false")
            or bool(problem.choices) and len(problem.choices) <= options)


def doubted(chain) -> int | None:
    """The first step (0-based) of a chain that is at fault by its checks; None where none is."""
    return attribute.first_doubt(chain.checks)


def says(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, as whole words."""
    words, at = words.strip(), -1
    letter = lambda n: text[n:n + 1].isalnum() or text[n:n + 1] == "_"
    while words and (at := text.find(words, at + 1)) >= 0:
        if not (at and letter(at - 1)) and not letter(at + len(words)):
            return True
    return False


def may_look(chain, shown: str) -> bool:
    """Whether a second look is fair: not where "check this" gives the answer away (yes/no, two options), and
    not where `shown`, the steps in its prompt, hold the right or the wrong answer."""
    p, own = chain.problem, reward.extract_answer(chain.text, chain.problem.choices) or ""
    return not guessable(p, 2) and not says(shown, p.answer) and not says(shown, own)


# ------------------------------------------------------------------------------------------------------------
# The loop


def rectify(model, codec, parents: list, medians: list, keys: list, locate, max_new_tokens: int,
            rules: Rules = Rules()) -> list[Repair]:
    """Repair failed rollouts, all side by side. parents: flawed trajectories with steps and checks; medians:
    the median length of each one's group; keys: what the random numbers of each belong to; locate(chains)
    fills in unknown checks (attribute.Locator). Where `outcome` is "repaired", `chain` is the rectified
    trajectory."""
    repairs = [Repair(t, replace(t), key, median) for t, median, key in zip(parents, medians, keys)]
    for turn in range(rules.turns + 1):
        verified = [r for r in repairs if not r.outcome and r.fresh and attribute.right(r.chain)]
        accept(model, codec, verified, max_new_tokens, rules)
        active = [r for r in repairs if not r.outcome]
        if not active or turn == rules.turns:
            break
        locate([r.chain for r in active])
        plans = [(r, *plan(r, model, codec, rules)) for r in active]
        anew = [(r, at) for r, what, at in plans if what == "go on"]
        anew += rewrite(model, codec, [p for p in plans if p[1] in ("look", "redo")], turn, rules)
        go_on(model, codec, anew, max_new_tokens, turn, rules)
    for r in repairs:
        r.outcome = r.outcome or "too many turns"
    return repairs


def plan(r: Repair, model, codec, rules: Rules) -> tuple[str, int]:
    """What comes next for one chain: ("look" or "redo", a step), ("go on", a token), or it is given up."""
    c, k = r.chain, doubted(r.chain)
    unfinished = k is None and not c.finished               # so far every step agrees
    r.failed += not unfinished and bool(r.cuts) and (k is None or r.cuts[-1] >= k)  # still wrong, no progress
    fair = k is not None and may_look(c, "\n".join(s.text for s in c.steps[:k + 1]))
    stuck = rules.relook == "only" and (r.failed > 0 or not (fair or unfinished))
    if stuck or r.tokens > rules.spend * r.median or (r.failed > rules.failures and -1 in r.cuts):
        r.outcome = "given up"
        return "", 0
    if unfinished:
        return "go on", len(c.ids)
    if r.failed > rules.failures or not c.steps:            # the last try: the whole chain anew
        r.cuts.append(-1)
        return "go on", 0
    if k is None:                                           # every step agrees, yet it is wrong
        if attribute.answer_margins(model, codec, [c], last=True)[0][0] > 0:
            r.cuts.append(len(c.steps))                    # but they lead to the right answer: only that anew
            return "go on", c.steps[-1].stop
        k = attribute.margin_drop(attribute.answer_margins(model, codec, [c])[0])
        fair = False                                        # a slip of reasoning: without a second look
    r.cuts.append(k)
    if fair and rules.relook != "none":
        return "look", k
    return ("go on", c.steps[k].start) if "\n" in c.steps[k].text else ("redo", k)


def rewrite(model, codec, plans: list, turn: int, rules: Rules) -> list:
    """Write one step of each chain anew: in a second look, or ("redo") in the clean context. plans: (repair,
    what, step). The new step takes the old one's place, and later steps stay as far as they still hold.
    Returns the (repair, token) pairs to be sampled on from that token; the others go on to their next doubted
    step."""
    mended, anew = [], []
    for what in ("look", "redo"):
        part = [(r, k) for r, w, k in plans if w == what]
        if not part:
            continue
        spans = [r.chain.steps[k] for r, k in part]
        forced = [[] if what == "look" else r.chain.ids[:s.start] for (r, _), s in zip(part, spans)]
        limits = [len(f) + 16 + 2 * (s.stop - s.start) for f, s in zip(forced, spans)]
        problems = [r.chain.problem if what == "redo" else
                    relook_problem(r.chain.problem, codec.tokenizer.decode(r.chain.ids[:s.start]), s.text,
                                   rules.relook == "image") for (r, _), s in zip(part, spans)]
        keys = [f"{r.key}/{what}/{turn}" for r, _ in part]
        replies = one_each(model, codec, problems, keys, forced, limits,
                           () if what == "look" else codec.newline_ids)
        for (r, k), s, before, reply in zip(part, spans, forced, replies):
            r.tokens += sum(reply.sampled)
            text, n = new_step(reply.ids[len(before):], "\n" in s.text, codec)
            r.turns.append({"what": what, "step": k, "before": s.text, "after": text or "nothing"})
            answer = r.chain.problem.answer
            leaks = k + 1 < len(r.chain.steps) and says(text, answer) and not says(s.text, answer)
            if not text or text == s.text or HINT_TALK.search(text) or leaks:
                r.failed += 1                               # nothing new: restart one step to the left
                r.cuts[-1] = max(0, k - 1)
                if rules.relook != "only":
                    anew.append((r, r.chain.steps[r.cuts[-1]].start))
            else:
                r.looks += what == "look"
                end = len(before) + n
                put_step(r, k, reply.ids[len(before):end], reply.logps[len(before):end], text, codec)
                mended.append((r, k))
    return anew + still_holds(model, codec, mended, rules)


def new_step(ids: list, several_lines: bool, codec) -> tuple[str, int]:
    """The step that a reply begins with, and of how many tokens: up to the end of its line (of the reply,
    where the suspect had several lines), or to a closing tag. ("", 0) where it did not end or a token reaches
    over that end with more than white space."""
    text, offsets = attribute.text_and_offsets(ids, codec)
    line = -1 if several_lines else text.find("\n", len(text) - len(text.lstrip()))
    ends = [e for e in (text.find("</"), line) if e >= 0]
    ended = ends or (ids and ids[-1] in codec.eos_ids)
    if ids and ids[-1] in codec.eos_ids:
        ends.append(offsets[-1])
    end = min(ends, default=0)
    n = sum(o < end for o in offsets)
    over = text[end:offsets[n] if n < len(ids) else len(text)]
    return (text[:end].strip(), n) if ended and not over.strip() else ("", 0)


def one_each(model, codec, problems: list, keys: list, prefixes: list, limits: list, stop_ids: tuple = ()):
    """One completion a problem, each with random numbers and a length limit of its own."""
    numbers = rollout.pad([rollout.uniforms(k, 1, n)[0].tolist() for k, n in zip(keys, limits)], 0.0)[0]
    groups = rollout.sample(model, problems, codec, 1, max(limits), 1.0, numbers, prefixes, stop_ids=stop_ids,
                            limits=limits)
    return [t for t, in groups]


def put_step(r: Repair, k: int, ids: list, logps: list, text: str, codec):
    """Put a corrected step in the place of step k. The line break behind it is the old one, mu and all, or a
    forced one where the old one was part of a word's token."""
    c, step = r.chain, r.chain.steps[k]
    cut = step.stop
    while cut > step.start and not codec.tokenizer.decode([c.ids[cut - 1]]).strip():
        cut -= 1
    gap = c.ids[cut:step.stop], c.logps[cut:step.stop], c.sampled[cut:step.stop]
    if "\n" in codec.tokenizer.decode(ids[-1:]):
        gap = [], [], []
    elif k + 1 < len(c.steps) and cut == step.stop:
        newline = rollout.token_ids("\n", codec)
        gap = newline, [0.0] * len(newline), [0] * len(newline)
    put = lambda old, new: old[:step.start] + new + old[step.stop:]
    shift = len(ids) + len(gap[0]) - (step.stop - step.start)
    moved = [attribute.Step(s.start + shift, s.stop + shift, s.text) for s in c.steps[k + 1:]]
    r.chain = replace(c, ids=put(c.ids, ids + gap[0]), logps=put(c.logps, logps + gap[1]),
                      sampled=put(c.sampled, [1] * len(ids) + gap[2]),
                      steps=c.steps[:k] + [attribute.Step(step.start, step.stop + shift, text)] + moved,
                      checks=c.checks[:k] + [None] + c.checks[k + 1:])          # the new one is asked as well
    r.fresh, r.changed = False, min(r.changed, step.start)


def still_holds(model, codec, mended: list, rules: Rules) -> list:
    """Which later steps stay after step k was corrected. mended: (repair, k). A step stays if its check is
    known and good and the policy would still write it: log w (clean probability after the correction over mu)
    is at least 2 min_log_w for each of its tokens. Returns (repair, token) where sampling must go on: before
    the first step that does not hold, or behind the last; a repair whose next trouble is a doubted step is
    left out."""
    if not mended:
        return []
    logws = log_weights(model, codec, [r.chain for r, _ in mended])
    out = []
    for (r, k), log_w in zip(mended, logws):
        c, start = r.chain, r.chain.steps[-1].stop
        for s, check in zip(c.steps[k + 1:], c.checks[k + 1:]):
            unlikely = min(log_w[s.start:s.stop]) < 2 * rules.min_log_w
            if check is None or (unlikely and not check.doubted):
                start = s.start
                break
            if check.doubted:
                start = None
                break
        if start == c.steps[-1].stop:                       # what still holds of the answer stays as well
            start = next((n for n in range(start, len(c.ids)) if log_w[n] < 2 * rules.min_log_w), len(c.ids))
        if start == len(c.ids) and c.finished:
            r.fresh = True
        elif start is not None:
            out.append((r, start))
    return out


def log_weights(model, codec, chains: list) -> list[list[float]]:
    """log w = log pi(token | clean context) - log mu of every token of each chain."""
    problems = {id(c.problem): c.problem for c in chains}                       # each prompt once
    place = {name: n for n, name in enumerate(problems)}
    prompts = [rollout.encode_prompt(p, codec) for p in problems.values()]
    with torch.no_grad():
        logps, _, _ = rollout.completion_logps(model, prompts, [place[id(c.problem)] for c in chains],
                                               [c.ids for c in chains], codec)
    return [[a - b for a, b in zip(row, c.logps)] for row, c in zip(logps.tolist(), chains)]


def go_on(model, codec, anew: list, max_new_tokens: int, turn: int, rules: Rules):
    """Sample on in the clean context, about `rules.window` steps ahead, so that little is lost when the next
    one is wrong. anew: (repair, the first token to sample). A step that is not complete yet is cut off
    again."""
    for r, at in anew:
        r.outcome = "too long" if at >= max_new_tokens else ""
    anew = [(r, at) for r, at in anew if not r.outcome]
    if not anew:
        return
    ahead = [2 ** r.stalled * max(8, rules.window * (r.parent.steps[-1].stop // len(r.parent.steps)))
             for r, _ in anew]
    found = one_each(model, codec, [r.chain.problem for r, _ in anew],
                     [f"{r.key}/go on/{turn}" for r, _ in anew], [r.chain.ids[:at] for r, at in anew],
                     [min(max_new_tokens, at + n) for (_, at), n in zip(anew, ahead)])
    for (r, at), new in zip(anew, found):
        old = r.chain
        r.tokens += sum(new.sampled)
        r.turns.append({"what": "go on", "step": sum(s.stop <= at for s in old.steps), "before": "",
                        "after": codec.tokenizer.decode(new.ids[at:])})
        new.logps[:at], new.sampled[:at] = old.logps[:at], old.sampled[:at]
        new.steps = attribute.split_steps(new.ids, codec)
        if not new.finished and new.steps and new.steps[-1].stop == len(new.ids):
            end = new.steps.pop().start                                     # not complete yet
            new = replace(new, ids=new.ids[:end], logps=new.logps[:end], sampled=new.sampled[:end])
        r.stalled = r.stalled + 1 if len(new.ids) <= at else 0
        known = {(s.start, s.text): c for s, c in zip(old.steps, old.checks) if s.stop <= at}
        new.checks = [known.get((s.start, s.text)) for s in new.steps]
        r.chain, r.fresh, r.changed = new, new.finished, min(r.changed, at)


def accept(model, codec, repairs: list, max_new_tokens: int, rules: Rules):
    """Take verified chains or say why not: well-formed, not much longer than the group's others, no talk of
    the second look, each new part likely enough in the clean context, and, where an answer can be guessed,
    led to by its steps again and again."""
    if not repairs:
        return
    for r, log_w in zip(repairs, log_weights(model, codec, [r.chain for r in repairs])):
        c = r.chain
        spans = [(s.start, s.stop) for s in c.steps] + [(c.steps[-1].stop if c.steps else 0, len(c.ids))]
        parts = [[x for x, on in zip(log_w[a:b], c.sampled[a:b]) if on] for a, b in spans if b > r.changed]
        form = reward.format_ok(c.text) or not reward.format_ok(r.parent.text)
        if not form or len(c.ids) > rules.max_length * r.median:
            r.outcome = "not well-formed"
        elif HINT_TALK.search(c.text) and not HINT_TALK.search(r.parent.text):
            r.outcome = "talks of the hint"
        elif any(sum(w) < rules.min_log_w * len(w) for w in parts):
            r.outcome = "too unlikely"
        else:
            r.outcome = "repaired"
            c.parent, c.kept = r.parent, r.changed
            c.provenance = f"relook {r.looks}" if r.looks else "restart"
            if r.cuts and r.cuts[-1] == -1:
                c.provenance = "regenerated"
    lucky = [r for r in repairs if r.outcome == "repaired" and guessable(r.chain.problem)]
    if lucky:
        ends = [r.chain.steps[-1].stop if r.chain.steps else 0 for r in lucky]
        numbers = torch.cat([rollout.uniforms(f"{r.key}/votes", 3, max_new_tokens) for r in lucky])
        groups = rollout.sample(model, [r.chain.problem for r in lucky], codec, 3, max_new_tokens, 1.0,
                                numbers, [r.chain.ids[:end] for r, end in zip(lucky, ends) for _ in range(3)])
        for r, group in zip(lucky, groups):
            r.tokens += sum(sum(t.sampled) for t in group)
            if sum(map(attribute.right, group)) < rules.votes:
                r.outcome = "a lucky guess"
