"""Other answers to "at which step was the image lost?", and how well each finds the first wrong step.

    python experiments/localisers.py --data tiny:steps=3-12 --flawed 2000 --out runs/localisers.json

Takes: a checkpoint, policy and reader in one, and a spec of the embedded tasks, whose step oracle knows the
truth. Gives: three tables, with --out also every rollout as JSON; and `Verifier` subclasses for
`train.Trainer.verifier_class`.

    A1 re-reading    attribute.py's: what the reader, without the chain, finds far less likely
    A2 margin        log p(gold) - log p(own answer) after each step: its largest drop
    A3 dependence    KL(pi(. | image) || pi(. | image with patches dropped)) of each token, by steps
    A4 Monte Carlo   whether any of 4 restarts after a step is right, by binary search over the steps

The paper says that a step-level attribution inside the multimodal context finds where the image was lost;
all signals are our choice. The gold answer only scores (A2, A4). Sources: A3 is VPPO's token dependency (KL;
the mean of the most dependent 40 %), A4 OmegaPRM's search (arXiv 2406.06592). Left out: mixtures of signals
other than "A1, else A2".

Worked example: a chain of four steps whose gaps are 0.1, 0.3, 2.9 and 1.2 nats. The first above 0.5 is the
third: the fault is there. If the truth is the fourth, that is no exact hit, but one within one step; its
error is -1.
"""
import json
import random
import sys
import zlib
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attribute  # noqa: E402
import rereason  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from attribute import Check  # noqa: E402
from eval import figure, percent  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from model import load_model  # noqa: E402
from reward import extract_answer, reward_parts  # noqa: E402
from tiny import shapes  # noqa: E402

KINDS = ("eroded", "misread", "reasoning")
WRONG = 3.0                             # nats; the gap of a step that is said to be wrong


# ------------------------------------------------------------------------------------------------------------
# Signals


@torch.no_grad()
def answer_margins(model, codec, trajectories: list, budget: int = 32768) -> list[list[float]]:
    """A2. For each trajectory the margins M_0 .. M_T: mean log-prob of the gold answer minus that of its own
    answer, teacher-forced after the first k steps and the cue that opens an answer. Positive: from there the
    policy would still prefer the right answer."""
    margins, where, prompts, rows = [], [], [], []
    for t in trajectories:
        cue = rollout.token_ids("</think><answer>" if "<think>" in t.text else "\nThe answer is ", codec)
        own = extract_answer(t.text, t.problem.choices) or ""
        ends = [step.start for step in t.steps] + [t.steps[-1].stop]
        margins.append([0.0] * len(ends))
        for sign, text in ((1, t.problem.answer), (-1, own)):
            answer = rollout.token_ids(rollout.escape_special(text, codec), codec)
            for k, end in enumerate(ends):
                where.append((margins[-1], k, sign, len(answer)))
                prompts.append(t.prompt)
                rows.append(t.ids[:end] + cue + answer)
    for batch in rollout.token_batches(list(map(len, rows)), budget):
        part = slice(batch.start, batch.stop)
        logps, _, mask = rollout.completion_logps(model, codec, prompts[part], rows[part])
        for (own_margins, k, sign, n), row, length in zip(where[part], logps.tolist(), mask.sum(1).tolist()):
            own_margins[k] += sign * sum(row[length - n:length]) / max(1, n)
    return margins


def largest_margin_drop(margins: list[float]) -> int:
    """The step (0-based) with the largest drop of the margin; of equal ones the first."""
    drops = [before - after for before, after in zip(margins, margins[1:])]
    return drops.index(max(drops))


def no_return(margins: list[float]) -> int:
    """A2's other reading: the step (0-based) from which on the margin stays negative; the last if it never
    does."""
    k = len(margins)
    while k > 0 and margins[k - 1] < 0:
        k -= 1
    return len(margins) - 2 if k == len(margins) else max(0, k - 1)


def drop_patches(prompt, merge: int, share: float, rng: torch.Generator):
    """The prompt with a random share of its image patches replaced by the mean colour. Whole merged patches
    of merge x merge go, else what is left of each would still tell."""
    if prompt.pixel_values is None:
        return prompt
    blocks = prompt.pixel_values.view(-1, merge ** 2, prompt.pixel_values.shape[1])
    keep = torch.rand(len(blocks), generator=rng) >= share
    return replace(prompt, pixel_values=(blocks * keep[:, None, None]).view_as(prompt.pixel_values))


