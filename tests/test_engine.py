"""Interpreter == scalar == AVX2 == AVX-512, bit for bit, on random Graphs; and every refusal of the engine's door."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import graphs
from lowbit import _engine
from lowbit.bench import superres
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.interpreter import run
from lowbit.runtime import Engine, isas, load

SEED = int(os.environ.get("LOWBIT_TEST_SEED", "20260"))
RANDOM_GRAPHS = int(os.environ.get("LOWBIT_TEST_GRAPHS", "900"))
CORES = os.cpu_count() or 1
AVAILABLE = [isa for isa, available in isas().items() if available]
KERNELS = ("bit_conv", "int_gemm", "float_gemm", "depthwise_int", "depthwise_float", "pool", "elementwise")
KERNELS += ("bit_conv+threshold", "int_gemm+threshold", "concat", "flatten", "pixel_shuffle", "code_sums")
KERNELS += ("byte_gemm", "byte_gemm+threshold", "depthwise_int+threshold", "table_conv", "table_conv+threshold")
KERNELS += ("table_conv+levels", "resize_bicubic", "line_conv")
NOWHERE = {(f"byte_gemm{end}", isa) for end in ("", "+threshold") for isa in ("avx2", "neon")}  # no product for it
NOWHERE |= {
    (f"table_conv{end}", isa) for end in ("", "+threshold", "+levels") for isa in ("avx2", "scalar", "neon", "i8mm")
}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def difference(engine: Engine, x: np.ndarray, output: np.ndarray, values: dict[str, np.ndarray]) -> str:
    """The first stored value in which the engine differs from the interpreter, or nothing."""
    got, stored = engine.run(x, trace=True)
    for name, value in stored.items():
        if not same(value, values[name]):
            return f"{name}: {np.count_nonzero(value != values[name])} of {value.size} differ"
    return "" if same(got, output) else "the output"


class DifferenceError(AssertionError):
    def __init__(self, isa: str, what: str, seed: int, graph: str) -> None:
        super().__init__(what)
        self.isa, self.seed, self.graph = isa, seed, graph


class Drawn(graphs.Choices):
    """Choices that hypothesis makes, and makes smaller where a graph fails; what fills arrays comes from a drawn seed."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.seed = data.draw(st.integers(0, 2**32 - 1))
        super().__init__(self.seed)

    def below(self, n: int) -> int:
        return self.data.draw(st.integers(0, n - 1)) if n > 1 else 0

    def chance(self, p: float) -> bool:
        return self.data.draw(st.integers(0, 999)) >= 1000 * (1 - p)


@dataclass
class Campaign:
    """Every cell asked for once, then random Graphs; each on every ISA this CPU has."""

    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    seen: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    kernels: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    ran: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    graphs: int = 0

    def go(self) -> None:
        for seed, ask in enumerate(graphs.EXPECTED.values(), SEED):
            graph = graphs.draw(seed, ask)
            for isa, what in self.compare(graph, seed, shared=seed % 3 == 0):
                self.failures[isa].append(f"draw({seed}, {ask}): {what}")
        try:
            self.search()
        except DifferenceError as e:
            self.failures[e.isa].append(
                f"{e}, in the smallest graph that hypothesis found (batch of inputs: {e.seed}):\n{e.graph}"
            )

    def search(self) -> None:
        """RANDOM_GRAPHS graphs whose shapes and ops hypothesis chooses: it makes one that fails smaller, then raises."""

        @seeded(SEED)
        @settings(
            max_examples=RANDOM_GRAPHS,
            phases=[Phase.generate, Phase.shrink],
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def one(data: st.DataObject) -> None:
            choices = Drawn(data)
            graph = graphs.compose(choices)
            for isa, what in self.compare(graph, choices.seed, choices.chance(1 / 3)):
                raise DifferenceError(isa, what, choices.seed, graphs.describe(graph))

        one()

    def compare(self, graph: Graph, seed: int, shared: bool) -> list[tuple[str, str]]:
        """Every ISA in which the engine differs from the interpreter, and in what."""
        x = graphs.inputs(graph, seed, batch=3)
        output, values = run(graph, x, trace=True)
        cells = graphs.cells(graph)
        self.graphs += 1
        differ = []
        for isa in AVAILABLE:
            engine = load(graph, isa=isa)
            assert engine.isa == isa
            self.ran[isa] += 1
            what = difference(engine, x, output, values)
            if not what and not same(engine(x[0]), output[0]):
                what = "a single input"
            if not what and CORES > 1 and shared:
                both = load(graph, threads=2, isa=isa)
                both._native._debug_always_share()
                what = difference(both, x, output, values)
                what = what and f"with 2 threads {what}"
            if what:
                differ.append((isa, what))
            for cell in cells:
                self.seen[cell, isa] += 1
            for step in engine.plan:
                self.kernels[step["kernel"], isa] += 1
        return differ

    def table(self) -> str:
        rows = list(isas())
        width = max(map(len, (*graphs.EXPECTED, *KERNELS))) + 2
        head = f"Engine against interpreter on {self.graphs} graphs (seed {SEED}), graphs per op x type x ISA"
        status = "  ".join(f"{isa}: {'ok' if isa in AVAILABLE else 'SKIP'}" for isa in rows)
        lines = [head, status, f"{'':{width}}" + "".join(f"{isa:>8}" for isa in rows)]
        for title, counts in ((graphs.EXPECTED, self.seen), (KERNELS, self.kernels)):
            for cell in title:
                numbers = [str(counts[cell, isa]) if isa in AVAILABLE else "SKIP" for isa in rows]
                lines.append(f"{cell:{width}}" + "".join(f"{n:>8}" for n in numbers))
        return "\n".join(lines)


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    c = Campaign()
    c.go()
    return c


@pytest.mark.parametrize("isa", isas())
def test_equals_the_interpreter(campaign: Campaign, isa: str) -> None:
    if isa not in AVAILABLE:
        pytest.skip(f"NOT TESTED HERE: this CPU has no {isa}")
    assert campaign.ran[isa] == campaign.graphs > RANDOM_GRAPHS
    failures = campaign.failures[isa]
    assert not failures, f"{len(failures)} graphs differ on {isa}; the first: {failures[0]}"


FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vpopcntdq", "avx512_vnni", "avx512vbmi"},
    "avx2": {"avx2", "f16c"},
    "scalar": set(),
}
"""What Linux calls the features that a row needs."""


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="x86 and Linux only")
def test_every_row_that_this_cpu_can_run_is_reported() -> None:
    """A row that the engine took for missing would be skipped by every test."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags
    assert isas() == {isa: FLAGS[isa] <= set(flags[1].split()) for isa in isas()}


def test_no_cell_is_empty(campaign: Campaign, record_property: Callable[[str, object], None]) -> None:
    record_property("table", campaign.table())
    empty = [(cell, isa) for cell in graphs.EXPECTED for isa in AVAILABLE if not campaign.seen[cell, isa]]
    empty += [
        (kernel, isa)
        for kernel in KERNELS
        for isa in AVAILABLE
        if not campaign.kernels[kernel, isa] and (kernel, isa) not in NOWHERE
    ]
    assert not empty


@pytest.mark.slow
def test_a_graph_that_fails_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every threshold off by one: what is reported is little more than two products and the steps between them."""
    right = load

    def load_wrong(graph: Graph, **options: Any) -> Engine:
        engine = right(graph, **options)
        engine._native._debug_nudge_thresholds(1)
        return engine

    monkeypatch.setitem(globals(), "load", load_wrong)
    monkeypatch.setitem(globals(), "AVAILABLE", AVAILABLE[:1])
    with pytest.raises(DifferenceError) as caught:
        Campaign().search()
    lines = caught.value.graph.splitlines()
    assert len(lines) <= 10, lines
    assert all("(1, 1, 1, 1)" in line or "(1, 1)" in line for line in lines if "weight" in line), lines


