"""freeze: the Graph gives the training graph's numbers; what can't be represented is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit import packfile
from lowbit.graph import Graph
from lowbit.train import FreezeError, Pixels, Residual, calibrate_batchnorm, freeze, prepare
from lowbit.train.freeze import to_numpy

PIXELS = Pixels((10, 120, 200), 1 / 64)


class Residuals(nn.Module):
    """Stem, a plain block, a down-sampling one, PReLU, two kinds of pooling, head."""

    def __init__(self, order: str = "conv-bn-act") -> None:
        super().__init__()
        self.order = order
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.stream = Residual()
        self.conv1, self.bn1, self.act1, self.add1 = (
            nn.Conv2d(8, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            Residual(),
        )
        self.conv2, self.bn2, self.add2 = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), Residual()
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.bn(self.stem(x)))
        y = self.conv1(x)
        y = self.act1(self.bn1(y)) if self.order == "conv-bn-act" else self.bn1(self.act1(y))
        x = self.add1(y, x)
        x = self.add2(self.bn2(self.conv2(x)), self.downsample(x))
        return self.fc(torch.flatten(self.pool(x), 1))


class Plain(nn.Module):
    """VGG-like: in-place ReLU, max pooling, flatten of a map, a low-bit linear layer, BatchNorm1d, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.MaxPool2d(2), nn.BatchNorm2d(12), nn.Hardtanh(),
            nn.Conv2d(12, 6, 3, padding=2, dilation=2), nn.LeakyReLU(0.2), nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.fc1, self.bn, self.drop, self.fc2 = (
            nn.Linear(6 * 16, 20),
            nn.BatchNorm1d(20),
            nn.Dropout(0.5),
            nn.Linear(20, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.fc2(self.drop(F.relu6(self.bn(self.fc1(x)))))


class Odds(nn.Module):
    """concat, pixel shuffle, per-channel shift, scale by a parameter, mean over H and W."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.c = nn.Conv2d(16, 16, 3, padding="same")
        self.shift = nn.Parameter(torch.randn(1, 16, 1, 1) * 0.1)
        self.scale = nn.Parameter(torch.rand(16, 1, 1) + 0.5)
        self.shuffle = nn.PixelShuffle(2)
        self.d = nn.Conv2d(4, 4, 5, stride=2, padding=2)
        self.e = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        x = self.c(x + self.shift) * self.scale - 0.25
        x = self.d(self.shuffle(x)).clamp(min=-3, max=3)
        return self.e(x.mean(dim=(2, 3)))


def randomise(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(5)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=g))  # negative and
                m.weight[0] = 0.0  # zero gamma
                m.bias.copy_(torch.randn(m.bias.shape, generator=g))
        elif isinstance(m, nn.PReLU):
            with torch.no_grad():
                m.weight.copy_(torch.randn(m.weight.shape, generator=g) * 0.3)


def frozen(model: nn.Module, x: Tensor, **kwargs: object) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    qmodel = prepare(model, **kwargs)
    randomise(qmodel)
    qmodel.train()
    calibrate_batchnorm(qmodel, [x])
    qmodel(x)  # the 8-bit activations measure their range
    calibrate_batchnorm(qmodel, [x])
    qmodel.eval()
    return qmodel, freeze(qmodel, x[:1])


def pixels(n: int = 16) -> Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def floats(n: int = 16) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


CASES = [
    (Residuals, {"image": PIXELS}),
    (Residuals, {"image": PIXELS, "residual_dtype": "float16"}),
    (lambda: Residuals("conv-act-bn"), {"image": PIXELS, "residual_dtype": "float16", "method": "sign"}),
    (Residuals, {"image": PIXELS, "edges": "float"}),
    (Residuals, {"weight_bits": 2, "activation_bits": 2}),
    (Residuals, {"weight_bits": 4, "activation_bits": 8, "activation": "pact", "edges": "none"}),
    (Residuals, {"weight_bits": 1, "activation_bits": 32}),
    (Residuals, {"weight_bits": 2, "options": {"learn_values": True}}),
    (Residuals, {"method": "float", "weight_bits": 32, "activation_bits": 32, "edges": "float", "image": PIXELS}),
    (Residuals, {"image": PIXELS, "state_batchnorm": True}),
    (Plain, {"image": PIXELS}),
    (Plain, {"weight_bits": 2, "activation_bits": 4}),
    (Plain, {"edges": "float"}),
    (Odds, {}),
    (Odds, {"edges": "none", "weight_bits": 2, "activation_bits": 1}),
]


@pytest.mark.parametrize(("build", "kwargs"), CASES)
def test_graph_gives_the_training_graphs_numbers(build, kwargs: dict, tmp_path) -> None:
    torch.manual_seed(0)
    x = pixels() if "image" in kwargs else floats()
    qmodel, graph = frozen(build(), x, **kwargs)
    with torch.no_grad():
        expected = qmodel(x).numpy()
    out, trace = graph.run(to_numpy(x), trace=True)
    # a sign that sits on zero may turn with the last bit of a sum; with these seeds none does
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)
    types = graph.validate()
    for name, value in trace.items():
        t = types[name]
        assert value.shape == (len(x), *t.shape), name
        assert value.dtype == np.dtype("int16" if t.codes else t.dtype), name
        if t.codes:
            assert value.min() >= t.codes.low, name
            assert value.max() <= t.codes.high, name
    path = tmp_path / "model.lowbit"
    lowbit.save(graph, path)
    assert packfile.read(path) == graph
    assert packfile.dumps(graph) == path.read_bytes()


@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d(1),
    ],
)
def test_pools_are_pytorchs(pool: nn.Module, size: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.pool = nn.Conv2d(3, 4, 3, padding=1), pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.a(x))

    x = (
        torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2)) - 3
    )  # a padding of 0 would be the maximum
    qmodel, graph = frozen(Net(), x, edges="none")
    np.testing.assert_allclose(graph.run(to_numpy(x)), to_numpy(qmodel(x)), rtol=1e-6, atol=1e-6)


def test_the_training_graphs_integers_are_in_the_graph() -> None:
    """Not close: equal, layer by layer."""
    x = pixels()
    qmodel, graph = frozen(Residuals(), x, image=PIXELS, residual_dtype="float16")
    _, trace = graph.run(to_numpy(x), trace=True)
    seen = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[f"{name}.quantize"] = to_numpy(module.input_quantizer.encode(args[0])).astype(np.int16)

        return hook

    for name in ("conv1", "conv2", "downsample.1"):
        qmodel.get_submodule(name).register_forward_pre_hook(record(name))
    qmodel(x)
    for name, codes in seen.items():
        assert np.array_equal(trace[name], codes), name
    assert np.array_equal(trace["input"], to_numpy(x).astype(np.int16) - np.array(PIXELS.zero_point))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"image": PIXELS},
        {"image": PIXELS, "method": "sign", "residual_dtype": "float16"},
        {"image": PIXELS, "method": "dorefa", "activation": "dorefa", "weight_bits": 2, "activation_bits": 4},
        {"method": "adabin", "activation": "adabin"},
        {"state_batchnorm": True, "weight_bits": 4, "activation_bits": 8, "activation": "pact"},
    ],
)
@pytest.mark.parametrize("build", [Residuals, Plain])
def test_a_network_on_integers_is_its_graph_to_the_last_bit(build, kwargs: dict) -> None:
    """Without float convolutions, whose order of summation is PyTorch's own, nothing is left that could differ."""
    x = pixels() if "image" in kwargs else floats()
    if build is Plain:
        kwargs = {k: v for k, v in kwargs.items() if k != "residual_dtype"}
    qmodel, graph = frozen(build(), x, edges="none", **kwargs)
    with torch.no_grad():
        expected = qmodel(x).numpy()
    assert np.array_equal(graph.run(to_numpy(x)).view(np.int32), expected.view(np.int32))


def test_a_threshold_right_on_a_number() -> None:
    """The mean of a few images' integers is often one of them, and after few steps gamma is 1 and beta 0: the sign of
    rounding errors, which PyTorch's own evaluation rounds another way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 64), nn.BatchNorm1d(64))
    model = prepare(net, "sign", edges="none")
    x = torch.randn(5, 64)
    calibrate_batchnorm(model, [x[:3]])
    model.eval()
    with torch.no_grad():
        y = model[0](x[:3])
        fused = F.batch_norm(y, model[1].running_mean, model[1].running_var, None, None, False, 0.0, 1e-5)
    assert (y == y.mean(0)).any()
    _, trace = freeze(model, x).run(x.numpy(), trace=True)
    ours = model[1](y)
    assert np.array_equal(trace["1.add"][:3].view(np.int32), ours.detach().numpy().view(np.int32))
    assert ((fused < 0) != (ours < 0)).any()  # so a difference would have shown


def test_one_bit_weights_take_one_bit() -> None:
    _, graph = frozen(Residuals(), pixels(), image=PIXELS)
    assert graph.tensors["conv1.weight"].nbytes == 8 * 8 * 9 / 8
    assert graph.tensors["stem.weight"].nbytes == 8 * 3 * 9
    after = {n.inputs[0]: n for n in graph.nodes if n.op in ("mul", "add") and len(n.inputs) == 1}
    assert [after[name].name for name in ("stem", "stem.mul", "bn.mul")] == ["stem.mul", "bn.mul", "bn.add"]
    assert after["conv1"].name == "bn1.mul"  # SLB's scale is 1, and times 1 says nothing
    assert graph.input.attrs["zero_point"] == (10, 120, 200)


def test_layers_that_read_the_same_codes_share_a_quantize() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.d(self.b(x) + self.c(x))

    _, graph = frozen(Fork(), floats(), edges="none", activation_bits=1)
    assert [n.name for n in graph.nodes if n.op == "quantize"] == ["a.quantize", "b.quantize", "d.quantize"]


def test_a_layer_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    x = floats()
    qmodel, graph = frozen(Twice(), x, edges="none")
    np.testing.assert_allclose(graph.run(to_numpy(x)), to_numpy(qmodel(x)), rtol=1e-5, atol=1e-5)
    assert sum(n.op == "conv2d" for n in graph.nodes) == 3


def test_training_mode_and_soft_weights_are_refused() -> None:
    qmodel = prepare(Residuals())
    with pytest.raises(FreezeError, match=r"training mode.*model.eval\(\)"):
        freeze(qmodel, floats())
    qmodel.eval()
    qmodel.conv1.hard = False
    with pytest.raises(FreezeError, match="conv1 is in training mode or soft"):
        freeze(qmodel, floats())


def test_diverged_networks_are_refused() -> None:
    qmodel = prepare(Residuals()).eval()
    with torch.no_grad():
        qmodel.bn1.bias[0] = float("nan")
    with pytest.raises(FreezeError, match="bn1.bias holds infinities or NaN"):
        freeze(qmodel, floats())


class Inner(nn.Module):
    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (torch.sigmoid, "odd .*sigmoid"),
        (lambda x: x / 3, r"odd .*write x \* \(1 / c\)"),
        (lambda x: -x, r"odd .*write x \* -1\.0"),
        (lambda x: 1 - x, r"odd .*write x \* -1\.0 \+ c"),
        (lambda x: x - F.relu(x), r"odd .*write a \+ b \* -1\.0"),
        (nn.ConvTranspose2d(4, 4, 2), "odd.*conv_transpose2d"),
        (lambda x: x * x, "odd .*multiplies two values"),
        (lambda x: x / x.abs().amax(), "odd .*abs"),
        (lambda x: x + torch.ones(16, 16), "odd .*not one number per channel"),
        (lambda x: x.transpose(1, 2), "odd .*transpose|odd .*permute"),
        (lambda x: x.reshape(x.size(0), 2, 2, 16, 16), "odd .*reshapes"),
        (lambda x: torch.cat([x, x], 2), "odd .*dimension 2"),
        (lambda x: F.max_pool2d(x, 2, dilation=2), "odd .*dilation"),
        (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), "odd .*count_include_pad"),
        (lambda x: F.adaptive_avg_pool2d(x, 3), "odd .*different sizes"),
        (lambda x: F.instance_norm(x), "odd "),
        (lambda x: x.half(), "odd .*float16"),
    ],
)
def test_ops_without_a_place_are_refused_by_layer(f, message: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.odd, self.b = nn.Conv2d(3, 4, 3, padding=1), Inner(f), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.odd(self.a(x))
                if f(torch.ones(1, 4, 16, 16)).dtype == torch.float16
                else self.b(self.odd(self.a(x)))
            )

    class Tail(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.a(x))

    qmodel = prepare(Tail(), edges="none").eval()
    with pytest.raises(FreezeError, match=message):
        freeze(qmodel, floats())


def test_inputs_that_the_network_cannot_take_are_refused() -> None:
    qmodel = prepare(Residuals()).eval()
    with pytest.raises(FreezeError, match="is a torch tensor, not a ndarray"):
        freeze(qmodel, floats().numpy())  # type: ignore[arg-type]
    with pytest.raises(FreezeError, match=r"fails on the example input, torch\.float32 of shape \(1, 1, 16, 16\)"):
        freeze(qmodel, torch.zeros(1, 1, 16, 16))


def test_branches_and_several_outputs_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(Residuals):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    class Two(Residuals):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y, y + 1

    with pytest.raises(FreezeError, match=r"torch.export can't trace"):
        freeze(prepare(Branch()).eval(), floats())
    assert "forward" not in capfd.readouterr().err  # torch.export's listing of the whole network
    with pytest.raises(FreezeError, match="returns 2 tensors"):
        freeze(prepare(Two()).eval(), floats())


def test_pixels_go_to_the_first_layer_only() -> None:
    class Leak(Residuals):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.float().mean()

    with pytest.raises(FreezeError, match="raw pixels"):
        freeze(prepare(Leak(), image=PIXELS).eval(), pixels())


def test_accumulators_beyond_32_bits_are_refused_by_layer() -> None:
    model = nn.Sequential(nn.Conv2d(60000, 1, 11, padding=5, bias=False), nn.Conv2d(1, 1, 1))
    qmodel = prepare(model, "slb", 4, 8, edges="none").eval()
    with torch.no_grad():
        qmodel[0].weight.zero_()
    with pytest.raises(FreezeError, match="^0 .conv2d.: the accumulator could reach"):
        freeze(qmodel, torch.zeros(1, 60000, 1, 1))
