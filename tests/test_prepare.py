"""prepare and the layers: edges, overrides, hard and soft, calibration, and that a prepared model is an ordinary module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train import (
    FlipCounter,
    HardBatchNorm1d,
    HardBatchNorm2d,
    Pixels,
    QuantConv2d,
    QuantLinear,
    Residual,
    StateBatchNorm1d,
    StateBatchNorm2d,
    auxiliary_loss,
    calibrate_batchnorm,
    freeze,
    parameter_groups,
    prepare,
    set_hard,
    update_state_batchnorm,
    weight_statistics,
)
from lowbit.train.layers import constant_weights
from lowbit.train.quantizers import WEIGHTS

PIXELS = Pixels((10, 120, 200), 1 / 64)


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.downsample = (
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(i, o, 1), nn.BatchNorm2d(o)) if stride > 1 else nn.Identity()
        )
        self.add = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.bn(self.conv(x)), self.downsample(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.stream = Residual()
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stream(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def images(n: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def net(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Net(), **{"image": PIXELS, **kwargs})


def kinds(model: nn.Module) -> dict[str, str]:
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, QuantConv2d | QuantLinear):
            inputs = type(m.input_quantizer).__name__ if m.input_quantizer else "float"
            out[name] = f"{type(m.weight_quantizer).__name__}{m.weight_quantizer.bits}/{inputs}"
        elif isinstance(m, nn.Conv2d | nn.Linear):
            out[name] = "float"
    return out


def test_int8_edges() -> None:
    assert kinds(net()) == {
        "stem": "Int88/PixelInput",
        "blocks.0.conv": "SLB1/SignActivation",
        "blocks.1.conv": "SLB1/SignActivation",
        "blocks.1.downsample.1": "Int88/Int8Activation",
        "fc": "float",
    }


def test_float_edges_and_no_edges() -> None:
    assert kinds(net(edges="float"))["stem"] == "Float32/PixelInput"
    assert kinds(net(edges="float"))["blocks.1.downsample.1"] == "float"
    assert kinds(net(edges="float", image=None))["stem"] == "float"
    assert kinds(net(edges="int8", image=None))["stem"] == "Int88/Int8Activation"
    none = kinds(net(edges="none", image=None, method="sign"))
    assert set(none.values()) == {"SignSTE1/SignActivation"}


def test_float_method_leaves_float_layers() -> None:
    model = net(method="float", activation_bits=32, edges="float", image=None)
    assert set(kinds(model).values()) == {"float"}
    x = images().float()
    torch.manual_seed(0)
    assert torch.equal(model.eval()(x), Net().eval()(x))


def test_float_without_bits_is_float_throughout() -> None:
    assert set(kinds(net(method="float", edges="float", image=None)).values()) == {"float"}
    asked = kinds(net(method="float", weight_bits=32, activation_bits=1, edges="float", image=None))
    assert set(asked.values()) == {"float", "Float32/SignActivation"}
    override = net(overrides={"blocks.0.*": {"method": "float"}}, image=None)
    assert kinds(override)["blocks.0.conv"] == "float"


def test_skip_and_overrides() -> None:
    model = net(
        skip=["blocks.0.*"],
        overrides={
            "blocks.1.conv": {"weight_bits": 2, "activation_bits": 4, "activation": "pact"},
            "fc": {"method": "sign", "weight_bits": 1},
        },
    )
    found = kinds(model)
    assert found["blocks.0.conv"] == "float"
    assert found["blocks.1.conv"] == "SLB2/PACT"
    assert found["fc"] == "SignSTE1/float"


def test_later_overrides_go_on_from_earlier_ones() -> None:
    """Options go with their quantizer: they stay while it does, and another one has the base's only where it is the base's."""

    def layers(overrides: dict, **options) -> list[QuantConv2d]:
        return list(prepare(nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(3)]), overrides=overrides, **options))

    wide = {"*": {"options": {"spread": 5}, "activation": "pact", "activation_options": {"alpha": 3.0}}}
    found = layers(wide | {"1": {"weight_bits": 2}}, edges="none", activation_bits=2)
    assert [m.weight_quantizer.spread for m in found] == [5, 5, 5]
    assert [m.weight_quantizer.bits for m in found] == [1, 2, 1]
    assert [m.input_quantizer.alpha.item() for m in found] == [3, 3, 3]
    found = layers({"*": {"method": "lns"}, "1": {"activation_bits": 2}}, edges="none", options={"spread": 2})
    assert [type(m.weight_quantizer).__name__ for m in found] == ["LNS"] * 3
    found = layers({"*": {"method": "lns"}, "1": {"method": "slb"}}, edges="none", options={"spread": 2})
    assert found[1].weight_quantizer.spread == 2
    found = layers({"0": {"activation_bits": 8}}, options={"spread": 2})
    assert type(found[0].weight_quantizer).__name__ == "Int8"


def test_the_model_itself_is_left_alone() -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prepare(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert isinstance(model.stem, nn.Conv2d)


def test_a_layer_under_two_names_stays_one() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = prepare(nn.ModuleList([nn.Conv2d(4, 4, 1), shared, shared, nn.Conv2d(4, 4, 1)]))
    assert model[1] is model[2]
    assert isinstance(model[1], QuantConv2d)


def test_a_single_layer_can_be_prepared() -> None:
    assert isinstance(prepare(nn.Conv2d(4, 4, 3), edges="none"), QuantConv2d)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "slab"}, "did you mean 'slb'"),
        ({"weight_bits": 3}, "'slb' has 1, 2, 4 weight bits, not 3"),
        ({"method": "sign", "weight_bits": 2}, "'sign' has 1 weight bit, not 2: methods with 2 weight bits are .*slb"),
        ({"activation_bits": 9}, "'dorefa' has 1, 2, 3, 4, 5, 6, 7, 8 activation bits, not 9"),
        ({"activation": "relu"}, "unknown activation quantizer"),
        (
            {"activation": "sign", "activation_bits": 2},
            "'sign' has 1 activation bit, not 2: activations with 2 activation bits are dorefa",
        ),
        ({"edges": "int4"}, "edges is"),
        ({"residual_dtype": "bfloat16"}, "residual_dtype is"),
        ({"skip": ["block.*"]}, "'block.\\*' matches no"),
        ({"overrides": {"blocks.*": {"bits": 2}}}, "unknown key 'bits'"),
        ({"overrides": {"blocks.*": {"weight_bits": 5}}}, "overrides\\['blocks.\\*'\\].*not 5"),
        ({"skip": "stem"}, "write skip=\\['stem'\\]"),
        ({"activation": "relu", "activation_bits": 32}, "unknown activation quantizer"),
        ({"options": {"temperature": 3}}, "'slb' has no option 'temperature': Known: init, learn_values, spread"),
        ({"activation_options": {"gradients": "clipped"}}, "did you mean 'gradient'"),
        ({"image": Pixels((1,), 1.0)}, "stem: image has 1 zero points"),
        ({"skip": ["stem"]}, "'stem'.*skipped"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net(**change)


def test_other_padding_modes_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="1: padding_mode='reflect'.*skip"):
        prepare(model)
    prepare(model, skip=["1"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_weights_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"1: has no weights, its shape is \(0, 4\)"):
        prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 2)))


def test_float16_needs_residuals() -> None:
    with pytest.raises(ValueError, match="Residual"):
        prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), residual_dtype="float16")
    assert {m.dtype for m in net(residual_dtype="float16").modules() if isinstance(m, Residual)} == {"float16"}


def test_prepared_models_are_not_prepared_again() -> None:
    with pytest.raises(ValueError, match="prepared already"):
        prepare(net())


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan")])
def test_pixels_are_checked(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        Pixels((1,), scale)
    with pytest.raises(ValueError, match="zero_point"):
        Pixels((1.5,), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero_point is a tuple"):
        Pixels(1, 1.0)  # type: ignore[arg-type]


# --- hard and soft ---

GEOMETRY = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (1, 5), "padding": (0, 2)},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "groups": 3, "padding": 1},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
]


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize(("method", "bits"), [(m, b) for m in WEIGHTS for b in WEIGHTS.get(m).allowed_bits if b < 32])
@pytest.mark.parametrize("activation_bits", [1, 4, 32])
def test_hard_convolution_is_the_float_one_of_decoded_numbers(
    geometry: dict, method: str, bits: int, activation_bits: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, bias=True, **geometry)
    quantizer = WEIGHTS.get(method)(bits)
    quantizer.attach(conv.weight)
    if activation_bits == 32 and quantizer.encode(quantizer.latent(conv.weight)).offset is not None:
        with pytest.raises(ValueError, match="have an offset and need inputs of 1 to 8 bits"):
            prepare(conv, method, bits, activation_bits, edges="none")
        return
    layer = prepare(conv, method, bits, activation_bits, edges="none").eval()
    x = torch.randn(2, 6, 9, 11)
    w = layer.weight_quantizer.encode(layer.weight).decode().double()
    inputs = x if layer.input_quantizer is None else layer.input_quantizer.encode(x) * layer.input_quantizer.scale
    keys = ("stride", "padding", "dilation", "groups")
    expected = F.conv2d(inputs.double(), w, layer.bias.double(), **{k: v for k, v in geometry.items() if k in keys})
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_hard_accumulators_are_exact_integers() -> None:
    torch.manual_seed(0)
    layer = prepare(nn.Conv2d(64, 32, 3, padding=1, bias=False), "slb", 4, 8, edges="none").eval()
    x = torch.rand(2, 64, 10, 10)
    codes = layer.input_quantizer.encode(x)
    w = layer.weight_quantizer.encode(layer.weight)
    acc = F.conv2d(codes.double(), w.codes.double(), padding=1)
    scale = w.scale * layer.input_quantizer.scale
    assert torch.equal(layer(x), acc.float() * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), acc.float() * scale)


def test_accumulators_beyond_float32_are_exact_too() -> None:
    layer = prepare(nn.Linear(70000, 2, bias=False), "slb", 4, 8, edges="none").eval()
    conv = prepare(nn.Conv2d(9000, 2, 3, bias=False), "slb", 4, 8, edges="none").eval()
    with torch.no_grad():
        for m in (layer, conv):
            m.weight.zero_()
            m.weight[-1] = 1.0  # all 15
    x = torch.ones(1, 70000)
    scale = layer.weight_quantizer.encode(layer.weight).scale * layer.input_quantizer.scale
    assert torch.equal(layer(x), torch.full((1, 2), 15.0 * 255 * 70000) * scale)
    assert torch.equal(conv(torch.ones(1, 9000, 3, 3)).view(1, 2), torch.full((1, 2), 15.0 * 255 * 81000) * scale)


def test_train_and_eval_set_hard() -> None:
    model = net()
    conv = model.blocks[0].conv
    assert not conv.hard
    model.eval()
    assert conv.hard
    assert model.stream.hard
    set_hard(model, False)
    assert not conv.hard
    model.eval().train()
    assert not conv.hard


def test_float16_stream_rounds_in_hard_evaluation_only() -> None:
    add = Residual()
    add.dtype = "float16"
    x, y = torch.tensor([0.1, 1000.1]), torch.tensor([0.2, 0.3])
    assert torch.equal(add(x, y), x + y)
    add.eval()
    assert torch.equal(add(x, y), (x + y).half().float())
    assert torch.equal(add(x), x.half().float())
    with pytest.raises(ValueError, match="one or two"):
        add(x, y, x)


def test_hard_layers_refuse_to_train() -> None:
    model = net().eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\)"):
        model(images()).sum().backward()


# --- calibration ---


def test_calibration_averages_the_batches_with_hard_weights() -> None:
    model = net()
    batches = [images(8, s) for s in range(3)]
    conv, bn = model.stem, model.bn
    assert calibrate_batchnorm(model, batches) == 3
    conv.eval()
    outputs = [conv(b) for b in batches]
    torch.testing.assert_close(bn.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert bn.momentum == 0.1
    assert model.training
    assert bn.training
    assert not model.blocks[0].conv.hard


def test_calibration_weighs_batches_by_their_size() -> None:
    """A short last batch is no more than its images, and one image alone goes with the batch before it."""
    model = net()
    conv, bn = model.stem, model.bn
    x = torch.cat([images(8, 0), images(4, 1) / 2])
    assert calibrate_batchnorm(model, [x[:8], x[8:]]) == 2
    conv.eval()
    y = conv(x)
    torch.testing.assert_close(bn.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, (2 * y[:8].var((0, 2, 3)) + y[8:].var((0, 2, 3))) / 3)
    assert calibrate_batchnorm(model, [x[:6], x[6:11], x[11:]]) == 3
    torch.testing.assert_close(bn.running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, (y[:6].var((0, 2, 3)) + y[6:].var((0, 2, 3))) / 2)
    features = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    norm = prepare(features, method="float", edges="none")
    z = torch.randn(5, 5)
    assert calibrate_batchnorm(norm, z.split(2)) == 3
    torch.testing.assert_close(norm[1].running_mean, norm[0].eval()(z).mean(0))


def test_calibration_of_single_images_stays_single() -> None:
    """Images of different sizes come one by one; nothing is put together."""
    model, other = net(), net()
    one_by_one = [images(1, s) for s in range(3)]
    assert calibrate_batchnorm(model, one_by_one) == 3
    model.stem.eval()
    outputs = [model.stem(x) for x in one_by_one]
    torch.testing.assert_close(model.bn.running_var, torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0))
    assert calibrate_batchnorm(other, [images(2, 0), images(1, 1)[..., :4]]) == 2


def test_calibration_without_batches_changes_nothing() -> None:
    model = net()
    model(images())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_batchnorm(model, [])

    with pytest.raises(ValueError, match=r"got a tuple: .* give \(x for x, _ in loader\)"):
        calibrate_batchnorm(model, [(images(), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"x\.split"):
        calibrate_batchnorm(model, images())

    def broken():
        yield images()
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        calibrate_batchnorm(model, broken())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_calibrated_evaluation_differs_from_uncalibrated() -> None:
    model = net()
    for s in range(20):
        model(images(8, s))
    before = model.eval()(images()).clone()
    calibrate_batchnorm(model, [images(8, s) for s in range(4)])
    assert not torch.equal(before, model(images()))


def test_state_batchnorm_keeps_two_statistics() -> None:
    model = net(state_batchnorm=True)
    norms = [m for m in model.modules() if isinstance(m, StateBatchNorm2d)]
    assert len(norms) == 4
    bn = model.blocks[0].bn
    model(images())
    soft = bn.running_mean.clone()
    assert not torch.equal(soft, torch.zeros_like(soft))
    assert torch.equal(bn.hard_mean, torch.zeros_like(soft))
    update_state_batchnorm(model, images())
    assert torch.equal(bn.running_mean, soft)
    assert not torch.equal(bn.hard_mean, torch.zeros_like(soft))
    assert model.training
    assert not bn.hard
    calibrate_batchnorm(model, [images()])
    assert torch.equal(bn.running_mean, soft)
    model.eval()
    y = model.blocks[0].conv(torch.randn(2, 8, 8, 8))
    expected = F.batch_norm(y, bn.hard_mean, bn.hard_var, bn.weight, bn.bias, False, 0.1, bn.eps)
    torch.testing.assert_close(bn(y), expected)
    set_hard(model, False)
    expected = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
    assert torch.equal(bn(y), expected)
    with pytest.raises(ValueError, match="state_batchnorm=True"):
        update_state_batchnorm(net(), images())


def of(kind: type, norm: nn.Module) -> nn.Module:
    """`norm` as prepare replaces it, which stays as it is."""
    layers = nn.Sequential(nn.Linear(1, 1), norm)
    new = prepare(layers, edges="none", state_batchnorm=kind in (StateBatchNorm1d, StateBatchNorm2d))[1]
    assert type(new) is kind
    return new


@pytest.mark.parametrize("kind", [HardBatchNorm1d, HardBatchNorm2d, StateBatchNorm1d, StateBatchNorm2d])
@pytest.mark.parametrize("affine", [True, False])
def test_a_hard_norm_rounds_twice(kind, affine: bool) -> None:
    """Against the definition in NumPy, bit for bit; PyTorch's evaluation, which rounds once, differs."""
    g = torch.Generator().manual_seed(0)
    one = kind.__name__.endswith("1d")
    plain = (nn.BatchNorm1d if one else nn.BatchNorm2d)(6, eps=1e-3, affine=affine)
    shape = (500, 6) if one else (20, 6, 7, 5)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn(6, generator=g))
        plain(torch.randn(shape, generator=g) * 3 + 1)
    norm = of(kind, plain).eval()
    x = torch.randn(shape, generator=g, requires_grad=True)
    w = plain.weight.detach().double().numpy() if affine else np.ones(6)
    b = plain.bias.detach().double().numpy() if affine else np.zeros(6)
    mean, var = plain.running_mean.double().numpy(), plain.running_var.double().numpy()
    factor = w / np.sqrt(var + plain.eps)
    view = (6,) if one else (6, 1, 1)
    expected = x.detach().numpy() * factor.astype(np.float32).reshape(view)
    expected += (b - mean * factor).astype(np.float32).reshape(view)
    y = norm(x)
    assert np.array_equal(y.detach().numpy().view(np.int32), expected.view(np.int32))
    fused = plain.eval()(x)
    assert not torch.equal(fused, y)
    torch.testing.assert_close(fused, y)
    # frozen statistics in a network that trains: the gradient is PyTorch's
    weight = torch.randn(shape, generator=g)
    inputs = [x, *plain.parameters()]
    theirs = torch.autograd.grad((fused * weight).sum(), inputs)
    ours = torch.autograd.grad((y * weight).sum(), [x, *norm.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    if not one:
        assert norm(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy.deepcopy(norm)(x), y)
    other = of(kind, (nn.BatchNorm1d if one else nn.BatchNorm2d)(6, eps=1e-3, affine=affine)).eval()
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other(x), y)
    if "State" not in kind.__name__:
        assert norm.state_dict().keys() == plain.state_dict().keys()  # checkpoints of either fit the other


def test_prepare_replaces_the_norms_it_knows() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Mine(3), nn.BatchNorm2d(3, track_running_stats=False))
    net[1].weight.requires_grad_(False)
    model = prepare(net.eval())
    assert [type(m) for m in model][1:] == [HardBatchNorm2d, Mine, nn.BatchNorm2d]
    assert (model[1].hard, model[1].training, model[1].weight.requires_grad) == (True, False, False)
    assert prepare(net.train())[1].hard is False
    assert type(net[1]) is nn.BatchNorm2d


