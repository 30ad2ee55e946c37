"""The compared methods against their papers' formulas, values and gradients, in float64 autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.train import Schedule, parameter_groups, prepare
from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS
from lowbit.train.quantizers.lsq import LSQActivation


def normal(*shape: int, seed: int = 3, spread: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def ones(x: Tensor) -> Tensor:
    """sign(x) with sign(+-0) = +1, in float64."""
    return torch.where(x < 0, -1.0, 1.0).double()


def through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value` with the gradient of another expression: what the papers write as a straight-through estimator."""
    return value.detach() + (gradient_of - gradient_of.detach())


def ede(x: Tensor, t: float) -> Tensor:
    return max(1 / t, 1) * torch.tanh(t * x)


def approx_sign(x: Tensor) -> Tensor:
    """Bi-Real net's F: 2x + x^2 on [-1, 0), 2x - x^2 on [0, 1), +-1 outside."""
    return torch.where(x.abs() < 1, 2 * x - x * x.abs(), torch.sign(x))


def xnor(w: Tensor) -> Tensor:
    n, dims = w[0].numel(), tuple(range(1, w.ndim))
    alpha = w.detach().abs().mean(dims, keepdim=True)
    return through(alpha * ones(w), w / n + alpha * torch.clamp(w, -1, 1))


def bireal(w: Tensor) -> Tensor:
    alpha = w.detach().abs().mean(tuple(range(1, w.ndim)), keepdim=True)
    inside = w.detach().abs() < 1
    return through(alpha * ones(w), alpha * torch.where(inside, w, torch.sign(w.detach())))


def irnet(w: Tensor, t: float = 0.1) -> Tensor:
    dims = tuple(range(1, w.ndim))
    hat = (w - w.mean(dims, keepdim=True)) / w.std(dims, keepdim=True)
    scale = 2 ** torch.round(torch.log2(hat.detach().abs().mean(dims, keepdim=True)))
    return through(scale * ones(hat), scale * ede(hat, t))


def dorefa(w: Tensor, bits: int) -> Tensor:
    if bits == 1:
        return through(w.abs().mean() * ones(w), w)
    n = 2**bits - 1
    u = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
    return through(2 * torch.round(n * u) / n - 1, 2 * u - 1)


def recu(w: Tensor, tau: float = 0.85) -> Tensor:
    dims = tuple(range(1, w.ndim))
    hat = 2 * math.sqrt(2) * (w - w.mean(dims, keepdim=True)) / torch.sqrt(w.var(dims, keepdim=True) + 1e-5)
    bound = -hat.detach().abs().mean() * math.log(2 - 2 * tau)
    alpha = hat.detach().abs().mean(dims, keepdim=True)
    return through(alpha * ones(hat), alpha * torch.clamp(hat, -bound, bound))


