"""AdaBin from training to the engine: the offsets of both sides, in every place that computes with them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.runtime import isas, load
from lowbit.train import FreezeError, Pixels, Schedule, calibrate_batchnorm, freeze, prepare
from lowbit.train.freeze import to_numpy
from lowbit.train.layers import QuantConv2d, QuantLayer, QuantLinear
from lowbit.train.models import build_model
from lowbit.train.prepare import parameter_groups
from lowbit.train.proof import prove
from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS
from lowbit.train.quantizers.adabin import AdaBin, AdaBinActivation

AVAILABLE = [isa for isa, available in isas().items() if available]
ADABIN = {"method": "adabin", "activation": "adabin"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the quantizers ---


def test_weights_keep_mean_and_spread() -> None:
    w = torch.randn(6, 4, 3, 3, generator=generator()) * 0.2 + torch.linspace(-1, 1, 6).view(-1, 1, 1, 1)
    encoded = AdaBin(1).encode(w)
    assert encoded.offset is not None
    torch.testing.assert_close(encoded.offset, w.mean((1, 2, 3)))
    torch.testing.assert_close(encoded.scale, w.std((1, 2, 3), correction=0))
    assert torch.equal(encoded.codes, torch.where(w < w.mean((1, 2, 3), keepdim=True), -1.0, 1.0))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_weight_gradient_is_autograds(progress: float) -> None:
    """alpha and beta are functions of w; the sign's gradient is the error decay estimator's."""
    q = AdaBin(1)
    q.anneal(progress)
    t = 0.001 * 10 ** (4 * progress)
    w = (torch.randn(3, 2, 3, 3, generator=generator(), dtype=torch.float64) * 0.3 + 0.1).requires_grad_()
    upstream = torch.randn(3, 2, 3, 3, generator=generator(1), dtype=torch.float64)
    beta = w.mean((1, 2, 3), keepdim=True)
    alpha = (w - beta).square().mean((1, 2, 3), keepdim=True).sqrt()
    z = (w - beta) / alpha
    slope = (max(1 / t, 1) * t * (1 - torch.tanh(t * z) ** 2)).detach()
    ((torch.sign(z).detach() + slope * (z - z.detach())) * alpha + beta).backward(upstream)
    ours = w.detach().float().requires_grad_()
    q.fake(ours).backward(upstream.float())
    torch.testing.assert_close(ours.grad, w.grad.float(), rtol=1e-4, atol=1e-5)


def test_a_filter_of_equal_weights_has_a_gradient() -> None:
    w = torch.full((2, 1, 3, 3), 0.25).requires_grad_()
    q = AdaBin(1)
    assert torch.equal(q.fake(w), q.encode(w).decode())
    q.fake(w).sum().backward()
    assert w.grad.isfinite().all()


def test_activation_gradients() -> None:
    """dq/dx = g(z), dq/dalpha = sign(z) - z g(z), dq/dbeta = 1 - g(z), z = (x - beta) / alpha."""
    q = AdaBinActivation(1, alpha=0.5, beta=0.25)
    x = torch.tensor([-3.0, 0.0, 0.25, 0.5, 0.75, 9.0]).requires_grad_()
    out = q.fake(x)
    assert out.tolist() == [-0.25, -0.25, 0.75, 0.75, 0.75, 0.75]
    upstream = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    out.backward(upstream)
    slope = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 0.0])
    z = torch.tensor([-6.5, -0.5, 0.0, 0.5, 1.0, 17.5])
    assert torch.equal(x.grad, slope * upstream)
    assert q.alpha_a.grad.item() == (upstream * (torch.tensor([-1.0, -1, 1, 1, 1, 1]) - z * slope)).sum().item()
    assert q.beta_a.grad.item() == (upstream * (1 - slope)).sum().item()


def test_alpha_stays_positive_and_can_come_back() -> None:
    q = AdaBinActivation(1)
    with torch.no_grad():
        q.alpha_a.fill_(-2.0)
    x = torch.tensor([-1.0, 1.0])
    assert q.scale.item() == np.float32(1e-3)
    assert torch.equal(q.fake(x), q.encode(x) * q.scale + q.offset)
    q.fake(x).backward(torch.tensor([1.0, -1.0]))
    assert q.alpha_a.grad.item() < 0  # descent raises it


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": float("nan")}, {"beta": float("inf")}])
def test_impossible_starts_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaBinActivation(1, **options)


def test_the_schedule_anneals() -> None:
    net = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), edges="none", **ADABIN)
    schedule = Schedule(net, 10)
    seen = []
    for step in (0, 5, 10):
        schedule.step(step)
        seen.append(round(float(net[0].weight_quantizer.t), 6))
    assert seen == [0.001, 0.1, 10.0]


def test_learned_values_are_not_decayed() -> None:
    net = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), edges="none", **ADABIN)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(net, 0.1, weight_decay=0.1)}
    for layer in net:
        assert {id(layer.input_quantizer.alpha_a), id(layer.input_quantizer.beta_a)} <= groups["rest"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"method": "adabin", "activation_bits": 32},
            "0: AdaBin weights have an offset and need inputs of 1 to 8 bits",
        ),
        ({"method": "float", "activation": "adabin"}, "0: AdaBinActivation inputs have an offset and need weights"),
    ],
)
def test_an_offset_needs_integers_on_the_other_side(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), edges="none", **change)


# --- one layer: soft, hard, interpreter, engine ---


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Learned values and statistics as after a training."""
    g = generator(seed)
    for m in model.modules():
        if isinstance(m, AdaBinActivation):
            with torch.no_grad():
                m.alpha_a.copy_(torch.rand((), generator=g) + 0.3)
                m.beta_a.copy_(torch.randn((), generator=g) * 0.4)
        elif isinstance(m, QuantLayer):
            with torch.no_grad():
                m.weight.add_(torch.randn(len(m.weight), *[1] * (m.weight.ndim - 1), generator=g) * m.weight.std() / 2)
        elif isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=g))
                m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.5)