# --- one convolution, by hand ---


def signs(rng: np.random.Generator, *shape: int) -> Tensor:
    return Tensor(rng.choice([-1, 1], shape), Codes("bipolar", 1))


def binary_net(rng: np.random.Generator, side: int = 9, channels: int = 48, factor: np.ndarray | None = None) -> Graph:
    """float32 -> sign -> 3x3 -> mul, add -> sign -> 3x3 -> mul -> output: the first convolution ends in thresholds."""
    conv = {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}
    sign = {"kind": "bipolar", "bits": 1}
    nodes = (
        Node("input", "x", attrs={"shape": (side, side, channels), "dtype": "float32"}),
        Node("quantize", "q0", ("x",), attrs=sign),
        Node("conv2d", "c1", ("q0",), {"weight": "w1"}, conv),
        Node("mul", "m1", ("c1",), {"factor": "f1"}),
        Node("add", "a1", ("m1",), {"term": "t1"}),
        Node("quantize", "q1", ("a1",), attrs=sign),
        Node("conv2d", "c2", ("q1",), {"weight": "w2"}, conv),
        Node("mul", "m2", ("c2",), {"factor": "f2"}),
        Node("output", "y", ("m2",)),
    )
    tensors = {
        "w1": signs(rng, channels, 3, 3, channels),
        "w2": signs(rng, channels, 3, 3, channels),
        "f1": Tensor(rng.normal(size=channels) * 0.1 if factor is None else factor),
        "t1": Tensor(rng.normal(size=channels)),
        "f2": Tensor(np.ones(1)),
    }
    return Graph(nodes, tensors)


def test_a_threshold_off_by_one_is_seen() -> None:
    rng = np.random.default_rng(SEED)
    graph = binary_net(rng)
    x = rng.normal(size=(2, 9, 9, 48)).astype(np.float32)
    output, values = run(graph, x, trace=True)
    for isa in AVAILABLE:
        for delta in (1, -1):
            engine = load(graph, isa=isa)
            assert not difference(engine, x, output, values)
            assert engine._native._debug_nudge_thresholds(delta) > 0
            assert "q1" in difference(engine, x, output, values)
            engine._native._debug_nudge_thresholds(-delta)
            assert not difference(engine, x, output, values)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30, 1e-45])
def test_extreme_factors(value: float) -> None:
    rng = np.random.default_rng(SEED)
    graph = binary_net(rng, factor=np.full(48, value, np.float32))
    x = rng.normal(size=(2, 9, 9, 48)).astype(np.float32)
    output, values = run(graph, x, trace=True)
    for isa in AVAILABLE:
        assert not difference(load(graph, isa=isa), x, output, values)


def test_flush_to_zero_of_the_caller_does_not_matter() -> None:
    """Denormal factors keep their sign's worth: 1e-45 times an accumulator is not flushed to 0."""
    rng = np.random.default_rng(SEED)
    graph = binary_net(rng, factor=np.full(48, -1e-42, np.float32))
    tensors = {**graph.tensors, "t1": Tensor(np.zeros(1))}
    graph = Graph(graph.nodes, tensors)
    x = rng.normal(size=(1, 9, 9, 48)).astype(np.float32)
    output, values = run(graph, x, trace=True)
    import torch

    torch.set_flush_denormal(True)
    try:
        results = [difference(load(graph, isa=isa), x, output, values) for isa in AVAILABLE]
    finally:
        torch.set_flush_denormal(False)
    assert not any(results)


