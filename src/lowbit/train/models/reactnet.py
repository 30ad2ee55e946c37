"""ReActNet (Liu et al., ECCV 2020, arXiv 2003.03488): ResNet-18 in Bi-Real form, and ReActNet-A, in the form of MobileNet.

Two learned shifts make it ReActNet. RPReLU, behind every sum, belongs to the network: `blocks.RPReLU`. RSign, in front of every
binary convolution, is an activation quantizer: ``prepare(..., activation="reactnet")``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.train.layers import Residual
from lowbit.train.models import MODELS
from lowbit.train.models.blocks import ConvUnit, Nonlinearity, nonlinear
from lowbit.train.models.resnet import ResNet

__all__ = ["ReActNetA", "reactnet18", "reactnet_a"]


@MODELS.register("reactnet18")
def reactnet18(
    classes: int = 1000, in_channels: int = 3, width: int = 64, nonlinearity: Nonlinearity = "rprelu"
) -> nn.Module:
    """ReActNet on ResNet-18: Bi-Real ResNet-18 with RPReLU behind every sum (2003.03488).

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the first stage; 64 as published.
        nonlinearity: behind each sum: "none", "relu", "prelu" or "rprelu".
    """
    return ResNet(classes, in_channels, (2, 2, 2, 2), "bireal", nonlinearity, "conv-bn-add-act", "pool", width)


class _Twice(nn.Module):
    """The input and a copy of it, joined along the channels: [N, C, H, W] -> [N, 2 C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


class _Skip(nn.Module):
    """``y = act(BN(conv(x)) + shortcut(x))`` with a shortcut that has no parameters."""

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int, stride: int, nonlinearity: Nonlinearity
    ) -> None:
        super().__init__()
        halve = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
        self.shortcut = nn.Sequential(*[halve] * (stride == 2), *[_Twice()] * (out_channels == 2 * channels))
        self.unit = ConvUnit(channels, out_channels, kernel_size, stride)
        self.add = Residual()
        self.act = nonlinear(nonlinearity, out_channels)
        self.stream = Residual() if nonlinearity != "none" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x)  # first, so that the sum is part of the convolution's epilogue in the engine
        return self.stream(self.act(self.add(self.unit(x), skip)))


class ReActNetA(nn.Module):
    """3x3 stem with stride 2, BN; 13 blocks, each a 3x3 and a 1x1 binary convolution with a skip of its own; average; linear.

    The blocks are those of MobileNet with full convolutions in place of the depthwise ones (2003.03488 and
    the authors' code). The 3x3 keeps the channels and has the block's stride; its shortcut is the identity or 2x2 average pooling. The
    1x1 keeps the channels or doubles them. Doubling is published as two 1x1 convolutions C -> C on the same signs, each
    with its own BN and the same shortcut, joined along channels; here that is one convolution C -> 2 C, its BN, and the
    shortcut joined with itself, which are the same numbers in one layer. No shortcut has parameters, so no 1x1
    convolution is an edge. Input ``[N, in_channels, H, W]``, output ``[N, classes]``; at 224x224 the blocks work at 112,
    56 (2), 28 (2), 14 (6) and 7 (2).
    """

    def __init__(self, classes: int, in_channels: int, width: int, nonlinearity: Nonlinearity) -> None:
        super().__init__()
        self.stem = ConvUnit(in_channels, width, 3, 2)
        self.stream = Residual()
        layers = []
        channels = width
        for multiple, count in ((2, 1), (4, 2), (8, 2), (16, 6), (32, 2)):
            out = width * multiple
            for i in range(count):
                stride = 2 if multiple > 2 and i == 0 else 1
                layers.append(_Skip(channels, channels, 3, stride, nonlinearity))
                layers.append(_Skip(channels, out, 1, 1, nonlinearity))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.stem(x))
        return self.head(self.flatten(self.pool(self.blocks(x))))


@MODELS.register("reactnet_a")
def reactnet_a(
    classes: int = 1000, in_channels: int = 3, width: int = 32, nonlinearity: Nonlinearity = "rprelu"
) -> nn.Module:
    """ReActNet-A: a MobileNet of binary 3x3 and 1x1 convolutions.

    29.3 million parameters, 4.82 G binary and 12 M float multiply-adds at 224x224.

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the stem; 32 as published, growing to 32 times as many.
        nonlinearity: behind each sum: "none", "relu", "prelu" or "rprelu".
    """
    return ReActNetA(classes, in_channels, width, nonlinearity)
