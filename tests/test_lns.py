"""LNS: the noisy loss against its definition, the mapping against plain convolutions, where it starts, the trainer's part."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.report import write_report
from lowbit.train import auxiliary_loss, freeze, prepare
from lowbit.train.export import export_run
from lowbit.train.layers import quantized_layers
from lowbit.train.models import build_model
from lowbit.train.network import build_network
from lowbit.train.prepare import FlipCounter, mapping_parameters, parameter_groups
from lowbit.train.quantizers.base import sign
from lowbit.train.quantizers.lns import LNS, _conv_as_product, corrected_loss
from lowbit.train.recipe import RecipeError, parse_recipe
from lowbit.train.rundir import InputSpec, RunError, read_metrics, read_run
from lowbit.train.start import read_start
from lowbit.train.trainer import train
from test_trainer import Stop, _rows, _same, _state, recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RATES = [(0.0, 0.0), (0.005, 0.005), (0.3, 0.05), (0.02, 0.4), (0.6, 0.3)]
SHAPES = [(8, 6, 3, 3), (8, 1, 3, 3), (5, 4, 1, 1), (6, 3, 5, 5), (4, 3, 2, 2), (4, 2, 1, 3), (7, 9), (1, 1)]


def bank(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def lns(weight: Tensor, **options: object) -> LNS:
    torch.manual_seed(5)
    quantizer = LNS(1, **options)
    quantizer.attach(weight)
    return quantizer


def away_from_identity(quantizer: LNS) -> None:
    with torch.no_grad():
        quantizer.mapping.conv3.normal_(std=0.3, generator=torch.Generator().manual_seed(2))


def network(method: str = "lns", seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("bireal_resnet14", classes=3, in_channels=1, image_size=12, width=4, blocks=1)
    return prepare(model, method=method, options=options)


def images(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, 12, 12, generator=generator), torch.randint(0, 3, (count,), generator=generator)


# --- the noisy loss ---


@pytest.mark.parametrize(("plus", "minus"), RATES)
def test_the_corrected_loss_is_unbiased(plus: float, minus: float) -> None:
    """E over the noise of l~(q, y~) is l(q, y), for either true label."""
    q = torch.linspace(-3, 3, 101, dtype=torch.float64)
    right, wrong = torch.ones_like(q), -torch.ones_like(q)
    above, below = corrected_loss(q, right, plus, minus), corrected_loss(q, wrong, plus, minus)
    torch.testing.assert_close((1 - plus) * above + plus * below, (q - 1) ** 2, rtol=0, atol=1e-13)
    torch.testing.assert_close((1 - minus) * below + minus * above, (q + 1) ** 2, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("plus", "minus"), RATES)
def test_the_corrected_loss_is_its_definition_with_the_gradient_of_equation_18(plus: float, minus: float) -> None:
    q = (bank((200,)).double() * 20).requires_grad_()
    y = sign(bank((200,), seed=2).double())
    rates = torch.tensor([minus, plus], dtype=torch.float64)
    own, other = rates[(y > 0).long()], rates[(y < 0).long()]
    expected = ((1 - other) * (q - y) ** 2 - own * (q + y) ** 2) / (1 - plus - minus)
    found = corrected_loss(q, y, plus, minus)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), q)
    torch.testing.assert_close(gradient, 2 * (q - y) - 4 * own * y / (1 - plus - minus), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q: corrected_loss(q, y[:5], plus, minus), (q[:5].detach().requires_grad_(),))


def test_the_loss_of_a_layer() -> None:
    w = bank((8, 6, 3, 3))
    for reduction, alpha in (("mean", 1.0), ("sum", 1.0), ("mean", 0.25)):
        q = lns(w, reduction=reduction, alpha=alpha, rho_plus=0.01)
        away_from_identity(q)
        latent = w.clone().requires_grad_()
        loss = q.auxiliary_loss(latent)
        each = corrected_loss(q.mapped(w)[0], sign(w), 0.01, 0.005)
        torch.testing.assert_close(loss, alpha * (each.mean() if reduction == "mean" else each.sum()))
        loss.backward()
        assert latent.grad.abs().sum() > 0, "the noisy loss reaches W"
        assert all(p.grad.abs().sum() > 0 for p in q.mapping.parameters()), "and theta"
    assert lns(w, alpha=0.0).auxiliary_loss(w) is None


def test_options_are_checked() -> None:
    for options, message in (
        ({"rho": 0.5}, "must be below 1, not 0.5 . 0.5: labels that are wrong as often as right"),
        ({"rho_plus": 0.9, "rho_minus": 0.1}, "must be below 1"),
        ({"rho": -0.1}, "rho_plus is a probability"),
        ({"rho_minus": 1.0}, "rho_minus is a probability"),
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"alpha": float("nan")}, "alpha must be 0 or more"),
        ({"form": "deep"}, "form is 'residual' or 'plain', not 'deep'"),
        ({"reduction": "max"}, "reduction is"),
        ({"gradient": "none"}, "gradient is"),
    ):
        with pytest.raises(ValueError, match=message):
            LNS(1, **options)
    with pytest.warns(UserWarning, match=r"alpha = 0: the binary weights start at random"):
        LNS(form="plain", alpha=0)
    with pytest.warns(UserWarning, match=r"rho_plus = 0\.2.* below plain fine-tuning"):
        LNS(1, rho_plus=0.2)


# --- the mapping ---


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mapping_is_three_padded_convolutions(shape: tuple[int, ...]) -> None:
    """Against F.conv2d with whole 3x3 kernels and nn.BatchNorm2d in float64."""
    w = bank(shape)
    q = lns(w, form="plain")
    with torch.no_grad():
        for p in (q.mapping.gamma1, q.mapping.beta1, q.mapping.gamma2, q.mapping.beta2):
            p.add_(torch.randn(p.shape) * 0.3)
    image = w.double()[(...,) + (None,) * (4 - w.ndim)]
    c = shape[1]
    x = image / image.abs().mean()
    m = q.mapping
    assert m.conv1.shape[:2] == (2 * c, c)
    assert m.conv2.shape[:2] == (2 * c, 2 * c)
    assert m.conv3.shape[:2] == (c, 2 * c)
    for weight, gamma, beta in ((m.conv1, m.gamma1, m.beta1), (m.conv2, m.gamma2, m.beta2), (m.conv3, None, None)):
        rows, columns = ((3 - k) // 2 for k in weight.shape[2:])
        x = F.conv2d(x, F.pad(weight.double(), (columns, columns, rows, rows)), padding=1)
        if gamma is not None:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
            x = (x - mean) / torch.sqrt(var + 1e-5) * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
            x = x.relu()
    torch.testing.assert_close(q.mapped(w)[0].double(), x.view(shape), rtol=1e-4, atol=1e-4)
    # the products that GPUs take
    product = _conv_as_product(image.float(), m.conv1, (m.conv1.shape[2] // 2, m.conv1.shape[3] // 2))
    rows, columns = ((3 - k) // 2 for k in m.conv1.shape[2:])
    expected = F.conv2d(image, F.pad(m.conv1.double(), (columns, columns, rows, rows)), padding=1)
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["residual", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_weights_are_decoded_codes(shape: tuple[int, ...], form: str) -> None:
    w = bank(shape)
    q = lns(w, form=form)
    away_from_identity(q)
    encoded = q.encode(w)
    assert torch.equal(q.fake(w), encoded.decode())
    torch.testing.assert_close(encoded.scale, w.abs().mean())
    assert set(encoded.codes.unique().tolist()) <= {-1.0, 1.0}
    if w.numel() > 10:
        assert not torch.equal(encoded.codes, sign(w)), "this mapping flips nothing: a poor test"


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (64, 1, 3, 3), (1, 1, 3, 3), (33, 7, 1, 1)])
def test_codes_do_not_depend_on_the_memory_format(shape: tuple[int, ...]) -> None:
    def other_format(x: Tensor) -> Tensor:  # contiguous() would leave one channel as it is
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x.detach())

    w = bank(shape)
    q = lns(w, form="plain")
    one = q.encode(w)
    other = copy.deepcopy(q)
    for p in other.mapping.parameters():
        if p.ndim == 4:
            p.data = other_format(p)
    found = other.encode(other_format(w))
    assert torch.equal(found.codes, one.codes)
    assert torch.equal(found.scale, one.scale)
    assert torch.equal(other.mapped(other_format(w))[0], q.mapped(w)[0])


def test_zero_weights() -> None:
    w = torch.zeros(4, 3, 3, 3)
    assert torch.equal(lns(w).fake(w), torch.zeros_like(w))
    assert lns(w).encode(w).codes.eq(1).all()


def test_the_residual_form_starts_at_sign() -> None:
    """No flip in a whole network, and outputs equal to those of sign with the layer's scale."""
    net, plain = network(), network("sign")
    flips = 0
    for (_, ours), (_, theirs) in zip(quantized_layers(net), quantized_layers(plain), strict=True):
        codes, expected = (layer.weight_quantizer.encode(layer.weight).codes for layer in (ours, theirs))
        flips += int((codes != expected).sum())
    assert flips == 0
    away = network(form="plain")
    counts = [
        int((layer.weight_quantizer.encode(layer.weight).codes != sign(layer.weight)).sum())
        for _, layer in quantized_layers(away)
        if isinstance(layer.weight_quantizer, LNS)
    ]
    assert min(counts) > 0, "the plain form starts at random"


