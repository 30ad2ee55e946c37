"""Random Graphs for the engine's tests: every op, kind of codes, width and geometry, and numbers that break kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.bits import Codes
from lowbit.graph import OPS, Graph, Node, Tensor, ValueType, _Context

CHANNELS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129)
CHANNELS += (144, 160, 191, 192, 193, 255, 256, 257)
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2), (5, 3), (4, 6), (11, 1), (2, 9))
STEPS = (1, 2, 3, 4, 5, 7, 8)
LONG_SIDES = (33, 50, 67, 130, 200)
DENORMAL = (1e-45, -1e-45, 1e-40, -3e-39)
PRODUCTS = 4_000_000
"""About the most multiplications of one layer for one image: the interpreter and the scalar row are slow."""
REAL = ("float32", "float16")

ACTIVATIONS = ("pixels", "bipolar", "unsigned", "signed", *REAL)
WEIGHTS = ("bipolar", "signed", "unsigned", "table", "float32")
OFFSETS = ("input", "weight", "both")
BITS = {"bipolar": range(1, 9), "signed": range(2, 9), "unsigned": range(1, 9), "table": range(1, 5)}


def cell_of(node: Node, types: list[ValueType], tensors: dict[str, Tensor]) -> Iterator[str]:
    """The coverage cells a node fills: op and type of its inputs, for products also of the weight."""

    def short(t: ValueType) -> str:
        if t.codes is None:
            return t.dtype
        return "pixels" if t.codes.zero_point else t.codes.kind

    x = [short(t) for t in types]
    if node.op in ("conv2d", "linear"):
        codes = tensors[node.params["weight"]].codes
        yield f"{node.op} {x[0]} x {codes.kind if codes else 'float32'}"
        if codes:
            yield f"weight {codes.kind} {codes.bits} bits"
        if len(node.params) > 1:
            which = "both" if len(node.params) > 2 else "input" if "input_offset" in node.params else "weight"
            yield f"{node.op} offset {which}"
            yield f"offset {x[0]} x {codes.kind}"
            yield f"offset weight {codes.kind} {codes.bits} bits"
            for what in ("padding", "stride", "dilation"):
                if set(node.attrs.get(what, ())) - {int(what != "padding")}:
                    yield f"offset with {what}"
            if node.attrs.get("groups", 1) > 1:
                yield "offset of channels" if tensors[node.params["weight"]].data.shape[3] == 1 else "offset of groups"
        if node.op == "conv2d" and types[0].codes:
            yield f"padding of {'bits' if types[0].codes.bits == 1 else 'codes'}: {any(node.attrs['padding'])}"
        if node.op == "conv2d" and types[0].codes and codes:
            yield from geometry(node, types[0], tensors[node.params["weight"]])
        if codes and tensors[node.params["weight"]].data.size > 1:
            values = tensors[node.params["weight"]].data
            yield from (
                f"weights all {end}" for end in ("lowest", "highest") if (values == codes.values[ENDS[end]]).all()
            )
    elif node.op == "quantize":
        yield f"quantize {x[0]}"
        yield f"activation {node.attrs['kind']} {node.attrs['bits']} bits"
    elif node.op == "cast":
        yield f"cast {x[0]} to {node.attrs['dtype']}"
    elif node.op == "add":
        yield f"add {x[0]} + {x[1] if len(x) == 2 else 'constant'}"
    elif node.op in ("input", "output"):
        dtype = node.attrs.get("dtype", types[0].dtype if types else "")
        yield f"{node.op} {dtype}"
    elif node.op == "resize_bicubic":
        yield f"resize_bicubic by {node.attrs['factor']}"
    else:
        yield f"{node.op} {types[0].dtype}"
    one = {"pixel_shuffle": node.attrs.get("factor", 0) ** 2, "resize_bicubic": 1, "add": 1}
    if types and one.get(node.op) == types[0].channels and len(types[0].shape) == 3 and types[0].dtype in REAL:
        yield f"{node.op} {'to' if node.op != 'add' else 'of'} one channel"
    if node.op in ("mul", "add", "prelu") and node.params:
        (c,) = (tensors[name].data for name in node.params.values())
        tiny = np.finfo(np.float32).tiny
        for what, there in (("zero", c == 0), ("denormal", (c != 0) & (np.abs(c) < tiny)), ("negative", c < 0)):
            if there.any():
                yield f"{node.op} {what}"


def geometry(node: Node, x: ValueType, weight: Tensor) -> Iterator[str]:
    """The cells of a convolution of codes that its shapes fill, popcounts (of bits) apart from the others."""
    assert x.codes is not None
    assert weight.codes is not None
    kind = (
        "bits" if (x.codes.kind, x.codes.bits, weight.codes.kind, weight.codes.bits) == ("bipolar", 1) * 2 else "codes"
    )
    height, width, channels = x.shape
    kernel, groups = weight.data.shape[1:3], node.attrs["groups"]
    if kernel in SQUARE:
        yield f"{kind}: kernel {kernel[0]}x{kernel[1]}"
    for what in ("stride", "dilation"):
        yield from (f"{kind}: {what} {n}" for n in STEPS[1:] if n in node.attrs[what])
    if (
        kind == "codes"
        and channels > 31
        and len(weight.data) > 63
        and x.codes.kind == "unsigned"
        and not x.codes.zero_point
    ):
        yield f"codes: {x.codes.bits} x {weight.codes.kind} {weight.codes.bits} bits, many filters"
    if groups > 1:
        yield f"{kind}: depthwise" if groups == channels == len(weight.data) else f"{kind}: groups"
    side = (
        "1x1" if height * width == 1 else "wide" if width > 9 * height else "narrow" if height > 9 * width else "plain"
    )
    yield f"{kind}: {side} map"
    yield from (f"{kind}: {n} channels" for n in EDGES if n == channels)
    yield from (f"{kind}: {n} filters" for n in EDGES if n == len(weight.data))


def cells(graph: Graph) -> set[str]:
    types = graph.validate()
    return {c for n in graph.nodes for c in cell_of(n, [types[i] for i in n.inputs], dict(graph.tensors))}


SQUARE = ((1, 1), (3, 3), (5, 5), (7, 7))
ENDS = {"lowest": 0, "highest": -1}
EDGES = (15, 16, 17, 31, 32, 33, 255, 256, 257)  # around whole vectors and words
MAPS = {"1x1": (1, 1), "wide": (2, 67), "narrow": (67, 2), "plain": (6, 7)}
MANY = {
    "channels": 97,
    "filters": 129,
    "groups": 1,
    "kernel": (3, 3),
    "stride": (1, 1),
    "dilation": (1, 1),
    "map": (6, 7),
}
OF_CODES = {"bits": {"x": "bipolar", "w": "bipolar", "bits": 1}, "codes": {"x": "unsigned", "bits_x": 4, "w": "signed"}}
ANY = ("codes", "int32", *REAL)
EXPECTED: dict[str, dict[str, Any]] = {
    **{
        f"{op} {x} x {w}": {"op": op, "x": x, "w": w}
        for op in ("conv2d", "linear")
        for x in ACTIVATIONS
        for w in WEIGHTS
    },
    **{f"weight {k} {b} bits": {"op": "conv2d", "w": k, "bits": b} for k, bits in BITS.items() for b in bits},
    **{
        f"{op} offset {o}": {"op": op, "x": "bipolar", "w": "bipolar", "offset": o}
        for op in ("conv2d", "linear")
        for o in OFFSETS
    },
    **{
        f"offset {x} x {w}": {"op": "conv2d", "x": x, "w": w, "offset": "both"}
        for x in ACTIVATIONS[:4]
        for w in WEIGHTS[:4]
    },
    **{
        f"offset weight {k} {b} bits": {"op": "conv2d", "w": k, "bits": b, "x": "codes", "offset": "weight"}
        for k, bits in BITS.items()
        for b in bits
    },
    **{f"offset {w}": {} for w in ("with padding", "with stride", "with dilation", "of groups", "of channels")},
    **{f"activation {k} {b} bits": {"x": k, "bits_x": b} for k in ("unsigned", "signed") for b in BITS[k]},
    "activation bipolar 1 bits": {"x": "bipolar"},
    **{f"quantize {x}": {"op": "quantize", "x": x} for x in REAL},
    **{f"cast {x} to {d}": {"op": "cast", "x": x, "dtype": d} for x in REAL for d in REAL},
    **{f"add {x} + {y}": {"op": "add", "x": x, "y": y} for x in REAL for y in (*REAL, "constant")},
    **{f"{op} {x}": {"op": op, "x": x} for op in ("prelu", "relu", "clip") for x in REAL},
    **{f"{op} {x}": {"op": op, "x": x} for op in ("max_pool", "avg_pool", "global_avg_pool") for x in ("codes", *REAL)},
    **{f"{op} {x}": {"op": op, "x": x} for op in ("mul", "pixel_shuffle", "concat", "flatten") for x in ANY},
    **{f"resize_bicubic by {r}": {"op": "resize_bicubic", "x": "float32", "factor": r} for r in (2, 3, 4)},
    **{f"{op} to one channel": {"op": op, "x": "float32", "one": True} for op in ("pixel_shuffle", "resize_bicubic")},
    "add of one channel": {"op": "upscale", "x": "float32"},
    **{f"output {x}": {"op": "output", "x": x} for x in ANY},
    **{f"input {x}": {"input": x} for x in ("uint8", "float32")},
    **{f"padding of {x}: {p}": {} for x in ("bits", "codes") for p in (True, False)},
    **{f"weights all {end}": {"op": "conv2d", "w": "signed", "x": "codes", "all": end} for end in ENDS},
    **{
        f"{kind}: {what}": {"op": "conv2d", **codes, **ask}
        for kind, codes in OF_CODES.items()
        for what, ask in (
            *((f"kernel {h}x{w}", {"kernel": (h, w)}) for h, w in SQUARE),
            *((f"{step} {n}", {step: (n, 1 + n // 2)}) for step in ("stride", "dilation") for n in STEPS[1:]),
            *(
                (f"{b} x {w} {bits} bits, many filters", {"bits_x": b, "w": w, "bits": bits, **MANY})
                for b in range(1, 5)
                for w, bits in (("bipolar", 1), ("bipolar", 2), ("signed", 2))
                if kind == "codes"
            ),
            ("groups", {"groups": 2, "channels": 64, "filters": 128}),
            *((f"{side} map", {"map": size}) for side, size in MAPS.items()),
            *((f"{n} channels", {"channels": n, "groups": 1}) for n in EDGES),
            *((f"{n} filters", {"filters": n, "groups": 1}) for n in EDGES),
        )
    },
    "codes: depthwise": {"op": "conv2d", **OF_CODES["codes"], "channels": 33, "filters": 33, "groups": 33},
    "bits: depthwise": {"op": "conv2d", **OF_CODES["bits"], "channels": 64, "filters": 64, "groups": 64},
    **{
        f"{op} {what}": {"op": op, "x": "float32", "y": "constant", "special": what}
        for op in ("mul", "add", "prelu")
        for what in ("zero", "denormal", "negative")
    },
}
"""Every cell that must be filled, and what to ask `draw` for to fill it."""


class Choices:
    """Where a Draw takes its decisions from, here from a seed. `rng` fills arrays."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)


