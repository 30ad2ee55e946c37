"""The bench: the float twin and every peer compute what the Graph computes, and the arithmetic on samples. No timing is judged here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import lowbit
from graphs import with_offsets
from lowbit import bench
from lowbit.bench import lce
from lowbit.bench.__main__ import main
from lowbit.bench.file import twin_input
from lowbit.bench.layers import goals
from lowbit.bench.show import goals_lines
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.runtime import isas, load
from lowbit.train import benchmark
from networks import classifier


def run_twin(graph: Graph, x: np.ndarray) -> np.ndarray:
    """The twin's answer to an NHWC batch, NHWC again."""
    session = onnxruntime.InferenceSession(bench.float_twin(graph, len(x)).SerializeToString())
    (y,) = session.run(None, {"input": x.transpose(0, 3, 1, 2) if x.ndim == 4 else x})
    return y.transpose(0, 2, 3, 1) if y.ndim == 4 else y


def float_graph() -> Graph:
    """Every float op once, with strides, dilation, groups and one-sided padding."""
    rng = np.random.default_rng(0)
    nodes = [Node("input", "input", attrs={"shape": (12, 10, 4), "dtype": "float32"})]
    tensors: dict[str, Tensor] = {}

    def add(op: str, name: str, *inputs: str, constant: Any = None, **attrs: Any) -> None:
        params = {}
        if constant is not None:
            role = {"conv2d": "weight", "linear": "weight", "mul": "factor", "add": "term", "prelu": "slope"}[op]
            params = {role: name}
            tensors[name] = Tensor(rng.standard_normal(constant).astype(np.float32))
        nodes.append(Node(op, name, inputs, params, attrs))

    def conv(stride: int = 1, dilation: int = 1, groups: int = 1, padding: Any = (1, 1, 1, 1)) -> dict[str, Any]:
        return {"stride": (stride, stride), "dilation": (dilation,) * 2, "padding": padding, "groups": groups}

    pool = {"kernel": (2, 2), "stride": (2, 2)}
    add("conv2d", "conv1", "input", constant=(8, 3, 3, 2), **conv(groups=2, padding=(1, 1, 0, 1)))
    add("mul", "mul1", "conv1", constant=(8,))
    add("add", "add1", "mul1", constant=(1,))
    add("prelu", "prelu", "add1", constant=(8,))
    add("conv2d", "conv2", "prelu", constant=(8, 3, 3, 8), **conv(dilation=2, padding=(2, 2, 2, 2)))
    add("relu", "relu", "conv2")
    add("add", "sum", "relu", "conv2")  # conv2 has two users: nothing may be folded into it
    add("mul", "mul2", "conv2", constant=(8,))
    add("cast", "half", "mul2", dtype="float32")
    add("concat", "concat", "sum", "half", "prelu")
    add("max_pool", "max", "concat", padding=(0, 1, 1, 0), **pool)
    add("avg_pool", "avg", "max", padding=(1, 1, 1, 1), kernel=(3, 3), stride=(1, 1), count_include_pad=False)
    add("avg_pool", "avg2", "avg", padding=(0, 0, 1, 1), kernel=(2, 2), stride=(2, 2), count_include_pad=True)
    add("pixel_shuffle", "shuffle", "avg2", factor=2)
    add("resize_bicubic", "larger", "shuffle", factor=3)
    add("clip", "clip", "larger", low=-1.0, high=2.0)
    add("flatten", "flatten", "clip")
    side = Graph((*nodes, Node("output", "output", ("flatten",))), tensors).validate()["flatten"].channels
    add("linear", "linear", "flatten", constant=(5, side))
    add("add", "bias", "linear", constant=(5,))
    add("mul", "mul3", "bias", constant=(5,))
    add("output", "output", "mul3")
    return Graph(tuple(nodes), tensors)


