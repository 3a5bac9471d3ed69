"""AdamW over ranks: fp32 master weights, its state sharded (ZeRO-1), clipped by the norm over all ranks.

Place in the pipeline: last of a step; train.py calls `collect` after each backward pass and `step` once, both
within `updating`. runtime/sharding.py has the other way to spread a model over ranks.
"""
import contextlib
import math
from pathlib import Path

import torch
from safetensors import safe_open


def learning_rate(config, step: int, progress: float) -> float:
    """Linear warm-up, then linear decay to lr_end x lr at the end. progress: share of the training done."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps)) * (
        1 - (1 - config.lr_end) * progress)


class Optimizer:
    """AdamW on fp32 master weights, its state sharded over ranks (ZeRO-1): each parameter has one owner, who
    alone holds its master and moments. Gradients are added up in fp32, summed to their owner once an
    optimiser step, and clipped by the norm of all of them; the owner updates and sends the parameter to the
    others. Source: Rajbhandari et al. (arXiv 1910.02054)."""

    def __init__(self, model, config, ranks):
        self.names, self.params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
        self.ranks, self.max_grad_norm = ranks, config.max_grad_norm
        self.owners, load = [0] * len(self.params), [0] * ranks.world
        for i in sorted(range(len(self.params)), key=lambda i: -self.params[i].numel()):
            self.owners[i] = load.index(min(load))          # the largest first, to who holds least
            load[self.owners[i]] += self.params[i].numel()
        self.sums = [None] * len(self.params)               # fp32 gradients of parameters that are not
        self.masters = self.own()
        mine = list(self.masters.values())
        groups = [{"params": [m for m in mine if m.dim() > 1], "weight_decay": config.weight_decay},
                  {"params": [m for m in mine if m.dim() <= 1], "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))

    def own(self) -> dict:
        """The masters that this rank updates, by the number of their parameter."""
        return {i: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
                for i, p in enumerate(self.params) if self.owners[i] == self.ranks.rank}

    def updating(self):
        """A context for forward and backward passes and `step`."""
        return contextlib.nullcontext()

    def gradient(self, i: int):
        """The gradient of parameter i, summed over passes and ranks, where its master lies."""
        p = self.params[i]
        grad, p.grad, self.sums[i] = p.grad if self.sums[i] is None else self.sums[i], None, None
        return self.ranks.reduce(torch.zeros_like(p, dtype=torch.float32) if grad is None else grad,
                                 self.owners[i])

    def publish(self, i: int):
        """The updated master of parameter i, to the model of every rank."""
        p = self.params[i]
        if i in self.masters and self.masters[i] is not p:
            p.copy_(self.masters[i])
        self.ranks.spread(p.data, self.owners[i])

    def collect(self):
        """After each backward pass: add bf16 gradients to their fp32 sums (fp32 ones sum up in place)."""
        for i, p in enumerate(self.params):
            if p.dtype != torch.float32 and p.grad is not None:
                self.sums[i] = p.grad.float() if self.sums[i] is None else self.sums[i].add_(p.grad)
                p.grad = None

    def step(self, lr: float) -> float:
        """One update. Returns the gradient norm before clipping; where that is not finite, nothing moves."""
        squares = torch.zeros((), dtype=torch.float64)
        for i in range(len(self.params)):
            grad = self.gradient(i)
            if i in self.masters:
                self.masters[i].grad = grad
                squares += grad.norm().double().cpu() ** 2
        norm = self.ranks.sum(squares).sqrt().item()
        if math.isfinite(norm):
            for m in self.masters.values():
                m.grad.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            with torch.no_grad():
                for i in range(len(self.params)):
                    self.publish(i)
        self.adamw.zero_grad()
        return norm

    def state(self) -> dict:
        """What a resumed run needs of the parameters that this rank owns, as named tensors."""
        out = {}
        for i, m in self.masters.items():
            kept = {**self.adamw.state[m], **({} if m is self.params[i] else {"master": m.detach()})}
            kept = {f"{self.names[i]}/{key}": self.all_of(i, value) for key, value in kept.items()}
            out.update(kept if self.owners[i] == self.ranks.rank else {})
        return out

    def all_of(self, i: int, tensor):
        """A tensor of parameter i as it is saved, and as it is held: the same here, where a rank holds all of
        it or nothing."""
        return tensor

    held = all_of

    def load(self, files: list[Path]):
        """This rank's share out of the files of all ranks, however many they were. ValueError where a
        parameter has no moments though others have (it was frozen then)."""
        state = {}
        for file in files:
            with safe_open(file, "pt") as f:
                state.update(dict.fromkeys(f.keys(), file))

        def found(key):
            with safe_open(state[key], "pt") as f:
                return f.get_tensor(key)

        for i, m in self.masters.items():
            name = self.names[i]
            if f"{name}/master" in state:               # also where the run was in bfloat16 and is no more
                m.data.copy_(self.held(i, found(f"{name}/master")))
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{k}" in state]
            if not keys and any(key.endswith("/exp_avg") for key in state):
                raise ValueError(f"--resume: the checkpoint has no optimiser state for {name}: was it "
                                 "frozen?")
            self.adamw.state[m] = {k: found(f"{name}/{k}") if k == "step" else
                                   self.held(i, found(f"{name}/{k}")).to(m.device) for k in keys}
