"""A run that is killed (SIGKILL) and resumed ends in the same file, byte for byte, as one that was not."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lowbit.train.export import export_run
from lowbit.train.recipe import load_recipe
from lowbit.train.rundir import RunError, RunLock, read_run
from lowbit.train.trainer import train

RUNNER = Path(__file__).with_name("kill_runner.py")
EPOCHS, STEPS = 4, 5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    """A recipe on a folder of 12x12 images: stripes across or down, under noise."""
    base = tmp_path_factory.mktemp("kill")
    rng = np.random.default_rng(0)
    wave = (np.arange(12) // 2 % 2) * 90
    for name, pattern in (("across", wave[:, None]), ("down", wave[None, :])):
        (base / "images" / name).mkdir(parents=True)
        for i in range(60):
            pixels = pattern + rng.integers(0, 120, (12, 12))
            Image.fromarray(pixels.astype(np.uint8)).save(base / "images" / name / f"{i:02}.png")
    tree = {
        "name": "killed",
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "data": {
            "name": "image_folder",
            "root": str(base / "images"),
            "size": 12,
            "channels": 1,
            "augment": {"crop": 1, "flip": True},
        },
        "train": {"epochs": EPOCHS, "batch_size": 18, "lr": 0.05, "latent_lr_scale": 10, "eval_batch_size": 24},
    }
    file = base / "killed.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


@pytest.fixture(scope="module")
def whole(recipe_file) -> Path:
    """The run that nobody interrupted."""
    run_dir = recipe_file.parent / "whole"
    train(load_recipe(recipe_file), run_dir)
    export_run(run_dir)
    return run_dir


class Job:
    """A `lowbit` process of its own that stops at a moment (kill_runner.py)."""

    def __init__(self, folder: Path, moment: str, *arguments: object) -> None:
        self.marker = folder / "marker"
        self.marker.unlink(missing_ok=True)
        self.log = (folder / "log.txt").open("a+")
        self.process = subprocess.Popen(
            [sys.executable, str(RUNNER), moment, str(self.marker), *map(str, arguments)],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def stopped(self) -> Job:
        """Wait for the moment."""
        while not self.marker.exists():
            assert self.process.poll() is None, self.said()
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL, self.said()

    def finish(self) -> None:
        assert self.process.wait() == 0, self.said()


def _metrics(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv as it is written, without the times."""
    with (run_dir / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def _leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def _same_result(run_dir: Path, whole: Path) -> None:
    assert (run_dir / "model.lowbit").read_bytes() == (whole / "model.lowbit").read_bytes()
    assert _metrics(run_dir) == _metrics(whole)
    assert len(_metrics(run_dir)) == EPOCHS
    assert not _leftovers(run_dir)
    mine, other = read_run(run_dir)["results"], read_run(whole)["results"]
    assert mine["validation"] == other["validation"]


def test_killed_in_an_epoch_in_a_checkpoint_and_in_the_export(recipe_file, whole, tmp_path):
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "last.ckpt"
    arguments = ("train", recipe_file, "--run-dir", run_dir)

    job = Job(tmp_path, f"step:{STEPS + 3}", *arguments).stopped()
    # it lives: nobody else gets its directory
    recipe = load_recipe(recipe_file)
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(RunError, match=rf"run: is in use by process {job.process.pid} on \S+, since 2.*--resume"):
            train(recipe, run_dir, **options)
    job.kill()
    assert len(_metrics(run_dir)) == 1
    assert read_run(run_dir)["status"] == "running"

    # epoch 2 ends well, epoch 3 dies while its checkpoint is half written
    job = Job(tmp_path, "write:last.ckpt:2", *arguments, "--resume").stopped()
    job.kill()
    assert len(_metrics(run_dir)) == 3
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert [name for name in _leftovers(run_dir) if name.startswith("checkpoints/.last.ckpt.")]
    Job(tmp_path, "never", "train", run_dir, "--resume").finish()
    assert not _leftovers(run_dir)

    Job(tmp_path, "write:model.lowbit:1", "export", run_dir).stopped().kill()
    assert not (run_dir / "model.lowbit").exists()
    export_run(run_dir)
    _same_result(run_dir, whole)
    assert read_run(run_dir)["resumed"] == 2


def test_a_start_that_was_killed_can_be_resumed_and_anything_else_is_kept(recipe_file, tmp_path):
    recipe, run_dir = load_recipe(recipe_file, ["train.epochs=1"]), tmp_path / "run"
    for names in (("run.lock",), ("run.lock", "recipe.yaml", ".run.json.abcdefgh.tmp")):
        run_dir.mkdir()
        for name in names:
            (run_dir / name).touch()
        result = train(recipe, run_dir, resume=True)
        assert result.run["resumed"] == 0
        assert not _leftovers(run_dir)
        with pytest.raises(RunError, match="is not empty"):
            train(recipe, run_dir)
        # half overwritten: the networks are still there, run.json is not
        (run_dir / "run.json").unlink()
        for options in ({}, {"resume": True}):
            with pytest.raises(RunError, match="is not empty|not a run directory"):
                train(recipe, run_dir, **options)
        assert (run_dir / "checkpoints" / "final.ckpt").is_file()
        assert train(recipe, run_dir, overwrite=True).run["status"] == "finished"
        for path in sorted(run_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        run_dir.rmdir()


def test_the_lock_is_given_back(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take()
        lock.take()
        with pytest.raises(RunError, match="in use by process"):
            RunLock(tmp_path).take()
    with RunLock(tmp_path) as lock:
        lock.take()
    assert (tmp_path / "run.lock").read_bytes() == b""


MOMENTS = ("write:recipe.yaml:1", "renamed:recipe.yaml:1", "write:run.json:1", "renamed:best.ckpt:1")
MOMENTS += ("write:metrics.csv:2", "renamed:metrics.csv:2", "renamed:last.ckpt:4", "write:final.ckpt:1")
MOMENTS += ("renamed:final.ckpt:1", "write:run.json:6")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_each_file(recipe_file, whole, tmp_path, moment):
    run_dir = tmp_path / "run"
    Job(tmp_path, moment, "train", recipe_file, "--run-dir", run_dir).stopped().kill()
    Job(tmp_path, "never", "train", recipe_file, "--run-dir", run_dir, "--resume").finish()
    export_run(run_dir)
    _same_result(run_dir, whole)


@pytest.mark.slow
def test_twenty_kills_at_random(recipe_file, whole, tmp_path, record_property):
    seed = int(os.environ.get("LOWBIT_TEST_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}: LOWBIT_TEST_SEED={seed} draws the same moments")
    rng = random.Random(seed)
    seconds = sum(float(row["seconds"]) for row in csv.DictReader((whole / "metrics.csv").open(newline=""))) + 1
    kills, runs, where = 0, 0, []
    while kills < 20:
        run_dir = tmp_path / f"run{runs}"
        runs += 1
        while not (run_dir / "run.json").is_file() or read_run(run_dir)["status"] != "finished":
            again = ("--resume",) if run_dir.is_dir() else ()
            job = Job(tmp_path, "never", "train", recipe_file, "--run-dir", run_dir, *again)
            kills += _killed(job, run_dir, rng.uniform(0, 0.5 * seconds), where)
        while not (run_dir / "model.lowbit").is_file():
            kills += _killed(Job(tmp_path, "never", "export", run_dir), run_dir, rng.uniform(0, 4), where)
        export_run(run_dir)
        _same_result(run_dir, whole)
    record_property("table", f"seed {seed}: {kills} kills in {runs} runs, at {', '.join(where)}")


def _killed(job: Job, run_dir: Path, delay: float, where: list[str]) -> int:
    """Kill a process a while after it took the directory; 0 where it had ended before."""
    lock = run_dir / "run.lock"
    before = lock.read_bytes() if lock.is_file() else b""
    while job.process.poll() is None and not (lock.is_file() and lock.read_bytes() not in (b"", before)):
        time.sleep(0.005)
    with suppress(subprocess.TimeoutExpired):
        job.process.wait(delay)
    job.process.kill()
    status = job.process.wait()
    if status == 0:  # at the latest while it was being killed
        return 0
    assert status == -signal.SIGKILL, job.said()
    done = len(_metrics(run_dir)) if (run_dir / "metrics.csv").is_file() else 0
    where.append(f"{job.process.args[4]} {done}")
    return 1