FORMULAS = [("xnor", 1, xnor), ("bireal", 1, bireal), ("irnet", 1, irnet), ("recu", 1, recu)]
FORMULAS += [("dorefa", bits, lambda w, bits=bits: dorefa(w, bits)) for bits in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize(("name", "bits", "formula"), FORMULAS)
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 30)])
@pytest.mark.parametrize("spread", [0.05, 1.5])
def test_weights_are_the_papers(name: str, bits: int, formula, shape: tuple[int, ...], spread: float) -> None:
    start = normal(*shape, spread=spread)
    start.view(-1)[:3] = torch.tensor([0.0, -0.0, 1.0])  # at 1 Bi-Real's indicator is 0, XNOR's 1
    quantizer = WEIGHTS.get(name)(bits)
    quantizer.attach(start)
    latent = quantizer.latent(start).requires_grad_()
    exact = start.double().requires_grad_()
    upstream = normal(*shape, seed=4)
    value, expected = quantizer.fake(latent), formula(exact)
    (value * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(latent.grad.double(), exact.grad, rtol=2e-4, atol=1e-5 * exact.grad.abs().max().item())


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("t_min", [None, 0.001])
def test_irnet_anneals_weights_and_activations(progress: float, t_min: float | None) -> None:
    options, first = ({}, 0.1) if t_min is None else ({"t_min": t_min}, t_min)
    t = first * 10 ** (progress * math.log10(10 / first))
    start, upstream = normal(5, 24), normal(5, 24, seed=4)
    weight, activation = WEIGHTS.get("irnet")(1, **options), ACTIVATIONS.get("irnet")(1, **options)
    bare = ACTIVATIONS.get("irnet")(1, **options, clip=False)
    cases = (
        (weight, lambda w: irnet(w, t)),
        (bare, lambda x: through(ones(x), ede(x, t))),
        (activation, lambda x: through(ones(x), ede(x.clamp(-1, 1), t))),
    )
    for quantizer, formula in cases:
        quantizer.anneal(progress)
        x, exact = start.clone().requires_grad_(), start.double().requires_grad_()
        (quantizer.fake(x) * upstream).sum().backward()
        (formula(exact) * upstream).sum().backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", [WEIGHTS.get("irnet"), WEIGHTS.get("adabin"), ACTIVATIONS.get("irnet")])
def test_the_error_decay_estimator_needs_a_start(quantizer) -> None:
    assert float(quantizer(1, t_min=10).t) == 10
    for t_min in (0.0, -0.1, 10.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="t_min must be above 0 and at most 10"):
            quantizer(1, t_min=t_min)


def test_the_estimators_gradient_is_even_in_bfloat16() -> None:
    """Behind rounding of sigmoid(2 t x) to 1 it would vanish on one side alone."""
    q = ACTIVATIONS.get("irnet")(1, clip=False)
    q.anneal(0.75)  # t = 3.16
    x = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    q.fake(x).sum().backward()
    assert torch.equal(x.grad, x.grad.flip(0))
    t = q.t.item()
    expected = t * (1 - torch.tanh(t * x.detach().double()) ** 2)
    assert torch.allclose(x.grad.double(), expected, rtol=0.05)


def test_irnet_scales_are_powers_of_two() -> None:
    q = WEIGHTS.get("irnet")(1)
    # one large weight among many small ones: mean|w^| goes down as 1/sqrt(n)
    spikes = torch.zeros(9, 2048)
    for row in range(9):
        spikes[row, : 4**row // 64 + 1] = 1.0
    scale = q.encode(spikes).scale
    mantissa, exponent = torch.frexp(scale)
    assert mantissa.tolist() == [0.5] * 9
    assert len(set(exponent.tolist())) > 2


def test_annealing_goes_with_the_schedule_and_the_state_dict() -> None:
    model = prepare(nn.Linear(4, 4), method="irnet", activation="irnet", edges="none")
    other = prepare(nn.Linear(4, 4), method="recu", edges="none")
    for step, t, tau in (
        (0, 0.1, 0.85),
        (50, 1.0, 0.85 + 0.14 * (math.exp(0.5) - 1) / (math.e - 1)),
        (100, 10.0, 0.99),
    ):
        for net in (model, other):
            Schedule(net, 100).step(step)
        assert float(model.weight_quantizer.t) == pytest.approx(t)
        assert float(model.input_quantizer.t) == pytest.approx(t)
        assert float(other.weight_quantizer.tau) == pytest.approx(tau)
    assert {"weight_quantizer.t", "input_quantizer.t"} <= model.state_dict().keys()
    assert {"weight_quantizer.tau", "weight_quantizer.alpha"} <= other.state_dict().keys()


def test_recu_learns_its_scale() -> None:
    start, upstream = normal(5, 24), normal(5, 24, seed=4)
    q = WEIGHTS.get("recu")(1)
    q.attach(start)
    (q.fake(start) * upstream).sum().backward()
    expected = (ones(start - start.mean(1, keepdim=True)) * upstream).sum(1)
    torch.testing.assert_close(q.alpha.grad.double(), expected, rtol=1e-5, atol=1e-6)
    for tau in ({"tau_min": 0.5}, {"tau_max": 1.0}, {"tau_min": 0.95, "tau_max": 0.9}):
        with pytest.raises(ValueError, match="tau_min"):
            WEIGHTS.get("recu")(1, **tau)


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (7, 4)])
def test_rsign_is_the_papers(shape: tuple[int, ...]) -> None:
    q = ACTIVATIONS.get("reactnet")(1)
    q.attach(4)
    with torch.no_grad():
        q.beta.copy_(torch.tensor([0.0, 0.3, -0.7, 0.5]))
    start, upstream = normal(*shape), normal(*shape, seed=4)
    start.view(shape[0], 4, -1)[0, :, 0] = q.beta.detach()  # exactly on the threshold: +1
    x, exact = start.clone().requires_grad_(), start.double().requires_grad_()
    beta = q.beta.detach().double().requires_grad_()
    z = exact - beta.view(-1, *[1] * (len(shape) - 2))
    (q.fake(x) * upstream).sum().backward()
    (through(ones(z), approx_sign(z)) * upstream).sum().backward()
    assert torch.equal(q.fake(x).double(), ones(z))
    assert q.fake(x).view(shape[0], 4, -1)[0, :, 0].tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.beta.grad.double(), beta.grad, rtol=1e-5, atol=1e-5)


# --- LSQ ---


def lsq(x: Tensor, s: Tensor, low: int, high: int, count: int) -> Tensor:
    """Equations 1, 2, 3 and 5 as one expression of x and s."""
    z = x / s
    inside = (z > low) & (z < high)
    code = torch.round(torch.clamp(z, low, high))
    # dq/dx = 1 and dq/ds = round(z) - z inside, the end that was hit outside; ds scaled
    slope = torch.where(inside, code - z, code).detach()
    scaled = s / math.sqrt(count * high)
    return through(code * s, torch.where(inside, x, 0.0) + slope * scaled)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["weight", "activation", "signed activation"])
