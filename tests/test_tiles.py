"""Tiles: the receptive field is exact, tiles cover everything once, and networks that can't be cut are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lowbit.bench import superres
from lowbit.bench.superres import Layers
from lowbit.graph import Graph, Node, Tensor
from lowbit.runtime import load
from lowbit.tiles import Cut, Reach, TileError, cuts, grid, reach


def measured(graph: Graph, size: tuple[int, int]) -> Reach:
    """The receptive field by experiment: one input pixel is changed after the other, on a map so large that borders don't matter."""
    scale = reach(graph).scale
    engine = load(graph.resized(*size))
    x = np.random.default_rng(1).random((*size, 1), np.float32)
    plain = engine(x)
    ends = {"top": 0, "left": 0, "bottom": 0, "right": 0}
    cy, cx = size[0] // 2, size[1] // 2
    for y, x0 in [(cy, cx), (cy + 1, cx + 1), (cy - 1, cx)]:
        other = x.copy()
        other[y, x0] += 100
        rows, cols = np.nonzero((engine(other) != plain)[..., 0])
        ends["top"] = max(ends["top"], (rows // scale).max() - y)  # rows below that look up to y
        ends["bottom"] = max(ends["bottom"], y - (rows // scale).min())
        ends["left"] = max(ends["left"], (cols // scale).max() - x0)
        ends["right"] = max(ends["right"], x0 - (cols // scale).min())
    return Reach(scale, **{k: int(v) for k, v in ends.items()})


def uneven() -> Graph:
    """Kernels, dilations and paddings that differ from side to side, on three scales."""
    n = Layers((8, 8), 0)

    def conv(filters: int, channels: int, kernel: tuple[int, int], dilation: tuple[int, int], before: tuple[int, int]):
        extent = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        padding = (*before, extent[0] - before[0], extent[1] - before[1])
        weight = n.floats(filters, *kernel, channels)
        return n.add("conv2d", constant=weight, stride=(1, 1), dilation=dilation, padding=padding, groups=1)

    conv(4, 1, (3, 2), (2, 1), (3, 0))
    n.add("pixel_shuffle", factor=2)
    first = conv(1, 1, (2, 5), (1, 2), (1, 7))
    n.add("avg_pool", first, kernel=(2, 3), stride=(1, 1), padding=(0, 2, 1, 0), count_include_pad=True)
    n.add("resize_bicubic", factor=3)
    conv(1, 1, (5, 1), (1, 1), (0, 0))
    return n.graph(6)


NETWORKS = {
    "low resolution x2": superres.low_resolution(layers=0, half=False),
    "low resolution x3, 5x5": superres.low_resolution(layers=0, half=False, scale=3, kernel=5),
    "low resolution x4": superres.low_resolution(layers=0, half=False, scale=4),
    "vdsr x2": superres.vdsr(layers=0, half=False),
    "vdsr x3": superres.vdsr(layers=0, half=False, scale=3),
    "uneven": uneven(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_receptive_field_is_what_changes(name: str) -> None:
    graph = NETWORKS[name]
    seen, computed = measured(graph, (41, 43)), reach(graph)
    if name == "vdsr x3":  # a tap of coefficient 0 counts (it makes +0 of -0), but hardly ever shows
        seen = replace(seen, bottom=seen.bottom + 1, right=seen.right + 1)
    assert seen == computed


def test_the_receptive_field_by_hand() -> None:
    # 3x3 convolutions, one pixel each; bicubic reaches 2
    assert reach(superres.low_resolution(layers=12)) == Reach(2, 14, 14, 14, 14)
    # 20 convolutions on the enlarged picture are 10 pixels, then bicubic
    assert reach(superres.vdsr(layers=18)) == Reach(2, 12, 12, 12, 12)
    assert reach(superres.low_resolution(layers=0, kernel=1)) == Reach(2, 2, 2, 2, 2)
    assert reach(superres.low_resolution(layers=2, dilation=3)) == Reach(2, 8, 8, 8, 8)


def chain(*nodes: Node, tensors: dict[str, Tensor] | None = None, shape: tuple[int, ...] = (8, 8, 1)) -> Graph:
    first = Node("input", "x", attrs={"shape": shape, "dtype": "float32"})
    named = [first]
    for node in nodes:
        named.append(Node(node.op, node.name, (named[-1].name,), node.params, node.attrs))
    return Graph((*named, Node("output", "out", (named[-1].name,))), tensors or {})


def window(op: str, stride: int = 1, padding: int = 1) -> Node:
    attrs = {"stride": (stride, stride), "padding": (padding,) * 4}
    if op == "conv2d":
        return Node(op, "w", params={"weight": "k"}, attrs={**attrs, "dilation": (1, 1), "groups": 1})
    return Node(op, "w", attrs={**attrs, "kernel": (3, 3)})


KERNEL = {"k": Tensor(np.ones((1, 3, 3, 1), np.float32))}


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (chain(Node("global_avg_pool", "g")), r"g \(global_avg_pool\): its value depends on the whole image"),
        (chain(Node("flatten", "f")), r"f \(flatten\): its value is a vector"),
        (chain(shape=(8,)), r"x \(input\): its value is a vector"),
        (chain(window("conv2d", stride=2), tensors=KERNEL), r"w \(conv2d\): it has the stride \(2, 2\)"),
        (chain(window("max_pool", stride=2)), r"w \(max_pool\): it has the stride"),
        (chain(window("conv2d", padding=0), tensors=KERNEL), r"w \(conv2d\): its padding doesn't keep the size"),
        (chain(window("max_pool", padding=2)), r"w \(max_pool\): its padding doesn't keep the size"),
    ],
)
def test_networks_that_cannot_be_cut_are_refused(graph: Graph, message: str) -> None:
    with pytest.raises(TileError, match=message):
        reach(graph)


def test_cuts_cover_every_pixel_once() -> None:
    for length in range(1, 60):
        for before, after in ((0, 0), (1, 1), (2, 5), (3, 0)):
            for tile in range(before + after + 1, 40):
                parts = cuts(length, tile, before, after)
                assert [p.first for p in parts] == [0, *[p.last for p in parts[:-1]]]
                assert parts[-1].last == length
                assert len({p.size for p in parts}) == 1
                assert parts[0].size <= tile
                for p in parts:
                    assert p.start >= 0
                    assert p.start + p.size <= length
                    assert p.first < p.last
                    assert p.first - p.start >= (before if p.start else 0)
                    assert p.start + p.size - p.last >= (after if p.start + p.size < length else 0)
                fewest = 1 if length <= tile else -(-(length - before - after) // (tile - before - after))
                assert len(parts) == fewest


def test_small_images_are_one_tile() -> None:
    assert cuts(7, 30, 3, 3) == [Cut(0, 7, 0, 7)]
    assert [
        (row.start, [c.start for c in columns]) for row, columns in grid((5, 30), (20, 20), Reach(2, 2, 2, 2, 2))
    ] == [(0, [0, 13])]


@pytest.mark.parametrize("tile", [0, 3, 6])
def test_tiles_without_a_pixel_that_counts_are_refused(tile: int) -> None:
    with pytest.raises(ValueError, match="7 pixels or more"):
        cuts(50, tile, 2, 4)
