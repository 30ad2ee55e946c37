"""What is in a .lowbit file: bytes, bits and multiply-accumulates of every layer, every byte accounted for."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lowbit.graph import Graph, Node, ValueType
from lowbit.packfile import KEY, read
from lowbit.zoo import locate

_LAYERS: Final = frozenset(
    {
        "input",
        "conv2d",
        "linear",
        "max_pool",
        "avg_pool",
        "global_avg_pool",
        "pixel_shuffle",
        "resize_bicubic",
        "concat",
    }
)
"""Ops with a row of their own; any other op belongs to the row of its first input."""

LOW_BITS: Final = 4
"""Layers with at most as many weight bits count as low-bit layers."""


@dataclass(frozen=True)
class Layer:
    """One row: a layer and the elementwise ops behind it.

    Attributes:
        name, op: of the node that leads the row.
        output: shape of its value, (H, W, C) or (C,).
        weight_bits: bits of a weight, 32 for float; None without weights.
        activation_bits: bits of an input value; None for the input itself.
        weights: number of weights.
        weight_bytes, constant_bytes: in the file: packed weights; factors, terms, slopes and offsets.
        float_bytes: 4 bytes for each of these numbers.
        macs: multiply-accumulates for one image.
    """

    name: str
    op: str
    output: tuple[int, ...]
    weight_bits: int | None
    activation_bits: int | None
    weights: int
    weight_bytes: int
    constant_bytes: int
    float_bytes: int
    macs: int

    @property
    def file_bytes(self) -> int:
        """Packed weights and constants together."""
        return self.weight_bytes + self.constant_bytes


@dataclass(frozen=True)
class Contents:
    """The whole file: ``weight_bytes + constant_bytes + description_bytes + container_bytes == file_bytes``.

    Attributes:
        layers: one row for each layer.
        description_bytes: the graph as JSON, with names, classes and checksum.
        container_bytes: safetensors' own table of tensors, and its length.
        float_bytes: 4 bytes for every number the layers hold.
        meta: the Graph's.
    """

    path: str
    layers: tuple[Layer, ...]
    description_bytes: int
    container_bytes: int
    file_bytes: int
    meta: dict[str, Any]

    @property
    def weight_bytes(self) -> int:
        """Packed weights of all layers."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def constant_bytes(self) -> int:
        """Factors, terms, slopes and offsets of all layers."""
        return sum(layer.constant_bytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """The same numbers in float32."""
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def low_bit_ratio(self) -> float | None:
        """How much smaller the low-bit layers are than in float32, their scales counted; None without such layers."""
        low = [layer for layer in self.layers if layer.weight_bits is not None and layer.weight_bits <= LOW_BITS]
        if not low:
            return None
        return sum(layer.float_bytes for layer in low) / sum(layer.file_bytes for layer in low)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "path": self.path,
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "constant_bytes": self.constant_bytes,
            "description_bytes": self.description_bytes,
            "container_bytes": self.container_bytes,
            "float_bytes": self.float_bytes,
            "low_bit_ratio": self.low_bit_ratio,
            "macs": self.macs,
            "layers": [{**asdict(layer), "output": list(layer.output)} for layer in self.layers],
            "meta": self.meta,
        }


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read a file, or a network of the zoo by its name, and count.

    Raises:
        FileError: not a lowbit file, or a damaged one.
    """
    path = locate(path)
    graph = read(path)
    size = Path(path).stat().st_size
    layers = layer_table(graph)
    with Path(path).open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        text = json.loads(stream.read(header))["__metadata__"][KEY]
    # as it stands in the header: a JSON string within JSON, its quotes escaped
    description = len(json.dumps(text, ensure_ascii=False).encode()) - 2
    return Contents(os.fspath(path), layers, description, 8 + header - description, size, dict(graph.meta))


def layer_table(graph: Graph) -> tuple[Layer, ...]:
    """The rows of a Graph. A constant that two nodes share counts where it is used first."""
    types = graph.validate()
    row_of: dict[str, str] = {}
    members: dict[str, list[Node]] = {}
    for node in graph.nodes:
        head = node.name if node.op in _LAYERS else row_of[node.inputs[0]]
        row_of[node.name] = head
        members.setdefault(head, []).append(node)
    seen: set[str] = set()
    return tuple(_layer(graph, nodes, types, seen) for nodes in members.values())


def _layer(graph: Graph, nodes: list[Node], types: dict[str, ValueType], seen: set[str]) -> Layer:
    head = nodes[0]
    weight = graph.tensors[head.params["weight"]] if "weight" in head.params else None
    sizes = {"weight": 0, "constant": 0}
    numbers = 0
    for node in nodes:
        for role, name in node.params.items():
            if name not in seen:
                seen.add(name)
                sizes["weight" if role == "weight" else "constant"] += graph.tensors[name].nbytes
                numbers += graph.tensors[name].data.size
    return Layer(
        head.name,
        head.op,
        types[head.name].shape,
        None if weight is None else (weight.codes.bits if weight.codes else 32),
        _bits(types[head.inputs[0]]) if head.inputs else None,
        0 if weight is None else weight.data.size,
        sizes["weight"],
        sizes["constant"],
        4 * numbers,
        macs(graph, head, types),
    )


def macs(graph: Graph, node: Node, types: dict[str, ValueType]) -> int:
    """Multiply-accumulates of one node for one image, padded positions counted; 0 for all but conv2d and linear."""
    if node.op not in ("conv2d", "linear"):
        return 0
    weight = graph.tensors[node.params["weight"]].data
    return int(math.prod(types[node.name].shape) * weight[0].size)


def _bits(t: ValueType) -> int:
    if t.codes is not None:
        return t.codes.bits
    return 16 if t.dtype == "float16" else 32
