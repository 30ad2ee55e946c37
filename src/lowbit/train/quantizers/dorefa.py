"""DoReFa-Net, weights and activations: Zhou et al. 2016 (arXiv 1606.06160). Gradients are not quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.bits import Codes
from lowbit.train.quantizers.base import (
    ACTIVATIONS,
    WEIGHTS,
    ActivationQuantizer,
    Encoded,
    WeightQuantizer,
    round_ste,
    sign,
    uniform_ste,
)


class _ScaledSign(torch.autograd.Function):
    """sign(w) * scale with the gradient of the identity: the scale is no factor of it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor) -> Tensor:  # noqa: ARG004
        return sign(w) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def _mean_size(weight: Tensor) -> Tensor:
    return weight.detach().float().abs().mean()


@WEIGHTS.register("dorefa")
class DoReFa(WeightQuantizer):
    """K bits (1606.06160; n = 2^K - 1)::

        K = 1    q(w) = mean|W| sign(w), one scale for the layer              dq/dw = 1
        K > 1    q(w) = 2 round(n u) / n - 1, u = tanh(w) / (2 max|tanh(W)|) + 1/2    dround(n u)/d(n u) = 1

    The scale of K = 1 is a constant in the gradient. For K > 1 the gradient of u is exact, that of the maximum included, as
    in the authors' code. Codes are the odd integers 2 round(n u) - n, the step is float32(1/n); the tie at w = 0 goes to +1/n.
    """

    allowed_bits = (1, 2, 3, 4, 5, 6, 7, 8)
    _scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self._code_type = Codes("bipolar", bits)
        self.register_buffer("_scale", torch.tensor(1 / (2**bits - 1), dtype=torch.float32), persistent=False)

    @property
    def code_type(self) -> Codes:
        return self._code_type

    def _codes(self, latent: Tensor) -> Tensor:
        n = 2**self.bits - 1
        t = torch.tanh(latent.float())
        largest = t.abs().amax()
        u = t / torch.where(largest > 0, 2 * largest, 1.0) + 0.5
        return 2 * round_ste(n * u) - n

    def fake(self, latent: Tensor) -> Tensor:
        if self.bits > 1:
            return self._codes(latent) * self._scale
        out: Tensor = _ScaledSign.apply(latent.float(), _mean_size(latent))  # type: ignore[no-untyped-call]
        return out

    def encode(self, latent: Tensor) -> Encoded:
        latent = latent.detach()
        if self.bits > 1:
            return Encoded(self._codes(latent), self._scale)
        return Encoded(sign(latent.float()), _mean_size(latent))


@ACTIVATIONS.register("dorefa")
class DoReFaActivation(ActivationQuantizer):
    """q(x) = round(n clip(x, 0, 1)) / n with n = 2^B - 1; dq/dx = 1 on [0, 1], else 0.

    Codes are unsigned, 0 .. n, the step is float32(1/n). With B = 1 the values are {0, 1}, not {-1, +1}.
    """

    allowed_bits = (1, 2, 3, 4, 5, 6, 7, 8)

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self._code_type = Codes("unsigned", bits)
        levels = 2**bits - 1
        self.register_buffer("_scale", torch.tensor(1 / levels, dtype=torch.float32), persistent=False)
        self.register_buffer("_reciprocal", torch.tensor(float(levels)), persistent=False)

    _scale: Tensor
    _reciprocal: Tensor

    @property
    def code_type(self) -> Codes:
        return self._code_type

    @property
    def scale(self) -> Tensor:
        return self._scale

    @property
    def reciprocal(self) -> Tensor:
        return self._reciprocal

    def fake(self, x: Tensor) -> Tensor:
        return uniform_ste(x, self._reciprocal, self._scale, self.code_type)