def test_norms_keep_what_they_share() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[3].weight = net[1].weight
    net[3].bias = None
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    for state in (False, True):
        model = prepare(net, edges="none", state_batchnorm=state).eval()
        assert model[1].weight is model[3].weight
        with torch.no_grad():
            model(torch.randn(2, 3, 4, 4))
    assert seen == [1, 1]


def test_state_batchnorm_takes_the_place_of_any_norm() -> None:
    float64 = nn.BatchNorm1d(3, eps=0.5, momentum=0.2).double()
    float64.weight.requires_grad_(False)
    model = prepare(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), float64), edges="none", state_batchnorm=True)
    norm = model[2]
    assert isinstance(norm, StateBatchNorm1d)
    assert (norm.eps, norm.momentum, norm.weight.dtype, norm.hard_var.dtype) == (0.5, 0.2, torch.double, torch.double)
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (False, True)
    with pytest.raises(ValueError, match="2D or 3D input"):
        norm.eval()(torch.zeros(1, 3, 2, 2))
    for other, what in (
        (nn.BatchNorm1d(3, track_running_stats=False), "1: .*not BatchNorm1d without running statistics"),
        (nn.BatchNorm3d(3), "1: .*BatchNorm1d and BatchNorm2d .*, not BatchNorm3d"),
    ):
        with pytest.raises(ValueError, match=what):
            prepare(nn.Sequential(nn.Linear(3, 3), other), state_batchnorm=True)


