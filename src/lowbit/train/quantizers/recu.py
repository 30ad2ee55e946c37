"""ReCU: reviving the dead weights. Xu et al., ICCV 2021 (arXiv 2103.12369)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.train.quantizers.base import WEIGHTS, Encoded, magnitude, per_channel, sign
from lowbit.train.quantizers.sign import BinaryWeight, clip_gradient
from lowbit.train.quantizers.standardize import standardize

_EPS = 1e-5


class _ClampedSign(torch.autograd.Function):
    """sign(clamp(w, -bound, bound)) = sign(w) with the gradient of the clamp."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, bound: Tensor) -> Tensor:
        ctx.save_for_backward(w, bound)
        return sign(w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, bound = ctx.saved_tensors
        return clip_gradient(grad, w / bound), None


@WEIGHTS.register("recu")
class ReCU(BinaryWeight):
    """q(w) = alpha_o sign(w'') with, per output channel o, the standardised weights w' and the rectified clamp unit w''::

        w'  = 2 sqrt(2) (w - mean_o) / sqrt(var_o + 1e-5)
        w'' = clamp(w', -Q, Q),  Q = -mean|W'| ln(2 - 2 tau)

    Q is the tau-quantile of a Laplace distribution with the layer's mean|W'| (2103.12369). Weights beyond it, which would hardly
    ever change their sign, are moved to it. tau grows over the run from `tau_min` to `tau_max` as A e^progress + B
    with A = (tau_max - tau_min) / (e - 1), as in the authors' code; `Schedule` moves it.

    Gradient: dsign/dw'' = 1, dw''/dw' = 1 for |w'| <= Q, else 0, then that of w' in w, exactly; Q is a constant. var is unbiased
    and 2 sqrt(2) is the spread in the authors' code, which we follow.

    alpha_o is learned, one per output channel, as in the authors' code: dL/dalpha_o = sum over o of dL/dq sign(w''). It starts
    at mean|w'_o| (1 where that is 0), the scale that is nearest to w'; their code draws it from (0, 1). A batch norm behind the
    layer takes in either. It takes no weight decay (there it takes the weights'). The clamp changes no sign: it acts by
    the gradient alone.

    Their activations are ``sign`` with ``gradient="polynomial"``; in training their code also divides every image's
    activations by their standard deviation before the sign, which changes what the polynomial cuts off and is left out here.

    Args:
        bits: 1.
        tau_min, tau_max: tau at the start and at the end, 0.5 < tau_min <= tau_max < 1; 0.85 and 0.99 as published.
    """

    alpha: nn.Parameter
    tau: Tensor

    def __init__(self, bits: int = 1, tau_min: float = 0.85, tau_max: float = 0.99) -> None:
        super().__init__(bits)
        if not 0.5 < tau_min <= tau_max < 1:
            raise ValueError(
                f"tau_min and tau_max must keep 0.5 < tau_min <= tau_max < 1, not {tau_min!r} and {tau_max!r}"
            )
        self.tau_min, self.tau_max = tau_min, tau_max
        self.register_buffer("tau", torch.tensor(tau_min))

    def attach(self, weight: Tensor) -> None:
        size = magnitude(self._standardized(weight.detach()))
        self.alpha = nn.Parameter(torch.where(size > 0, size, 1.0))

    def anneal(self, progress: float) -> None:
        a = (self.tau_max - self.tau_min) / (math.e - 1)
        self.tau.fill_(a * math.exp(progress) + self.tau_min - a)

    def _standardized(self, latent: Tensor) -> Tensor:
        return standardize(latent, _EPS) * math.sqrt(8)

    def fake(self, latent: Tensor) -> Tensor:
        w = self._standardized(latent)
        bound = w.detach().abs().mean() * -torch.log(2 - 2 * self.tau)
        binary: Tensor = _ClampedSign.apply(w, bound)  # type: ignore[no-untyped-call]
        return binary * per_channel(self.alpha, w)

    def encode(self, latent: Tensor) -> Encoded:
        # the clamp leaves every sign as it is
        return Encoded(sign(self._standardized(latent.detach())), self.alpha.detach().float())

    def extra_repr(self) -> str:
        return f"bits=1, tau_min={self.tau_min}, tau_max={self.tau_max}"
