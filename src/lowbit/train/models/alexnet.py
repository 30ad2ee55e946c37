"""AlexNet as the binary papers use it: batch normalisation in place of local response normalisation, no groups."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.train.models import MODELS
from lowbit.train.models.blocks import ConvUnit, Nonlinearity, Order, nonlinear

__all__ = ["AlexNet", "alexnet"]


class _LinearUnit(nn.Module):
    """A linear layer without bias, batch normalisation and a nonlinearity: [N, I] -> [N, O]."""

    def __init__(self, in_features: int, out_features: int, nonlinearity: Nonlinearity, order: Order) -> None:
        super().__init__()
        self.order = order
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bn = nn.BatchNorm1d(out_features)
        self.act = nonlinear(nonlinearity, out_features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.order == "conv-act-bn":
            return self.bn(self.act(y))
        return self.act(self.bn(y))


class AlexNet(nn.Module):
    """XNOR-Net's AlexNet (Rastegari et al., ECCV 2016, arXiv 1603.05279), after the authors' model file.

    96 11x11 with stride 4, BN, ReLU, M, BN; 256 5x5, M, BN; 384 3x3, BN; 384 3x3, BN; 256 3x3, M, BN; linear 4096, BN; linear
    4096, BN, ReLU; linear. M is 3x3 max pooling with stride 2. XNOR-Net writes BN - sign - convolution - M; `prepare` puts
    the sign in front of the convolution, so the same chain reads convolution - M - BN here. Biases in front of a BN are
    left out. DoReFa-Net's AlexNet is another one (12x12 stem without BN, two groups in three layers), and so is
    Krizhevsky's (two groups, LRN; 61 million parameters where this one has 62.4).

    Input ``[N, in_channels, S, S]`` with S >= 63, published at 224 and 227 (6x6 in front of the linear layers); output ``[N, classes]``.
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        image_size: int,
        width: int,
        nonlinearity: Nonlinearity,
        order: Order,
    ) -> None:
        super().__init__()
        if width < 3 or width % 3:
            raise ValueError(
                f"width {width}: AlexNet's is a multiple of 3, for its 8/3 as many channels in the second layer"
            )
        side = (image_size + 2 * 2 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise ValueError(f"image_size {image_size}: AlexNet needs at least 63, four times halved and pooled")
        second, third, hidden = 8 * width // 3, 4 * width, 128 * width // 3

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2)

        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 11, 4, 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            pool(),
            nn.BatchNorm2d(width),
        )
        self.features = nn.Sequential(
            ConvUnit(width, second, 5, 1, nonlinearity, order, pool()),
            ConvUnit(second, third, 3, 1, nonlinearity, order),
            ConvUnit(third, third, 3, 1, nonlinearity, order),
            ConvUnit(third, second, 3, 1, nonlinearity, order, pool()),
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            _LinearUnit(second * side * side, hidden, nonlinearity, order),
            _LinearUnit(hidden, hidden, "relu", "conv-bn-act"),
        )
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.classifier(self.flatten(self.features(self.stem(x)))))


@MODELS.register("alexnet")
def alexnet(
    classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    width: int = 96,
    nonlinearity: Nonlinearity = "none",
    order: Order = "conv-bn-act",
) -> nn.Module:
    """AlexNet with batch normalisation and without groups, as in XNOR-Net: five convolutions, three linear layers.

    Args:
        classes: number of outputs.
        in_channels: 1 or 3.
        image_size: 224 or 227 as published; at least 63.
        width: channels of the first layer; 96 as published (then 256, 384, 384, 256, 4096, 4096).
        nonlinearity: of layers 2 to 6: "none" (the sign is nonlinear enough), "relu" (for a float network), "prelu" or "rprelu".
        order: "conv-bn-act" or "conv-act-bn".
    """
    return AlexNet(classes, in_channels, image_size, width, nonlinearity, order)
