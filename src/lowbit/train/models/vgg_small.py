"""VGG-Small, the network of the low-bit papers on CIFAR-10 (Zhang et al., LQ-Nets, ECCV 2018, arXiv 1807.10029)."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.train.models import MODELS
from lowbit.train.models.blocks import ConvUnit, Nonlinearity, Order

__all__ = ["VGGSmall", "vgg_small"]


class VGGSmall(nn.Module):
    """128-128-M-256-256-M-512-512-M and one linear layer; all convolutions 3x3, M is 2x2 max pooling.

    Pooling comes right behind the convolution, then BN and the nonlinearity. Input ``[N, in_channels, S, S]`` with
    S >= 8, output ``[N, classes]``.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        image_size: int,
        width: int = 128,
        nonlinearity: Nonlinearity = "none",
        order: Order = "conv-bn-act",
    ) -> None:
        super().__init__()
        side = image_size // 8
        if side < 1:
            raise ValueError(f"image_size {image_size}: VGG-Small halves three times, so at least 8")
        layers = []
        channels = in_channels
        for stage in range(3):
            out = width << stage
            layers.append(ConvUnit(channels, out, nonlinearity=nonlinearity, order=order))
            layers.append(ConvUnit(out, out, nonlinearity=nonlinearity, order=order, pool=nn.MaxPool2d(2)))
            channels = out
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.features(x)))


@MODELS.register("vgg_small")
def vgg_small(
    classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    width: int = 128,
    nonlinearity: Nonlinearity = "none",
    order: Order = "conv-bn-act",
) -> nn.Module:
    """VGG-Small: six convolutions and one linear layer.

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        image_size: 32 (CIFAR) or 28 (Fashion-MNIST).
        width: channels of the first stage; 128 as published.
        nonlinearity: "none" (the sign is nonlinear enough), "relu" (for a float network), "prelu" or "rprelu".
        order: "conv-bn-act" or "conv-act-bn".
    """
    return VGGSmall(classes, in_channels, image_size, width, nonlinearity, order)