def every_half() -> tuple[Graph, np.ndarray]:
    """All finite float16 numbers, and the float32 numbers halfway between them and next to that; in, out and added."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    exact = half[np.isfinite(half)].astype(np.float32)
    middle = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)
    x = np.concatenate([exact, middle, np.nextafter(middle, np.float32(9)), np.nextafter(middle, np.float32(-9))])
    x = x[np.abs(x) < 65504]
    nodes = (
        Node("input", "x", attrs={"shape": (64,), "dtype": "float32"}),
        Node("cast", "h", ("x",), attrs={"dtype": "float16"}),
        Node("relu", "r", ("h",)),
        Node("add", "s", ("h", "r")),
        Node("output", "y", ("s",)),
    )
    return Graph(nodes, {}), np.resize(x, (len(x) // 64, 64))


def test_float16_conversions_of_every_half() -> None:
    """Through every ISA."""
    graph, x = every_half()
    output, values = run(graph, x, trace=True)
    for isa in AVAILABLE:
        assert not difference(load(graph, isa=isa), x, output, values)


@pytest.mark.parametrize("channels", [1, 15, 16])
@pytest.mark.parametrize("filters", [2, 16, 33, 64, 80])
@pytest.mark.parametrize("side", [3, 8, 17])
def test_few_channels(channels: int, filters: int, side: int) -> None:
    """Two neighbouring pixels in a lane: odd widths, more blocks of filters, and readers that take whole words (stride 2)."""
    rng = np.random.default_rng(SEED)
    conv = {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}
    sign = {"kind": "bipolar", "bits": 1}
    nodes = (
        Node("input", "x", attrs={"shape": (side, side, channels), "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs=sign),
        Node("conv2d", "a", ("q",), {"weight": "wa"}, conv),
        Node("mul", "ma", ("a",), {"factor": "fa"}),
        Node("quantize", "s", ("ma",), attrs=sign),
        Node("conv2d", "b", ("s",), {"weight": "wb"}, {**conv, "dilation": (1, 2), "padding": (0, 2, 2, 1)}),
        Node("mul", "mb", ("b",), {"factor": "fb"}),
        Node("conv2d", "c", ("q",), {"weight": "wc"}, {**conv, "stride": (1, 2), "padding": (0, 1, 1, 1)}),
        Node("mul", "mc", ("c",), {"factor": "fc"}),
        Node("global_avg_pool", "pb", ("mb",)),
        Node("global_avg_pool", "pc", ("mc",)),
        Node("add", "sum", ("pb", "pc")),
        Node("output", "y", ("sum",)),
    )
    tensors = {"w" + n: signs(rng, filters, 3, 3, channels) for n in "ac"} | {"wb": signs(rng, filters, 3, 3, filters)}
    tensors |= {"f" + n: Tensor(rng.normal(size=filters)) for n in "abc"}
    graph = Graph(nodes, tensors)
    x = rng.normal(size=(2, side, side, channels)).astype(np.float32)
    output, values = run(graph, x, trace=True)
    for isa in AVAILABLE:
        assert not difference(load(graph, isa=isa), x, output, values)


# --- products by tables ---


@pytest.mark.parametrize(
    ("x", "w", "channels", "filters", "attrs"),
    [
        (Codes("unsigned", 2), Codes("bipolar", 1), 64, 64, {}),
        (Codes("unsigned", 4), Codes("bipolar", 1), 512, 192, {}),  # sums beyond 16 bits
        (Codes("unsigned", 4), Codes("bipolar", 2), 130, 256, {"stride": (2, 2)}),
        (Codes("unsigned", 1), Codes("bipolar", 2), 301, 512, {"kernel": (1, 1), "padding": (0,) * 4}),
        (Codes("unsigned", 3), Codes("signed", 2), 61, 129, {"kernel": (5, 5), "padding": (2, 1, 2, 0)}),
        (Codes("signed", 4), Codes("bipolar", 2), 48, 256, {"dilation": (2, 1)}),
        (Codes("unsigned", 3), Codes("bipolar", 1), 31, 320, {"kernel": (2, 7), "padding": (1, 3, 0, 3)}),
        (Codes("bipolar", 1), Codes("signed", 2), 97, 97, {"stride": (1, 3)}),
    ],
)
@pytest.mark.parametrize("extreme", [False, True])
def test_tables(x: Codes, w: Codes, channels: int, filters: int, attrs: dict[str, object], extreme: bool) -> None:
    rng = np.random.default_rng(SEED)
    graph = one_product(rng, x, w, 9, channels, filters, "", **{"padding": (1, 1, 1, 1), **attrs})
    if extreme:  # every code the largest, every filter all of one weight
        first = np.resize(w.values, filters).reshape(-1, *[1] * 3)
        tensors = {**graph.tensors, "w": Tensor(np.broadcast_to(first, graph.tensors["w"].data.shape), w)}
        graph = Graph(graph.nodes, tensors)
    graph = Graph(
        (*graph.nodes[:3], Node("mul", "m", ("c",), {"factor": "f"}), Node("output", "y", ("m",))),
        {"w": graph.tensors["w"], "f": Tensor(np.ones(1))},
    )
    batch = rng.normal(size=(3, 9, 9, channels)) * x.high if not extreme else np.full((3, 9, 9, channels), 99.0)
    batch = batch.astype(np.float32)
    output, values = run(graph, batch, trace=True)
    for isa in AVAILABLE:
        engine = load(graph, isa=isa)
        kernels = [step["kernel"] for step in engine.plan]
        assert ("table_conv" in kernels) == (isa == "avx512"), kernels
        assert not difference(engine, batch, output, values)
        if CORES > 1:
            shared = load(graph, threads=2, isa=isa)
            shared._native._debug_always_share()
            assert not difference(shared, batch, output, values)


@pytest.mark.parametrize(
    ("channels", "filters", "groups"), [(3, 5, 1), (16, 16, 1), (40, 70, 1), (64, 128, 2), (129, 64, 1)]
)
@pytest.mark.parametrize("ends", ["threshold", "stream"])
def test_codes_0_and_1(channels: int, filters: int, groups: int, ends: str) -> None:
    """DoReFa's 1-bit activations are counted like signs: padding, borders, pooled codes, thresholds, a sum behind."""
    rng = np.random.default_rng(SEED + channels)
    codes = {"kind": "unsigned", "bits": 1, "reciprocal": float(np.float32(1.7))}
    geometry = {"stride": (1, 1), "dilation": (1, 1), "groups": groups, "padding": (1, 1, 1, 1)}
    nodes = [
        Node("input", "x", attrs={"shape": (9, 10, channels), "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs=codes),
        Node("max_pool", "p", ("q",), attrs={"kernel": (2, 2), "stride": (1, 1), "padding": (0,) * 4}),
        Node("conv2d", "c", ("p",), {"weight": "w"}, geometry),
        Node("mul", "m", ("c",), {"factor": "f"}),
        Node("add", "a", ("m",), {"term": "t"}),
    ]
    if ends == "stream":
        nodes += [Node("cast", "h", ("a",), attrs={"dtype": "float16"}), Node("add", "a2", ("h", "h"))]
    nodes += [
        Node("quantize", "s", (nodes[-1].name,), attrs=codes),
        Node("conv2d", "d", ("s",), {"weight": "v"}, {**geometry, "groups": 1, "stride": (2, 1)}),
        Node("mul", "r", ("d",), {"factor": "half"}),
        Node("output", "y", ("r",)),
    ]
    tensors = {
        "half": Tensor(np.full(1, 1e-45)),  # half of it is no number: the factor of 0.5 stays a step
        "w": signs(rng, filters, 3, 3, channels // groups),
        "v": signs(rng, 33, 3, 3, filters),
        "f": Tensor(rng.normal(size=filters) * 0.1),
        "t": Tensor(rng.normal(size=filters)),
    }
    graph = Graph(tuple(nodes), tensors)
    batch = rng.normal(size=(3, 9, 10, channels)).astype(np.float32)
    batch[0] = 0.5 / np.float32(1.7)  # a product near the tie at 0.5, which goes to 0
    output, values = run(graph, batch, trace=True)
    assert 0.1 < values["s"].mean() < 0.9
    for isa in AVAILABLE:
        for threads in range(1, min(CORES, 2) + 1):
            engine = load(graph, threads=threads, isa=isa)
            engine._native._debug_always_share()
            kernels = [step["kernel"] for step in engine.plan if step["kernel"].startswith("bit_conv")]
            assert kernels == ["bit_conv+threshold" if ends == "threshold" else "bit_conv", "bit_conv"], engine.plan
            assert not difference(engine, batch, output, values)


@pytest.mark.parametrize("x", [Codes("unsigned", 2), Codes("unsigned", 4)])
@pytest.mark.parametrize("w", [Codes("bipolar", 1), Codes("bipolar", 2)])
@pytest.mark.parametrize("taps", [(3, 3), (5, 1)])
@pytest.mark.parametrize("density", [0.3, 0.6, 0.8, 0.92])
def test_tables_to_the_last_byte(x: Codes, w: Codes, taps: tuple[int, int], density: float) -> None:
    """How many lookups a byte holds depends on the weights: with every code the largest, one too many overflows."""
    rng = np.random.default_rng(SEED)
    graph = one_product(rng, x, w, 7, 102, 128, "", kernel=taps, padding=(0,) * 4)
    codes = np.where(rng.random((128, *taps, 102)) < density, w.high, w.low)
    codes[0] = np.resize([w.high] * 17 + [w.low], codes[0].shape)  # 4 bits: 17 of 18 fill the byte
    nodes = (*graph.nodes[:3], Node("mul", "m", ("c",), {"factor": "f"}), Node("output", "y", ("m",)))
    graph = Graph(nodes, {"w": Tensor(codes, w), "f": Tensor(np.ones(1))})
    batch = np.full((1, 7, 7, 102), 99.0, np.float32)
    output, values = run(graph, batch, trace=True)
    for isa in AVAILABLE:
        engine = load(graph, isa=isa)
        assert ("table_conv" in [step["kernel"] for step in engine.plan]) == (isa == "avx512")
        assert not difference(engine, batch, output, values)


@pytest.mark.parametrize("w", [Codes("bipolar", 1), Codes("bipolar", 2), Codes("signed", 2)])
@pytest.mark.parametrize("to", [Codes("unsigned", 1), Codes("unsigned", 2), Codes("signed", 3), Codes("unsigned", 3)])
@pytest.mark.parametrize(("channels", "filters"), [(64, 64), (40, 200), (129, 112)])
def test_levels(w: Codes, to: Codes, channels: int, filters: int) -> None:
    """Codes from tables by limits: rising, falling and constant filters, sums on a limit, and codes that are not from 0."""
    rng = np.random.default_rng(SEED + filters + to.bits + 10 * w.bits)
    x = Codes("signed", 2) if to.kind == "signed" else Codes("unsigned", 2)
    factor = rng.normal(size=filters) * 0.01 * 2**to.bits
    factor[::7] = 0.0
    factor[1::7] = 2.0**-5  # every other sum lies on a limit
    tensors = {
        "w": Tensor(rng.choice(w.values, (filters, 3, 3, channels)), w),
        "f": Tensor(factor),
        "t": Tensor(np.where(np.arange(filters) % 7 < 2, 0.5, rng.normal(size=filters) * 2)),
        "p": Tensor(np.abs(rng.normal(size=filters))),
        "v": Tensor(rng.integers(-3, 4, (5, 1, 1, filters)), Codes("signed", 3)),
    }
    geometry = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    nodes = (
        Node("input", "x", attrs={"shape": (9, 33, channels), "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs={"kind": x.kind, "bits": x.bits, "reciprocal": 1.0}),
        Node("conv2d", "c", ("q",), {"weight": "w"}, {**geometry, "padding": (1, 1, 1, 1)}),
        Node("mul", "m", ("c",), {"factor": "f"}),
        Node("add", "a", ("m",), {"term": "t"}),
        Node("prelu", "r", ("a",), {"slope": "p"}),
        Node("quantize", "s", ("r",), attrs={"kind": to.kind, "bits": to.bits, "reciprocal": 1.0}),
        Node("conv2d", "d", ("s",), {"weight": "v"}, {**geometry, "padding": (0, 0, 0, 0)}),
        Node("output", "y", ("d",)),
    )
    graph = Graph(nodes, tensors)
    batch = (rng.normal(size=(3, 9, 33, channels)) * 2).astype(np.float32)
    output, values = run(graph, batch, trace=True)
    assert set(np.unique(values["s"])) == set(range(to.low, to.high + 1))
    for isa in AVAILABLE:
        for threads in range(1, min(CORES, 2) + 1):
            engine = load(graph, threads=threads, isa=isa)
            engine._native._debug_always_share()
            kernels = [step["kernel"] for step in engine.plan]
            assert ("table_conv+levels" in kernels) == (isa == "avx512"), kernels
            assert not difference(engine, batch, output, values)


# --- code offsets ---


def one_product(
    rng: np.random.Generator, x: Codes, w: Codes, side: int, channels: int, filters: int, roles: str, **attrs: object
) -> Graph:
    """float32 -> codes -> convolution with offsets -> sign."""
    attrs = {"stride": (1, 1), "dilation": (1, 1), "padding": (0,) * 4, "groups": 1, "kernel": (3, 3), **attrs}
    kernel = attrs.pop("kernel")
    shape = (filters, *kernel, channels // attrs["groups"])
    offsets = {"input_offset": rng.normal(size=1), "weight_offset": rng.normal(size=filters)}
    params = {"weight": "w", **{role: role for role in offsets if role.split("_")[0] in roles}}
    tensors = {role: Tensor(offsets[role]) for role in params if role != "weight"}
    tensors["w"] = Tensor(rng.choice(w.values, shape), w)
    code = {"kind": x.kind, "bits": x.bits} | ({} if x.kind == "bipolar" else {"reciprocal": 1.0})
    nodes = (
        Node("input", "x", attrs={"shape": (side, side, channels), "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs=code),
        Node("conv2d", "c", ("q",), params, attrs),
        Node("quantize", "s", ("c",), attrs={"kind": "bipolar", "bits": 1}),
        Node("output", "y", ("s",)),
    )
    return Graph(nodes, tensors)


SIGN, EIGHT = Codes("bipolar", 1), Codes("signed", 8)


@pytest.mark.parametrize("roles", ["input", "weight", "input and weight"])
@pytest.mark.parametrize(
    "codes", [(SIGN, SIGN), (EIGHT, SIGN), (Codes("unsigned", 3), Codes("table", 2, (-5, 0, 1, 9)))]
)
@pytest.mark.parametrize(
    "attrs",
    [
        {"padding": (1, 1, 1, 1)},
        {"kernel": (1, 1)},
        {
            "kernel": (2, 2),
            "dilation": (4, 4),
            "padding": (4, 4, 4, 4),
        },  # at the corners only one tap, elsewhere two or four
        {"kernel": (2, 2), "dilation": (8, 8), "padding": (8, 0, 8, 3), "stride": (3, 2)},  # rows with no tap inside
        {"groups": 2, "padding": (2, 0, 1, 1)},
        {"groups": 64, "padding": (1, 1, 1, 1)},
    ],
)
def test_offsets(attrs: dict[str, object], codes: tuple[Codes, Codes], roles: str) -> None:
    rng = np.random.default_rng(SEED)
    graph = one_product(rng, *codes, side=7, channels=64, filters=64, roles=roles, **attrs)
    x = (rng.normal(size=(2, 7, 7, 64)) * 40).astype(np.float32)
    output, values = run(graph, x, trace=True)
    # without the sign, so that the product itself is compared
    bare = Graph((*graph.nodes[:3], Node("output", "y", ("c",))), graph.tensors)
    for isa in AVAILABLE:
        for threads in (1, min(2, CORES)):
            engine = load(graph, threads=threads, isa=isa)
            engine._native._debug_always_share()
            assert not difference(engine, x, output, values)
            assert same(load(bare, threads=threads, isa=isa)(x), values["c"])


def test_where_an_input_offset_is_a_constant_thresholds_stay() -> None:
    rng = np.random.default_rng(SEED)
    plans = {}
    for roles, padding in (("input", 0), ("input", 1), ("input and weight", 0)):
        graph = one_product(rng, SIGN, SIGN, 6, 32, 32, roles, padding=(padding,) * 4)
        *nodes, _ = graph.nodes
        after = Node("conv2d", "d", ("s",), {"weight": "v"}, {**nodes[2].attrs, "padding": (0,) * 4})
        tensors = {**graph.tensors, "v": signs(rng, 8, 3, 3, 32)}
        graph = Graph((*nodes, after, Node("output", "y", ("d",))), tensors)
        x = rng.normal(size=(2, 6, 6, 32)).astype(np.float32)
        output, values = run(graph, x, trace=True)
        engines = [load(graph, isa=isa) for isa in AVAILABLE]
        assert not any(difference(engine, x, output, values) for engine in engines)
        plans[roles, padding] = [s["kernel"] for s in engines[0].plan][2:-1]
    assert plans == {
        ("input", 0): ["bit_conv+threshold"],
        ("input", 1): ["bit_conv"],
        ("input and weight", 0): ["code_sums", "bit_conv"],
    }


def test_large_sums_are_rounded_once() -> None:
    """Accumulators and sums of the input beyond 2^24: their conversion to float32 rounds, and everywhere alike."""
    rng = np.random.default_rng(SEED)
    size = 60_000
    tensors = {
        "w": Tensor(rng.integers(0, 100, (3, 2 * size)), Codes("unsigned", 8)),
        "i": Tensor(np.array([0.37])),
        "o": Tensor(rng.normal(size=3)),
    }
    nodes = (
        Node("input", "x", attrs={"shape": (2, 1, size), "dtype": "uint8", "zero_point": (0,) * size}),
        Node("flatten", "f", ("x",)),
        Node("linear", "l", ("f",), {"weight": "w", "input_offset": "i", "weight_offset": "o"}),
        Node("output", "y", ("l",)),
    )
    x = rng.integers(100, 256, (2, 2, 1, size)).astype(np.uint8)
    assert x.reshape(2, -1).sum(axis=1, dtype=np.int64).min() > 2**24
    graph = Graph(nodes, tensors)
    expected = graph.run(x)
    for isa in AVAILABLE:
        assert same(load(graph, isa=isa)(x), expected)


@pytest.mark.parametrize("zero_point", [0, 255])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_accumulators_at_the_ends_of_int32(op: str, zero_point: int) -> None:
    """2147483520 and -2130705408: sums may pass the ends on their way, thresholds lie beside them."""
    rng = np.random.default_rng(SEED)
    size = 21_931  # three times as many largest products stay 127 below 2^31
    rows = np.stack([np.full((3, size), -128), np.full((3, size), 127), rng.integers(-128, 128, (3, size))])
    rows = np.concatenate([rows, np.resize([-128, 127], (1, 3, size))])
    weight = rows.reshape(4, -1) if op == "linear" else rows.reshape(4, 3, 1, size)
    code = {"kind": "bipolar", "bits": 1}
    attrs = {"stride": (1, 1), "dilation": (1, 1), "padding": (1, 0, 2, 0), "groups": 1}
    x = Node("input", "x", attrs={"shape": (3, 1, size), "dtype": "uint8", "zero_point": (zero_point,) * size})
    begin = (x, Node("flatten", "f", ("x",))) if op == "linear" else (x,)
    product = Node(op, "p", (begin[-1].name,), {"weight": "w"}, {} if op == "linear" else attrs)
    v = Node(op, "v", ("s",), {"weight": "one"}, {} if op == "linear" else {**attrs, "padding": (0,) * 4})
    end = (
        Node("add", "a", ("m",), {"term": "t"}),
        Node("quantize", "s", ("a",), attrs=code),
        v,
        Node("output", "y", ("v",)),
    )
    tensors = {"w": Tensor(weight, EIGHT), "f": Tensor(np.ones(1))}
    tensors["one"] = signs(rng, *((4, 4) if op == "linear" else (4, 1, 1, 4)))
    inputs = rng.integers(0, 256, (4, 3, 1, size)).astype(np.uint8)
    inputs[0], inputs[1] = 0, 255
    bare = Graph((*begin, product, Node("output", "y", ("p",))), {"w": tensors["w"]})
    expected = bare.run(inputs)
    assert max(-int(expected.min()), int(expected.max())) == 3 * size * 255 * 128
    steps = (*begin, product, Node("mul", "m", ("p",), {"factor": "f"}), *end)
    for limit in (2147483520, -2147483520, -2130705408):
        graph = Graph(steps, {**tensors, "t": Tensor(np.full(1, -limit))})
        output, values = run(graph, inputs, trace=True)
        for isa in AVAILABLE:
            assert same(load(bare, isa=isa)(inputs), expected)
            engine = load(graph, isa=isa)
            assert any("threshold" in step["kernel"] for step in engine.plan)
            assert not difference(engine, inputs, output, values)


# --- batches, threads ---


def test_batches_grow_and_shrink() -> None:
    rng = np.random.default_rng(SEED)
    engine = load(binary_net(rng), threads=min(2, CORES))
    engine._native._debug_always_share()
    x = rng.normal(size=(7, 9, 9, 48)).astype(np.float32)
    whole = engine(x)
    for size in (1, 7, 3, 1, 5):
        assert same(engine(x[:size]), whole[:size])
    assert same(engine(x[::2]), whole[::2])  # not contiguous
    assert same(engine(np.asfortranarray(x)), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_engine_in_many_python_threads(threads: int) -> None:
    if threads > CORES:
        pytest.skip("one core only")
    rng = np.random.default_rng(SEED)
    engine = load(binary_net(rng), threads=threads)
    engine._native._debug_always_share()
    batches = [rng.normal(size=(n, 9, 9, 48)).astype(np.float32) for n in (1, 2, 3, 4)]
    expected = [engine(x) for x in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not same(engine(batches[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_several_engines_at_once() -> None:
    rng = np.random.default_rng(SEED)
    cases = []
    for i, isa in enumerate(AVAILABLE * 2):
        graph = binary_net(rng, channels=32 + 16 * i)
        x = rng.normal(size=(3, 9, 9, 32 + 16 * i)).astype(np.float32)
        cases.append((load(graph, threads=min(1 + i % 2, CORES), isa=isa), x, graph.run(x)))
    wrong: list[str] = []

    def work(engine: Engine, x: np.ndarray, expected: np.ndarray) -> None:
        engine._native._debug_always_share()
        for _ in range(30):
            if not same(engine(x), expected):
                wrong.append(engine.isa)

    workers = [threading.Thread(target=work, args=case) for case in cases]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def steps_meanwhile(work: Callable[[], object]) -> int:
    """How often this thread gets to run while another does `work`."""
    worker = threading.Thread(target=work)
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
        time.sleep(0.001)
    return steps


def test_the_gil_is_released() -> None:
    rng = np.random.default_rng(SEED)
    engine = load(binary_net(rng), isa="scalar")
    x = rng.normal(size=(20, 9, 9, 48)).astype(np.float32)
    start = time.perf_counter()
    engine(x)
    x = np.repeat(x, int(0.5 / (time.perf_counter() - start)) + 1, axis=0)  # about half a second of one call
    held = ctypes.PyDLL(None).usleep  # the same with the GIL held: what this test would see if it were not released
    assert steps_meanwhile(lambda: held(300_000)) <= 2
    assert (
        steps_meanwhile(
            lambda: engine._native.run(x.reshape(-1).view(np.uint8), len(x), np.empty(x.nbytes, np.uint8), False)
        )
        >= 10
    )


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
import numpy as np
from lowbit.runtime import load
print("ready", flush=True)
input()
for _ in range(20):
    net = load(sys.argv[2])
    x = np.zeros((2, *net.input_shape), net.input_dtype)
    print(net(x).tobytes().hex())
"""


def test_two_processes_load_one_file() -> None:
    here = Path(__file__).parent
    golden = here / "golden" / "format1.lowbit"
    net = load(golden)
    expected = net(np.zeros((2, *net.input_shape), net.input_dtype)).tobytes().hex()
    command = [sys.executable, "-c", LOAD, str(here), str(golden)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        assert process.communicate(timeout=60)[0].split() == [expected] * 20
        assert process.returncode == 0


FORK = """
import os, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import conftest
from test_engine import binary_net, load
engine = load(binary_net(np.random.default_rng(0)), threads=2)
engine._native._debug_always_share()
x = np.ones((2, 9, 9, 48), np.float32)
expected = engine(x)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(engine(x), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(CORES < 2 or not hasattr(os, "fork"), reason="needs fork and two cores")
def test_a_forked_process_runs_on() -> None:
    """Threads do not survive a fork (data loaders do it): the child computes alone and does not hang."""
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", FORK, here], check=True, timeout=60)


# --- the interface ---


def test_properties_and_plan() -> None:
    engine = load(binary_net(np.random.default_rng(SEED)))
    assert engine.input_shape == (9, 9, 48)
    assert engine.input_dtype == np.float32
    assert engine.output_shape == (9, 9, 48)
    assert engine.threads == 1
    assert engine.isa == AVAILABLE[0]
    steps = engine.plan
    covered = [name for step in steps for name in step["nodes"]]
    assert covered == ["x", "q0", "c1", "m1", "a1", "q1", "c2", "m2"]
    assert [s["kernel"] for s in steps] == ["input", "elementwise", "bit_conv+threshold", "bit_conv"]
    assert steps[2]["macs"] == 9 * 9 * 48 * 48 * 9
    times = engine.profile(np.zeros((1, 9, 9, 48), np.float32), repeats=2)
    assert len(times) == len(steps)
    assert all(t >= 0 for t in times)
    assert engine.workspace_bytes(2) > engine.workspace_bytes(1)


def test_isa_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = binary_net(np.random.default_rng(SEED))
    monkeypatch.setenv("LOWBIT_ISA", "scalar")
    assert load(graph).isa == "scalar"
    monkeypatch.setenv("LOWBIT_ISA", "abacus")
    with pytest.raises(ValueError, match=r"unknown isa 'abacus'.*scalar"):
        load(graph)


@pytest.fixture
def without() -> Iterator[Callable[[str], None]]:
    """Takes the features that a row needs from this CPU."""
    yield _engine._debug_without
    _engine._debug_without("")


@pytest.mark.parametrize("isa", AVAILABLE[:-1])
def test_refuses_a_row_that_the_cpu_lacks(
    isa: str, without: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = binary_net(np.random.default_rng(SEED))
    without(isa)
    assert not isas()[isa]
    assert load(graph).isa == next(other for other, available in isas().items() if available) != isa
    with pytest.raises(ValueError, match=f"isa '{isa}' can't run on this CPU"):
        load(graph, isa=isa)
    monkeypatch.setenv("LOWBIT_ISA", isa)
    with pytest.raises(ValueError, match=f"isa '{isa}' can't run on this CPU"):
        load(graph)
    without("")
    assert load(graph).isa == isa


def test_what_a_row_leaves_out_comes_from_the_next_that_the_cpu_has(without: Callable[[str], None]) -> None:
    """The same numbers on a CPU without the rows in between."""
    rng = np.random.default_rng(SEED)
    graph = one_product(rng, EIGHT, EIGHT, side=7, channels=33, filters=17, roles="input", padding=(1, 1, 1, 1))
    x = (rng.normal(size=(2, 7, 7, 33)) * 40).astype(np.float32)
    output, values = run(graph, x, trace=True)
    for gone in AVAILABLE[:-1]:
        without(gone)
        for isa in (isa for isa, available in isas().items() if available):
            assert not difference(load(graph, isa=isa), x, output, values)


def test_refuses_accumulators_beyond_int32_by_layer() -> None:
    size = 65_536
    nodes = (
        Node("input", "x", attrs={"shape": (2, 1, size), "dtype": "uint8", "zero_point": (0,) * size}),
        Node("flatten", "f", ("x",)),
        Node("linear", "head", ("f",), {"weight": "w"}),
        Node("output", "y", ("head",)),
    )
    graph = Graph(nodes, {"w": Tensor(np.full((1, 2 * size), 127), EIGHT)})
    with pytest.raises(ValueError, match=r"^head .linear.: the accumulator could reach 4244766720, beyond 32 bits"):
        load(graph)


def test_native_refuses_buffers_that_do_not_fit() -> None:
    native = load(binary_net(np.random.default_rng(SEED)))._native
    one = np.zeros(9 * 9 * 48 * 4, np.uint8)
    native.run(one, 1, one.copy(), False)
    for x, batch, out in (
        (one, 0, one),
        (one[:0], 0, one[:0]),
        (one, -1, one),
        (one, 2, one),
        (one, 1, one[:-1]),
        (one[1:], 1, one),
    ):
        for call in (lambda *a: native.run(*a, False), native.profile):
            with pytest.raises(ValueError, match="the buffers do not fit the batch"):
                call(x, batch, out)


@pytest.mark.parametrize("threads", [0, -1, 10**6, 10**30, CORES + 1])
def test_refuses_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="threads must be 1"):
        load(binary_net(np.random.default_rng(SEED)), threads=threads)


def test_refuses_threads_that_are_no_number() -> None:
    with pytest.raises(ValueError, match="threads must be an integer"):
        load(binary_net(np.random.default_rng(SEED)), threads=True)


GOOD = np.zeros((1, 9, 9, 48), np.float32)
BAD_INPUTS = {
    "dtype": (GOOD.astype(np.float64), r"expected float32 of shape \(N, 9, 9, 48\).*got float64"),
    "uint8": (GOOD.astype(np.uint8), "expected float32.*got uint8"),
    "channels first": (
        GOOD.transpose(0, 3, 1, 2),
        r"got float32 of shape \(1, 48, 9, 9\), which is channels first \(NCHW\)",
    ),
    "one image channels first": (GOOD[0].transpose(2, 0, 1), r"channels first.*transpose\(1, 2, 0\)"),
    "size": (GOOD[:, :8], r"got float32 of shape \(1, 8, 9, 48\)"),
    "axes": (GOOD[None], "got float32 of shape"),
    "empty batch": (GOOD[:0], "empty batch"),
    "a list": (GOOD.tolist(), "got a list, not a NumPy array"),
    "not a number": (np.full_like(GOOD, np.nan), "infinities or NaN"),
    "infinity": (np.full_like(GOOD, -np.inf), "infinities or NaN"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_refuses_inputs(what: str) -> None:
    x, message = BAD_INPUTS[what]
    engine = load(binary_net(np.random.default_rng(SEED)))
    with pytest.raises(ValueError, match=message):
        engine(x)


# --- the native border: everything is checked again without graph.py ---


def sign_weights(*shape: int) -> _engine.Weights:
    return _engine.Weights.codes(np.ones(shape, np.int16), "bipolar", 1, ())


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("build", [superres.low_resolution, superres.vdsr], ids=lambda f: f.__name__)
def test_super_resolution_networks(build: Callable[..., Graph], isa: str) -> None:
    """Small and odd maps, and rows longer than the pieces of 960 pixels in which values of one channel are worked on."""
    wide = ((2, 250), (1, 500), (3, 321)) if build is superres.vdsr else ((2, 493), (1, 1001), (3, 330))
    for seed, (size, scale) in enumerate(
        [*zip(wide, (4, 2, 3), strict=True), ((9, 7), 2), ((1, 1), 3), ((6, 1), 4), ((17, 16), 2)]
    ):
        graph = build(
            size, scale=scale, channels=(8, 17)[seed % 2], layers=1, half=seed % 3 != 0, residual=1.0, seed=seed
        )
        x = graphs.inputs(graph, seed, batch=2)
        output, values = run(graph, x, trace=True)
        for threads in (1, 2)[:CORES]:
            engine = load(graph, isa=isa, threads=threads)
            if threads > 1:
                engine._native._debug_always_share()
            assert difference(engine, x, output, values) == "", f"{size} x{scale}, {threads} threads"
        kernels = {step["kernel"] for step in engine.plan}
        assert kernels >= {"resize_bicubic", "line_conv"} if size[1] > 8 and scale == 2 else "resize_bicubic" in kernels
        if build is superres.low_resolution:  # the sum is part of a step, and no pixel takes a block of its own
            last = engine.plan[-1]
            assert last["bytes"] <= size[0] * scale * (size[1] * scale + 15) * 4


@pytest.mark.parametrize("isa", AVAILABLE)
def test_codes_of_one_channel(isa: str) -> None:
    """Stored without a gap where convolutions alone read them; rows longer and shorter than a piece of 960 pixels."""
    kinds = (("signed", 8), ("unsigned", 8), ("signed", 4), ("unsigned", 2), ("signed", 2), ("bipolar", 1))
    kernels = ((3, 1, 1), (1, 2, 1), (5, 1, 2), (7, 2, 1))  # size, stride, dilation
    for seed, (kind, bits) in enumerate(kinds * 4):
        rng = np.random.default_rng(seed)
        kernel, stride, dilation = kernels[seed % 4]
        shape = (((13, 17), (3, 1001), (29, 2), (8, 960))[seed // 6 % 4]) + (1,)
        codes = {"kind": kind, "bits": bits} | ({} if (kind, bits) == ("bipolar", 1) else {"reciprocal": 7.5})
        nodes = [Node("input", "x", attrs={"shape": shape, "dtype": "float32"})]
        if seed % 3:
            nodes.append(Node("add", "less", ("x",), {"term": "less"}))
        nodes.append(Node("quantize", "q", (nodes[-1].name,), attrs=codes))
        reach = dilation * (kernel - 1) // 2
        conv = {"stride": (stride,) * 2, "dilation": (dilation,) * 2, "padding": (reach,) * 4, "groups": 1}
        other = {"stride": (stride,) * 2, "dilation": (1, 1), "padding": (0,) * 4, "groups": 1}
        nodes.append(Node("conv2d", "c", ("q",), {"weight": "w"}, conv))
        nodes.append(Node("conv2d", "d", ("q",), {"weight": "v"}, other))
        nodes.append(Node("mul", "m", ("c",), {"factor": "f"}))
        nodes.append(Node("mul", "n", ("d",), {"factor": "f"}))
        nodes.append(Node("add", "a", ("m", "n")))
        if seed % 5 == 0:  # somebody else reads the codes too
            nodes += [Node("mul", "o", ("q",), {"factor": "f"}), Node("global_avg_pool", "p", ("o",))]
            nodes += [Node("global_avg_pool", "b", ("a",)), Node("concat", "e", ("b", "p"))]
        nodes.append(Node("output", "y", (nodes[-1].name,)))
        weights = Codes(("signed", "bipolar")[seed % 2], (8, 1)[seed % 2])
        tensors = {
            "less": Tensor(np.float32([-0.5])),
            "f": Tensor(np.float32([0.125])),
            "w": Tensor(rng.choice(weights.values, (20, kernel, kernel, 1)), weights),
            "v": Tensor(rng.choice(weights.values, (20, 1, 1, 1)), weights),
        }
        graph = Graph(tuple(nodes), {k: t for k, t in tensors.items() if k != "less" or seed % 3})
        x = rng.normal(size=(2, *shape)).astype(np.float32) * 8
        output, values = run(graph, x, trace=True)
        for threads in (1, 2)[:CORES]:
            engine = load(graph, isa=isa, threads=threads)
            if threads > 1:
                engine._native._debug_always_share()
            assert difference(engine, x, output, values) == "", f"seed {seed}, {threads} threads"
        flat = seed % 5 != 0 and kind != "bipolar" and shape[1] > 16
        codes_step = next(step for step in engine.plan if "q" in step["values"])
        if flat and isa == "avx512":  # a byte for each pixel, in blocks of 16, and not 16 bytes
            assert codes_step["bytes"] < shape[0] * shape[1] * 16, seed


@dataclass
class Begun:
    """A builder with an image x (float32) and its signs q, 5 x 5 x 8."""

    b: _engine.Builder = field(default_factory=_engine.Builder)

    def __post_init__(self) -> None:
        self.x = self.b.input_float32("x", (5, 5, 8))
        self.q = self.b.quantize("q", self.x, "bipolar", 1, 1.0)

    def conv(
        self,
        weights: _engine.Weights,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        padding: tuple[int, ...] = (0, 0, 0, 0),
        groups: int = 1,
    ) -> int:
        return self.b.conv2d("n", self.q, weights, stride, dilation, padding, groups)


def numbers(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, np.float32)


def offset(n: Begun, x: int | None = None, weights: _engine.Weights | None = None, **offsets: np.ndarray) -> int:
    weights = weights or sign_weights(4, 1, 1, 8)
    return n.b.conv2d("n", n.q if x is None else x, weights, (1, 1), (1, 1), (0, 0, 0, 0), 1, **offsets)


NATIVE_REFUSALS = {
    "offset beside floats": ("offsets are for codes", lambda n: offset(n, x=n.x, input_offset=numbers(1, 1))),
    "offset of float weights": (
        "offsets are for codes",
        lambda n: offset(n, weights=_engine.Weights.floats(numbers(1, 4, 1, 1, 8)), weight_offset=numbers(1, 1)),
    ),
    "input offsets": ("input_offset is one number, got 2", lambda n: offset(n, input_offset=numbers(1, 2))),
    "weight offsets": ("weight_offset has 3 numbers for 4", lambda n: offset(n, weight_offset=numbers(1, 3))),
    "offset NaN": ("infinite or NaN", lambda n: offset(n, input_offset=numbers(np.nan, 1))),
    "offset inf": ("infinite or NaN", lambda n: offset(n, weight_offset=numbers(np.inf, 4))),
    "kernel too large": ("kernels are 1..11", lambda n: n.conv(sign_weights(4, 12, 1, 8))),
    "extent": ("larger than the padded", lambda n: n.conv(sign_weights(4, 7, 7, 8))),
    "padding": ("padding is not less", lambda n: n.conv(sign_weights(4, 1, 1, 8), padding=(1, 1, 1, 1))),
    "negative padding": ("padding", lambda n: n.conv(sign_weights(4, 1, 1, 8), padding=(-1, 0, 0, 0))),
    "stride": ("strides are 1..8", lambda n: n.conv(sign_weights(4, 1, 1, 8), stride=(0, 1))),
    "dilation": ("dilations are 1..8", lambda n: n.conv(sign_weights(4, 1, 1, 8), dilation=(1, 9))),
    "groups": ("groups must divide", lambda n: n.conv(sign_weights(4, 1, 1, 8), groups=3)),
    "no groups": ("groups must divide", lambda n: n.conv(sign_weights(4, 1, 1, 8), groups=0)),
    "channels": ("does not fit the input", lambda n: n.conv(sign_weights(4, 1, 1, 9))),
    "weight axes": ("must be .O, kH, kW, I.", lambda n: n.conv(sign_weights(4, 8))),
    "weight codes": (
        "outside its kind",
        lambda n: n.conv(_engine.Weights.codes(np.zeros((4, 1, 1, 8), np.int16), "bipolar", 1, ())),
    ),
    "weight NaN": ("infinite or NaN", lambda n: n.conv(_engine.Weights.floats(numbers(np.nan, 4, 1, 1, 8)))),
    "weight bits": (
        "1 to 8 bits",
        lambda n: n.conv(_engine.Weights.codes(np.ones((4, 1, 1, 8), np.int16), "bipolar", 9, ())),
    ),
    "weight table": (
        "ascending",
        lambda n: n.conv(_engine.Weights.codes(np.ones((4, 1, 1, 8), np.int16), "table", 1, (1, 1))),
    ),
    "linear on image": ("flatten images first", lambda n: n.b.linear("n", n.q, sign_weights(4, 8))),
    "constant size": ("numbers for 8 channels", lambda n: n.b.mul("n", n.x, numbers(1, 7))),
    "constant inf": ("infinite or NaN", lambda n: n.b.mul("n", n.x, numbers(np.inf, 8))),
    "add to codes": ("takes float32 or float16", lambda n: n.b.add("n", n.q, numbers(1, 8))),
    "add shapes": ("of one shape", lambda n: n.b.add_values("n", n.x, n.b.global_avg_pool("g", n.x))),
    "quantize codes": ("takes float32 or float16", lambda n: n.b.quantize("n", n.q, "bipolar", 1, 1.0)),
    "bipolar bits": ("have 1 bit", lambda n: n.b.quantize("n", n.x, "bipolar", 2, 1.0)),
    "bits": ("1 to 8 bits", lambda n: n.b.quantize("n", n.x, "unsigned", 9, 1.0)),
    "table": ("table", lambda n: n.b.quantize("n", n.x, "table", 2, 1.0)),
    "kind": ("unknown kind", lambda n: n.b.quantize("n", n.x, "ternary", 2, 1.0)),
    "reciprocal": ("reciprocal must be positive", lambda n: n.b.quantize("n", n.x, "unsigned", 2, 0.0)),
    "clip": ("low is above high", lambda n: n.b.clip("n", n.x, 1.0, 0.0)),
    "cast": ("casts to", lambda n: n.b.cast("n", n.x, "float64")),
    "pool": ("larger than the padded", lambda n: n.b.max_pool("n", n.x, (9, 9), (1, 1), (0, 0, 0, 0))),
    "shuffle": ("divide the channels", lambda n: n.b.pixel_shuffle("n", n.x, 3)),
    "resize": ("enlarges by 2..4", lambda n: n.b.resize_bicubic("n", n.x, 5)),
    "resize codes": ("takes float32, got codes", lambda n: n.b.resize_bicubic("n", n.q, 2)),
    "resize half": ("takes float32, got float16", lambda n: n.b.resize_bicubic("n", n.b.cast("h", n.x, "float16"), 2)),
    "concat one": ("two values", lambda n: n.b.concat("n", [n.x])),
    "concat types": ("one type and size", lambda n: n.b.concat("n", [n.x, n.q])),
    "no such value": ("no earlier value", lambda n: n.b.relu("n", 99)),
    "name twice": ("used twice", lambda n: n.b.relu("x", n.x)),
    "no name": ("name is empty", lambda n: n.b.relu("", n.x)),
    "second input": ("one input", lambda n: n.b.input_float32("n", (3,))),
    "unused": ("loose: its value is used by no node", lambda n: n.b.output("n", n.q + 0 * n.b.relu("loose", n.x))),
    "unfinished": ("no output yet", lambda n: _engine.Engine(n.b, 1, "")),
}


@pytest.mark.parametrize("what", NATIVE_REFUSALS)
def test_native_refusals(what: str) -> None:
    match, call = NATIVE_REFUSALS[what]
    with pytest.raises(ValueError, match=match):
        call(Begun())


@pytest.mark.parametrize(
    ("shape", "zero_point", "match"),
    [((0, 1, 1), (0,), "side"), ((2, 2), (0, 0), "shape"), ((3,), (0,), "zero point"), ((1,), (256,), "0..255")],
)
def test_native_refuses_inputs(shape: tuple[int, ...], zero_point: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _engine.Builder().input_uint8("x", shape, zero_point)


def test_native_sums_end_at_32_bits() -> None:
    b = _engine.Builder()
    x = b.input_uint8("x", (65536,), (0,) * 65536)
    for n in range(8):
        x = b.concat(f"twice{n}", [x, x])
    zeros = _engine.Weights.codes(np.zeros((1, 65536 * 256), np.int16), "unsigned", 1, ())
    b.linear("fits", x, zeros, numbers(1, 1))
    with pytest.raises(ValueError, match="beyond: the sum of the input could reach 4278190080, beyond 32 bits"):
        b.linear("beyond", x, zeros, None, numbers(1, 1))


def test_native_accumulators_end_at_32_bits() -> None:
    b = _engine.Builder()
    x = b.input_uint8("x", (65536,), (0,) * 65536)
    b.linear("fits", x, _engine.Weights.codes(np.full((1, 65536), -128, np.int16), "signed", 8, ()))  # 2139095040
    twice = b.concat("twice", [x, x])
    with pytest.raises(ValueError, match="beyond: the accumulator could reach 4278190080, beyond 32 bits"):
        b.linear("beyond", twice, _engine.Weights.codes(np.full((1, 2 * 65536), -128, np.int16), "signed", 8, ()))
