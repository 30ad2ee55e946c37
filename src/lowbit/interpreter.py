"""docs/OPS.md, executable: the meaning of a Graph in NumPy. Slow and obvious on purpose.

Integers go through float64 matrix products, exact below 2**53 (the Graph's own rule keeps them below 2**31). Float sums are
written out in the one order that docs/OPS.md gives; NumPy's `sum` and `matmul` never touch floats here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.graph import Graph, Node, Tensor, ValueType

Array = NDArray[Any]

_NONE: Final[Array] = np.zeros((), np.int64)


def run(graph: Graph, x: Array, trace: bool = False, replace: Callable[[str, Array], Array] | None = None) -> Any:
    """Run `graph` on a batch `x`: (N, H, W, C) or (N, C), uint8 or float32 as its input says.

    Values: codes as int16 integers (zero point subtracted), int32, float32 and float16, batch axis first. With `trace`
    returns ``(output, values by name)``. `replace(name, value)` may put another array in a value's place before it is
    used (the export proof feeds every layer the training graph's own numbers so).

    Raises ValueError for an input of another shape or dtype, for non-finite input and where a float16 value overflows.
    """
    types = graph.validate()
    values: dict[str, Array] = {}
    last_use = {name: node.name for node in graph.nodes for name in node.inputs}
    for node in graph.nodes:
        if node.op == "input":
            value = _input(node, x, types[node.name])
        else:
            params = {role: graph.tensors[name] for role, name in node.params.items()}
            inputs = [values[name] for name in node.inputs]
            value = RULES[node.op](node, inputs, params, [types[name] for name in node.inputs])
        values[node.name] = value if replace is None else replace(node.name, value)
        if not trace:
            for name in node.inputs:
                if last_use[name] == node.name:
                    values.pop(name, None)
    output = values[graph.output.name]
    return (output, values) if trace else output


def _input(node: Node, x: Array, t: ValueType) -> Array:
    want = np.dtype(node.attrs["dtype"])
    if not isinstance(x, np.ndarray) or x.dtype != want:
        raise ValueError(f"the input must be a {want} array, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim != len(t.shape) + 1 or x.shape[1:] != t.shape or len(x) == 0:
        raise ValueError(f"the input must be a batch of shape (N, {', '.join(map(str, t.shape))}), got {x.shape}")
    if t.codes is not None:
        zero_point = np.array(t.codes.zero_point or (0,), np.int16)
        return x.astype(np.int16) - zero_point
    if not np.isfinite(x).all():
        raise ValueError("the input holds infinities or NaN")
    return x


def _f32(x: Array) -> Array:
    return x.astype(np.float32)


def _quantize(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x = _f32(inputs[0])
    if node.attrs["kind"] == "bipolar":
        return np.where(x < 0, np.int16(-1), np.int16(1))
    bits = node.attrs["bits"]
    low, high = (0, 2**bits - 1) if node.attrs["kind"] == "unsigned" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    with np.errstate(over="ignore"):  # beyond float32 is beyond the clamp
        scaled = x * np.float32(node.attrs["reciprocal"])
    return np.clip(np.rint(scaled), low, high).astype(np.int16)


def _taps(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, ...], dilation: tuple[int, int]
) -> Iterator[tuple[int, int, Array, Array]]:
    """Every kernel tap, row-major: (kh, kw, the input under that tap, which output positions it is valid at)."""
    top, left, bottom, right = padding
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    inside = np.pad(np.ones((h, w), bool), ((top, bottom), (left, right)))
    rows = (padded.shape[1] - (kernel[0] - 1) * dilation[0] - 1) // stride[0] + 1
    cols = (padded.shape[2] - (kernel[1] - 1) * dilation[1] - 1) // stride[1] + 1
    for kh in range(kernel[0]):
        for kw in range(kernel[1]):
            y0, x0 = kh * dilation[0], kw * dilation[1]
            at = (
                slice(y0, y0 + (rows - 1) * stride[0] + 1, stride[0]),
                slice(x0, x0 + (cols - 1) * stride[1] + 1, stride[1]),
            )
            yield kh, kw, padded[:, at[0], at[1]], inside[at]


def _offset(acc: Array, input_sum: Array, weight_sum: Array, count: Array, params: Mapping[str, Tensor]) -> Array:
    """The float32 value of a product whose codes stand for code + offset, from its exact integers: the accumulator
    (..., O), the sum S of the input's codes and the sum W of the weights' codes under the valid taps, and their number N."""
    out = _f32(acc.astype(np.int32))
    weight_offset = params["weight_offset"].data if "weight_offset" in params else None
    if weight_offset is not None:
        out = out + _f32(input_sum) * weight_offset
    if "input_offset" in params:
        input_offset = params["input_offset"].data
        border = _f32(weight_sum) * input_offset
        if weight_offset is not None:
            border = border + _f32(count) * (weight_offset * input_offset)
        out = out + border
    return out


def _conv2d(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    weight = params["weight"]
    groups = node.attrs["groups"]
    o, kernel_h, kernel_w, _ = weight.data.shape
    integer = types[0].codes is not None and weight.codes is not None
    work = np.float64 if integer else np.float32
    with_offset = len(params) > 1
    parts = []
    input_sums, weight_sums, count = [], [], _NONE
    for x, w in zip(np.split(inputs[0], groups, axis=3), np.split(weight.data, groups, axis=0), strict=True):
        x, w = x.astype(work), w.astype(work)
        acc: Array | None = None
        input_sum, weight_sum, count = _NONE, _NONE, _NONE
        taps = _taps(x, (kernel_h, kernel_w), node.attrs["stride"], node.attrs["padding"], node.attrs["dilation"])
        for kh, kw, under, valid in taps:
            if acc is None:
                acc = np.zeros((*under.shape[:3], o // groups), work)
            if integer:
                acc += under @ w[:, kh, kw].T
                if with_offset:
                    input_sum = input_sum + under.astype(np.int64).sum(axis=3, keepdims=True)
                    weight_sum = weight_sum + valid[:, :, None] * w[:, kh, kw].astype(np.int64).sum(axis=1)
                    count = count + valid[:, :, None] * np.int64(w.shape[3])
            else:
                # a padded position adds w * 0 = +-0, which leaves a sum that started at +0 as it is
                for i in range(x.shape[3]):
                    acc += under[..., i : i + 1] * w[:, kh, kw, i]
        assert acc is not None
        parts.append(acc)
        input_sums.append(np.broadcast_to(input_sum, acc.shape))
        weight_sums.append(np.broadcast_to(weight_sum, acc.shape[1:]))
    out = np.concatenate(parts, axis=3)
    if with_offset:
        return _offset(out, np.concatenate(input_sums, axis=3), np.concatenate(weight_sums, axis=2), count, params)
    return out.astype(np.int32) if integer else out


def _linear(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    weight = params["weight"]
    if types[0].codes is not None and weight.codes is not None:
        acc = inputs[0].astype(np.float64) @ weight.data.astype(np.float64).T
        if len(params) > 1:
            x, w = inputs[0].astype(np.int64), weight.data.astype(np.int64)
            return _offset(acc, x.sum(axis=1, keepdims=True), w.sum(axis=1), np.array(x.shape[1]), params)
        return acc.astype(np.int32)
    x, w = _f32(inputs[0]), _f32(weight.data)
    acc = np.zeros((len(x), len(w)), np.float32)
    for i in range(x.shape[1]):
        acc += x[:, i : i + 1] * w[:, i]
    return acc


def _mul(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    return _f32(inputs[0]) * params["factor"].data


def _add(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    return _f32(inputs[0]) + (_f32(inputs[1]) if len(inputs) == 2 else params["term"].data)


def _prelu(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x = _f32(inputs[0])
    return np.where(x < 0, x * params["slope"].data, x)


def _relu(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x = _f32(inputs[0])
    return np.where(x > 0, x, np.float32(0))


def _clip(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x, low, high = _f32(inputs[0]), np.float32(node.attrs["low"]), np.float32(node.attrs["high"])
    return np.where(x < low, low, np.where(x > high, high, x))


def _cast(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    with np.errstate(over="ignore"):
        out = inputs[0].astype(node.attrs["dtype"])
    if not np.isfinite(out).all():
        raise ValueError(f"{node.name} (cast): a value beyond 65504 does not fit float16; use residual_dtype='float32'")
    return out


def _max_pool(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x = inputs[0]
    best: Array | None = None
    seen: Array | None = None
    for _kh, _kw, under, valid in _taps(x, node.attrs["kernel"], node.attrs["stride"], node.attrs["padding"], (1, 1)):
        valid = valid[None, :, :, None]
        if best is None or seen is None:
            best, seen = under.copy(), np.broadcast_to(valid, (1, *valid.shape[1:]))
            continue
        best = np.where(valid & (~seen | (under > best)), under, best)
        seen = seen | valid
    assert best is not None
    return best


def _avg_pool(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    kernel = node.attrs["kernel"]
    total: Array | None = None
    count: Array | None = None
    for _kh, _kw, under, valid in _taps(_f32(inputs[0]), kernel, node.attrs["stride"], node.attrs["padding"], (1, 1)):
        if total is None or count is None:
            total, count = np.zeros_like(under), np.zeros(valid.shape, np.int64)
        total += np.where(valid[None, :, :, None], under, np.float32(0))
        count += valid
    assert total is not None
    assert count is not None
    n = np.full_like(count, kernel[0] * kernel[1]) if node.attrs["count_include_pad"] else count
    return total * (np.float32(1) / n.astype(np.float32))[None, :, :, None]


def _global_avg_pool(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x = _f32(inputs[0])
    n, h, w, channels = x.shape
    total = np.zeros((n, channels), np.float32)
    for position in range(h * w):
        total += x.reshape(n, h * w, channels)[:, position]
    return (total * (np.float32(1) / np.float32(h * w))).reshape(n, 1, 1, channels)


def _pixel_shuffle(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x, r = inputs[0], node.attrs["factor"]
    n, h, w, channels = x.shape
    blocks = x.reshape(n, h, w, channels // (r * r), r, r)
    return blocks.transpose(0, 1, 4, 2, 5, 3).reshape(n, h * r, w * r, channels // (r * r))


def bicubic_taps(factor: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where the four taps of the output positions lie, and their coefficients (docs/OPS.md, `resize_bicubic`).

    Returns:
        first: (factor,): output position factor * x + phase has the taps x + first[phase] and the three behind it.
        coefficients: (factor, 4), float32.
    """
    first, coefficients = np.empty(factor, np.int64), np.empty((factor, 4), np.float32)
    for phase in range(factor):
        at = (phase + 0.5) / factor - 0.5
        first[phase] = math.floor(at) - 1
        for k in range(4):
            t = abs(at - (first[phase] + k))
            near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
            coefficients[phase, k] = near if t <= 1 else far
    return first, coefficients


def mirrored(at: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Positions outside of 0 .. size - 1 mirrored into it: -1 -> 0, -2 -> 1, size -> size - 1."""
    at = at % (2 * size)
    return np.minimum(at, 2 * size - 1 - at)


def _resize_bicubic(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    x, factor = inputs[0], node.attrs["factor"]
    first, coefficients = bicubic_taps(factor)
    for axis in (1, 2):
        size = x.shape[axis]
        position = np.arange(size * factor)
        taps = (position // factor + first[position % factor])[:, None] + np.arange(4)
        at = mirrored(taps, size)
        along = [1] * 4
        along[axis] = -1
        total: Array | None = None
        for k in range(4):
            product = x.take(at[:, k], axis=axis) * coefficients[position % factor, k].reshape(along)
            total = product if total is None else total + product
        assert total is not None
        x = total
    return x


def _concat(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    return np.concatenate(inputs, axis=-1)


def _flatten(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    return inputs[0].reshape(len(inputs[0]), -1)


def _output(node: Node, inputs: list[Array], params: Mapping[str, Tensor], types: list[ValueType]) -> Array:
    return inputs[0]


RULES: Final[Mapping[str, Callable[[Node, list[Array], Mapping[str, Tensor], list[ValueType]], Array]]] = (
    MappingProxyType(
        {
            "quantize": _quantize,
            "conv2d": _conv2d,
            "linear": _linear,
            "mul": _mul,
            "add": _add,
            "prelu": _prelu,
            "relu": _relu,
            "clip": _clip,
            "cast": _cast,
            "max_pool": _max_pool,
            "avg_pool": _avg_pool,
            "global_avg_pool": _global_avg_pool,
            "pixel_shuffle": _pixel_shuffle,
            "resize_bicubic": _resize_bicubic,
            "concat": _concat,
            "flatten": _flatten,
            "output": _output,
        }
    )
)