def test_hard_statistics_are_measured_in_float32() -> None:
    torch.manual_seed(0)
    plain, cast = (net(state_batchnorm=True) for _ in range(2))
    cast.load_state_dict(plain.state_dict())
    update_state_batchnorm(plain, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update_state_batchnorm(cast, images())
    assert all(torch.equal(v, cast.state_dict()[k]) for k, v in plain.state_dict().items())


# --- an ordinary module ---


def test_deepcopy_and_state_dict() -> None:
    model = net(overrides={"blocks.1.conv": {"weight_bits": 2}})
    model(images()).sum().backward()
    twin = copy.deepcopy(model)
    other = net(overrides={"blocks.1.conv": {"weight_bits": 2}}, options={"init": "random"})
    other.load_state_dict(model.state_dict())
    x = images(4, 1)
    expected = model.eval()(x)
    assert torch.equal(twin.eval()(x), expected)
    assert torch.equal(other.eval()(x), expected)
    with torch.no_grad():
        twin.blocks[0].conv.weight.neg_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", ["sign", "slb"])
def test_torch_compile(method: str) -> None:
    model = net(method=method)
    compiled = torch.compile(model, backend="aot_eager")
    x = images()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-2, atol=1e-2)
    model.eval()
    assert torch.equal(torch.compile(model, backend="aot_eager")(x), model(x))


