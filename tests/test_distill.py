"""Knowledge distillation: the loss against its formula, the trainer's part, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lowbit.train.distill import Distillation, distillation_loss, load_distillation
from lowbit.train.recipe import RecipeError, parse_recipe
from lowbit.train.rundir import InputSpec, RunError, read_metrics, read_run
from lowbit.train.trainer import load_run, train
from test_trainer import _same, _state, recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_the_loss_is_its_formula(t: float) -> None:
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    p, s = ((x.detach().double() / t).softmax(1) for x in (teacher, student))
    expected = t * t * sum(float(p[n, k] * math.log(p[n, k] / s[n, k])) for n in range(7) for k in range(5)) / 7
    found = distillation_loss(student, teacher, t)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (t * (s - p) / 7).float())  # d/dz of T^2 KL at z / T
    assert distillation_loss(teacher, teacher, t).item() == pytest.approx(0, abs=1e-6)


def test_the_mixture_and_the_teachers_state() -> None:
    teacher = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.BatchNorm1d(5)).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student, x = logits(1).requires_grad_(), logits(3)
    mix = Distillation(teacher, 0.25, 2.0)
    assert not teacher.training
    found = mix.loss(x, student, student.sum())
    expected = 0.75 * student.sum() + 0.25 * distillation_loss(student, teacher(x), 2.0)
    assert torch.equal(found, expected)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    _same(teacher.state_dict(), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mix.loss(x, student, student.sum()), expected), "the teacher runs in float32"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teacher") / "float"
    train(recipe(quantize__method="float", quantize__activation_bits=32, train__epochs=1), place)
    return place


def taught(teacher: Path | str, **changes: object):
    distill = {"teacher": str(teacher), **{k: changes.pop(k) for k in ("weight", "temperature") if k in changes}}
    return recipe(train__distill=distill, train__epochs=1, **changes)


def test_a_teacher_teaches(teacher, tmp_path):
    """The run is the one that trains on the mixture by hand; checkpoints hold no teacher."""
    alone = train(recipe(quantize__method="sign", train__epochs=1), tmp_path / "alone").model
    made = train(taught(teacher, quantize__method="sign", weight=0.5), tmp_path / "taught").model
    assert made.state_dict().keys() == alone.state_dict().keys()
    assert any(not torch.equal(a, b) for a, b in zip(made.parameters(), alone.parameters(), strict=True))
    rows = [read_metrics(tmp_path / name)[0] for name in ("alone", "taught")]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    tree = torch.load(tmp_path / "taught" / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in tree["state_dict"] if "teacher" in key]
    recipe_read, _ = load_run(tmp_path / "taught")  # the teacher need not be there for that
    assert recipe_read.train.distill.temperature == 4.0


def test_a_checkpoint_is_a_teacher_too(teacher):
    spec = InputSpec.from_json(read_run(teacher)["input"])
    both = [
        load_distillation(taught(place).train.distill, spec).teacher.state_dict()
        for place in (teacher, teacher / "checkpoints" / "final.ckpt")
    ]
    _same(*both)
    _same(both[0], _state(teacher))


def test_refusals(teacher, tmp_path):
    run = tmp_path / "run"
    what = r"train\.distill\.teacher: "
    with pytest.raises(RunError, match=what + r".*nowhere is not there"):
        train(taught(tmp_path / "nowhere"), run)
    with pytest.raises(RunError, match=what + r".*not a run directory"):
        train(taught(tmp_path), run)
    plain = tmp_path / "plain.ckpt"
    torch.save({"state_dict": {}}, plain)
    with pytest.raises(RunError, match=what + r".*does not tell the recipe and the input of its network"):
        train(taught(plain), run)
    path = tmp_path / "other.ckpt"
    tree = torch.load(teacher / "checkpoints" / "final.ckpt", weights_only=True)
    tree["recipe"]["model"] = {"name": "os:mkdir", "path": str(tmp_path / "made")}
    torch.save(tree, path)
    with pytest.raises(RunError, match=what + r".*'os:mkdir', Python code that a checkpoint may not have called"):
        train(taught(path), run)
    assert not (tmp_path / "made").exists()
    for change, message in (
        ({"classes": ["a", "b", "c"]}, r"answers 3 classes \(a, b, c\), this data has 3 classes \(across"),
        ({"height": 28, "width": 28}, "reads images of 1x28x28, this data has 1x12x12"),
    ):
        tree = torch.load(teacher / "checkpoints" / "final.ckpt", weights_only=True)
        tree["input"] |= change
        torch.save(tree, path)
        with pytest.raises(RunError, match=what + ".*" + message):
            train(taught(path), run)
    tree["state_dict"].popitem()
    tree["input"] |= {"height": 12, "width": 12}
    torch.save(tree, path)
    with pytest.raises(RunError, match=what + ".*does not fit the recipe"):
        train(taught(path), run)
    assert not run.exists()


def test_recipe_keys():
    with pytest.raises(RecipeError, match=r"'train\.distill\.teacher' is missing"):
        recipe(train__distill={})
    with pytest.raises(RecipeError, match=r"unknown key 'train\.distill\.wait': did you mean 'weight'"):
        recipe(train__distill={"teacher": "x", "wait": 1})
    for key, value in (("weight", 0), ("weight", 1.5), ("temperature", 0)):
        with pytest.raises(RecipeError, match=rf"train\.distill\.{key}: "):
            taught("x", **{key: value})
    made = taught("x", weight=1, temperature=1)
    assert parse_recipe(made.plain()) == made
