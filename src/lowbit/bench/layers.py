"""Single layers: bits in, bits out, beside the peers' convolution of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.bench.measure import Comparison, Core, Peak, Sample, Timing, Watch, in_turn, pinned, timed
from lowbit.bench.peers import Peer, Session, open_all
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.inspect import macs
from lowbit.runtime import Engine, load

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A 3x3 layer with padding 1: codes in, codes out, and with `residual` a float16 stream in and out beside them.

    Weights are bipolar codes; activations are signs for 1 bit, else unsigned codes.
    """

    channels: int
    filters: int
    side: int
    stride: int = 1
    residual: bool = False
    weight_bits: int = 1
    activation_bits: int = 1

    def __str__(self) -> str:
        width = str(self.channels) if self.channels == self.filters else f"{self.channels} to {self.filters}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        stream = ", float16 stream" if self.residual else ""
        bits = f"W{self.weight_bits}A{self.activation_bits}"
        return f"{bits} 3x3, {width} channels, {self.side}x{self.side}{stride}{stream}"


LAYERS: Final = (
    Layer(64, 64, 56),
    Layer(128, 128, 28),
    Layer(256, 256, 14),
    Layer(512, 512, 7),
    Layer(64, 128, 56, stride=2),
    Layer(128, 256, 28, stride=2),
    Layer(256, 512, 14, stride=2),
    Layer(128, 128, 32),
    Layer(128, 256, 16),
    Layer(256, 256, 16),
    Layer(256, 512, 8),
    Layer(512, 512, 8),
    Layer(16, 16, 32),
    Layer(32, 32, 16),
    Layer(64, 64, 8),
    Layer(64, 64, 56, residual=True),
    Layer(128, 128, 28, residual=True),
    Layer(256, 256, 14, residual=True),
    Layer(512, 512, 7, residual=True),
    Layer(64, 64, 256, residual=True),
)
"""Layers of one bit: of ResNet-18, VGG-Small and ResNet-20; with a stream those of Bi-Real ResNet-18 and of VDSR."""

LOW_BIT: Final = tuple(
    Layer(channels, channels, side, weight_bits=w, activation_bits=a)
    for channels, side in ((64, 56), (256, 14))
    for w, a in ((1, 2), (1, 4), (2, 2), (2, 4), (4, 4), (1, 8), (2, 8), (4, 8))
)
"""Layers of a few bits."""


def goals(layer: Layer) -> dict[str, float]:
    """What a layer is to reach on a core with AVX-512 VPOPCNTDQ of AMD's kind: times faster than a peer, by its name, and the share of the
    measured ``peak``."""
    bits = (layer.weight_bits, layer.activation_bits)
    if bits != (1, 1):
        least = {(1, 2): 3.6, (1, 4): 2.8, (2, 2): 2.0, (4, 4): 1.0, (2, 8): 1.0, (4, 8): 1.0}
        return {"ort-int8": least[bits]} if bits in least else {}
    if layer.channels == 16:
        return {"ort-fp32": 15.0, "ort-int8": 8.0}
    if layer.channels == 32:
        return {"ort-fp32": 16.0, "ort-int8": 5.5}
    if layer.residual and layer.side == 256:
        return {"ort-fp32": 14.0, "ort-int8": 4.4}
    if layer.residual:
        return {"ort-fp32": 14.0 if layer.channels <= 128 else 19.0}
    return {"peak": 0.83, "ort-fp32": 19.0, "ort-int8": 5.2}


def conv_graph(layer: Layer, seed: int = 0) -> Graph:
    """Two blocks in a row, convolution, batch norm (and residual sum) and quantization; the first one is `layer`."""
    rng = np.random.default_rng(seed)
    bits = layer.activation_bits
    quantize: dict[str, Any] = {"kind": "bipolar", "bits": 1}
    if bits > 1:
        quantize = {"kind": "unsigned", "bits": bits, "reciprocal": float(2**bits - 1)}
    half = {"dtype": "float16"}
    nodes = [Node("input", "input", attrs={"shape": (layer.side, layer.side, layer.channels), "dtype": "float32"})]
    stream = "input"
    if layer.residual:
        nodes.append(Node("cast", "stream0", (stream,), attrs=half))
        stream = "stream0"
    nodes.append(Node("quantize", "sign0", (stream,), attrs=quantize))
    tensors = {}
    codes = np.arange(1 - 2**layer.weight_bits, 2**layer.weight_bits, 2, dtype=np.int16)
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
        nodes.append(Node("quantize", f"sign{i}", (value,), attrs=quantize))
        tensors[f"weight{i}"] = Tensor(
            rng.choice(codes, (layer.filters, 3, 3, channels)), Codes("bipolar", layer.weight_bits)
        )
        scale = 0.1 / ((2**bits - 1) * (2**layer.weight_bits - 1))
        tensors[f"factor{i}"] = Tensor(rng.uniform(-scale, scale, layer.filters).astype(np.float32))
        tensors[f"term{i}"] = Tensor(rng.standard_normal(layer.filters).astype(np.float32))
    nodes.append(Node("output", "output", ("sign2",)))
    return Graph(tuple(nodes), tensors)


