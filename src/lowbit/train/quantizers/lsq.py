"""LSQ: learned step size quantization, weights and activations. Esser et al., ICLR 2020 (arXiv 1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bits import Codes
from lowbit.train.quantizers.base import (
    ACTIVATIONS,
    WEIGHTS,
    ActivationQuantizer,
    Encoded,
    WeightQuantizer,
    quantize,
)

_SMALLEST = 1e-6


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, reciprocal: Tensor, scale: Tensor, codes: Codes, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, step, reciprocal)
        ctx.codes, ctx.gradient_scale = codes, gradient_scale
        return quantize(x, reciprocal, codes.low, codes.high) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step, reciprocal = ctx.saved_tensors
        low, high = ctx.codes.low, ctx.codes.high
        z = x * reciprocal
        inside = torch.ops.aten.hardtanh_backward(grad, z, float(low), float(high))  # grad for low < z < high, else 0
        z = z.clamp_(low, high)
        code = torch.round(z)
        # inside: round(z) - z; beyond an end, where round(z) - z is 0 by now: that end. Nothing large cancels.
        slope = (code - z).mul_(grad).sum() + (grad - inside).mul_(code).sum()
        return inside, (slope * ctx.gradient_scale).view_as(step), None, None, None, None


def _apply(x: Tensor, step: Tensor, codes: Codes, count: int) -> Tensor:
    scale = _positive(step)
    gradient_scale = 1 / math.sqrt(max(count, 1) * codes.high)
    out: Tensor = _LSQ.apply(x, step, 1 / scale, scale, codes, gradient_scale)  # type: ignore[no-untyped-call]
    return out


def _positive(step: Tensor) -> Tensor:
    # a step of the optimiser may not turn the codes around
    return torch.clamp(step.detach().float(), min=_SMALLEST)


def _start(x: Tensor, codes: Codes) -> Tensor:
    """2 <|x|> / sqrt(Qp), or 1 where x is 0 everywhere."""
    step = 2 * x.detach().float().abs().mean() / math.sqrt(codes.high)
    return torch.where(step > 0, step, 1.0)


@WEIGHTS.register("lsq")
class LSQ(WeightQuantizer):
    """q(w) = round(clip(w / s, -Qn, Qp)) s with one learned step s for the layer; Qn = 2^(K-1), Qp = 2^(K-1) - 1.

    Gradients (1902.08153): dq/dw = 1 for -Qn < w/s < Qp, else 0, and ::

        dq/ds = round(w/s) - w/s for -Qn < w/s < Qp;  -Qn for w/s <= -Qn;  Qp for w/s >= Qp

    times 1 / sqrt(N Qp), N the number of weights of the layer. s starts at 2 mean|W| / sqrt(Qp) and is used as max(s, 1e-6). w is
    multiplied with float32(1/s), as everything is that the engine rounds. s takes the weight decay of ordinary weights.
    """

    allowed_bits = (2, 3, 4, 8)
    decayed = ("step",)
    step: nn.Parameter

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self._code_type = Codes("signed", bits)

    @property
    def code_type(self) -> Codes:
        return self._code_type

    def attach(self, weight: Tensor) -> None:
        self.step = nn.Parameter(_start(weight, self._code_type))

    def fake(self, latent: Tensor) -> Tensor:
        return _apply(latent.float(), self.step, self._code_type, latent.numel())

    def encode(self, latent: Tensor) -> Encoded:
        codes, scale = self._code_type, _positive(self.step)
        return Encoded(quantize(latent.detach().float(), 1 / scale, codes.low, codes.high), scale)


@ACTIVATIONS.register("lsq")
class LSQActivation(ActivationQuantizer):
    """`LSQ` for activations: codes 0 .. 2^B - 1 (Qn = 0, Qp = 2^B - 1), or two's complement with ``signed=True``.

    The gradient of s is scaled by 1 / sqrt(N Qp), N the number of features of the layer (1902.08153), which we count in one input,
    without the batch. s is set from the first batch in training to 2 mean|x| / sqrt(Qp) (`lowbit train` takes the mean of that over
    all processes before the first step); until then it is what normal inputs (behind a ReLU if unsigned) would give. The buffer
    `initialised` tells, and goes with the state_dict.

    Args:
        bits: B.
        signed: inputs are not behind a ReLU: let codes be negative too.
    """

    allowed_bits = (2, 3, 4, 8)
    decayed = ("step",)
    initialised: Tensor

    def __init__(self, bits: int, signed: bool = False) -> None:
        super().__init__(bits)
        self.signed = bool(signed)
        self._code_type = Codes("signed" if signed else "unsigned", bits)
        expected = math.sqrt(2 / math.pi)  # mean|x| of a standard normal x
        self.step = nn.Parameter(torch.tensor(2 * expected / math.sqrt(self._code_type.high)))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self._waiting = True  # `initialised` as a Python bool: asking a GPU's buffer would wait for it in every step

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._waiting = not bool(self.initialised)

    @property
    def code_type(self) -> Codes:
        return self._code_type

    @property
    def scale(self) -> Tensor:
        return _positive(self.step)

    @property
    def reciprocal(self) -> Tensor:
        return 1 / _positive(self.step)

    def fake(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.training and self._waiting and x.numel():
            self._initialise(x)
        return _apply(x, self.step, self._code_type, x[:1].numel())

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        self.step.copy_(_start(x, self._code_type))
        self.initialised.fill_(True)
        self._waiting = False

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"