def divergence(hidden, other, head_weight) -> torch.Tensor:
    """KL between what two hidden states (N, D) predict -> (N,); at most (1024, V) logits at a time."""
    found = []
    for p, q in zip(hidden.split(1024), other.split(1024)):
        p = F.linear(p, head_weight).float().log_softmax(-1)
        q = F.linear(q, head_weight).float().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


@torch.no_grad()
def visual_dependence(model, codec, trajectories: list, share: float = 0.6, masks: int = 4,
                      budget: int = 32768) -> list[list[float]]:
    """A3. For each trajectory and each token: how much what comes there depends on the image, KL(pi(. |
    image) || pi(. | masked image)) in nats, the mean over `masks` random masks. Zeros without images."""
    dependences = []
    for batch in rollout.token_batches([len(t.ids) for t in trajectories], budget):
        part, rngs, total = trajectories[batch.start:batch.stop], {}, 0.0
        for t in part:                                      # a problem's masks are its own
            rngs[t.problem.id] = torch.Generator().manual_seed(zlib.crc32(t.problem.id.encode()))
        ids = [t.ids for t in part]
        clean, _, real = rollout.completion_hidden(model, [t.prompt for t in part], ids, codec.pad_id)
        for _ in range(masks):
            blind = {}
            for t in part:
                name = t.problem.id
                if name not in blind:
                    blind[name] = drop_patches(t.prompt, codec.image_config.merge_size, share, rngs[name])
            masked, _, _ = rollout.completion_hidden(model, [blind[t.problem.id] for t in part], ids,
                                                     codec.pad_id)
            total = total + divergence(clean[real], masked[real], model.head_weight) / masks
        for values in total.split(list(map(len, ids))):
            dependences.append(values.tolist())
    return dependences


def step_dependence(dependence: list[float], steps: list, top: float = 0.4) -> list[float]:
    """Per step the mean of its most dependent tokens (the `top` share, at least one): few are visual."""
    means = []
    for step in steps:
        values = sorted(dependence[step.start:step.stop], reverse=True)
        values = values[:max(1, round(top * len(values)))]
        means.append(sum(values) / len(values))
    return means


def erosion(by_step: list[float], k: int) -> float:
    """How far step k (0-based) fell below a step before it: (max_{j <= k} E_j - E_k) / (std E + 0.1)."""
    std = torch.tensor(by_step).std(unbiased=False).item()
    return (max(by_step[:k + 1]) - by_step[k]) / (std + 0.1)


def most_eroded(dependence: list[float], steps: list) -> int:
    """A3 as a localiser: the step (0-based) that fell furthest; of equal ones the first."""
    by_step = step_dependence(dependence, steps)
    falls = [erosion(by_step, k) for k in range(len(steps))]
    return falls.index(max(falls))


def monte_carlo(model, codec, trajectories: list, max_new_tokens: int = 320, restarts: int = 4,
                key: str = "monte carlo") -> tuple[list[int], int]:
    """A4. For each trajectory the step (0-based) at which its chance of success dies, and the tokens
    generated to find out. Restarts after `alive` steps succeed, after `dead` steps none does: after no step,
    and after all steps, that is taken for granted. All trajectories side by side."""
    alive, dead, tokens = [0] * len(trajectories), [len(t.steps) for t in trajectories], 0
    while True:
        asked, requests = [], []
        for n, t in enumerate(trajectories):
            middle = (alive[n] + dead[n]) // 2
            if middle == alive[n]:
                continue
            prefix = t.ids[:t.steps[middle].start]
            asked.append(n)
            requests.append((t.problem, t.prompt, f"{key}/{t.problem.id}/{prefix}", prefix, max_new_tokens))
        if not asked:
            return alive, tokens
        groups = rereason.sample_on(model, codec, requests, group_size=restarts)
        for n, group in zip(asked, groups):
            bound = alive if any(map(attribute.is_right, group)) else dead
            bound[n] = (alive[n] + dead[n]) // 2
            for t in group:
                tokens += sum(t.sampled)


@dataclass
class Fault:
    """Where a rollout went wrong: its first step at fault (0-based), and the kind."""
    step: int
    kind: str                           # one of KINDS


