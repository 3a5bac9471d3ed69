"""`train.py --explain`: one group on its way through a training step, every quantity told with its number.

Place in the pipeline: all of it, once and slowly; calls the phases of train.Trainer in their order and
computes nothing of its own but what it prints.
"""
import math

import torch

import attribute
import grpo
import rereason
import rollout
from tiny import shapes
from viewer.log import telling

WIDTH = 100


def cut(text: str, width: int = WIDTH) -> str:
    """One line of a text."""
    text = text.replace("\n", " / ")
    return text if len(text) <= width else text[:width - 3] + "..."


def explain(trainer, say):
    """Run one step on the first batch and tell of one group: one that holds a repaired rollout, if any."""
    c, codec, progress = trainer.config, trainer.codec, trainer.progress()
    problems, prompts = trainer.encode(trainer.step)
    groups = trainer.roll_out(problems, prompts)
    trainer.score(groups)
    before = groups
    groups, repairs, _ = trainer.repair(groups, progress)
    trainer.assign_advantages(groups)
    trainer.assign_credit(groups)
    group = telling(groups)
    n = next(i for i, other in enumerate(groups) if other is group)
    repair = next((r for r in repairs if any(r.chain is t for t in group)), None)
    tell_rollouts(before[n], prompts[n], codec, say)
    if repair:
        tell_repair(repair, trainer, say)
    tell_update(group, prompts[n], trainer, say)
    t = repair.chain if repair else group[0]
    before = mean_logp(t, prompts[n], trainer)
    stats = trainer.update(groups, prompts, progress)
    say(f"\n8. The update over all {len(groups)} groups (runtime/optimizer.py): gradient norm "
        f"{stats['grad_norm']:.3f}, clipped at {c.max_grad_norm}, AdamW at rate {stats['lr']:.1e}.\n"
        f"   The {'rectified trajectory' if repair else 'first rollout'}: mean log-prob of a token "
        f"{before:+.4f} -> {mean_logp(t, prompts[n], trainer):+.4f}")


def mean_logp(t, prompt, trainer) -> float:
    """Mean log-prob of a trajectory's tokens under the policy as it is."""
    with torch.no_grad():
        logps, _, mask = rollout.completion_logps(trainer.model, [prompt], [0], [t.ids], trainer.codec)
    return (logps.sum() / mask.sum()).item()


def tell_rollouts(group: list, prompt, codec, say):
    """Problem, prompt, G rollouts, rewards."""
    p = group[0].problem
    say("\n1. A problem (data/reading.py, tiny/shapes.py)")
    say(f"   question {cut(str(p.question))!r}\n   gold     {cut(p.answer)!r}")
    say(f"\n2. The prompt (rollout.encode_prompt): {len(prompt.ids)} tokens, "
        f"{prompt.ids.count(codec.image_token_id)} of them image tokens from patches {prompt.grids}")
    say(f"\n3. {len(group)} rollouts at temperature 1 (rollout.sample), rewards by rules (reward.py)")
    for i, t in enumerate(group):
        r = t.rewards
        say(f"   [{i}] total {r['total']:.1f}, accuracy {r['accuracy']:.0f}, format {r['format']:.0f}   "
            f"{cut(t.text, 60)}")


