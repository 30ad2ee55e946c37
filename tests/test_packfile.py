"""The file: round trips, byte for byte in every process, a golden file of format 1, and everything that can be wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import lowbit
from lowbit import Codes, FileError, Graph, GraphError, Node, Tensor, packfile

GOLDEN = Path(__file__).parent / "golden" / "format1.lowbit"


def sample() -> Graph:
    """Every kind of codes, every op; made of integers alone, so that it is the same for ever."""

    def pattern(*shape: int, codes: Codes | None = None, scale: float = 1.0) -> Tensor:
        i = (np.arange(int(np.prod(shape))) * 7919) % 251
        if codes is None:
            return Tensor(((i - 125) * np.float32(scale / 64)).astype(np.float32).reshape(shape))
        return Tensor(codes.values[i % len(codes.values)].reshape(shape), codes)

    pad, unit = (1, 1, 1, 1), {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
    nodes, tensors = [], {}

    def add(op: str, name: str, *inputs: str, constant: Tensor | None = None, **attrs) -> None:
        params = {}
        if constant is not None:
            role = {"conv2d": "weight", "linear": "weight", "mul": "factor", "add": "term", "prelu": "slope"}[op]
            params = {role: f"{name}.{role}"}
            tensors[f"{name}.{role}"] = constant
        nodes.append(Node(op, name, inputs or ((nodes[-1].name,) if nodes else ()), params, attrs))

    add("input", "image", shape=(8, 8, 2), dtype="uint8", zero_point=(10, 200))
    add(
        "conv2d",
        "stem",
        constant=pattern(8, 3, 3, 2, codes=Codes("signed", 8)),
        **{**unit, "stride": (2, 2)},
        padding=pad,
    )
    add("mul", "stem.mul", constant=pattern(8, scale=1e-3))
    add("add", "stem.add", constant=pattern(8))
    add("cast", "stream", dtype="float16")
    add("quantize", "q1", kind="bipolar", bits=1)
    add("conv2d", "c1", constant=pattern(8, 3, 3, 8, codes=Codes("bipolar", 1)), **unit, padding=pad)
    add("mul", "c1.mul", constant=pattern(1, scale=0.01))
    add("prelu", "c1.act", constant=pattern(8, scale=0.1))
    add("add", "sum", "c1.act", "stream")
    add("clip", "clip", low=-3.0, high=3.0)
    add("quantize", "q2", kind="unsigned", bits=2, reciprocal=1.5)
    add("max_pool", "pool", kernel=(2, 2), stride=(1, 1), padding=(0, 0, 1, 1))
    add(
        "conv2d",
        "c2",
        constant=pattern(4, 1, 1, 4, codes=Codes("table", 2, table=(-127, -14, 28, 71))),
        **{**unit, "groups": 2},
        padding=(0,) * 4,
    )
    add("mul", "c2.mul", constant=pattern(4, scale=0.01))
    add("concat", "both", "c2.mul", "c2.mul")
    add("relu", "relu")
    add("pixel_shuffle", "shuffle", factor=2)
    add("avg_pool", "mean", kernel=(3, 3), stride=(2, 2), padding=pad, count_include_pad=False)
    add("conv2d", "c3", constant=pattern(6, 3, 3, 2), **unit, padding=pad)
    add("global_avg_pool", "gap")
    add("flatten", "vector")
    add("quantize", "q3", kind="signed", bits=8, reciprocal=40.0)
    add("linear", "fc", constant=pattern(5, 6, codes=Codes("bipolar", 4)))
    add("mul", "fc.mul", constant=pattern(5, scale=0.01))
    add("output", "out")
    return Graph(
        tuple(nodes),
        tensors,
        {"task": "classify", "classes": ["ä", "b", "c", "d", "e"], "nested": {"k": [1, 2.5, None]}},
    )


def images() -> np.ndarray:
    return ((np.arange(3 * 8 * 8 * 2) * 7919) % 256).astype(np.uint8).reshape(3, 8, 8, 2)


def rewritten(path: Path, change) -> Path:
    """The sample's file with its description changed; the checksum made right again."""
    graph = sample()
    data = packfile.dumps(graph)
    tensors = safetensors.numpy.load(data)
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(json.loads(data[8 : 8 + n])["__metadata__"]["lowbit"])
    change(header, tensors)
    header["sha256"] = packfile._checksum(packfile._canonical(header["graph"]), tensors)
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"lowbit": packfile._canonical(header)}))
    return path


