"""Speed, side by side: the engine beside ONNX Runtime's float32 of the same network, in one process on the same cores.

Every comparison alternates between the two, so that both see the same machine, and reports medians, the spread of the
samples and of the ratios of neighbouring samples, and says so where the machine is too noisy to tell. Needs the extra
``lowbit[bench]``.

``python -m lowbit.bench`` measures binary layers, and training steps of SLB and LNS.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lowbit.bits import Codes
from lowbit.files import write_atomic
from lowbit.graph import Graph, Node, Tensor, ValueType
from lowbit.inspect import macs
from lowbit.machine import machine, versions
from lowbit.packfile import read
from lowbit.runtime import Engine, load

if TYPE_CHECKING:
    from rich.table import Table

FORMAT: Final = 1
NOISY: Final = 0.25
"""Above this (p90 - p10) / median of the ratios of neighbouring samples, a result comes with a warning."""

CONV_GOAL: Final = 8.0
STEP_GOALS: Final = (("slb", "float", 50, 1.2), ("lns", "sign", 128, 2.0))
"""Training steps: method, what it is measured against, batch, and how many times the latter's time it may take."""
_SLOT: Final = 0.0005  # seconds one sample lasts at least: well below a scheduler's time slice

Array = NDArray[Any]


# --------------------------------------------------------------------------------------------- the float twin


def float_twin(graph: Graph, batch: int = 1) -> onnx.ModelProto:
    """The same topology in float32, as ONNX Runtime likes it best: NCHW, fixed batch, everything folded that can be.

    Weights are the decoded codes, their offset included; the factor and term behind a convolution go into its weights and bias.
    An input offset has no place: it belongs to the two values that the activation function stands for. `quantize` is
    the activation function of the float network: ReLU for 1 bit, a clip at 0 and the largest code for unsigned codes;
    signed 8-bit codes and casts vanish. The input is float32: the pixel minus its zero point.

    Args:
        graph: any Graph.
        batch: images in a run.

    Returns:
        A checked model with the input ``input`` and the output ``output``.
    """
    return _Twin(graph, batch).build()


