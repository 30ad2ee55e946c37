"""Weights with mean 0 and standard deviation 1 per output channel: what IR-Net and ReCU take the sign of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Standardize(torch.autograd.Function):
    # torch.var takes ten times as long as the norm of the centred weights on CPU
    @staticmethod
    def forward(ctx: Any, w: Tensor, eps: float) -> Tensor:
        dims = tuple(range(1, w.ndim))
        ctx.free = max(w[0].numel() - 1, 1)
        mean = w.mean(dim=dims, keepdim=True)
        w = w - mean
        deviation = torch.sqrt(torch.linalg.vector_norm(w, dim=dims, keepdim=True).square() / ctx.free + eps)
        # what equal weights leave of their mean is rounding noise, not to be blown up
        flat = deviation <= torch.finfo(w.dtype).eps * mean.abs()
        reciprocal = 1 / torch.where(flat, 1.0, deviation)
        w = w.mul_(torch.where(flat, 0.0, reciprocal))
        ctx.save_for_backward(w, reciprocal)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, reciprocal = ctx.saved_tensors
        dims = tuple(range(1, w.ndim))
        along = (grad * w).sum(dim=dims, keepdim=True).div_(-ctx.free)
        return torch.addcmul(grad - grad.mean(dim=dims, keepdim=True), w, along).mul_(reciprocal), None


def standardize(weight: Tensor, eps: float = 0.0) -> Tensor:
    """(w - mean_o) / sqrt(var_o + eps) per output channel o, with the unbiased variance and the exact gradient.

    float32, the shape of `weight`, [O, ...]. Channels whose weights are all equal, single weights among them, give 0, and
    their gradient is that of w - mean_o.
    """
    out: Tensor = _Standardize.apply(weight.float(), eps)  # type: ignore[no-untyped-call]
    return out