def test_the_twin_of_a_float_graph_is_that_graph() -> None:
    graph = float_graph()
    x = np.random.default_rng(1).standard_normal((3, 12, 10, 4), np.float32)
    np.testing.assert_allclose(run_twin(graph, x), graph.run(x), rtol=2e-4, atol=2e-4)


def test_what_stands_behind_a_layer_is_folded_into_it() -> None:
    nodes = [node.op_type for node in bench.float_twin(float_graph()).graph.node]
    assert nodes.count("Mul") == 1  # mul2 alone: conv2's value is used thrice
    assert nodes.count("Add") == 1  # the sum of two values
    assert nodes.count("Conv") == 3  # one of them enlarges
    assert nodes.count("Gemm") == 1


def test_the_twin_of_a_binary_network() -> None:
    model = bench.float_twin(classifier(), batch=2)
    onnx.checker.check_model(model, full_check=True)
    nodes = [node.op_type for node in model.graph.node]
    # the stem's zero point and scales are gone, sign is ReLU, casts vanish
    assert nodes == ["Conv", *["Relu", "Conv", "Add"] * 2, "GlobalAveragePool", "Flatten", "Gemm", "Identity"]
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == [2, 3, 12, 12]


def test_8_bit_codes_keep_their_scale_in_the_twin() -> None:
    """The step of 8-bit codes lands in the next layer's weights, so the twin answers about what the Graph does."""
    rng = np.random.default_rng(3)
    codes = Codes("signed", 8)
    tensors = {
        "w": Tensor(rng.integers(-127, 128, (6, 1, 1, 4)).astype(np.int16), codes),
        "v": Tensor(rng.integers(-127, 128, (6, 1, 1, 6)).astype(np.int16), codes),
        "f": Tensor(np.full(1, 1 / (127 * 20), np.float32)),
        "g": Tensor(np.full(1, 1 / (127 * 60), np.float32)),
    }
    conv = {"stride": (1, 1), "dilation": (1, 1), "padding": (0, 0, 0, 0), "groups": 1}
    nodes = (
        Node("input", "input", attrs={"shape": (3, 3, 4), "dtype": "float32"}),
        Node("quantize", "q", ("input",), attrs={"kind": "signed", "bits": 8, "reciprocal": 20.0}),
        Node("conv2d", "c", ("q",), {"weight": "w"}, conv),
        Node("mul", "m", ("c",), {"factor": "f"}),
        Node("quantize", "r", ("m",), attrs={"kind": "unsigned", "bits": 8, "reciprocal": 60.0}),
        Node("max_pool", "p", ("r",), attrs={"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0, 0, 0)}),
        Node("conv2d", "d", ("p",), {"weight": "v"}, conv),
        Node("mul", "n", ("d",), {"factor": "g"}),
        Node("output", "output", ("n",)),
    )
    graph = Graph(nodes, tensors)
    x = rng.uniform(-4, 4, (2, 3, 3, 4)).astype(np.float32)
    ours, twin = graph.run(x), run_twin(graph, x)
    assert np.abs(ours - twin).max() < 0.1 < np.abs(ours).max()


def test_channels_last_at_both_ends_is_the_same_model() -> None:
    x = np.random.default_rng(1).standard_normal((1, 12, 10, 4), np.float32)
    model = bench.channels_last(bench.float_twin(float_graph()))
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})
    np.testing.assert_allclose(y, float_graph().run(x), rtol=2e-4, atol=2e-4)
    graph = bench.peer_graph(
        bench.Layer(8, 8, 5, residual=True)
    )  # an image at its output, and an input that is used twice
    model = bench.channels_last(bench.float_twin(graph))
    x = np.random.default_rng(1).standard_normal((1, 5, 5, 8), np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x})
    np.testing.assert_allclose(y, graph.run(x), rtol=2e-4, atol=2e-4)


# ------------------------------------------------------------------------------------------ peers


