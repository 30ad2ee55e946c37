"""ResNet-18 and -34 for ImageNet (He et al., CVPR 2016, arXiv 1512.03385, table 1), plain or with a skip around every convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lowbit.train.layers import Residual
from lowbit.train.models import MODELS
from lowbit.train.models.blocks import ConvUnit, Down, Nonlinearity, Order, ResidualBlock

__all__ = ["ResNet", "resnet18", "resnet34"]


class ResNet(nn.Module):
    """7x7 stem with stride 2, 3x3 max pooling with stride 2; 4 stages of basic blocks; global average; linear.

    ``structure="plain"``: a skip around two 3x3 convolutions (He et al.). ``structure="bireal"``: a skip around each
    (Bi-Real net, Liu et al., ECCV 2018, arXiv 1808.00278), and a stem without nonlinearity. The first block of stages 2
    to 4 has stride 2 and a 1x1 convolution in its shortcut. Input ``[N, in_channels, H, W]``, at 224x224 the stages work
    at 56, 28, 14 and 7; output ``[N, classes]``.

    Args:
        classes: number of outputs.
        in_channels: channels of the images.
        blocks: basic blocks (two 3x3 convolutions each) in the four stages: (2, 2, 2, 2) or (3, 4, 6, 3).
        structure: "plain" or "bireal".
        nonlinearity, order, down: see ``ResidualBlock``.
        width: channels of the first stage; each next one has twice as many.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        blocks: Sequence[int],
        structure: Literal["plain", "bireal"],
        nonlinearity: Nonlinearity,
        order: Order,
        down: Down,
        width: int = 64,
    ) -> None:
        super().__init__()
        plain = structure == "plain"
        self.stem = ConvUnit(in_channels, width, 7, 2, nonlinearity if plain else "none", order)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stream = Residual()
        layers = []
        channels = width
        for stage, count in enumerate(blocks):
            out = width << stage
            for i in range(count if plain else 2 * count):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(ResidualBlock(channels, out, stride, 2 if plain else 1, nonlinearity, order, down))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.maxpool(self.stem(x)))
        return self.head(self.flatten(self.pool(self.blocks(x))))


@MODELS.register("resnet18")
def resnet18(
    classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    nonlinearity: Nonlinearity = "prelu",
    order: Order = "conv-bn-act",
    shortcut: Down = "conv",
) -> nn.Module:
    """ResNet-18 for ImageNet: 8 basic blocks, a skip around every two 3x3 convolutions.

    With ``nonlinearity="relu"`` it is He et al.'s, 11.69 million parameters and 1.81 G multiply-adds. A ReLU in front of a
    1-bit sign makes every code +1, hence the default, "prelu".

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the first stage; 64 as published.
        nonlinearity: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act" (the second one behind the sum) or "conv-act-bn".
        shortcut: how it halves the size: "conv", a 1x1 convolution with stride 2, or "pool", 2x2 average pooling in front.
    """
    return ResNet(classes, in_channels, (2, 2, 2, 2), "plain", nonlinearity, order, shortcut, width)


@MODELS.register("resnet34")
def resnet34(
    classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    nonlinearity: Nonlinearity = "prelu",
    order: Order = "conv-bn-act",
    shortcut: Down = "conv",
) -> nn.Module:
    """ResNet-34 for ImageNet: 16 basic blocks, a skip around every two 3x3 convolutions.

    With ``nonlinearity="relu"`` it is He et al.'s, 21.80 million parameters and 3.66 G multiply-adds. A ReLU in front of a
    1-bit sign makes every code +1, hence the default, "prelu".

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the first stage; 64 as published.
        nonlinearity: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act" (the second one behind the sum) or "conv-act-bn".
        shortcut: how it halves the size: "conv", a 1x1 convolution with stride 2, or "pool", 2x2 average pooling in front.
    """
    return ResNet(classes, in_channels, (3, 4, 6, 3), "plain", nonlinearity, order, shortcut, width)
