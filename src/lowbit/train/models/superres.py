"""Networks for super-resolution: luma ``[N, 1, H, W]`` in 0..1 in, luma ``[N, 1, upscale H, upscale W]`` out.

All add what they have learned to the bicubic enlargement, so an untrained network is the bicubic one, or near it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lowbit.train.layers import Residual
from lowbit.train.models import MODELS
from lowbit.train.models.blocks import PReLU
from lowbit.train.resize import ResizeBicubic

__all__ = ["VDSR", "BiRealSR", "Gain", "LinearSR", "Shift", "bireal_sr", "linear_sr", "vdsr"]

MIDDLE_GRAY = 0.5
"""Taken from the luma in front of a first convolution, so that its zero padding is gray and not darker than black."""

Act = Literal["relu", "prelu", "none"]


class Shift(nn.Module):
    """``y = x + b[c]``: in front of a quantizer a learned threshold (of a sign: ReActNet's RSign, arXiv 2003.03488, with b = -beta)."""

    def __init__(self, channels: int, start: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, 1, 1)


class Gain(nn.Module):
    """``y = s[c] * x + o[c]``: the scale of a low-bit convolution without batch norm; o starts at 0.

    What is trained is s over its start, which is often small: the steps of Adam have one size whatever the parameter's is.
    """

    start: Tensor

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.register_buffer("start", torch.tensor(float(start)))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight * self.start).view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def _start(gain: float | None, width: int) -> float:
    return 0.1 / math.sqrt(9 * width) if gain is None else gain


def _activation(kind: Act, channels: int) -> nn.Module:
    if kind not in get_args(Act):
        raise ValueError(f"act {kind!r}: 'relu', 'prelu' or 'none'")
    return {"relu": nn.ReLU, "none": nn.Identity}[kind]() if kind != "prelu" else PReLU(channels)


class _Block(nn.Module):
    """``y = x + PReLU(s * conv(x + b) + o)``; ``prepare`` puts the quantizer between shift and convolution."""

    def __init__(self, width: int, gain: float | None, shift: float) -> None:
        super().__init__()
        self.shift = Shift(width, shift)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.gain = Gain(width, _start(gain, width))
        self.act = PReLU(width)
        self.add = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.act(self.gain(self.conv(self.shift(x)))), x)


class BiRealSR(nn.Module):
    """Bi-Real blocks at the low resolution, ESPCN's pixel shuffle behind them. See `bireal_sr`."""

    def __init__(self, upscale: int, width: int, blocks: int, gain: float | None, shift: float) -> None:
        super().__init__()
        self.bicubic = ResizeBicubic(upscale)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.stream = Residual()
        self.blocks = nn.Sequential(*[_Block(width, gain, shift) for _ in range(blocks)])
        self.tail = nn.Conv2d(width, upscale * upscale, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.stream(self.stem(x - MIDDLE_GRAY))
        return self.shuffle(self.tail(self.blocks(y))) + self.bicubic(x)


@MODELS.register("bireal_sr")
def bireal_sr(
    upscale: int = 2, width: int = 32, blocks: int = 12, gain: float | None = None, shift: float = 0.0
) -> nn.Module:
    """Super-resolution at the low resolution: the default network.

    A 3x3 convolution; ``blocks`` blocks y = x + PReLU(s * conv(q(x + b)) + o), all of b, s, o and the slope one number a
    channel; a 3x3 convolution to upscale^2 channels, which starts at zero, pixel shuffle (ESPCN, Shi et al., CVPR 2016); plus
    bicubic. The skips are those of Bi-Real net (1808.00278). No batch norm. x2, width 32, 12 blocks: 110,592 body
    weights, 112 k multiply-adds for a pixel of the input.

    Args:
        upscale: how much larger the output is: 2, 3 or 4.
        width: channels of the body.
        blocks: low-bit 3x3 convolutions.
        gain: where s starts, which matters: too large, and the sum over the blocks hides what the first ones see. None for 0.1 / sqrt(9
            width), which suits weights and activations of +-1; float weights, and dorefa's, which have a scale, want about 0.2, LSQ's
            2-bit activations 0.06.
        shift: where b starts: 0.5 centres activations in 0..1 (dorefa).
    """
    return BiRealSR(upscale, width, blocks, gain, shift)


class _PlainLayer(nn.Module):
    """``act(conv(x))``, with ``shift`` before and ``gain`` behind the convolution and ``skip`` around them, as asked for."""

    def __init__(self, width: int, act: Act, skip: bool, scaled: bool, shifted: bool, gain: float | None) -> None:
        super().__init__()
        self.shift = Shift(width) if shifted else nn.Identity()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=not scaled)
        self.gain = Gain(width, _start(gain, width)) if scaled else nn.Identity()
        self.act = _activation(act, width)
        self.add = Residual() if skip else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.gain(self.conv(self.shift(x))))
        return y if self.add is None else self.add(y, x)