def tell_repair(r, trainer, say):
    """Where the parent lost the image, and how it was repaired."""
    t, model, codec = r.parent, trainer.model, trainer.codec
    margins = attribute.answer_margins(model, codec, [t])[0]
    depends = attribute.visual_dependence(model, codec, [t])[0]
    by_step = attribute.step_dependence(depends, t.steps)
    a1 = "A1" if trainer.config.localiser == "check" else trainer.config.localiser
    say("\n4. A wrong rollout in steps (attribute.split_steps). A1: would the policy, shown the pristine "
        f"image, repeat\n   the step (below {attribute.DOUBT} it is doubted)? A2: margin of the right answer "
        "behind it. A3: how much its\n   tokens depend on the image")
    for k, (s, check) in enumerate(zip(t.steps, t.checks)):
        truth = shapes.is_right(t.problem, s.text) if t.problem.oracle else None
        word = "" if truth is None else "  (true)" if truth else "  (false)"
        doubt = "  <- doubted" if check and check.doubted else ""
        say(f"   step {k + 1:2} {cut(s.text, 40):40} {a1} {check.same if check else math.nan:.3f}  "
            f"A2 {margins[k + 1]:+6.2f}  A3 {by_step[k]:.3f}{word}{doubt}")
    if all(t.checks):
        fault = attribute.localise(t.checks, margins, depends, t.steps)
        say(f"   verdict (attribute.localise): step {fault.step + 1}, {fault.kind}, confidence "
            f"{fault.confidence:.2f}")
    say(f"\n5. The Re-Reasoning Loop (rereason.rectify): {r.outcome} with {r.looks} looks for {r.tokens} "
        "tokens")
    for turn in r.turns:
        say(f"   {turn['what']:6} at step {turn['step'] + 1:2}: {cut(turn['before'], 30) or '-'!s:30} -> "
            f"{cut(turn['after'], 50)}")
    log_w = rereason.log_weights(model, codec, [r.chain])[0]
    own = [x for x, on in zip(log_w, r.chain.sampled) if on]
    say(f"   the new trajectory {cut(r.chain.text, 80)!r}\n   its tokens were sampled with probability mu; "
        f"the clean context gives them w x mu, mean log w\n   {sum(own) / len(own):+.3f} (each new step at "
        f"least {trainer.config.min_log_w}), so it is accepted as \"{r.chain.provenance}\"")


def tell_update(group: list, prompt, trainer, say):
    """Advantages, credit and the terms of the loss, token by token where it matters."""
    c, codec = trainer.config, trainer.codec
    rewards = [t.rewards["total"] for t in group]
    mean = sum(rewards) / len(rewards)
    say(f"\n6. Advantages, Eq. (1): rewards {', '.join(f'{x:.1f}' for x in rewards)}, mean {mean:.3f}")
    rows = [t for t in group if t.advantage != 0]
    if not rows:
        say("   all the same: no advantage, no gradient from this group")
        return
    with torch.no_grad():
        logps, _, _ = rollout.completion_logps(trainer.model, [prompt], [0] * len(rows),
                                               [t.ids for t in rows], codec)
    normaliser = c.batch // c.updates_per_batch * c.group_size * c.max_new_tokens
    say("\n7. Credit, Eq. (6), and the terms of the loss, Eq. (2)-(4) and (7); normaliser, Eq. (8): "
        f"{c.batch // c.updates_per_batch} x {c.group_size} x {c.max_new_tokens} = {normaliser}")
    total = 0.0
    for t, row in zip(rows, logps.tolist()):
        weights = [w * s for w, s in zip(t.weights or t.sampled, t.sampled)]
        ratio = [math.exp(a - b) if on else 1.0 for a, b, on in zip(row, t.logps, t.sampled)]
        shaped = t.provenance != "policy"
        part, _ = grpo.policy_loss(*(torch.tensor([x]) for x in (row[:len(t.ids)], t.logps)),
                                   torch.tensor([[t.advantage]]), torch.tensor([weights]), normaliser,
                                   c.clip_low, c.clip_high, c.dual_clip,
                                   rectified=torch.tensor([[shaped]]), lambda_r=c.lambda_r, gamma=c.gamma)
        total += part.item()
        say(f"   {t.provenance:10} A {t.advantage:+.3f}  weight on {sum(w > 0 for w in weights)} of "
            f"{len(weights)} tokens  part of the loss {part.item():+.6f}")
        far = max((i for i, w in enumerate(weights) if w), key=lambda i: abs(ratio[i] - 1), default=None)
        if far is not None:
            word = codec.tokenizer.decode([t.ids[far]])
            w = ratio[far]
            gain = (1 + c.gamma) ** 2 * w / (w + c.gamma) ** 2 if shaped and c.gamma else w
            say(f"   {'':10} token {far} {word!r}: mu {math.exp(t.logps[far]):.3f}, now "
                f"{math.exp(row[far]):.3f}, ratio {w:.3f}, gradient weight {gain:.3f} (before clipping)")
    say(f"   the loss of this group is the sum, {total:+.6f}" + ", and the KL of Eq. (5)" * (c.beta > 0))