def localise(checks: list, margins: list[float] | None = None, dependence: list[float] | None = None,
             steps: list | None = None) -> Fault:
    """A1's first suspect step; without one, the step with the largest drop of A2's margin (the last step
    without margins). Kind by A3 (with steps): reasoning where no step is suspect, or where the faulty token
    hardly depends on the image; else eroded where the dependence of the step fell (`erosion` > 1); else
    misread."""
    k = attribute.first_suspect(checks)
    if k is None:
        step = largest_margin_drop(margins) if margins else len(checks) - 1
        return Fault(step, "reasoning")
    kind = "misread"
    if dependence is not None:
        start, stop = attribute.faulty_tokens(steps[k], checks[k])
        if max(dependence[start:stop]) <= 0.05 * max(dependence):
            kind = "reasoning"
        elif erosion(step_dependence(dependence, steps), k) > 1:
            kind = "eroded"
    return Fault(k, kind)


class Oracle(attribute.Verifier):
    """The truth about every step (embedded tasks only)."""

    def __call__(self, trajectories: list):
        for t in trajectories:
            t.checks = [Check(WRONG * (not shapes.is_right(t.problem, step.text))) for step in t.steps]


class OneFault(attribute.Verifier):
    """What says of a finished trajectory at which step it went wrong (`find`); no other step is suspect.
    Asked once about each answer that was sampled: a chain that was edited since gets a new answer first."""
    max_new_tokens = 64                 # of a restart, its prefix included
    key = ""                            # names the random numbers

    def __init__(self, reader, codec, window: int = 1):
        super().__init__(reader, codec, window)
        self.policy = reader            # whose margins and restarts count; compare.py sets another

    def answer(self, t) -> tuple:
        """An answer is known by the log-probs it was sampled with."""
        return (t.problem.id, *t.logps[t.steps[-1].stop:])

    def __call__(self, trajectories: list):
        undecided = []
        for t in trajectories:
            if t.checks is None and t.steps and t.finished and self.answer(t) not in self.known:
                undecided.append(t)
            t.checks = t.checks or [Check(0.0)] * len(t.steps)
        for t, k in zip(undecided, self.find(undecided)):
            t.checks[k] = Check(WRONG)
            self.known[self.answer(t)] = k


class Margin(OneFault):
    def find(self, trajectories: list) -> list[int]:
        margins = answer_margins(self.policy, self.codec, trajectories)
        return list(map(largest_margin_drop, margins))


class Dependence(OneFault):
    def find(self, trajectories: list) -> list[int]:
        dependences = visual_dependence(self.policy, self.codec, trajectories)
        return [most_eroded(values, t.steps) for values, t in zip(dependences, trajectories)]


class MonteCarlo(OneFault):
    def find(self, trajectories: list) -> list[int]:
        faults, tokens = monte_carlo(self.policy, self.codec, trajectories, self.max_new_tokens, key=self.key)
        self.tokens += tokens
        return faults


class RandomStep(OneFault):
    def find(self, trajectories: list) -> list[int]:
        faults = []
        for t in trajectories:                              # its own number, whatever is asked beside it
            number = rollout.uniforms(f"{self.key}/{t.problem.id}/{t.ids}", 1, 1).item()
            faults.append(int(len(t.steps) * number))
        return faults


# ------------------------------------------------------------------------------------------------------------
# The study


def first_wrong(t) -> int | None:
    """The oracle's first wrong step (0-based) of a trajectory; None where all are right."""
    for k, verdict in enumerate(shapes.verdicts(t)):
        if verdict != "true":
            return k
    return None


def flawed_rollouts(model, codec, stream, count: int, max_new_tokens: int = 320, greedy: bool = False):
    """Locatable failures on a tiny stream, one completion a problem, sampled or greedy, until there are
    `count` (a policy may fail too seldom) -> [(trajectory, its first wrong step)]. Those whose steps are all
    right (the answer alone is wrong) have no such step: their number is the second result."""
    found, slips, start = [], 0, 0
    while len(found) < count and start < 32 * count:
        problems = [stream[i] for i in range(start, start + 32)]
        keys = [f"localise/0/{p.id}" for p in problems]
        temperature = 0.0 if greedy else 1.0
        for group in rollout.sample(model, problems, codec, 1, max_new_tokens, temperature, keys):
            for t in group:
                t.rewards = reward_parts(t.text, t.problem.answer, t.problem.choices, t.finished)
                t.steps = attribute.split_steps(t.ids, codec)
            for t in attribute.locatable_failures(group):
                wrong = first_wrong(t)
                if wrong is None:
                    slips += 1
                elif len(found) < count:
                    found.append((t, wrong))
        start += 32
    return found, slips


