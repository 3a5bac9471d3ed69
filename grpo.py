"""GRPO and IVR-R1's objective: advantages, step-level credit, the clipped and the shaped loss.

Takes: groups of trajectories with rewards (in IVR-R1 with checks and rectified members), log-probs of their
tokens. Gives: advantages, token weights, the loss. R rows (B prompts x G samples), T completion tokens.

Sources: group advantages and k3 KL - DeepSeekMath (arXiv 2402.03300); no standard deviation and a constant
normaliser - Dr. GRPO (2503.20783); clip-higher - DAPO (2503.14476); dual clip - Ye et al. (1912.09729).
The paper says that it optimises with GRPO and takes rectified trajectories as templates. We chose: no std,
constant normaliser, clip 0.2 / 0.28, dual clip 3, no KL; rectified trajectories weighted by the probability
mu they were really sampled with, shaped as in LUFFY (2504.14945) but of slope 1 where policy and mu agree;
in wrong rollouts the tokens at fault pay more. Left out: a critic, entropy bonuses, length penalties.

Worked example: rewards (1, 0, 0, 0) give advantages (0.75, -0.25, -0.25, -0.25) without std. A token with
advantage 0.75 whose probability rose from 0.20 to 0.30 has ratio 1.5, clipped at 1.28: its term is 0.96 and
its gradient zero. In a rectified trajectory a token written with mu = 0.9 that the policy gives 0.3 has
w = 1/3 and, with gamma 0.1, gradient weight g = 1.21 w / (w + 0.1)^2 = 2.15.
"""
import math

import torch

import attribute
import rollout

BLAME = 8.0                             # what a wrong rollout pays beyond its length, in tokens


# ---- Advantages and credit

def group_advantages(rewards, use_std: bool = False, eps: float = 1e-4):
    """Eq. (1): A_i = R_i - mean(R), divided by (std(R) + eps) if `use_std`. rewards (B, G) -> (B, G). The std
    is the unbiased one; a group of one has advantage 0."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)                            # Eq. (1)
    if use_std and rewards.shape[1] > 1:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    return advantages


def step_credit(length: int, faulty: list) -> list[float]:
    """Eq. (6): omega of a wrong rollout's tokens: 1, and in equal parts BLAME more where they are at fault,
    so that all wrong rollouts pay the same. faulty: ranges (start, stop) of tokens. What follows from a wrong
    reading, be it the rest of the step or the answer, is not to blame for it."""
    at_fault = [0.0] * length
    for start, stop in faulty:
        at_fault[start:stop] = [1.0] * (stop - start)
    share = BLAME / sum(at_fault)
    return [1.0 + share * fault for fault in at_fault]                                  # Eq. (6)


def shaped_ratio(w, gamma: float = 0.1):
    """Eq. (7): f(w) = ((1 + gamma)^2 / gamma) w / (w + gamma), less a constant so that f(1) = 1. Its gradient
    weight g(w) = w f'(w) = (1 + gamma)^2 w / (w + gamma)^2 is 1 at w = 1, at most (1 + gamma)^2 / (4 gamma),
    and falls to 0 for tokens the clean context makes impossible and for those already learned."""
    scale = (1 + gamma) ** 2 / gamma
    return scale * w / (w + gamma) - scale / (1 + gamma) + 1                            # Eq. (7)


def assign_advantages(groups, use_std: bool = False):
    """Eq. (1) for B groups of G trajectories."""
    for group in groups:
        rewards = torch.tensor([[t.rewards["total"] for t in group]])                   # (1, G)
        for t, advantage in zip(group, group_advantages(rewards, use_std)[0].tolist()):
            t.advantage = advantage


def assign_credit(groups, credit: str):
    """Eq. (6). credit: what is at fault in a failed rollout of the policy, "token" (each suspect one), "step"
    (each suspect step) or "rollout" (nothing in particular, as in GRPO). Where nothing is suspect all share
    the blame. A rollout that was cut off has no weight. Others keep weight 1."""
    for t in sum(groups, []):
        t.weights = None
        if t.provenance != "policy" or t.rewards["accuracy"]:
            continue
        if not t.finished:
            t.weights = [0.0] * len(t.ids)
        elif credit != "rollout" and t.advantage < 0:
            faulty = []
            for step, check in zip(t.steps or (), t.checks or ()):
                if check.is_suspect:
                    whole = (step.start, step.stop)
                    faulty.append(whole if credit == "step" else attribute.faulty_tokens(step, check))
            t.weights = step_credit(len(t.ids), faulty or [(0, len(t.ids))])


# ---- The loss

def has_gradient(t, beta: float) -> bool:
    """Whether a trajectory moves the policy at all (a mean of equal rewards may be off by rounding)."""
    return any(t.weights or t.sampled) and (abs(t.advantage) > 1e-6 or beta > 0)


def collate(trajectories: list, device) -> dict:
    """Padded tensors of what the loss needs: old_logps and weights (R, T), advantages and rectified (R, 1).
    A forced token has weight 0."""
    weights = []
    for t in trajectories:
        weights.append([w * sampled for w, sampled in zip(t.weights or t.sampled, t.sampled)])
    return {"old_logps": rollout.pad([t.logps for t in trajectories], 0.0)[0].to(device),
            "weights": rollout.pad(weights, 0.0)[0].to(device, torch.float32),
            "advantages": torch.tensor([[t.advantage] for t in trajectories], device=device),
            "rectified": torch.tensor([[t.provenance != "policy"] for t in trajectories], device=device)}


def policy_loss(logps, old_logps, advantages, weights, normaliser: float, clip_low: float = 0.2,
                clip_high: float = 0.28, dual_clip: float = 3.0, beta: float = 0.0, ref_logps=None,
                rectified=torch.tensor(False), lambda_r: float = 1.0, gamma: float = 0.1):
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
    w = log_ratio.clamp(max=math.log(10)).exp()
    shaped = lambda_r * advantages * (shaped_ratio(w, gamma) if gamma > 0 else w)
    objective = torch.where(rectified, shaped, objective)
    loss = -(weights * objective).sum() / normaliser                              # Eq. (8)
    kl = torch.zeros_like(ratio)
    if beta > 0:
        delta = torch.where(weights > 0, ref_logps - logps, 0.0).clamp(-10, 10)
        kl = delta.exp() - delta - 1                                              # Eq. (5): k3, >= 0
        loss = loss + beta * (weights * kl).sum() / normaliser
    with torch.no_grad():
        on = (weights > 0).float() * ~rectified                              # the rest is of the policy's own
        outside = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
        stats = {"tokens": on.sum(), "clip_fraction": (on * outside).sum(), "kl_ref": (on * kl).sum(),
                 "kl_old": (on * (ratio - 1 - log_ratio)).sum(), "ratio": (on * ratio).sum()}
    return loss, stats


def group_shares(correct):
    """Shares of groups all right, all wrong and mixed (which alone teach GRPO). correct (B, G) of 0 and 1."""
    mean = correct.float().mean(dim=1)
    right, wrong = (mean == 1).float().mean().item(), (mean == 0).float().mean().item()
    return {"all_right": right, "all_wrong": wrong, "mixed": 1 - right - wrong}
