"""The Graph: what a frozen network is. The only thing that training and running both know.

Plain frozen data. `docs/OPS.md` gives the meaning of every op; `Graph.validate` checks that a Graph keeps its rules and
tells the type of every value; `lowbit.interpreter` executes it; `lowbit.packfile` stores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.bits import Codes, packed_size

MAX_KERNEL: Final = 11
MAX_STEP: Final = 8  # stride and dilation
MAX_RESIZE: Final = 4
MAX_SIDE: Final = 1 << 16
INT32_LIMIT: Final = 2**31


class GraphError(ValueError):
    """A Graph that breaks a rule of docs/OPS.md. The message names the node and the rule."""


@dataclass(frozen=True)
class ValueType:
    """The type of a value: `dtype` is codes, int32, float32 or float16; `shape` is (H, W, C) or (C,)."""

    dtype: str
    shape: tuple[int, ...]
    codes: Codes | None = None

    @property
    def channels(self) -> int:
        return self.shape[-1]

    def __str__(self) -> str:
        what = f"{self.codes.bits}-bit {self.codes.kind}" if self.codes else self.dtype
        return f"{what} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, eq=False)
class Tensor:
    """A constant: integer codes (int16 values and their `codes` type) or float32 numbers (`codes` is None)."""

    data: NDArray[Any]
    codes: Codes | None = None

    def __post_init__(self) -> None:
        want = np.float32 if self.codes is None else np.int16
        data = np.ascontiguousarray(self.data, dtype=want)
        if np.may_share_memory(data, self.data):
            data = data.copy()
        data.setflags(write=False)
        object.__setattr__(self, "data", data.view())  # of an array that can't be written: nobody can make it writable

    @property
    def nbytes(self) -> int:
        """Bytes in the packed file."""
        return packed_size(self.data.size, self.codes.bits) if self.codes else self.data.size * 4

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensor):
            return NotImplemented
        same_shape = self.codes == other.codes and self.data.shape == other.data.shape
        return same_shape and self.data.tobytes() == other.data.tobytes()

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Node:
    """One op. `name` names the node and its value; `inputs` are value names; `params` maps a role (weight, factor, term,
    slope, input_offset, weight_offset) to a tensor name; `attrs` holds plain numbers, strings and tuples of them."""

    op: str
    name: str
    inputs: tuple[str, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Node):
            return NotImplemented
        return self._key() == other._key()

    __hash__ = None  # type: ignore[assignment]

    def _key(self) -> tuple[Any, ...]:
        return self.op, self.name, self.inputs, dict(self.params), dict(self.attrs)


@dataclass(frozen=True)
class Graph:
    """A frozen network: nodes in order, constants by name, and `meta` for whoever feeds it (preprocessing, classes, task)."""

    nodes: tuple[Node, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return (
            self.nodes == other.nodes
            and dict(self.tensors) == dict(other.tensors)
            and dict(self.meta) == dict(other.meta)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def input(self) -> Node:
        return self.nodes[0]

    @property
    def output(self) -> Node:
        return self.nodes[-1]

    def validate(self) -> dict[str, ValueType]:
        """Check every rule of docs/OPS.md; return the type of every value by name. Raises GraphError naming the node."""
        return dict(self._types)

    @cached_property
    def _types(self) -> dict[str, ValueType]:
        return _infer(self)  # nothing in a Graph can change

    def resized(self, height: int, width: int) -> Graph:
        """The same network for inputs of another size. Raises GraphError where the network has one size only."""
        first = self.input
        shape = tuple(first.attrs["shape"])
        if len(shape) != 3:
            raise GraphError(f"{first.name}: the input is a vector, not an image; it can't be resized")
        again = replace(first, attrs={**first.attrs, "shape": (height, width, shape[2])})
        graph = replace(self, nodes=(again, *self.nodes[1:]))
        graph.validate()
        return graph

    def run(self, x: NDArray[Any], trace: bool = False) -> Any:
        """Run the interpreter: `x` is a batch, uint8 or float32, (N, H, W, C) or (N, C). Returns the output, float32
        (or integer codes as int16, or int32); with `trace` also every value by name."""
        from lowbit.interpreter import run

        return run(self, x, trace=trace)


# --- validation: one function per op, each returning the type of its value ---


@dataclass(frozen=True)
class _Context:
    graph: Graph
    node: Node
    inputs: tuple[ValueType, ...]

    def fail(self, what: str) -> GraphError:
        return GraphError(f"{self.node.name} ({self.node.op}): {what}")

    def attr(self, key: str) -> Any:
        if key not in self.node.attrs:
            raise self.fail(f"the attribute {key!r} is missing")
        return self.node.attrs[key]

    def ints(self, key: str, count: int, low: int, high: int) -> tuple[int, ...]:
        value = self.attr(key)
        good = isinstance(value, tuple) and len(value) == count
        if not good or any(type(v) is not int or not low <= v <= high for v in value):
            raise self.fail(f"{key} must be {count} integers in {low}..{high}, got {value!r}")
        return value

    def number(self, key: str) -> np.float32:
        value = self.attr(key)
        if type(value) is not float or not math.isfinite(value) or float(np.float32(value)) != value:
            raise self.fail(f"{key} must be a finite float32, got {value!r}")
        return np.float32(value)

    def tensor(self, role: str) -> Tensor:
        name = self.node.params.get(role)
        if name is None or name not in self.graph.tensors:
            raise self.fail(f"the constant {role!r} ({name!r}) is missing")
        return self.graph.tensors[name]

    def per_channel(self, role: str, channels: int) -> None:
        t = self.tensor(role)
        if t.codes is not None or t.data.shape not in ((channels,), (1,)):
            raise self.fail(f"{role} must be float32 of shape ({channels},) or (1,), got {t.data.shape}")

    def one(self, *dtypes: str) -> ValueType:
        if len(self.inputs) != 1:
            raise self.fail(f"takes one input, got {len(self.inputs)}")
        return self.check(self.inputs[0], *dtypes)

    def check(self, t: ValueType, *dtypes: str) -> ValueType:
        if t.dtype not in dtypes:
            raise self.fail(f"takes {' or '.join(dtypes)}, got {t}")
        if t.codes and t.codes.zero_point and self.node.op not in ("conv2d", "linear", "mul", "flatten", "output"):
            raise self.fail("pixels with a zero point go to conv2d, linear, mul or flatten only")
        return t

    def image(self, t: ValueType) -> tuple[int, int, int]:
        if len(t.shape) != 3:
            raise self.fail(f"takes an image (H, W, C), got {t}")
        return t.shape


_REAL: Final = ("float32", "float16")
_ANY: Final = ("codes", "int32", *_REAL)


def _input(c: _Context) -> ValueType:
    if c.inputs:
        raise c.fail("an input has no inputs")
    shape = c.attr("shape")
    if not isinstance(shape, tuple) or len(shape) not in (1, 3) or any(type(s) is not int for s in shape):
        raise c.fail(f"shape must be (H, W, C) or (C,), got {shape!r}")
    if any(not 1 <= s <= MAX_SIDE for s in shape):
        raise c.fail(f"a side is 1..{MAX_SIDE}, got {shape}")
    dtype = c.attr("dtype")
    if dtype == "float32":
        return ValueType("float32", shape)
    if dtype != "uint8":
        raise c.fail(f"dtype is uint8 or float32, got {dtype!r}")
    zero_point = c.ints("zero_point", shape[-1], 0, 255)
    return ValueType("codes", shape, Codes("unsigned", 8, zero_point=zero_point if any(zero_point) else ()))


def _quantize(c: _Context) -> ValueType:
    x = c.one(*_REAL)
    try:
        codes = Codes(c.attr("kind"), c.attr("bits"))
    except ValueError as e:
        raise c.fail(str(e)) from None
    if codes.kind == "bipolar":
        if codes.bits != 1:
            raise c.fail("bipolar activations have 1 bit; use unsigned or signed for more")
    elif c.number("reciprocal") <= 0:
        raise c.fail("the reciprocal must be positive")
    return ValueType("codes", x.shape, codes)


def _window(c: _Context, x: ValueType, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    h, w, _ = c.image(x)
    stride = c.ints("stride", 2, 1, MAX_STEP)
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
    top, left, bottom, right = c.ints("padding", 4, 0, (MAX_KERNEL - 1) * MAX_STEP)
    if max(top, bottom) >= extent[0] or max(left, right) >= extent[1]:
        raise c.fail(f"padding {(top, left, bottom, right)} is not less than the kernel's extent {extent}")
    out = (
        (h + top + bottom - extent[0]) // stride[0] + 1,
        (w + left + right - extent[1]) // stride[1] + 1,
    )
    if h + top + bottom < extent[0] or w + left + right < extent[1]:
        raise c.fail(
            f"the kernel's extent {extent} is larger than the padded input {(h + top + bottom, w + left + right)}"
        )
    return out


def _check_accumulator(c: _Context, x: ValueType, weight: Tensor) -> None:
    assert x.codes is not None
    largest = max(-x.codes.low, x.codes.high)
    if (
        weight.codes is not None
        and math.prod(weight.data.shape[1:]) * max(-weight.codes.low, weight.codes.high) * largest < INT32_LIMIT
    ):
        return  # whatever the weights are
    total = np.abs(weight.data.astype(np.int64)).reshape(len(weight.data), -1).sum(axis=1).max(initial=0)
    if int(total) * largest >= INT32_LIMIT:
        raise c.fail(
            f"the accumulator could reach {int(total) * largest}, beyond 32 bits; use fewer bits or fewer input channels"
        )


def _product(c: _Context, x: ValueType, weight: Tensor, shape: tuple[int, ...]) -> ValueType:
    offsets = [role for role in OFFSETS if role in c.node.params]
    if x.codes is None or weight.codes is None:
        if offsets:
            raise c.fail(f"{offsets[0]} is for codes with code weights, the input is {x}")
        return ValueType("float32", shape)
    _check_accumulator(c, x, weight)
    for role, channels in (("input_offset", 1), ("weight_offset", shape[-1])):
        if role in offsets:
            c.per_channel(role, channels)
    if "weight_offset" in offsets:
        reach = math.prod(weight.data.shape[1:]) * max(-x.codes.low, x.codes.high)
        if reach >= INT32_LIMIT:
            raise c.fail(
                f"the sum of the input could reach {reach}, beyond 32 bits; use fewer bits or fewer input channels"
            )
    return ValueType("float32" if offsets else "int32", shape)


def _conv2d(c: _Context) -> ValueType:
    x = c.one("codes", *_REAL)
    channels = c.image(x)[2]
    weight = c.tensor("weight")
    (groups,) = (c.attr("groups"),)
    if weight.data.ndim != 4:
        raise c.fail(f"weight must be (O, kH, kW, I), got {weight.data.shape}")
    o, kh, kw, i = weight.data.shape
    if type(groups) is not int or groups < 1 or channels % groups or o % groups:
        raise c.fail(f"groups={groups!r} must divide the {channels} input and {o} output channels")
    if i * groups != channels:
        raise c.fail(f"weight has {i} input channels a group, the input has {channels} in {groups} groups")
    if not (1 <= kh <= MAX_KERNEL and 1 <= kw <= MAX_KERNEL):
        raise c.fail(f"kernels are 1..{MAX_KERNEL} a side, got {kh}x{kw}")
    dilation = c.ints("dilation", 2, 1, MAX_STEP)
    out = _window(c, x, (kh, kw), (dilation[0], dilation[1]))
    return _product(c, x, weight, (*out, o))


def _linear(c: _Context) -> ValueType:
    x = c.one("codes", *_REAL)
    weight = c.tensor("weight")
    if len(x.shape) != 1 or weight.data.ndim != 2 or weight.data.shape[1] != x.shape[0]:
        raise c.fail(f"weight {weight.data.shape} does not fit the input {x}; flatten images first")
    return _product(c, x, weight, (weight.data.shape[0],))


def _mul(c: _Context) -> ValueType:
    x = c.one(*_ANY)
    c.per_channel("factor", x.channels)
    return ValueType("float32", x.shape)


def _add(c: _Context) -> ValueType:
    if len(c.inputs) == 2:
        a, b = (c.check(t, *_REAL) for t in c.inputs)
        if a.shape != b.shape:
            raise c.fail(f"adds values of one shape, got {a} and {b}")
        if c.node.params:
            raise c.fail("adds a constant or a second value, not both")
        return ValueType("float32", a.shape)
    x = c.one(*_REAL)
    c.per_channel("term", x.channels)
    return ValueType("float32", x.shape)


def _prelu(c: _Context) -> ValueType:
    x = c.one(*_REAL)
    c.per_channel("slope", x.channels)
    return ValueType("float32", x.shape)


def _relu(c: _Context) -> ValueType:
    return ValueType("float32", c.one(*_REAL).shape)


def _clip(c: _Context) -> ValueType:
    x = c.one(*_REAL)
    if c.number("low") > c.number("high"):
        raise c.fail("low is above high")
    return ValueType("float32", x.shape)


def _cast(c: _Context) -> ValueType:
    x = c.one(*_REAL)
    dtype = c.attr("dtype")
    if dtype not in _REAL:
        raise c.fail(f"casts to float16 or float32, got {dtype!r}")
    return ValueType(dtype, x.shape)


def _pool(c: _Context, x: ValueType) -> tuple[int, ...]:
    kernel = c.ints("kernel", 2, 1, MAX_KERNEL)
    return (*_window(c, x, (kernel[0], kernel[1]), (1, 1)), x.channels)


def _max_pool(c: _Context) -> ValueType:
    x = c.one("codes", *_REAL)
    return replace(x, shape=_pool(c, x))


def _avg_pool(c: _Context) -> ValueType:
    x = c.one("codes", *_REAL)
    if type(c.attr("count_include_pad")) is not bool:
        raise c.fail("count_include_pad must be true or false")
    return ValueType("float32", _pool(c, x))


def _global_avg_pool(c: _Context) -> ValueType:
    x = c.one("codes", *_REAL)
    return ValueType("float32", (1, 1, c.image(x)[2]))


def _pixel_shuffle(c: _Context) -> ValueType:
    x = c.one(*_ANY)
    h, w, channels = c.image(x)
    r = c.attr("factor")
    if type(r) is not int or not 1 <= r <= MAX_STEP or channels % (r * r):
        raise c.fail(f"factor {r!r} squared must divide the {channels} channels")
    return replace(x, shape=(h * r, w * r, channels // (r * r)))


def _resize_bicubic(c: _Context) -> ValueType:
    x = c.one("float32")
    h, w, channels = c.image(x)
    r = c.attr("factor")
    if type(r) is not int or not 2 <= r <= MAX_RESIZE:
        raise c.fail(f"enlarges by 2..{MAX_RESIZE}, got the factor {r!r}")
    return replace(x, shape=(h * r, w * r, channels))


def _concat(c: _Context) -> ValueType:
    if len(c.inputs) < 2:
        raise c.fail("joins two values or more")
    first = c.check(c.inputs[0], *_ANY)
    for t in c.inputs[1:]:
        if (t.dtype, t.codes, t.shape[:-1]) != (first.dtype, first.codes, first.shape[:-1]):
            raise c.fail(f"joins values of one type and size, got {first} and {t}")
    return replace(first, shape=(*first.shape[:-1], sum(t.channels for t in c.inputs)))


def _flatten(c: _Context) -> ValueType:
    x = c.one(*_ANY)
    h, w, channels = c.image(x)
    codes = x.codes
    if codes is not None and codes.zero_point:
        codes = replace(codes, zero_point=codes.zero_point * (h * w))
    return ValueType(x.dtype, (h * w * channels,), codes)


def _output(c: _Context) -> ValueType:
    return c.one(*_ANY)


ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {"conv2d": "weight", "linear": "weight", "mul": "factor", "add": "term", "prelu": "slope"}
)
"""The constant of the ops that have one (an `add` of two values has none)."""

OFFSETS: Final = ("input_offset", "weight_offset")
"""The constants that conv2d and linear may have beside their weight."""

OPS: Final[Mapping[str, Callable[[_Context], ValueType]]] = MappingProxyType(
    {
        "input": _input,
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
"""Every op and the rule for its type."""


def _check_tensors(graph: Graph) -> None:
    used = [name for node in graph.nodes for name in node.params.values()]
    for name in graph.tensors:
        if name not in used:
            raise GraphError(f"the constant {name!r} is used by no node")
    for name, t in graph.tensors.items():
        if t.data.size == 0:
            raise GraphError(f"the constant {name!r} is empty")
        if t.codes is None:
            if not np.isfinite(t.data).all():
                raise GraphError(f"the constant {name!r} holds infinities or NaN")
        else:
            try:
                t.codes.check(t.data)
            except ValueError as e:
                raise GraphError(f"the constant {name!r}: {e}") from None


def _edges(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        yield from node.inputs


def _infer(graph: Graph) -> dict[str, ValueType]:
    if len(graph.nodes) < 2 or graph.input.op != "input" or graph.output.op != "output":
        raise GraphError("a Graph starts with an input and ends with an output")
    types: dict[str, ValueType] = {}
    for node in graph.nodes:
        rule = OPS.get(node.op)
        if rule is None:
            raise GraphError(f"{node.name}: unknown op {node.op!r}; the ops are {', '.join(OPS)}")
        if not node.name or node.name in types:
            raise GraphError(f"the name {node.name!r} is empty or used twice")
        for name in node.inputs:
            if name not in types:
                raise GraphError(f"{node.name} ({node.op}): its input {name!r} is no earlier node")
        if node.op in ("input", "output") and node not in (graph.input, graph.output):
            raise GraphError(f"{node.name}: a Graph has one input and one output")
        for role in node.params:
            if role != ROLES.get(node.op) and (node.op not in ("conv2d", "linear") or role not in OFFSETS):
                raise GraphError(f"{node.name} ({node.op}): unknown constant {role!r}")
        value = rule(_Context(graph, node, tuple(types[name] for name in node.inputs)))
        if math.prod(value.shape) >= INT32_LIMIT:
            raise GraphError(f"{node.name} ({node.op}): {value} has 2^31 elements or more")
        types[node.name] = value
    _check_tensors(graph)
    used = set(_edges(graph))
    for node in graph.nodes[:-1]:
        if node.name not in used:
            raise GraphError(f"{node.name} ({node.op}): its value is used by no node")
    return types
