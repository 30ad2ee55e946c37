"""Bicubic enlargement as one op of the training graph, which freeze turns into the Graph's ``resize_bicubic``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ResizeBicubic", "resize_bicubic"]

FACTORS = (2, 3, 4)


def _kernel(t: float) -> float:
    """The cubic convolution kernel with a = -0.5 (Keys 1981, IEEE TASSP 29(6), eq. 15)."""
    t = abs(t)
    if t <= 1:
        return (1.5 * t - 2.5) * t * t + 1
    return ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0


@lru_cache(maxsize=64)
def _taps(size: int, factor: int) -> tuple[Tensor, Tensor]:
    """Source positions, int64 [4, size * factor], and coefficients, float32 of the same shape, of every output position."""
    positions, coefficients = [], []
    for out in range(size * factor):
        centre = (out + 0.5) / factor - 0.5
        first = math.floor(centre) - 1
        around = range(first, first + 4)
        mirrored = [i % (2 * size) for i in around]
        positions.append([i if i < size else 2 * size - 1 - i for i in mirrored])
        coefficients.append([_kernel(centre - i) for i in around])
    return torch.tensor(positions).T.contiguous(), torch.tensor(coefficients, dtype=torch.float64).float().T.contiguous()


def _along(x: Tensor, axis: int, factor: int) -> Tensor:
    """One axis: ((c0 x0 + c1 x1) + c2 x2) + c3 x3, every product and sum rounded."""
    positions, coefficients = (each.to(x.device) for each in _taps(x.shape[axis], factor))
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    total = x.index_select(axis, positions[0]) * coefficients[0].view(shape)
    for k in range(1, 4):
        total = total + x.index_select(axis, positions[k]) * coefficients[k].view(shape)
    return total


def _along_transposed(grad: Tensor, axis: int, factor: int) -> Tensor:
    """What the gradient of one axis' output gives its input."""
    size = grad.shape[axis] // factor
    positions, coefficients = (each.to(grad.device) for each in _taps(size, factor))
    shape = [-1 if i == axis else 1 for i in range(grad.ndim)]
    out = grad.new_zeros([size if i == axis else n for i, n in enumerate(grad.shape)])
    for k in range(4):
        out.index_add_(axis, positions[k], grad * coefficients[k].view(shape))
    return out


@torch.library.custom_op("lowbit::resize_bicubic", mutates_args=())
def _resize_bicubic(x: Tensor, factor: int) -> Tensor:
    # an op of its own: one node for freeze, and no compiler fuses products and sums
    return _along(_along(x.float(), 2, factor), 3, factor)


@_resize_bicubic.register_fake
def _(x: Tensor, factor: int) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, c, h * factor, w * factor), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:  # noqa: ARG001
    ctx.factor, ctx.dtype = inputs[1], inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    back = _along_transposed(_along_transposed(grad.float(), 3, ctx.factor), 2, ctx.factor)
    return back.to(ctx.dtype), None


_resize_bicubic.register_autograd(_backward, setup_context=_save)


def resize_bicubic(x: Tensor, factor: int) -> Tensor:
    """Enlarge images by 2, 3 or 4, bicubic with a = -0.5: the op ``resize_bicubic`` of docs/OPS.md, to the last bit.

    Output position o lies at (o + 0.5) / factor - 0.5; positions beyond the image are mirrored, the edge repeated (-1 -> 0,
    -2 -> 1), as MATLAB's imresize does. Vertically first, each axis ((c0 x0 + c1 x1) + c2 x2) + c3 x3 in float32.

    Args:
        x: ``[N, C, H, W]``.
        factor: 2, 3 or 4.

    Returns:
        float32 ``[N, C, factor H, factor W]``.

    Raises:
        ValueError: another factor, or no images.
    """
    if factor not in FACTORS:
        raise ValueError(f"resize_bicubic enlarges by 2, 3 or 4, not {factor!r}")
    if x.ndim != 4:
        raise ValueError(f"resize_bicubic takes images (N, C, H, W), not {tuple(x.shape)}")
    out: Tensor = torch.ops.lowbit.resize_bicubic(x, factor)
    return out


class ResizeBicubic(nn.Module):
    """`resize_bicubic` as a layer without parameters."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        if factor not in FACTORS:
            raise ValueError(f"resize_bicubic enlarges by 2, 3 or 4, not {factor!r}")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return resize_bicubic(x, self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"
