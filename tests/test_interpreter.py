"""The interpreter against numbers worked out by hand, and against PyTorch where PyTorch is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowbit import Codes, Node, Tensor
from lowbit.interpreter import bicubic_taps, mirrored
from lowbit.pictures import imresize
from test_graph import chain, constant, conv, sign


def run(*nodes: Node, x: np.ndarray, tensors: dict | None = None, **attrs):
    return chain(*nodes, tensors=tensors, shape=x.shape[1:], **attrs).run(x)


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(1, 1, len(values), 1)


def test_sign_of_zeros() -> None:
    assert run(sign(), x=row(-0.0, 0.0, -1e-45, 1e-45, -3, 3)).ravel().tolist() == [1, 1, -1, 1, -1, 1]


def test_quantize_rounds_ties_to_even_and_clamps() -> None:
    node = Node("quantize", "q", attrs={"kind": "unsigned", "bits": 2, "reciprocal": 2.0})
    assert run(node, x=row(0.25, 0.75, 1.25, -0.25, 5, 3e38)).ravel().tolist() == [0, 2, 2, 0, 3, 3]
    node = Node("quantize", "q", attrs={"kind": "signed", "bits": 3, "reciprocal": 1.0})
    assert run(node, x=row(-0.5, -1.5, 2.5, 3.5, -4.6, -9)).ravel().tolist() == [0, -2, 2, 3, -4, -4]


def test_padding_is_zero_not_plus_one() -> None:
    w = Tensor(np.ones((1, 3, 3, 1), np.int16), Codes("bipolar", 1))
    x = np.ones((1, 3, 3, 1), np.float32)
    assert run(sign(), conv(), x=x, tensors={"w": w})[0, :, :, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_integer_convolution_is_pytorchs(kernel, stride, dilation, groups) -> None:
    g = np.random.default_rng(1)
    codes = Codes("signed", 8)
    w = g.integers(-128, 128, (6, *kernel, 6 // groups)).astype(np.int16)
    x = g.integers(0, 256, (2, 11, 9, 6)).astype(np.uint8)
    zero = (3, 0, 255, 7, 128, 1)
    pad = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    node = conv(stride=stride, dilation=dilation, groups=groups, padding=(*pad, *pad))
    acc = run(node, x=x, tensors={"w": Tensor(w, codes)}, dtype="uint8", zero_point=zero)
    centred = torch.from_numpy(x.astype(np.float64) - np.array(zero)).permute(0, 3, 1, 2)
    expected = F.conv2d(
        centred, torch.from_numpy(w.astype(np.float64)).permute(0, 3, 1, 2), None, stride, pad, dilation, groups
    )
    assert acc.dtype == np.int32
    assert np.array_equal(acc, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("roles", [("input_offset",), ("weight_offset",), ("input_offset", "weight_offset")])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_offsets_shift_codes_but_not_the_padding(kernel, stride, groups, roles) -> None:
    """Offsets of a few bits: every step is exact, so the value is PyTorch's convolution of the shifted numbers."""
    g = np.random.default_rng(1)
    w = g.integers(-128, 128, (6, *kernel, 6 // groups)).astype(np.int16)
    x = g.integers(0, 256, (2, 11, 9, 6)).astype(np.uint8)
    zero = (3, 0, 255, 7, 128, 1)
    offsets = {"input_offset": np.float32([-0.75]), "weight_offset": (np.arange(6, dtype=np.float32) - 2) / 4}
    offsets = {role: offsets[role] for role in roles}
    pad = tuple((k - 1) // 2 for k in kernel)
    node = conv(stride=stride, groups=groups, padding=(*pad, *pad))
    node = Node("conv2d", "c", params={"weight": "w", **{role: role for role in roles}}, attrs=node.attrs)
    tensors = {"w": Tensor(w, Codes("signed", 8)), **{role: Tensor(value) for role, value in offsets.items()}}
    out = run(node, x=x, tensors=tensors, dtype="uint8", zero_point=zero)
    centred = torch.from_numpy(x.astype(np.float64) - np.array(zero)).permute(0, 3, 1, 2)
    weight = torch.from_numpy(w.astype(np.float64)).permute(0, 3, 1, 2)
    if "input_offset" in roles:
        centred = centred - 0.75
    if "weight_offset" in roles:
        weight = weight + torch.from_numpy(offsets["weight_offset"].astype(np.float64)).view(-1, 1, 1, 1)
    expected = F.conv2d(centred, weight, None, stride, pad, 1, groups)
    assert out.dtype == np.float32
    assert np.array_equal(out, expected.permute(0, 2, 3, 1).numpy())


def test_offsets_are_added_in_one_order() -> None:
    """Numbers for which the order of docs/OPS.md, two others and the exact sum, rounded once, all give other bits."""
    f = np.float32
    w = Tensor(np.array([[1, -1, 1]], np.int16), Codes("bipolar", 1))
    x = np.array([[3.0, 1.0, -2.0]], np.float32)  # codes 1, 1, -1: acc -1, S 1, W 1, N 3
    dw, da = f(1 / 3), f(1 / 7)
    tensors = {"w": w, "a": constant(float(da)), "b": constant(float(dw))}
    node = Node("linear", "l", params={"weight": "w", "input_offset": "a", "weight_offset": "b"})
    out = run(sign(), node, x=x, tensors=tensors).item()
    t, count = f(f(-1) + dw), f(f(3) * f(dw * da))
    border = f(da + count)
    assert out == f(t + border)
    assert out != f(f(t + da) + count)
    assert out != f(f(f(-1) + border) + dw)
    assert out != f(-1 + float(dw) + float(da) + 3 * float(dw) * float(da))


def test_float_convolution_has_one_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32, in this order; any other order of three gives 1."""
    w = Tensor(np.ones((1, 1, 3, 1), np.float32))
    x = row(1e8, 1, -1e8)
    assert run(conv(padding=(0, 0, 0, 0)), x=x, tensors={"w": w}).item() == 0
    assert run(conv(padding=(0, 0, 0, 0)), x=row(1e8, -1e8, 1), tensors={"w": w}).item() == 1
    channels = x.reshape(1, 1, 1, 3)
    assert (
        run(conv(padding=(0, 0, 0, 0)), x=channels, tensors={"w": Tensor(np.ones((1, 1, 1, 3), np.float32))}).item()
        == 0
    )


def test_products_are_rounded_before_they_are_added() -> None:
    a = np.float32(1 + 2**-12)
    x = np.array([[a, 1]], np.float32)
    w = Tensor(np.array([[a, -1]], np.float32))
    out = run(Node("linear", "l", params={"weight": "w"}), x=x, tensors={"w": w}).item()
    assert out == float(np.float32(a * a) - np.float32(1))
    assert out != float(np.float32(float(a) * float(a) - 1))  # what a fused multiply-add would give


def test_elementwise_steps() -> None:
    x = row(-2, -0.0, 0, 3)
    assert run(Node("relu", "r"), x=x).ravel().tolist() == [0, 0, 0, 3]
    assert np.signbit(run(Node("relu", "r"), x=x)).sum() == 0
    assert run(Node("prelu", "p", params={"slope": "s"}), x=x, tensors={"s": constant(-0.5)}).ravel().tolist() == [
        1,
        0,
        0,
        3,
    ]
    assert run(Node("clip", "c", attrs={"low": -1.0, "high": 2.0}), x=x).ravel().tolist() == [-1, 0, 0, 2]
    assert run(Node("add", "a", ("in", "in")), x=x).ravel().tolist() == [-4, 0, 0, 6]
    third = run(Node("mul", "m", params={"factor": "f"}), x=x, tensors={"f": constant(1 / 3)})
    assert third.ravel()[3] == np.float32(3) * np.float32(1 / 3)


def test_cast_rounds_once_and_refuses_what_does_not_fit() -> None:
    out = run(Node("cast", "h", attrs={"dtype": "float16"}), x=row(1 + 2**-11, 1 + 3 * 2**-11, 65504))
    assert out.dtype == np.float16
    assert out.ravel().tolist() == [1.0, 1 + 2 * 2**-10, 65504.0]  # ties to even
    with pytest.raises(ValueError, match="h .cast.: a value beyond 65504"):
        run(Node("cast", "h", attrs={"dtype": "float16"}), x=row(65520))


@pytest.mark.parametrize("include", [True, False])
def test_pools_are_pytorchs(include: bool) -> None:
    x = np.random.default_rng(0).integers(-50, 50, (2, 7, 5, 3)).astype(np.float32)
    attrs = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 1, 1, 1)}
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    largest = run(Node("max_pool", "p", attrs=attrs), x=x)
    assert np.array_equal(largest, F.max_pool2d(nchw, (3, 2), 2, 1).permute(0, 2, 3, 1))
    mean = run(Node("avg_pool", "p", attrs={**attrs, "count_include_pad": include}), x=x)
    np.testing.assert_allclose(
        mean, F.avg_pool2d(nchw, (3, 2), 2, 1, count_include_pad=include).permute(0, 2, 3, 1), rtol=1e-6
    )
    mean = run(Node("global_avg_pool", "p"), x=x)
    assert mean.shape == (2, 1, 1, 3)
    np.testing.assert_allclose(mean[:, 0, 0], nchw.mean((2, 3)), rtol=1e-6, atol=1e-6)


def test_pixel_shuffle_concat_and_flatten() -> None:
    x = np.arange(2 * 2 * 3 * 8, dtype=np.float32).reshape(2, 2, 3, 8)
    out = run(Node("pixel_shuffle", "p", attrs={"factor": 2}), x=x)
    assert np.array_equal(out, F.pixel_shuffle(torch.from_numpy(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
    assert np.array_equal(run(Node("concat", "k", ("in", "in")), x=x), np.concatenate([x, x], 3))
    assert np.array_equal(run(Node("flatten", "f"), x=x), x.reshape(2, -1))


# Keys' cubic with a = -0.5 at 1/4, 3/4, 5/4 and 7/4, by hand
NEAR, MIDDLE, FAR, FARTHEST = 0.8671875, 0.2265625, -0.0703125, -0.0234375


def test_bicubic_taps_are_the_cubic_by_hand() -> None:
    first, coefficients = bicubic_taps(2)
    assert first.tolist() == [-2, -1]
    assert coefficients.tolist() == [[FARTHEST, MIDDLE, NEAR, FAR], [FAR, NEAR, MIDDLE, FARTHEST]]
    first, coefficients = bicubic_taps(3)
    assert first.tolist() == [-2, -1, -1]
    assert coefficients[1].tolist() == [0, 1, 0, 0]  # the middle third lies on a pixel
    third = [-1 / 27, 1 / 3, 7 / 9, -2 / 27]  # at 5/3, 2/3, 1/3, 4/3
    np.testing.assert_allclose(coefficients[0], third, rtol=1e-6)
    assert coefficients[2].tolist() == coefficients[0][::-1].tolist()
    first, coefficients = bicubic_taps(4)
    assert first.tolist() == [-2, -2, -1, -1]
    assert coefficients[3].tolist() == coefficients[0][::-1].tolist()
    for factor in (2, 3, 4):
        np.testing.assert_allclose(bicubic_taps(factor)[1].sum(axis=1), 1, atol=1e-7)


def test_mirrored_as_often_as_it_takes() -> None:
    assert mirrored(np.arange(-5, 8), 3).tolist() == [1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]
    assert mirrored(np.arange(-3, 4), 1).tolist() == [0] * 7


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 4), (2, 3), (24, 33)])
def test_resize_bicubic_is_imresize(factor: int, size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((2, *size, 3), np.float32)
    got = run(Node("resize_bicubic", "b", attrs={"factor": factor}), x=x)
    assert got.dtype == np.float32
    want = np.stack([imresize(image, factor) for image in x])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_resize_bicubic_rounds_every_step() -> None:
    x = row(1.1, 2.3, -5.7, 1e-3)
    got = run(Node("resize_bicubic", "b", attrs={"factor": 2}), x=x)[0, 0, :, 0]
    f = np.float32
    column = [((f(FARTHEST) * v + f(MIDDLE) * v) + f(NEAR) * v) + f(FAR) * v for v in x.ravel()]
    want = ((f(FAR) * column[0] + f(NEAR) * column[1]) + f(MIDDLE) * column[2]) + f(FARTHEST) * column[3]
    assert got[3] == want  # output 3 lies at 5/4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 6, 6, 4)), "must be a float32 array, got float64"),
        (np.zeros((6, 6, 4), np.float32), r"shape \(N, 6, 6, 4\), got \(6, 6, 4\)"),
        (np.zeros((0, 6, 6, 4), np.float32), "got .0, 6"),
        (np.zeros((1, 4, 6, 6), np.float32), "got .1, 4, 6, 6"),
        (np.full((1, 6, 6, 4), np.inf, np.float32), "infinities or NaN"),
        ([1, 2], "got list"),
    ],
)
def test_wrong_inputs_are_refused(x, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(Node("relu", "r")).run(x)


def test_trace_and_replace() -> None:
    from lowbit import interpreter

    graph = chain(
        Node("relu", "r"), Node("mul", "m", params={"factor": "f"}), tensors={"f": constant(2)}, shape=(1, 2, 1)
    )
    x = row(-1, 3)
    out, values = graph.run(x, trace=True)
    assert list(values) == ["in", "r", "m", "out"]
    assert out is values["out"]
    fed = interpreter.run(graph, x, replace=lambda name, v: v + 1 if name == "r" else v)
    assert fed.ravel().tolist() == [2, 8]