@pytest.mark.parametrize("name", bench.PEERS)
@pytest.mark.parametrize("layer", [bench.Layer(16, 24, 8, stride=2), bench.Layer(32, 32, 7, residual=True)], ids=str)
def test_a_peer_computes_the_layer(name: str, layer: bench.Layer) -> None:
    graph, examples = bench.peer_graph(layer), bench.peer_examples(layer)
    session = bench.PEERS[name].session(graph, threads=1, examples=examples)
    x = examples[:1]
    session.run()
    expected = graph.run(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    found = session.answer(x)
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if name.endswith("int8"):
        assert 1e-6 < error < 0.03  # 8 bits, not float32 under another name
        assert any(words in session.note for words in ("u8s8", "s8s8", "NNCF"))
    else:
        assert error < 1e-5
    if name == "openvino-int8" and "s8s8" not in session.note:
        assert "1 of 1 products in int8" in session.note


@pytest.mark.parametrize("name", ["ort-fp32", "openvino-fp32", "torch"])
def test_a_float_peer_computes_every_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.train import torch_twin

    monkeypatch.setattr(torch_twin.torch, "compile", lambda module: module)  # seconds
    graph = float_graph()
    x = np.random.default_rng(1).standard_normal((3, 12, 10, 4), np.float32)
    session = bench.PEERS[name].session(
        graph, threads=1, batch=3, examples=np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    )
    found = session.answer(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(found, graph.run(x), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["ort-int8", "openvino-int8"])
def test_an_int8_peer_computes_a_network(name: str) -> None:
    graph = classifier()
    images = np.random.default_rng(1).integers(0, 256, (8, 12, 12, 3), np.uint8)
    x = twin_input(graph, images)
    expected = bench.PEERS["ort-fp32"].session(graph, threads=1, batch=4, examples=x).answer(x[:4])
    session = bench.PEERS[name].session(graph, threads=1, batch=4, examples=x)
    assert np.abs(session.answer(x[:4]) - expected).max() < 0.05 * np.abs(expected).max()
    assert "in int8" in session.note or name == "ort-int8"


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown peer 'tvm'; there are ort-fp32"):
        bench.chosen(["ort-fp32", "tvm"])
    assert [peer.name for peer in bench.chosen(["torch", "ort-fp32"])] == ["ort-fp32", "torch"]
    assert [peer.name for peer in bench.chosen(["all"])] == list(bench.PEERS)
    gone = dataclasses.replace(bench.PEERS["openvino-int8"], packages=("no-such-package",))
    there, missing = bench.installed([bench.PEERS["ort-fp32"], gone])
    assert [peer.name for peer in there] == ["ort-fp32"]
    assert missing == ["OpenVINO int8: not installed; pip install 'lowbit[bench]'"]
    monkeypatch.setitem(bench.PEERS, "openvino-int8", gone)
    assert bench.PEERS["openvino-int8"].version is None


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack as Linux has it")
def test_a_signal_behind_openvino_is_survived(tmp_path: Path) -> None:
    """In a process of its own: a handler of Python's for the end of a child, as PyTorch sets one with its loader."""
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    code = f"""
import faulthandler, signal, subprocess, sys
from lowbit import bench, packfile
faulthandler.enable()  # as pytest does: another stack for signals
ended = []
signal.signal(signal.SIGCHLD, lambda *_: ended.append(1))
bench.PEERS["openvino-fp32"].session(packfile.read({str(tmp_path / "x.lowbit")!r}), 1).run()
subprocess.run([sys.executable, "-c", ""], check=True)
assert ended
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_peer_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setitem(bench.PEERS, "torch", dataclasses.replace(bench.PEERS["torch"], _open=fails))
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    found = bench.bench_file(tmp_path / "x.lowbit", repeats=2, layers=False, peers=["ort-fp32", "torch"])
    assert list(found["whole"]["peers"]) == ["ort-fp32"]
    assert "whole network: PyTorch fp32 can't run this: no kernel for this" in found["warnings"]


# ------------------------------------------------------------------------------------------ measuring


def test_medians_and_ratios() -> None:
    found = bench.Comparison.of([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert found.ours.median == 2.0
    assert found.ratio == found.p10 == found.p90 == 10.0
    assert not found.noisy
    assert found.warnings("it") == []
    noisy = bench.Comparison.of([1.0, 1.0, 1.0], [5.0, 10.0, 20.0])
    assert noisy.noisy
    assert "it: noisy" in noisy.warnings("it")[0]


def test_all_run_in_turn() -> None:
    calls: list[str] = []
    samples = [lambda name=name: calls.append(name) or float(ord(name)) for name in "abc"]
    assert bench.in_turn(samples, 3) == [[97.0] * 3, [98.0] * 3, [99.0] * 3]
    assert "".join(calls) == "abccbaabc"
    found = bench.alternate(lambda: None, lambda: None, repeats=3)
    assert found.ours.samples == found.theirs.samples == 3


def test_the_peak_is_measured() -> None:
    for isa, there in isas().items():
        if not there:
            with pytest.raises(ValueError, match=isa):
                bench.Peak.measure(isa)
        elif isa == "scalar":
            assert bench.Peak.measure(isa) is None
        else:
            peak = bench.Peak.measure(isa, 0.002)
            assert peak is not None
            assert 1e9 < peak.integers < peak.bits < 1e14
            assert 0 < peak.share <= 1
            assert peak.of("bit_conv+threshold") == peak.bits
            assert peak.of("byte_gemm") == peak.integers
            assert peak.of("float_gemm") is None
    with pytest.raises(ValueError, match="unknown isa"):
        bench.Peak.measure("sse1")
    with pytest.raises(ValueError, match="seconds"):
        bench.Peak.measure("scalar", 0.0)


@pytest.mark.parametrize(
    ("peaks", "words"),
    [
        ([(100.0, 20.0, 1.0), (100.0, 20.0, 1.0)], None),
        ([(100.0, 20.0, 1.0), (96.0, 20.0, 1.0)], None),
        ([(100.0, 20.0, 1.0), (90.0, 20.0, 1.0)], "peak in bits went from"),
        ([(100.0, 20.0, 1.0), (100.0, 25.0, 1.0)], "peak in integers went from"),
        ([(100.0, 20.0, 0.5), (100.0, 20.0, 1.0)], "ours for 50% of the time"),
    ],
)
def test_an_unsteady_core_is_not_trusted(
    peaks: list[tuple[float, float, float]], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(peaks)
    monkeypatch.setattr(bench.Peak, "measure", staticmethod(lambda _: bench.Peak(*next(measured))))
    core = bench.Core("avx512")
    with core.watched() as watch:
        pass
    assert watch.peak == bench.Peak(max(p[0] for p in peaks), max(p[1] for p in peaks), min(p[2] for p in peaks))
    assert core.as_dict()["start"] == dict(zip(("bits", "integers", "share"), peaks[0], strict=True))
    for warnings in (watch.warnings, core.warnings()):
        assert [words in text for text in warnings] == [True] if words else warnings == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_pinning_is_taken_back() -> None:
    before = os.sched_getaffinity(0)
    with bench.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ValueError, match="threads = 10000"), bench.pinned(10000):
        pass


def test_a_layer_is_one_step() -> None:
    engine = load(bench.conv_graph(bench.Layer(32, 48, 6, stride=2)))
    (step,) = [s for s in engine.plan if "conv1" in s["nodes"]]
    assert list(step["nodes"]) == ["conv1", "mul1", "add1", "sign1"]
    assert list(step["values"]) == ["sign1"]
    engine = load(bench.conv_graph(bench.Layer(32, 32, 6, residual=True)))
    (step,) = [s for s in engine.plan if "conv1" in s["nodes"]]
    assert set(step["nodes"]) == {"conv1", "mul1", "add1", "sum1", "stream1", "sign1"}
    assert set(step["values"]) == {"stream1", "sign1"}


@pytest.mark.parametrize("layer", bench.LOW_BIT[:8], ids=str)
def test_a_layer_of_a_few_bits_is_exact(layer: bench.Layer) -> None:
    graph = bench.conv_graph(dataclasses.replace(layer, channels=32, filters=32, side=5))
    assert graph.tensors["weight1"].codes == Codes("bipolar", layer.weight_bits)
    assert len(np.unique(graph.tensors["weight1"].data)) == 2**layer.weight_bits
    x = np.random.default_rng(0).uniform(-0.2, 1.2, (2, 5, 5, 32)).astype(np.float32)
    found = load(graph)(x)
    np.testing.assert_array_equal(found, graph.run(x))
    assert found.max() == 2**layer.activation_bits - 1


def test_a_file(tmp_path: Path) -> None:
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    peers = ["ort-fp32", "ort-int8", "openvino-int8"]
    found = bench.bench_file(tmp_path / "x.lowbit", isa="scalar", batch=2, repeats=2, peers=peers)
    assert (found["format"], found["isa"], found["threads"], found["batch"]) == (2, "scalar", 1, 2)
    assert (found["file"], found["missing"], found["peak"]) == ("x.lowbit", [], None)
    assert found["sha256"] == hashlib.sha256((tmp_path / "x.lowbit").read_bytes()).hexdigest()
    assert list(found["whole"]["peers"]) == peers
    for peer in found["whole"]["peers"].values():
        assert set(peer) == {"theirs", "ratio", "p10", "p90", "noisy", "note"}
    rows = {row["name"]: row for row in found["layers"]}
    assert {"stem", "block0", "block1", "head"} <= set(rows)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(list(row["peers"]) == (peers if row["macs"] else []) for row in rows.values())
    assert rows["block0"]["macs"] == 36 * 2304
    startup = found["startup"]
    assert 0 < startup["import_seconds"] < 60
    assert 0 < startup["load_seconds"] < 60
    assert startup["file_bytes"] == (tmp_path / "x.lowbit").stat().st_size
    assert startup["buffer_bytes"] == load(classifier(), isa="scalar").workspace_bytes(1)
    bench.write_result(tmp_path / "b.json", found)
    assert json.loads((tmp_path / "b.json").read_text()) == found
    for table in (bench.whole_table(found), bench.layers_table(found)):
        assert table.row_count >= 3


def test_shares_of_the_peak(tmp_path: Path) -> None:
    best = next(isa for isa, there in isas().items() if there)
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    found = bench.bench_file(tmp_path / "x.lowbit", repeats=2)
    for row in found["layers"]:
        known = row["macs"] and row["isa"] == best != "scalar" and row["kernel"].split("+")[0] != "float_gemm"
        assert (row["peak_share"] is not None) == bool(known)


def test_starting_up_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"can't load .*x\.lowbit"):
        bench.bench_startup(tmp_path / "x.lowbit", "scalar", repeats=1)


def test_code_offsets(tmp_path: Path) -> None:
    """The twin has the same layers; the sums that offsets need are part of their layer's time."""
    graph = with_offsets(classifier())
    twins = [bench.float_twin(g).graph.node for g in (graph, classifier())]
    assert [n.op_type for n in twins[0]] == [n.op_type for n in twins[1]]
    lowbit.save(graph, tmp_path / "x.lowbit")
    found = bench.bench_file(tmp_path / "x.lowbit", batch=1, repeats=2)
    names = [row["name"] for row in found["layers"]]
    assert len(set(names)) == len(names)
    assert "code_sums" not in [row["kernel"] for row in found["layers"]]
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "wrong", [{"batch": 0}, {"repeats": 1}, {"threads": 10000}, {"isa": "sse1"}, {"peers": ["sse1"]}]
)
def test_impossible_wishes(wrong: dict[str, Any], tmp_path: Path) -> None:
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    with pytest.raises(ValueError, match="sse1" if {"isa", "peers"} & set(wrong) else next(iter(wrong))):
        bench.bench_file(tmp_path / "x.lowbit", **wrong)


# ------------------------------------------------------------------------------------------ python -m lowbit.bench


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "layers,all"], "unknown group 'all'; there are layers, low-bit"),
        (["--peers", "tvm"], "unknown peer 'tvm'"),
        (["--threads", "10000"], "threads = 10000"),
        (["--threads", "0"], "threads = 0"),
        (["--isa", "sse1"], "unknown isa 'sse1'"),
        (["--repeats", "1"], "repeats = 1 must be at least 2"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_measurements_that_have_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.json"
    main(["--repeats", "2", "--only", "layers,training", "--peers", "ort-fp32", "--json", str(path)])
    shown = capsys.readouterr().out
    assert "64 channels" in shown
    assert "training step" in shown
    found = json.loads(path.read_text())
    assert found["format"] == bench.FORMAT
    assert {"machine", "versions", "missing", "isa", "threads", "peak", "warnings"} <= set(found)
    assert len(found["layers"]) == len(bench.LAYERS)
    assert found["layers"][0]["macs"] == 56 * 56 * 64 * 64 * 9
    assert all(row["peers"]["ort-fp32"]["ratio"] > 0 for row in found["layers"])
    assert [(step["method"], step["reference"]) for step in found["training"]] == [("slb", "float"), ("lns", "sign")]
    assert all(step["slowdown"] > 0 for step in found["training"])


def test_whole_networks_and_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = benchmark.Network("bireal_resnet14", 16, channels=1, arguments={"width": 8, "blocks": 1})
    monkeypatch.setattr(benchmark, "NETWORKS", {"a small network": small})
    path = tmp_path / "b.json"
    main(["--repeats", "2", "--only", "networks,load", "--peers", "ort-fp32,openvino-int8", "--json", str(path)])
    shown = capsys.readouterr().out
    assert "a small network" in shown
    assert "import" in shown
    found = json.loads(path.read_text())
    (row,) = found["networks"]
    assert row["network"] == found["load"]["network"] == "a small network"
    assert list(row["peers"]) == ["ort-fp32", "openvino-int8"]
    assert any(kernel.startswith("bit_conv") for kernel in row["kernels"])
    assert row["macs"] > 0
    assert (row["two_threads"] is None) == (len(os.sched_getaffinity(0)) < 2)
    assert found["load"]["load_seconds"] > 0


def test_super_resolution_beside_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.bench import superres

    monkeypatch.setattr(superres, "PHOTOGRAPH", (40, 70))
    sizes = {superres.low_resolution: (40, 70), superres.vdsr_body: (12, 12)}
    monkeypatch.setattr(superres, "PEER_TILE", 40)
    build = {"low_resolution": superres.low_resolution, "vdsr_body": superres.vdsr_body}
    for name, function in build.items():
        monkeypatch.setattr(
            superres, name, lambda size, channels, layers, f=function: f(sizes[f], channels=8, layers=1)
        )
    peers, _ = bench.installed(bench.chosen(["ort-fp32", "ort-int8"]))
    rows = superres.bench_superres(peers, bench.Core("scalar"), 1, "scalar", 2)
    assert [row["network"] for row in rows] == [
        "VDSR's body W1A1, 18 layers of 64 channels, 256x256, float16 stream",
        "a photograph of 2 MP, x2, Y alone",
        "a photograph of 2 MP, x2, Y, Cb and Cr, beside Y alone",
    ]
    assert [list(row["peers"]) for row in rows] == [["ort-fp32", "ort-int8"], ["ort-fp32"], ["ort-fp32"]]
    assert [row["goals"] for row in rows] == [{"ort-fp32": 14.0, "ort-int8": 4.4}, {"ort-fp32": 8.0}, {}]
    for row in rows:
        assert all(peer["ratio"] > 0 for peer in row["peers"].values())
        assert row["macs"] > 0
    assert rows[1]["ours"] != rows[2]["ours"]
    assert rows[1]["peers"]["ort-fp32"]["theirs"] == rows[2]["peers"]["ort-fp32"]["theirs"]
    monkeypatch.setattr(superres, "LARGE", (400, 600))
    small = build["low_resolution"](channels=8, layers=1)
    monkeypatch.setattr(superres, "low_resolution", lambda channels, layers: small)
    found = superres.bench_memory(1)
    assert found["bytes"] is None or 20e6 < found["bytes"] < superres.MEMORY_GOAL
    assert found["seconds"] > 0
    assert goals_lines(rows)


@pytest.mark.parametrize("build", ["low_resolution", "vdsr"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_twin_of_a_super_resolution_network_enlarges(build: str, scale: int) -> None:
    """With a residual of zero nothing is left but the bicubic part, mirrored borders and all."""
    from lowbit.bench import superres

    graph = getattr(superres, build)((5, 7), scale=scale, residual=0.0)
    x = np.random.default_rng(0).random((2, 5, 7, 1), np.float32)
    np.testing.assert_allclose(run_twin(graph, x), graph.run(x), atol=1e-6)


def test_goals() -> None:
    def row(ratio: float, share: float, trusted: bool = True, noisy: bool = False) -> dict[str, Any]:
        return {
            "layer": "a layer",
            "goals": {"ort-fp32": 19.0, "peak": 0.83, "ort-int8": 5.2},
            "peers": {"ort-fp32": {"ratio": ratio, "noisy": noisy}},
            "peak_share": share,
            "trusted": trusted,
        }

    assert goals_lines([row(19.0, 0.83)]) == ["goals: 2 reached, 0 missed, 1 not measured or not to be told now"]
    assert goals_lines([row(18.9, 0.82), row(20.0, 0.9)]) == [
        "goals: 2 reached, 2 missed, 2 not measured or not to be told now",
        "missed: a layer, at least 19x ORT fp32",
        "missed: a layer, at least 83% of the peak",
    ]
    assert "0 reached, 0 missed, 3 not" in goals_lines([row(20.0, 0.9, trusted=False)])[0]
    assert "1 reached, 0 missed, 2 not" in goals_lines([row(20.0, 0.9, noisy=True)])[0]
    assert "0 reached, 1 missed, 2 not" in goals_lines([{**row(18.0, 0.9), "peak_share": None}])[0]
    assert all(goals(layer) for layer in bench.LAYERS)
    assert {layer.activation_bits for layer in bench.LOW_BIT if not goals(layer)} == {4, 8}  # 2/4 and 1/8 have none


# ------------------------------------------------------------------------------------------ Larq Compute Engine


def other_python(path: Path, body: str) -> Path:
    """Stands in for the Python of the other environment."""
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{body}")
    path.chmod(0o755)
    return path


def test_beside_larq_compute_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packages = {"larq-compute-engine": "0.16", "larq": "0.13", "tensorflow": "2.16"}
    python = other_python(
        tmp_path / "python",
        "task = json.loads(sys.stdin.readline())\n"
        f"print(json.dumps({{'modes': ['indirect'] * len(task['layers']), 'versions': {packages!r}}}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps(1 + int(line)), flush=True)\n",
    )
    path = tmp_path / "b.json"
    lce.main(["--python", str(python), "--repeats", "2", "--json", str(path)])
    assert "larq-compute-engine 0.16" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [row["peers"]["lce"]["theirs"]["median"] for row in found["layers"]] == list(range(1, len(bench.LAYERS) + 1))
    assert found["versions"]["tensorflow"] == "2.16"


@pytest.mark.parametrize(
    ("body", "words"),
    [(None, "no such Python; make bench-lce"), ("raise SystemExit('no wheel for this')", "ends: no wheel for this")],
)
def test_larq_compute_engine_is_missing(
    body: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if body:
        other_python(tmp_path / "python", body)
    with pytest.raises(SystemExit) as stop:
        lce.main(["--python", str(tmp_path / "python"), "--json", str(tmp_path / "b.json")])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