def test_autocast_clipping_and_averaging() -> None:
    model = net()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images()).float().square().mean() + auxiliary_loss(model)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm.isfinite()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.eval()
    assert averaged(images()).isfinite().all()


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = net(activation="pact", activation_bits=2)
    groups = parameter_groups(model, lr=0.1, weight_decay=1e-4, latent_lr_scale=10, latent_weight_decay=1e-5)
    assert [g["name"] for g in groups] == ["latent", "weights", "rest"]
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    latent = groups[0]
    assert [id(p) for p in latent["params"]] == [id(b.conv.weight) for b in model.blocks]
    assert (latent["lr"], latent["weight_decay"]) == (1.0, 1e-5)
    assert {id(b.conv.input_quantizer.alpha) for b in model.blocks} <= {id(p) for p in groups[1]["params"]}
    assert groups[2]["weight_decay"] == 0


def test_flip_counter_and_gap() -> None:
    model = net()
    counter = FlipCounter(model)
    assert counter.update() == {"flips_epoch": 0.0, "flips_start": 0.0}
    with torch.no_grad():
        model.blocks[0].conv.weight.neg_()
    total = sum(b.conv.weight.numel() for b in model.blocks)
    share = model.blocks[0].conv.weight.numel() / total
    assert counter.update() == {"flips_epoch": share, "flips_start": share}
    assert counter.update() == {"flips_epoch": 0.0, "flips_start": share}
    again = FlipCounter(model)
    again.load_state_dict(counter.state_dict())
    assert again.update() == {"flips_epoch": 0.0, "flips_start": share}
    assert weight_statistics(model).temperature == 1
    assert 0 < weight_statistics(model).gap < 2
    assert weight_statistics(net(method="sign")).gap == 0


def test_constant_weights_are_encoded_once_and_forgotten() -> None:
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), edges="none").eval()
    layer, x = model[0], torch.randn(3, 4)
    with constant_weights(model), torch.no_grad():
        before = model(x)
        layer.weight.neg_()  # which nobody may do: it shows that nothing is encoded again
        assert torch.equal(model(x), before)
        graph_inside = freeze(model, x)
    after = model(x)
    assert not torch.equal(after, before)
    assert layer._encoded is None
    assert freeze(model, x) != graph_inside
    with pytest.raises(RuntimeError, match="stop"), constant_weights(model):
        raise RuntimeError("stop")
    assert layer._encoded is None
    copy.deepcopy(model)
