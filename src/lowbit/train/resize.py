"""Bicubic enlargement as one op of the training graph, which freeze turns into the Graph's ``resize_bicubic``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.interpreter import bicubic_taps, mirrored

__all__ = ["ResizeBicubic", "resize_bicubic"]

FACTORS = (2, 3, 4)


@lru_cache(maxsize=64)
def _plan(size: int, factor: int, device: torch.device) -> tuple[Tensor, list[tuple[int, list[float]]]]:
    """Of one axis: the positions of the mirrored, padded input, and for each phase where its first tap lies there and the four
    coefficients."""
    first, coefficients = bicubic_taps(factor)
    low, high = int(first.min()), size + int(first.max()) + 3
    positions = torch.from_numpy(mirrored(np.arange(low, high), size)).to(device)
    phases = [(int(f) - low, [float(c) for c in row]) for f, row in zip(first, coefficients, strict=True)]
    return positions, phases


def _along(x: Tensor, axis: int, factor: int) -> Tensor:
    """One axis: ((c0 x0 + c1 x1) + c2 x2) + c3 x3, every product and sum rounded."""
    size = x.shape[axis]
    positions, phases = _plan(size, factor, x.device)
    padded = x.index_select(axis, positions)
    out = []
    for start, coefficients in phases:
        total: Tensor | None = None
        for k, c in enumerate(coefficients):
            product = padded.narrow(axis, start + k, size) * c
            total = product if total is None else total + product
        assert total is not None
        out.append(total)
    return torch.stack(out, axis + 1).flatten(axis, axis + 1)


def _along_transposed(grad: Tensor, axis: int, factor: int) -> Tensor:
    """What the gradient of one axis' output gives its input."""
    size = grad.shape[axis] // factor
    positions, phases = _plan(size, factor, grad.device)
    padded = grad.new_zeros([len(positions) if i == axis else n for i, n in enumerate(grad.shape)])
    by_phase = torch.unflatten(grad, axis, (size, factor)).unbind(axis + 1)
    for part, (start, coefficients) in zip(by_phase, phases, strict=True):
        for k, c in enumerate(coefficients):
            padded.narrow(axis, start + k, size).add_(part, alpha=c)
    out = grad.new_zeros([size if i == axis else n for i, n in enumerate(grad.shape)])
    return out.index_add_(axis, positions, padded)


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