class _Twin:
    """Builds a model node by node. A value may stand for ``scale`` times the tensor that holds it, so that the step of
    quantized codes lands in the next layer's weights."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.types = graph.validate()
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value: dict[str, str] = {}
        self.scale: dict[str, float] = {}

    def build(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.name not in self.value:
                getattr(self, f"_{node.op}")(node)
        first, last = self.types[self.graph.input.name], self.types[self.graph.output.name]
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "float_twin",
                [helper.make_tensor_value_info("input", TensorProto.FLOAT, self._shape(first))],
                [helper.make_tensor_value_info("output", TensorProto.FLOAT, self._shape(last))],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=9,
        )
        onnx.checker.check_model(model)
        return model

    def _shape(self, t: ValueType) -> list[int]:
        return [self.batch, t.shape[2], t.shape[0], t.shape[1]] if len(t.shape) == 3 else [self.batch, *t.shape]

    def _constant(self, name: str, data: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(data), name))
        return name

    def _per_channel(self, node: Node, role: str) -> str:
        data = self.graph.tensors[node.params[role]].data
        image = len(self.types[node.name].shape) == 3
        return self._constant(f"{node.name}:{role}", data.reshape(-1, 1, 1) if image else data)

    def _emit(self, op: str, node: Node, inputs: Sequence[str], scale: float = 1.0, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [node.name + ":out"], node.name, **attributes))
        self.value[node.name], self.scale[node.name] = node.name + ":out", scale

    def _alias(self, node: Node, scale: float | None = None) -> None:
        source = node.inputs[0]
        self.value[node.name] = self.value[source]
        self.scale[node.name] = self.scale[source] if scale is None else scale

    def _plain(self, name: str) -> str:
        """The tensor of a value with its scale applied."""
        if self.scale[name] != 1.0:
            factor = self._constant(f"{name}:scale", np.array(self.scale[name], np.float32))
            self.nodes.append(helper.make_node("Mul", [self.value[name], factor], [name + ":scaled"]))
            self.value[name], self.scale[name] = name + ":scaled", 1.0
        return self.value[name]

    # one method per op

    def _input(self, node: Node) -> None:
        self.value[node.name], self.scale[node.name] = "input", 1.0

    def _output(self, node: Node) -> None:
        self.nodes.append(helper.make_node("Identity", [self._plain(node.inputs[0])], ["output"], node.name))
        self.value[node.name], self.scale[node.name] = "output", 1.0

    def _quantize(self, node: Node) -> None:
        x = self._plain(node.inputs[0])
        if node.attrs["kind"] == "bipolar":
            self._emit("Relu", node, [x])
        elif node.attrs["kind"] == "unsigned":
            reciprocal = float(node.attrs["reciprocal"])
            low = self._constant(f"{node.name}:low", np.array(0, np.float32))
            high = self._constant(f"{node.name}:high", np.array((2 ** node.attrs["bits"] - 1) / reciprocal, np.float32))
            self._emit("Clip", node, [x, low, high], reciprocal)
        else:
            self._alias(node, float(node.attrs["reciprocal"]))

    def _folded(self, node: Node) -> tuple[Array, Array, str]:
        """Weights and bias with the factors and terms behind the node, and the name of the last of these."""
        weight = self.graph.tensors[node.params["weight"]].data.astype(np.float64)
        if "weight_offset" in node.params:
            weight = (weight.T + self.graph.tensors[node.params["weight_offset"]].data).T
        weight = weight * self.scale[node.inputs[0]]
        bias = np.zeros(len(weight))
        last = node.name
        while len(self.users[last]) == 1:
            after = self.users[last][0]
            if after.op == "mul":
                factor = self.graph.tensors[after.params["factor"]].data.astype(np.float64)
                weight, bias = (weight.T * factor).T, bias * factor
            elif after.op == "add" and "term" in after.params:
                bias = bias + self.graph.tensors[after.params["term"]].data
            else:
                break
            last = after.name
        return weight.astype(np.float32), bias.astype(np.float32), last

    def _product(self, op: str, node: Node, layout: tuple[int, ...], **attributes: Any) -> None:
        weight, bias, last = self._folded(node)
        inputs = [self.value[node.inputs[0]], self._constant(f"{node.name}:weight", weight.transpose(layout))]
        inputs.append(self._constant(f"{node.name}:bias", bias))
        self._emit(op, node, inputs, **attributes)
        name = node.name
        while name != last:
            name = self.users[name][0].name
            self.value[name], self.scale[name] = self.value[node.name], 1.0

    def _conv2d(self, node: Node) -> None:
        self._product(
            "Conv",
            node,
            (0, 3, 1, 2),
            strides=list(node.attrs["stride"]),
            pads=list(node.attrs["padding"]),
            dilations=list(node.attrs["dilation"]),
            group=node.attrs["groups"],
        )

    def _linear(self, node: Node) -> None:
        self._product("Gemm", node, (0, 1), transB=1)

    def _mul(self, node: Node) -> None:
        self._emit("Mul", node, [self._plain(node.inputs[0]), self._per_channel(node, "factor")])

    def _add(self, node: Node) -> None:
        inputs = [self._plain(name) for name in node.inputs]
        self._emit("Add", node, inputs if len(inputs) == 2 else [*inputs, self._per_channel(node, "term")])

    def _prelu(self, node: Node) -> None:
        self._emit("PRelu", node, [self._plain(node.inputs[0]), self._per_channel(node, "slope")])

    def _relu(self, node: Node) -> None:
        self._emit("Relu", node, [self._plain(node.inputs[0])])

    def _clip(self, node: Node) -> None:
        ends = [self._constant(f"{node.name}:{k}", np.array(node.attrs[k], np.float32)) for k in ("low", "high")]
        self._emit("Clip", node, [self._plain(node.inputs[0]), *ends])

    def _cast(self, node: Node) -> None:
        self._alias(node)

    def _pool(self, op: str, node: Node, **attributes: Any) -> None:
        source = node.inputs[0]
        attributes |= {k + "s": list(node.attrs[k]) for k in ("stride",)} | {"pads": list(node.attrs["padding"])}
        self._emit(
            op, node, [self.value[source]], self.scale[source], kernel_shape=list(node.attrs["kernel"]), **attributes
        )

    def _max_pool(self, node: Node) -> None:
        self._pool("MaxPool", node)

    def _avg_pool(self, node: Node) -> None:
        self._pool("AveragePool", node, count_include_pad=int(node.attrs["count_include_pad"]))

    def _global_avg_pool(self, node: Node) -> None:
        self._emit("GlobalAveragePool", node, [self.value[node.inputs[0]]], self.scale[node.inputs[0]])

    def _pixel_shuffle(self, node: Node) -> None:
        source = node.inputs[0]
        self._emit(
            "DepthToSpace", node, [self.value[source]], self.scale[source], blocksize=node.attrs["factor"], mode="CRD"
        )

    def _concat(self, node: Node) -> None:
        self._emit("Concat", node, [self._plain(name) for name in node.inputs], axis=1)

    def _flatten(self, node: Node) -> None:
        source = node.inputs[0]
        x = self.value[source]
        if self.types[source].shape[:2] != (1, 1):  # the Graph flattens H, W, C
            self.nodes.append(helper.make_node("Transpose", [x], [node.name + ":nhwc"], perm=[0, 2, 3, 1]))
            x = node.name + ":nhwc"
        self._emit("Flatten", node, [x], self.scale[source])


def _layer_graph(graph: Graph, node: Node, types: dict[str, ValueType]) -> Graph:
    """One convolution or linear layer of `graph` alone, float32, with bias and ReLU."""
    weight = graph.tensors[node.params["weight"]]
    tensors = {
        "weight": Tensor(weight.data.astype(np.float32) / np.float32(weight.data[0].size)),
        "term": Tensor(np.full(len(weight.data), 0.1, np.float32)),
    }
    nodes = (
        Node("input", "input", attrs={"shape": types[node.inputs[0]].shape, "dtype": "float32"}),
        Node(node.op, "layer", ("input",), {"weight": "weight"}, node.attrs),
        Node("add", "add", ("layer",), {"term": "term"}),
        Node("relu", "relu", ("add",)),
        Node("output", "output", ("relu",)),
    )
    return Graph(nodes, tensors)


def _session(model: onnx.ModelProto, threads: int, seed: int = 0) -> Callable[[], None]:
    """A function that runs `model` once in ONNX Runtime: every optimisation on, buffers bound beforehand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("input", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("output")

    def run() -> None:
        session.run_with_iobinding(binding)

    return run


# --------------------------------------------------------------------------------------------- measuring


def _empty_session(threads: int) -> Callable[[], None]:
    """A call of ONNX Runtime that computes nothing: what a call costs by itself."""
    nodes = (Node("input", "input", attrs={"shape": (1,), "dtype": "float32"}), Node("output", "output", ("input",)))
    return _session(float_twin(Graph(nodes, {})), threads)


def _seconds(run: Callable[[], object], calls: int) -> float:
    """Median of a few calls."""
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return float(np.median(samples))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile of the samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """From one number per sample."""
        p10, median, p90 = (float(v) for v in np.percentile(seconds, [10, 50, 90]))
        return Timing(median, p10, p90, len(seconds))


@dataclass(frozen=True)
class Comparison:
    """Ours beside theirs. `ratio` is theirs / ours, of the medians; `p10`, `p90` of neighbouring samples'."""

    ours: Timing
    theirs: Timing
    ratio: float
    p10: float
    p90: float

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
        """From samples that were taken in turn."""
        a, b = Timing.of(ours), Timing.of(theirs)
        low, high = np.percentile(np.asarray(theirs) / np.asarray(ours), [10, 90])
        return Comparison(a, b, b.median / a.median, float(low), float(high))

    @property
    def noise(self) -> float:
        """Spread of the ratios of neighbouring samples, as a share of the ratio."""
        return (self.p90 - self.p10) / self.ratio

    def warnings(self, what: str) -> list[str]:
        """One sentence where the machine was too busy to believe the numbers."""
        if self.noise <= NOISY:
            return []
        return [
            f"{what}: noisy: the ratio of neighbouring samples goes from {self.p10:.2f} to {self.p90:.2f}; "
            "close other programs and repeat"
        ]


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on the first `threads` cores it may use.

    Raises:
        ValueError: there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads = {threads}, but this process may use {len(allowed)} cores")
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> Comparison:
    """Time two functions in turn, `repeats` samples each.

    A sample is the mean of as many calls as fill half a millisecond, after one that is not counted.
    """
    functions = (first, second)
    counts = []
    for f in functions:
        f()
        start = time.perf_counter()
        f()
        counts.append(max(1, round(_SLOT / max(time.perf_counter() - start, 1e-7))))
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            f = functions[which]
            f()
            start = time.perf_counter()
            for _ in range(counts[which]):
                f()
            samples[which].append((time.perf_counter() - start) / counts[which])
    return Comparison.of(*samples)


def _example(engine: Engine, batch: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    shape = (batch, *engine.input_shape)
    if np.dtype(engine.input_dtype) == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


# --------------------------------------------------------------------------------------------- what is measured


def bench_file(
    path: str | os.PathLike[str],
    threads: int = 1,
    isa: str | None = None,
    batch: int = 1,
    repeats: int = 100,
    layers: bool = True,
) -> dict[str, Any]:
    """The network in a file, whole and layer by layer, beside ONNX Runtime's float32 of the same network.

    Args:
        path: a .lowbit file.
        threads: of both; both are pinned to as many cores.
        isa: the engine's instruction set; None for the best there is.
        batch: images in a call.
        repeats: samples of each.
        layers: measure every step of the engine too. ONNX Runtime's are models of one convolution with bias and ReLU,
            less the time of an empty call.

    Returns:
        Plain JSON: ``file, network, isa, threads, batch, machine, versions, whole, layers, warnings``. Seconds are of
        one call, so of `batch` images.

    Raises:
        FileError: not a lowbit file. ValueError: more threads than cores, an unknown isa.
    """
    if batch < 1 or repeats < 2:
        raise ValueError(f"batch = {batch} must be at least 1, repeats = {repeats} at least 2")
    graph = read(path)
    with pinned(threads):
        engine = load(graph, threads=threads, isa=isa)
        x = _example(engine, batch)
        whole = alternate(lambda: engine(x), _session(float_twin(graph, batch), threads), repeats)
        rows = _bench_layers(graph, engine, x, threads, repeats) if layers else []
    return {
        "format": FORMAT,
        "file": Path(path).name,
        "network": graph.meta.get("recipe", ""),
        "isa": engine.isa,
        "threads": threads,
        "batch": batch,
        "machine": machine(),
        "versions": versions("lowbit", "numpy", "onnxruntime"),
        "whole": asdict(whole),
        "layers": rows,
        "warnings": whole.warnings("whole network"),
    }


def _bench_layers(graph: Graph, engine: Engine, x: Array, threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each step of the plan; steps with a convolution or linear layer beside ONNX Runtime's. The sums of codes that
    a layer needs are part of its row."""
    types = graph.validate()
    nodes = {node.name: node for node in graph.nodes}
    parts = _rows(engine.plan)
    plan = [engine.plan[indices[-1]] for indices in parts]
    heads = [next((nodes[n] for n in step["nodes"] if nodes[n].op in ("conv2d", "linear")), None) for step in plan]
    theirs = [
        _session(float_twin(_layer_graph(graph, head, types), len(x)), threads) if head else None for head in heads
    ]
    empty, overhead = _empty_session(threads), []
    ours_seconds: list[list[float]] = [[] for _ in heads]
    theirs_seconds: list[list[float]] = [[] for _ in heads]
    for run in (empty, *theirs):
        if run:
            run()
    for _ in range(min(max(repeats // 2, 3), 30)):
        measured = engine.profile(x, 5)
        for seconds, indices in zip(ours_seconds, parts, strict=True):
            seconds.append(sum(measured[i] for i in indices))
        overhead.append(_seconds(empty, 5))
        for run, seconds in zip(theirs, theirs_seconds, strict=True):
            if run:
                seconds.append(_seconds(run, 5))
    less = float(np.percentile(overhead, 10))
    theirs_seconds = [[max(value - less, 1e-9) for value in seconds] for seconds in theirs_seconds]
    total = sum(float(np.median(seconds)) for seconds in ours_seconds)
    rows = []
    for step, head, a, b in zip(plan, heads, ours_seconds, theirs_seconds, strict=True):
        compared = Comparison.of(a, b) if head else None
        median = float(np.median(a))
        rows.append(
            {
                "name": head.name if head else step["name"],
                "kernel": step["kernel"],
                "isa": step["isa"],
                "nodes": list(step["nodes"]),
                "macs": macs(graph, head, types) if head else 0,
                "seconds": median,
                "share": median / total if total else 0.0,
                "theirs_seconds": compared.theirs.median if compared else None,
                "ratio": compared.ratio if compared else None,
                "noisy": bool(compared and compared.noise > NOISY),
            }
        )
    return rows


def _rows(plan: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The steps of the plan by row: a step that sums codes belongs to the layer behind it."""
    rows: list[list[int]] = []
    open_row: list[int] = []
    for i, step in enumerate(plan):
        open_row.append(i)
        if step["kernel"] != "code_sums":
            rows.append(open_row)
            open_row = []
    return rows


@dataclass(frozen=True)
class Layer:
    """A W1A1 3x3 layer with padding 1: bits in, bits out, and with `residual` a float16 stream in and out beside them."""

    channels: int
    filters: int
    side: int
    stride: int = 1
    residual: bool = False

    def __str__(self) -> str:
        width = str(self.channels) if self.channels == self.filters else f"{self.channels} to {self.filters}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        stream = ", float16 stream" if self.residual else ""
        return f"W1A1 3x3, {width} channels, {self.side}x{self.side}{stride}{stream}"


LAYERS: Final = (
    Layer(64, 64, 56),
    Layer(128, 128, 28),
    Layer(256, 256, 14),
    Layer(512, 512, 7),
    Layer(64, 128, 56, stride=2),
    Layer(16, 16, 32),
    Layer(32, 32, 16),
    Layer(64, 64, 8),
    Layer(64, 64, 56, residual=True),
    Layer(128, 128, 28, residual=True),
    Layer(256, 256, 14, residual=True),
    Layer(512, 512, 7, residual=True),
)
"""What `python -m lowbit.bench` times; the first one has a goal."""


def conv_graph(layer: Layer, seed: int = 0) -> Graph:
    """Two blocks in a row, convolution, batch norm (and residual sum) and sign; the first one is `layer`."""
    rng = np.random.default_rng(seed)
    sign = {"kind": "bipolar", "bits": 1}
    half = {"dtype": "float16"}
    nodes = [Node("input", "input", attrs={"shape": (layer.side, layer.side, layer.channels), "dtype": "float32"})]
    stream = "input"
    if layer.residual:
        nodes.append(Node("cast", "stream0", (stream,), attrs=half))
        stream = "stream0"
    nodes.append(Node("quantize", "sign0", (stream,), attrs=sign))
    tensors = {}
    for i, channels, stride in ((1, layer.channels, layer.stride), (2, layer.filters, 1)):
        geometry = {"stride": (stride, stride), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}
        nodes += [
            Node("conv2d", f"conv{i}", (f"sign{i - 1}",), {"weight": f"weight{i}"}, geometry),
            Node("mul", f"mul{i}", (f"conv{i}",), {"factor": f"factor{i}"}),
            Node("add", f"add{i}", (f"mul{i}",), {"term": f"term{i}"}),
        ]
        value = f"add{i}"
        if layer.residual:
            nodes += [
                Node("add", f"sum{i}", (value, f"stream{i - 1}")),
                Node("cast", f"stream{i}", (f"sum{i}",), attrs=half),
            ]
            value = f"stream{i}"
        nodes.append(Node("quantize", f"sign{i}", (value,), attrs=sign))
        weight = rng.choice(np.array([-1, 1], np.int16), (layer.filters, 3, 3, channels))
        tensors[f"weight{i}"] = Tensor(weight, Codes("bipolar", 1))
        tensors[f"factor{i}"] = Tensor(rng.uniform(-0.1, 0.1, layer.filters).astype(np.float32))
        tensors[f"term{i}"] = Tensor(rng.standard_normal(layer.filters).astype(np.float32))
    nodes.append(Node("output", "output", ("sign2",)))
    return Graph(tuple(nodes), tensors)


def bench_conv(layer: Layer = LAYERS[0], threads: int = 1, isa: str | None = None, repeats: int = 40) -> dict[str, Any]:
    """One layer with batch norm and sign beside ONNX Runtime's float32 convolution with bias and ReLU.

    The engine's time is that of the one fused step. Returns plain JSON, as `bench_file` does.
    """
    graph = conv_graph(layer)
    types = graph.validate()
    node = next(n for n in graph.nodes if n.name == "conv1")
    with pinned(threads):
        engine = load(graph, threads=threads, isa=isa)
        at, step = next((i, s) for i, s in enumerate(engine.plan) if node.name in s["nodes"])
        x = _example(engine, 1)
        theirs = _session(float_twin(_layer_graph(graph, node, types)), threads)
        theirs()
        ours_seconds, theirs_seconds = [], []
        for _ in range(repeats):
            ours_seconds.append(engine.profile(x, 10)[at])
            theirs_seconds.append(_seconds(theirs, 4))
    found = Comparison.of(ours_seconds, theirs_seconds)
    count = macs(graph, node, types)
    return {
        "layer": str(layer),
        "macs": count,
        "gmacs_per_second": count / found.ours.median / 1e9,
        "kernel": step["kernel"],
        "isa": step["isa"],
        "threads": threads,
        **asdict(found),
        "warnings": found.warnings(str(layer)),
    }


# --------------------------------------------------------------------------------------------- showing


def digits(value: float) -> str:
    """Three digits that count."""
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def whole_table(result: dict[str, Any]) -> Table:
    """`bench_file`'s whole network, for a terminal."""
    from rich.table import Table

    whole, batch = result["whole"], result["batch"]
    title = f"{result['file']}: {result['threads']} thread{'s'[: result['threads'] > 1]}, batch {batch}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("ms per image", "p10", "p90", "images/s"):
        table.add_column(heading, justify="right")
    ort = f"ONNX Runtime {result['versions'].get('onnxruntime', '')} float32"
    for name, timing in ((f"lowbit, {result['isa']}", whole["ours"]), (ort, whole["theirs"])):
        cells = [digits(1e3 * timing[key] / batch) for key in ("median", "p10", "p90")]
        table.add_row(name, *cells, f"{batch / timing['median']:,.0f}")
    table.add_section()
    table.add_row("times faster", f"[bold]{whole['ratio']:.2f}[/]", f"{whole['p10']:.2f}", f"{whole['p90']:.2f}", "")
    return table


def layers_table(result: dict[str, Any]) -> Table:
    """`bench_file`'s layers, for a terminal."""
    from rich.table import Table

    table = Table(title=f"steps, microseconds per image of a batch of {result['batch']}", title_justify="left")
    table.add_column("step", overflow="fold")
    table.add_column("kernel")
    for heading in ("MMAC", "µs", "share", "GMAC/s", "ORT µs", "faster"):
        table.add_column(heading, justify="right")
    for row in result["layers"]:
        per_image = row["seconds"] / result["batch"]
        compared = row["ratio"] is not None
        table.add_row(
            row["name"],
            f"{row['kernel']} {row['isa']}",
            f"{row['macs'] / 1e6:.2f}" if row["macs"] else "",
            digits(1e6 * per_image),
            f"{row['share']:.0%}",
            f"{row['macs'] / per_image / 1e9:.0f}" if row["macs"] and per_image else "",
            digits(1e6 * row["theirs_seconds"] / result["batch"]) if compared else "",
            f"{row['ratio']:.1f}{' ~' if row['noisy'] else ''}" if compared else "",
        )
    return table


def _conv_table(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table

    first = rows[0]
    threads = f"{first['threads']} thread{'s'[: first['threads'] > 1]}"
    table = Table(title=f"{machine()['processor']}, {threads}, {first['isa']}", title_justify="left")
    table.add_column("layer")
    for heading in ("lowbit µs", "GMAC/s", "ORT fp32 µs", "times faster", "p10 .. p90"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["layer"],
            digits(1e6 * row["ours"]["median"]),
            f"{row['gmacs_per_second']:,.0f}",
            digits(1e6 * row["theirs"]["median"]),
            f"[bold]{row['ratio']:.1f}[/]",
            f"{row['p10']:.1f} .. {row['p90']:.1f}",
        )
    return table


def _verdict(what: str, good: bool) -> str:
    return f"{what}: {'[green]reached[/]' if good else '[red]missed[/]'}"


def write_result(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Write plain JSON, whole or not at all. Raises OSError."""
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m lowbit.bench``: binary layers beside ONNX Runtime, and training steps of SLB beside float and of LNS beside sign."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m lowbit.bench", description=main.__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of the engine and ONNX Runtime")
    parser.add_argument("--isa", help="force a row of kernels")
    parser.add_argument("--repeats", type=int, default=40, help="samples of each")
    parser.add_argument("--no-training", action="store_true", help="leave out the training step")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where the numbers go")
    options = parser.parse_args(arguments)
    console = Console()
    layers = []
    with console.status("") as status:
        for layer in LAYERS:
            status.update(f"{layer}, beside ONNX Runtime")
            layers.append(bench_conv(layer, options.threads, options.isa, options.repeats))
    console.print(_conv_table(layers))
    goal = f"{layers[0]['layer']}, at least {CONV_GOAL:g}x ONNX Runtime fp32"
    console.print(_verdict(goal, layers[0]["ratio"] >= CONV_GOAL))
    steps = []
    for method, reference, batch, most in () if options.no_training else STEP_GOALS:
        from lowbit.train.benchmark import bench_training_step

        with console.status(f"one training step: {method} beside {reference}"):
            step = bench_training_step(options.repeats, batch, options.threads, method, reference)
        ours, theirs = (digits(1e3 * step[side]["median"]) for side in ("ours", "theirs"))
        console.print(
            f"W1A1 training step, {step['step']}: {method} {ours} ms, {reference} {theirs} ms, [bold]{step['slowdown']:.2f}[/] "
            f"times (p10 .. p90 of neighbours {1 / step['p90']:.2f} .. {1 / step['p10']:.2f})"
        )
        console.print(_verdict(f"at most {most:g} times a {reference} step", step["slowdown"] <= most))
        steps.append(step)
    for result in [*layers, *steps]:
        for warning in result["warnings"]:
            console.print(f"[yellow]warning:[/] {warning}")
    packages = versions("lowbit", "numpy", "onnxruntime", "torch")
    found = {"format": FORMAT, "machine": machine(), "versions": packages, "layers": layers, "training_steps": steps}
    write_result(options.json, found)
    console.print(f"numbers in {options.json}")


if __name__ == "__main__":
    main()
