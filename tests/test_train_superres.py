"""Super-resolution's training half: pictures and patches, PSNR and SSIM, networks, and the whole way from a recipe to a proven file."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from lowbit import cli, interpreter, report, sidebyside
from lowbit.bench.superres import low_resolution
from lowbit.graph import Node
from lowbit.pictures import imresize, luma
from lowbit.published import published
from lowbit.runtime import load
from lowbit.train import evaluation, freeze, prepare, resize_bicubic
from lowbit.train.data import DATASETS, Augment, DataError
from lowbit.train.data import superres as data_of_pictures
from lowbit.train.data.superres import HELD_OUT, PHOTOGRAPHS, Pair, PatchBatches, Pictures, degrade, find_pictures
from lowbit.train.evaluation import evaluate_file, evaluate_run
from lowbit.train.export import export_run
from lowbit.train.models import build_model
from lowbit.train.models.superres import Gain, Shift
from lowbit.train.module import TrainingModule
from lowbit.train.proof import prove_pictures
from lowbit.train.recipe import Recipe, RecipeError, parse_recipe
from lowbit.train.rundir import InputSpec, columns, read_metrics, read_run
from lowbit.train.tasks import TASKS
from lowbit.train.tasks.superres import means, psnr, ssim
from lowbit.train.trainer import train
from lowbit.upscale import Upscaler

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def picture(seed: int, height: int = 60, width: int = 72) -> np.ndarray:
    """uint8 RGB: smooth colours, and edges that bicubic blurs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (5, 6, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse).astype(np.int16)
    y, x = np.mgrid[:height, :width]
    stripes = ((x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) // 5 % 2 * 60 - 30)[..., None]
    return (pixels + stripes * (x > width // 3)[..., None]).clip(0, 255).astype(np.uint8)


def write(folder: Path, names: list[str], **size: int) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(len(name) + 10 * i, **size)).save(path)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures to train on, of which one is held out, and two to test on."""
    base = tmp_path_factory.mktemp("pictures")
    write(base / "train", [f"{name}.png" for name in "abcdef"])
    write(base / "test", ["t1.png", "t2.jpg"], height=50, width=45)
    return base


def recipe(root: Path, **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "name": "tiny",
        "task": "superres",
        "seed": 3,
        "model": {"name": "bireal_sr", "width": 8, "blocks": 2},
        "quantize": {"method": "sign", "edges": "float"},
        "data": {
            "name": "picture_folder",
            "root": str(root),
            "patch": 8,
            "patches": 64,
            "best_of": 2,
            "augment": {"flip": True, "rotate": True},
        },
        "train": {"epochs": 3, "batch_size": 8, "optimizer": "adam", "lr": 3e-3, "loss": "mse"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return parse_recipe(tree)


# ------------------------------------------------------------------------------------------------ bicubic


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_the_graphs(factor: int) -> None:
    rng = np.random.default_rng(factor)
    node = Node("resize_bicubic", "r", ("x",), {}, {"factor": factor})
    for height, width in ((1, 1), (1, 4), (2, 3), (13, 9)):
        x = rng.standard_normal((2, height, width, 3), np.float32)
        expected = interpreter.RULES["resize_bicubic"](node, [x], {}, [])
        got = resize_bicubic(torch.from_numpy(x).permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(got, expected)
        assert np.allclose(got[0], imresize(x[0], factor), atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3])
def test_gradient_of_bicubic(factor: int) -> None:
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    y = resize_bicubic(x, factor)
    g = torch.randn_like(y)
    y.backward(g)
    assert x.grad is not None
    size = x[0, 0].numel()
    basis = torch.eye(size).view(size, 1, 3, 4)
    matrix = resize_bicubic(basis, factor).reshape(size, -1)  # one row for each pixel
    assert torch.allclose(x.grad.reshape(4, size), g.reshape(4, -1) @ matrix.T, atol=1e-5)


def test_bicubic_refuses() -> None:
    with pytest.raises(ValueError, match="by 2, 3 or 4, not 5"):
        resize_bicubic(torch.zeros(1, 1, 3, 3), 5)
    with pytest.raises(ValueError, match="images"):
        resize_bicubic(torch.zeros(3, 3), 2)


# ------------------------------------------------------------------------------------------------ PSNR, SSIM


def test_psnr_by_hand() -> None:
    target = np.full((6, 6), 100 / 255, np.float32)
    y = target.copy()
    assert psnr(y, target) == pytest.approx(100)
    y[2, 3] = 110 / 255
    y[0, 0] = 1.7  # clipped to 255, and in the border
    assert psnr(y, target, 1) == pytest.approx(10 * math.log10(255**2 / (100 / 16)), abs=1e-9)
    assert psnr(y, target) == pytest.approx(10 * math.log10(255**2 / ((100 + 155**2) / 36)), abs=1e-9)
    assert psnr(target + np.float32(0.4 / 255), target) == pytest.approx(100), "both are rounded to 8 bits"


def test_ssim_is_wangs() -> None:
    """Wang's formula with its window written out: 11x11, sigma 1.5, only where the window lies within."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 256, (20, 17)).astype(np.float32) / 255
    y = np.clip(np.rint((target + rng.normal(0, 0.1, target.shape)) * 255), 0, 255).astype(np.float32) / 255
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for i in range(20 - 10):
        for j in range(17 - 10):
            a, b = (z[i : i + 11, j : j + 11].astype(np.float64) for z in (y, target))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
            cov = (window * a * b).sum() - ma * mb
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(y, target) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(y, target, 2) != pytest.approx(np.mean(values), abs=1e-6)


def test_means() -> None:
    rows = [
        {"psnr": 30.0, "ssim": 0.9, "psnr_bicubic": 29.0, "ssim_bicubic": 0.8},
        {"psnr": 33.0, "ssim": 0.8, "psnr_bicubic": 30.0, "ssim_bicubic": 0.8},
    ]
    found = means(rows)
    assert (found["psnr"], found["gain"], found["smallest_gain"], found["images"]) == (31.5, 2.0, 1.0, 2)
    with pytest.raises(ValueError, match="no pictures"):
        means([])


# ------------------------------------------------------------------------------------------------ data


def test_degrade() -> None:
    y = luma(picture(1, 31, 46).astype(np.float32) / 255)
    low, high = degrade(y, 3)
    assert (low.shape, high.shape, low.dtype, high.dtype) == ((10, 15), (30, 45), np.float32, np.uint8)
    assert np.array_equal(high, np.rint(y[:30, :45] * 255))
    assert np.array_equal(low, imresize(high / np.float32(255), 1 / 3))


def test_find_pictures(tmp_path: Path) -> None:
    write(tmp_path, ["b.png", "a.jpg", "inner/c.png", ".hidden/d.png", ".e.png"])
    (tmp_path / "notes.txt").write_text("no picture")
    assert [p.relative_to(tmp_path).as_posix() for p in find_pictures(tmp_path)] == ["a.jpg", "b.png", "inner/c.png"]
    write(tmp_path / "Set5", ["image_SRF_2/x_HR.png", "image_SRF_2/x_LR.png", "image_SRF_4/x_HR.png"])
    assert [p.name for p in find_pictures(tmp_path / "Set5", 2)] == ["x_HR.png"]
    write(tmp_path / "Urban100", ["HR/y.png", "LR/y.png"])
    assert find_pictures(tmp_path / "Urban100", 2) == [tmp_path / "Urban100/HR/y.png"]
    with pytest.raises(DataError, match="no such folder"):
        find_pictures(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in this folder"):
        find_pictures(tmp_path / "empty")


def test_folder_data(folder: Path) -> None:
    data = DATASETS.get("picture_folder")(root=folder, patch=8, validation_size=40)
    assert isinstance(data, Pictures)
    assert (data.count("train"), data.count("val"), data.count("full"), data.count("test")) == (5, 1, 6, 2)
    assert InputSpec.of(data) == InputSpec(1, 8, 8, (0,), 1.0, (), 2)
    assert data.identity == DATASETS.get("picture_folder")(root=folder).identity
    ((low, high),) = data.evaluation("val", 7)
    assert (low.shape, high.shape) == ((1, 1, 20, 20), (1, 1, 40, 40))
    tested = list(data.pairs("test"))
    assert [pair.name for pair in tested] == ["t1.png", "t2.jpg"]
    assert tested[0][1].shape == (1, 1, 50, 44), "whole, but for what 2 does not divide"
    assert [len(x) for x in data.calibration(50, 20)] == [20, 20, 10]
    halved = DATASETS.get("picture_folder")(root=folder, patch=8, shrink=2)
    assert next(iter(halved.evaluation("val", 1)))[1].shape == (1, 1, 30, 36)
    assert next(iter(halved.pairs("test")))[1].shape == (1, 1, 50, 44), "test pictures are as they are"


def _symmetries(x: Tensor) -> list[Tensor]:
    return [torch.rot90(y, k) for y in (x, x.flip(-1)) for k in range(4)]


def test_patches_are_cut_out_of_the_pictures() -> None:
    """Every patch is a place of a picture, turned or mirrored as the large one is."""
    low = torch.arange(12 * 10.0).view(12, 10) / 255
    high = torch.arange(12 * 10).view(12, 10).repeat_interleave(2, 0).repeat_interleave(2, 1).to(torch.uint8)
    pictures = [(low.half(), high), (low.half() + 0.5, high + 100)]
    plain = PatchBatches(pictures, 2, 4, 200, 1, 50, seed=1)
    seen = set()
    for x, y in plain:
        assert (x.shape, y.shape) == ((50, 1, 4, 4), (50, 1, 8, 8))
        for small, large in zip(x[:, 0], y[:, 0], strict=True):
            corner = round(float(small[0, 0] % 0.5) * 255)
            seen.add((corner, bool(small[0, 0] > 0.47)))
            inside = torch.arange(4)[:, None] * 10 + torch.arange(4) + corner
            assert torch.equal(torch.round(small % 0.5 * 255), inside.float())
            assert torch.equal(large[::2, ::2] * 255 - large[0, 0] * 255, (inside - corner).float().round())
    assert len(seen) > 80, "of 126 places"
    turned = PatchBatches(pictures, 2, 4, 200, 1, 50, seed=1, augment=Augment(flip=True, rotate=True))
    kinds = set()
    for (x, y), (a, b) in zip(plain, turned, strict=True):
        for i in range(50):
            (kind,) = (k for k, z in enumerate(_symmetries(x[i, 0])) if torch.equal(z, a[i, 0]))
            assert torch.equal(_symmetries(y[i, 0])[kind], b[i, 0])
            kinds.add(kind)
    assert kinds == set(range(8))


def test_patches_depend_on_seed_epoch_and_batch_alone(folder: Path) -> None:
    data = DATASETS.get("picture_folder")(root=folder, patch=8, patches=32)
    one = data.batches(4, seed=5)
    one.set_epoch(2)
    whole = list(one)
    assert len(whole) == len(one) == 8
    again = DATASETS.get("picture_folder")(root=folder, patch=8, patches=32).batches(4, seed=5)
    again.set_epoch(2)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(whole, again, strict=True))
    ranks = [data.batches(4, seed=5, rank=r, world_size=2) for r in (0, 1)]
    for r, part in enumerate(ranks):
        part.set_epoch(2)
        assert all(torch.equal(a, whole[r::2][i][0]) for i, (a, _) in enumerate(part))
    one.set_epoch(3)
    assert not torch.equal(next(iter(one))[0], whole[0][0])


def test_the_hardest_of_the_places_drawn_is_taken(folder: Path) -> None:
    def error(best_of: int) -> float:
        data = DATASETS.get("picture_folder")(root=folder, patch=8, patches=64, best_of=best_of)
        return sum(float((resize_bicubic(x, 2) - y).square().mean()) for x, y in data.batches(16, seed=0))

    assert error(4) > 1.3 * error(1)


def test_pictures_that_cant_be_used(tmp_path: Path, logged: list[str]) -> None:
    write(tmp_path, ["a.png", "b.png", "c.png"])
    Image.fromarray(picture(1)[..., 0].astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    Image.fromarray(picture(2)[..., 0] > 127).save(tmp_path / "onebit.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    Image.fromarray(picture(3)).convert("CMYK").save(tmp_path / "inks.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    Image.fromarray(picture(4, 15, 80)).save(tmp_path / "low.png")
    data = DATASETS.get("picture_folder")(root=tmp_path, patch=8, validation_fraction=0.01)
    data.train, data.val = [*data.train, *data.val], []
    assert len(data._train) == 5, "three of 8 bits, one of 16 bits, one of 1 bit"
    assert sorted(data.broken) == ["cut.png", "inks.jpg", "low.png", "text.png"]
    assert len(logged) == 4
    assert any("low.png: 80 x 15 pixels; a patch of 8 x 8 needs 16 a side; passed over" in line for line in logged)
    stops = DATASETS.get("picture_folder")(root=tmp_path, patch=8, broken="stop", validation_fraction=0.01)
    stops.train = find_pictures(tmp_path)
    with pytest.raises(DataError, match=r"cut\.png.*data\.broken: skip"):
        stops.batches(4)
    data.found_broken.clear()
    data.train = [tmp_path / "cut.png", tmp_path / "text.png"]
    del data.__dict__["_train"]
    with pytest.raises(DataError, match="none of the 2 training pictures can be used"):
        data.batches(4)


@pytest.mark.parametrize("part", ["train", "test"])
def test_pictures_too_large_for_memory(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch, part: Any
) -> None:
    """The header is enough: the large one here ends behind it."""
    write(tmp_path, ["a.png", "b.png"])
    Image.new("L", (400, 300)).save(tmp_path / "large.png")
    (tmp_path / "large.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    pixel = {"train": 32, "test": 180}[part]
    monkeypatch.setattr(data_of_pictures, "available_memory", lambda: 400 * 300 * pixel - 1)
    paths = find_pictures(tmp_path)
    data = Pictures("mine", paths, (), paths, patch=8)
    assert [name for name, _, _ in data.read(paths, part)] == ["a.png", "b.png"]
    assert data.broken == ("large.png",)
    assert logged == [f"{tmp_path / 'large.png'}: 400 x 300 pixels need 0.0 GB of memory, 0.0 GB are free; passed over"]
    monkeypatch.setattr(data_of_pictures, "available_memory", lambda: 400 * 300 * pixel)
    list(data.read(paths, part))
    data.found_broken.clear()
    list(data.read(paths, part))
    assert "truncated" in logged[-1]


def test_memory_that_runs_out(tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """While test pictures are read one goes; of those that are kept, all of them are too many."""
    write(tmp_path, ["a.png", "b.png"])
    paths = find_pictures(tmp_path)

    def read(path: Path, real: Any = data_of_pictures.read_picture) -> Any:
        if path.name == "b.png":
            raise MemoryError
        return real(path)

    monkeypatch.setattr(data_of_pictures, "read_picture", read)
    data = Pictures("mine", paths, (), paths, patch=8)
    assert [name for name, _, _ in data.read(paths, "test")] == ["a.png"]
    assert logged == [f"{tmp_path / 'b.png'}: not enough memory is free; passed over"]
    with pytest.raises(DataError, match=r"mine: out of memory after 1 of 2 training pictures; take fewer"):
        list(data.read(paths, "train"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": 5}, r"data\.scale = 5: 2, 3 or 4"),
        ({"patch": 2}, r"data\.patch = 2: at least 4"),
        ({"best_of": 0}, r"data\.best_of = 0"),
        ({"validation_size": 12}, r"data\.validation_size = 12: at least 17"),
        ({"validation_fraction": 1.0}, "between 0 and 1"),
        ({"broken": "ignore"}, "stop or skip"),
        ({"root": None}, r"needs data\.root"),
    ],
)
def test_impossible_settings(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        DATASETS.get("picture_folder")(**{"root": folder, **arguments})


def test_div2k(tmp_path: Path) -> None:
    write(tmp_path, [f"DIV2K_train_HR/{i:04d}.png" for i in range(1, 23)], height=40, width=40)
    data = DATASETS.get("div2k")(root=tmp_path, patch=8)
    assert [p.name for p in data.train] == ["0001.png", "0002.png"]
    assert data.count("val") == 20
    assert not data.has_test
    with pytest.raises(DataError, match="no test pictures"):
        data.evaluation("test", 1)


def test_photographs_that_are_not_there(tmp_path: Path) -> None:
    data = DATASETS.get("photographs")(root=tmp_path)
    assert len(PHOTOGRAPHS) == len(set(PHOTOGRAPHS)) == 36
    assert set(HELD_OUT) <= set(PHOTOGRAPHS)
    assert len(data.train) == 30
    assert len(data.test) == 12
    with pytest.raises(DataError, match=r"no such file \(and 29 more\); `make data-sr` as root installs"):
        data.batches(4)


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("upscale", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bireal_sr", {"width": 4, "blocks": 2}),
        ("linear_sr", {}),
        ("vdsr", {"width": 4, "depth": 4, "zero_tail": True}),
        ("vdsr", {"width": 4, "depth": 4, "skip": True, "scaled": True, "shifted": True, "gray": 0.5}),
    ],
)
def test_an_untrained_network_is_bicubic(name: str, arguments: dict[str, int], upscale: int) -> None:
    model = build_model(name, classes=0, in_channels=1, image_size=9, upscale=upscale, **arguments)
    x = torch.rand(2, 1, 9, 7)
    with torch.no_grad():
        assert torch.equal(model(x), resize_bicubic(x, upscale))


def test_vdsr_as_published() -> None:
    model = build_model("vdsr", classes=0, in_channels=1, image_size=9, upscale=3)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    assert sum(m.weight.numel() for m in convolutions) == 2 * 9 * 64 + 18 * 9 * 64 * 64  # 664,704: "665K parameters"
    assert sum(isinstance(m, nn.ReLU) for m in model.modules()) == 19
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.blocks = model.blocks[:1]
    with torch.no_grad():
        assert model(torch.rand(2, 1, 6, 5)).shape == (2, 1, 18, 15)


def randomise(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Shift | Gain | nn.PReLU):
                for p in module.parameters(recurse=False):
                    p.add_(torch.randn(p.shape, generator=g) * 0.2)
            if isinstance(module, nn.Conv2d):
                module.weight.add_(torch.randn(module.weight.shape, generator=g) * 0.05)


TAIL8 = {"tail": {"method": "int8", "weight_bits": 8, "activation": "int8", "activation_bits": 8}}
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sign": ("bireal_sr", {}, {"method": "sign"}),
    "slb-int8-edges-float16": (
        "bireal_sr",
        {},
        {"method": "slb", "edges": "int8", "residual_dtype": "float16", "overrides": TAIL8},
    ),
    "slb-2/2": (
        "bireal_sr",
        {},
        {
            "method": "slb",
            "weight_bits": 2,
            "activation_bits": 2,
            "activation": "lsq",
            "activation_options": {"signed": True},
        },
    ),
    "slb-4/4-dorefa": ("bireal_sr", {"shift": 0.5}, {"method": "slb", "weight_bits": 4, "activation_bits": 4}),
    "dorefa": ("bireal_sr", {"gain": 0.2}, {"method": "dorefa", "activation": "reactnet"}),
    "slb-1/32": ("bireal_sr", {}, {"method": "slb", "activation_bits": 32}),
    "slb-2/32-int8-edges-float16": (
        "bireal_sr",
        {},
        {
            "method": "slb",
            "weight_bits": 2,
            "activation_bits": 32,
            "edges": "int8",
            "residual_dtype": "float16",
            "overrides": TAIL8,
        },
    ),
    "float": ("bireal_sr", {"gain": 0.2}, {"method": "float", "activation_bits": 32}),
    "linear": ("linear_sr", {}, {"method": "float", "activation_bits": 32}),
    "vdsr": ("vdsr", {"depth": 4, "act": "prelu", "skip": True, "scaled": True}, {"method": "slb"}),
    "vdsr-shifted": (
        "vdsr",
        {"depth": 4, "act": "prelu", "skip": True, "scaled": True, "shifted": True, "gray": 0.5},
        {"method": "slb", "residual_dtype": "float16"},
    ),
    "vdsr-naive": ("vdsr", {"depth": 4}, {"method": "sign"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_and_run(way: str) -> None:
    """Every integer of the engine is the interpreter's, every code the training graph's; pictures are equally good."""
    name, arguments, quantize = WAYS[way]
    torch.manual_seed(1)
    upscale = 3 if way == "sign" else 2
    body = {} if name == "linear_sr" else {"width": 8, **({"blocks": 2} if name == "bireal_sr" else {})}
    float_model = build_model(name, classes=0, in_channels=1, image_size=16, upscale=upscale, **body, **arguments)
    randomise(float_model)
    model = prepare(float_model, **{"edges": "float", **quantize})
    pairs = []
    for seed in range(2):
        low, high = degrade(luma(picture(seed, 58, 50).astype(np.float32) / 255), upscale)
        pairs.append(Pair.of(f"{seed}", np.array(low), high))
    crops = torch.cat([pair[0][..., :16, :12] for pair in pairs])
    with torch.no_grad():
        model.train()(crops)  # learned ranges are measured
    model.eval()
    graph = freeze(model, crops[:1], {"task": "superres", "superres": {"scale": upscale}})
    proof = prove_pictures(model, graph, load(graph), crops, pairs, upscale)
    assert proof.failures() == []
    assert proof.integers_differ == 0
    assert proof.integers > 0
    assert (proof.root_activations > 0) == (way not in ("slb-1/32", "float", "linear"))
    assert proof.psnr_apart < 1e-3
    assert proof.psnr("engine") is not None
    assert sum(n.op == "resize_bicubic" for n in graph.nodes) == 1
    if way == "sign":  # a scale of 1 is not written out in front of the network's own
        muls = [n for n in graph.nodes if n.op == "mul"]
        assert len(muls) == 2
        y = Upscaler(graph)(pairs[0][0][0, 0].numpy())
        with torch.no_grad():
            assert np.allclose(y, model(pairs[0][0])[0, 0].numpy(), atol=1e-5)


# ------------------------------------------------------------------------------------------------ the whole way


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(recipe(folder), tmp_path_factory.mktemp("runs") / "whole", test=True)


def test_run(whole: Any, folder: Path) -> None:
    run = read_run(whole.run_dir)
    assert run["metric"] == "psnr"
    assert run["input"]["upscale"] == 2
    found = run["results"]["test"]
    assert [p["name"] for p in found["pictures"]] == ["t1.png", "t2.jpg"]
    assert found["psnr"] == pytest.approx(np.mean([p["psnr"] for p in found["pictures"]]))
    rows = read_metrics(whole.run_dir)
    assert tuple(rows[0]) == columns("psnr")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert run["results"]["validation"]["psnr"] == max(row["val_psnr"] for row in rows)
    assert str(folder) not in json.dumps(run)


def test_resumed_is_uninterrupted(whole: Any, folder: Path, tmp_path: Path) -> None:
    from test_trainer import Stop, _same, _state

    with pytest.raises(RuntimeError, match="stop"):
        train(recipe(folder), tmp_path / "run", callbacks=[Stop(1, RuntimeError("stop"))])
    train(recipe(folder), tmp_path / "run", resume=True)
    _same(_state(whole.run_dir), _state(tmp_path / "run"))


def test_export_evaluate_report(whole: Any, folder: Path, tmp_path: Path) -> None:
    done = export_run(whole.run_dir)
    assert done.proof.integers_differ == 0
    assert [p["name"] for p in done.proof.pictures or ()] == ["t1.png", "t2.jpg"]
    engine = load(done.path)
    assert dict(engine.meta)["superres"] == {"scale": 2}
    assert engine.meta["task"] == "superres"
    tested = evaluate_run(whole.run_dir, split="test")
    assert tested["psnr"] == whole.results["test"]["psnr"]
    assert json.loads((whole.run_dir / "evaluation-test.json").read_text())["pictures"] == tested["pictures"]
    on_engine = evaluate_file(done.path, split="test")
    assert on_engine["psnr"] == pytest.approx(tested["psnr"], abs=0.01)
    assert Path(on_engine["written"]).name == "evaluation-test-engine.json"
    elsewhere = tmp_path / "alone.lowbit"
    elsewhere.write_bytes(done.path.read_bytes())
    assert evaluate_file(elsewhere, str(folder / "test"))["pictures"] == on_engine["pictures"]
    with pytest.raises(DataError, match="--data"):
        evaluate_file(elsewhere)
    with pytest.raises(DataError, match="is a data set for classification"):
        evaluate_file(elsewhere, "fashion_mnist")
    page, _ = report.write_report(whole.run_dir, tmp_path / "report.html")
    text = page.read_text()
    assert "PSNR, engine" in text
    assert "Test pictures, computed by the engine" in text
    for picture in ("t1.png", "t2.jpg"):
        assert all(f'alt="{picture}, {what}"' in text for what in ("bicubic", "low-bit", "original"))
    assert text.count("data:image/png;base64,") == 2 * 3
    assert "held out, bicubic" in text
    facts = dict(report.summary(whole.run_dir))
    assert "over bicubic" not in facts
    assert facts["PSNR, bicubic"].endswith("2 pictures")


def test_a_report_where_the_pictures_are_not(whole: Any, tmp_path: Path) -> None:
    place = tmp_path / "run"
    shutil.copytree(whole.run_dir, place)
    if not (place / "model.lowbit").is_file():
        export_run(place)
    (place / "recipe.yaml").write_text(recipe(tmp_path / "nowhere").to_yaml())
    for name in ("evaluation-test-engine.json", "evaluation-test.json"):
        (place / name).unlink(missing_ok=True)
    page, missing = report.write_report(place)
    assert [what for what, _ in missing if "crops" in what] == [
        f"crops of pictures ({tmp_path / 'nowhere'}: no such folder; pictures are looked for there)"
    ]
    text = page.read_text()
    assert "Test pictures, computed by the training graph" in text
    assert "data:image/png" not in text
    assert "nowhere: no such folder" in text


def test_published_numbers_stand_beside_the_same_set_only() -> None:
    assert published("Set5", 5, 2, 33.68) == published("set5", 5, 2, 33.66)
    name, rows = published("BSD100", 100, 4, 25.96) or ("", {})
    assert name == "B100"
    assert rows["VDSR float"] == 27.29
    assert list(rows)[:2] == ["bicubic", "VDSR float"]
    for other in (("Set5", 4, 2, 33.66), ("Set5", 5, 2, 33.5), ("Set6", 5, 2, 33.66), ("Set5", 5, 8, 33.66)):
        assert published(*other) is None


def test_a_standard_set(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Papers' numbers in what evaluate prints and in the report; here the pictures are made up, and so is what they are held against."""
    write(tmp_path / "Set5", [f"{name}.png" for name in "abcde"], height=40, width=44)
    run = tmp_path / "run"
    shutil.copytree(whole.run_dir, run)
    arguments = ["evaluate", str(run), "--data", str(tmp_path / "Set5")]
    assert "published" not in CliRunner().invoke(cli.app, arguments).output
    monkeypatch.setattr("lowbit.published.SAME", 100.0)
    assert "published on Set5 x2, PSNR in dB: bicubic 33.66, VDSR float 37.53" in " ".join(
        CliRunner().invoke(cli.app, arguments).output.split()
    )
    text = report.write_report(run)[0].read_text()
    assert "Set5 x2" in text
    assert "VDSR IR-Net 1/1, published" in text
    assert "36.94" in text


def test_crops_beside_their_originals(tmp_path: Path) -> None:
    """Without a residual the network's crop is the bicubic one; the original is what it was."""
    write(tmp_path, ["a.png"], height=140, width=150)
    zero = Upscaler(low_resolution(residual=0.0))
    ((name, uris, size),) = sidebyside.beside_originals([tmp_path / "a.png"], zero)
    assert (name, size) == ("a.png", (96, 96))
    crops = [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int) for uri in uris]
    whole = np.asarray(Image.open(tmp_path / "a.png"), int)
    places = [(y, x) for y in (0, 44) for x in (0, 54) if np.array_equal(whole[y : y + 96, x : x + 96], crops[2])]
    assert places == [(0, 0)], "a grid of 96 pixels has one place in 140 x 150"
    assert np.abs(crops[0] - crops[1]).max() <= 1
    assert np.abs(crops[0] - crops[2]).max() > 10
    ((_, _, size),) = sidebyside.beside_originals([tmp_path / "a.png"], zero, shrink=2)
    assert size == (74, 70)


def test_evaluate_names_broken_pictures(whole: Any, tmp_path: Path) -> None:
    write(tmp_path / "mine", ["a.png", "b.png"], height=40, width=44)
    runner = CliRunner()
    fine = runner.invoke(cli.app, ["evaluate", str(whole.run_dir), "--data", str(tmp_path / "mine")])
    assert fine.exit_code == 0, fine.output
    assert "mean of 2" in fine.output
    assert (whole.run_dir / "evaluation-folder-mine.json").is_file()
    beside = runner.invoke(
        cli.app,
        ["evaluate", str(whole.run_dir), "--data", str(tmp_path / "mine"), "--beside", str(whole.run_dir)],
    )
    assert beside.exit_code == 0, beside.output
    assert beside.output.count("+0.00") == 3, "two pictures and their mean"
    (tmp_path / "mine" / "cut.png").write_bytes((tmp_path / "mine" / "a.png").read_bytes()[:700])
    Image.fromarray(picture(0, 14, 60)).save(tmp_path / "mine" / "low.png")
    found = runner.invoke(cli.app, ["evaluate", str(whole.run_dir), "--data", str(tmp_path / "mine")])
    assert found.exit_code == 1
    assert "mean of 2" in found.output
    assert "2 of 4 pictures could not be measured" in found.output
    for beside in ([], ["--beside", str(whole.run_dir)]):
        found = runner.invoke(cli.app, ["evaluate", str(whole.run_dir), "--data", str(tmp_path / "mine"), *beside])
        assert [found.output.count(name) for name in ("cut.png", "low.png")] == [1, 1], "named once, with the reason"


def test_a_folder_called_like_a_split_is_another_result(whole: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole.run_dir, run)
    of_split = evaluate_run(run, split="test")
    for name in ("test", "val"):
        write(tmp_path / name, ["x.png"], height=40, width=44)
        found = evaluate_run(run, str(tmp_path / name))
        assert Path(found["written"]).name == f"evaluation-folder-{name}.json"
    kept = json.loads((run / "evaluation-test.json").read_text())
    assert [p["name"] for p in kept["pictures"]] == [p["name"] for p in of_split["pictures"]] == ["t1.png", "t2.jpg"]
    assert not (run / "evaluation-val.json").exists()


def test_what_cannot_be_kept_is_shown(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "mine", ["a.png"], height=40, width=44)
    monkeypatch.setattr(evaluation, "write_json", full)
    found = CliRunner().invoke(cli.app, ["evaluate", str(whole.run_dir), "--data", str(tmp_path / "mine")])
    assert found.exit_code == 0, found.output
    assert "mean of 1" in found.output
    assert "evaluation-folder-mine.json: not written (Permission denied); what was measured is not kept" in found.output
    assert "wrote" not in found.output


def test_memory_that_runs_out_while_measuring(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["a.png", "b.png"])

    def measure(name: str, *arrays: Any, real: Any = evaluation.compare) -> Any:
        if name == "a.png":
            raise MemoryError
        return real(name, *arrays)

    monkeypatch.setattr(evaluation, "compare", measure)
    data = Pictures("mine", (), (), find_pictures(tmp_path))
    found = evaluation.evaluate_pictures(Upscaler(low_resolution()), data, "test")
    assert [p["name"] for p in found["pictures"]] == ["b.png"]
    assert data.broken == ("a.png",)
    assert "a.png: not enough memory is free to measure it" in logged[0]


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root, who may look everywhere
    with pytest.raises(PermissionError) as caught:
        find_pictures(tmp_path / "closed", 2)
    assert caught.value.filename == str(tmp_path / "closed")


def test_training_names_broken_pictures_at_its_end(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "mine", ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "mine" / "cut.png").write_bytes((folder / "train" / "a.png").read_bytes()[:900])
    (tmp_path / "tiny.yaml").write_text(recipe(tmp_path / "mine", train__epochs=1).to_yaml())
    arguments = ["train", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run")]
    found = CliRunner().invoke(cli.app, arguments)
    assert found.exit_code == 1
    assert "1 picture can't be used and was passed over: cut.png" in " ".join(found.output.split())
    run = read_run(tmp_path / "run")
    assert (run["status"], run["broken_images"]) == ("finished", ["cut.png"])
    (tmp_path / "mine" / "cut.png").unlink()
    found = CliRunner().invoke(cli.app, [*arguments, "--overwrite"])
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "classify"}, "has no classes: it is for task superres"),
        ({"data": {"name": "fashion_mnist"}}, "has classes: it is for task classify"),
        ({"train__loss": "cross_entropy"}, "cross_entropy is for classes"),
        ({"train__label_smoothing": 0.1}, "label_smoothing belongs to task classify"),
        ({"data__augment": {"crop": 2}}, "patches have flip and rotate"),
        ({"data__patches": 4}, "batch_size = 8, but there are 4"),
        ({"model": {"name": "bireal_resnet14"}}, "names classes; a network for super-resolution has"),
    ],
)
def test_recipes_that_cant_be_trained(folder: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if changes.get("task") == "classify":
        changes = {**changes, "train__loss": "auto"}
    with pytest.raises((RecipeError, DataError), match=words):
        train(recipe(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_with_classes_are_not_turned() -> None:
    data = DATASETS.get("fashion_mnist")()
    data.__dict__["_train"] = (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match=r"data\.augment\.rotate"):
        data.batches(2, augment=Augment(rotate=True))


@pytest.mark.parametrize(("loss", "factor"), [("l1", None), ("mse", 1.0), ("patch", 128.0)])
def test_losses(loss: str, factor: float | None) -> None:
    task = TASKS.get("superres")(2, loss)  # type: ignore[call-arg]
    outputs, targets = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16, 16)
    expected = (outputs - targets).abs().mean() if factor is None else (outputs - targets).square().mean() * factor
    assert torch.allclose(task.loss(outputs, targets), expected)
    assert float(task.score(outputs, outputs)) == pytest.approx(3 * 70)


def test_adjustable_clipping(folder: Path, tmp_path: Path) -> None:
    """VDSR: each component at most grad_clip / learning rate, whose schedule it follows."""
    r = recipe(folder, train__grad_clip=0.01, train__grad_clip_by="rate", train__latent_lr_scale=4)
    spec = InputSpec(1, 8, 8, (0,), 1.0, (), 2)
    from lowbit.train.network import build_network

    model = build_network(r, spec)
    module = TrainingModule(model, r, TASKS.get("superres").of(r, spec), None, [], tmp_path)  # type: ignore[arg-type]
    optimizer = module.configure_optimizers()["optimizer"]
    for p in model.parameters():
        p.grad = torch.linspace(-100, 100, p.numel()).view_as(p)
    module.configure_gradient_clipping(optimizer, 0.01, "norm")
    for group in optimizer.param_groups:
        limit = 0.01 / group["lr"]
        for p in group["params"]:
            assert p.grad is not None
            expected = torch.linspace(-100, 100, p.numel()).clamp(-limit, limit).view_as(p)
            assert torch.equal(p.grad, expected)
            if p.numel() > 1:
                assert float(p.grad.abs().max()) == pytest.approx(limit)
