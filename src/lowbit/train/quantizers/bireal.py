"""Bi-Real net's magnitude-aware weights. Liu et al., ECCV 2018 (arXiv 1808.00278)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.train.quantizers.base import WEIGHTS, Encoded, magnitude, per_channel, sign
from lowbit.train.quantizers.sign import BinaryWeight, Sign


class _SignOpen(Sign):
    """dq/dx = 1 for |x| < 1, else 0."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = torch.ops.aten.hardtanh_backward(grad, x, -1.0, 1.0)
        return out


@WEIGHTS.register("bireal")
class BiReal(BinaryWeight):
    """q(w) = alpha_o sign(w) with alpha_o = mean|w_o| per output channel o (1808.00278, "magnitude-aware gradient").

    Gradient: dq/dw = alpha_o for |w| < 1, else 0; alpha is a constant in it. The PyTorch code that the authors published for
    Bi-Real net and for ReActNet passes the gradient without the factor alpha_o; we follow the paper. Adam, which that code
    trains with, does not see the difference but for how alpha moves; SGD does.

    These are ReActNet's weights too. The activations of Bi-Real net are ``sign`` with ``gradient="polynomial"``.
    """

    def fake(self, latent: Tensor) -> Tensor:
        latent = latent.float()
        binary: Tensor = _SignOpen.apply(latent)  # type: ignore[no-untyped-call]
        return binary * per_channel(magnitude(latent), latent)

    def encode(self, latent: Tensor) -> Encoded:
        return Encoded(sign(latent.detach().float()), magnitude(latent))
