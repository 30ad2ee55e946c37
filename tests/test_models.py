"""Every registered network: shapes, what is published about it, and the whole way: prepare, freeze, engine."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from lowbit.graph import Graph
from lowbit.runtime import Engine
from lowbit.train import Pixels, QuantConv2d, Residual, calibrate_batchnorm, freeze, prepare
from lowbit.train.layers import quantized_layers
from lowbit.train.models import MODELS, build_model, model_arguments, model_factory
from lowbit.train.models.blocks import PReLU, RPReLU
from lowbit.train.models.reactnet import ReActNetA
from lowbit.train.proof import Proof, prove
from lowbit.train.quantizers import ACTIVATIONS

CLASSIFIERS = [name for name in MODELS if "classes" in inspect.signature(model_factory(name)).parameters]
SIDE = 98  # odd sides below a stem: 49, 25, 13, 7; AlexNet flattens 2x2


def small(name: str, in_channels: int = 3, image_size: int = SIDE, **arguments: object) -> nn.Module:
    """Model `name` with a sixteenth of its width, at least 4, and of its equal blocks the first."""
    width = max(model_arguments(name)["width"] // 16, 4)
    width += width % 2
    shape = {"classes": 7, "in_channels": in_channels, "image_size": image_size}
    model = build_model(name, **shape, width=width, **arguments)
    if hasattr(model, "blocks"):
        first = {str(block): block for block in reversed(model.blocks)}
        model.blocks = nn.Sequential(*reversed(first.values()))
    return model


def streams(model: nn.Module) -> int:
    """Residual modules that round one value: the stem's, and those of nonlinearities behind a sum."""
    return sum(isinstance(getattr(m, "stream", None), Residual) for m in model.modules())


def images(count: int, side: int = SIDE, channels: int = 3) -> Tensor:
    """Coarse random patterns, so that there are edges at every scale."""
    g = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, channels, 6, 6, generator=g) * 255
    return nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


