"""GRPO: group advantages, the clipped loss, token log-probs in chunks, and the diagnostics beside them.

Place in the pipeline: last before the update. Pure functions of tensors; imports no other file of ours.
Sources: group advantages and k3 KL - DeepSeekMath (arXiv 2402.03300); no standard deviation and a constant
normaliser - Dr. GRPO (2503.20783); clip-higher - DAPO (2503.14476); dual clip - Ye et al. (1912.09729).
IVR-R1 says it optimises with GRPO and no more; which variant is our choice: no std, constant normaliser,
clip 0.2 / 0.28, dual clip 3, no KL.

Shapes: R rows (B prompts x G samples), T completion tokens, D width, V vocabulary.

Worked example: rewards (1, 0, 0, 0) give advantages (0.75, -0.25, -0.25, -0.25) without std. A token with
advantage 0.75 whose probability rose from 0.20 to 0.30 has ratio 1.5, clipped at 1.28: its term is 0.96 and
its gradient zero.
"""
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


def policy_loss(logps, old_logps, advantages, weights, normaliser: float, clip_low: float = 0.2,
                clip_high: float = 0.28, dual_clip: float = 3.0, beta: float = 0.0, ref_logps=None):
    """Eq. (2)-(5): the clipped GRPO loss, to be minimised, and its diagnostics.

    All tensors (R, T). weights: the completion_mask, or finer per-token weights; a token of weight 0 has no
    gradient. normaliser: sequences x L_max of the whole optimiser batch, over all ranks and accumulation
    steps; the caller sums the losses of the parts (Dr. GRPO: a constant, so no length bias, and masks do not
    scale up what remains).
    Returns (loss, dict of sums over this part's weighted tokens; `tokens` is their number)."""
    log_ratio = torch.where(weights > 0, logps - old_logps, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp()                                        # Eq. (2): rho = pi / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)           # Eq. (3): clip-higher
    objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages),
                            objective)                                            # Eq. (4)
    loss = -(weights * objective).sum() / normaliser
    kl = torch.zeros_like(ratio)
    if beta > 0:
        delta = torch.where(weights > 0, ref_logps - logps, 0.0).clamp(-10, 10)
        kl = delta.exp() - delta - 1                                              # Eq. (5): k3, >= 0
        loss = loss + beta * (weights * kl).sum() / normaliser
    with torch.no_grad():
        on = (weights > 0).float()
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
