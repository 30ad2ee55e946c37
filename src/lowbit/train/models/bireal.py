"""Bi-Real networks: a skip around every binary convolution (Liu et al., ECCV 2018, arXiv 1808.00278)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lowbit.train.layers import Residual
from lowbit.train.models import MODELS
from lowbit.train.models.blocks import Nonlinearity, Order, ResidualBlock
from lowbit.train.models.resnet import ResNet

__all__ = ["BiRealResNet14", "bireal_resnet14", "bireal_resnet18", "bireal_resnet34"]


class BiRealResNet14(nn.Module):
    """3x3 stem with stride 2, BN; 3 stages of 4 blocks, one 3x3 convolution each; global average; linear.

    Block: ``y = [act](BN(conv(x))) + x``; ``prepare`` puts the sign in front of the convolution. The first block of each
    stage after the first has stride 2 and the shortcut 2x2 average pooling, 1x1 convolution, BN. 14 layers: stem, 12
    blocks, head. Input ``[N, in_channels, H, W]``, output ``[N, classes]``. The arguments are those of `bireal_resnet14`.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        width: int = 16,
        blocks: int | Sequence[int] = 4,
        nonlinearity: Nonlinearity = "none",
        order: Order = "conv-bn-act",
        expansion: float = 2.0,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        depths = (blocks,) * 3 if isinstance(blocks, int) else tuple(blocks)
        if not depths or min(depths) < 1:
            raise ValueError(f"blocks: {blocks}: a whole number of at least 1, or one for each stage")
        if width < 1 or not 1 <= expansion <= 4 or stem_stride not in (1, 2):
            raise ValueError(
                f"width {width}, expansion {expansion}, stem_stride {stem_stride}: at least 1; 1 to 4; 1 or 2"
            )
        self.stem = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stream = Residual()
        layers = []
        channels = width
        for stage, depth in enumerate(depths):
            out = round(width * expansion**stage)
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(ResidualBlock(channels, out, stride, 1, nonlinearity, order))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.bn(self.stem(x)))
        return self.head(self.flatten(self.pool(self.blocks(x))))


@MODELS.register("bireal_resnet14")
def bireal_resnet14(
    classes: int = 10,
    in_channels: int = 1,
    width: int = 16,
    blocks: int | Sequence[int] = 4,
    nonlinearity: Nonlinearity = "none",
    order: Order = "conv-bn-act",
    expansion: float = 2.0,
    stem_stride: int = 2,
) -> nn.Module:
    """Bi-Real ResNet of 14 layers for small images: the demo's network.

    Args:
        classes: number of outputs.
        in_channels: channels of the images.
        width: channels of the first stage.
        blocks: blocks in each of the three stages; 4 gives the 14 layers. Or a list, one number for each stage, as many as it has.
        nonlinearity: behind each convolution, before the sum: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act", "conv-act-bn", or "conv-bn-add-act" (the nonlinearity behind the sum, as in ReActNet).
        expansion: how many times as many channels a stage has as the one before it, 1 to 4; rounded to whole channels.
        stem_stride: 2, or 1: maps of twice the side, and four times the work, in every layer.
    """
    return BiRealResNet14(classes, in_channels, width, blocks, nonlinearity, order, expansion, stem_stride)


@MODELS.register("bireal_resnet18")
def bireal_resnet18(
    classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    nonlinearity: Nonlinearity = "none",
    order: Order = "conv-bn-act",
) -> nn.Module:
    """Bi-Real ResNet-18 for ImageNet: 16 blocks of one 3x3 convolution with a skip around it.

    As published: no nonlinearity but the sign; stem convolution, BN, max pooling; shortcuts that halve the size by 2x2
    average pooling, 1x1 convolution, BN (1808.00278). 11.69 million parameters, 1.68 G binary and 0.14 G float multiply-adds.
    LNS adds PReLU (``nonlinearity="prelu"``), SLB has blocks conv-PReLU-BN (``order="conv-act-bn"`` as well).

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the first stage; 64 as published.
        nonlinearity: behind each convolution: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act", "conv-act-bn", or "conv-bn-add-act" (the nonlinearity behind the sum, as in ReActNet).
    """
    return ResNet(classes, in_channels, (2, 2, 2, 2), "bireal", nonlinearity, order, "pool", width)


@MODELS.register("bireal_resnet34")
def bireal_resnet34(
    classes: int = 1000,
    in_channels: int = 3,
    width: int = 64,
    nonlinearity: Nonlinearity = "none",
    order: Order = "conv-bn-act",
) -> nn.Module:
    """Bi-Real ResNet-34 for ImageNet: 32 blocks of one 3x3 convolution with a skip around it.

    As published: no nonlinearity but the sign; stem convolution, BN, max pooling; shortcuts that halve the size by 2x2
    average pooling, 1x1 convolution, BN (1808.00278). 21.80 million parameters, 3.53 G binary and 0.14 G float multiply-adds.
    LNS adds PReLU (``nonlinearity="prelu"``), SLB has blocks conv-PReLU-BN (``order="conv-act-bn"`` as well).

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        width: channels of the first stage; 64 as published.
        nonlinearity: behind each convolution: "none", "relu", "prelu" or "rprelu".
        order: "conv-bn-act", "conv-act-bn", or "conv-bn-add-act" (the nonlinearity behind the sum, as in ReActNet).
    """
    return ResNet(classes, in_channels, (3, 4, 6, 3), "bireal", nonlinearity, order, "pool", width)
