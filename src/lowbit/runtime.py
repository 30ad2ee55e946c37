"""Run a Graph on the native engine: `load` a file, call it with NumPy images.

>>> net = load("model.lowbit")
>>> logits = net(images_uint8)          # (N, H, W, C) -> (N, classes)

The engine computes exactly what `lowbit.interpreter` does, bit for bit (docs/OPS.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from statistics import median
from typing import Any, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray

from lowbit import _engine
from lowbit.graph import OFFSETS, Graph, Node, Tensor

Array = NDArray[Any]

_NUMPY: Final[Mapping[str, type[np.generic]]] = {
    "codes": np.int16,
    "int32": np.int32,
    "float32": np.float32,
    "float16": np.float16,
}


def isas() -> dict[str, bool]:
    """Every row of kernels, best first, and whether this CPU can run it."""
    return dict(_engine.isas())


def load(source: str | os.PathLike[str] | Graph, threads: int = 1, isa: str | None = None) -> Engine:
    """An Engine for a `.lowbit` file, a network of the zoo (`lowbit list zoo` names them) or a Graph.

    A file of that name comes before the zoo. `threads` is 1 up to the number of cores. `isa` forces a row of kernels (see `isas()`;
    the environment variable LOWBIT_ISA does the same); without it the best one that this CPU has is taken.
    Raises ValueError for a Graph that breaks a rule, a wrong number of threads and an isa this CPU lacks.
    """
    if isinstance(source, Graph):
        return Engine(source, threads=threads, isa=isa)
    from lowbit.packfile import read

    engine = Engine(read(source), threads=threads, isa=isa)
    # the weights, unpacked on the way to the engine, took many times the file
    _engine.release_memory()
    return engine


class Engine:
    """A Graph made ready for this CPU. Call it with a batch, or with one image.

    Safe to call from several Python threads at once: with ``threads=1`` the calls run side by side, each in its own
    workspace; with more, the engine's threads serve one call after the other. The GIL is released meanwhile.
    """

    def __init__(self, graph: Graph, threads: int = 1, isa: str | None = None) -> None:
        graph.validate()
        if isinstance(threads, bool) or not isinstance(threads, int):
            raise ValueError(f"threads must be an integer, got {threads!r}")
        if isa is None:
            isa = os.environ.get("LOWBIT_ISA", "")
        self.meta: Mapping[str, Any] = graph.meta
        threads = max(-1, min(threads, 2**31 - 1))  # what the engine refuses, it names
        self._native = _engine.Engine(_build(graph), threads, isa)
        # asked for at every call, and some networks take but microseconds
        (read, self._input_shape), (written, self._output_shape) = self._native.input, self._native.output
        self._input_dtype = np.dtype(np.uint8 if read == "codes" else np.float32)
        self._output_dtype = np.dtype(_NUMPY[written])

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: (H, W, C) or (C,)."""
        return self._input_shape

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """uint8 or float32."""
        return self._input_dtype

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output."""
        return self._output_shape

    @property
    def output_dtype(self) -> np.dtype[Any]:
        """float32, float16, int32, or int16 for codes."""
        return self._output_dtype

    @property
    def isa(self) -> str:
        """The row of kernels in use."""
        return self._native.isa

    @property
    def threads(self) -> int:
        return self._native.threads

    @property
    def plan(self) -> list[dict[str, Any]]:
        """The fused steps in order: name, kernel, isa, nodes (covered), values (stored), macs (per image), weight_bytes
        (as the engine holds them), bytes (written per image)."""
        return self._native.plan

    def workspace_bytes(self, batch: int = 1) -> int:
        """Memory one run of `batch` inputs takes."""
        return self._native.workspace_bytes(batch)

    def __call__(self, x: Array) -> Array:
        """The network's output for a batch (N, ...) or, without the batch axis, for one input. Codes come as int16."""
        return self.run(x)

    @overload
    def run(self, x: Array, trace: Literal[False] = False) -> Array: ...

    @overload
    def run(self, x: Array, trace: Literal[True]) -> tuple[Array, dict[str, Array]]: ...

    def run(self, x: Array, trace: bool = False) -> Array | tuple[Array, dict[str, Array]]:
        """As a call; with `trace` also every value that the fused plan stores, by name, as the interpreter does."""
        batch, single = self._batch(x)
        out = np.empty((len(batch), *self._output_shape), self._output_dtype)
        stored = self._native.run(_bytes(batch), len(batch), _bytes(out), trace)
        result: Array = out[0] if single else out
        if not trace:
            return result
        values: dict[str, Array] = {}
        for name, dtype, shape, data in stored:
            value = np.frombuffer(data, _NUMPY[dtype]).reshape(len(batch), *shape)
            if name in values and not np.array_equal(values[name], value):
                raise RuntimeError(f"{name}: the engine stored two forms of this value and they differ")
            values[name] = value[0] if single else value
        return result, values

    def classify(
        self, picture: str | os.PathLike[str] | Array, top: int = 3, invert: bool = False
    ) -> tuple[tuple[str, float], ...]:
        """The likeliest classes of one picture, best first: (name, probability).

        Args:
            picture: an image file, which Pillow reads (the extra ``lowbit[cli]``): turned as its EXIF data says, resized, the centre cut
                out. Or what the network reads itself: uint8 of the shape `input_shape`.
            top: how many classes.
            invert: swap dark and light, for a dark object on white where the network knows light on dark, as Fashion-MNIST's do.

        Raises:
            ImageError: an image that can't be read, or a network that does not classify images. ValueError: an array of another
                shape or type. ImportError: Pillow is not installed.
        """
        from lowbit.predict import classify

        return classify(self, picture, top, invert)

    def profile(self, x: Array, repeats: int = 20) -> list[float]:
        """Seconds that each step of `plan` takes for the batch `x`: medians of `repeats` runs, after one to warm up."""
        batch, _ = self._batch(x)
        out = np.empty((len(batch), *self.output_shape), self.output_dtype)
        runs = [self._native.profile(_bytes(batch), len(batch), _bytes(out)) for _ in range(repeats + 1)]
        return [median(times) for times in zip(*runs[1:], strict=True)]

    def _wanted(self) -> str:
        axes = "height, width, channels" if len(self._input_shape) == 3 else "features"
        return f"expected {self._input_dtype} of shape (N, {', '.join(map(str, self._input_shape))}): images, {axes}"

    def _batch(self, x: Array) -> tuple[Array, bool]:
        """`x` as a contiguous batch, and whether it was one input without the batch axis. Raises ValueError."""
        shape, dtype = self._input_shape, self._input_dtype
        if not isinstance(x, np.ndarray):
            raise ValueError(f"{self._wanted()}; got a {type(x).__name__}, not a NumPy array")
        if x.dtype != dtype:
            raise ValueError(f"{self._wanted()}; got {x.dtype} of shape {x.shape}")
        single = x.shape == shape
        if not single and (x.ndim != len(shape) + 1 or x.shape[1:] != shape):
            hint = ""
            if len(shape) == 3 and x.shape[-3:] == (shape[2], shape[0], shape[1]):
                order = (1, 2, 0) if x.ndim == 3 else (0, 2, 3, 1)
                hint = f", which is channels first (NCHW); give channels last: x.transpose{order}"
            raise ValueError(f"{self._wanted()}; got {x.dtype} of shape {x.shape}{hint}")
        batch = x[None] if single else x
        if len(batch) == 0:
            raise ValueError(f"{self._wanted()}; got an empty batch, shape {x.shape}")
        if dtype == np.float32 and not np.isfinite(batch).all():
            raise ValueError("the input holds infinities or NaN")
        return np.ascontiguousarray(batch), single


