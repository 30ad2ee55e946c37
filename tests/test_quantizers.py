"""The quantizer contract, over the registries; SLB's gradient against autograd of its formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowbit
from lowbit.train import (
    Residual,
    Schedule,
    auxiliary_loss,
    calibrate_batchnorm,
    freeze,
    parameter_groups,
    prepare,
    published_growth,
    weight_statistics,
)
from lowbit.train.layers import PixelInput, Pixels
from lowbit.train.proof import prove
from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS, ActivationQuantizer, WeightQuantizer
from lowbit.train.quantizers.slb import SLB

WEIGHT_CASES = [(name, bits) for name in WEIGHTS for bits in WEIGHTS.get(name).allowed_bits]
ACTIVATION_CASES = [(name, bits) for name in ACTIVATIONS for bits in ACTIVATIONS.get(name).allowed_bits]


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers, with zeros, -0.0, exact ties and large ones among them."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
    flat = x.view(-1)
    special = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, 1.0, -1.0, 1e-30, -1e-30, 100.0, -100.0, 1 / 3, 0.1]
    flat[: len(special)] = torch.tensor(special)[: len(flat)]
    return x


def weights(name: str, bits: int, weight: torch.Tensor) -> tuple[WeightQuantizer, torch.Tensor]:
    """A quantizer as a layer has it, and the latent it starts from."""
    quantizer = WEIGHTS.get(name)(bits)
    quantizer.attach(weight)
    return quantizer, quantizer.latent(weight)


def activations(name: str, bits: int, channels: int) -> ActivationQuantizer:
    """A quantizer as a layer of that many input channels has it."""
    quantizer = ACTIVATIONS.get(name)(bits)
    quantizer.attach(channels)
    return quantizer


@pytest.mark.parametrize(("name", "bits"), WEIGHT_CASES)
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (5, 17), (1, 1)])
def test_fake_weights_are_decoded_codes(name: str, bits: int, shape: tuple[int, ...]) -> None:
    # no ties: a tie has no likeliest value, however sharp (ties are tested below)
    quantizer, latent = weights(name, bits, torch.randn(*shape, generator=torch.Generator().manual_seed(3)) + 0.01)
    quantizer.sharpen()
    encoded = quantizer.encode(latent)
    assert torch.equal(quantizer.fake(latent), encoded.decode())
    assert encoded.codes.shape == torch.Size(shape)
    if quantizer.code_type is not None:
        codes = encoded.codes.to(torch.int16)
        assert torch.equal(codes.float(), encoded.codes)
        quantizer.code_type.index(codes.numpy())  # raises for an integer outside the type
        assert encoded.scale.dtype == torch.float32
        assert encoded.scale.shape in ((), (shape[0],))
        assert encoded.offset is None or encoded.offset.shape in ((), (shape[0],))


@pytest.mark.parametrize(("name", "bits"), WEIGHT_CASES)
def test_autocast_changes_no_weight(name: str, bits: int) -> None:
    torch.manual_seed(0)
    quantizer, latent = weights(name, bits, numbers(8, 4, 3, 3))
    soft = quantizer.fake(latent)
    hard = quantizer.encode(latent).decode()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.fake(latent), soft)
        assert torch.equal(quantizer.encode(latent).decode(), hard)
    assert soft.dtype == torch.float32


@pytest.mark.parametrize(("name", "bits"), WEIGHT_CASES)
def test_weights_have_a_gradient(name: str, bits: int) -> None:
    quantizer, latent = weights(name, bits, numbers(4, 3, 3, 3))
    latent.requires_grad_()
    (quantizer.fake(latent) * numbers(4, 3, 3, 3)).sum().backward()
    assert latent.grad is not None
    assert latent.grad.isfinite().all()
    assert latent.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "bits"), WEIGHT_CASES)
@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 2, 3, 3), 0.1), torch.full((1, 1), -2.0)])
def test_weights_without_spread_are_numbers(name: str, bits: int, weight: torch.Tensor) -> None:
    quantizer, latent = weights(name, bits, weight)
    latent.requires_grad_()
    value = quantizer.fake(latent)
    value.square().sum().backward()
    assert value.isfinite().all()
    assert latent.grad.isfinite().all()
    assert latent.grad.abs().max() < 1e4
    encoded = quantizer.encode(latent)
    assert encoded.codes.isfinite().all()
    assert encoded.scale.isfinite().all()


@pytest.mark.parametrize(("name", "bits"), ACTIVATION_CASES)
@pytest.mark.parametrize(("size", "training"), [(0, False), (1, False), (1000, False), (1, True), (1000, True)])
def test_fake_activations_are_decoded_codes(name: str, bits: int, size: int, training: bool) -> None:
    quantizer = activations(name, bits, 5)
    for p in quantizer.parameters():
        if p.ndim:  # a number per channel starts at 0
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(5))
    if size:
        quantizer(numbers(4, 5))  # those that measure a range see one
    quantizer.train(training)
    x = numbers(size, 5)
    fake = quantizer.fake(x)
    codes = quantizer.encode(x)
    value = codes * quantizer.scale
    assert torch.equal(fake, value if quantizer.offset is None else value + quantizer.offset)
    assert torch.equal(codes, codes.round())
    quantizer.code_type.index(codes.to(torch.int16).numpy())
    assert (quantizer.reciprocal is None) == (quantizer.code_type.kind == "bipolar")


@pytest.mark.parametrize(("name", "bits"), ACTIVATION_CASES)
def test_activations_have_a_gradient_inside_their_range_only(name: str, bits: int) -> None:
    quantizer = activations(name, bits, 1)
    quantizer.eval()
    x = torch.tensor([[0.3], [1e4], [-1e4]]).requires_grad_()
    quantizer.fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0] > 0
    assert x.grad[1:].flatten().tolist() == [0, 0]


class Small(nn.Module):
    """A stream through one convolution for each name, then a low-bit linear layer on a flattened map."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.stem, self.stem_bn, self.stream = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), Residual()
        self.convs = nn.ModuleDict({name: nn.Conv2d(6, 6, 3, padding=1, bias=False) for name in names})
        self.bns = nn.ModuleDict({name: nn.BatchNorm2d(6) for name in names})
        self.adds = nn.ModuleDict({name: Residual() for name in names})
        self.pool, self.fc, self.fc_bn = nn.AvgPool2d(4), nn.Linear(24, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stream(self.stem_bn(self.stem(x)))
        for name, conv in self.convs.items():
            x = self.adds[name](self.bns[name](conv(x)), x)
        return self.head(self.fc_bn(self.fc(self.pool(x).flatten(1))))


def trained(quantizer: str, bits: tuple[int, ...], **kwargs: Any) -> Any:
    """Two steps of a small network with a convolution for each number of bits; its Graph; the images."""
    torch.manual_seed(0)
    overrides = {f"convs.bits{b}": {f"{quantizer}_bits": b} for b in bits}
    kwargs |= {f"{quantizer}_bits": bits[0]}
    model = prepare(
        Small([f"bits{b}" for b in bits]),
        image=Pixels((120,), 1 / 70),
        residual_dtype="float16",
        overrides=overrides,
        **kwargs,
    ).train()
    x, y = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 4
    Schedule(model, 2).step(1)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1), momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + auxiliary_loss(model)).backward()
        optimizer.step()
    calibrate_batchnorm(model, [x])
    model.eval()
    return model, freeze(model, x[:1]), x


