"""The Re-Reasoning Loop: a failed rollout is repaired step by step against the pristine image.

Takes: groups of rollouts with steps and checks, and the verifier with its reader (attribute.py). Gives:
groups in which a rectified trajectory stands beside the failed one it was made of; grpo.py learns from them.

The paper says: the loop cross-references intermediate states with the pristine image, again and again, until
the trajectory is right. How is our choice:

    revise      at the first suspect step: the reader, which sees the image without the chain, continues the
                step's own words from the first suspect token to the end of the step; greedily, then sampled
    keep        later steps that agree with the image and that the policy would still write
    continue    where nothing is left to keep, in the clean context; check the new steps as they come
    verify      with the reward. Wrong although every step agrees: the answer is sampled again. A revision
                that says nothing new: restart one step to the left. After some failures: give up

So several errors are repaired one by one, for a few tokens each. Each token keeps the probability mu it was
sampled with, by the model and in the context it came from. Left out: rollouts that were cut off.

Worked example: "red 4 6 / blue 3 5 / teal 9 1", of which the 4 is suspect. After "<think>red" the reader
writes "7 9" and a line break: they take the place of "4 6", the rest is kept, and the answer is sampled from
the first token on that no longer holds.
"""
from dataclasses import dataclass, field, replace

import torch

import attribute
import reward
import rollout


@dataclass
class Rules:
    """When to continue and what to accept."""
    max_failures: int = 4               # failed revisions and verifications until it is given up
    max_turns: int = 32                 # loop turns at most, whatever happens
    ahead: int = 2                      # steps sampled ahead before they are checked
    max_tokens_ratio: float = 2.0       # at most, in median lengths of the group: tokens for one repair ...
    max_length_ratio: float = 1.05      # ... and length of a rectified one: longer breed longer
    min_log_w: float = -1.5             # mean nats a token; what the clean context finds less likely goes
    revise: bool = True                 # False: restarts only


@dataclass
class Repair:
    """One rollout under repair and what became of it."""
    source: rollout.Trajectory          # the failed one
    trajectory: rollout.Trajectory      # the present one, with steps and checks
    key: str                            # names its random numbers
    median_length: float                # of its group, tokens
    answer_is_current: bool = False     # the answer follows from the steps (False: they were edited since)
    num_revisions: int = 0              # steps that the reader rewrote
    failures: int = 0
    tokens: int = 0                     # generated for it (what checking costs is counted by the verifier)
    edited_steps: list = field(default_factory=list)    # steps (0-based) revised or restarted from, in order
    confirmed: set = field(default_factory=set)     # steps' tokens that the reader, asked to go on, wrote too
    turns: list = field(default_factory=list)       # for people: what, which step, text before and after
    outcome: str = ""                   # "" = at work; "repaired"; else why it was given up


# ---- The loop

def rectify(model, codec, repairs: list[Repair], verifier, max_new_tokens: int, rules: Rules) -> None:
    """Repair failed rollouts side by side, in place: "repaired" is the `outcome` where it succeeds."""
    for turn in range(rules.max_turns):
        active = accept(model, codec, repairs, max_new_tokens, rules)
        if not active:
            return
        verifier([r.trajectory for r in active])
        todo = {"revise": [], "continue": [], "give up": []}
        for r in active:
            action, where = next_action(r, rules)
            todo[action].append((r, where))
        for r, _ in todo["give up"]:
            r.outcome = "given up"
        todo["continue"] += revise_steps(model, codec, todo["revise"], verifier, turn, rules)
        continue_sampling(model, codec, todo["continue"], max_new_tokens, turn, rules)
    for r in accept(model, codec, repairs, max_new_tokens, rules):
        r.outcome = "too many turns"


def first_doubt(r: Repair) -> int | None:
    """The first suspect step that the reader has not written itself."""
    t = r.trajectory
    for k, step in enumerate(t.steps):
        if t.checks[k].is_suspect and tuple(t.ids[step.start:step.stop]) not in r.confirmed:
            return k
    return None


def next_action(r: Repair, rules: Rules) -> tuple[str, int]:
    """What to do next with one trajectory: ("revise", a step), ("continue", a token), ("give up", 0)."""
    t, k = r.trajectory, first_doubt(r)                     # k None: every step passed its check
    incomplete = k is None and not t.finished               # nothing wrong so far, only unfinished
    # Did the last edit help? The first suspect step must have moved to the right of it.
    if r.edited_steps and not incomplete and (k is None or k <= r.edited_steps[-1]):
        r.failures += 1
    if r.failures > rules.max_failures or r.tokens > rules.max_tokens_ratio * r.median_length or not t.steps:
        return "give up", 0
    if incomplete:
        return "continue", len(t.ids)
    if k is None:                                           # every step passed: only the answer is sampled
        r.edited_steps.append(len(t.steps))
        return "continue", t.steps[-1].stop
    r.edited_steps.append(k)
    return ("revise", k) if rules.revise else ("continue", t.steps[k].start)


