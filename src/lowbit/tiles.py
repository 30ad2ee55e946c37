"""Cutting an image into tiles for a network that works on any size, so that the parts are the whole, bit for bit.

An output pixel depends on a few input pixels around it. Tiles that overlap by as much compute every output pixel from the same
numbers as a run on the whole image does; tiles lie at the image's own border wherever they reach it, so padding and mirroring
are the same there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from lowbit.graph import Graph, Node, ValueType
from lowbit.interpreter import bicubic_taps


class TileError(ValueError):
    """A network that can't run on tiles. The message names the node."""


@dataclass(frozen=True)
class Reach:
    """What an output pixel depends on: of an image `scale` times as large, pixel scale * y + p on the input rows
    y - top .. y + bottom and the columns x - left .. x + right, for every phase p."""

    scale: int
    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class _Axis:
    """One direction of a value that is ``len(low)`` times as large as the input: its pixel scale * x + p depends on
    the input pixels x + low[p] .. x + high[p]."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def scale(self) -> int:
        return len(self.low)

    def at(self, phase: int, offset: int) -> tuple[int, int]:
        """The reach of the pixel `offset` pixels away from one of phase `phase`."""
        whole, p = divmod(phase + offset, self.scale)
        return whole + self.low[p], whole + self.high[p]

    def below(self, taps: Iterable[Iterable[int]]) -> _Axis:
        """Of a value whose pixels repeat every ``len(taps) * scale`` phases; phase p depends on this one's pixels ``taps[p % len]``
        away from p // len."""
        groups = [list(group) for group in taps]
        ends = [
            [self.at(p // len(groups), k) for k in groups[p % len(groups)]] for p in range(self.scale * len(groups))
        ]
        return _Axis(tuple(min(low for low, _ in e) for e in ends), tuple(max(high for _, high in e) for e in ends))

    def joined(self, other: _Axis) -> _Axis:
        return _Axis(
            tuple(map(min, self.low, other.low)),
            tuple(map(max, self.high, other.high)),
        )


def reach(graph: Graph) -> Reach:
    """The receptive field of the output, exactly, from every node's geometry.

    Raises:
        TileError: a node whose value depends on the whole image or has another grid of pixels: vectors, global pools,
            strides, a padding that changes the size. The message names it.
    """
    types = graph.validate()
    fields: dict[str, tuple[_Axis, _Axis]] = {}
    for node in graph.nodes:
        fields[node.name] = _field(node, [fields[name] for name in node.inputs], types, graph)
    vertical, horizontal = fields[graph.output.name]
    if vertical.scale != horizontal.scale:  # no op enlarges in one direction
        raise TileError(f"{graph.output.name}: enlarges by {vertical.scale} and {horizontal.scale}")
    return Reach(
        vertical.scale,
        -min(0, *vertical.low),
        -min(0, *horizontal.low),
        max(0, *vertical.high),
        max(0, *horizontal.high),
    )


_POINTWISE: Final = frozenset({"quantize", "mul", "add", "prelu", "relu", "clip", "cast", "concat", "output"})


def _field(
    node: Node, inputs: list[tuple[_Axis, _Axis]], types: Mapping[str, ValueType], graph: Graph
) -> tuple[_Axis, _Axis]:
    def refuse(why: str) -> TileError:
        return TileError(f"{node.name} ({node.op}): {why}, so the image can't be cut into tiles")

    if len(types[node.name].shape) != 3:
        raise refuse("its value is a vector")
    if node.op == "input":
        return _Axis((0,), (0,)), _Axis((0,), (0,))
    if node.op in _POINTWISE:
        first = inputs[0]
        for other in inputs[1:]:
            first = first[0].joined(other[0]), first[1].joined(other[1])
        return first
    source = types[node.inputs[0]].shape
    match node.op:
        case "conv2d" | "max_pool" | "avg_pool":
            if node.op == "conv2d":
                kernel = graph.tensors[node.params["weight"]].data.shape[1:3]
                dilation = node.attrs["dilation"]
            else:
                kernel, dilation = node.attrs["kernel"], (1, 1)
            if node.attrs["stride"] != (1, 1):
                raise refuse(f"it has the stride {node.attrs['stride']}")
            if types[node.name].shape[:2] != source[:2]:
                raise refuse("its padding doesn't keep the size of the map")
            taps = [
                [k * step - before for k in range(count)]
                for count, step, before in zip(kernel, dilation, node.attrs["padding"][:2], strict=True)
            ]
            return inputs[0][0].below([taps[0]]), inputs[0][1].below([taps[1]])
        case "pixel_shuffle":
            same = [[0]] * node.attrs["factor"]
            return inputs[0][0].below(same), inputs[0][1].below(same)
        case "resize_bicubic":
            around = [range(int(first), int(first) + 4) for first in bicubic_taps(node.attrs["factor"])[0]]
            return inputs[0][0].below(around), inputs[0][1].below(around)
    raise refuse("its value depends on the whole image")


@dataclass(frozen=True)
class Cut:
    """One tile's place along one axis: it covers the input pixels `start` to `start + size`, and the output belonging to `first`
    to `last` of these is taken from it."""

    start: int
    size: int
    first: int
    last: int


def cuts(length: int, tile: int, before: int, after: int) -> list[Cut]:
    """The tiles along an axis of `length` pixels: all of one size, at most `tile`, as few and as small as that allows. Of a tile
    the outermost pixels, `before` and `after`, count only where they are the image's own.

    Raises:
        ValueError: `tile` has no pixel that counts: it must be more than before + after.
    """
    overlap = before + after
    if tile <= overlap:
        raise ValueError(f"a tile must be larger than what an output pixel depends on: {overlap + 1} pixels or more")
    if length <= tile:
        return [Cut(0, length, 0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    size = -(-(length - overlap) // count) + overlap
    out = []
    done = 0
    for i in range(count):
        start = min(i * (size - overlap), length - size)
        last = length if i == count - 1 else start + size - after
        out.append(Cut(start, size, done, last))
        done = last
    return out


def grid(shape: tuple[int, int], tile: tuple[int, int], around: Reach) -> Iterator[tuple[Cut, list[Cut]]]:
    """Rows of tiles, top down: the row's place and its tiles from left to right."""
    columns = cuts(shape[1], tile[1], around.left, around.right)
    for row in cuts(shape[0], tile[0], around.top, around.bottom):
        yield row, columns
