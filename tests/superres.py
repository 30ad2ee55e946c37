"""Graphs of super-resolution networks with random weights: what training makes, by hand."""

from __future__ import annotations

import numpy as np

from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor

META = {"task": "superres", "superres": {"scale": 2}}


class Layers:
    """Nodes, one behind the other."""

    def __init__(self, size: tuple[int, int], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes = [Node("input", "y", attrs={"shape": (*size, 1), "dtype": "float32"})]
        self.tensors: dict[str, Tensor] = {}

    @property
    def last(self) -> str:
        return self.nodes[-1].name

    def add(self, op: str, *inputs: str, constant: Tensor | None = None, **attrs: object) -> str:
        name = f"{op}{len(self.nodes)}"
        params = {}
        if constant is not None:
            role = {"conv2d": "weight", "mul": "factor", "add": "term", "prelu": "slope"}[op]
            params[role] = f"{name}.{role}"
            self.tensors[params[role]] = constant
        self.nodes.append(Node(op, name, inputs or (self.last,), params, attrs))
        return name

    def floats(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return Tensor((around + scale * self.rng.standard_normal(shape)).astype(np.float32))

    def conv(self, filters: int, channels: int, kernel: int = 3, bits: int = 0, dilation: int = 1) -> str:
        shape = (filters, kernel, kernel, channels)
        if bits:
            codes = Codes("bipolar", bits)
            weight = Tensor(codes.values[self.rng.integers(0, 2**bits, shape)], codes)
        else:
            weight = self.floats(*shape, scale=(kernel * kernel * channels) ** -0.5)
        pad = (kernel // 2 * dilation,) * 4
        return self.add("conv2d", constant=weight, stride=(1, 1), dilation=(dilation, dilation), padding=pad, groups=1)

    def graph(self, scale: int) -> Graph:
        self.add("output")
        return Graph(tuple(self.nodes), self.tensors, {**META, "superres": {"scale": scale}})


def low_resolution(
    size: tuple[int, int] = (16, 16),
    scale: int = 2,
    channels: int = 16,
    layers: int = 2,
    bits: int = 1,
    half: bool = True,
    residual: float = 0.1,
    kernel: int = 3,
    dilation: int = 1,
    seed: int = 0,
) -> Graph:
    """First convolution, `layers` times x += PReLU(s conv(quantize(x + b)) + o), last convolution, pixel shuffle, added to the
    enlarged picture. `half`: x is float16. `residual` scales what is added; 0 leaves bicubic."""
    n = Layers(size, seed)
    n.conv(channels, 1, kernel)
    x = n.add("add", constant=n.floats(channels, scale=0.3, around=-0.2))
    if half:
        x = n.add("cast", dtype="float16")
    for _ in range(layers):
        n.add("add", x, constant=n.floats(channels, scale=0.1))
        if bits == 1:
            n.add("quantize", kind="bipolar", bits=1)
        else:
            n.add("quantize", kind="unsigned", bits=bits, reciprocal=4.0)
        n.conv(channels, channels, kernel, bits, dilation)
        n.add("mul", constant=n.floats(channels, scale=0.3 / (kernel * kernel * channels) ** 0.5))
        n.add("add", constant=n.floats(channels, scale=0.05))
        n.add("prelu", constant=n.floats(channels, scale=0.1, around=0.25))
        x = n.add("add", n.last, x)
        if half:
            x = n.add("cast", dtype="float16")
    n.conv(scale * scale, channels, kernel)
    n.add("mul", constant=Tensor(np.full(1, residual, np.float32)))
    n.add("add", constant=n.floats(scale * scale, scale=0.01 * bool(residual)))
    shuffled = n.add("pixel_shuffle", factor=scale)
    n.add("resize_bicubic", "y", factor=scale)
    n.add("add", shuffled, n.last)
    return n.graph(scale)


def vdsr(
    size: tuple[int, int] = (12, 12),
    scale: int = 2,
    channels: int = 16,
    layers: int = 3,
    bits: int = 1,
    half: bool = True,
    residual: float = 0.1,
    seed: int = 0,
) -> Graph:
    """Very deep super-resolution (Kim et al. 2016): all convolutions on the enlarged picture, binary with scale and skip."""
    n = Layers(size, seed)
    enlarged = n.add("resize_bicubic", factor=scale)
    n.conv(channels, 1)
    x = n.add("relu")
    if half:
        x = n.add("cast", dtype="float16")
    for _ in range(layers):
        n.add("add", x, constant=n.floats(channels, scale=0.1, around=-0.2))
        n.add("quantize", kind="bipolar", bits=1)
        n.conv(channels, channels, bits=bits)
        n.add("mul", constant=n.floats(channels, scale=0.3 / (9 * channels) ** 0.5))
        n.add("add", constant=n.floats(channels, scale=0.05))
        n.add("relu")
        x = n.add("add", n.last, x)
        if half:
            x = n.add("cast", dtype="float16")
    n.conv(1, channels)
    n.add("mul", constant=Tensor(np.full(1, residual, np.float32)))
    n.add("add", n.last, enlarged)
    return n.graph(scale)
