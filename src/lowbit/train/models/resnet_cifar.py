"""ResNet-20 for 32x32 images (He et al., CVPR 2016, arXiv 1512.03385, section 4.2), as the binary papers use it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lowbit.train.layers import Residual
from lowbit.train.models import MODELS
from lowbit.train.models.blocks import ConvUnit, Nonlinearity, Order, ResidualBlock

__all__ = ["ResNetCifar", "Structure", "resnet20"]

Structure = Literal["plain", "bireal"]


class ResNetCifar(nn.Module):
    """3x3 stem; 3 stages of 3 basic blocks of two 3x3 convolutions, 16/32/64 channels; global average; linear.

    ``structure="plain"``: a skip around every block (two convolutions). ``structure="bireal"``: a skip around every
    convolution. Both down-sample by 2x2 average pooling, 1x1 convolution, BN. Input ``[N, in_channels, H, W]``, output
    ``[N, classes]``.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        structure: Structure = "plain",
        nonlinearity: Nonlinearity = "prelu",
        order: Order = "conv-act-bn",
        blocks: int = 3,
        width: int = 16,
    ) -> None:
        super().__init__()
        if structure not in ("plain", "bireal"):
            raise ValueError(f"structure {structure!r}: 'plain' or 'bireal'")
        self.stem = ConvUnit(in_channels, width, nonlinearity=nonlinearity, order=order)
        self.stream = Residual()
        layers = []
        channels = width
        units, per_stage = (2, blocks) if structure == "plain" else (1, 2 * blocks)
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for i in range(per_stage):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(ResidualBlock(channels, out, stride, units, nonlinearity, order))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.stem(x))
        return self.head(self.flatten(self.pool(self.blocks(x))))


@MODELS.register("resnet20")
def resnet20(
    classes: int = 10,
    in_channels: int = 3,
    structure: Structure = "plain",
    nonlinearity: Nonlinearity = "prelu",
    order: Order = "conv-act-bn",
    width: int = 16,
) -> nn.Module:
    """ResNet-20: 3 stages of 3 blocks.

    The defaults are SLB's blocks, conv-PReLU-BN. For the float network of He et al. use ``nonlinearity="relu",
    order="conv-bn-act"``. A ReLU in front of a 1-bit activation makes every sign +1: use "prelu" or "none" there.

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        structure: "plain" (a skip around two convolutions) or "bireal" (around each).
        nonlinearity: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act", "conv-act-bn", or "conv-bn-add-act" (the nonlinearity behind the sum, as in ReActNet).
        width: channels of the first stage; 16 as published.
    """
    return ResNetCifar(classes, in_channels, structure, nonlinearity, order, width=width)