def randomise(model: nn.Module) -> None:
    """Batch norms with negative and zero factors, nonlinearities with every kind of slope and shift."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | PReLU | RPReLU):
                for p in module.parameters(recurse=False):
                    p.copy_(torch.randn(p.shape, generator=g) * (1 if isinstance(module, nn.BatchNorm2d) else 0.3))
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] = 0


def proven(model: nn.Module, x: Tensor, **kwargs: object) -> tuple[nn.Module, Graph, Proof]:
    """Prepare, randomise, calibrate, freeze and prove it."""
    model = prepare(model, "sign", 1, 1, image=Pixels((100, 110, 120), 1 / 64), **kwargs)
    randomise(model)
    model.train()
    with torch.no_grad():
        model(x)  # the 8-bit activations measure their range
    calibrate_batchnorm(model, [x])
    with torch.no_grad():
        logits = model.eval()(x)
        model.head.bias -= logits.mean(0)  # else one class wins everywhere
        assert len(model(x).argmax(1).unique()) > 1
    graph = freeze(model.eval(), x[:1])
    return model, graph, prove(model, graph, Engine(graph), x)


def assert_proven(proof: Proof) -> None:
    assert proof.first_difference is None
    assert proof.integers_differ == 0
    assert proof.integers > 0
    assert proof.root_flips == 0
    assert proof.decisions_changed == 0
    assert proof.decisions == proof.inputs


CHECKS = {
    "int8-edges": {"edges": "int8"},
    "float-edges": {"edges": "float", **({"activation": "reactnet"} if "reactnet" in ACTIVATIONS else {})},
}


SEEN: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_frozen_and_run(name: str, kind: str):
    """Every integer of the engine is the interpreter's, every code the training graph's."""
    torch.manual_seed(0)
    model = small(name)
    same = SEEN.setdefault((str(model), kind), name)
    if same != name:
        pytest.skip(f"{same} is the same network when each block comes once")
    has_stream = any(isinstance(m, Residual) for m in model.modules())
    half = has_stream and kind == "int8-edges"
    model, graph, proof = proven(model, images(6), residual_dtype="float16" if half else "float32", **CHECKS[kind])
    assert_proven(proof)
    if half:
        types = graph.validate()
        sums = [n for n in graph.nodes if n.op == "add" and len(n.inputs) == 2]
        assert len(sums) == sum(isinstance(m, Residual) for m in model.modules()) - streams(model)
        for node in graph.nodes:
            readers = [n.op for n in graph.nodes if node.name in n.inputs]
            # each sum is rounded, and whatever is kept for a second reader is a float16 stream or codes
            assert node not in sums or readers == ["cast"], node.name
            assert len(readers) < 2 or types[node.name].dtype in ("float16", "codes"), node.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_frozen_and_run_as_published(name: str, kind: str):
    """The same at full width and depth: 224x224 and 1000 classes, or 32x32 and 10 where those are the defaults."""
    torch.manual_seed(0)
    parameters = inspect.signature(model_factory(name)).parameters
    classes = parameters["classes"].default
    side = 224 if classes == 1000 else 32
    model = build_model(name, classes=classes, in_channels=3, image_size=side)
    dtype = "float16" if any(isinstance(m, Residual) for m in model.modules()) and kind == "int8-edges" else "float32"
    _, _, proof = proven(model, images(2, side), residual_dtype=dtype, **CHECKS[kind])
    assert proof.integers_differ == 0
    assert proof.integers > 0
    assert proof.root_flips <= 1e-6 * proof.root_activations
    assert proof.decisions_changed == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [64, 77])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shapes_and_gradients(name, size, channels):
    torch.manual_seed(0)
    model = small(name, channels, size)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_prepared(name):
    torch.manual_seed(0)
    prepared = prepare(small(name, in_channels=1), "slb", 1, 1, image=Pixels((73,), 1 / 90))
    x = images(2, channels=1)
    prepared.train()
    prepared(x).sum().backward()
    with torch.no_grad():
        assert prepared.eval()(x).isfinite().all()


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


@pytest.mark.parametrize("structure", ["plain", "bireal"])
def test_resnet20_is_the_published_one(structure):
    model = build_model("resnet20", classes=10, in_channels=3, image_size=32, structure=structure)
    threes = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    ones = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert len(threes) == 19
    assert len(ones) == 2
    assert count(model, nn.Linear) == 1
    # stem 432; 6 * 9*16^2; 9*16*32 + 5 * 9*32^2; 9*32*64 + 5 * 9*64^2
    assert sum(m.weight.numel() for m in threes) == 432 + 13_824 + 4_608 + 46_080 + 18_432 + 184_320
    assert count(model, Residual) == (10 if structure == "plain" else 19)


def test_resnet20_in_float():
    relu = build_model(
        "resnet20",
        classes=10,
        in_channels=3,
        image_size=32,
        nonlinearity="relu",
        order="conv-bn-act",
        structure="plain",
    )
    assert count(relu, nn.ReLU) == 19
    assert count(relu, nn.PReLU) == 0


def test_vgg_small_is_the_published_one():
    model = build_model("vgg_small", classes=10, in_channels=3, image_size=32)
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert weights == [9 * 3 * 128, 9 * 128**2, 9 * 128 * 256, 9 * 256**2, 9 * 256 * 512, 9 * 512**2]
    assert model.head.in_features == 512 * 4 * 4
    assert count(model, nn.MaxPool2d) == 3


def test_bireal_resnet14_is_the_demo_network():
    model = build_model("bireal_resnet14", classes=10, in_channels=1, image_size=28)
    threes = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == 13
    # stem 144; 4 * 9*16^2; 9*16*32 + 3 * 9*32^2; 9*32*64 + 3 * 9*64^2
    assert sum(m.weight.numel() for m in threes[1:]) == 9_216 + 4_608 + 27_648 + 18_432 + 110_592
    assert count(model, Residual) == 13
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[1:]))
    model(torch.randn(2, 1, 28, 28))
    assert sizes == [(16, 14, 14)] * 4 + [(32, 7, 7)] * 4 + [(64, 4, 4)] * 4


#: name, its arguments, parameters, binary and float multiply-adds at 224x224, as published or (*) from the layers by hand:
#: ResNet-18 and -34: torchvision's counts of He et al.'s networks; Bi-Real and ReActNet: 1808.00278 table 3, 2003.03488 table 1
#: (1.68e9, 3.53e9, 4.82e9 binary; 1.39e8, 1.39e8, 0.12e8 float operations); AlexNet (*): 62,368,776 weights and 19,328 of BN.
PUBLISHED = [
    ("resnet18", {"nonlinearity": "relu"}, 11_689_512, 1.676e9, 1.38e8),
    ("resnet34", {"nonlinearity": "relu"}, 21_797_672, 3.526e9, 1.38e8),
    ("bireal_resnet18", {}, 11_689_512, 1.68e9, 1.39e8),
    ("bireal_resnet34", {}, 21_797_672, 3.53e9, 1.39e8),
    ("reactnet18", {}, 11_689_512 + 3 * 3_840, 1.68e9, 1.39e8),
    ("reactnet_a", {}, 29.3e6, 4.82e9, 0.12e8),
    ("alexnet", {}, 62_368_776 + 19_328, 1.026e9, 1.095e8),
]


@pytest.mark.parametrize(("name", "arguments", "parameters", "binary", "real"), PUBLISHED)
def test_parameters_and_multiply_adds_are_the_published_ones(name, arguments, parameters, binary, real):
    with torch.device("meta"):
        model = build_model(name, classes=1000, in_channels=3, image_size=224, **arguments)
    found = sum(p.numel() for p in model.parameters())
    if isinstance(parameters, int):
        assert found == parameters
    else:  # published with three digits
        assert found == pytest.approx(parameters, rel=0.002)
    macs: dict[str, int] = {}

    def counter(path: str):
        def hook(module: nn.Module, _args: object, out: Tensor) -> None:
            macs[path] = module.weight.numel() * out[0, 0].numel()

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(counter(path))
    model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    prepared = prepare(model, "sign", 1, 1, edges="float")
    low = {path for path, layer in quantized_layers(prepared) if layer.weight_quantizer.bits == 1}
    # tolerance 1 %: papers round to two or three digits, and some count the batch norms
    assert sum(macs[path] for path in low) == pytest.approx(binary, rel=0.01)
    assert sum(n for path, n in macs.items() if path not in low) == pytest.approx(real, rel=0.015)


@pytest.mark.parametrize("name", [n for n in MODELS if "resnet" in n and "14" not in n and "20" not in n])
def test_imagenet_resnets_have_the_published_stages(name):
    with torch.device("meta"):
        model = build_model(name, classes=1000, in_channels=3, image_size=224)
        sizes = []
        for block in model.blocks:
            block.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[1:]))
        model(torch.empty(2, 3, 224, 224))
    basic = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}[name[-2:]]
    each = 1 if name.startswith("resnet") else 2
    assert sizes == [(64 << i, 56 >> i, 56 >> i) for i, n in enumerate(basic) for _ in range(each * n)]
    assert model.stem.conv.kernel_size == (7, 7)
    pointwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert [m.stride for m in pointwise] == [(2, 2) if each == 1 else (1, 1)] * 3
    assert count(model, nn.AvgPool2d) == (0 if each == 1 else 3)


def test_alexnet_is_xnor_nets():
    with torch.device("meta"):
        model = build_model("alexnet", classes=1000, in_channels=3, image_size=227)
    weights = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert weights == [
        (96, 3, 11, 11), (256, 96, 5, 5), (384, 256, 3, 3), (384, 384, 3, 3), (256, 384, 3, 3),
        (4096, 256 * 6 * 6), (4096, 4096), (1000, 4096),
    ]  # fmt: skip
    order = [type(m).__name__ for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    assert order == [
        "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "BatchNorm2d",
        "Conv2d", "MaxPool2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "Conv2d", "MaxPool2d", "BatchNorm2d",
        "Flatten", "Linear", "BatchNorm1d", "Linear", "BatchNorm1d", "ReLU", "Linear",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [63, 64, 94, 95, 224, 227])
def test_alexnet_takes_any_size_it_can(size):
    with torch.device("meta"):
        model = build_model("alexnet", classes=10, in_channels=1, image_size=size, width=3)
        assert model(torch.empty(2, 1, size, size)).shape == (2, 10)


def test_reactnet_a_is_the_published_one():
    with torch.device("meta"):
        model = build_model("reactnet_a", classes=1000, in_channels=3, image_size=224)
        sizes = []
        for block in model.blocks[1::2]:
            block.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[1:]))
        model(torch.empty(2, 3, 224, 224))
    channels, sides = [64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2, [112, 56, 56, 28, 28] + [14] * 6 + [7] * 2
    assert sizes == [(c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert [b.unit.conv.kernel_size for b in model.blocks] == [(3, 3), (1, 1)] * 13
    # all convolutions but the stem are binary: no 1x1 of a main branch is an edge
    prepared = prepare(small("reactnet_a"), "sign", 1, 1, edges="int8")
    convolutions = [m for m in prepared.modules() if isinstance(m, QuantConv2d)]
    assert [m.weight_quantizer.bits for m in convolutions] == [8] + [1] * (len(convolutions) - 1)
    assert count(prepared, nn.Conv2d) == 0


def test_reactnet_a_doubles_as_two_joined_branches_do():
    """One convolution C -> 2 C and the shortcut twice: the numbers of two convolutions C -> C with a shortcut each."""
    torch.manual_seed(2)
    model = ReActNetA(classes=5, in_channels=3, width=4, nonlinearity="rprelu").eval()
    randomise(model)
    block = next(b for b in model.blocks if b.unit.conv.kernel_size == (1, 1) and b.unit.conv.out_channels == 16)
    conv, bn, c = block.unit.conv, block.unit.bn, 8
    with torch.no_grad():
        conv.weight.copy_(conv.weight.sign())
    x = torch.randint(-8, 8, (2, c, 5, 5)).float()
    branches = []
    for half in (slice(0, c), slice(c, 2 * c)):
        y = nn.functional.conv2d(x, conv.weight[half])
        statistics = bn.running_mean[half], bn.running_var[half], bn.weight[half], bn.bias[half]
        branches.append(nn.functional.batch_norm(y, *statistics, eps=bn.eps) + x)
    assert torch.equal(block(x), block.act(torch.cat(branches, 1)))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_orders_and_nonlinearities(name):
    def choices(argument: str) -> list[str]:
        try:
            small(name, **{argument: "?"})
        except ValueError as error:
            message = str(error).partition(":")[2]
            return [word.strip("' ") for word in message.replace(" or ", ",").split(",")]
        raise AssertionError(f"{argument}='?' was taken")

    assert "nonlinearity" in model_arguments(name)
    orders = choices("order") if "order" in model_arguments(name) else [None]
    assert choices("nonlinearity") == ["none", "relu", "prelu", "rprelu"]
    for order in orders:
        for kind in choices("nonlinearity"):
            model = small(name, nonlinearity=kind, **({} if order is None else {"order": order}))
            assert model(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 7)
            assert (count(model, RPReLU) > 0) == (kind == "rprelu")


@pytest.mark.parametrize("order", ["conv-bn-act", "conv-act-bn", "conv-bn-add-act"])
def test_the_order_is_what_it_says(order):
    model = small("bireal_resnet14", nonlinearity="rprelu", order=order)
    seen = []
    block = model.blocks[0]
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | RPReLU | Residual):
            module.register_forward_hook(lambda _m, _i, _o, name=name: seen.append(name))
    model(torch.randn(2, 3, SIDE, SIDE))
    bn, act = ["body.0.bn"], ["body.0.act"]
    middle = {"conv-bn-act": [*bn, *act, "add"], "conv-act-bn": [*act, *bn, "add"]}.get(
        order, [*bn, "add", "act", "stream"]
    )
    assert seen == ["body.0.conv", *middle]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_prelu_is_that_of_torch(shape):
    torch.manual_seed(1)
    ours, torchs = PReLU(3), nn.PReLU(3)
    torch.nn.init.normal_(ours.weight)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    x.view(-1)[:3] = torch.tensor([0.0, -0.0, 1.0])
    grad = torch.randn(shape)
    results = []
    for module in (ours, torchs):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(grad)
        results.append((out.detach(), leaf.grad, module.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_rprelu_is_its_formula(shape, dtype):
    torch.manual_seed(1)
    module = RPReLU(3)
    randomise(module)
    gamma, beta, zeta = (p.detach().clone().requires_grad_() for p in (module.gamma, module.beta, module.zeta))
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        x[0, 0].fill_(module.gamma[0].to(dtype).item())  # on the kink
    grad = torch.randn(shape).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = module(ours)
    out.backward(grad)

    def v(p: Tensor) -> Tensor:
        return p.to(dtype).view(-1, *[1] * (len(shape) - 2))

    expected = nn.functional.prelu(theirs - v(gamma), beta.to(dtype)) + v(zeta)
    expected.backward(grad)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(out, module.eval()(x))
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ours.grad, theirs.grad, **loose)
    for mine, other in zip(module.parameters(), (gamma, beta, zeta), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **({"rtol": 5e-2, "atol": 0.1} if loose else {}))


def test_refusals():
    shape = {"classes": 10, "in_channels": 1, "image_size": 28}
    with pytest.raises(ValueError, match="unknown model 'resnet2': did you mean 'resnet20'"):
        build_model("resnet2", **shape)
    with pytest.raises(ValueError, match="'resnet20' has no argument 'structur': did you mean 'structure'"):
        build_model("resnet20", **shape, structur="plain")
    with pytest.raises(ValueError, match="structure 'deep'"):
        build_model("resnet20", **shape, structure="deep")
    with pytest.raises(ValueError, match="nonlinearity 'gelu'"):
        build_model("vgg_small", **shape, nonlinearity="gelu")
    with pytest.raises(ValueError, match="order 'bn-conv'"):
        build_model("vgg_small", **shape, order="bn-conv")
    with pytest.raises(ValueError, match="at least 8"):
        build_model("vgg_small", classes=10, in_channels=1, image_size=7)
    with pytest.raises(ValueError, match="image_size 62: AlexNet needs at least 63"):
        build_model("alexnet", classes=10, in_channels=1, image_size=62)
    with pytest.raises(ValueError, match="width 8: .* multiple of 3"):
        build_model("alexnet", classes=10, in_channels=1, image_size=224, width=8)
    with pytest.raises(ValueError, match="shortcut 'max': 'pool' or 'conv'"):
        build_model("resnet18", **shape, shortcut="max")
    with pytest.raises(ValueError, match="can't be imported"):
        build_model("no_such_package:net", **shape)


def test_your_own_model(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text(
        "from torch import nn\n"
        "def net(classes, in_channels, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "                         nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = build_model("my_own_net:net", classes=5, in_channels=1, image_size=28, width=6)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 5)
