"""FSDP2: weights, gradients and optimiser state spread over ranks (`--shard all`), for a model that ZeRO-1
(`optimizer.py`) leaves no room for.

Place in the pipeline: last of a step, in place of `Optimizer`. Outside the update every rank holds the whole
model: sampling reads all weights at every token, and ranks sample different numbers of tokens. Within it a
decoder layer is gathered when it is used and dropped again, forward and backward, and its gradients are
summed into shards in fp32; so all ranks must make the same number of passes. Built on torch's `fully_shard`.
"""
import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from runtime.optimizer import Optimizer


class ShardedOptimizer(Optimizer):
    """The same AdamW on shards: of each parameter every rank holds an equal part of its rows, in fp32. The
    model (fp32, not yet sharded) is gathered in `dtype`; what is neither in a layer nor sharded with one (the
    vision tower, the embeddings) is gathered once an update. Checkpoints are those of `Optimizer`."""

    def __init__(self, model, config, ranks, device, dtype):
        mesh = init_device_mesh(device.type, (ranks.world,))
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.model = model
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)
        for name in ("prompt_hidden", "rows_hidden"):               # entered without calling the model itself
            register_fsdp_forward_method(model, name)
        super().__init__(model, config, ranks)
        self._whole(True)

    def _whole(self, yes: bool):
        """Hold all weights on this rank, or its shards alone."""
        for module in (self.model, *self.model.model.layers):
            module.set_reshard_after_forward(module is not self.model and not yes, recurse=False)
            module.unshard() if yes else module.reshard()

    @contextlib.contextmanager
    def updating(self):
        """Only shards lie in memory, beside what is being computed with."""
        self._whole(False)
        yield
        self._whole(True)

    def own(self) -> dict:
        return {i: p.detach().to_local().requires_grad_() for i, p in enumerate(self.params)}

    def collect(self):
        """Nothing: the backward pass has summed the gradients into fp32 shards."""

    def gradient(self, i: int):
        p, master = self.params[i], self.masters[i]
        grad, p.grad = p.grad, None
        return torch.zeros_like(master) if grad is None else grad.to_local() * self.ranks.world  # was a mean

    def publish(self, i: int):
        """Nothing: the master is the shard."""

    def all_of(self, i: int, tensor):
        """The rows of all ranks together, in host memory; a collective."""
        p = self.params[i]
        if not tensor.dim():                                        # the number of steps
            return tensor
        return DTensor.from_local(tensor, p.device_mesh, p.placements, shape=p.shape,
                                  stride=p.stride()).full_tensor().cpu()

    def held(self, i: int, tensor):
        """This rank's rows."""
        parts = tensor.chunk(self.ranks.world)
        return parts[self.ranks.rank] if self.ranks.rank < len(parts) else tensor[:0]