NEWER = {"resize_bicubic"}
"""Ops that came after the golden file."""


def test_every_op_is_in_the_sample() -> None:
    assert {n.op for n in sample().nodes} == set(lowbit.graph.OPS) - NEWER


def test_ops_newer_than_the_sample(tmp_path: Path) -> None:
    nodes = (
        Node("input", "image", attrs={"shape": (3, 4, 1), "dtype": "float32"}),
        Node("resize_bicubic", "larger", ("image",), attrs={"factor": 3}),
        Node("output", "out", ("larger",)),
    )
    graph = Graph(nodes, {})
    assert {n.op for n in nodes} >= NEWER
    lowbit.save(graph, tmp_path / "a.lowbit")
    assert lowbit.read(tmp_path / "a.lowbit") == graph


def test_round_trip(tmp_path: Path) -> None:
    graph = sample()
    size = lowbit.save(graph, tmp_path / "a.lowbit")
    assert size == (tmp_path / "a.lowbit").stat().st_size
    again = lowbit.read(tmp_path / "a.lowbit")
    assert again == graph
    assert again.meta["nested"] == {"k": [1, 2.5, None]}
    assert packfile.dumps(again) == packfile.dumps(graph)


def test_same_bytes_in_every_process() -> None:
    code = "import hashlib, test_packfile as t; print(hashlib.sha256(t.packfile.dumps(t.sample())).hexdigest())"
    here = hashlib.sha256(packfile.dumps(sample())).hexdigest()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        there = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert there.stdout.strip() == here


def test_golden_file_of_format_1() -> None:
    """This file stays as it is: format 1 is readable, and means the same, for ever."""
    graph = lowbit.read(GOLDEN)
    assert graph == sample()
    expected = np.load(GOLDEN.with_suffix(".npy"))
    out = graph.run(images())
    assert out.dtype == expected.dtype
    assert out.tobytes() == expected.tobytes()
    assert lowbit.load(GOLDEN)(images()).tobytes() == expected.tobytes()
    assert packfile.dumps(graph) == GOLDEN.read_bytes()


