"""Other answers to "at which step was the image lost?", and how well each finds the first wrong step.

    python experiments/localisers.py --data tiny:steps=3-12 --flawed 2000 --out runs/localisers.json

Takes: a checkpoint and a spec of the embedded tasks, whose step oracle knows the truth. Gives: two tables,
with --out also every rollout as JSON; and `Verifier` subclasses for `train.Trainer.verifier_class`.

    A1 check         attribute.py's: would the policy, shown the image, repeat the step?
    A2 margin        attribute.py's log p(gold) - log p(own answer) after each step: its largest drop
    A3 dependence    KL(pi(. | image) || pi(. | image with patches dropped)) of each token, by steps
    A4 Monte Carlo   whether any of 4 restarts after a step is right, by binary search over the steps

The paper says that a step-level attribution inside the multimodal context finds where the image was lost;
all signals are our choice. The gold answer only scores (A2, A4). Sources: A3 is VPPO's token dependency (KL;
the mean of the most dependent 40 %), A4 OmegaPRM's search (arXiv 2406.06592). Left out: mixtures of signals
other than "A1, else A2".

Worked example: a chain of four steps whose checks are 0.98, 0.95, 0.02, 0.90. The first below 0.5 is the
third: the fault is there, with confidence 0.98 * 0.95 * (1 - 0.02) = 0.91. If the truth is the fourth, that
is no exact hit, but one within one step.
"""
import json
import math
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
import rollout  # noqa: E402
import train  # noqa: E402
from attribute import Check  # noqa: E402
from eval import figure, percent  # noqa: E402
from experiments.tables import markdown  # noqa: E402
from model import load_model  # noqa: E402
from reward import reward_parts  # noqa: E402
from tiny import shapes  # noqa: E402

KINDS = ("eroded", "misread", "reasoning")


# ------------------------------------------------------------------------------------------------------------
# Signals


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


def monte_carlo(model, codec, trajectories: list, max_new_tokens: int = 256, restarts: int = 4,
                key: str = "monte carlo") -> tuple[list[int], int]:
    """A4. For each trajectory the step (0-based) at which its chance of success dies, and the tokens
    generated to find out. Restarts after `alive` steps succeed, after `dead` steps none does: after no step,
    and after all steps, that is taken for granted. All trajectories side by side."""
    alive, dead, tokens = [0] * len(trajectories), [len(t.steps) for t in trajectories], 0
    while True:
        asked, problems, prompts, keys, prefixes = [], [], [], [], []
        for n, t in enumerate(trajectories):
            middle = (alive[n] + dead[n]) // 2
            if middle == alive[n]:
                continue
            prefix = t.ids[:t.steps[middle].start]
            asked.append(n)
            problems.append(t.problem)
            prompts.append(t.prompt)
            keys.append(f"{key}/{t.problem.id}/{prefix}")
            prefixes += [prefix] * restarts
        if not asked:
            return alive, tokens
        groups = rollout.sample(model, problems, codec, restarts, max_new_tokens, 1.0, keys, prefixes,
                                prompts)
        for n, group in zip(asked, groups):
            bound = alive if any(map(attribute.is_right, group)) else dead
            bound[n] = (alive[n] + dead[n]) // 2
            for t in group:
                tokens += sum(t.sampled)


@dataclass
class Fault:
    """Where a rollout went wrong: its first step at fault (0-based), the kind, the confidence in [0, 1]."""
    step: int
    kind: str                           # one of KINDS
    confidence: float


def localise(checks: list, margins: list[float] | None = None, dependence: list[float] | None = None,
             steps: list | None = None) -> Fault:
    """The first step that A1 would not repeat; where it would repeat all of them, the step with the largest
    drop of A2's margin (the last step without margins). Kind by A3 (with steps): reasoning where no step is
    suspect, or where the faulty token hardly depends on the image; else eroded where the dependence of the
    step fell (`erosion` > 1); else misread."""
    k = attribute.first_suspect(checks)
    trust = math.prod(check.prob for check in checks[:k])
    if k is None:
        step = attribute.largest_margin_drop(margins) if margins else len(checks) - 1
        return Fault(step, "reasoning", trust)
    kind = "misread"
    if dependence is not None:
        start, stop = attribute.faulty_tokens(steps[k], checks[k])
        if max(dependence[start:stop]) <= 0.05 * max(dependence):
            kind = "reasoning"
        elif erosion(step_dependence(dependence, steps), k) > 1:
            kind = "eroded"
    return Fault(k, kind, trust * (1 - checks[k].prob))


