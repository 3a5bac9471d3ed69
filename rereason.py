"""The Re-Reasoning Loop: a failed rollout is repaired step by step against the pristine image.

Takes: groups of rollouts with steps and checks (attribute.py). Gives: groups in which a rectified trajectory
stands beside the failed one it was made of; grpo.py learns from them.

The paper says: the loop cross-references intermediate states with the pristine image, again and again, until
the trajectory is right. How is our choice:

    revise      at the first suspect step: a second turn shows the image again and asks for this step again
    keep        later steps that agree with the image and that the policy would still write
    continue    where nothing is left to keep, in the clean context; check the new steps as they come
    verify      with the reward. Wrong although every step agrees: restart where the answer's margin drops.
                A revision that failed: restart one step to the left; then the whole chain; then give up.

So a chain with several errors is repaired one at a time, at a cost of about a step each: N / p, not p^-N.
What is stored is the trajectory in the clean context, without the second turn, each token with the
probability mu it was really sampled with. Neither the gold nor the wrong answer enters a prompt: not even
the fact that the answer was wrong. Left out: repairs of rollouts that were cut off, several revisions of one
step.

Worked example: "red 4 6 / blue 3 5 / teal 9 1" with red suspect. The revision is "red 7 9": 3 tokens and the
end. The 3 take the place of tokens 1 to 3 (0 is <think>), the rest is kept, and the answer is sampled from
the first token on that no longer holds. A new rollout would have paid for the whole chain.
"""
import re
from dataclasses import dataclass, field, replace

import torch

import attribute
import reward
import rollout

HINT_LEAK = re.compile(r"\b(?:look(?:ed|ing)? (?:at the image )?again|second image|image again"
                       r"|as instructed|last step|correct(?:ed|ion)|re-?check)", re.I)
RELOOKS = ("image", "text", "none", "only")


@dataclass
class Rules:
    """When to continue and what to accept."""
    max_failures: int = 3               # failed revisions and verifications until the chain is sampled again
    max_turns: int = 32                 # loop turns at most, whatever happens
    window: int = 2                     # steps sampled ahead before they are checked
    max_tokens_ratio: float = 2.0       # tokens at most for one repair, in median lengths of the group
    max_length_ratio: float = 1.5       # length at most of a rectified trajectory, likewise
    min_log_w: float = -1.5             # mean nats a token; what the clean context finds less likely goes
    min_agree: int = 2                  # right answers needed of three where there are five options or fewer
    relook: str = "image"               # image | text (no image) | none (restarts only) | only (no restarts)


@dataclass
class Repair:
    """One rollout under repair and what became of it."""
    source: object                      # the failed Trajectory
    trajectory: object                  # the present one, with steps and checks (None = unknown)
    key: str                            # names its random numbers
    median_length: float                # of its group, tokens
    answer_is_current: bool = False     # the answer follows from the steps (False: they were edited since)
    first_edit: int = 10 ** 9           # the first token that is not the source's
    num_revisions: int = 0              # steps corrected in a second look
    failures: int = 0
    stalls: int = 0                     # times it was continued without completing a step
    tokens: int = 0                     # generated for it (what checking costs is counted by the verifier)
    regenerated: bool = False           # the whole chain was sampled again
    edited_steps: list = field(default_factory=list)    # steps (0-based) revised or restarted from, in order
    turns: list = field(default_factory=list)       # for people: what, which step, text before and after
    outcome: str = ""                   # "" = at work; "repaired"; else why it was given up


# ---- What may be asked

def relook_problem(problem, trusted: str, suspect: str, image: bool = True):
    """The second look: question and images; the trusted steps as the assistant's words; the images again and
    the suspect step, to be written again. image False: without any image."""
    trusted, suspect = trusted.replace("<image>", "< image>"), suspect.replace("<image>", "< image>")
    again = attribute.CHECK.strip() + "\n" + suspect
    if image:
        turns = [problem.question, trusted, "<image>" * len(problem.images) + again]
        return replace(problem, question=turns, images=problem.images * 2)
    return replace(problem, question=[problem.question.replace("<image>", ""), trusted, again], images=[])


