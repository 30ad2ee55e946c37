"""The bench: the float twin computes what the Graph computes, and the arithmetic on samples. No timing is judged here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import lowbit
from graphs import with_offsets
from lowbit import bench
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.runtime import load
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
    add("clip", "clip", "shuffle", low=-1.0, high=2.0)
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
    assert nodes.count("Conv") == 2
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


def test_medians_and_ratios() -> None:
    found = bench.Comparison.of([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert found.ours.median == 2.0
    assert found.ratio == found.p10 == found.p90 == 10.0
    assert found.warnings("it") == []
    noisy = bench.Comparison.of([1.0, 1.0, 1.0], [5.0, 10.0, 20.0])
    assert "it: noisy" in noisy.warnings("it")[0]


def test_both_run_in_turn() -> None:
    calls: list[str] = []
    found = bench.alternate(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert found.ours.samples == found.theirs.samples == 3
    turns = "".join(c for i, c in enumerate(calls) if i == 0 or calls[i - 1] != c)
    assert turns == "ab" + "ab" + "a" + "b"  # to know how long each takes, then ab, ba, ab


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


def test_a_file(tmp_path: Path) -> None:
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    found = bench.bench_file(tmp_path / "x.lowbit", isa="scalar", batch=2, repeats=2)
    assert (found["isa"], found["threads"], found["batch"], found["file"]) == ("scalar", 1, 2, "x.lowbit")
    rows = {row["name"]: row for row in found["layers"]}
    assert {"stem", "block0", "block1", "head"} <= set(rows)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all((row["ratio"] is None) == (row["macs"] == 0) for row in rows.values())
    assert rows["block0"]["macs"] == 36 * 2304
    bench.write_result(tmp_path / "b.json", found)
    assert json.loads((tmp_path / "b.json").read_text()) == found
    for table in (bench.whole_table(found), bench.layers_table(found)):
        assert table.row_count >= 3


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


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"repeats": 1}, {"threads": 10000}, {"isa": "sse1"}])
def test_impossible_wishes(wrong: dict[str, Any], tmp_path: Path) -> None:
    lowbit.save(classifier(), tmp_path / "x.lowbit")
    with pytest.raises(ValueError, match=next(iter(wrong)) if "isa" not in wrong else "sse1"):
        bench.bench_file(tmp_path / "x.lowbit", **wrong)


def test_the_measurements_that_have_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--repeats", "2", "--json", str(tmp_path / "b.json")])
    shown = capsys.readouterr().out
    assert "64 channels" in shown
    assert "training step" in shown
    found = json.loads((tmp_path / "b.json").read_text())
    assert len(found["layers"]) == len(bench.LAYERS)
    assert found["layers"][0]["macs"] == 56 * 56 * 64 * 64 * 9
    assert all(row["ratio"] > 0 for row in found["layers"])
    assert [(step["method"], step["reference"]) for step in found["training_steps"]] == [
        ("slb", "float"),
        ("lns", "sign"),
    ]
    assert all(step["slowdown"] > 0 for step in found["training_steps"])