class Oracle(attribute.Verifier):
    """The truth about every step (embedded tasks only)."""

    def check(self, claims: list[tuple]) -> list[Check]:
        return [Check(float(shapes.is_right(problem, text))) for problem, _, text in claims]


class OneFault(attribute.Verifier):
    """What says of a finished trajectory at which step it went wrong (`find`), and nothing of those after."""
    max_new_tokens = 64                 # of a restart, its prefix included
    key = ""                            # names the random numbers

    def __call__(self, trajectories: list):
        undecided = []
        for t in trajectories:
            if t.steps and t.finished and not (t.checks and attribute.fault_is_known(t.checks)):
                undecided.append(t)
        for t, k in zip(undecided, self.find(undecided)):
            t.checks = [Check(1.0)] * k + [Check(0.0)] + [None] * (len(t.steps) - k - 1)


class Margin(OneFault):
    def find(self, trajectories: list) -> list[int]:
        margins = attribute.answer_margins(self.model, self.codec, trajectories)
        return list(map(attribute.largest_margin_drop, margins))


class Dependence(OneFault):
    def find(self, trajectories: list) -> list[int]:
        dependences = visual_dependence(self.model, self.codec, trajectories)
        return [most_eroded(values, t.steps) for values, t in zip(dependences, trajectories)]


class MonteCarlo(OneFault):
    def find(self, trajectories: list) -> list[int]:
        faults, tokens = monte_carlo(self.model, self.codec, trajectories, self.max_new_tokens, key=self.key)
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
    for k, verdict in enumerate(shapes.check_steps(t.problem, [step.text for step in t.steps])):
        if verdict != "true":
            return k
    return None


def flawed_rollouts(model, codec, stream, count: int, max_new_tokens: int = 256):
    """Locatable failures on a tiny stream until there are `count` (a policy may fail too seldom) ->
    [(trajectory, its first wrong step)]. Those whose steps are all right (the answer alone is wrong) have no
    such step: their number is the second result."""
    found, slips, start = [], 0, 0
    while len(found) < count and start < 32 * count:
        problems = [stream[i] for i in range(start, start + 32)]
        keys = [f"localise/0/{p.id}" for p in problems]
        for group in rollout.sample(model, problems, codec, 8, max_new_tokens, keys=keys):
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