def some(bits: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*bits[:2], bits[-1])))


def held(model: nn.Module, graph: lowbit.Graph, x: torch.Tensor) -> None:
    p = prove(model, graph, lowbit.load(graph), x)
    assert p.root_activations > 0
    assert (p.integers_differ, p.root_flips, p.decisions_changed) == (0, 0, 0), p


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_every_weight_quantizer_runs_as_trained(name: str) -> None:
    held(*trained("weight", some(WEIGHTS.get(name).allowed_bits), method=name))


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_every_activation_quantizer_runs_as_trained(name: str) -> None:
    held(*trained("activation", some(ACTIVATIONS.get(name).allowed_bits), method="sign", activation=name))


def test_shifts_are_in_the_proof() -> None:
    """RSign's shift is a step of its own in front of the layer; root flips are counted through it."""
    model, graph, x = trained("activation", (1,), method="sign", activation="reactnet")
    held(model, graph, x)
    nodes = {n.name: n for n in graph.nodes}
    shifts = {name: n for name, n in nodes.items() if n.op == "add" and name.endswith(".shift")}
    assert sorted(shifts) == ["convs.bits1.shift", "fc.shift"]  # the layers keep their names for their products
    assert nodes["convs.bits1.quantize"].inputs == ("convs.bits1.shift",)
    assert nodes["convs.bits1"].op == "conv2d"
    assert nodes["fc"].op == "linear"
    beta = graph.tensors["convs.bits1.shift.term"].data
    assert np.array_equal(beta, -model.convs["bits1"].input_quantizer.beta.detach().numpy())
    assert np.abs(beta).min() > 0  # it has been learned

    def with_constant(name: str, data: np.ndarray) -> lowbit.Graph:
        return lowbit.Graph(graph.nodes, {**graph.tensors, name: lowbit.Tensor(data)}, graph.meta)

    wrong = with_constant("convs.bits1.shift.term", beta + np.float32(0.1))
    p = prove(model, wrong, lowbit.load(wrong), x)
    assert p.root_by_layer.keys() == {"convs.bits1.quantize"}
    # a stream that comes out otherwise is seen behind the shift of the layer that reads it
    wrong = with_constant("stem_bn.add.term", graph.tensors["stem_bn.add.term"].data + np.float32(0.1))
    assert prove(model, wrong, lowbit.load(wrong), x).root_by_layer.keys() == {"convs.bits1.quantize"}