# ---- Revision: the reader continues the step's own words

def revise_steps(model, codec, revisions: list, verifier, turn: int, rules: Rules) -> list:
    """Rewrite one step of each trajectory from its first suspect token on: greedily the first time, later at
    temperature 1. revisions: (repair, step). Returns (repair, token) pairs that the policy continues from
    that token; the others turn to their next suspect step."""
    requests, temperatures, stop_ids = [], [], []
    for r, k in revisions:
        t, step = r.trajectory, r.trajectory.steps[k]
        stem, _ = attribute.faulty_tokens(step, t.checks[k])
        prefix = verifier.context(t, k) + t.ids[step.start:stem]
        limit = len(prefix) + 16 + 2 * (step.stop - step.start)
        requests.append((t.problem, t.prompt, f"{r.key}/revise/{turn}", prefix, limit))
        temperatures.append(0.0 if r.edited_steps.count(k) == 1 else 1.0)
        stop_ids.append(() if "\n" in step.text else codec.newline_ids)
    changed, continuations = [], []
    replies = sample_on(verifier.reader, codec, requests, temperatures, stop_ids)
    for (r, k), temperature, (reply,) in zip(revisions, temperatures, replies):
        t, old, forced = r.trajectory, r.trajectory.steps[k], reply.sampled.count(0)
        stem, _ = attribute.faulty_tokens(old, t.checks[k])
        new = attribute.replace_end(t, k, stem, reply.ids[forced:], reply.logps[forced:], codec)
        written = new.steps[k].text if new else "nothing"
        r.turns.append({"what": "revise", "step": k, "before": old.text, "after": written})
        r.tokens += sum(reply.sampled)
        if new and written != old.text:
            r.trajectory, r.answer_is_current, r.num_revisions = new, False, r.num_revisions + 1
            changed.append((r, k, stem))
        elif new and temperature == 0:                      # the first choice is what stands there
            r.confirmed.add(tuple(t.ids[old.start:old.stop]))
            r.edited_steps.pop()
        else:                                               # no whole step, or again the same
            r.failures += 1
            r.edited_steps[-1] = max(0, k - 1)              # restart one step to the left
            continuations.append((r, t.steps[r.edited_steps[-1]].start))
    verifier([r.trajectory for r, _, _ in changed])
    return continuations + resume_points(model, codec, changed, rules)


def sample_on(model, codec, requests: list[tuple], temperature=1.0, stop_ids=None, group_size=1) -> list:
    """`group_size` completions for each (problem, prompt, rng key, forced prefix, length limit)."""
    if not requests:
        return []
    problems, prompts, keys, prefixes, limits = map(list, zip(*requests))
    return rollout.sample(model, problems, codec, group_size, max(limits), temperature, keys, prefixes,
                          prompts, stop_ids, limits)


# ---- Keeping and continuing

def resume_points(model, codec, changed: list, rules: Rules) -> list:
    """What survives the revision of step k from token `stem` on: all before the first later step that is
    suspect or holds an unlikely token (log w < 2 min_log_w), or before such a token of the answer, or of what
    the reader wrote after the token that was suspect: it sees the image, but not what follows from the chain.
    changed: (repair, k, stem). Returns (repair, token) pairs to be continued from that token; not those whose
    next problem is a suspect step."""
    points = []
    for (r, k, stem), log_w in zip(changed, log_weights(model, codec, [r.trajectory for r, _, _ in changed])):
        t, doubt = r.trajectory, first_doubt(r)
        end = len(t.ids) if doubt is None else t.steps[doubt].start
        token = stem + 1
        while token < end and log_w[token] >= 2 * rules.min_log_w:
            token += 1
        for step in t.steps[k + 1:]:
            if step.start <= token < step.stop:             # a later step stays whole or goes
                token = step.start
        if token < end or (doubt is None and not t.finished):
            points.append((r, token))
        elif doubt is None:
            r.answer_is_current = True
    return points


@torch.no_grad()
def log_weights(model, codec, trajectories: list) -> list[list[float]]:
    """log w = log pi(token | clean context) - log mu of each trajectory's tokens, padded on the right."""
    if not trajectories:
        return []
    prompts, rows = [t.prompt for t in trajectories], [t.ids for t in trajectories]
    logps, _, _ = rollout.completion_logps(model, codec, prompts, rows)                     # (R, T)
    old_logps, _ = rollout.pad([t.logps for t in trajectories], 0.0, device=logps.device)
    return (logps - old_logps).tolist()


