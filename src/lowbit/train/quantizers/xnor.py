"""XNOR-Net weights. Rastegari et al., ECCV 2016 (arXiv 1603.05279)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.train.quantizers.base import WEIGHTS, Encoded, magnitude, per_channel, sign
from lowbit.train.quantizers.sign import BinaryWeight, clip_gradient


class _XNOR(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(w, alpha)
        return sign(w) * alpha

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, alpha = ctx.saved_tensors
        return torch.addcmul(grad / w[0].numel(), clip_gradient(grad, w), alpha), None


@WEIGHTS.register("xnor")
class XNOR(BinaryWeight):
    """q(w) = alpha_o sign(w) with alpha_o = mean|w_o| per output channel o (1603.05279).

    Gradient: dL/dw_i = dL/dq_i (1/n + alpha_o dsign/dw_i) with n weights per output channel and dsign/dw = 1 for |w| <= 1, else
    0. This is the paper's own, elementwise reading of the product rule. The authors' code also multiplies it by 1 - 1 / (input
    channels), and with SGD by n; before every step it takes the mean over the input channels off the weights and clips them to
    [-1, 1]. We follow the paper.

    The paper also scales every position of the output by K, the mean of |x| over the window that it comes from. K is left out, as
    in the authors' code: activations are plain `sign`.
    """

    def fake(self, latent: Tensor) -> Tensor:
        latent = latent.float()
        out: Tensor = _XNOR.apply(latent, per_channel(magnitude(latent), latent))  # type: ignore[no-untyped-call]
        return out

    def encode(self, latent: Tensor) -> Encoded:
        return Encoded(sign(latent.detach().float()), magnitude(latent))