def score_localisers(model, codec, found: list, window: int = 1, batch: int = 128) -> tuple[list, dict]:
    """One record a rollout, with the step that each signal finds, and the tokens that each signal generated
    for all of them. The rollouts keep A1's checks."""
    records, tokens = [], {}
    for start in tqdm(range(0, len(found), batch), desc="localising", leave=False, disable=None):
        part = [t for t, _ in found[start:start + batch]]
        verifier = attribute.Verifier(model, codec, window)
        verifier(part)
        margins = answer_margins(model, codec, part)
        dependences = visual_dependence(model, codec, part)
        deaths, restart_tokens = monte_carlo(model, codec, part)
        cost = {"A1, else A2": verifier.tokens, "A1 re-reading": verifier.tokens,
                "A4 Monte Carlo": restart_tokens}
        for n, (t, true) in enumerate(found[start:start + batch]):
            steps = {"A1, else A2": localise(t.checks, margins[n]).step,
                     "A1 re-reading": localise(t.checks).step,
                     "A2 drop": largest_margin_drop(margins[n]),
                     "A2 no return": no_return(margins[n]),
                     "A3 erosion": most_eroded(dependences[n], t.steps),
                     "A4 Monte Carlo": deaths[n],
                     "random": random.Random(f"{start}/{n}").randrange(len(t.steps)),
                     "last step": len(t.steps) - 1}
            records.append({"id": t.problem.id, "task": t.problem.task, "steps": len(t.problem.key_steps),
                            "true": true, "found": list(steps.values())})
        for signal in steps:
            tokens[signal] = tokens.get(signal, 0) + cost.get(signal, 0)
    return records, tokens


def summarise(records: list[dict], tokens: dict) -> list[dict]:
    """A row a signal: exact hits, hits within one step, the mean error in steps (below 0: too early), tokens
    a rollout, exact hits by steps and by task."""
    parts, rows = {}, []
    for key in ("steps", "task"):
        for r in sorted(records, key=itemgetter(key)):
            parts.setdefault(f"{key} {r[key]}", []).append(r)
    for n, (signal, generated) in enumerate(tokens.items()):
        errors = [r["found"][n] - r["true"] for r in records]
        row = {"localiser": signal, "exact": percent(figure([float(error == 0) for error in errors])),
               "within 1": f"{100 * sum(abs(error) <= 1 for error in errors) / len(errors):.1f} %",
               "error": f"{sum(errors) / len(errors):+.2f}", "tokens": f"{generated / len(errors):.1f}"}
        for name, part in parts.items():
            hits = sum(r["found"][n] == r["true"] for r in part)
            row[name] = f"{100 * hits / len(part):.1f}"
        rows.append(row)
    return rows


