"""No quantization: float32 weights inside a prepared network."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.train.quantizers.base import WEIGHTS, Encoded, WeightQuantizer


@WEIGHTS.register("float")
class Float(WeightQuantizer):
    """q(w) = w."""

    allowed_bits = (32,)

    @property
    def code_type(self) -> None:
        return None

    def fake(self, latent: Tensor) -> Tensor:
        return latent

    def encode(self, latent: Tensor) -> Encoded:
        return Encoded(latent.detach().float(), torch.ones((), device=latent.device))