class Draw:
    """Builds one random Graph. `latest` is the value that the next op most likely takes.

    The simplest choice always comes first (an option, no, a small number), so that choices that shrink give simple Graphs.
    """

    def __init__(self, choices: Choices, special: str = "") -> None:
        self.choices = choices
        self.rng = choices.rng
        self.special = special
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.types: dict[str, ValueType] = {}
        self.bound: dict[str, float] = {}
        self.latest = ""

    # --- small draws ---

    def pick(self, options: Any) -> Any:
        return options[self.choices.below(len(options))]

    def chance(self, p: float) -> bool:
        return self.choices.chance(p)

    def between(self, low: int, high: int) -> int:
        """low..high, both of them too."""
        return low + self.choices.below(high - low + 1)

    def constant(self, channels: int, scale: float) -> np.ndarray:
        n = 1 if self.chance(0.2) else channels
        c = self.rng.normal(size=n) * scale
        if self.chance(0.3):
            c = np.round(c / scale * 2) / 2 * 2.0 ** np.round(np.log2(scale))  # short numbers: exact ties come about
        special = self.pick({"zero": (0.0, -0.0), "denormal": DENORMAL}.get(self.special, (0.0, -0.0, *DENORMAL)))
        where = self.rng.random(n) < (1.0 if self.chance(0.05) else 0.1)
        if self.special:
            where[0] = True
        c[where] = special
        if self.special == "negative" or self.chance(0.1):
            c = -np.abs(c) - (c == 0) * scale
        return c.astype(np.float32)

    # --- nodes ---

    def node(
        self, op: str, inputs: tuple[str, ...], bound: float, attrs: dict[str, Any] | None = None, **params: Tensor
    ) -> str:
        name = f"{op}{len(self.nodes)}"
        named = {role: f"{name}.{role}" for role in params}
        self.tensors.update({named[role]: t for role, t in params.items()})
        node = Node(op, name, inputs, named, attrs or {})
        self.nodes.append(node)
        context = _Context(Graph(tuple(self.nodes), self.tensors), node, tuple(self.types[i] for i in inputs))
        self.types[name] = OPS[op](context)
        self.bound[name] = bound
        self.latest = name
        return name

    def input(
        self, dtype: str, image: bool, zero_point: bool, size: tuple[int, int] | None = None, channels: int = 0
    ) -> str:
        sides = (self.between(1, 12), self.between(1, 12))
        if self.chance(0.15):
            sides = self.pick(
                ((1, 1), (self.between(1, 3), self.pick(LONG_SIDES)), (self.pick(LONG_SIDES), self.between(1, 3)))
            )
        sides = sides if size is None else size
        channels = channels or self.pick([c for c in CHANNELS if c <= 33 or sides[0] * sides[1] <= 9])
        shape = (*sides, channels) if image else (channels,)
        attrs: dict[str, Any] = {"shape": shape, "dtype": dtype}
        if dtype == "uint8":
            z = self.rng.integers(0, 256, channels) if zero_point else np.zeros(channels, int)
            if self.chance(0.3):
                z[:] = z[0]
            if zero_point and not z.any():
                z[0] = 255
            attrs["zero_point"] = tuple(int(v) for v in z)
        return self.node("input", (), 255.0 if dtype == "uint8" else 8.0, attrs)

    def mul(self, v: str) -> str:
        scale = float(self.pick((1.0, 4.0, 0.5))) / max(self.bound[v], 1e-3)
        c = self.constant(self.types[v].channels, scale * 2)
        return self.node("mul", (v,), self.bound[v] * float(np.abs(c).max()), factor=Tensor(c))

    def add(self, v: str, other: str = "constant") -> str:
        if other != "constant":
            return self.node("add", (v, other), self.bound[v] + self.bound[other])
        c = self.constant(self.types[v].channels, max(self.bound[v] / 4, 1e-3))
        return self.node("add", (v,), self.bound[v] + float(np.abs(c).max()), term=Tensor(c))

    def prelu(self, v: str) -> str:
        c = self.constant(self.types[v].channels, 0.5)
        if self.special != "negative" and self.chance(0.6):
            c = np.abs(c)
        return self.node("prelu", (v,), self.bound[v] * max(1.0, float(np.abs(c).max())), slope=Tensor(c))

    def relu(self, v: str) -> str:
        return self.node("relu", (v,), self.bound[v])

    def clip(self, v: str) -> str:
        low, high = sorted(float(np.float32(b)) for b in self.rng.normal(size=2) * self.bound[v] / 2)
        return self.node("clip", (v,), max(abs(low), abs(high)), {"low": low, "high": high})

    def cast(self, v: str, dtype: str) -> str:
        if dtype == "float16" and self.bound[v] > 3e4:
            v = self.mul(v)
        return self.node("cast", (v,), self.bound[v] * 1.01, {"dtype": dtype})

    def quantize(self, v: str, kind: str, bits: int) -> str:
        attrs: dict[str, Any] = {"kind": kind, "bits": bits}
        if kind != "bipolar":
            step = 2.0 ** (bits - 1) / max(self.bound[v], 1e-3) * 2
            attrs["reciprocal"] = float(2.0 ** np.round(np.log2(step))) if self.chance(0.5) else float(np.float32(step))
        return self.node("quantize", (v,), float(2**bits), attrs)

    def real(self, v: str, dtype: str = "") -> str:
        """A float value from v, of `dtype` if given."""
        if self.types[v].dtype not in REAL:
            v = self.mul(v)
        if dtype and self.types[v].dtype != dtype:
            v = self.cast(v, dtype)
        return v

    def weight(self, shape: tuple[int, ...], kind: str, bits: int | None, end: str = "") -> Tensor:
        if kind == "float32":
            return Tensor((self.rng.normal(size=shape)).astype(np.float32))
        bits = bits or int(self.pick(BITS[kind]))
        table: tuple[int, ...] = ()
        if kind == "table":
            table = tuple(sorted(int(t) for t in self.rng.choice(np.arange(-127, 128), 2**bits, replace=False)))
        codes = Codes(kind, bits, table)
        if end or self.chance(0.1):
            index = np.full(shape, ENDS[end or self.pick(tuple(ENDS))] % 2**bits)
        elif self.chance(0.2):  # extremes only
            index = self.rng.integers(0, 2, shape) * (2**bits - 1)
        else:
            index = self.rng.integers(0, 2**bits, shape)
        return Tensor(codes.values[index], codes)

    def steps(self) -> tuple[int, int]:
        return (self.pick(STEPS), self.pick(STEPS)) if self.chance(0.35) else (1, 1)

    def window(
        self, v: str, kernel: tuple[int, int], dilation: tuple[int, int], stride: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Stride and padding that fit."""
        h, w, _ = self.types[v].shape
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = (0, 0, 0, 0)
        if self.chance(0.4):
            padding = (extent[0] // 2, extent[1] // 2, extent[0] // 2, extent[1] // 2)
        elif self.chance(0.5):
            padding = tuple(self.between(0, extent[i % 2] - 1) for i in range(4))
        if h + padding[0] + padding[2] < extent[0] or w + padding[1] + padding[3] < extent[1]:
            padding = (extent[0] - 1, extent[1] - 1, extent[0] - 1, extent[1] - 1)  # a map smaller than the kernel
        return {"stride": stride or self.steps(), "padding": padding}

    def offsets(self, v: str, weight: Tensor, which: str) -> tuple[dict[str, Tensor], float]:
        """Offsets of a product of codes, as asked for ("none" too) or by chance, and the bound of the product's value."""
        outputs, size = len(weight.data), weight.data[0].size
        total = np.abs(weight.data).astype(np.float64).reshape(outputs, -1).sum(axis=1)
        which = which or (self.pick(OFFSETS) if self.chance(0.25) else "none")
        if self.types[v].codes is None or weight.codes is None or which == "none":
            return {}, self.bound[v] * float(total.max())
        constants, bound = {}, self.bound[v]
        if which in ("input", "both"):
            constants["input_offset"] = Tensor(self.constant(1, bound / 4))
            bound += float(np.abs(constants["input_offset"].data).max())
        if which in ("weight", "both"):
            constants["weight_offset"] = Tensor(self.constant(outputs, float(np.abs(weight.data).max()) / 4 + 0.1))
            total = total + size * np.abs(constants["weight_offset"].data)
        return constants, bound * float(total.max())

    def conv2d(
        self,
        v: str,
        kind: str = "",
        bits: int | None = None,
        offset: str = "",
        end: str = "",
        kernel: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        dilation: tuple[int, int] | None = None,
        groups: int | None = None,
        filters: int | None = None,
    ) -> str:
        kind = kind or self.pick(WEIGHTS)
        h, w, channels = self.types[v].shape
        slow = kind == "float32" or self.types[v].codes is None
        # the map may grow by its padding
        kernels = [k for k in KERNELS if k[0] * k[1] * (h + k[0]) * (w + k[1]) * channels * 16 <= PRODUCTS]
        kernel = kernel or self.pick([k for k in kernels if not slow or k[0] * k[1] * channels <= 500] or [(1, 1)])
        dilation = dilation or self.steps()
        each = kernel[0] * kernel[1] * h * w * channels
        words = [g for g in range(2, channels // 32 + 1) if channels % (32 * g) == 0]  # groups of whole words
        if groups is None:
            groups = 1
            if words and self.chance(0.3):
                groups = self.pick(words)
                filters = groups * 32 * self.pick([1] if each * groups * 64 > PRODUCTS else [1, 2, 5])
            elif self.chance(0.1):
                groups = filters = channels
            elif self.chance(0.2):
                groups = self.pick([g for g in range(1, channels + 1) if channels % g == 0])
                each_group = self.pick((1, 2, 3, 16, 17, 33))
                filters = groups * (each_group if groups * each_group <= 257 else 1)
        filters = filters or self.pick([c for c in CHANNELS if c * each <= PRODUCTS] or [1])
        weight = self.weight((filters, *kernel, channels // groups), kind, bits, end)
        constants, bound = self.offsets(v, weight, offset)
        attrs = {**self.window(v, kernel, dilation, stride), "dilation": dilation, "groups": groups}
        return self.node("conv2d", (v,), bound, attrs, weight=weight, **constants)

    def block(self, v: str) -> str:
        """What networks are made of and the engine fuses: product of codes -> float steps -> (residual) -> quantize."""
        image = len(self.types[v].shape) == 3
        if self.types[v].codes is None and self.chance(0.9):
            kind = self.pick(("bipolar", "bipolar", "unsigned"))
            v = self.quantize(self.real(v), kind, 1 if kind == "bipolar" else int(self.pick(BITS[kind])))
        kind = "bipolar" if self.chance(0.8) else self.pick(WEIGHTS)
        bits = 1 if kind == "bipolar" and self.chance(0.9) else None
        v = self.mul(self.conv2d(v, kind, bits) if image else self.linear(v, kind, bits))
        for _ in range(self.between(0, 3)):
            step = self.pick((self.add, self.add, self.prelu, self.relu, self.clip, self.mul))
            v = step(v)
        same = [n for n, o in self.types.items() if o.dtype in REAL and o.shape == self.types[v].shape and n != v]
        if same and self.chance(0.4):
            v = self.add(v, self.pick(same))
        if self.chance(0.3):
            v = self.cast(v, "float16")
        kind = self.pick(("bipolar", "bipolar", "bipolar", "signed"))
        return self.quantize(v, kind, 1 if kind == "bipolar" else int(self.pick(BITS[kind])))

    def chain(self, v: str) -> str:
        """Two products with float steps and a sign or a few bits between them that nothing else reads: what the engine makes
        thresholds of."""
        product = self.conv2d if len(self.types[v].shape) == 3 else self.linear
        if self.types[v].codes is None:
            v = self.quantize(self.real(v), "bipolar", 1)
        few = product == self.conv2d and self.chance(0.3)
        if few:
            v = self.few_bits(v)
        else:
            kind = self.pick(WEIGHTS[:4]) if self.chance(0.4) else "bipolar"
            v = product(v, kind, 1 if kind == "bipolar" else None, "none")
        v = self.mul(v)
        for _ in range(self.between(0, 3)):
            v = self.pick((self.add, self.relu, self.clip, self.mul, self.prelu))(v)
        if self.chance(0.3):
            v = self.cast(v, "float16")
        if few and self.chance(0.7):
            kind = self.pick(("unsigned", "signed"))
            bits = self.pick([b for b in BITS[kind] if b <= 5])
            return product(self.quantize(v, kind, bits), "bipolar", 2, "none", groups=1)
        return product(self.quantize(v, "bipolar", 1), "bipolar", 1)

    def few_bits(self, v: str) -> str:
        """Activations of at most 4 bits by weights of 1 or 2, to many filters: where tables beat products."""
        if self.types[v].channels < 32:
            v = self.conv2d(v, kernel=(1, 1), stride=(1, 1), groups=1, filters=self.pick((33, 64, 97)))
        kind = self.pick(("unsigned", "signed"))
        v = self.quantize(self.real(v), kind, self.pick([b for b in BITS[kind] if b <= 4]))
        h, w, channels = self.types[v].shape
        kernel = self.pick(SQUARE[:2])
        most = PRODUCTS // (kernel[0] * kernel[1] * h * w * channels)
        filters = self.pick([c for c in (64, 65, 96, 129, 192, 256, 257) if c <= most] or [1])
        kind = self.pick(("bipolar", "signed"))
        return self.conv2d(
            v, kind, 2 if kind == "signed" or self.chance(0.5) else 1, "none", kernel=kernel, filters=filters, groups=1
        )

    def linear(self, v: str, kind: str = "", bits: int | None = None, offset: str = "") -> str:
        channels = self.types[v].channels
        filters = self.pick([c for c in CHANNELS if c * channels <= PRODUCTS])
        weight = self.weight((filters, channels), kind or self.pick(WEIGHTS), bits)
        constants, bound = self.offsets(v, weight, offset)
        return self.node("linear", (v,), bound, weight=weight, **constants)

    def pool(self, v: str, op: str) -> str:
        kernel = self.pick([(1, 1), (2, 2), (3, 3), (3, 2), (1, 5)])
        attrs = {**self.window(v, kernel, (1, 1)), "kernel": kernel}
        if op == "avg_pool":
            attrs["count_include_pad"] = self.chance(0.5)
        return self.node(op, (v,), self.bound[v], attrs)

    def shuffle(self, v: str) -> str:
        channels = self.types[v].channels
        factor = int(self.pick([r for r in (1, 2, 3) if channels % (r * r) == 0]))
        return self.node("pixel_shuffle", (v,), self.bound[v], {"factor": factor})

    def resize(self, v: str, factor: int = 0, one: bool = False) -> str:
        if one:
            v = self.same(v, 1)
        return self.node("resize_bicubic", (v,), self.bound[v] * 2, {"factor": factor or self.pick((2, 3, 4))})

    def same(self, v: str, filters: int) -> str:
        """A float convolution that keeps the size of the map."""
        k = self.pick((3, 1, 5))
        attrs = {"stride": (1, 1), "dilation": (1, 1), "padding": (k // 2,) * 4, "groups": 1}
        weight = self.weight((filters, k, k, self.types[v].channels), "float32", None)
        bound = self.bound[v] * float(np.abs(weight.data).reshape(filters, -1).sum(axis=1).max())
        return self.node("conv2d", (v,), bound, attrs, weight=weight)

    def upscale(self, v: str) -> str:
        """How super-resolution ends: a shuffled convolution and an enlarged picture, added; one channel all the way."""
        r = self.pick((2, 3, 4))
        picture = v if self.types[v].channels == 1 else self.mul(self.same(v, 1))
        body = self.mul(self.same(v, r * r))
        steps = (self.mul, self.add, self.prelu, self.relu, self.clip)
        parts = []
        for part in self.rng.permutation(2):
            w = self.resize(self.real(picture, "float32"), r) if part else None
            w = w or self.node("pixel_shuffle", (body,), self.bound[body], {"factor": r})
            for _ in range(self.between(0, 2)):
                w = self.pick(steps)(w)
            if self.chance(0.2):
                w = self.cast(w, "float16")
            parts.append(w)
        v = self.node("add", tuple(parts), self.bound[parts[0]] + self.bound[parts[1]])
        for _ in range(self.between(0, 2)):
            v = self.pick(steps)(v)
        match self.between(0, 4):
            case 1:
                return self.same(v, self.pick((1, 4, 17)))
            case 2:
                return self.quantize(v, "bipolar", 1)
            case 3:
                return self.cast(v, "float16")
        return v

    def concat(self, v: str) -> str:
        t = self.types[v]
        others = [
            n
            for n, o in self.types.items()
            if (o.dtype, o.codes, o.shape[:-1]) == (t.dtype, t.codes, t.shape[:-1]) and o.channels + t.channels < 200
        ]
        parts = (v, *(self.pick(others or [v]) for _ in range(self.between(1, 2))))
        return self.node("concat", parts, max(self.bound[p] for p in parts))

    def flatten(self, v: str) -> str:
        return self.node("flatten", (v,), self.bound[v])

    # --- whole graphs ---

    def step(self, v: str) -> str:
        """One random op on v."""
        t = self.types[v]
        image = len(t.shape) == 3
        pixels = bool(t.codes and t.codes.zero_point)
        if self.bound[v] > 1e6:
            return self.mul(v)
        options = ["mul"] + (["chain"] * 5 + ["block"] * 5 if t.dtype != "int32" else [])
        if image and int(np.prod(t.shape)) <= 600:
            options.append("flatten")
        if t.dtype != "int32":
            options += ["conv2d", "conv2d", "conv2d"] if image else ["linear"]
        if not pixels:
            if image:
                small = t.shape[0] * t.shape[1] < 200
                options += ["shuffle"] if t.channels % 4 == 0 and small else []
                options += ["resize"] if t.dtype == "float32" and small and t.channels < 40 else []
                options += ["upscale"] if t.dtype in REAL and small and t.channels < 40 else []
            if t.channels < 100:
                options.append("concat")
            if t.dtype != "int32" and image:
                options += ["max_pool", "avg_pool", "global_avg_pool"]
        if t.dtype in REAL:
            options = (
                ["conv2d" if image else "linear", "chain", "block"]
                if self.chance(0.3)
                else [o for o in options if o not in ("conv2d", "linear")]
            )
            options += ["add", "add_value", "add_value", "prelu", "relu", "clip", "cast", "half", "half"] + [
                "quantize"
            ] * 5
        op = self.pick(options)
        match op:
            case "max_pool" | "avg_pool":
                return self.pool(v, op)
            case "global_avg_pool":
                return self.node(op, (v,), self.bound[v])
            case "quantize":
                kind = self.pick(("bipolar", "bipolar", "unsigned", "signed"))
                return self.quantize(v, kind, 1 if kind == "bipolar" else int(self.pick(BITS[kind])))
            case "cast":
                return self.cast(v, self.pick(REAL))
            case "half":
                return self.cast(v, "float16")
            case "add_value":
                same = [n for n, o in self.types.items() if o.dtype in REAL and o.shape == t.shape]
                return self.add(v, self.pick(same))
            case "conv2d" | "linear":
                sign = t.codes is not None and t.codes.kind == "bipolar"
                one = sign and self.chance(0.7)
                return getattr(self, op)(v, "bipolar" if one else "", 1 if one else None)
        return getattr(self, op)(v)

    def finish(self) -> Graph:
        """Every value used: loose ends go through one concat of vectors, a single one is the output as it is."""
        used = {i for n in self.nodes for i in n.inputs}
        loose = [n.name for n in self.nodes if n.name not in used]
        if len(loose) > 1:
            ends = []
            for v in loose:
                t = self.types[v]
                if t.dtype == "int32" or t.codes is not None:
                    v = self.mul(v)
                if len(t.shape) == 3 and int(np.prod(t.shape)) > 300:
                    v = self.node("global_avg_pool", (v,), self.bound[v])
                if len(self.types[v].shape) == 3:
                    v = self.flatten(v)
                if self.types[v].dtype == "float16":
                    v = self.cast(v, "float32")
                ends.append(v)
            self.latest = self.node("concat", tuple(ends), 0.0)
        else:
            self.latest = loose[0]
        self.node("output", (self.latest,), 0.0)
        return Graph(tuple(self.nodes), self.tensors)


def draw(seed: int, ask: dict[str, Any] | None = None, steps: int = 8) -> Graph:
    """A random Graph. `ask` names an `op`, the type `x` of its input, a weight kind `w`, widths: it holds that node."""
    return compose(Choices(seed), ask, steps)


def compose(choices: Choices, ask: dict[str, Any] | None = None, steps: int = 8) -> Graph:
    """As `draw`, from any choices."""
    ask = ask or {}
    d = Draw(choices, ask.get("special", ""))
    x, op = ask.get("x", ""), ask.get("op", "")
    vector = op == "linear" or (op in ("quantize", "mul", "output", "concat") and d.chance(0.2))
    exactly = {"size": ask.get("map"), "channels": ask.get("channels", 0)}
    dtype = ask.get("input", "uint8" if x == "pixels" else d.pick(("uint8", "uint8", "float32")))
    v = d.input(dtype, image=not vector or d.chance(0.3), zero_point=x == "pixels" or d.chance(0.5), **exactly)
    product = {"kind": ask.get("w", ""), "bits": ask.get("bits"), "offset": ask.get("offset", "")}
    product |= {k: ask[k] for k in ("kernel", "stride", "dilation", "groups", "filters") if k in ask}
    product |= {"end": ask["all"]} if "all" in ask else {}
    if len(d.types[v].shape) == 3 and vector:
        v = d.flatten(v)
    if x and x != "pixels":
        if not any(exactly.values()) and op != "linear" and d.chance(0.5):
            v = d.linear(v) if vector else d.conv2d(v)
        match x:
            case "bipolar" | "unsigned" | "signed" | "codes":
                kind = d.pick(("bipolar", "unsigned", "signed")) if x == "codes" else x
                bits = ask.get("bits_x") or (1 if kind == "bipolar" else int(d.pick(BITS[kind])))
                v = d.quantize(d.real(v), kind, bits)
            case "int32":
                if d.types[v].codes is None:
                    v = d.quantize(d.real(v), "bipolar", 1)
                kind = d.pick(WEIGHTS[:-1])
                v = d.linear(v, kind, offset="none") if vector else d.conv2d(v, kind, offset="none")
            case _:
                v = d.real(v, x)
    match op:
        case "conv2d" | "linear":
            v = getattr(d, op)(v, **product)
        case "quantize":
            v = d.quantize(v, "bipolar", 1)
        case "cast":
            v = d.cast(v, ask["dtype"])
        case "add":
            v = d.add(v) if ask["y"] == "constant" else d.add(v, d.real(d.prelu(v), ask["y"]))
        case "max_pool" | "avg_pool":
            v = d.pool(v, op)
        case "global_avg_pool":
            v = d.node(op, (v,), d.bound[v])
        case "pixel_shuffle":
            v = d.shuffle(d.same(v, d.pick((4, 9))) if ask.get("one") else v)
        case "resize_bicubic":
            v = d.resize(v, ask.get("factor", 0), ask.get("one", False))
        case "upscale":
            v = d.upscale(v)
        case "mul" | "prelu" | "relu" | "clip" | "concat" | "flatten":
            v = getattr(d, op)(v)
        case "output":
            steps = 0
    straight = d.chance(0.5)  # every value has one reader: what fuses into thresholds
    for _ in range(d.between(min(1, steps), steps)):
        older = [n for n, t in d.types.items() if int(np.prod(t.shape)) <= 20_000]
        v = d.step(d.latest if straight or (d.chance(0.75) and d.latest in older) else d.pick(older))
    return d.finish()


def with_offsets(graph: Graph, seed: int = 0) -> Graph:
    """`graph` with both offsets on every product of codes; steps behind it must take float32."""
    rng = np.random.default_rng(seed)
    types = graph.validate()
    nodes, tensors = [], dict(graph.tensors)
    for node in graph.nodes:
        weight = tensors.get(node.params.get("weight", ""))
        if weight is not None and weight.codes and types[node.inputs[0]].codes:
            names = {role: f"{node.name}.{role}" for role in ("input_offset", "weight_offset")}
            tensors[names["input_offset"]] = Tensor(rng.normal(size=1))
            tensors[names["weight_offset"]] = Tensor(rng.normal(size=len(weight.data)))
            node = replace(node, params={**node.params, **names})
        nodes.append(node)
    return Graph(tuple(nodes), tensors, graph.meta)


def describe(graph: Graph) -> str:
    """One line a node: what a failing Graph is made of."""
    lines = []
    for node in graph.nodes:
        constants = {role: graph.tensors[name] for role, name in node.params.items()}
        parts = [f"{role} {t.data.shape} {t.codes or t.data.reshape(-1)[:4]}" for role, t in constants.items()]
        parts += [f"{key}={value}" for key, value in node.attrs.items()]
        lines.append(f"{node.name} = {node.op}({', '.join(node.inputs)})  {'; '.join(parts)}")
    return "\n".join(lines)


def inputs(graph: Graph, seed: int, batch: int) -> np.ndarray:
    """A batch for `graph`: pixels with many extremes, floats with -0.0, denormals, ties and short numbers."""
    rng = np.random.default_rng(seed)
    shape = (batch, *graph.input.attrs["shape"])
    whole = rng.random((batch, *(1,) * (len(shape) - 1)))  # some images are of one extreme altogether
    if graph.input.attrs["dtype"] == "uint8":
        x = rng.integers(0, 256, shape)
        x[rng.random(shape) < 0.2] = 255
        x[rng.random(shape) < 0.2] = 0
        return np.where(whole < 0.05, 0, np.where(whole < 0.1, 255, x)).astype(np.uint8)
    x = rng.normal(size=shape)
    short = rng.random(shape) < 0.5
    x[short] = np.round(x[short] * 2) / 2
    x[rng.random(shape) < 0.1] = -0.0
    x[rng.random(shape) < 0.02] = DENORMAL[rng.integers(len(DENORMAL))]
    return np.where(whole < 0.05, -8, np.where(whole < 0.1, 8, np.clip(x, -8, 8))).astype(np.float32)
