"""inspect: every byte of a file has a place, and the counts are what one gets by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lowbit
from graphs import draw, with_offsets
from lowbit.graph import Graph, Node, Tensor
from lowbit.inspect import inspect, layer_table
from networks import classifier

GOLDEN = Path(__file__).parent / "golden" / "format1.lowbit"


def check_sum(path: Path) -> None:
    found = inspect(path)
    parts = (found.weight_bytes, found.constant_bytes, found.description_bytes, found.container_bytes)
    assert sum(parts) == found.file_bytes == path.stat().st_size
    assert all(part > 0 for part in parts[2:])
    assert sum(layer.file_bytes for layer in found.layers) == found.weight_bytes + found.constant_bytes
    json.dumps(found.as_dict())


def test_golden_file_adds_up() -> None:
    check_sum(GOLDEN)


@pytest.mark.parametrize("seed", range(12))
def test_random_graphs_add_up(seed: int, tmp_path: Path) -> None:
    graph = replace(draw(seed), meta={"classes": ['"quoted"', "back\\slash", "Größe", "\n"]})
    lowbit.save(graph, tmp_path / "x.lowbit")
    check_sum(tmp_path / "x.lowbit")


def test_counts_by_hand(tmp_path: Path) -> None:
    lowbit.save(classifier(side=12, channels=3, width=16), tmp_path / "x.lowbit")
    found = inspect(tmp_path / "x.lowbit")
    rows = {layer.name: layer for layer in found.layers}
    assert list(rows) == ["input", "stem", "block0", "block1", "pool", "head"]
    stem, block, head = rows["stem"], rows["block0"], rows["head"]
    assert (stem.weight_bits, stem.activation_bits, stem.output) == (8, 8, (6, 6, 16))
    assert (stem.weight_bytes, stem.constant_bytes, stem.macs) == (16 * 27, 2 * 16 * 4, 36 * 16 * 27)
    assert (block.weight_bits, block.activation_bits) == (1, 1)
    assert (block.weight_bytes, block.constant_bytes) == (16 * 16 * 9 // 8, 2 * 16 * 4)
    assert (block.weights, block.float_bytes, block.macs) == (2304, 4 * (2304 + 32), 36 * 2304)
    assert (head.op, head.weight_bits, head.macs, head.file_bytes) == ("linear", 32, 48, 4 * (48 + 3))
    assert found.macs == stem.macs + 2 * block.macs + head.macs
    assert found.low_bit_ratio == block.float_bytes / block.file_bytes
    assert found.meta["classes"] == ["circle", "square", "triangle"]


def test_offsets_count_as_constants(tmp_path: Path) -> None:
    lowbit.save(with_offsets(classifier()), tmp_path / "x.lowbit")
    rows = {layer.name: layer for layer in inspect(tmp_path / "x.lowbit").layers}
    assert (rows["block0"].weight_bytes, rows["block0"].constant_bytes) == (16 * 16 * 9 // 8, (2 * 16 + 16 + 1) * 4)
    check_sum(tmp_path / "x.lowbit")


def test_a_shared_constant_counts_once() -> None:
    nodes = (
        Node("input", "input", attrs={"shape": (4,), "dtype": "float32"}),
        Node("linear", "one", ("input",), {"weight": "w"}),
        Node("linear", "two", ("one",), {"weight": "w"}),
        Node("output", "output", ("two",)),
    )
    rows = layer_table(Graph(nodes, {"w": Tensor(np.ones((4, 4), np.float32))}))
    assert [row.file_bytes for row in rows] == [0, 64, 0]
    assert [row.macs for row in rows] == [0, 16, 16]


def test_not_a_file_of_ours(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(lowbit.FileError, match="x: not a lowbit file"):
        inspect(tmp_path / "x")