class VDSR(nn.Module):
    """Kim et al., CVPR 2016. See `vdsr`."""

    def __init__(
        self,
        upscale: int,
        width: int,
        depth: int,
        act: Act,
        skip: bool,
        scaled: bool,
        shifted: bool,
        gain: float | None,
        gray: float,
        zero_tail: bool,
    ) -> None:
        super().__init__()
        if depth < 3:
            raise ValueError(f"depth = {depth}: a first, a last and at least one layer between")
        self.bicubic = ResizeBicubic(upscale)
        self.gray = gray
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.act = _activation(act, width)
        self.stream = Residual() if skip else nn.Identity()
        self.blocks = nn.Sequential(*[_PlainLayer(width, act, skip, scaled, shifted, gain) for _ in range(depth - 2)])
        self.tail = nn.Conv2d(width, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al., as published
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_tail:
            nn.init.zeros_(self.tail.weight)

    def forward(self, x: Tensor) -> Tensor:
        large = self.bicubic(x)
        y = self.stream(self.act(self.stem(large - self.gray if self.gray else large)))
        return self.tail(self.blocks(y)) + large


@MODELS.register("vdsr")
def vdsr(
    upscale: int = 2,
    width: int = 64,
    depth: int = 20,
    act: Act = "relu",
    skip: bool = False,
    scaled: bool = False,
    shifted: bool = False,
    gain: float | None = None,
    gray: float = 0.0,
    zero_tail: bool | None = None,
) -> nn.Module:
    """VDSR (Kim et al., CVPR 2016, arXiv 1511.04587): ``depth`` 3x3 convolutions on the bicubic enlargement, which is added to the end.

    As published: 20 layers of 64 channels with ReLU between, no batch norm. For binary layers: without ``scaled``
    nothing sets the size of a sum of +-1, a sign behind ReLU is always +1 and nothing passes 18 of them; ``scaled`` and
    ``skip`` are what it takes. Works at the high resolution: 666 k multiply-adds for a pixel of the output.

    Args:
        upscale: how much larger the output is: 2, 3 or 4.
        width: channels.
        depth: layers, first and last included.
        act: behind each but the last layer: "relu", "prelu" or "none".
        skip: an identity around each layer of the body (Bi-Real net): y = x + act(conv(x)).
        scaled: a learned factor and term for each channel behind each convolution of the body, in place of its bias.
        shifted: a learned term for each channel in front of each convolution of the body: a sign's threshold.
        gain: where the factors start; None for 0.1 / sqrt(9 width), which suits weights and activations of +-1.
        gray: taken from the luma in front of the first convolution: 0.5 centres it, so that its signs tell something.
        zero_tail: the last layer starts at zero, and so the output as bicubic; None for where there are skips, whose sum
            is large. As published (False) it starts like the others.
    """
    return VDSR(upscale, width, depth, act, skip, scaled, shifted, gain, gray, skip if zero_tail is None else zero_tail)


class LinearSR(nn.Module):
    """Bicubic plus one trained filter for each output phase. See `linear_sr`."""

    def __init__(self, upscale: int, size: int) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size = {size}: an odd number")
        self.bicubic = ResizeBicubic(upscale)
        self.filters = nn.Conv2d(1, upscale * upscale, size, padding=size // 2, bias=False)
        nn.init.zeros_(self.filters.weight)
        self.shuffle = nn.PixelShuffle(upscale)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.filters(x)) + self.bicubic(x)


@MODELS.register("linear_sr")
def linear_sr(upscale: int = 2, size: int = 5) -> nn.Module:
    """The linear control: one trained ``size`` x ``size`` filter for each of the upscale^2 output phases, added to bicubic.

    What a network gains over bicubic without learning anything but a sharper kernel; read every gain against it.

    Args:
        upscale: how much larger the output is: 2, 3 or 4.
        size: side of the filters, odd.
    """
    return LinearSR(upscale, size)
