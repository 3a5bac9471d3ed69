"""Large fp32 products on a CPU by oneDNN.

Place in the pipeline: beneath the linear maps of the model, where there are no gradients (sampler, checks,
evaluation). Source: our choice. PyTorch hands fp32 products to MKL, which leaves AVX-512 unused on AMD
processors; oneDNN, the other library PyTorch comes with, does large ones twice as fast there. What it brings
the sampler: `experiments/speed.py`. Those of the tiny model are too small to gain, but for large images.
"""
import torch
import torch.nn.functional as F

LARGE = 1 << 24             # multiplications; with a few millions MKL is as fast


def linear(x, weight, bias=None):
    """F.linear: x (..., D), weight (E, D), bias (E,) or None -> (..., E)."""
    if (x.numel() * len(weight) < LARGE or torch.is_grad_enabled() or x.device.type != "cpu"
            or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available()
            or not torch.backends.mkldnn.enabled):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(torch.nn.Linear):
    """nn.Linear that multiplies by `linear`."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)