def _bytes(x: Array) -> Array:
    return x.reshape(-1).view(np.uint8)


# --- Graph -> engine ---


def _weights(t: Tensor) -> _engine.Weights:
    if t.codes is None:
        return _engine.Weights.floats(t.data)
    return _engine.Weights.codes(t.data, t.codes.kind, t.codes.bits, t.codes.table)


def _offsets(constants: Mapping[str, Tensor]) -> list[Array | None]:
    return [constants[role].data if role in constants else None for role in OFFSETS]


def _build(graph: Graph) -> _engine.Builder:
    builder = _engine.Builder()
    values: dict[str, int] = {}
    for node in graph.nodes:
        constants = {role: graph.tensors[name] for role, name in node.params.items()}
        values[node.name] = _append(builder, node, [values[name] for name in node.inputs], constants)
    return builder


def _append(b: _engine.Builder, node: Node, x: list[int], constants: Mapping[str, Tensor]) -> int:
    name, a = node.name, node.attrs
    match node.op:
        case "input":
            if a["dtype"] == "uint8":
                return b.input_uint8(name, a["shape"], a["zero_point"])
            return b.input_float32(name, a["shape"])
        case "quantize":
            return b.quantize(name, x[0], a["kind"], a["bits"], a.get("reciprocal", 1.0))
        case "conv2d":
            weight = _weights(constants["weight"])
            geometry = (a["stride"], a["dilation"], a["padding"], a["groups"])
            return b.conv2d(name, x[0], weight, *geometry, *_offsets(constants))
        case "linear":
            return b.linear(name, x[0], _weights(constants["weight"]), *_offsets(constants))
        case "mul":
            return b.mul(name, x[0], constants["factor"].data)
        case "add":
            return b.add_values(name, *x) if len(x) == 2 else b.add(name, x[0], constants["term"].data)
        case "prelu":
            return b.prelu(name, x[0], constants["slope"].data)
        case "relu":
            return b.relu(name, x[0])
        case "clip":
            return b.clip(name, x[0], a["low"], a["high"])
        case "cast":
            return b.cast(name, x[0], a["dtype"])
        case "max_pool":
            return b.max_pool(name, x[0], a["kernel"], a["stride"], a["padding"])
        case "avg_pool":
            return b.avg_pool(name, x[0], a["kernel"], a["stride"], a["padding"], a["count_include_pad"])
        case "global_avg_pool":
            return b.global_avg_pool(name, x[0])
        case "pixel_shuffle":
            return b.pixel_shuffle(name, x[0], a["factor"])
        case "resize_bicubic":
            return b.resize_bicubic(name, x[0], a["factor"])
        case "concat":
            return b.concat(name, x)
        case "flatten":
            return b.flatten(name, x[0])
        case "output":
            return b.output(name, x[0])
    raise ValueError(f"{name}: the engine has no op {node.op!r}")