def continue_sampling(model, codec, continuations: list, max_new_tokens: int, turn: int, rules: Rules):
    """Sample on in the clean context, about `rules.ahead` steps ahead, so that little is lost when the next
    is wrong. continuations: (repair, the first token to sample)."""
    todo, requests = [], []
    for r, start in continuations:
        t, step_length = r.trajectory, r.source.steps[-1].stop // len(r.source.steps)
        limit = min(max_new_tokens, start + max(8, rules.ahead * step_length))
        if start < max_new_tokens:
            requests.append((t.problem, t.prompt, f"{r.key}/go on/{turn}", t.ids[:start], limit))
            todo.append((r, start))
        else:
            r.outcome = "too long"
    for (r, start), (new,) in zip(todo, sample_on(model, codec, requests)):
        old, r.tokens = r.trajectory, r.tokens + sum(new.sampled)
        new.logps[:start], new.sampled[:start] = old.logps[:start], old.sampled[:start]
        new.steps = attribute.split_steps(new.ids, codec, attribute.style_of(r.source.text))
        r.trajectory, r.answer_is_current = new, new.finished
        kept, text = sum(step.stop <= start for step in old.steps), codec.tokenizer.decode(new.ids[start:])
        r.turns.append({"what": "continue", "step": kept, "before": "", "after": text})


# ---- What is accepted

def accept(model, codec, repairs: list, max_new_tokens: int, rules: Rules) -> list:
    """Take those that the reward verifies as templates, or note why not; returns those still at work."""
    active = [r for r in repairs if not r.outcome]
    verified = [r for r in active if r.answer_is_current and attribute.is_right(r.trajectory)]
    for r, log_w in zip(verified, log_weights(model, codec, [r.trajectory for r in verified])):
        r.outcome = rejection_reason(r, log_w, rules) or "repaired"
    confirm_guessable(model, codec, verified, max_new_tokens)
    for r in verified:
        if r.outcome == "repaired":
            r.trajectory.source = r.source
            r.trajectory.provenance = f"revised {r.num_revisions}" if r.num_revisions else "restart"
    return [r for r in active if not r.outcome]


def rejection_reason(r: Repair, log_w: list[float], rules: Rules) -> str:
    """Why a verified trajectory is not accepted as a template; "" if it is."""
    t = r.trajectory
    if reward.format_ok(r.source.text) and not reward.format_ok(t.text):
        return "not well-formed"
    if len(t.ids) > rules.max_length_ratio * r.median_length:
        return "too long"
    # Each new step, and the answer, must be likely enough to the policy.
    ends = [t.steps[0].start if t.steps else 0, *(step.stop for step in t.steps), len(t.ids)]
    for start, stop in zip(ends, ends[1:]):
        if t.ids[:stop] != r.source.ids[:stop]:             # new, or after something new
            sampled = [log_w[i] for i in range(start, stop) if t.sampled[i]]
            if sampled and sum(sampled) / len(sampled) < rules.min_log_w:
                return "too unlikely"
    return ""


def confirm_guessable(model, codec, repairs: list, max_new_tokens: int):
    """Where an answer can be guessed, the steps must lead to it again in two of three samples of the end."""
    doubtful, requests = [], []
    for r in repairs:
        t = r.trajectory
        if r.outcome == "repaired" and reward.is_guessable(t.problem.answer, t.problem.choices):
            doubtful.append(r)
            prefix = t.ids[:t.steps[-1].stop] if t.steps else []
            requests.append((t.problem, t.prompt, f"{r.key}/votes", prefix, max_new_tokens))
    for r, votes in zip(doubtful, sample_on(model, codec, requests, group_size=3)):
        r.tokens += sum(sum(t.sampled) for t in votes)
        if sum(map(attribute.is_right, votes)) < 2:
            r.outcome = "a lucky guess"


# ---- Where the results go

def rectify_groups(model, codec, groups, hard: list[int], keys: list[str], verifier, config, score):
    """Repair one failed rollout of each hard group. A rectified trajectory replaces another wrong rollout, so
    it stands beside its source and G is unchanged. score(t): its rewards. Returns groups and repairs."""
    repairs = {}                                            # by the group's number
    for n in hard:
        source = attribute.choose_source(groups[n])
        if source:
            median = sorted(len(t.ids) for t in groups[n])[len(groups[n]) // 2]
            repairs[n] = Repair(source, replace(source), f"rectify/{keys[n]}/0", median)
    rules, groups = Rules(min_log_w=config.min_log_w, revise=config.revise), list(map(list, groups))
    rectify(model, codec, list(repairs.values()), verifier, config.max_new_tokens, rules)
    for n, r in repairs.items():
        if r.outcome == "repaired":
            r.trajectory.rewards = score(r.trajectory)
            wrong = [i for i, t in enumerate(groups[n]) if not t.rewards["accuracy"] and t is not r.source]
            groups[n][wrong[-1]] = r.trajectory
    return groups, list(repairs.values())
