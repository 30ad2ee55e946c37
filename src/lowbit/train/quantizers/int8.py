"""8-bit integers for the edges of a network: symmetric, weights per output channel, activations per layer."""

from __future__ import annotations

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
    uniform_ste,
)

_TINY = 1e-8
_CODES = Codes("signed", 8)


@WEIGHTS.register("int8")
class Int8(WeightQuantizer):
    """q(w) = round(w / s_o) s_o with s_o = max|w_o| / 127 per output channel o; dq/dw = 1.

    Symmetric per-channel quantization (Krishnamoorthi 2018, arXiv 1806.08342, section 2.2); codes in -127..127.
    """

    allowed_bits = (8,)

    @property
    def code_type(self) -> Codes:
        return _CODES

    def _scale(self, latent: Tensor) -> Tensor:
        return torch.clamp(latent.detach().float().flatten(1).abs().amax(dim=1), min=_TINY) / 127

    def fake(self, latent: Tensor) -> Tensor:
        scale = self._scale(latent).view(-1, *[1] * (latent.ndim - 1))
        return round_ste(latent.float() * (1 / scale)) * scale

    def encode(self, latent: Tensor) -> Encoded:
        scale = self._scale(latent)
        reciprocal = (1 / scale).view(-1, *[1] * (latent.ndim - 1))
        codes = torch.round(latent.detach().float() * reciprocal)
        return Encoded(codes, scale)


@ACTIVATIONS.register("int8")
class Int8Activation(ActivationQuantizer):
    """q(x) = clamp(round(x / s), -128, 127) s with s = r / 127 and r a running mean of max|x|; dq/dx = 1 inside.

    r is measured while the module trains (the first batch sets it) and is fixed in evaluation
    (Jacob et al. 2018, arXiv 1712.05877, section 3.1).

    Args:
        bits: 8.
        momentum: weight of the newest batch in the running mean.
    """

    allowed_bits = (8,)
    range: Tensor

    def __init__(self, bits: int = 8, momentum: float = 0.05) -> None:
        super().__init__(bits)
        self.momentum = momentum
        self.register_buffer("range", torch.zeros(()))

    @property
    def code_type(self) -> Codes:
        return _CODES

    @property
    def _range(self) -> Tensor:
        return torch.where(self.range > 0, self.range, 1.0)  # never measured: 1

    @property
    def scale(self) -> Tensor:
        return self._range / 127

    @property
    def reciprocal(self) -> Tensor:
        return 127 / self._range

    def fake(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training:
            with torch.no_grad():
                seen = torch.clamp(x.detach().abs().amax(), min=_TINY)
                self.range.copy_(torch.where(self.range > 0, self.range.lerp(seen, self.momentum), seen))
        return uniform_ste(x, self.reciprocal, self.scale, self.code_type)
