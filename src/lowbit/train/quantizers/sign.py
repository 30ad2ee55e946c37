"""Sign: weights and activations in {-1, +1} with straight-through estimators; what all binary methods share.

BinaryNet: Courbariaux et al. 2016 (arXiv 1602.02830). The piecewise polynomial gradient for activations: Bi-Real net, Liu et
al., ECCV 2018 (arXiv 1808.00278).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.bits import Codes
from lowbit.train.quantizers.base import ACTIVATIONS, WEIGHTS, ActivationQuantizer, Encoded, WeightQuantizer, sign

_CODES = Codes("bipolar", 1)


class Sign(torch.autograd.Function):
    """sign(x) forward; every subclass is a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)


class SignIdentity(Sign):
    """dq/dx = 1."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


class SignClipped(Sign):
    """dq/dx = 1 for |x| <= 1, else 0."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return clip_gradient(grad, x)


class SignPolynomial(Sign):
    """dq/dx = 2 - 2 |x| for |x| < 1, else 0."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.rsub(x.abs(), 2, alpha=2).clamp_(min=0).mul_(grad)


def clip_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad for |x| <= 1, else 0."""
    # one vectorised pass, 20x faster than where(x.abs() <= 1, grad, 0): grad for lo < x < hi, else 0, and nothing
    # lies between 1 and hi
    hi = 1 + torch.finfo(x.dtype).eps
    out: Tensor = torch.ops.aten.hardtanh_backward(grad, x, -hi, hi)
    return out


class BinaryWeight(WeightQuantizer):
    """Base of the 1-bit weights."""

    allowed_bits = (1,)

    @property
    def code_type(self) -> Codes:
        return _CODES


class BinaryActivation(ActivationQuantizer):
    """Base of the activations in {-1, +1}."""

    allowed_bits = (1,)

    @property
    def code_type(self) -> Codes:
        return _CODES

    @property
    def scale(self) -> Tensor:
        return torch.ones(())


@WEIGHTS.register("sign")
class SignSTE(BinaryWeight):
    """q(w) = sign(w), dq/dw = 1 (identity straight-through estimator); sign(0) = +1.

    The weights of BinaryNet (1602.02830), which has no scale either: a batch normalisation behind the layer absorbs one. BinaryNet
    also clips the latent weights to [-1, 1] after every step; here they are left alone.
    """

    def fake(self, latent: Tensor) -> Tensor:
        out: Tensor = SignIdentity.apply(latent)  # type: ignore[no-untyped-call]
        return out

    def encode(self, latent: Tensor) -> Encoded:
        return Encoded(sign(latent.detach().float()), torch.ones((), device=latent.device))


@ACTIVATIONS.register("sign")
class SignActivation(BinaryActivation):
    """q(x) = sign(x), with one of two gradients. The polynomial one is what Bi-Real net and ReCU give their activations.

    Args:
        bits: 1.
        gradient: ``"clipped"``: dq/dx = 1 for |x| <= 1, else 0 (BinaryNet, 1602.02830); ``"polynomial"``:
            dq/dx = 2 - 2 |x| for |x| < 1, else 0 (ApproxSign of Bi-Real net, 1808.00278).
    """

    def __init__(self, bits: int = 1, gradient: str = "clipped") -> None:
        super().__init__(bits)
        functions = {"clipped": SignClipped, "polynomial": SignPolynomial}
        if gradient not in functions:
            raise ValueError(f"gradient is {' or '.join(functions)}, not {gradient!r}")
        self.gradient = gradient
        self._function = functions[gradient]

    def fake(self, x: Tensor) -> Tensor:
        out: Tensor = self._function.apply(x)  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return f"bits=1, gradient={self.gradient!r}"