GEOMETRY = {
    "padded": {"in_channels": 40, "out_channels": 24, "kernel_size": 3, "padding": 1},
    "strided": {"in_channels": 33, "out_channels": 17, "kernel_size": 3, "padding": 1, "stride": 2, "bias": True},
    "dilated": {"in_channels": 8, "out_channels": 70, "kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"in_channels": 6, "out_channels": 9, "kernel_size": (3, 1), "padding": (1, 0), "groups": 3},
    "word groups": {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"in_channels": 18, "out_channels": 18, "kernel_size": 3, "padding": 1, "groups": 18},
    "pointwise": {"in_channels": 16, "out_channels": 8, "kernel_size": 1},
    "nothing but padding at the corners": {"in_channels": 4, "out_channels": 4, "kernel_size": 2, "padding": 1, "dilation": 3},
}  # fmt: skip
METHODS = {
    "both": ("adabin", "adabin", 1, 1),
    "weights": ("adabin", "dorefa", 1, 2),
    "inputs": ("sign", "adabin", 1, 1),
}


def layer_of(name: str, module: nn.Conv2d | nn.Linear) -> QuantLayer:
    method, activation, weight_bits, bits = METHODS[name]
    quantizers = WEIGHTS.get(method)(weight_bits), ACTIVATIONS.get(activation)(bits)
    layer = (QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear)(module, *quantizers)
    randomise(layer)
    return layer


def check(layer: QuantLayer, x: Tensor) -> None:
    """Hard layer == interpreter == every ISA, bit for bit; the soft layer, in float64, is near."""
    layer.eval()
    with torch.no_grad():
        expected = to_numpy(layer(x))
    graph = freeze(layer, x)
    assert graph.run(to_numpy(x)).tobytes() == expected.tobytes()
    for isa in AVAILABLE:
        assert load(graph, isa=isa)(to_numpy(x)).tobytes() == expected.tobytes(), isa
    exact = copy.deepcopy(layer)
    exact.train()
    with torch.no_grad():
        a, w = exact.input_quantizer(x).double(), exact.weight_quantizer.fake(exact.weight).double()
        bias = None if exact.bias is None else exact.bias.double()
        if isinstance(exact, QuantConv2d):
            soft = F.conv2d(a, w, bias, exact.stride, exact.padding[:2], exact.dilation, exact.groups)
        else:
            soft = F.linear(a, w, bias)
    np.testing.assert_allclose(expected, to_numpy(soft), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("geometry", "method"),
    [*[(g, "both") for g in GEOMETRY], *[(g, m) for g in ("padded", "groups") for m in ("weights", "inputs")]],
)
def test_a_convolution_is_one_and_the_same_everywhere(geometry: str, method: str) -> None:
    torch.manual_seed(3)
    layer = layer_of(method, nn.Conv2d(**{"bias": False, **GEOMETRY[geometry]}))
    check(layer, torch.randn(3, layer.in_channels, 7, 6))


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_layer_is_one_and_the_same_everywhere(method: str) -> None:
    torch.manual_seed(3)
    layer = layer_of(method, nn.Linear(75, 19))
    check(layer, torch.randn(4, 75))


def test_offsets_survive_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = layer_of("both", nn.Conv2d(5, 7, 3, padding=1)).eval()
    graph = freeze(layer, torch.randn(1, 5, 6, 6))
    (conv,) = [n for n in graph.nodes if n.op == "conv2d"]
    assert set(conv.params) == {"weight", "input_offset", "weight_offset"}
    lowbit.save(graph, tmp_path / "model.lowbit")
    assert lowbit.read(tmp_path / "model.lowbit") == graph


def test_one_step_of_an_offset_is_seen() -> None:
    """The comparisons above can fail: the next float32 of either offset changes bits of the output."""
    torch.manual_seed(1)
    layer = layer_of("both", nn.Conv2d(16, 8, 3, padding=1, bias=False)).eval()
    x = torch.randn(2, 16, 9, 9)
    graph = freeze(layer, x)
    expected = load(graph)(to_numpy(x))
    (conv,) = [n for n in graph.nodes if n.op == "conv2d"]
    for role in ("input_offset", "weight_offset"):
        name = conv.params[role]
        data = np.nextafter(graph.tensors[name].data, np.float32(np.inf))
        nudged = lowbit.Graph(graph.nodes, {**graph.tensors, name: lowbit.Tensor(data)})
        for isa in AVAILABLE:
            out = load(nudged, isa=isa)(to_numpy(x))
            assert (out != expected).any()
            assert out.tobytes() == nudged.run(to_numpy(x)).tobytes()


def test_offsets_are_refused_beside_floats() -> None:
    x, w, scale = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 1, 1), torch.ones(())
    with pytest.raises(ValueError, match="offsets are for codes"):
        torch.ops.lowbit.conv2d(x, w, scale, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, 1, scale, None)


