"""LNS: binary weights learned with noisy supervision. Han et al., ICML 2020 (arXiv 2010.04871).

A small network per layer maps the whole filter bank to its binary weights, in place of the elementwise sign; the signs of the
latent weights are its noisy labels. Only the binary weights are kept: the mapping costs nothing at inference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.bits import Codes
from lowbit.train.quantizers.base import WEIGHTS, Encoded, QuantizerWarning, WeightQuantizer, sign
from lowbit.train.quantizers.sign import SignClipped, SignIdentity

HIGH_RATE = 0.2
"""From this error rate on the paper sees LNS fall below plain fine-tuning."""


def corrected_loss(q: Tensor, labels: Tensor, rho_plus: float, rho_minus: float) -> Tensor:
    """The squared error (q - y)^2 against true labels y = +-1, estimated without bias from noisy ones.

    With l(q, y) = (q - y)^2, labels y~ and the error rates rho_{+1} = P(y~ = -1 | y = +1), rho_{-1} = P(y~ = +1 | y = -1)::

        l~(q, y~) = [(1 - rho_{-y~}) l(q, y~) - rho_{y~} l(q, -y~)] / (1 - rho_{+1} - rho_{-1})
                  = (q - y~)^2 - 4 rho_{y~} y~ q / (1 - rho_{+1} - rho_{-1})          since l(q, -y~) = l(q, y~) + 4 q y~

    so that E[l~(q, y~)] = l(q, y) over the noise, for either y (Natarajan et al. 2013, lemma 1). Its gradient is
    2 (q - y~) - 4 rho_{y~} y~ / (1 - rho_{+1} - rho_{-1}): the noise pushes |q| a little beyond 1. l~ itself may be negative.

    Args:
        q: real predictions, any shape.
        labels: y~, each -1 or +1, the same shape.
        rho_plus, rho_minus: rho_{+1} and rho_{-1}, their sum below 1.

    Returns:
        l~ of every element; nothing is summed.
    """
    left = 1 - rho_plus - rho_minus
    # y~^2 = 1, so rho_{y~} y~ is linear in y~
    push = labels * (2 * (rho_plus + rho_minus) / left) + 2 * (rho_plus - rho_minus) / left
    return (q - labels).square() - push * q


def _check_rates(rho_plus: float, rho_minus: float) -> None:
    for name, rate in (("rho_plus", rho_plus), ("rho_minus", rho_minus)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is a probability, 0 or more and below 1, not {rate!r}")
    if rho_plus + rho_minus >= 1:
        raise ValueError(
            f"rho_plus + rho_minus must be below 1, not {rho_plus} + {rho_minus}: labels that are wrong as often as right "
            "say nothing; the paper uses rho = 0.005"
        )
    if max(rho_plus, rho_minus) >= HIGH_RATE:
        warnings.warn(
            f"LNS with rho_plus = {rho_plus}, rho_minus = {rho_minus}: from {HIGH_RATE} on the paper falls below plain "
            "fine-tuning; it uses rho = 0.005",
            QuantizerWarning,
            stacklevel=4,
        )


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution with stride 1 that keeps the size; in float32 on GPUs too, where cuDNN's would round to TF32."""
    kernel = weight.shape[2:]
    padding = (kernel[0] // 2, kernel[1] // 2)
    if not x.is_cuda:
        return F.conv2d(x, weight, padding=padding)
    return _conv_as_product(x, weight, padding)


def _conv_as_product(x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    columns = F.unfold(x, (weight.shape[2], weight.shape[3]), padding=padding)  # [O, c * taps, positions]
    return (weight.flatten(1) @ columns).view(x.shape[0], weight.shape[0], *x.shape[2:])


class FilterMapping(nn.Module):
    """f_theta: three 3x3 convolutions over a filter bank (2010.04871).

    A bank [O, c, kH, kW] is a batch of O images of c channels. Convolutions with padding 1, stride 1, no bias, weights
    [2c, c, 3, 3], [2c, 2c, 3, 3], [c, 2c, 3, 3]; batch norm (of the batch's own statistics always: there is but this one
    batch) and ReLU behind the first two. Where the bank is one row or column, taps that would only meet padding are left out,
    so 1x1 kernels and linear layers have 1x1 convolutions. That is 8 c^2 parameters for each tap, and about 400 c^2
    multiply-adds for each 3x3 filter: many channels are costly.

    Args:
        channels: c.
        size: kH and kW.
        zero: start the last convolution at zero, so that f = 0.
        device: where the parameters go.
    """

    def __init__(self, channels: int, size: tuple[int, int], zero: bool, device: torch.device) -> None:
        super().__init__()
        c, taps = channels, tuple(1 if side == 1 else 3 for side in size)

        def weight(outputs: int, inputs: int, start: bool = True) -> nn.Parameter:
            w = torch.zeros(outputs, inputs, *taps, device=device)
            if start:
                w.normal_(std=math.sqrt(2 / (inputs * math.prod(taps))))  # He et al. 2015
            return nn.Parameter(w)

        self.conv1, self.conv2 = weight(2 * c, c), weight(2 * c, 2 * c)
        self.conv3 = weight(c, 2 * c, start=not zero)
        self.gamma1, self.gamma2 = (nn.Parameter(torch.ones(2 * c, device=device)) for _ in range(2))
        self.beta1, self.beta2 = (nn.Parameter(torch.zeros(2 * c, device=device)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = _batch_norm(_conv(x, _channels_last(self.conv1)), self.gamma1, self.beta1).relu_()
        x = _batch_norm(_conv(x, _channels_last(self.conv2)), self.gamma2, self.beta2).relu_()
        return _conv(x, _channels_last(self.conv3))


def _batch_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    # not F.batch_norm, which refuses one value for each channel: a linear layer with one output
    return torch.batch_norm(x, gamma, beta, None, None, True, 0.0, 1e-5, False)


def _channels_last(x: Tensor) -> Tensor:
    """One memory format, so that the same numbers give the same sums: checkpoints come back in another one."""
    o, i, h, w = x.shape
    # not contiguous(): with one channel it takes either format for this one, and the convolutions do not
    return x.permute(0, 2, 3, 1).reshape(-1).view(o, h, w, i).permute(0, 3, 1, 2)


@WEIGHTS.register("lns")
class LNS(WeightQuantizer):
    """W_b = mean|W| * sign(q), q = f_theta(W); the loss gains alpha * l~(q, sign(W)) (2010.04871, equations 16 and 17).

    f is `FilterMapping`, over the filters of the layer. sign passes gradients straight through to q (`gradient`), and from there
    they reach theta and W, which are trained together, end to end. mean|W| is one number for the layer and carries no gradient,
    as in DoReFa: in the form "residual" with f at the identity, a step on W is exactly DoReFa's. The noisy loss too reaches
    theta and W; its labels sign(W) are constants. What is kept in the end are the codes sign(q) and the scale.

    LNS fine-tunes: W comes from a trained binary network, and f has to start near sign(W), or training collapses to chance.

    Args:
        bits: 1.
        form: ``"residual"``: f(W) = x + g(x) with x = W / mean|W| and g the three convolutions, the last one started at zero:
            training starts from exactly sign(W). ``"plain"``: f = g, as in the paper, started at random: let it learn sign(W)
            first, with the rest of the network frozen (the trainer's ``train.warm_start``), from the noisy loss: with alpha = 0
            nothing tells it of sign(W). g reads x in either form.
        alpha: weight of the noisy loss; 0 is the ablation "mapping without noisy loss". The paper uses 1 for CIFAR-10.
        reduction: ``"mean"`` of l~ over the weights of the layer (equation 16) or ``"sum"`` (equation 17). alpha means
            nothing without it: between the two lies a factor of the layer's size. The model's loss adds up its layers.
        rho: rate of wrong labels, 0.005 in the paper.
        rho_plus: P(sign(W) = -1 | the right weight is +1), `rho` if not given.
        rho_minus: P(sign(W) = +1 | the right weight is -1), `rho` if not given.
        gradient: d sign(q) / dq: ``"identity"``, or ``"clipped"`` (1 for \\|q\\| <= 1, else 0).

    Raises:
        ValueError: an option that is out of range; rates that sum to 1 or more. Warns of rates from 0.2 on, and of the plain form
            with alpha = 0.
    """

    allowed_bits = (1,)
    binary_start = True
    mapping: FilterMapping

    def __init__(
        self,
        bits: int = 1,
        form: str = "residual",
        alpha: float = 1.0,
        reduction: str = "mean",
        rho: float = 0.005,
        rho_plus: float | None = None,
        rho_minus: float | None = None,
        gradient: str = "identity",
    ) -> None:
        super().__init__(bits)
        steps = {"identity": SignIdentity, "clipped": SignClipped}
        for name, value, known in (
            ("form", form, ("residual", "plain")),
            ("reduction", reduction, ("mean", "sum")),
            ("gradient", gradient, tuple(steps)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {known[0]!r} or {known[1]!r}, not {value!r}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be 0 or more, not {alpha!r}")
        self.rho_plus = rho if rho_plus is None else rho_plus
        self.rho_minus = rho if rho_minus is None else rho_minus
        _check_rates(self.rho_plus, self.rho_minus)
        if form == "plain" and alpha == 0:
            warnings.warn(
                "LNS with form 'plain' and alpha = 0: the binary weights start at random, and nothing in the loss leads them back to "
                "sign(W); the mapping without the noisy loss needs form 'residual'",
                QuantizerWarning,
                stacklevel=2,
            )
        self.form, self.alpha, self.reduction, self.gradient = form, alpha, reduction, gradient
        self._step = steps[gradient]
        self._kept: tuple[Tensor, tuple[Any, ...]] | None = None

    @property
    def code_type(self) -> Codes:
        return Codes("bipolar", 1)

    def attach(self, weight: Tensor) -> None:
        channels, size = weight.shape[1], (1, 1) if weight.ndim == 2 else (weight.shape[2], weight.shape[3])
        self.mapping = FilterMapping(channels, size, zero=self.form == "residual", device=weight.device)

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        return self.mapping.parameters()

    def mapped(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """q = f_theta(W), float32, the shape of W, and mean|W|, one number without gradient."""
        # float32 everywhere: under autocast training would see other signs than evaluation
        with torch.autocast(latent.device.type, enabled=False):
            w = latent.float()
            images = _channels_last(w if w.ndim == 4 else w[:, :, None, None])
            scale = images.detach().abs().mean()
            x = images / scale.clamp(min=torch.finfo(torch.float32).tiny)
            q = self.mapping(x)
            return (x + q if self.form == "residual" else q).view_as(w), scale

    def fake(self, latent: Tensor) -> Tensor:
        q, scale = self.mapped(latent)
        # f is the costly part of a step: the loss of this step takes q from here. A compiled graph can't hand it over.
        wanted = self.alpha > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._kept = (q, self._stamp(latent)) if wanted else None
        out: Tensor = self._step.apply(q) * scale  # type: ignore[no-untyped-call]
        return out

    def encode(self, latent: Tensor) -> Encoded:
        with torch.no_grad():
            q, scale = self.mapped(latent)
            return Encoded(sign(q), scale)

    def auxiliary_loss(self, latent: Tensor) -> Tensor | None:
        """alpha * the mean or sum of `corrected_loss` over the layer's weights; None for alpha = 0.

        Shares the graph of the forward pass just done: add it to the task's loss, and call backward once for both.
        """
        if self.alpha == 0:
            return None
        kept, self._kept = self._kept, None
        q = kept[0] if kept is not None and kept[1] == self._stamp(latent) else self.mapped(latent)[0]
        loss = corrected_loss(q, sign(latent.detach().float()), self.rho_plus, self.rho_minus)
        return self.alpha * (loss.mean() if self.reduction == "mean" else loss.sum())

    def _stamp(self, latent: Tensor) -> tuple[Any, ...]:
        """Changes with every in-place change of W or theta, as an optimiser's step is."""
        return tuple((id(p), p._version) for p in (latent, *self.mapping.parameters()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # part of a graph: neither copied nor pickled

    def extra_repr(self) -> str:
        rates = (
            f"rho={self.rho_plus}" if self.rho_plus == self.rho_minus else f"rho=({self.rho_plus}, {self.rho_minus})"
        )
        return f"bits=1, form={self.form!r}, alpha={self.alpha}, reduction={self.reduction!r}, {rates}"
