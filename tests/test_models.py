"""Every registered network: shapes, what is published about it, and the door of ``prepare``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowbit.train import Pixels, Residual, prepare
from lowbit.train.models import MODELS, build_model, model_arguments
from lowbit.train.models.blocks import PReLU


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name, size, channels):
    torch.manual_seed(0)
    model = build_model(name, classes=7, in_channels=channels, image_size=size)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_prepared(name):
    torch.manual_seed(0)
    model = build_model(name, classes=10, in_channels=1, image_size=28)
    prepared = prepare(model, "slb", 1, 1, image=Pixels((73,), 1 / 90))
    x = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    prepared.train()
    prepared(x).sum().backward()
    with torch.no_grad():
        assert prepared.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_sum_can_be_rounded(name):
    """float16 streams: a network with skips has as many Residual modules as sums, and one for the stem."""
    model = build_model(name, classes=10, in_channels=1, image_size=28)
    sums = [m for m in model.modules() if isinstance(m, Residual)]
    traced = torch.export.export(model.eval(), (torch.randn(2, 1, 28, 28),)).graph
    adds = [n for n in traced.nodes if n.op == "call_function" and "add.Tensor" in str(n.target)]
    assert len(sums) == (len(adds) + 1 if adds else 0)


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["conv-bn-act", "conv-act-bn"])
@pytest.mark.parametrize("nonlinearity", ["none", "relu", "prelu"])
def test_orders_and_nonlinearities(name, order, nonlinearity):
    arguments = model_arguments(name)
    assert {"order", "nonlinearity"} <= arguments.keys()
    model = build_model(name, classes=3, in_channels=1, image_size=28, order=order, nonlinearity=nonlinearity)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)


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
