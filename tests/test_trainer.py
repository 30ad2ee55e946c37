"""The trainer: resumed == uninterrupted, one clear error for each misuse, and what a run directory holds."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lowbit.train import rundir
from lowbit.train.data import DATASETS, ImageData
from lowbit.train.module import lr_factor
from lowbit.train.recipe import Recipe, RecipeError, parse_recipe
from lowbit.train.rundir import RunError, columns, read_metrics, read_run
from lowbit.train.trainer import load_run, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def _stripes(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """12x12 images: stripes across, stripes down, or neither, under noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    wave = (torch.arange(12) // 2 % 2) * 90
    across, down = wave.view(1, 12, 1).expand(1, 12, 12), wave.view(1, 1, 12).expand(1, 12, 12)
    flat = torch.full((1, 12, 12), 45)
    x = torch.stack([across, down, flat])[y] + torch.randint(0, 120, (count, 1, 12, 12), generator=generator)
    return x.to(torch.uint8), y


if "stripes" not in DATASETS:

    @DATASETS.register("stripes")
    def stripes(root: str | None = None, count: int = 240) -> ImageData:  # noqa: ARG001
        return ImageData(
            "stripes",
            ("across", "down", "neither"),
            (1, 12, 12),
            (100,),
            1 / 50,
            read_train=lambda: _stripes(1, count),
            read_test=lambda: _stripes(2, 60),
            validation=60,
        )


def recipe(**changes: object) -> Recipe:
    tree: dict = {
        "name": "tiny",
        "seed": 3,
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "data": {"name": "stripes", "augment": {"crop": 1, "flip": True}},
        "train": {"epochs": 3, "batch_size": 30, "lr": 0.05, "latent_lr_scale": 10, "eval_batch_size": 60},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_recipe(tree)


class Stop(Callback):
    """Interrupts in the middle of an epoch."""

    def __init__(self, epoch: int, error: BaseException) -> None:
        self.epoch, self.error = epoch, error

    def on_train_batch_end(self, trainer, *_args):
        if trainer.current_epoch == self.epoch and trainer.global_step % trainer.num_training_batches == 2:
            raise self.error


def _state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


_TIMES = ("images_per_second", "seconds")


def _rows(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in _TIMES} for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return train(recipe(), run_dir, test=True)


def test_run_directory(whole):
    names = {str(p.relative_to(whole.run_dir)) for p in whole.run_dir.rglob("*") if p.is_file()}
    assert {"recipe.yaml", "run.json", "metrics.csv"} <= names
    assert {f"checkpoints/{n}.ckpt" for n in ("last", "best", "final")} <= names
    assert any(n.startswith("tensorboard/events") for n in names)
    assert not [n for n in names if Path(n).name.startswith(".")], "a temporary file was left"
    run = read_run(whole.run_dir)
    assert run == whole.run
    assert run["status"] == "finished"
    assert run["epochs_done"] == 3
    assert run["input"]["classes"] == ["across", "down", "neither"]
    test = run["results"]["test"]
    assert sum(map(sum, test["confusion"])) == test["images"] == 60
    assert test["accuracy"] == sum(test["confusion"][i][i] for i in range(3)) / 60
    assert test["accuracy"] > 0.5
    assert str(whole.run_dir.parent) not in json.dumps(run)


def test_metrics(whole):
    rows = read_metrics(whole.run_dir)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert tuple(rows[0]) == columns("accuracy")
    assert rows[-1]["temperature"] > rows[0]["temperature"]
    assert all(row["val_accuracy"] is not None for row in rows)


def test_the_best_network_is_kept(whole):
    rows = read_metrics(whole.run_dir)
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert whole.results["selected_epoch"] == best["epoch"]
    assert whole.results["validation"]["accuracy"] == best["val_accuracy"]


def test_load_run(whole):
    loaded_recipe, model = load_run(whole.run_dir)
    assert loaded_recipe == recipe()
    assert not model.training
    x, y = _stripes(2, 60)
    with torch.no_grad():
        got, expected = model(x), whole.model(x)
    assert torch.equal(got, expected)
    assert (got.argmax(1) == y).float().mean().item() == pytest.approx(whole.results["test"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("error", [ValueError("power cut"), KeyboardInterrupt()])
def test_resumed_equals_uninterrupted(whole, tmp_path, error):
    run_dir = tmp_path / "cut"
    with pytest.raises(type(error)):
        train(recipe(), run_dir, callbacks=[Stop(1, error)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = read_run(run_dir)
    assert run["status"] == "failed"
    assert run["error"] in ("interrupted", "ValueError: power cut")
    assert run["epochs_done"] == 1
    with pytest.raises(RunError, match="has not finished: it is failed"):
        load_run(run_dir)
    result = train(recipe(), run_dir, resume=True, test=True)
    assert result.run["resumed"] == 1
    _same(_state(run_dir), _state(whole.run_dir))
    assert _rows(run_dir) == _rows(whole.run_dir)
    assert result.results["test"] == whole.results["test"]


def test_same_recipe_same_network(whole, tmp_path):
    train(recipe(), tmp_path / "again")
    _same(_state(tmp_path / "again"), _state(whole.run_dir))


def test_resume_before_the_first_checkpoint(whole, tmp_path):
    run_dir = tmp_path / "cut"
    with pytest.raises(ValueError, match="early"):
        train(recipe(), run_dir, callbacks=[Stop(0, ValueError("early"))])
    train(recipe(), run_dir, resume=True)
    _same(_state(run_dir), _state(whole.run_dir))


def test_resume_refusals(whole, tmp_path):
    with pytest.raises(RunError, match="finished; there is nothing to resume"):
        train(recipe(), whole.run_dir, resume=True)
    with pytest.raises(RunError, match="not a run directory"):
        train(recipe(), tmp_path / "nothing", resume=True)
    run_dir = tmp_path / "cut"
    with pytest.raises(ValueError, match="early"):
        train(recipe(), run_dir, callbacks=[Stop(0, ValueError("early"))])
    with pytest.raises(RunError, match=r"another recipe; it differs in model\.width, train\.lr.*--resume"):
        train(recipe(train__lr=0.01, model__width=8), run_dir, resume=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    write, run_dir = rundir.write_atomic, tmp_path / "run"

    def full(path, data):
        if path.name == "last.ckpt" and path.exists():
            path = tmp_path / "nothing" / "last.ckpt"  # any error of the system's
        write(path, data)

    monkeypatch.setattr(rundir, "write_atomic", full)
    with pytest.raises(OSError, match=r"nothing/last\.ckpt"):
        train(recipe(), run_dir)
    tree = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert tree["epoch"] == 0
    monkeypatch.undo()
    assert train(recipe(), run_dir, resume=True).run["resumed"] == 1


def test_a_damaged_checkpoint_is_not_resumed(tmp_path):
    run_dir = tmp_path / "cut"
    with pytest.raises(ValueError, match="power cut"):
        train(recipe(), run_dir, callbacks=[Stop(1, ValueError("power cut"))])
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"can't be resumed: .*last\.ckpt is not a checkpoint"):
        train(recipe(), run_dir, resume=True)


def test_no_half_of_a_run_stays_behind(tmp_path, monkeypatch):
    def full(path, data):  # noqa: ARG001
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(rundir, "write_atomic", full)
    with pytest.raises(OSError, match=r"No space left on device.*recipe\.yaml"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_overwrite(whole, tmp_path):
    with pytest.raises(RunError, match="is not empty"):
        train(recipe(), whole.run_dir)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a run directory; it is not overwritten"):
        train(recipe(), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    run_dir = tmp_path / "run"
    train(recipe(train__epochs=1), run_dir)
    train(recipe(train__epochs=1, train__lr=0.01), run_dir, overwrite=True)
    assert load_run(run_dir)[0].train.lr == 0.01


def test_nothing_is_written_for_what_cannot_be_built(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(RecipeError, match="matches no Conv2d or Linear layer"):
        train(recipe(quantize__skip=["nonsense"]), run_dir)
    with pytest.raises(RecipeError, match=r"train\.batch_size = 500, but there are 180 training images"):
        train(recipe(train__batch_size=500), run_dir)
    with pytest.raises(RunError, match=r"train\.start_from: .*none\.ckpt is not there"):
        train(recipe(train__start_from=str(tmp_path / "none.ckpt")), run_dir)
    assert not run_dir.exists()


OWN = """
from torch import nn
class Own(nn.Module):
    def __init__(self, classes, features=4, answers=None, odd=False):
        super().__init__()
        self.conv, self.norm, self.up = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2)
        self.head, self.odd = nn.Linear(features, answers or classes), odd
        if features > 100: raise RuntimeError("too many")
    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head((self.up(x) if self.odd else x).mean((2, 3)))
def nothing(classes):
    return classes
"""


def test_a_network_that_cannot_work_is_found_before_training(tmp_path, monkeypatch, logged):
    (tmp_path / "own_net_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    run_dir = tmp_path / "run"

    def own(name="Own", **arguments):
        tree = recipe(train__epochs=1).plain()
        return parse_recipe({**tree, "model": {"name": f"own_net_of_a_test:{name}", **arguments}})

    with pytest.raises(RecipeError, match=r"Own' fails on images of 1x12x12: mat1 and mat2"):
        train(own(features=5), run_dir)
    with pytest.raises(RecipeError, match=r"gives shape \(2, 2\) for 2 images of 1x12x12, not \(2, 3\)"):
        train(own(answers=2), run_dir)
    with pytest.raises(RecipeError, match="Own' can't be built: RuntimeError: too many"):
        train(own(features=101), run_dir)
    with pytest.raises(RecipeError, match="gives a int, not an nn.Module"):
        train(own("nothing"), run_dir)
    assert not run_dir.exists()
    result = train(own(odd=True), run_dir)  # a twin to compare with need not be exported
    assert [w for w in result.run["warnings"] if re.search("not exported: up .*conv_transpose2d", w)]
    assert any("up (conv_transpose2d" in line for line in logged)
    assert not [w for w in train(own(), tmp_path / "good").run["warnings"] if "exported" in w]


def test_unfinished_and_broken_runs_are_refused(whole, tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        load_run(tmp_path)
    broken = tmp_path / "broken"
    (broken / "checkpoints").mkdir(parents=True)
    for name in ("run.json", "recipe.yaml"):
        (broken / name).write_bytes((whole.run_dir / name).read_bytes())
    with pytest.raises(RunError, match=r"final\.ckpt is not there"):
        load_run(broken)
    data = (whole.run_dir / "checkpoints" / "final.ckpt").read_bytes()
    (broken / "checkpoints" / "final.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match="not a checkpoint"):
        load_run(broken)
    (broken / "run.json").write_text('{"format": 1, "sta')
    with pytest.raises(RunError, match="can't be read"):
        load_run(broken)


def test_final_trains_on_everything_and_chooses_nothing(tmp_path):
    result = train(recipe(train__final=True, train__epochs=1), tmp_path / "run")
    assert result.results["validation"] is None
    assert result.results["selected_epoch"] == 1
    assert read_metrics(tmp_path / "run")[0]["step"] == 240 // 30
    assert not (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_float_then_fine_tuned(tmp_path):
    train(recipe(quantize__method="float", quantize__activation_bits=32, train__epochs=1), tmp_path / "float")
    tuned = recipe(train__start_from=str(tmp_path / "float"), train__epochs=1)
    train(tuned, tmp_path / "tuned")
    other = recipe(train__start_from=str(tmp_path / "tuned"), train__epochs=1, quantize__method="sign")
    with pytest.raises(RecipeError, match="are logits of SLB with 1 bit"):
        train(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_wide_gap_is_said(tmp_path):
    made = recipe(schedule__growth=1.0, train__epochs=1)
    run = train(made, tmp_path / "run").run
    assert len(run["warnings"]) == 1
    assert "raise schedule.growth" in run["warnings"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize__state_batchnorm": True},
        {"quantize__residual_dtype": "float16"},
        {"train__optimizer": "adam", "train__lr": 0.01},
        {"train__lr_schedule": "step", "train__milestones": [0.5], "train__warmup": 0.3, "train__grad_clip": 1.0},
        {"schedule__every": "epoch", "schedule__kind": "sine"},
        {"train__precision": "bf16", "model__nonlinearity": "prelu"},
        {"quantize__weight_bits": 2, "quantize__activation_bits": 2},
        {"quantize__method": "sign"},
    ],
    ids=lambda c: "+".join(f"{k.split('__')[1]}={v}" for k, v in c.items()),
)
def test_settings_run(tmp_path, changes):
    result = train(
        recipe(train__epochs=1, **changes) if "train__epochs" not in changes else recipe(**changes), tmp_path / "r"
    )
    assert result.run["status"] == "finished"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"train__lr_schedule": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"train__lr_schedule": "linear", "train__warmup": 1.0}, [0.5, 1, 1, 0.5, 0]),
        ({"train__lr_schedule": "cosine"}, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ({"train__lr_schedule": "step", "train__milestones": [0.5, 1]}, [1, 0.1, 0.01, 0.01, 0.01]),
        ({"train__lr_schedule": "constant"}, [1, 1, 1, 1, 1]),
    ],
)
def test_learning_rates(schedule, expected):
    """Two epochs of two steps; the last number is that of the step behind the end."""
    made = recipe(train__epochs=2, **schedule)
    assert [lr_factor(made, 2, step) for step in range(5)] == pytest.approx(expected)