def test_lsq_is_the_papers(kind: str, bits: int) -> None:
    start, upstream = normal(6, 5, 3, 3), normal(6, 5, 3, 3, seed=4)
    signed = kind != "activation"
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if kind == "weight":
        q = WEIGHTS.get("lsq")(bits)
        q.attach(start)
        count = start.numel()
    else:
        q = LSQActivation(bits, signed=signed)
        q.fake(start)
        count = start[0].numel()
    assert q.step.item() == pytest.approx(2 * start.abs().mean().item() / math.sqrt(high))
    with torch.no_grad():
        # ends, ties and zeros: a step that is a power of two makes them exact
        q.step.fill_(2.0**-bits)
    start.view(-1)[:6] = q.step.item() * torch.tensor([low, high, 0.5, 1.5, -0.0, high + 7.0])
    x, exact = start.clone().requires_grad_(), start.double().requires_grad_()
    step = q.step.detach().double().requires_grad_()
    value, expected = q.fake(x), lsq(exact, step, low, high, count)
    (value * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert torch.equal(value.double(), expected)
    assert torch.equal(x.grad.double(), exact.grad)
    assert q.step.grad.item() == pytest.approx(float(step.grad), rel=1e-4, abs=1e-6)


def test_lsq_starts_from_the_first_training_batch() -> None:
    q = LSQActivation(4)
    first, second = normal(8, 5).abs(), normal(8, 5, seed=9).abs() * 10
    before = q.step.item()
    assert 0 < before < 1
    q.eval().fake(first)
    q.train().fake(first[:0])
    assert q.step.item() == before  # neither an evaluation nor an empty batch
    assert not q.initialised
    q.fake(first)
    started = q.step.item()
    assert started == pytest.approx(2 * first.mean().item() / math.sqrt(15))
    for later in (q, copy.deepcopy(q)):
        later.fake(second)
        assert later.step.item() == started
    resumed = LSQActivation(4)
    resumed.load_state_dict(q.state_dict())
    resumed.fake(second)
    assert resumed.step.item() == started
    # and a state from before the first batch is still waiting
    resumed.load_state_dict(LSQActivation(4).state_dict())
    resumed.fake(second)
    assert resumed.step.item() == pytest.approx(2 * second.mean().item() / math.sqrt(15))


@pytest.mark.parametrize("step", [0.0, -3.0])
def test_lsq_steps_stay_positive(step: float) -> None:
    x = normal(6, 5)
    weight, activation = WEIGHTS.get("lsq")(4), LSQActivation(4)
    weight.attach(x)
    activation.fake(x)
    with torch.no_grad():
        weight.step.fill_(step)
        activation.step.fill_(step)
    assert weight.encode(x).scale > 0
    assert activation.scale > 0
    assert torch.equal(weight.fake(x), weight.encode(x).decode())
    assert torch.equal(activation.fake(x), activation.encode(x) * activation.scale)


def test_what_quantizers_learn_is_decayed_where_they_say() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    overrides = {
        "1": {"activation": "reactnet", "activation_bits": 1},
        "2": {"method": "recu", "weight_bits": 1, "activation": "pact"},
    }
    net = prepare(net, "lsq", 4, 4, activation="lsq", edges="none", overrides=overrides)
    names = {id(p): name for name, p in net.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(net, 0.1, weight_decay=1e-4)}
    assert groups["weights"] == {
        "0.weight_quantizer.step", "0.input_quantizer.step", "1.weight_quantizer.step", "2.input_quantizer.alpha",
    }  # fmt: skip
    assert {"1.input_quantizer.beta", "2.weight_quantizer.alpha"} <= groups["rest"]
    assert groups["latent"] == {"0.weight", "1.weight", "2.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "xnor", "weight_bits": 4}, "'xnor' has 1 weight bit, not 4: methods with 4 weight bits are .*lsq"),
        ({"method": "lsq", "weight_bits": 5}, "'lsq' has 2, 3, 4, 8 weight bits, not 5: .* are dorefa"),
        ({"activation": "lsq"}, "'lsq' has 2, 3, 4, 8 activation bits, not 1: activations with 1 activation bit are "),
        ({"weight_bits": 99}, "not 99: methods with 99 weight bits are not to be had"),
        ({"activation": "lsq", "activation_bits": 4, "activation_options": {"unsigned": 1}}, "no option 'unsigned'"),
    ],
)
def test_impossible_bits_name_the_method_and_the_way_out(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(nn.Linear(4, 4), **change)


@pytest.mark.parametrize("name", ["xnor", "bireal", "irnet", "recu", "dorefa"])
def test_prepared_layers_survive_copies_and_checkpoints(name: str) -> None:
    x = normal(6, 8)
    layer = prepare(nn.Linear(8, 5), name, 1, 1, activation="reactnet", edges="none").train()
    layer(x).sum().backward()
    with torch.no_grad():
        layer.input_quantizer.beta.add_(0.2)
    fresh = prepare(nn.Linear(8, 5), name, 1, 1, activation="reactnet", edges="none")
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), fresh):
        assert torch.equal(other.eval()(x), layer.eval()(x))