# --- networks ---


def network(**options: object) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = build_model("bireal_resnet14", classes=10, in_channels=1, image_size=28, width=8, blocks=2)
    image = Pixels((73,), 1 / 90)
    net = prepare(model, **{**ADABIN, "image": image, **options})
    randomise(net)
    x = torch.randint(0, 256, (512, 1, 28, 28), dtype=torch.uint8, generator=generator(2))
    net.train()
    net(x[:64])  # the 8-bit inputs measure their range
    calibrate_batchnorm(net, [x[:128]])
    return net.eval(), x


@pytest.mark.parametrize("residual_dtype", ["float32", "float16"])
def test_the_proof_holds(residual_dtype: str, tmp_path: Path) -> None:
    net, x = network(residual_dtype=residual_dtype)
    graph = freeze(net, x[:1])
    lowbit.save(graph, tmp_path / "model.lowbit")
    graph = lowbit.read(tmp_path / "model.lowbit")
    for isa in AVAILABLE:
        engine = lowbit.load(tmp_path / "model.lowbit", isa=isa)
        proof = prove(net, graph, engine, x)
        assert proof.inputs == len(x)
        assert proof.integers_differ == 0, proof.first_difference
        assert proof.root_flips == 0, proof.root_by_layer
        assert not proof.failures()


def test_names_of_a_shifted_layer() -> None:
    net, x = network()
    names = [n.name for n in freeze(net, x[:1]).nodes]
    first = next(
        name for name, m in net.named_modules() if isinstance(getattr(m, "input_quantizer", None), AdaBinActivation)
    )
    at = names.index(first)
    assert names[at - 2 : at + 1] == [f"{first}.shift", f"{first}.quantize", first]


def test_divergence_is_named() -> None:
    torch.manual_seed(0)
    layer = layer_of("both", nn.Conv2d(3, 4, 1, bias=False)).eval()
    with torch.no_grad():
        layer.input_quantizer.beta_a.fill_(3e38)  # beta / alpha is beyond float32
        layer.input_quantizer.alpha_a.fill_(0.01)
    with pytest.raises(FreezeError, match="beyond float32: training has diverged"):
        freeze(layer, torch.randn(1, 3, 4, 4))