def score_localisers(model, codec, found: list, batch: int = 128) -> tuple[list, dict]:
    """One record a rollout, with the step that each signal finds, and the tokens that each signal generated
    for all of them."""
    records, tokens = [], {}
    for start in tqdm(range(0, len(found), batch), desc="localising", leave=False, disable=None):
        part = [t for t, _ in found[start:start + batch]]
        verifier = attribute.Verifier(model, codec)
        verifier(part)
        margins = attribute.answer_margins(model, codec, part)
        dependences = visual_dependence(model, codec, part)
        deaths, restart_tokens = monte_carlo(model, codec, part)
        cost = {"A1, else A2": verifier.tokens, "A1 check": verifier.tokens, "A4 Monte Carlo": restart_tokens}
        for n, (t, true) in enumerate(found[start:start + batch]):
            steps = {"A1, else A2": localise(t.checks, margins[n]).step,
                     "A1 check": localise(t.checks).step,
                     "A2 drop": attribute.largest_margin_drop(margins[n]),
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
    """A row a signal: exact hits, hits within one step, tokens a rollout, exact hits by steps and by task."""
    parts, rows = {}, []
    for key in ("steps", "task"):
        for r in sorted(records, key=itemgetter(key)):
            parts.setdefault(f"{key} {r[key]}", []).append(r)
    for n, (signal, generated) in enumerate(tokens.items()):
        off = [abs(r["found"][n] - r["true"]) for r in records]
        row = {"localiser": signal, "exact": percent(figure([float(distance == 0) for distance in off])),
               "within 1": f"{100 * (off.count(0) + off.count(1)) / len(off):.1f} %",
               "tokens": f"{generated / len(off):.1f}"}
        for name, part in parts.items():
            hits = sum(r["found"][n] == r["true"] for r in part)
            row[name] = f"{100 * hits / len(part):.1f}"
        rows.append(row)
    return rows


def plant(problem, codec, kind: str, rng: random.Random):
    """A finished rollout with one planted error: a wrong reading at the first two steps, where the policy
    still looks (misread), or in the last third, where erosion has set in (eroded); or there a wrong
    conclusion from a right reading (reasoning; there is none in counting and in following dots)."""
    facts, steps = problem.oracle, shapes.true_steps(problem.oracle)
    k = rng.randrange(2) if kind == "misread" else rng.randrange(len(steps) * 2 // 3, len(steps))
    if kind == "reasoning":
        steps[k] = shapes.slip(facts, steps[k], rng)
    else:
        steps = shapes.corrupt(facts, {k}, rng)
    answer = shapes.answer_from_steps(facts, steps)
    text = "<think>" + "\n".join(steps) + f"</think><answer>{answer}</answer>"
    ids = rollout.token_ids(text, codec) + [codec.eos_ids[0]]
    prompt = rollout.encode_prompt(problem, codec)
    t = rollout.make_trajectory(problem, prompt, [], ids, [0.0] * len(ids), codec)
    t.steps = attribute.split_steps(ids, codec)
    return t


def planted_kinds(model, codec, stream, count: int) -> list[dict]:
    """A row a planted kind: how often each kind was found in such chains, and how often the step."""
    rows, planted, rng = {}, [], random.Random(0)
    for kind in KINDS:
        rows[kind] = {"planted": kind, **dict.fromkeys(KINDS, 0), "exact step": 0}
    for i in range(count):
        kind = ("misread", "eroded", "reasoning")[i // 4 % 3]       # tasks alternate by four
        t = plant(stream[i], codec, kind, rng)
        if first_wrong(t) is not None:
            planted.append((kind, t))
    trajectories = [t for _, t in planted]
    attribute.Verifier(model, codec)(trajectories)
    for (kind, t), dependence in zip(planted, visual_dependence(model, codec, trajectories)):
        fault = localise(t.checks, None, dependence, t.steps)
        rows[kind][fault.kind] += 1
        rows[kind]["exact step"] += fault.step == first_wrong(t)
    return list(rows.values())


@dataclass
class StudyConfig:
    """Flags of `python experiments/localisers.py`."""
    model: str = "tiny"             # folder or hub id of the checkpoint
    data: str = "tiny:steps=3-12"   # a spec of the embedded tasks; held-out problems are used
    flawed: int = 2000              # flawed rollouts to score the localisers on
    planted: int = 600              # chains with a planted error, for the confusion of kinds
    out: str = ""                   # JSON file of everything ("" = none)


def main(argv=None):
    c = train.parse_flags(StudyConfig, argv)
    stream, codec = shapes.Stream(c.data, "heldout"), rollout.load_codec(c.model)
    model = load_model(c.model, *train.device_and_dtype("auto", "auto")).eval()
    found, slips = flawed_rollouts(model, codec, stream, c.flawed)
    if not found:
        sys.exit(f"error: no flawed rollout found among {32 * c.flawed} problems")
    records, tokens = score_localisers(model, codec, found)
    summary, kinds = summarise(records, tokens), planted_kinds(model, codec, stream, c.planted)
    length = sum(len(t.ids) for t, _ in found) / len(found)
    print(f"{len(found)} flawed rollouts with a wrong step, {slips} more with only a wrong answer; "
          f"{length:.1f} tokens a rollout")
    for rows in (summary, kinds):
        print("\n" + markdown(list(rows[0]), map(dict.values, rows)))
    if c.out:
        flags = sys.argv[1:] if argv is None else argv
        result = {"command": " ".join(["python experiments/localisers.py", *flags]), "slips": slips,
                  "length": length, "summary": summary, "kinds": kinds, "records": records}
        train.write_text(Path(c.out), json.dumps(result))


if __name__ == "__main__":
    main()
