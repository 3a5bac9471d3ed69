"""One training step, told: a group on its way from problem to update, every quantity with its number.

    python experiments/walkthrough.py [--batch 16 and any other flag of train.py]

Takes: flags of train.py (--model runs/x/checkpoint-000080 tells of a later policy). Gives: text, of a group
that holds a repaired rollout if there is one; nothing on disk. `Told` is a Trainer that runs `rl_step` and
listens in its hooks. The paper has nothing of the kind. Left out: --stage sft, several ranks, a second step.

Worked example: of rewards 0.1 (seven times) and 1.0 it tells the mean, 0.212, and advantages -0.112, +0.788.
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402
from attribute import DOUBT  # noqa: E402
from experiments.localisers import answer_margins, step_dependence, visual_dependence  # noqa: E402
from tiny import shapes  # noqa: E402


def line(text: str, width: int = 100) -> str:
    """A text on one line, quoted; control characters as escapes."""
    text = text.replace("\n", " / ")
    return repr(text if len(text) <= width else text[:width - 3] + "...")


class Told(train.Trainer):
    """A Trainer that prints one group of its step."""
    repairs = ()

    def rollout_metrics(self, groups) -> dict:
        self.sampled_groups = groups
        return super().rollout_metrics(groups)

    def repair_metrics(self, groups, repairs, verifier) -> dict:
        self.repairs, self.verifier = repairs, verifier
        return super().repair_metrics(groups, repairs, verifier)

    def update(self, groups, lr: float) -> dict:
        group, told = train.telling_group(groups), None
        for r in self.repairs:
            if any(t is r.trajectory for t in group):
                told = r
        tell_rollouts(self.sampled_groups[groups.index(group)], self.codec)
        if told:
            tell_repair(told, self)
        tell_loss(group, self)
        t = told.trajectory if told else group[0]
        before = logps_of(t, self).mean()
        metrics = super().update(groups, lr)
        print(f"\n8. The update over all {len(groups)} groups (train.Optimizer): gradient norm "
              f"{metrics['grad_norm']:.3f}, clipped at {self.config.max_grad_norm}, AdamW at rate {lr:.1e}.\n"
              f"   The {'rectified trajectory' if told else 'first rollout'}: mean log-prob of a token "
              f"{before:+.4f} -> {logps_of(t, self).mean():+.4f}")
        return metrics


@torch.no_grad()
def logps_of(t, trainer):
    """Log-probs (1, T) of a trajectory's tokens under the policy as it is."""
    return rollout.completion_logps(trainer.model, trainer.codec, [t.prompt], [t.ids])[0]


def tell_rollouts(group: list, codec):
    """Problem, prompt, G rollouts, rewards."""
    p, prompt = group[0].problem, group[0].prompt
    print(f"\n1. A problem (rollout.py, tiny/shapes.py)\n   question {line(p.question)}\n"
          f"   gold     {line(p.answer)}")
    print(f"\n2. The prompt (rollout.encode_prompt): {len(prompt.ids)} tokens, "
          f"{prompt.ids.count(codec.image_token_id)} of them image tokens from patches {prompt.grids}")
    print(f"\n3. {len(group)} rollouts at temperature 1 (rollout.sample), rewards by rules (reward.py)")
    for n, t in enumerate(group):
        parts = ", ".join(f"{name} {value:.1f}" for name, value in t.rewards.items())
        print(f"   [{n}] {parts}   {line(t.text, 60)}")


