"""Graph's own rules (docs/OPS.md): what is refused, and that messages name the node."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit import Codes, Graph, GraphError, Node, Tensor

BIPOLAR = Codes("bipolar", 1)


def weight(*shape: int, codes: Codes = BIPOLAR) -> Tensor:
    return Tensor(np.full(shape, codes.high, np.int16), codes)


def constant(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float32))


GEOMETRY = {"stride": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}


def chain(
    *nodes: Node, tensors: dict[str, Tensor] | None = None, shape: tuple[int, ...] = (6, 6, 4), **attrs: Any
) -> Graph:
    """input -> nodes -> output, each reading the one before unless it says otherwise."""
    first = Node("input", "in", (), attrs={"shape": shape, "dtype": "float32", **attrs})
    body, last = [], "in"
    for n in nodes:
        body.append(Node(n.op, n.name, n.inputs or (last,), n.params, n.attrs))
        last = n.name
    return Graph((first, *body, Node("output", "out", (last,))), tensors or {})


def sign(name: str = "q") -> Node:
    return Node("quantize", name, attrs={"kind": "bipolar", "bits": 1})


def conv(name: str = "c", **attrs: Any) -> Node:
    return Node("conv2d", name, params={"weight": "w"}, attrs={**GEOMETRY, **attrs})


def offset(role: str, value: Tensor, w: Tensor | None = None) -> Graph:
    """sign -> conv2d with one more constant."""
    node = Node("conv2d", "c", params={"weight": "w", role: "o"}, attrs=GEOMETRY)
    return chain(sign(), node, tensors={"w": w or weight(2, 3, 3, 4), "o": value})


def test_types_are_inferred() -> None:
    scale = Node("mul", "m", params={"factor": "f"})
    types = chain(sign(), conv(stride=(2, 2)), scale, tensors={"w": weight(8, 3, 3, 4), "f": constant(0.5)}).validate()
    assert str(types["q"]) == "1-bit bipolar 6x6x4"
    assert (types["c"].dtype, types["c"].shape) == ("int32", (3, 3, 8))
    assert (types["out"].dtype, types["out"].shape) == ("float32", (3, 3, 8))


def test_float_sides_make_float_products() -> None:
    assert chain(conv(), tensors={"w": weight(2, 3, 3, 4)}).validate()["c"].dtype == "float32"
    floats = Tensor(np.ones((2, 3, 3, 4), np.float32))
    assert chain(sign(), conv(), tensors={"w": floats}).validate()["c"].dtype == "float32"


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (Graph((), {}), "starts with an input"),
        (chain(Node("softmax", "s")), "s: unknown op 'softmax'"),
        (chain(Node("relu", "in")), "'in' is empty or used twice"),
        (chain(Node("relu", "r", ("later",))), "its input 'later' is no earlier node"),
        (chain(Node("relu", "r"), Node("relu", "s", ("in",))), "r .relu.: its value is used by no node"),
        (chain(Node("output", "o"), Node("relu", "r")), "o: a Graph has one input and one output"),
        (chain(Node("relu", "r"), tensors={"x": constant(1)}), "the constant 'x' is used by no node"),
        (chain(shape=(65536, 65536, 1)), "has 2.31 elements or more"),
        (chain(shape=(0, 4, 4)), "in .input.: a side is 1"),
        (chain(dtype="int8"), "dtype is uint8 or float32"),
        (chain(dtype="uint8", zero_point=(1, 2)), "zero_point must be 4 integers"),
        (chain(Node("mul", "m", params={"factor": "f"})), "m .mul.: the constant 'factor' .'f'. is missing"),
        (chain(Node("mul", "m", params={"factor": "f"}), tensors={"f": constant(1, 2)}), r"factor must be float32 of shape \(4,\)"),
        (chain(Node("mul", "m", params={"factor": "f"}), tensors={"f": constant(np.nan)}), "'f' holds infinities or NaN"),
        (chain(sign(), Node("relu", "r")), "r .relu.: takes float32 or float16, got 1-bit bipolar"),
        (chain(sign("a"), sign("b")), "b .quantize.: takes float32 or float16"),
        (chain(Node("quantize", "q", attrs={"kind": "bipolar", "bits": 2})), "bipolar activations have 1 bit"),
        (chain(Node("quantize", "q", attrs={"kind": "unsigned", "bits": 9, "reciprocal": 1.0})), "1 to 8 bits, not 9"),
        (chain(Node("quantize", "q", attrs={"kind": "unsigned", "bits": 2, "reciprocal": 0.0})), "reciprocal must be positive"),
        (chain(Node("quantize", "q", attrs={"kind": "unsigned", "bits": 2, "reciprocal": 0.1})), "finite float32, got 0.1"),
        (chain(Node("quantize", "q", attrs={"kind": "unsigned", "bits": 2})), "attribute 'reciprocal' is missing"),
        (chain(conv(groups=3), tensors={"w": weight(3, 3, 3, 4)}), "groups=3 must divide"),
        (chain(conv(), tensors={"w": weight(2, 3, 3, 5)}), "weight has 5 input channels a group, the input has 4"),
        (chain(conv(), tensors={"w": weight(2, 12, 1, 4)}), "kernels are 1..11"),
        (chain(conv(stride=(0, 1)), tensors={"w": weight(2, 3, 3, 4)}), "stride must be 2 integers in 1..8"),
        (chain(conv(stride=[1, 1]), tensors={"w": weight(2, 3, 3, 4)}), "stride must be"),
        (chain(conv(stride=(True, 1)), tensors={"w": weight(2, 3, 3, 4)}), "stride must be"),
        (chain(conv(padding=(3, 1, 1, 1)), tensors={"w": weight(2, 3, 3, 4)}), "padding .* not less than the kernel"),
        (chain(conv(padding=(0, 0, 0, 0)), tensors={"w": weight(2, 7, 3, 4)}), "larger than the padded input"),
        (chain(Node("linear", "l", params={"weight": "w"}), tensors={"w": weight(2, 4)}), "flatten images first"),
        (chain(Node("relu", "r", params={"slope": "w"}), tensors={"w": constant(1)}), "r .relu.: unknown constant 'slope'"),
        (chain(Node("mul", "m", params={"factor": "f", "input_offset": "f"}), tensors={"f": constant(1)}), "unknown constant 'input_offset'"),
        (offset("bias_offset", constant(1)), "c .conv2d.: unknown constant 'bias_offset'"),
        (offset("input_offset", constant(1, 2)), r"input_offset must be float32 of shape \(1,\) or \(1,\), got \(2,\)"),
        (offset("weight_offset", constant(1, 2, 3)), r"weight_offset must be float32 of shape \(2,\)"),
        (offset("weight_offset", weight(2)), "weight_offset must be float32"),
        (offset("weight_offset", constant(np.inf)), "'o' holds infinities or NaN"),
        (offset("input_offset", constant(1), Tensor(np.ones((2, 3, 3, 4)))), "input_offset is for codes with code weights"),
        (chain(Node("conv2d", "c", params={"weight": "w", "weight_offset": "o"}, attrs=GEOMETRY), tensors={"w": weight(2, 3, 3, 4), "o": constant(1)}), "weight_offset is for codes with code weights, the input is float32"),
        (chain(Node("cast", "t", attrs={"dtype": "bfloat16"})), "casts to float16 or float32"),
        (chain(Node("clip", "t", attrs={"low": 1.0, "high": 0.0})), "low is above high"),
        (chain(Node("pixel_shuffle", "p", attrs={"factor": 3})), "squared must divide the 4 channels"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": 1})), "b .resize_bicubic.: enlarges by 2..4, got the factor 1"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": 5})), "enlarges by 2..4"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": 2.0})), "enlarges by 2..4"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": True})), "enlarges by 2..4"),
        (chain(Node("resize_bicubic", "b")), "the attribute 'factor' is missing"),
        (chain(sign(), Node("resize_bicubic", "b", attrs={"factor": 2})), "takes float32, got 1-bit bipolar"),
        (chain(Node("cast", "h", attrs={"dtype": "float16"}), Node("resize_bicubic", "b", attrs={"factor": 2})), "takes float32, got float16"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": 2}), shape=(4,)), "takes an image"),
        (chain(Node("resize_bicubic", "b", attrs={"factor": 4}), shape=(16384, 16384, 1)), "2.31 elements or more"),
        (chain(Node("concat", "k")), "joins two values or more"),
        (chain(Node("global_avg_pool", "g"), Node("concat", "k", ("in", "g"))), "one type and size"),
        (chain(Node("global_avg_pool", "g"), Node("add", "a", ("in", "g"))), "adds values of one shape"),
        (chain(Node("avg_pool", "p", attrs={"kernel": (2, 2), "stride": (2, 2), "padding": (0,) * 4, "count_include_pad": 1})), "true or false"),
    ],
)  # fmt: skip
def test_broken_graphs_are_refused(graph: Graph, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        graph.validate()


def test_codes_outside_their_kind_are_refused() -> None:
    bad = Tensor(np.zeros((2, 3, 3, 4), np.int16), BIPOLAR)
    with pytest.raises(GraphError, match="'w': codes outside 1-bit bipolar"):
        chain(sign(), conv(), tensors={"w": bad}).validate()


def test_accumulators_have_32_bits() -> None:
    """The real weights count: one filter at the limit, one step below it."""
    pixels = {"dtype": "uint8", "zero_point": (0,) * 33025, "shape": (1, 1, 33025)}
    eight = Codes("bipolar", 8)
    w = np.full((1, 1, 1, 33025), 255, np.int16)
    graph = chain(conv(padding=(0,) * 4), tensors={"w": Tensor(w, eight)}, **pixels)
    assert 33025 * 255 * 255 < 2**31
    graph.validate()
    wide = {**pixels, "zero_point": (0,) * 33026, "shape": (1, 1, 33026)}
    w = np.full((1, 1, 1, 33026), 255, np.int16)
    with pytest.raises(GraphError, match="c .conv2d.: the accumulator could reach 2147515650"):
        chain(conv(padding=(0,) * 4), tensors={"w": Tensor(w, eight)}, **wide).validate()


def test_sums_of_the_input_have_32_bits_too() -> None:
    """With weights of 0 and 1 the accumulator may be small where the sum of the input's codes is not."""
    size = 65536 * 129
    codes = Codes("unsigned", 1)
    w = np.zeros((1, size), np.int16)
    body = [Node("flatten", "f"), Node("linear", "l", params={"weight": "w"})]
    pixels = {"dtype": "uint8", "zero_point": (0,), "shape": (65536, 129, 1)}
    chain(*body, tensors={"w": Tensor(w, codes)}, **pixels).validate()
    body[1] = Node("linear", "l", params={"weight": "w", "weight_offset": "o"})
    with pytest.raises(GraphError, match="l .linear.: the sum of the input could reach 2155806720, beyond 32 bits"):
        chain(*body, tensors={"w": Tensor(w, codes), "o": constant(1)}, **pixels).validate()