def rates(trajectories: list, codec) -> list[dict]:
    """Of checked trajectories, by depth and by length of step in fives of tokens: the share of right steps
    that are suspect (false alarms), and of wrong ones (found)."""
    counts, rows = {}, []               # of right steps, suspect ones of them, wrong steps, suspect ones
    for t in trajectories:
        for k, verdict in enumerate(shapes.verdicts(t)):
            wrong, length = verdict != "true", len(rollout.token_ids(t.steps[k].text, codec))
            for part in (("depth", k + 1), ("tokens, from", length // 5 * 5)):
                count = counts.setdefault(part, [0, 0, 0, 0])
                count[2 * wrong] += 1
                count[2 * wrong + 1] += t.checks[k].is_suspect
    for (by, value), (right, alarms, wrong, found) in sorted(counts.items()):
        row = {"steps by": by, "": value, "right": right, "wrong": wrong}
        row["false alarms"] = f"{100 * alarms / right:.1f} %" if right else "-"
        rows.append(row | {"found": f"{100 * found / wrong:.1f} %" if wrong else "-"})
    return rows


def slip(facts: dict, step: str, rng: random.Random) -> str:
    """The step with another conclusion from the same reading (not of a path, which concludes nothing)."""
    out = shapes.parse_step(facts, step)["out"]
    other = {"yes": "no", "no": "yes"}.get(out, out)
    if out.isdecimal():
        other = str(int(out) + rng.randint(1, 9))
    before, _, after = step.rpartition(out)
    return before + other + after


@torch.no_grad()
def plant(model, problem, codec, kind: str, rng: random.Random):
    """A finished rollout with one planted error, written as by a policy that is sure of it: a wrong reading
    at the first two steps, where the policy still looks (misread); in the last third, where erosion has set
    in, what language says (eroded), or a wrong conclusion from a right reading (reasoning). There is none
    where language is right, and in following dots, which concludes nothing."""
    facts, wording = problem.oracle, rng.randint(1, 8) if problem.oracle["dialect"] == "sentences" else 0
    steps = shapes.chain(facts, wording=wording)
    k = rng.randrange(2) if kind == "misread" else rng.randrange(len(steps) * 2 // 3, len(steps))
    name = facts["ask"][k]
    if kind == "reasoning":
        steps[k] = slip(facts, steps[k], rng)
    elif kind == "eroded":
        steps = shapes.chain(facts, {k: shapes.prior(facts, name)}, wording)
    else:
        steps = shapes.chain(facts, {k: rng.choice(shapes.wrong_values(facts, name))}, wording)
    answer = shapes.answer_from_steps(facts, steps)
    text = "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"
    ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
    prompt = rollout.encode_prompt(problem, codec)
    logps = rollout.completion_logps(model, codec, [prompt], [ids])[0][0].tolist()
    t = rollout.make_trajectory(problem, prompt, [], ids, logps, codec)
    t.steps = attribute.split_steps(ids, codec)
    start, stop = t.steps[k].start, t.steps[k].stop
    t.logps[start:stop] = [0.0] * (stop - start)
    return t


def planted_kinds(model, codec, stream, count: int, window: int = 1) -> list[dict]:
    """A row a planted kind: how often each kind was found in such chains, and how often the step."""
    rows, planted, rng = {}, [], random.Random(0)
    for kind in KINDS:
        rows[kind] = {"planted": kind, **dict.fromkeys(KINDS, 0), "exact step": 0}
    for i in range(count):
        kind = ("misread", "eroded", "reasoning")[i // 4 % 3]       # tasks alternate by four
        t = plant(model, stream[i], codec, kind, rng)
        if first_wrong(t) is not None:
            planted.append((kind, t))
    trajectories = [t for _, t in planted]
    attribute.Verifier(model, codec, window)(trajectories)
    for (kind, t), dependence in zip(planted, visual_dependence(model, codec, trajectories)):
        fault = localise(t.checks, None, dependence, t.steps)
        rows[kind][fault.kind] += 1
        rows[kind]["exact step"] += fault.step == first_wrong(t)
    return list(rows.values())


@dataclass
class StudyConfig:
    """Flags of `python experiments/localisers.py`."""
    model: str = "tiny"             # folder or hub id of the checkpoint, policy and reader
    data: str = "tiny:steps=3-12"   # a spec of the embedded tasks; held-out problems are used
    greedy: bool = False            # greedy rollouts instead of sampled ones
    window: int = 1                 # steps before a step that the reader sees with it
    flawed: int = 2000              # flawed rollouts to score the localisers on
    planted: int = 600              # chains with a planted error, for the confusion of kinds
    out: str = ""                   # JSON file of everything ("" = none)


def main(argv=None):
    c = train.parse_flags(StudyConfig, argv)
    stream, codec = shapes.Stream(c.data, "heldout"), rollout.load_codec(c.model)
    model = load_model(c.model, *train.device_and_dtype("auto", "auto")).eval()
    found, slips = flawed_rollouts(model, codec, stream, c.flawed, greedy=c.greedy)
    if not found:
        sys.exit(f"error: no flawed rollout found among {32 * c.flawed} problems")
    records, tokens = score_localisers(model, codec, found, c.window)
    summary, kinds = summarise(records, tokens), planted_kinds(model, codec, stream, c.planted, c.window)
    checked = rates([t for t, _ in found], codec)
    length = sum(len(t.ids) for t, _ in found) / len(found)
    print(f"{len(found)} flawed rollouts with a wrong step, {slips} more with only a wrong answer; "
          f"{length:.1f} tokens a rollout")
    for rows in (summary, checked, kinds):
        print("\n" + markdown(list(rows[0]), map(dict.values, rows)))
    if c.out:
        flags = sys.argv[1:] if argv is None else argv
        result = {"command": " ".join(["python experiments/localisers.py", *flags]), "slips": slips,
                  "length": length, "summary": summary, "rates": checked, "kinds": kinds, "records": records}
        train.write_text(Path(c.out), json.dumps(result))


if __name__ == "__main__":
    main()
