"""DoReFa activations: Zhou et al. 2016 (arXiv 1606.06160), equation 5 and section 2.5."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.bits import Codes
from lowbit.train.quantizers.base import ACTIVATIONS, ActivationQuantizer, uniform_ste


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
