"""The pieces our networks are made of."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train.layers import Residual

__all__ = ["ConvUnit", "Down", "Nonlinearity", "Order", "PReLU", "RPReLU", "ResidualBlock", "Shortcut", "nonlinear"]

Nonlinearity = Literal["none", "relu", "prelu", "rprelu"]
Order = Literal["conv-bn-act", "conv-act-bn", "conv-bn-add-act"]
Down = Literal["pool", "conv"]


class _PReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        return torch.prelu(x, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        grad = grad.to(x.dtype)
        above: Tensor = torch.ops.aten.threshold_backward(grad, x, 0)
        below = grad - above  # exact: above is grad or 0
        axes = [i for i in range(x.ndim) if i != 1]
        return above + slope.to(x.dtype).view(-1, *[1] * (x.ndim - 2)) * below, (below * x).sum(axes).to(slope.dtype)


class PReLU(nn.PReLU):
    """nn.PReLU with one slope for each channel, and in training a gradient that is 5x faster on CPUs.

    ``y = max(x, 0) + a[c] * min(x, 0)`` (He et al., ICCV 2015, arXiv 1502.01852). Values and gradients are those of
    nn.PReLU, except that the slopes' gradient is summed in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.ndim > 1:
            return _PReLUFunction.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return super().forward(x)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


class _RPReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, zeta: Tensor) -> Tensor:
        shifted = x - _per_channel(gamma, x)
        ctx.save_for_backward(shifted, beta)
        return torch.prelu(shifted, beta.to(x.dtype)).add_(_per_channel(zeta, x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shifted, beta = ctx.saved_tensors
        grad = grad.to(shifted.dtype)
        above: Tensor = torch.ops.aten.threshold_backward(grad, shifted, 0)
        below = grad - above  # exact: above is grad or 0
        axes = [i for i in range(grad.ndim) if i != 1]
        zeta_grad, above_sum = grad.sum(axes, dtype=beta.dtype), above.sum(axes, dtype=beta.dtype)
        gamma_grad = -(above_sum + beta * (zeta_grad - above_sum))  # minus the sum of x's gradient, without reading it
        beta_grad = (below * shifted).sum(axes, dtype=beta.dtype)
        return above.addcmul_(_per_channel(beta, grad), below), gamma_grad, beta_grad, zeta_grad


class RPReLU(nn.Module):
    """ReActNet's PReLU with a learned shift on both sides, one set of three numbers for each channel c.

    ``y = PReLU(x - gamma[c]) + zeta[c]``, slope ``beta[c]`` below gamma (Liu et al., ECCV 2020, arXiv 2003.03488).
    gamma and zeta start at 0, beta at 0.25. Input and output ``[N, channels, ...]``. In training the gradient is
    computed in one go, from one saved tensor; it is that of the formula, with the parameters' sums in another order.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.full((channels,), 0.25))
        self.zeta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return _RPReLUFunction.apply(x, self.gamma, self.beta, self.zeta)  # type: ignore[no-untyped-call]
        return F.prelu(x - _per_channel(self.gamma, x), self.beta.to(x.dtype)) + _per_channel(self.zeta, x)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}"


def nonlinear(kind: Nonlinearity, channels: int) -> nn.Module:
    """``"none"``, ``"relu"``, ``"prelu"`` with one slope for each channel, started at 0.25, or ``"rprelu"`` (`RPReLU`).

    Raises:
        ValueError: another name.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "relu":
        return nn.ReLU()
    if kind == "prelu":
        return PReLU(channels)
    if kind == "rprelu":
        return RPReLU(channels)
    raise ValueError(f"nonlinearity {kind!r}: 'none', 'relu', 'prelu' or 'rprelu'")


def _check_order(order: Order) -> None:
    if order not in get_args(Order):
        raise ValueError(f"order {order!r}: {', '.join(map(repr, get_args(Order)[:-1]))} or {get_args(Order)[-1]!r}")


class ConvUnit(nn.Module):
    """A convolution without bias, batch normalisation and a nonlinearity, in one of the orders.

    ``conv-bn-act`` is the usual one; ``conv-act-bn`` (with PReLU: conv-PReLU-BN) is that of SLB's ResNets.
    ``conv-bn-add-act`` is for a `ResidualBlock`, and the same as ``conv-bn-act`` where there is no sum.
    Padding keeps the size (where the stride is 1). ``pool`` comes right behind the convolution, as in VGG-Small and XNOR-Net.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        nonlinearity: Nonlinearity = "none",
        order: Order = "conv-bn-act",
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_order(order)
        self.order = order
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.pool = nn.Identity() if pool is None else pool
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nonlinear(nonlinearity, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.conv(x))
        if self.order == "conv-act-bn":
            return self.bn(self.act(y))
        return self.act(self.bn(y))


class Shortcut(nn.Module):
    """Down-sampling shortcut: a 1x1 convolution and BN.

    ``down="pool"``: 2x2 average pooling in front of the convolution, which reads every number (Bi-Real net). Odd sides
    round up, as the 3x3 convolution with stride 2 does; a window over the edge averages what it covers. ``down="conv"``:
    the convolution has the stride itself (He et al., option B). The name is what `lowbit.train.prepare` knows it by.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, down: Down = "pool") -> None:
        super().__init__()
        if down not in get_args(Down):
            raise ValueError(f"shortcut {down!r}: 'pool' or 'conv'")
        pooled = down == "pool" and stride == 2
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, 1 if pooled else stride, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pool(x)))


class ResidualBlock(nn.Module):
    """``units`` convolution units in a row and one skip around them all: ``y = [act](units(x) + shortcut(x))``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1, or 2 in the first unit.
        units: 1 is Bi-Real net's block, 2 the basic block of He et al.
        nonlinearity: of each unit. That of the last one comes behind the sum with order ``conv-bn-add-act`` (ReActNet),
            and with ``conv-bn-act`` and two units (He et al.).
        order: see ``ConvUnit``.
        down: see ``Shortcut``; used where stride or channels change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        units: int = 1,
        nonlinearity: Nonlinearity = "none",
        order: Order = "conv-bn-act",
        down: Down = "pool",
    ) -> None:
        super().__init__()
        behind_sum = order == "conv-bn-add-act" or (units > 1 and order == "conv-bn-act")
        body = []
        for i in range(units):
            kind: Nonlinearity = "none" if behind_sum and i == units - 1 else nonlinearity
            first = i == 0
            body.append(
                ConvUnit(
                    in_channels if first else out_channels,
                    out_channels,
                    stride=stride if first else 1,
                    nonlinearity=kind,
                    order=order,
                )
            )
        self.body = nn.Sequential(*body)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else Shortcut(in_channels, out_channels, stride, down)
        self.add = Residual()
        self.act = nonlinear(nonlinearity, out_channels) if behind_sum else nn.Identity()
        # what the next block adds to, is the nonlinearity's output
        self.stream = Residual() if behind_sum and nonlinearity != "none" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.stream(self.act(self.add(self.body(x), self.shortcut(x))))
