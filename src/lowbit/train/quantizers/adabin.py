"""AdaBin: two values per tensor that need not be -1 and +1. Tu et al., ECCV 2022 (arXiv 2208.08084).

Both sides are ``alpha * code + beta`` with codes in {-1, +1}: half the distance of the two values, and their centre. So the
engine's bits stay what they are; the centres are code offsets (docs/OPS.md).

The paper's third part, the Maxout nonlinearity (a slope for positive and one for negative numbers, both per channel), is no
quantizer: it is a PReLU and a scale per channel, which a batch norm or convolution behind it takes in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.train.quantizers.base import ACTIVATIONS, WEIGHTS, Encoded, per_channel, sign
from lowbit.train.quantizers.irnet import ErrorDecay
from lowbit.train.quantizers.sign import BinaryActivation, BinaryWeight

_TINY = 1e-8  # of a filter whose weights are all equal
_SMALLEST_ALPHA = 1e-3


class _AdaptiveSign(torch.autograd.Function):
    """alpha * sign(x - beta) + beta with the gradients that `AdaBinActivation` gives; `positive` is alpha, kept above 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, beta: Tensor, positive: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(x, beta, positive)
        return sign(x - beta) * positive + beta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, beta, positive = ctx.saved_tensors
        z = (x - beta) / positive
        slope = torch.clamp(2 - 2 * z.abs(), min=0)
        grad_x = grad * slope
        grad_alpha = (grad * (sign(z) - z * slope)).sum()
        grad_beta = grad.sum() - grad_x.sum()
        return grad_x, grad_alpha, grad_beta, None


@WEIGHTS.register("adabin")
class AdaBin(ErrorDecay, BinaryWeight):
    """q(w) = alpha_o sign((w - beta_o) / alpha_o) + beta_o per output channel o of n weights, with ::

        beta_o = mean(w_o)        alpha_o = ||w_o - beta_o||_2 / sqrt(n)

    (2208.08084, "weight equalization": centre and spread of the binary weights are those of the real ones; alpha_o is
    at least 1e-8, which only a filter of equal weights needs). Nothing is learned beside w.

    Gradient, as in the authors' code: alpha and beta pass theirs on to w, whose functions they are; that of the sign is
    k t (1 - tanh^2(t z)) at z = (w - beta_o) / alpha_o, IR-Net's error decay estimator (1909.10788), with
    t = t_min (10 / t_min)^progress and k = max(1/t, 1); `Schedule` moves t.

    Args:
        bits: 1.
        t_min: t at the start, 0 < t_min <= 10; 0.001 in the authors' code, for CIFAR-10 and for ImageNet.

    Raises:
        ValueError: t_min outside its range.
    """

    def __init__(self, bits: int = 1, t_min: float = 0.001) -> None:
        super().__init__(bits, t_min)

    @staticmethod
    def _standardized(latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, alpha and beta; the latter two of shape [O]."""
        w = latent.float()
        beta = w.flatten(1).mean(dim=1)
        centred = w - per_channel(beta, w)
        # the floor stands under the root, whose gradient at 0 is infinite
        alpha = torch.sqrt(centred.flatten(1).square().mean(dim=1) + _TINY**2)
        return centred / per_channel(alpha, w), alpha, beta

    def fake(self, latent: Tensor) -> Tensor:
        z, alpha, beta = self._standardized(latent)
        return self.decayed_sign(z) * per_channel(alpha, z) + per_channel(beta, z)

    def encode(self, latent: Tensor) -> Encoded:
        z, alpha, beta = self._standardized(latent.detach())
        return Encoded(sign(z), alpha, beta)


@ACTIVATIONS.register("adabin")
class AdaBinActivation(BinaryActivation):
    """q(x) = alpha sign((x - beta) / alpha) + beta, with alpha > 0 and beta learned, one of each for a layer.

    With z = (x - beta) / alpha and g(z) = 2 - 2 |z| for |z| < 1, else 0 (Bi-Real net's gradient of sign, 1808.00278) the
    gradients are the chain rule's ::

        dq/dx = g(z)        dq/dalpha = sign(z) - z g(z)        dq/dbeta = 1 - g(z)

    The authors' code differs from their paper: it returns alpha (sign(z) + beta). This is the paper's function.

    Args:
        bits: 1.
        alpha: where alpha starts; it is kept at 1e-3 or above.
        beta: where beta starts.

    Raises:
        ValueError: alpha is not positive, or a start is no finite number.
    """

    def __init__(self, bits: int = 1, alpha: float = 1.0, beta: float = 0.0) -> None:
        super().__init__(bits)
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be positive, not {alpha!r}")
        if not math.isfinite(beta):
            raise ValueError(f"beta must be a finite number, not {beta!r}")
        self.alpha_a = nn.Parameter(torch.tensor(float(alpha)))
        self.beta_a = nn.Parameter(torch.tensor(float(beta)))

    @property
    def scale(self) -> Tensor:
        # a step of the optimiser may not swap the two values
        return torch.clamp(self.alpha_a.detach().float(), min=_SMALLEST_ALPHA)

    @property
    def offset(self) -> Tensor:
        return self.beta_a.detach().float()

    def fake(self, x: Tensor) -> Tensor:
        # the gradient reaches alpha_a below the smallest alpha too, so that it can grow again
        out: Tensor = _AdaptiveSign.apply(x.float(), self.alpha_a, self.beta_a, self.scale)  # type: ignore[no-untyped-call]
        return out

    def encode(self, x: Tensor) -> Tensor:
        # x - beta rounds, but never to a number of another sign
        return super().encode(x.float() - self.offset)