def is_guessable(problem, options: int = 5) -> bool:
    """Whether a lucky answer is likely: yes/no, or few options."""
    if problem.choices and len(problem.choices) <= options:
        return True
    return problem.answer.lower() in ("yes", "no", "true", "false")


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words."""
    phrase = phrase.strip()
    return bool(phrase) and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def can_revise(t, shown_steps: list) -> bool:
    """Whether a second look is fair: its prompt must not give an answer away, right or wrong (nor "check
    this" one of two)."""
    shown = "\n".join(step.text for step in shown_steps)
    own = reward.extract_answer(t.text, t.problem.choices) or ""
    if is_guessable(t.problem, options=2):
        return False
    return not contains_phrase(shown, t.problem.answer) and not contains_phrase(shown, own)


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
        rewrites, continuations = [], []
        for r in active:
            action, where = next_action(r, model, codec, rules)
            if action == "give up":
                r.outcome = "given up"
            elif action == "continue":
                continuations.append((r, where))
            else:
                rewrites.append((r, action, where))
        continuations += rewrite_steps(model, codec, rewrites, turn, rules)
        continue_sampling(model, codec, continuations, max_new_tokens, turn, rules)
    for r in repairs:
        r.outcome = r.outcome or "too many turns"


def next_action(r: Repair, model, codec, rules: Rules) -> tuple[str, int]:
    """What to do next with one trajectory: ("revise" or "resample", a step), ("continue", a token), ("give
    up", 0)."""
    t = r.trajectory
    k = attribute.first_suspect(t.checks)                   # None: every step passed its check
    incomplete = k is None and not t.finished               # nothing wrong so far, only unfinished

    # Did the last edit help? The first suspect step must have moved to the right of it.
    if r.edited_steps and not incomplete and (k is None or k <= r.edited_steps[-1]):
        r.failures += 1
    out_of_tries = r.failures > rules.max_failures
    may_revise = k is not None and can_revise(t, t.steps[:k + 1])

    if r.tokens > rules.max_tokens_ratio * r.median_length or (out_of_tries and r.regenerated):
        return "give up", 0
    if rules.relook == "only" and (r.failures > 0 or not (may_revise or incomplete)):
        return "give up", 0
    if incomplete:
        return "continue", len(t.ids)
    if out_of_tries or not t.steps:                         # the last try: a new completion
        r.regenerated = True
        r.edited_steps.append(-1)
        return "continue", 0
    if k is None:                                           # every step passed, yet the answer is wrong
        if attribute.answer_margins(model, codec, [t], last=True)[0][0] > 0:
            r.edited_steps.append(len(t.steps))         # the steps imply the gold: only the answer is sampled
            return "continue", t.steps[-1].stop
        k = attribute.largest_margin_drop(attribute.answer_margins(model, codec, [t])[0])
        may_revise = False                                  # a slip of reasoning: the image would not help
    r.edited_steps.append(k)
    if may_revise and rules.relook != "none":
        return "revise", k
    multi_line = "\n" in t.steps[k].text
    return ("continue", t.steps[k].start) if multi_line else ("resample", k)


def rewrite_steps(model, codec, rewrites: list, turn: int, rules: Rules) -> list:
    """Write one step of each trajectory again: "revise" in a second look, "resample" in the clean context.
    rewrites: (repair, action, step). Returns (repair, token) pairs to be continued from that token; the
    others turn to their next suspect step."""
    revised, continuations = [], []
    for action in ("revise", "resample"):
        part, requests = [], []
        for r, what, k in rewrites:
            if what == action:
                part.append((r, k))
                requests.append(rewrite_request(r, k, action, turn, codec, rules))
        stop_ids = () if action == "revise" else codec.newline_ids
        replies = sample_one_each(model, codec, requests, stop_ids)
        for (r, k), reply in zip(part, replies):
            start = len(reply.ids) - sum(reply.sampled)     # after the forced prefix
            r.tokens += sum(reply.sampled)
            if take_reply(r, k, action, reply.ids[start:], reply.logps[start:], codec):
                revised.append((r, k))
            elif rules.relook != "only":                    # nothing new: restart one step to the left
                continuations.append((r, r.trajectory.steps[r.edited_steps[-1]].start))
    return continuations + resume_points(model, codec, revised, rules)


def rewrite_request(r: Repair, k: int, action: str, turn: int, codec, rules: Rules) -> tuple:
    """What to sample to write step k again: (problem, prompt, rng key, forced prefix, length limit)."""
    t, step = r.trajectory, r.trajectory.steps[k]
    length = 16 + 2 * (step.stop - step.start)
    prefix = t.ids[:step.start]
    if action == "resample":
        return t.problem, t.prompt, f"{r.key}/redo/{turn}", prefix, len(prefix) + length
    trusted = codec.tokenizer.decode(prefix)
    problem = relook_problem(t.problem, trusted, step.text, rules.relook != "text")
    return problem, rollout.with_images_of(t.prompt, problem, codec), f"{r.key}/look/{turn}", [], length


def take_reply(r: Repair, k: int, action: str, ids: list, logps: list, codec) -> bool:
    """Put the step that a reply begins with in the place of step k; False where it holds none that may stand
    there."""
    t, old = r.trajectory, r.trajectory.steps[k]
    text, length = parse_step(ids, "\n" in old.text, codec)
    r.turns.append({"what": action, "step": k, "before": old.text, "after": text or "nothing"})
    gold, is_last = t.problem.answer, k + 1 == len(t.steps)
    leaks = not is_last and contains_phrase(text, gold) and not contains_phrase(old.text, gold)
    if not text or text == old.text or HINT_LEAK.search(text) or leaks:
        r.failures += 1
        r.edited_steps[-1] = max(0, k - 1)
        return False
    if action == "revise":
        r.num_revisions += 1
    replace_step(r, k, ids[:length], logps[:length], text, codec)
    return True


def parse_step(ids: list, several_lines: bool, codec) -> tuple[str, int]:
    """The step that a reply begins with, and of how many tokens: to the end of its line (or of the reply,
    where the suspect step had several lines) or a closing tag. ("", 0) where none ends at the end of a
    token."""
    text, offsets = attribute.text_and_offsets(ids, codec)
    ends = []
    if "</" in text:
        ends.append(text.find("</"))
    first_character = len(text) - len(text.lstrip())
    if not several_lines and "\n" in text[first_character:]:
        ends.append(text.find("\n", first_character))
    if ids and ids[-1] in codec.eos_ids:
        ends.append(offsets[-1])
    if not ends:
        return "", 0
    end = min(ends)
    length = sum(offset < end for offset in offsets)
    after = text[end:offsets[length] if length < len(ids) else len(text)]
    return ("", 0) if after.strip() else (text[:end].strip(), length)


def sample_one_each(model, codec, requests: list[tuple], stop_ids: tuple = ()) -> list:
    """One completion for each (problem, prompt, rng key, forced prefix, length limit)."""
    if not requests:
        return []
    problems, prompts, keys, prefixes, limits = map(list, zip(*requests))
    groups = rollout.sample(model, problems, codec, 1, max(limits), 1.0, keys, prefixes, prompts, stop_ids,
                            limits)
    return sum(groups, [])


def replace_step(r: Repair, k: int, new_ids: list, new_logps: list, text: str, codec):
    """Replace step k by sampled tokens. The line break after it is kept as it was sampled; if it was part of
    a word's token, a forced one is inserted."""
    t, old = r.trajectory, r.trajectory.steps[k]
    tail = old.stop                                         # where the white space at the step's end begins
    while tail > old.start and not codec.tokenizer.decode([t.ids[tail - 1]]).strip():
        tail -= 1
    ids, logps, sampled = list(new_ids), list(new_logps), [1] * len(new_ids)
    if "\n" in codec.tokenizer.decode(new_ids[-1:]):
        tail = old.stop                                     # the new step brings its own
    elif tail == old.stop and k + 1 < len(t.steps):
        newline = rollout.token_ids("\n", codec)
        ids, logps, sampled = ids + newline, logps + [0.0] * len(newline), sampled + [0] * len(newline)

    def splice(old_values, new_values):
        return old_values[:old.start] + new_values + old_values[tail:]

    shift = len(ids) - (tail - old.start)
    steps = t.steps[:k] + [attribute.Step(old.start, old.stop + shift, text)]
    steps += [attribute.Step(s.start + shift, s.stop + shift, s.text) for s in t.steps[k + 1:]]
    r.trajectory = replace(t, ids=splice(t.ids, ids), logps=splice(t.logps, logps),
                           sampled=splice(t.sampled, sampled), steps=steps,
                           checks=t.checks[:k] + [None] + t.checks[k + 1:])     # the new one is unknown
    r.answer_is_current = False
    r.first_edit = min(r.first_edit, old.start)


def resume_points(model, codec, revised: list, rules: Rules) -> list:
    """Which later steps survive the correction of step k: those before the first that is unknown, suspect or
    holds an unlikely token (log w < 2 min_log_w). revised: (repair, k) pairs. Returns (repair, token) pairs
    to be continued from that token; not those whose next problem is a suspect step."""
    points = []
    log_ws = log_weights(model, codec, [r.trajectory for r, _ in revised])
    for (r, k), log_w in zip(revised, log_ws):
        t = r.trajectory
        likely = [w >= 2 * rules.min_log_w for w in log_w]
        for step, check in zip(t.steps[k + 1:], t.checks[k + 1:]):
            if check is not None and check.is_suspect:
                break                                       # revise there next
            if check is None or not all(likely[step.start:step.stop]):
                points.append((r, step.start))
                break
        else:                                               # all survive: keep what survives of the answer
            token = t.steps[-1].stop
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
    """Sample on in the clean context, about `rules.window` steps ahead, so that little is lost when the next
    is wrong. continuations: (repair, the first token to sample). A step that is not complete yet is cut off
    again."""
    todo, requests = [], []
    for r, start in continuations:
        if start >= max_new_tokens:
            r.outcome = "too long"
            continue
        t, step_length = r.trajectory, r.source.steps[-1].stop // len(r.source.steps)
        limit = min(max_new_tokens, start + 2 ** r.stalls * max(8, rules.window * step_length))
        requests.append((t.problem, t.prompt, f"{r.key}/go on/{turn}", t.ids[:start], limit))
        todo.append((r, start))
    for (r, start), new in zip(todo, sample_one_each(model, codec, requests)):
        old = r.trajectory
        r.tokens += sum(new.sampled)
        num_kept = sum(step.stop <= start for step in old.steps)
        text = codec.tokenizer.decode(new.ids[start:])
        r.turns.append({"what": "continue", "step": num_kept, "before": "", "after": text})
        new.logps[:start], new.sampled[:start] = old.logps[:start], old.sampled[:start]
        new.steps = attribute.split_steps(new.ids, codec)
        if not new.finished and new.steps and new.steps[-1].stop == len(new.ids):
            stop = new.steps.pop().start                    # not complete yet
            new.ids, new.logps, new.sampled = new.ids[:stop], new.logps[:stop], new.sampled[:stop]
        r.stalls = r.stalls + 1 if len(new.ids) <= start else 0
        known = {}
        for step, check in zip(old.steps[:num_kept], old.checks):
            known[step.start, step.text] = check
        new.checks = [known.get((step.start, step.text)) for step in new.steps]
        r.trajectory, r.answer_is_current = new, new.finished
        r.first_edit = min(r.first_edit, start)


# ---- What is accepted

def accept(model, codec, repairs: list, max_new_tokens: int, rules: Rules):
    """Take verified trajectories as templates, or note why not."""
    for r, log_w in zip(repairs, log_weights(model, codec, [r.trajectory for r in repairs])):
        r.outcome = rejection_reason(r, log_w, rules)
    confirm_guessable(model, codec, [r for r in repairs if not r.outcome], max_new_tokens, rules)
    for r in repairs:
        if not r.outcome:
            t, r.outcome = r.trajectory, "repaired"
            t.source, t.shared_prefix_len = r.source, r.first_edit
            t.provenance = f"relook {r.num_revisions}" if r.num_revisions else "restart"
            if r.edited_steps and r.edited_steps[-1] == -1:
                t.provenance = "regenerated"


def rejection_reason(r: Repair, log_w: list[float], rules: Rules) -> str:
    """Why a verified trajectory is not accepted as a template; "" if it is."""
    t = r.trajectory
    if reward.format_ok(r.source.text) and not reward.format_ok(t.text):
        return "not well-formed"
    if len(t.ids) > rules.max_length_ratio * r.median_length:
        return "too long"
    if HINT_LEAK.search(t.text) and not HINT_LEAK.search(r.source.text):
        return "talks of the hint"
    # Each new step, and the answer, must be likely enough without the second look.
    answer_start = t.steps[-1].stop if t.steps else 0
    for start, stop in [(s.start, s.stop) for s in t.steps] + [(answer_start, len(t.ids))]:
        if stop <= r.first_edit:                            # copied from the source
            continue
        sampled = [log_w[i] for i in range(start, stop) if t.sampled[i]]
        if sampled and sum(sampled) / len(sampled) < rules.min_log_w:
            return "too unlikely"
    return ""


def confirm_guessable(model, codec, repairs: list, max_new_tokens: int, rules: Rules):
    """Where an answer can be guessed, the steps must lead to it again and again: its end is sampled three
    times."""
    doubtful, prefixes = [r for r in repairs if is_guessable(r.trajectory.problem)], []
    if not doubtful:
        return
    for r in doubtful:
        t = r.trajectory
        prefixes += [t.ids[:t.steps[-1].stop] if t.steps else []] * 3
    problems, prompts = [r.trajectory.problem for r in doubtful], [r.trajectory.prompt for r in doubtful]
    keys = [f"{r.key}/votes" for r in doubtful]
    groups = rollout.sample(model, problems, codec, 3, max_new_tokens, 1.0, keys, prefixes, prompts)
    for r, group in zip(doubtful, groups):
        r.tokens += sum(sum(t.sampled) for t in group)
        if sum(map(attribute.is_right, group)) < rules.min_agree:
            r.outcome = "a lucky guess"


# ---- Which rollouts of a batch are rectified, and where the results go

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


def choose_source(group: list):
    """The failed rollout that is easiest to repair: the fewest suspect steps, the first of them as late as
    possible; None where no failure can be located."""
    def difficulty(t):
        suspects = sum(check is not None and check.is_suspect for check in t.checks)
        return suspects, -(attribute.first_suspect(t.checks) or 0)

    return min(attribute.locatable_failures(group), key=difficulty, default=None)


def rectify_groups(model, codec, groups, hard: list[int], keys: list[str], verifier, config, score):
    """Repair one failed rollout of each hard group. A rectified trajectory replaces another wrong rollout,
    so it stands beside its source and G is unchanged. score(t): its rewards. Returns the groups and all
    repairs."""
    repairs, group_of_repair = [], []
    for n in hard:
        source = choose_source(groups[n])
        if source:
            median = sorted(len(t.ids) for t in groups[n])[len(groups[n]) // 2]
            repairs.append(Repair(source, replace(source), f"rectify/{keys[n]}/0", median))
            group_of_repair.append(n)
    rules = Rules(min_log_w=config.min_log_w, relook=config.relook)
    rectify(model, codec, repairs, verifier, config.max_new_tokens, rules)
    groups = [list(group) for group in groups]
    for n, r in zip(group_of_repair, repairs):
        if r.outcome == "repaired":
            r.trajectory.rewards = score(r.trajectory)
            group = groups[n]
            others = [i for i, t in enumerate(group) if t.rewards["accuracy"] == 0 and t is not r.source]
            group[others[-1]] = r.trajectory
    return groups, repairs