@pytest.mark.parametrize("gradient", ["identity", "clipped"])
def test_at_the_identity_a_step_on_the_latent_is_dorefas(gradient: str) -> None:
    w = bank((8, 6, 3, 3))
    upstream = bank((8, 6, 3, 3), seed=9)
    latent = w.clone().requires_grad_()
    q = lns(w, gradient=gradient)
    (q.fake(latent) * upstream).sum().backward()
    inside = (w / w.abs().mean()).abs() <= 1 if gradient == "clipped" else torch.ones_like(w)
    torch.testing.assert_close(latent.grad, upstream * inside)
    assert q.mapping.conv3.grad.abs().sum() > 0


# --- q of the forward pass is used once ---


def test_the_loss_takes_q_from_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    w = bank((8, 6, 3, 3)).requires_grad_()
    q = lns(w.detach())
    away_from_identity(q)
    calls: list[int] = []
    mapped = LNS.mapped
    monkeypatch.setattr(LNS, "mapped", lambda self, latent: calls.append(1) or mapped(self, latent))

    def loss() -> float:
        return float(q.auxiliary_loss(w))

    q.fake(w)
    first = loss()
    assert len(calls) == 1, "f ran twice in a step"
    assert loss() == first
    assert len(calls) == 2, "q was handed over twice"
    for change in (lambda: w.mul_(1.5).add_(0.01), lambda: q.mapping.conv1.add_(0.3)):
        q.fake(w)
        with torch.no_grad():
            change()
        expected = corrected_loss(mapped(q, w)[0], sign(w.detach()), 0.005, 0.005).mean()
        assert loss() == float(expected), "q is stale"
    with torch.no_grad():
        q.fake(w)
    calls.clear()
    q.auxiliary_loss(w).backward()
    assert len(calls) == 1, "a q without a graph was kept"


