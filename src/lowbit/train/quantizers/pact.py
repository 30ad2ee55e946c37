"""PACT: a learned clipping level for activations. Choi et al. 2018 (arXiv 1805.06085)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bits import Codes
from lowbit.train.quantizers.base import ACTIVATIONS, ActivationQuantizer


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, reciprocal: Tensor, scale: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return torch.clamp(torch.round(x * reciprocal), 0, levels) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        above = x >= alpha
        inside = (x >= 0) & ~above
        return torch.where(inside, grad, 0), torch.where(above, grad, 0).sum().view_as(alpha), None, None, None


@ACTIVATIONS.register("pact")
class PACT(ActivationQuantizer):
    """q(x) = round(clip(x, 0, a) n / a) a / n with n = 2^B - 1 and a learned, one for the layer (1805.06085).

    Gradients: dq/dx = 1 on [0, a), else 0; dq/da = 1 for x >= a, else 0. The paper regularises a by its square: `alpha` takes
    the weight decay of ordinary weights (`parameter_groups`).

    Args:
        bits: B.
        alpha: where a starts.
    """

    allowed_bits = (2, 3, 4, 5, 6, 7, 8)
    decayed = ("alpha",)

    def __init__(self, bits: int, alpha: float = 4.0) -> None:
        super().__init__(bits)
        self._code_type = Codes("unsigned", bits)
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, not {alpha!r}")
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    @property
    def code_type(self) -> Codes:
        return self._code_type

    @property
    def _positive(self) -> Tensor:
        # a step of the optimiser may not turn the range around
        return torch.clamp(self.alpha.detach().float(), min=1e-3)

    @property
    def scale(self) -> Tensor:
        return self._positive / (2**self.bits - 1)

    @property
    def reciprocal(self) -> Tensor:
        return (2**self.bits - 1) / self._positive

    def fake(self, x: Tensor) -> Tensor:
        levels = 2**self.bits - 1
        out: Tensor = _PACT.apply(x.float(), self.alpha, self.reciprocal, self.scale, levels)  # type: ignore[no-untyped-call]
        return out
