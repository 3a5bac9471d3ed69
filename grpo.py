"""GRPO and IVR-R1's objective: advantages, step-level credit, the clipped and the shaped loss, token
log-probs.

Place in the pipeline: last before the update. Pure functions of tensors; imports no other file of ours.
Sources: group advantages and k3 KL - DeepSeekMath (arXiv 2402.03300); no standard deviation and a constant
normaliser - Dr. GRPO (2503.20783); clip-higher - DAPO (2503.14476); dual clip - Ye et al. (1912.09729).
IVR-R1 says it optimises with GRPO and takes rectified trajectories as templates, and no more; which variant
and how is our choice: no std, constant normaliser, clip 0.2 / 0.28, dual clip 3, no KL; rectified
trajectories weighted by the probability mu they were really sampled with, shaped as in LUFFY
(arXiv 2504.14945) but of slope 1 where policy and mu agree; in wrong rollouts only the tokens at fault pay.

Shapes: R rows (B prompts x G samples), T completion tokens, D width, V vocabulary.

Worked example: rewards (1, 0, 0, 0) give advantages (0.75, -0.25, -0.25, -0.25) without std. A token with
advantage 0.75 whose probability rose from 0.20 to 0.30 has ratio 1.5, clipped at 1.28: its term is 0.96 and
its gradient zero. In a rectified trajectory a token written with mu = 0.9 that the policy gives 0.3 has
w = 1/3 and, with gamma 0.1, gradient weight g = 1.21 w / (w + 0.1)^2 = 2.15.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards, use_std: bool = False, eps: float = 1e-4):
    """Eq. (1): A_i = R_i - mean(R), divided by (std(R) + eps) if `use_std`. rewards (B, G) -> (B, G). The std
    is the unbiased one; a group of one has advantage 0."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)                            # Eq. (1)
    if use_std and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    return advantages


def token_logps(hidden, head_weight, targets, logit_mask, temperature: float = 1.0, chunk: int = 1024,
                entropy: bool = False):
    """Log-probs of the targets under softmax(logits / temperature) without banned tokens, `chunk` tokens at a
    time.

    hidden (N, D), head_weight (V, D), targets (N,), logit_mask (V,) of 0 and -inf -> logps (N,),
    entropies (N,) (zeros unless asked for; no gradient). The logits of a chunk are made again in the backward
    pass, so no more than (chunk, V) of them ever exists. The softmax is in fp32."""
    def part(h, y):
        logits = (F.linear(h, head_weight).float() + logit_mask) / temperature          # (chunk, V)
        logp = logits.log_softmax(-1)
        spread = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1).detach() if entropy else logp.new_zeros(len(y))
        return logp.gather(1, y[:, None])[:, 0], spread

    if len(targets) == 0:
        return hidden.sum(-1).float(), hidden.new_zeros(0).float()
    parts = [checkpoint(part, h, y, use_reentrant=False) if torch.is_grad_enabled() else part(h, y)
             for h, y in zip(hidden.split(chunk), targets.split(chunk))]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies)


def step_credit(length: int, at_fault: list) -> list[float]:
    """Eq. (6): omega of a wrong rollout's tokens: 1 where they are at fault, 0 elsewhere. at_fault: ranges
    (start, stop) of tokens. What agrees with the image is not to blame for a wrong answer, and neither is
    what follows from a wrong reading, be it the rest of the step or the answer."""
    weights = [0.0] * length
    for start, stop in at_fault:
        weights[start:stop] = [1.0] * (stop - start)                                    # Eq. (6)
    return weights


def shape(w, gamma: float = 0.1):
    """Eq. (7): f(w) = ((1 + gamma)^2 / gamma) w / (w + gamma), less a constant so that f(1) = 1. Its gradient
    weight g(w) = w f'(w) = (1 + gamma)^2 w / (w + gamma)^2 is 1 at w = 1, at most (1 + gamma)^2 / (4 gamma),
    and falls to 0 for tokens the clean context makes impossible and for those already learned."""
    scale = (1 + gamma) ** 2 / gamma
    return scale * w / (w + gamma) - scale / (1 + gamma) + 1                            # Eq. (7)


def policy_loss(logps, old_logps, advantages, weights, normaliser: float, clip_low: float = 0.2,
                clip_high: float = 0.28, dual_clip: float = 3.0, beta: float = 0.0, ref_logps=None,
                rectified=None, lambda_r: float = 1.0, gamma: float = 0.1):
    """Eq. (2)-(8): the loss, to be minimised, and its diagnostics.

    All tensors (R, T). old_logps: log mu, what each token was sampled with. weights: omega, the
    completion_mask or finer; a token of weight 0 has no gradient. rectified (R, 1) bool: rows whose objective
    is shaped (Eq. 7) and weighted by lambda_r instead of clipped; gamma 0: f(w) = w. normaliser: sequences x
    L_max of the whole optimiser batch, over all ranks and accumulation steps; the caller sums the losses of
    the parts (Dr. GRPO: a constant, so no length bias, and masks do not scale up what remains). Returns
    (loss, dict of sums over this part's weighted tokens; `tokens` is their number)."""
    log_ratio = torch.where(weights > 0, logps - old_logps, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()                                        # Eq. (2): rho = pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)           # Eq. (3): clip-higher
    objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages),
                            objective)                                            # Eq. (4)
    if rectified is not None:
        w = log_ratio.clamp(max=math.log(10)).exp()
        shaped = lambda_r * advantages * (shape(w, gamma) if gamma > 0 else w)
        objective = torch.where(rectified, shaped, objective)
    loss = -(weights * objective).sum() / normaliser                              # Eq. (8)
    kl = torch.zeros_like(ratio)
    if beta > 0:
        delta = torch.where(weights > 0, ref_logps - logps, 0.0).clamp(-10, 10)
        kl = delta.exp() - delta - 1                                              # Eq. (5): k3, >= 0
        loss = loss + beta * (weights * kl).sum() / normaliser
    with torch.no_grad():
        on = (weights > 0).float()
        on = on if rectified is None else on * ~rectified                    # the rest is of the policy's own
        outside = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        stats = {"tokens": on.sum(), "clip_fraction": (on * outside).sum(), "kl_ref": (on * kl).sum(),
                 "kl_old": (on * (ratio - 1 - log_ratio)).sum(), "ratio": (on * ratio).sum()}
    return loss, stats


def group_shares(correct):
    """Shares of groups that are all right, all wrong, and mixed. correct (B, G) of 0/1 -> dict. Only mixed
    groups carry a GRPO signal."""
    mean = correct.float().mean(dim=1)
    right, wrong = (mean == 1).float().mean().item(), (mean == 0).float().mean().item()
    return {"all_right": right, "all_wrong": wrong, "mixed": 1 - right - wrong}