def test_pixels_are_exact() -> None:
    quantizer = PixelInput(Pixels((73, 0, 255), 1 / 90))
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    codes = quantizer.encode(x)
    assert codes[0, 0].flatten().tolist() == [p - 73 for p in range(256)]
    assert codes[0, 2].min() == -255
    assert torch.equal(quantizer.fake(x), codes * quantizer.scale)
    assert (quantizer.code_type.low, quantizer.code_type.high) == (-255, 255)
    with pytest.raises(ValueError, match="zero points for 3"):
        quantizer.encode(x[:, :1])


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_impossible_weight_bits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="weight bits?, not 3.5"):
        WEIGHTS.get(name)(3.5)


def test_registry_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'slb'"):
        WEIGHTS.get("slab")


@pytest.mark.parametrize("name", [name for name, bits in WEIGHT_CASES if bits == 1])
def test_minus_zero_weights_are_plus_one(name: str) -> None:
    quantizer, latent = weights(name, 1, torch.tensor([[-1.0, 0.0, -0.0, 1.0]]))
    assert quantizer.encode(latent).codes.tolist() == [[-1, 1, 1, 1]]


@pytest.mark.parametrize(
    "name", [n for n in ACTIVATIONS if ACTIVATIONS.get(n)(ACTIVATIONS.get(n).allowed_bits[0]).reciprocal is None]
)
def test_minus_zero_activations_are_plus_one(name: str) -> None:
    quantizer = activations(name, 1, 1)
    assert quantizer.encode(torch.tensor([[0.0], [-0.0]])).flatten().tolist() == [1, 1]


def test_rounding_is_to_even() -> None:
    q = ACTIVATIONS.get("dorefa")(2)  # 3 steps: 0.5/3 is a tie between 0 and 1, 1.5/3 between 1 and 2
    assert q.encode(torch.tensor([0.5, 1.5, 2.5]) / 3).tolist() == [0, 2, 2]


# --- SLB ---


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("temperature", [1.0, 37.0])
def test_slb_gradient_is_the_papers(bits: int, temperature: float) -> None:
    q = SLB(bits, init="random")
    q.temperature.fill_(temperature)
    logits = (q.latent(numbers(6, 5)) * 3).requires_grad_()
    upstream = numbers(6, 5)
    (q.fake(logits) * upstream).sum().backward()
    with torch.no_grad():
        p = torch.softmax(logits.double() * temperature, dim=0)
        v = torch.linspace(-1, 1, 2**bits, dtype=torch.float64).view(-1, 1, 1)
        expected = temperature * p * (v - (p * v).sum(0)) * upstream
    torch.testing.assert_close(logits.grad, expected.float(), rtol=1e-3, atol=1e-5 * upstream.abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 37.0])
def test_one_bit_slb_is_tanh_with_its_gradient(temperature: float) -> None:
    q = SLB(1)
    q.temperature.fill_(temperature)
    b = numbers(6, 5).requires_grad_()
    upstream = numbers(6, 5)
    w = q.fake(b)
    (w * upstream).sum().backward()
    exact = b.detach().double().requires_grad_()
    expected = torch.tanh(exact * temperature / math.sqrt(2))
    (expected * upstream).sum().backward()
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=3e-7)
    torch.testing.assert_close(b.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("temperature", "lr"), [(1.0, 0.1), (50.0, 0.001)])
