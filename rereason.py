"""The Re-Reasoning Loop: a failed rollout is repaired step by step against the pristine image.

Takes: groups of rollouts with steps and checks, and the verifier with its reader (attribute.py). Gives:
groups in which a rectified trajectory stands beside the failed one it was made of; grpo.py learns from them.

The paper says: the loop cross-references intermediate states with the pristine image, again and again, until
the trajectory is right. How is our choice:

    revise      at the first suspect step: the reader, which sees the image without the chain, continues the
                step's own words from the first suspect token to the end of the step; greedily, then sampled
    keep        later steps that agree with the image and that the policy would still write
    continue    where nothing is left to keep, in the clean context; check the new steps as they come
    verify      with the reward. Wrong although every step agrees: the reader rewrites the step where the
                answer's margin drops, the second time the policy restarts there. A revision that says
                nothing new: restart one step to the left. After some failures: give up

So a chain with several errors is repaired one at a time, for a few tokens each: N / p, not p^-N. Each token
keeps the probability mu it was sampled with, by the model and in the context it came from. Nothing is
prompted, so no answer can leak. Left out: repairs of rollouts that were cut off.

Worked example: "red 4 6 / blue 3 5 / teal 9 1", of which the 4 is suspect. After "<think>red" the reader
writes "7 9" and a line break: they take the place of "4 6", the rest is kept, and the answer is sampled from
the first token on that no longer holds. A new rollout would have paid for the whole chain.
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
    min_agree: int = 2                  # right answers needed of three where an answer can be guessed
    revise: bool = True                 # False: restarts only


@dataclass
class Repair:
    """One rollout under repair and what became of it."""
    source: object                      # the failed Trajectory
    trajectory: object                  # the present one, with steps and checks
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
    """Repair failed rollouts side by side, in place: where `outcome` ends as "repaired", `trajectory` is
    rectified."""
    for turn in range(rules.max_turns + 1):
        active = [r for r in repairs if not r.outcome]
        verified = [r for r in active if r.answer_is_current and attribute.is_right(r.trajectory)]
        accept(model, codec, verified, max_new_tokens, rules)
        active = [r for r in active if not r.outcome]
        if not active or turn == rules.max_turns:
            break
        verifier([r.trajectory for r in active])
        revisions, continuations = [], []
        for r in active:
            action, where = next_action(r, model, codec, rules)
            if action == "give up":
                r.outcome = "given up"
            elif action == "continue":
                continuations.append((r, where))
            else:
                revisions.append((r, where))
        continuations += revise_steps(model, codec, revisions, verifier, turn, rules)
        continue_sampling(model, codec, continuations, max_new_tokens, turn, rules)
    for r in repairs:
        r.outcome = r.outcome or "too many turns"


def first_doubt(r: Repair) -> int | None:
    """The first suspect step that the reader has not written itself."""
    t = r.trajectory
    for k, (step, check) in enumerate(zip(t.steps, t.checks)):
        if check.is_suspect and tuple(t.ids[step.start:step.stop]) not in r.confirmed:
            return k
    return None


def next_action(r: Repair, model, codec, rules: Rules) -> tuple[str, int]:
    """What to do next with one trajectory: ("revise", a step), ("continue", a token), ("give up", 0)."""
    t, k = r.trajectory, first_doubt(r)                     # k None: every step passed its check
    incomplete = k is None and not t.finished               # nothing wrong so far, only unfinished

    # Did the last edit help? The first suspect step must have moved to the right of it.
    if r.edited_steps and not incomplete and (k is None or k <= r.edited_steps[-1]):
        r.failures += 1

    too_costly = r.tokens > rules.max_tokens_ratio * r.median_length
    if too_costly or r.failures > rules.max_failures or not t.steps:
        return "give up", 0
    if incomplete:
        return "continue", len(t.ids)
    if k is None:                                           # every step passed, yet the answer is wrong
        if attribute.answer_margins(model, codec, [t], last=True)[0][0] > 0:
            r.edited_steps.append(len(t.steps))         # the steps imply the gold: only the answer is sampled
            return "continue", t.steps[-1].stop
        k = attribute.largest_margin_drop(attribute.answer_margins(model, codec, [t])[0])
        if k in r.edited_steps:                             # not the image: a slip of reasoning
            r.edited_steps.append(k)
            return "continue", t.steps[k].start
    r.edited_steps.append(k)
    return ("revise", k) if rules.revise else ("continue", t.steps[k].start)


# ---- Revision: the reader continues the step's own words

def revise_steps(model, codec, revisions: list, verifier, turn: int, rules: Rules) -> list:
    """Rewrite one step of each trajectory from its first suspect token on: greedily the first time; later,
    and where A2 alone doubts, at temperature 1. revisions: (repair, step). Returns (repair, token) pairs that
    the policy continues from that token; the others turn to their next suspect step."""
    calls, changed, continuations = {}, [], []
    for r, k in revisions:
        t, step, check = r.trajectory, r.trajectory.steps[k], r.trajectory.checks[k]
        stem = step.start + (check.token or 0)
        prefix = verifier.context(t, k) + t.ids[step.start:stem]
        limit = len(prefix) + 16 + 2 * (step.stop - step.start)
        request = t.problem, t.prompt, f"{r.key}/revise/{turn}", prefix, limit
        temperature = 0.0 if check.is_suspect and r.edited_steps.count(k) == 1 else 1.0
        stop_ids = () if "\n" in step.text else codec.newline_ids
        calls.setdefault((temperature, stop_ids), []).append((r, k, stem, request))
    for (temperature, stop_ids), part in calls.items():
        requests = [request for *_, request in part]
        replies = sample_one_each(verifier.reader, codec, requests, temperature, stop_ids)
        for (r, k, stem, _), reply in zip(part, replies):
            r.tokens += sum(reply.sampled)
            outcome = take_revision(r, k, stem, reply, temperature == 0, codec)
            if outcome == "changed":
                changed.append((r, k))
            elif outcome == "nothing new":                  # restart one step to the left
                r.failures += 1
                r.edited_steps[-1] = max(0, k - 1)
                continuations.append((r, r.trajectory.steps[r.edited_steps[-1]].start))
    verifier([r.trajectory for r, _ in changed])
    return continuations + resume_points(model, codec, changed, rules)


def take_revision(r: Repair, k: int, stem: int, reply, greedy: bool, codec) -> str:
    """Put what the reader wrote in the place of step k from token `stem` on: "changed"; "confirmed" where its
    first choice is what stands there; "nothing new" where it wrote no whole step, or again the same."""
    t, old, forced = r.trajectory, r.trajectory.steps[k], len(reply.ids) - sum(reply.sampled)
    new = attribute.replace_end(t, k, stem, reply.ids[forced:], reply.logps[forced:], codec)
    written = new.steps[k].text if new else "nothing"
    r.turns.append({"what": "revise", "step": k, "before": old.text, "after": written})
    if written == old.text and greedy:
        r.confirmed.add(tuple(t.ids[old.start:old.stop]))
        r.edited_steps.pop()
        return "confirmed"
    if not new or written == old.text:
        return "nothing new"
    r.num_revisions += 1
    r.trajectory, r.answer_is_current = new, False
    return "changed"


def sample_one_each(model, codec, requests: list[tuple], temperature: float = 1.0, stop_ids=()) -> list:
    """One completion for each (problem, prompt, rng key, forced prefix, length limit)."""
    if not requests:
        return []
    problems, prompts, keys, prefixes, limits = map(list, zip(*requests))
    groups = rollout.sample(model, problems, codec, 1, max(limits), temperature, keys, prefixes, prompts,
                            stop_ids, limits)
    return sum(groups, [])


# ---- Keeping and continuing

def resume_points(model, codec, changed: list, rules: Rules) -> list:
    """Which later steps survive the revision of step k: those before the first that is suspect or holds an
    unlikely token (log w < 2 min_log_w). changed: (repair, k) pairs. Returns (repair, token) pairs to be
    continued from that token; not those whose next problem is a suspect step."""
    points = []
    log_ws = log_weights(model, codec, [r.trajectory for r, _ in changed])
    for (r, k), log_w in zip(changed, log_ws):
        t, doubt = r.trajectory, first_doubt(r)
        likely = [w >= 2 * rules.min_log_w for w in log_w]
        for later in range(k + 1, len(t.steps) if doubt is None else doubt):
            step = t.steps[later]
            if not all(likely[step.start:step.stop]):
                points.append((r, step.start))
                break
        else:
            if doubt is not None:                           # revise there next
                continue
            token = t.steps[-1].stop                        # all survive: keep what survives of the answer
            while token < len(t.ids) and likely[token]:
                token += 1
            if token == len(t.ids) and t.finished:
                r.answer_is_current = True
            else:
                points.append((r, token))
    return points


@torch.no_grad()
def log_weights(model, codec, trajectories: list) -> list[list[float]]:
    """log w = log pi(token | clean context) - log mu of every token of each trajectory."""
    if not trajectories:
        return []
    logps, _, _ = rollout.completion_logps(model, codec, [t.prompt for t in trajectories],
                                           [t.ids for t in trajectories])
    log_ws = []
    for t, row in zip(trajectories, logps.tolist()):
        log_ws.append([new - old for new, old in zip(row, t.logps)])
    return log_ws


def continue_sampling(model, codec, continuations: list, max_new_tokens: int, turn: int, rules: Rules):
    """Sample on in the clean context, about `rules.ahead` steps ahead, so that little is lost when the next
    is wrong. continuations: (repair, the first token to sample)."""
    todo, requests = [], []
    for r, start in continuations:
        if start >= max_new_tokens:
            r.outcome = "too long"
            continue
        t, step_length = r.trajectory, r.source.steps[-1].stop // len(r.source.steps)
        limit = min(max_new_tokens, start + max(8, rules.ahead * step_length))
        requests.append((t.problem, t.prompt, f"{r.key}/go on/{turn}", t.ids[:start], limit))
        todo.append((r, start))
    for (r, start), new in zip(todo, sample_one_each(model, codec, requests)):
        old, r.tokens = r.trajectory, r.tokens + sum(new.sampled)
        new.logps[:start], new.sampled[:start] = old.logps[:start], old.sampled[:start]
        new.steps = attribute.split_steps(new.ids, codec, attribute.style_of(r.source.text))
        r.trajectory, r.answer_is_current = new, new.finished
        kept, text = sum(step.stop <= start for step in old.steps), codec.tokenizer.decode(new.ids[start:])
        r.turns.append({"what": "continue", "step": kept, "before": "", "after": text})


# ---- What is accepted

def accept(model, codec, repairs: list, max_new_tokens: int, rules: Rules):
    """Take verified trajectories as templates, or note why not."""
    for r, log_w in zip(repairs, log_weights(model, codec, [r.trajectory for r in repairs])):
        r.outcome = rejection_reason(r, log_w, rules)
    confirm_guessable(model, codec, [r for r in repairs if not r.outcome], max_new_tokens, rules)
    for r in repairs:
        if not r.outcome:
            t, r.outcome = r.trajectory, "repaired"
            t.source = r.source
            t.provenance = f"revised {r.num_revisions}" if r.num_revisions else "restart"


def rejection_reason(r: Repair, log_w: list[float], rules: Rules) -> str:
    """Why a verified trajectory is not accepted as a template; "" if it is."""
    t = r.trajectory
    if reward.format_ok(r.source.text) and not reward.format_ok(t.text):
        return "not well-formed"
    if len(t.ids) > rules.max_length_ratio * r.median_length:
        return "too long"
    # Each new step, and the answer, must be likely enough to the policy.
    answer_start, copied = t.steps[-1].stop if t.steps else 0, 0
    while t.ids[copied:copied + 1] == r.source.ids[copied:copied + 1] != []:
        copied += 1
    for start, stop in [(s.start, s.stop) for s in t.steps] + [(answer_start, len(t.ids))]:
        if stop <= copied:
            continue
        sampled = [log_w[i] for i in range(start, stop) if t.sampled[i]]
        if sampled and sum(sampled) / len(sampled) < rules.min_log_w:
            return "too unlikely"
    return ""


def confirm_guessable(model, codec, repairs: list, max_new_tokens: int, rules: Rules):
    """Where an answer can be guessed, the steps must lead to it again and again: its end is sampled three
    times."""
    doubtful, prefixes = [], []
    for r in repairs:
        t = r.trajectory
        if reward.is_guessable(t.problem.answer, t.problem.choices):
            doubtful.append(r)
            prefixes += [t.ids[:t.steps[-1].stop] if t.steps else []] * 3
    if not doubtful:
        return
    problems, prompts = [r.trajectory.problem for r in doubtful], [r.trajectory.prompt for r in doubtful]
    keys = [f"{r.key}/votes" for r in doubtful]
    groups = rollout.sample(model, problems, codec, 3, max_new_tokens, 1.0, keys, prefixes, prompts)
    for r, group in zip(doubtful, groups):
        r.tokens += sum(sum(t.sampled) for t in group)
        if sum(map(attribute.is_right, group)) < rules.min_agree:
            r.outcome = "a lucky guess"


# ---- Where the results go

def rectify_groups(model, codec, groups, hard: list[int], keys: list[str], verifier, config, score):
    """Repair one failed rollout of each hard group. A rectified trajectory replaces another wrong rollout,
    so it stands beside its source and G is unchanged. score(t): its rewards. Returns the groups and all
    repairs."""
    repairs, group_of_repair = [], []
    for n in hard:
        source = attribute.choose_source(groups[n])
        if source:
            median = sorted(len(t.ids) for t in groups[n])[len(groups[n]) // 2]
            repairs.append(Repair(source, replace(source), f"rectify/{keys[n]}/0", median))
            group_of_repair.append(n)
    rules = Rules(min_log_w=config.min_log_w, revise=config.revise)
    rectify(model, codec, repairs, verifier, config.max_new_tokens, rules)
    groups = [list(group) for group in groups]
    for n, r in zip(group_of_repair, repairs):
        if r.outcome == "repaired":
            r.trajectory.rewards = score(r.trajectory)
            group = groups[n]
            others = [i for i, t in enumerate(group) if t.rewards["accuracy"] == 0 and t is not r.source]
            group[others[-1]] = r.trajectory
    return groups, repairs