def test_a_prepared_network_survives() -> None:
    net = network().train()
    x, y = images()
    loss = F.cross_entropy(net(x), y) + auxiliary_loss(net)
    net(x)  # q is kept, part of a graph
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    twin.load_state_dict(net.state_dict())
    assert not any("kept" in key for key in net.state_dict())
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _, layer in quantized_layers(net):
            q = layer.weight_quantizer
            assert torch.equal(q.fake(layer.weight).float(), q.encode(layer.weight).decode())


def test_a_compiled_network_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = prepare(nn.Sequential(nn.Conv2d(4, 6, 3)), method="lns", edges="none").train()
    with torch.no_grad():
        for p in mapping_parameters(net):
            p.add_(torch.randn(p.shape) * 0.1)
    x = torch.randn(2, 4, 5, 5)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for model, forward in ((net, net), (twin, compiled)):
        (forward(x).square().mean() + auxiliary_loss(model)).backward()
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_parameter_groups() -> None:
    net = network()
    groups = {g["name"]: g for g in parameter_groups(net, 0.1, 1e-4, mapping_lr_scale=3.0)}
    assert {id(p) for p in groups["mapping"]["params"]} == {id(p) for p in mapping_parameters(net)}
    assert groups["mapping"]["lr"] == pytest.approx(0.3)
    assert sum(len(g["params"]) for g in groups.values()) == len(list(net.parameters()))
    assert "mapping" not in {g["name"] for g in parameter_groups(network("sign"), 0.1)}