def test_one_logit_moves_as_two_under_sgd(temperature: float, lr: float) -> None:
    """b = (A2 - A1) / sqrt 2 with the same learning rate, momentum and weight decay."""
    torch.manual_seed(0)
    two = (torch.randn(2, 8, 9) * 0.1).requires_grad_()
    one = ((two[1] - two[0]).detach() / math.sqrt(2)).requires_grad_()
    start = one.detach().clone()
    q = SLB(1)
    q.temperature.fill_(temperature)
    settings = {"lr": lr, "momentum": 0.9, "weight_decay": 1e-3}
    sgd_two, sgd_one = torch.optim.SGD([two], **settings), torch.optim.SGD([one], **settings)
    for _ in range(50):
        x, y = torch.randn(16, 9), torch.randn(16, 8)
        values = torch.tensor([-1.0, 1.0]).view(2, 1, 1)
        w_two = (torch.softmax(two * temperature, 0) * values).sum(0)
        for optimiser, w in ((sgd_two, w_two), (sgd_one, q.fake(one))):
            optimiser.zero_grad()
            (x @ w.T - y).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(one, (two[1] - two[0]) / math.sqrt(2), rtol=1e-4, atol=3e-5)
    assert (one.detach() - start).abs().max() > 0.05  # it did move


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_slb_starts_at_the_float_weight(bits: int) -> None:
    w = numbers(16, 4, 3, 3)
    q = SLB(bits)
    encoded = q.encode(q.latent(w))
    scaled = (w / (2 * w.std(correction=0))).clamp(-1, 1)
    nearest = torch.from_numpy(q.code_type.values.copy()).float() / (2**bits - 1)
    distance = (scaled.unsqueeze(-1) - nearest).abs()
    chosen = (scaled - encoded.decode()).abs()
    assert torch.all(chosen <= distance.amin(-1) + 1e-6)


def test_slb_one_bit_logits_have_the_published_spread() -> None:
    w = torch.randn(64, 32, 3, 3)
    for init in ("weights", "random"):
        assert SLB(1, init=init).latent(w).std() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)


def test_slb_ties_go_to_the_larger_value() -> None:
    q = SLB(2)
    logits = torch.zeros(4, 1, 3)
    logits[0, 0, 1] = logits[1, 0, 1] = 1.0
    logits[3, 0, 2] = 1.0
    assert q.encode(logits).codes.tolist() == [[3, -1, 3]]


def test_slb_learned_values_are_a_table() -> None:
    q = SLB(2, learn_values=True)
    latent = q.latent(numbers(4, 9))
    with torch.no_grad():
        q.values.copy_(torch.tensor([-0.9, -0.1, 0.2, 0.5]))
    encoded = q.encode(latent)
    assert q.code_type.kind == "table"
    assert q.code_type.table == (-127, -14, 28, 71)
    q.code_type.index(encoded.codes.to(torch.int16).numpy())
    (q.fake(latent.requires_grad_())).sum().backward()
    assert q.values.grad.abs().sum() > 0
    with torch.no_grad():
        q.values.copy_(torch.tensor([-0.9, 0.1, 0.1001, 0.5]))
    with pytest.raises(ValueError, match="fell together"):
        _ = q.code_type
    with pytest.raises(ValueError, match="2 weight bits or more"):
        SLB(1, learn_values=True)


def test_temperature_schedules() -> None:
    net = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), edges="none")
    layer = net[0].weight_quantizer
    for kind in ("exponential", "linear", "sine"):
        s = Schedule(net, 100, growth=1000, kind=kind, start=0.3, end=0.9)
        assert s.step(0) == s.step(30) == 1
        assert s.step(90) == s.step(100) == pytest.approx(1000)
        steps = [s.step(k) for k in range(101)]
        assert steps == sorted(steps)
        assert float(layer.temperature) == pytest.approx(1000)
    s = Schedule(net, 100, growth=1000, start=0.0, end=1.0)
    assert s.step(50) == pytest.approx(math.sqrt(1000))
    # published: T *= 1.03 every epoch from 0.3 E to 0.9 E, E = 500
    growth = published_growth(1.03, 500, 0.3, 0.9)
    s = Schedule(net, 500, every="epoch", growth=growth, start=0.3, end=0.9)
    assert s.step(151) / s.step(150) == pytest.approx(1.03)
    assert s.step(450) == pytest.approx(7098, rel=1e-3)


def test_gap_closes_with_the_temperature() -> None:
    net = prepare(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), edges="none")
    gaps = []
    for t in (1, 100, 10000, 1e6):
        for layer in net:
            layer.weight_quantizer.temperature.fill_(t)
        gaps.append(weight_statistics(net).gap)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.01 < gaps[0]


@pytest.mark.parametrize(
    "change", [{"kind": "cubic"}, {"every": "week"}, {"growth": 0.5}, {"start": 0.9, "end": 0.3}, {"total_steps": 0}]
)
def test_impossible_schedules_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Schedule(nn.Linear(1, 1), **{"total_steps": 10, **change})