def test_weights_are_packed() -> None:
    tensors = safetensors.numpy.load(packfile.dumps(sample()))
    assert tensors["c1.weight"].nbytes == 8 * 9 * 8 // 8
    assert tensors["c2.weight"].nbytes == 4 * 4 * 2 // 8
    assert tensors["fc.weight"].nbytes == 5 * 6 * 4 // 8


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """Every byte of the tensors and of the header, one bit each."""
    data = packfile.dumps(sample())
    path = tmp_path / "bad.lowbit"
    rng = np.random.default_rng(0)
    places = {*range(0, 8), *rng.integers(8, len(data), 400).tolist(), len(data) - 1}
    for place in sorted(places):
        bad = bytearray(data)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(FileError, match="bad.lowbit"):
            lowbit.read(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    data = packfile.dumps(sample())
    path = tmp_path / "short.lowbit"
    for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(FileError, match="short.lowbit: not a lowbit file, or a damaged one"):
            lowbit.read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(FileError, match="short.lowbit"):
        lowbit.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.lowbit"
    with pytest.raises(FileError, match="x.lowbit: no such file"):
        lowbit.read(path)
    with pytest.raises(FileError, match="is a folder, not a .lowbit file"):
        lowbit.read(tmp_path)
    path.write_bytes(b"PK\x03\x04 a zip file, say, of some length" * 10)
    with pytest.raises(FileError, match="not a lowbit file"):
        lowbit.read(path)
    one = {"w": np.zeros(1, np.float32)}
    for metadata in (None, {"format": "pt"}, {"lowbit": "{}", "other": ""}):
        path.write_bytes(safetensors.numpy.save(one, metadata=metadata))
        with pytest.raises(FileError, match="no key 'lowbit'"):
            lowbit.read(path)
    for text in ("", "[]", "{}", "nonsense", '{"format":1}', "[" * 100000):
        path.write_bytes(safetensors.numpy.save(one, metadata={"lowbit": text}))
        with pytest.raises(FileError, match="not a Graph|unknown or missing keys"):
            lowbit.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(format=2), "has format 2; this version of lowbit reads format 1: upgrade"),
        (lambda h, t: h.update(extra=1), "unknown or missing keys"),
        (lambda h, t: h["graph"].pop("meta"), "unknown or missing keys"),
        (lambda h, t: h["graph"]["nodes"][1].update(op="conv3d"), "unknown op 'conv3d'"),
        (lambda h, t: h["graph"]["nodes"][1].update(color=1), "a node has the wrong keys"),
        (lambda h, t: h["graph"]["nodes"][1].update(name=3), "no string"),
        (lambda h, t: h["graph"]["nodes"][1].update(inputs=["nowhere"]), "no earlier node"),
        (lambda h, t: h["graph"]["nodes"][1]["attrs"].update(stride=[0, 0]), "stride must be"),
        (lambda h, t: h["graph"]["nodes"][0]["attrs"].update(shape=[1 << 40, 8, 2]), "a side is 1"),
        (lambda h, t: h["graph"]["tensors"]["c1.weight"].update(bits=2), "does not hold 576 codes of 2 bits"),
        (lambda h, t: h["graph"]["tensors"]["c1.weight"].update(kind="ternary"), "unknown kind"),
        (lambda h, t: h["graph"]["tensors"]["c1.weight"].update(shape=[1 << 62, 4, 4, 4]), "does not hold"),
        (lambda h, t: h["graph"]["tensors"]["c1.weight"].update(shape=[8, -3, -3, 8]), "has the shape"),
        (lambda h, t: h["graph"]["tensors"]["c1.weight"].update(color=1), "wrong keys"),
        (lambda h, t: h["graph"]["tensors"]["c2.weight"].update(table=[1, 0, 2, 3]), "ascending"),
        (lambda h, t: h["graph"]["tensors"]["c2.weight"].update(table=[0.5, 1, 2, 3]), "other things than integers"),
        (lambda h, t: h["graph"]["tensors"].update(ghost={"kind": "bipolar", "bits": 1, "shape": [8]}), "does not hold"),
        (lambda h, t: t.pop("c1.mul.factor"), "is missing"),
        (lambda h, t: t.update({"more": np.zeros(1, np.float32)}), "used by no node"),
        (lambda h, t: t.update({"c1.mul.factor": np.zeros(1, np.float64)}), "float64, neither"),
        (lambda h, t: t.update({"c1.mul.factor": np.full(1, np.inf, np.float32)}), "infinities or NaN"),
        (lambda h, t: t.update({"c1.mul.factor": np.zeros(3, np.float32)}), "factor must be"),
        (lambda h, t: t.update({"c1.weight": t["c1.weight"].reshape(2, -1)}), "does not hold"),
    ],
)  # fmt: skip
def test_every_rule_has_its_error(tmp_path: Path, change, message: str) -> None:
    path = rewritten(tmp_path / "bad.lowbit", change)
    with pytest.raises(FileError, match=f"bad.lowbit: .*{message}"):
        lowbit.read(path)


def test_the_checksum_is_what_finds_a_changed_weight(tmp_path: Path) -> None:
    data = bytearray(packfile.dumps(sample()))
    data[-1] ^= 1
    path = tmp_path / "bad.lowbit"
    path.write_bytes(data)
    with pytest.raises(FileError, match="damaged: the checksum does not match"):
        lowbit.read(path)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.lowbit"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="a.lowbit: can't be written: No space left on device"):
        lowbit.save(sample(), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(FileError, match="can't be written: No such file or directory"):
        lowbit.save(sample(), tmp_path / "nowhere" / "a.lowbit")


def test_broken_graphs_are_not_written(tmp_path: Path) -> None:
    graph = sample()
    with pytest.raises(GraphError, match="used by no node"):
        lowbit.save(Graph(graph.nodes, {**graph.tensors, "x": Tensor(np.zeros(1))}), tmp_path / "a.lowbit")
    with pytest.raises(GraphError, match="not plain JSON"):
        lowbit.save(Graph(graph.nodes, graph.tensors, {"x": object()}), tmp_path / "a.lowbit")
    with pytest.raises(GraphError, match="not plain JSON"):
        lowbit.save(Graph(graph.nodes, graph.tensors, {"x": float("nan")}), tmp_path / "a.lowbit")
    assert not list(tmp_path.iterdir())
