"""IR-Net: information retention. Qin et al., CVPR 2020 (arXiv 1909.10788)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train.quantizers.base import ACTIVATIONS, WEIGHTS, Encoded, magnitude, per_channel, sign
from lowbit.train.quantizers.sign import BinaryActivation, BinaryWeight
from lowbit.train.quantizers.standardize import standardize

_T_MAX = 10.0


class _SignErrorDecay(torch.autograd.Function):
    """sign(x) with the gradient of the error decay estimator (EDE), that of g(x) = k tanh(t x), k = max(1/t, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(x, t)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, t = ctx.saved_tensors
        # g' = k t (1 - tanh(t x)^2) = 4 k t p (1 - p) with p = sigmoid(+-2 t x): torch's tanh takes nine times as long on CPU;
        # the small one of the two p keeps its digits where the other rounds to 1, in bfloat16 already at t x = 3
        p = torch.sigmoid_(x.abs().mul_(-2 * t))
        return torch.ops.aten.sigmoid_backward(grad, p).mul_(4 * torch.clamp(t, min=1)), None


class ErrorDecay(nn.Module):
    """What quantizers with the error decay estimator share: t = t_min (10 / t_min)^progress, moved by the schedule.

    Args:
        bits: 1.
        t_min: t at the start, 0 < t_min <= 10.

    Raises:
        ValueError: t_min outside its range.
    """

    t: Tensor

    def __init__(self, bits: int = 1, t_min: float = 0.1) -> None:
        super().__init__(bits)
        if not 0 < t_min <= _T_MAX:
            raise ValueError(f"t_min must be above 0 and at most {_T_MAX:g}, where t ends, not {t_min!r}")
        self.t_min = float(t_min)
        self.register_buffer("t", torch.tensor(self.t_min))

    def anneal(self, progress: float) -> None:
        self.t.fill_(self.t_min * (_T_MAX / self.t_min) ** progress)

    def extra_repr(self) -> str:
        return f"bits=1, t_min={self.t_min}"

    def decayed_sign(self, x: Tensor) -> Tensor:
        """sign(x) with the estimator's gradient at the present t."""
        out: Tensor = _SignErrorDecay.apply(x, self.t)  # type: ignore[no-untyped-call]
        return out


@WEIGHTS.register("irnet")
class IRNet(ErrorDecay, BinaryWeight):
    """q(w) = 2^s_o sign(w^) with w^ = (w - mean_o) / std_o and s_o = round(log2(mean|w^_o|)) per output channel o.

    Libra parameter binarization (1909.10788): the balanced, standardised weights have the largest entropy, and the scale is a
    shift of the integer accumulator. std is the unbiased one and s one number per channel, as in the authors' code. A channel
    whose weights are all equal has w^ = 0 and, where 2^s would be 0, the scale 1.

    Gradient: dsign/dw^ = k t (1 - tanh^2(t w^)), the error decay estimator, with t = t_min (10 / t_min)^progress and
    k = max(1/t, 1): nearly the identity at the start of the run, nearly the sign's own at its end; `Schedule` moves t, every step or
    every epoch. Behind it the exact gradient of w^ in w; s is a constant.

    Args:
        bits: 1.
        t_min: t at the start, 0 < t_min <= 10. The authors' code has 0.1 for VGG-Small and 0.001 for ResNet-20.

    Raises:
        ValueError: t_min outside its range.
    """

    def fake(self, latent: Tensor) -> Tensor:
        w = standardize(latent)
        return self.decayed_sign(w) * per_channel(_shift(w), w)

    def encode(self, latent: Tensor) -> Encoded:
        w = standardize(latent.detach())
        return Encoded(sign(w), _shift(w))


def _shift(w: Tensor) -> Tensor:
    """2^s per output channel."""
    size = magnitude(w)
    return torch.where(size > 0, torch.exp2(torch.round(torch.log2(size))), 1.0)


@ACTIVATIONS.register("irnet")
class IRNetActivation(ErrorDecay, BinaryActivation):
    """q(x) = sign(x) with the error decay estimator's gradient: see `IRNet`, whose `t_min` it needs too (1909.10788).

    The authors' networks have a hardtanh in front of every sign. The sign does not see it, but the gradient does: it is 0
    outside [-1, 1], while the estimator's own is about 1 everywhere in the first half of a run.

    Args:
        bits: 1.
        t_min: t at the start, 0 < t_min <= 10.
        clip: have that hardtanh. Without it our 12-block network trains badly (docs/LOG.md).

    Raises:
        ValueError: t_min outside its range.
    """

    def __init__(self, bits: int = 1, t_min: float = 0.1, clip: bool = True) -> None:
        super().__init__(bits, t_min)
        self.clip = bool(clip)

    def fake(self, x: Tensor) -> Tensor:
        return self.decayed_sign(F.hardtanh(x) if self.clip else x)
