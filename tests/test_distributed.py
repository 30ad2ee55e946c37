"""Two processes (gloo) are one process that accumulates the gradients of two halves; what one refuses, all refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp_runner import METHODS, STEPS, equal_recipe, recorded
from lowbit.train.distributed import leaves_parameters_out
from lowbit.train.network import build_network
from lowbit.train.quantizers import WEIGHTS
from lowbit.train.recipe import RecipeError
from lowbit.train.rundir import InputSpec, RunError, read_run
from lowbit.train.trainer import load_data, train
from test_trainer import _rows, recipe

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def _run(*arguments: object, status: int = 0) -> str:
    """A command of its own; what it said."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """One process, two halves."""
    folder = tmp_path_factory.mktemp("ddp")
    start = folder / "one-sign"
    runs = {m: recorded(equal_recipe(m, start, train__accumulate=2), folder / f"one-{m}") for m in METHODS}
    return folder, runs


def _results(folder: Path, part: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{part}-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def launched(one) -> Path:
    """Two processes, each a half. They end with an error (status 1 of torchrun), and they do end."""
    said = _run(
        "torch.distributed.run", "--standalone", "--nproc-per-node", 2, HERE / "ddp_runner.py", one[0], status=1
    )
    assert (one[0] / "errors-1.pt").is_file(), said
    return one[0]


@pytest.fixture(scope="module")
def two(launched) -> list[dict[str, Any]]:
    return _results(launched, "same")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_with_two_halves(one, two, method):
    """To the last bit: halving and the sum of two numbers leave no choice of rounding."""
    assert method in WEIGHTS
    alone, (first, second) = one[1][method], (ranks[method] for ranks in two)
    assert len(alone["losses"]) == 2 * STEPS
    assert alone["losses"] == [loss for pair in zip(first["losses"], second["losses"], strict=True) for loss in pair]
    assert alone["gradients"].keys() == first["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        assert torch.equal(gradient, first["gradients"][name]), name
        assert torch.equal(gradient, second["gradients"][name]), name
    # and where it all leads; statistics are averaged over the processes, and in sequence over the halves
    rows = (
        "train_loss",
        "train_accuracy",
        "aux_loss",
        "gap",
        "temperature",
        "flips_epoch",
        "flips_start",
        "lr",
        "step",
    )
    for mine, other in zip(_rows(one[0] / f"two-{method}"), _rows(one[0] / f"one-{method}"), strict=True):
        for key in rows:
            assert mine[key] == (pytest.approx(other[key], rel=1e-6) if "loss" in key and other[key] else other[key])


def test_a_step_of_two_halves_is_not_two_steps(one):
    """accumulate is held: 180 images are 5 steps of 2 x 18, and T moves by steps."""
    folder, _ = one
    assert [row["step"] for row in _rows(folder / "one-slb")] == [5, 10]
    assert [row["temperature"] for row in _rows(folder / "one-slb")] == pytest.approx([1000 ** (4 / 9), 1000.0])


def test_all_processes_end_with_the_same_network(two):
    first, second = two
    for name in first:
        assert first[name]["run"] == second[name]["run"], name
        assert first[name]["run"]["processes"] == 2
        assert first[name]["state"].keys() == second[name]["state"].keys()
        for key, value in first[name]["state"].items():
            assert torch.equal(value, second[name]["state"][key]), (name, key)


def test_broken_images_of_every_process_are_told(two):
    assert [each["own"]["run"]["broken_images"] for each in two] == [["0.jpeg", "1.jpeg"]] * 2


def test_two_processes_resume_exactly(one, two):
    folder, (first, _) = one[0], two
    assert first["resumed"]["run"]["resumed"] == 1
    assert _rows(folder / "two-cut") == _rows(folder / "two-whole")
    for key, value in first["whole"]["state"].items():
        assert torch.equal(value, first["resumed"]["state"][key]), key
    with pytest.raises(RunError, match="nothing to resume"):
        train(recipe(train__epochs=2), folder / "two-cut", resume=True)


def test_what_one_process_refuses_all_refuse(launched):
    """And what breaks one in the middle of an epoch ends both."""
    first, second = _results(launched, "errors")
    keys = r"got another recipe than process 0: model\.width, train\.lr"
    assert first["recipes"][0] == "RunError"
    assert re.search(f"process 1 of 2 {keys}", first["recipes"][1])
    assert second["recipes"] == ("RankError", first["recipes"][1], True)
    assert first["resume"][:2] == ("RunError", f"{launched / 'refused'}: not a run directory (it has no run.json)")
    assert second["resume"] == ("RankError", f"process 0 of 2: {first['resume'][1]}", True)
    assert first["devices"][0] == "RecipeError"
    assert re.search(r"train\.devices: 3 .* 2 processes on each of 1 .*torchrun --nnodes 1", first["devices"][1])
    assert second["devices"] == ("RankError", first["devices"][1], True), "one line a machine"
    assert first["data"] == ("RankError", "process 1 of 2: images.bin: is cut short", False)
    assert second["data"][0] == "RankError"
    assert second["epoch"] == ("RunError", "images.bin: gone", False)
    if "epoch" in first:  # else the launcher was quicker
        assert first["epoch"] == ("RankError", "process 1 of 2: images.bin: gone", True)
    assert len(_rows(launched / "broken")) == 1


def test_the_command_line_starts_the_processes(tmp_path):
    file = tmp_path / "tiny.yaml"
    made = recipe(train__epochs=1)
    tree = made.plain() | {"model": {"name": "resnet20", "width": 4}, "data": {"name": "image_folder"}}
    file.write_text(type(made).model_validate(tree).to_yaml())
    said = _run("lowbit", "train", file, "--run-dir", tmp_path / "run", "--devices", 2, status=2)
    assert said.count("error:") == 1
    assert re.search("^error: image_folder needs data.root", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_process_dies_with_its_launcher():
    """Also where nobody can tell it: the launcher is killed, and each process leads a session of its own."""
    source = (
        "import os, time\nfrom lowbit.train.distributed import _die_with_parent\n"
        "if os.fork() == 0:\n    os.setsid()\n    _die_with_parent()\n    print('there', flush=True)\n"
        "time.sleep(3)\nprint('still there')"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "there\n"
        launcher.kill()
        assert launcher.stdout.read() == ""


def test_devices_without_processes_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"one process was started; start them with torchrun --nnodes 2 --nproc-per"):
        train(recipe(train__devices=2, train__nodes=2), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.accumulate = 7, but an epoch has 6 batches"):
        train(recipe(train__accumulate=7), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_more_processes_than_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for key, value in launched.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(RecipeError, match="tiny: 2 processes on a machine with 1 GPUs"):
        train(recipe(), tmp_path / "run")


def test_parameters_that_a_step_leaves_out_are_found():
    """DDP must be told of them, or its second step fails."""
    made = recipe()
    spec = InputSpec.of(load_data(made))
    model = build_network(made, spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not leaves_parameters_out(model, spec)
    model.unused = torch.nn.Linear(2, 2)
    assert leaves_parameters_out(model, spec)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["fsdp", "FSDP", "deepspeed_stage_2"])
def test_sharded_parameters_are_refused(name):
    with pytest.raises(RecipeError, match=rf"{name} shards the parameters, .* need whole layers.*use ddp"):
        recipe(train__strategy=name)


def test_a_run_is_resumed_with_as_many_processes(tmp_path):
    from test_trainer import Stop

    with pytest.raises(ValueError, match="power cut"):
        train(recipe(), tmp_path / "run", callbacks=[Stop(1, ValueError("power cut"))])
    run = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(run.replace('"processes": 1', '"processes": 2'))
    assert read_run(tmp_path / "run")["processes"] == 2
    with pytest.raises(RunError, match="was started with 2 processes, now there are 1: .* resume with 2"):
        train(recipe(), tmp_path / "run", resume=True)