def test_trained_frozen_and_run() -> None:
    """Two steps, then the Graph: no mapping in it, and the integers are the training graph's."""
    net = network(alpha=0.1).train()
    x, y = images()
    optimizer = torch.optim.SGD(parameter_groups(net, 0.05, latent_lr_scale=20), lr=0.05, momentum=0.9)
    flips = FlipCounter(net)
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(net(x), y) + auxiliary_loss(net)).backward()
        optimizer.step()
    assert 0 < flips.update()["flips_start"] < 1
    net.eval()
    graph = freeze(net, x[:2])
    assert not [name for name in graph.tensors if "mapping" in name]
    binary = {n: t.data for n, t in graph.tensors.items() if t.codes is not None and t.codes.bits == 1}
    layers = [layer for _, layer in quantized_layers(net) if isinstance(layer.weight_quantizer, LNS)]
    assert len(binary) == len(layers) == 3
    for data, layer in zip(binary.values(), layers, strict=True):
        codes = layer.weight_quantizer.encode(layer.weight).codes.permute(0, 2, 3, 1).numpy()
        assert np.array_equal(data, codes)


# --- the trainer ---


def lns_recipe(start: Path | str | None, **changes: object):
    changes = {"quantize__method": "lns", "train__epochs": 2, "train__lr": 0.02, **changes}
    return recipe(**changes, **({} if start is None else {"train__start_from": str(start)}))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A float, a sign and an SLB run."""
    place = tmp_path_factory.mktemp("baselines")
    for method in ("float", "sign", "slb"):
        bits = 32 if method == "float" else 1
        train(recipe(quantize__method=method, quantize__activation_bits=bits, train__epochs=1), place / method)
    return place


def test_what_lns_starts_from(runs, tmp_path):
    way_out = (
        "LNS fine-tunes a binary network: train one with method sign or dorefa and give its run as train.start_from"
    )
    for start, why in (
        (None, "starts from nothing"),
        (runs / "float", "is a float layer"),
        (runs / "slb", "is SLB with 1 bit: its codes are not the signs"),
    ):
        with pytest.raises(RecipeError, match=f"{way_out} .*{why}"):
            train(lns_recipe(start), tmp_path / "run")
    for start, error, message in (
        (tmp_path / "none", RunError, "train.start_from: .*none is not there"),
        (tmp_path, RunError, "train.start_from: .*not a run directory"),
        (runs / "sign" / "checkpoints" / "last.ckpt", RunError, "does not tell the recipe and the input"),
    ):
        with pytest.raises(error, match=message):
            train(lns_recipe(start), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.start_from: .* lacks 'stem.weight' in the shape of this model"):
        train(lns_recipe(runs / "sign", model__width=8), tmp_path / "run")
    made = recipe(quantize__method="sign", train__mapping_lr_scale=2)
    with pytest.raises(RecipeError, match=r"mapping_lr_scale needs a method with a mapping network"):
        train(made, tmp_path / "run")
    made = recipe(quantize__method="sign", train__start_from=str(runs / "sign"), train__warm_start=1)
    with pytest.raises(RecipeError, match=r"warm_start needs a method with a mapping network, like lns; method 'sign'"):
        train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Watch(Stop):
    """Keeps the parameters as they are after some steps."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, _trainer, module):
        self.seen[0] = self._of(module)

    def on_train_batch_end(self, trainer, module, *_args):
        self.seen[trainer.global_step] = self._of(module)

    def _of(self, module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def test_a_warm_start_moves_only_the_mapping(runs, tmp_path):
    made = lns_recipe(
        runs / "sign",
        train__warm_start=0.5,
        train__epochs=1,
        train__latent_weight_decay=0.01,
        train__weight_decay=0.01,
        quantize__options={"form": "plain"},
    )
    watch = Watch()
    train(made, tmp_path / "run", callbacks=[watch])
    steps = max(watch.seen)
    start, trained = watch.seen[0], _state(runs / "sign")
    mapping = {name for name in start if ".mapping." in name}
    assert mapping
    assert all(torch.equal(start[name], trained[name]) for name in start if name not in mapping), "not the baseline"
    for step in range(1, steps // 2 + 1):
        moved = {name for name in start if not torch.equal(watch.seen[step][name], start[name])}
        assert moved == mapping, f"after step {step}"
    after = watch.seen[steps // 2 + 1]
    assert {name for name in start if not torch.equal(after[name], watch.seen[steps // 2][name])} == set(start)


def test_ablations_by_configuration_alone(runs, tmp_path):
    """Plain fine-tuning, the mapping without noisy loss, LNS: from the same checkpoint."""
    best = runs / "sign" / "checkpoints" / "best.ckpt"
    for name, changes, has_loss in (
        ("plain", {"quantize__method": "sign"}, False),
        ("mapping", {"quantize__options": {"alpha": 0}}, False),
        ("full", {"train__mapping_lr_scale": 2.0, "quantize__options": {"rho": 0.2}}, True),
    ):
        watch = Watch()
        train(lns_recipe(best, train__epochs=1, **changes), tmp_path / name, callbacks=[watch])
        source = torch.load(best, weights_only=True)["state_dict"]
        assert all(torch.equal(p, source[key]) for key, p in watch.seen[0].items() if ".mapping." not in key)
        (row,) = read_metrics(tmp_path / name)
        assert (row["aux_loss"] is not None) == has_loss
        assert (row["noisy_gradient_ratio"] is not None) == has_loss
        if has_loss:
            assert row["noisy_gradient_ratio"] > 0
        assert row["gap"] == 0
        warned = read_run(tmp_path / name)["warnings"]
        assert [text.partition(":")[0] for text in warned] == ["LNS with rho_plus = 0.2, rho_minus = 0.2"] * has_loss
    page = write_report(tmp_path / "full")[0].read_text()
    assert "Noisy supervision" in page
    assert "Warning: LNS with rho_plus = 0.2" in page
    # a run goes on from another of its own kind, mapping included
    _same(started(lns_recipe(tmp_path / "full")), _state(tmp_path / "full"))


def test_resumed_with_a_teacher_equals_uninterrupted(runs, tmp_path):
    distill = {"teacher": str(runs / "float"), "weight": 0.5, "temperature": 2.0}
    made = lns_recipe(runs / "sign", train__epochs=3, train__warm_start=1.5, train__distill=distill)
    assert train(made, tmp_path / "whole").run["status"] == "finished"
    with pytest.raises(ValueError, match="power cut"):
        train(made, tmp_path / "cut", callbacks=[Stop(2, ValueError("power cut"))])
    train(made, tmp_path / "cut", resume=True)
    _same(_state(tmp_path / "cut"), _state(tmp_path / "whole"))
    assert _rows(tmp_path / "cut") == _rows(tmp_path / "whole")


def test_exported_with_proof(runs, tmp_path):
    train(lns_recipe(runs / "sign", quantize__residual_dtype="float16"), tmp_path / "run")
    proof = export_run(tmp_path / "run").proof
    assert proof.integers > 0
    assert proof.integers_differ == 0
    assert proof.decisions_changed == 0


def started(made) -> dict[str, Tensor]:
    """The network of a recipe before its first step."""
    spec = InputSpec.from_json(read_run(made.train.start_from)["input"])
    return build_network(made, spec, read_start(made.train.start_from)).state_dict()


def test_what_the_other_methods_start_from(runs):
    """Real weights go anywhere, SLB's logits to SLB alone, a quantizer's state to its own kind."""
    slb, plain = _state(runs / "slb"), _state(runs / "sign")
    _same(started(recipe(train__start_from=str(runs / "slb"))), slb)
    two_bits = recipe(train__start_from=str(runs / "slb"), quantize__weight_bits=2)
    with pytest.raises(RecipeError, match="logits of SLB with 1 bit, and only the same method with the same bits"):
        started(two_bits)
    found = started(recipe(train__start_from=str(runs / "sign"), quantize__method="dorefa"))
    assert {key for key in found if key in plain} >= {key for key in plain if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    assert any(key.endswith("input_quantizer.range") for key in plain), "no quantizer with a state"
    logits = started(recipe(train__start_from=str(runs / "sign")))
    key = "blocks.0.body.0.conv.weight"
    assert torch.equal(sign(logits[key]), sign(plain[key]))
    assert not torch.equal(logits[key], plain[key])


def test_recipe_keys():
    with pytest.raises(RecipeError, match=r"unknown key 'train\.float_init'"):
        recipe(train__float_init="x")
    with pytest.raises(RecipeError, match=r"warm_start of 3\.0 epochs in a run of 3"):
        recipe(train__warm_start=3)
    with pytest.raises(RecipeError, match=r"quantize: .*must be below 1"):
        recipe(quantize__method="lns", quantize__options={"rho": 0.5})
    tree = lns_recipe("runs/x").plain()
    assert parse_recipe(tree) == lns_recipe("runs/x")
    assert list(itertools.islice(tree["train"], 1)) == ["epochs"]
