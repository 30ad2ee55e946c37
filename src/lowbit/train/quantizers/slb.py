"""SLB: searching for low-bit weights. Yang et al., NeurIPS 2020 (arXiv 2009.08695).

Every weight is a distribution over a few values; a temperature sharpens it during training; the likeliest value is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.bits import Codes
from lowbit.train.quantizers.base import WEIGHTS, Encoded, WeightQuantizer

_HALF_SQRT2 = math.sqrt(0.5)


class _Expectation(torch.autograd.Function):
    """tanh(z) = 2 sigmoid(2 z) - 1 with z = b * slope: the mean of -1 and +1 under the distribution (1 - p, p), p = sigmoid(2 z).

    torch's tanh takes nine times as long as its sigmoid on CPU.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, slope: Tensor) -> Tensor:
        p = torch.sigmoid_(b * (slope + slope))
        w = p.add_(p).sub_(1.0)
        ctx.save_for_backward(w, slope)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, slope = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, w).mul_(slope), None


@WEIGHTS.register("slb")
class SLB(WeightQuantizer):
    """W_c = sum_i P_i v_i with P = softmax(A T) in training; W_q = v_argmax(A) at inference.

    A are the logits, one per weight and value, V = {v_1 .. v_m} with m = 2^K evenly spaced in [-1, 1], and T the
    inverse temperature that grows during training (2009.08695; `Schedule` moves T). The gradient is exact, there is no
    straight-through estimator: dL/dA_i = T P_i (v_i - W_c) dL/dW_c.

    Logits have shape [m, O, ...], values in ascending order. K = 1 is stored as one logit b = (A_2 - A_1) / sqrt(2) of
    shape [O, ...]: then W_c = tanh(T b / sqrt(2)), and b moves under SGD exactly as the two logits would, with the same
    learning rate, momentum, weight decay and spread at the start. (Under Adam multiply the learning rate by sqrt(2).)
    Ties go to the larger value.

    Args:
        bits: K.
        init: ``"weights"`` starts every distribution at the float weight it replaces: with the weight w scaled to a
            standard deviation of 1/2, A_i = a (2 w v_i - v_i^2), so that the nearest value is the likeliest;
            ``"random"`` draws logits from a normal distribution. Either way the logits of K = 1 have the standard
            deviation `spread` * sqrt(2 / fan_in).
        spread: size of the logits at the start.
        learn_values: train V together with the logits (an extension, K >= 2). The hard network rounds V to
            scale * integers in -127..127, which must stay distinct.
    """

    allowed_bits = (1, 2, 4)
    real_latent = False
    temperature: Tensor

    def __init__(self, bits: int, init: str = "weights", spread: float = 1.0, learn_values: bool = False) -> None:
        super().__init__(bits)
        if init not in ("weights", "random"):
            raise ValueError(f"init is 'weights' or 'random', not {init!r}")
        if not spread > 0:
            raise ValueError(f"spread must be positive, not {spread!r}")
        if learn_values and bits == 1:
            raise ValueError(
                "learn_values needs 2 weight bits or more: two values are a scale, which the layer's BN has"
            )
        self.init = init
        self.spread = spread
        self.register_buffer("temperature", torch.ones(()))
        codes = torch.from_numpy(Codes("bipolar", bits).values.copy()).float()
        # code times float32(1 / (m - 1)), not linspace: then fake == decode(encode) holds to the last bit
        self.register_buffer("_codes", codes, persistent=False)
        self.register_buffer("_scale", torch.tensor(1 / (2**bits - 1), dtype=torch.float32), persistent=False)
        self.values = nn.Parameter(codes * self._scale) if learn_values else None

    _codes: Tensor
    _scale: Tensor

    def latent(self, weight: Tensor) -> Tensor:
        w = weight.detach().float()
        size = self.spread * math.sqrt(2 / max(w[0].numel(), 1))
        shape = w.shape if self.bits == 1 else (2**self.bits, *w.shape)
        if self.init == "random":
            return torch.randn(shape, device=w.device) * size
        deviation = w.std(correction=0) if w.numel() > 1 else w.abs().max()
        w = w / (2 * deviation) if deviation > 0 else w
        if self.bits == 1:
            return w * (2 * size)
        values = (self._codes * self._scale).view(-1, *[1] * w.ndim).to(w.device)
        return (size * _HALF_SQRT2) * (2 * w * values - values.square())

    def fake(self, latent: Tensor) -> Tensor:
        latent = latent.float()
        if self.bits == 1:
            out: Tensor = _Expectation.apply(latent, self.temperature * _HALF_SQRT2)  # type: ignore[no-untyped-call]
            return out
        with torch.autocast(latent.device.type, enabled=False):  # which would take the sum in bfloat16
            probabilities = torch.softmax(latent * self.temperature, dim=0)
            values = self._codes * self._scale if self.values is None else self.values
            return torch.tensordot(values, probabilities, dims=1)

    @property
    def code_type(self) -> Codes:
        if self.values is None:
            return Codes("bipolar", self.bits)
        table = tuple(int(v) for v in self._table()[0])
        if len(set(table)) < len(table):
            raise ValueError(
                f"two learned values of SLB fell together: {table} (in 127ths of the largest). "
                "Train with fewer bits, or with learn_values=False."
            )
        return Codes("table", self.bits, table=table)

    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The learned values as ascending integers, the rank of each value among them, and their scale."""
        assert self.values is not None
        values, order = self.values.detach().float().sort()
        scale = torch.clamp(values.abs().amax(), min=1e-8) / 127
        return torch.round(values / scale), order.argsort(), scale

    def encode(self, latent: Tensor) -> Encoded:
        latent = latent.detach()
        if self.bits == 1:
            return Encoded(torch.where(latent >= 0, 1.0, -1.0), torch.ones((), device=latent.device))
        # argmax from the top: ties go to the larger value
        index = (2**self.bits - 1) - latent.flip(0).argmax(dim=0)
        if self.values is None:
            return Encoded(self._codes[index], self._scale)
        table, rank, scale = self._table()
        return Encoded(table[rank[index]], scale)

    def sharpen(self) -> None:
        self.temperature.fill_(1e12)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, init={self.init!r}, learn_values={self.values is not None}"