def test_products_with_offsets_are_floats() -> None:
    types = offset("input_offset", constant(0.5)).validate()
    assert (types["c"].dtype, types["c"].shape) == ("float32", (6, 6, 2))


def test_zero_points_go_to_products_only() -> None:
    pixels = {"dtype": "uint8", "zero_point": (1, 2, 3, 4)}
    pool = Node("max_pool", "p", attrs={"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0, 0, 0)})
    with pytest.raises(GraphError, match="p .max_pool.: pixels with a zero point"):
        chain(pool, **pixels).validate()
    types = chain(
        Node("flatten", "f"), Node("linear", "l", params={"weight": "w"}), tensors={"w": weight(2, 144)}, **pixels
    ).validate()
    assert types["f"].codes.zero_point == (1, 2, 3, 4) * 36
    assert (types["f"].codes.low, types["f"].codes.high) == (-4, 254)


def test_graphs_and_tensors_do_not_change() -> None:
    data = np.ones(4, np.float32)
    t = Tensor(data)
    data[0] = 5
    assert t.data[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        t.data[0] = 2
    node = sign()
    with pytest.raises(TypeError):
        node.attrs["bits"] = 2  # type: ignore[index]


def test_resized() -> None:
    graph = chain(sign(), conv(), tensors={"w": weight(2, 3, 3, 4)})
    assert graph.resized(9, 5).validate()["out"].shape == (9, 5, 2)
    flat = chain(Node("flatten", "f"), Node("linear", "l", params={"weight": "w"}), tensors={"w": weight(2, 144)})
    with pytest.raises(GraphError, match="l .linear."):
        flat.resized(7, 6)
    with pytest.raises(GraphError, match="a vector, not an image"):
        chain(shape=(4,)).resized(2, 2)