def peer_graph(layer: Layer, seed: int = 0) -> Graph:
    """What a peer computes for `layer`, in float32: convolution, bias, ReLU; with a residual the ReLU in front, and the sum."""
    rng = np.random.default_rng(seed)
    shape = (layer.filters, 3, 3, layer.channels)
    weight = rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(9 * layer.channels))
    geometry = {"stride": (layer.stride,) * 2, "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}
    first = Node("input", "input", attrs={"shape": (layer.side, layer.side, layer.channels), "dtype": "float32"})
    middle = [
        Node("conv2d", "conv", ("relu" if layer.residual else "input",), {"weight": "weight"}, geometry),
        Node("add", "add", ("conv",), {"term": "term"}),
    ]
    if layer.residual:
        middle = [Node("relu", "relu", ("input",)), *middle, Node("add", "sum", ("add", "input"))]
    else:
        middle = [*middle, Node("relu", "relu", ("add",))]
    tensors = {"weight": Tensor(weight), "term": Tensor(np.full(layer.filters, 0.1, np.float32))}
    return Graph((first, *middle, Node("output", "output", (middle[-1].name,))), tensors)


def peer_examples(layer: Layer, count: int = 4, seed: int = 0) -> Array:
    """Inputs for `peer_graph`, channels first: what a ReLU lets through; with a residual the stream, standard normal."""
    shape = (count, layer.channels, layer.side, layer.side)
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return x if layer.residual else np.maximum(x, 0)


class Sessions:
    """Sessions of layers in the peers, opened once for each shape, and what a call of each peer costs by itself."""

    def __init__(self, peers: Sequence[Peer], threads: int) -> None:
        self.peers, self.threads = peers, threads
        self._opened: dict[Layer, tuple[dict[str, Session], list[str]]] = {}
        self._empty = {peer.name: peer.empty(threads) for peer in peers}

    def of(self, layer: Layer) -> tuple[dict[str, Session], list[str]]:
        """By the peer's name, and what failed; layers that differ in bits alone share them."""
        shape = replace(layer, weight_bits=1, activation_bits=1)
        if shape not in self._opened:
            self._opened[shape] = open_all(self.peers, peer_graph(shape), self.threads, 1, peer_examples(shape))
        return self._opened[shape]

    def empty_seconds(self) -> dict[str, float]:
        """Of a call of each peer that computes nothing, now."""
        samples = {name: timed(session.run) for name, session in self._empty.items()}
        return {name: min(sample() for _ in range(3)) for name, sample in samples.items()}


@dataclass(frozen=True)
class Ours:
    """A layer in the engine: `sample` gives the seconds of its fused step, `step` is that step of the plan, `macs` of one image."""

    sample: Sample
    step: Mapping[str, Any]
    macs: int
    threads: int
    isa: str

    @staticmethod
    def of(layer: Layer, threads: int, isa: str | None) -> Ours:
        """Load `conv_graph` and find the step; raises ValueError for an isa or threads that can't be had."""
        graph = conv_graph(layer)
        node = next(n for n in graph.nodes if n.name == "conv1")
        engine = load(graph, threads=threads, isa=isa)
        indices = step_indices(engine.plan, node.name)
        x = example(engine, 1)

        def sample() -> float:
            seconds = engine.profile(x, 10)
            return sum(seconds[i] for i in indices)

        return Ours(sample, engine.plan[indices[-1]], macs(graph, node, graph.validate()), threads, engine.isa)

    def row(self, layer: Layer, found: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """The layer's row: what it is, which kernel ran, `found` (``ours`` and ``peers``), speed and share of the peak."""
        speed = self.macs / found["ours"]["median"]
        return {
            "layer": str(layer),
            "weight_bits": layer.weight_bits,
            "activation_bits": layer.activation_bits,
            "macs": self.macs,
            "kernel": self.step["kernel"],
            "isa": self.step["isa"],
            "threads": self.threads,
            **found,
            "gmacs_per_second": speed / 1e9,
            "peak_share": peak_share(self.step, speed / self.threads, self.isa, watch.peak),
            "goals": goals(layer),
            "trusted": not watch.warnings,
            "warnings": [f"{layer}: {text}" for text in (*watch.warnings, *noise(found))],
        }


def bench_layer(layer: Layer, isa: str | None, sessions: Sessions, core: Core, repeats: int) -> dict[str, Any]:
    """One layer: the engine's fused step beside each peer's model of one layer, less the time of an empty call.

    Returns:
        Plain JSON: ``layer, weight_bits, activation_bits, macs, kernel, isa, threads, ours, peers, gmacs_per_second, peak_share, goals,
        trusted, warnings``. `peak_share` is None where no loop of the kernel's kind was measured; `trusted` is false where the core
        was not the same before and after.
    """
    ours = Ours.of(layer, sessions.threads, isa)
    opened, failures = sessions.of(layer)
    with core.watched() as watch:
        found = beside(ours.sample, opened, repeats, sessions.empty_seconds())
    row = ours.row(layer, found, watch)
    row["warnings"] += [f"{layer}: {text}" for text in failures]
    return row


def bench_layers(
    layers: Sequence[Layer],
    peers: Sequence[Peer],
    core: Core,
    threads: int = 1,
    isa: str | None = None,
    repeats: int = 40,
    on_layer: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """`bench_layer` of each, pinned. Raises ValueError: more threads than cores, an unknown isa."""
    with pinned(threads):
        sessions = Sessions(peers, threads)
        rows = []
        for layer in layers:
            on_layer(str(layer))
            rows.append(bench_layer(layer, isa, sessions, core, repeats))
    return rows


# --------------------------------------------------------------------------------------------- shared with whole files


def beside(
    ours: Sample, opened: Mapping[str, Session], repeats: int, less: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """``ours`` and ``peers``: samples in turn, as plain JSON; `less` seconds are taken off a peer's samples."""
    samples = in_turn([ours, *(timed(session.run) for session in opened.values())], repeats)
    peers = {}
    for (name, session), seconds in zip(opened.items(), samples[1:], strict=True):
        off = (less or {}).get(name, 0.0)
        peers[name] = compared(samples[0], [max(s - off, 1e-9) for s in seconds], session.note)
    return {"ours": asdict(Timing.of(samples[0])), "peers": peers}


def compared(ours: Sequence[float], theirs: Sequence[float], note: str) -> dict[str, Any]:
    """A peer's part of a row, plain JSON: ``theirs, ratio, p10, p90, noisy, note``."""
    found = Comparison.of(ours, theirs)
    tree = {key: value for key, value in asdict(found).items() if key != "ours"}
    return {**tree, "noisy": found.noisy, "note": note}


def noise(found: Mapping[str, Any]) -> list[str]:
    """A sentence where ratios scatter too much to be believed."""
    noisy = {name: peer for name, peer in found["peers"].items() if peer["noisy"]}
    if not noisy:
        return []
    spreads = ", ".join(f"{name} {peer['p10']:.2f} to {peer['p90']:.2f}" for name, peer in noisy.items())
    return [f"noisy: ratios of neighbouring samples beside {spreads}; close other programs and repeat"]


def peak_share(step: Mapping[str, Any], speed: float, isa: str, peak: Peak | None) -> float | None:
    """`speed`, MAC/s of one core, as a share of the peak of the step's kind of kernel; None where it ran on another row than
    the one that was measured, or has no peak."""
    top = peak.of(step["kernel"]) if peak and step["isa"] == isa else None
    return speed / top if top else None


def example(engine: Engine, batch: int, seed: int = 0) -> Array:
    """An input batch for the engine: random pixels, or standard normal numbers."""
    rng = np.random.default_rng(seed)
    shape = (batch, *engine.input_shape)
    if np.dtype(engine.input_dtype) == np.uint8:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def rows_of(plan: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The steps of the plan by row: a step that sums codes belongs to the layer behind it."""
    rows: list[list[int]] = []
    open_row: list[int] = []
    for i, step in enumerate(plan):
        open_row.append(i)
        if step["kernel"] != "code_sums":
            rows.append(open_row)
            open_row = []
    return rows


def step_indices(plan: Sequence[Mapping[str, Any]], node: str) -> list[int]:
    """The steps of the row that computes `node`."""
    return next(row for row in rows_of(plan) if any(node in plan[i]["nodes"] for i in row))