def tell_repair(r, trainer):
    """Where a failed rollout lost the image, and how it was repaired."""
    t, model, codec = r.source, trainer.model, trainer.codec
    margins, dependence = answer_margins(model, codec, [t])[0], visual_dependence(model, codec, [t])[0]
    print("\n4. A wrong rollout in steps. A1: the largest gap of its tokens, in nats, under the reader, who\n"
          f"   does not know the chain (above {DOUBT}: suspect). A2: margin of the right answer after it.\n"
          "   A3: how much its tokens depend on the image (localisers.py; not used in training)")
    for k, (step, check) in enumerate(zip(t.steps, t.checks)):
        note = ""
        if t.problem.oracle:
            note = "  (true)" if shapes.is_right(t.problem, step.text) else "  (false)"
        if check.is_suspect:
            note += "  <- suspect"
        print(f"   step {k + 1:2} {line(step.text, 40):42} A1 {check.gap:.3f}  "
              f"A2 {margins[k + 1]:+6.2f}  A3 {step_dependence(dependence, t.steps)[k]:.3f}{note}")
        if check.is_suspect:
            readings, place = trainer.verifier.known[trainer.verifier.claim(t, k)], step.start + check.token
            seen, masked, say = readings[check.token]
            print(f"           token {codec.tokenizer.decode([t.ids[place]])!r}: the policy wrote it with "
                  f"{math.exp(t.logps[place]):.3f}; the reader gives it {math.exp(seen):.3f}, without the image "
                  f"{math.exp(masked):.3f}; the image's say there is {say:.2f} nats")
    print(f"\n5. The Re-Reasoning Loop (rereason.rectify): {r.outcome} with {r.num_revisions} revisions for "
          f"{r.tokens} tokens")
    for turn in r.turns:
        print(f"   {turn['what']:8} at step {turn['step'] + 1:2}: {line(turn['before'], 30):32} -> "
              f"{line(turn['after'], 50)}")
    t = r.trajectory
    log_w = (logps_of(t, trainer)[0].cpu() - torch.tensor(t.logps))[torch.tensor(t.sampled) > 0]
    print(f"   the new trajectory {line(t.text, 80)}\n   its tokens were sampled with probability mu; the "
          f"clean context gives them w x mu, mean log w\n   {log_w.mean():+.3f} (each new step at least "
          f"{trainer.config.min_log_w}), so it is accepted as \"{t.provenance}\"")


def tell_loss(group: list, trainer):
    """Advantages, credit and the terms of the loss, with the token whose probability moved most."""
    c, rewards = trainer.config, [t.rewards["total"] for t in group]
    share, total = c.batch // c.updates_per_batch, 0.0      # share: problems an update
    normaliser = share * c.group_size * c.max_new_tokens
    print(f"\n6. Advantages, Eq. (1): rewards {', '.join(f'{x:.1f}' for x in rewards)}, "
          f"mean {sum(rewards) / len(rewards):.3f}")
    print("\n7. Credit, Eq. (6), and the terms of the loss, Eq. (2)-(4) and (7); normaliser, Eq. (8): "
          f"{share} x {c.group_size} x {c.max_new_tokens} = {normaliser}")
    for t in group:
        if not grpo.has_gradient(t, beta=0.0):
            continue
        batch, logps = grpo.collate([t], trainer.device), logps_of(t, trainer).requires_grad_()
        part, _ = grpo.policy_loss(logps, batch["old_logps"], batch["advantages"], batch["weights"],
                                   normaliser, c.clip_low, c.clip_high, c.dual_clip, lambda_r=c.lambda_r,
                                   gamma=c.gamma, rectified=batch["rectified"])
        part.backward()
        total += part.item()
        weighted = batch["weights"][0] > 0
        print(f"   {t.provenance:10} A {t.advantage:+.3f}  weight on {weighted.sum()} of {len(t.ids)} tokens"
              f"  part of the loss {part.item():+.6f}")
        ratio = (logps - batch["old_logps"])[0].exp()
        n = ((ratio - 1).abs() * weighted - (~weighted).float()).argmax().item()
        pull = -logps.grad[0, n].item() * normaliser / t.advantage
        word = trainer.codec.tokenizer.decode([t.ids[n]])
        print(f"   {'':10} token {n} {word!r}: mu {math.exp(t.logps[n]):.3f}, now {logps[0, n].exp():.3f}, "
              f"ratio {ratio[n]:.3f}, gradient weight {pull:.3f}")
    print(f"   the loss of this group is the sum, {total:+.6f}" + ", and the KL of Eq. (5)" * (c.beta > 0))


def main(argv=None):
    try:
        config = train.parse_flags(train.TrainConfig, argv, {"batch": 16, "eval_problems": 0})
        if config.stage != "rl":
            raise ValueError("--stage sft: a step of --stage rl is told")
        Told(config).rl_step()
    except (ValueError, OSError) as e:
        train.fail(e)


if __name__ == "__main__":
    main()
