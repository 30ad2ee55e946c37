"""Search: spaces and what is wrong with them, the study's life (resume, kills, pruning, budget), the table that it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
import yaml
from optuna.trial import TrialState
from PIL import Image

from lowbit import cli
from lowbit.train import search_report
from lowbit.train.data import DATASETS
from lowbit.train.probe import Speed, probe_speed, probe_training
from lowbit.train.recipe import RecipeError, load_recipe
from lowbit.train.rundir import InputSpec, RunError, write_json, write_metrics
from lowbit.train.search import Event, Search
from lowbit.train.space import SpaceError, load_space
from lowbit.train.table import load_table
from lowbit.train.trainer import load_data
from lowbit.train.workers import Job

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TREE: dict[str, Any] = {
    "name": "tiny",
    "recipe": {
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "quantize": {"method": "sign"},
        "data": {"name": "image_folder", "root": "DATA", "size": 8, "channels": 1},
        "train": {"epochs": 4, "batch_size": 8, "lr": 0.05, "device": "cpu"},
    },
    "runs": {
        "float": {"like": ["width"], "set": {"quantize": {"method": "float", "edges": "float"}, "train.epochs": 2}},
        "teacher": {"set": {"quantize": {"method": "float", "edges": "float"}, "model.width": 8}},
    },
    "space": {
        "width": {"field": "model.width", "values": [4, 8, 12]},
        "method": {"choices": {"sign": {}, "slb": {"set": {"quantize.method": "slb", "train.latent_lr_scale": 10}}}},
        "start": {"choices": {"random": {}, "float": {"after": "float"}}},
        "teacher": {"choices": {"none": {}, "float": {"teacher": "teacher", "set": {"train.distill.weight": 0.5}}}},
        "lr": {"field": "train.lr", "low": 0.02, "high": 0.2, "log": True, "default": 0.05},
    },
    "prune": {"rungs": [1, 2], "margin": 5.0},
    "table": {
        "set": {"train.final": True, "train.epochs": 3},
        "cells": {"twin": {"set": {"quantize": {"method": "float", "edges": "float"}}}},
    },
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
    return path


def changed(**dimensions: Any) -> dict[str, Any]:
    """The space with some dimensions changed, or left out (None)."""
    return {k: v for k, v in {**TREE["space"], **dimensions}.items() if v is not None}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for label, low in (("dark", 0), ("light", 90)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 160, (8, 8), np.uint8)).save(folder / f"{i}.png")
    return root


# ------------------------------------------------------------------------------------------ spaces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spase": {}}, "unknown key 'spase': did you mean 'space'"),
        ({"space": {}}, "space: is empty"),
        ({"space": {"width": {"field": "model.width", "values": []}}}, r"space\.width: values: is empty"),
        ({"space": {"method": {"choices": {}}}}, r"space\.method: choices: is empty"),
        (
            {"space": {"w": {"field": "model.widht", "values": [4]}}},
            r"space\.w: 4 fits no recipe: .*did you mean 'width'",
        ),
        (
            {"space": {"w": {"field": "train.lrr", "low": 1, "high": 2}}},
            r"space\.w: 1.0 fits no recipe: .*'train\.lrr'",
        ),
        ({"space": {"w": {"field": "train.lr", "low": 2, "high": 1}}}, "a range has low: and high:, low < high"),
        ({"space": {"w": {"field": "train.lr", "low": 0, "high": 1, "log": True}}}, "log: true goes with low > 0"),
        ({"space": {"w": {"field": "train.lr", "low": 0.1, "high": 1, "default": 2}}}, "default: lies between"),
        ({"space": {"w": {"field": "train.lr"}}}, "is either choices:, or field:"),
        ({"space": {"w": {"values": [1]}}}, "is either choices:, or field:"),
        ({"space": {"w": {"field": "train.lr", "values": [0.1, 0.1]}}}, "has one of them twice"),
        ({"space": {"s": {"choices": {"a": {"after": "flaot"}}}}}, "space.s: no run 'flaot': did you mean 'float'"),
        ({"runs": {"float": {"like": ["widht"]}}}, r"runs\.float\.like: no dimension 'widht': did you mean 'width'"),
        ({"runs": {"float": {"after": "later"}, "later": {}}}, "runs.float: no run 'later' above it"),
        ({"runs": {"trial": {}}}, "'trial' is the trials' own name"),
        ({"set": {"train.final": True}}, "train.final: true holds no images out"),
        ({"set": {"train.validate_every": 2}}, "prune.rungs: nothing is evaluated after epoch 1"),
        ({"space": {"a": {"field": "seed", "values": [1]}}}, "space.a: 'seed' is filled in by the search"),
        ({"recipe": "nowhere.yaml"}, "recipe: .*nowhere.yaml: can't read"),
        ({"table": {"cells": {"float": {}}}}, "table.cells: 'float' is a name of the table's other cells"),
        ({"recipe": 3}, "recipe: is a recipe written out"),
        ({"prune": {"rungs": [4, 2]}}, r"prune: rungs: \[4, 2\] must rise"),
        ({"prune": {"rungs": [2, 2]}}, r"prune: rungs: \[2, 2\] must rise"),
    ],
)
def test_a_wrong_space_is_one_clear_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=rf"tiny\.yaml: (?s:.*){message}") as error:
        load_space(write(tmp_path, **({"runs": {"float": {}}} if "space" in changes else {}), **changes))
    assert "\n" not in str(error.value)


def test_what_is_another_file(tmp_path: Path) -> None:
    """Each of the three kinds names the command that takes it."""
    path = write(tmp_path)
    for read in (load_recipe, load_table):
        with pytest.raises(RecipeError, match=r"tiny\.yaml: is a space to search, not a .*; `lowbit search` runs it"):
            read(path)
    path.write_text(yaml.safe_dump({"name": "t", "recipe": TREE["recipe"], "cells": {"a": {}}}))
    with pytest.raises(SpaceError, match="is a table, not a space to search; `lowbit compare` runs it"):
        load_space(path)
    path.write_text(yaml.safe_dump({"name": "t", **TREE["recipe"]}))
    with pytest.raises(SpaceError, match="is a recipe, not a space to search; `lowbit train` runs it"):
        load_space(path)


def test_two_dimensions_share_mappings_and_nothing_else(tmp_path: Path) -> None:
    two = {"set": {"quantize.overrides": {"blocks.0.*": {"weight_bits": 2}}}}
    rest = {"set": {"quantize.overrides": {"blocks.1.*": {"weight_bits": 4}}}}
    slb = {"a": {"choices": {"one": {}, "two": two}}, "b": {"choices": {"one": {}, "four": rest}}}
    space = load_space(write(tmp_path, set={"quantize.method": "slb"}, space=slb, runs={}))
    assert space.cell({"a": "two", "b": "four"}).recipe.quantize.overrides == {
        "blocks.0.*": {"weight_bits": 2},
        "blocks.1.*": {"weight_bits": 4},
    }
    assert space.size == 4
    for other in (
        {"field": "model.width", "values": [8]},
        {"choices": {"x": {"set": {"model": {"name": "resnet20"}}}}},
    ):
        with pytest.raises(SpaceError, match=r"space\.\w+ and space\.\w+ both change model\.width"):
            load_space(write(tmp_path, space=changed(again=other)))


def test_a_trial_and_what_it_starts_from(tmp_path: Path) -> None:
    space = load_space(write(tmp_path))
    cell = space.cell({**space.first, "width": "12", "start": "float", "teacher": "float", "lr": 0.123456})
    recipe, needs = cell.recipe, cell.needs
    assert (recipe.model.arguments["width"], recipe.train.lr, recipe.seed) == (12, 0.123, 1000)
    assert recipe.train.distill is not None
    assert needs["train.start_from"].recipe.model.arguments["width"] == 12, "like: [width]"
    assert needs["train.distill.teacher"].recipe.model.arguments["width"] == 8
    other = space.cell({**space.first, "width": "12", "start": "float", "method": "slb"})
    assert other.needs["train.start_from"].hash == needs["train.start_from"].hash, "one run for both"
    assert cell.place == Path("trial") / cell.hash[:12]
    resolved = cell.resolve({key: f"runs/{i}" for i, key in enumerate(needs)})
    assert {resolved.train.start_from, resolved.train.distill.teacher} == {"runs/0", "runs/1"}  # type: ignore[union-attr]


def test_the_fingerprint_is_of_what_trials_are(tmp_path: Path) -> None:
    first = load_space(write(tmp_path)).fingerprint
    for same in ({"title": "x"}, {"limit_ms": 3}, {"prune": {}}, {"table": {}}):
        assert load_space(write(tmp_path, **same)).fingerprint == first
    lr = {"field": "train.lr", "low": 0.02, "high": 0.3, "log": True}
    for other in (
        {"seed": 1},
        {"space": changed(lr=lr)},
        {"set": {"train.epochs": 6}},
        {"runs": {**TREE["runs"], "x": {}}},
    ):
        assert load_space(write(tmp_path, **other)).fingerprint != first


# ------------------------------------------------------------------------------------------ searches without training


class MadeUp:
    """An executor that writes run directories epoch by epoch; the score after an epoch is ``score(recipe, epoch)``.

    ``deaths``: run labels ("trial", "float", ...) whose next worker is killed after its first epoch.
    """

    def __init__(self, slots: int = 1, seconds: float = 0.0, deaths: tuple[str, ...] = ()) -> None:
        self.slots, self.seconds, self.deaths = slots, seconds, list(deaths)
        self.jobs: list[Job] = []
        self.interrupted: set[Path] = set()
        self.stopped = False

    @staticmethod
    def score(recipe: Any, epoch: int) -> float:
        """Wider is better, and slb than sign."""
        return 0.5 + recipe.model.arguments["width"] / 100 + 0.03 * (recipe.quantize.method == "slb") + epoch / 100

    def submit(self, job: Job) -> Future[int]:
        self.jobs.append(job)
        future: Future[int] = Future()
        threading.Thread(target=lambda: future.set_result(self._train(job))).start()
        return future

    def interrupt(self, run_dir: Path) -> None:
        self.interrupted.add(run_dir)

    def stop(self) -> None:
        self.stopped = True
        time.sleep(2 * self.seconds)

    def _train(self, job: Job) -> int:
        recipe = load_recipe(job.recipe)
        (job.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (job.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
        begun = json.loads((job.run_dir / "run.json").read_text())["epochs_done"] if job.resume else 0
        label = job.run_dir.parent.name
        for done in range(begun, recipe.train.epochs + 1):
            self._write(job.run_dir, recipe, done, "running")
            if label in self.deaths and done == 1:
                self.deaths.remove(label)
                return -signal.SIGKILL
            time.sleep(self.seconds)
            if self.stopped or job.run_dir in self.interrupted:
                self._write(job.run_dir, recipe, done, "failed")
                return 130
        self._write(job.run_dir, recipe, recipe.train.epochs, "finished")
        return 0

    def _write(self, run_dir: Path, recipe: Any, done: int, status: str) -> None:
        score = self.score(recipe, recipe.train.epochs)
        rows = [{"epoch": i, "val_accuracy": self.score(recipe, i)} for i in range(1, done + 1)]
        write_metrics(run_dir / "metrics.csv", rows, "accuracy")
        run = {"format": 1, "status": status, "error": None, "epochs": recipe.train.epochs, "epochs_done": done}
        run |= {"wall_seconds": 30.0, "resumed": 0, "input": {}}
        results = {"validation": {"accuracy": score, "loss": 1.0}, "test": None}
        write_json(run_dir / "run.json", {**run, "results": results if status == "finished" else None})


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """0.01 ms for each channel; 10 seconds of training an epoch; a study that does not wait for the disk."""
    monkeypatch.setattr(
        "lowbit.train.search.probe_speed",
        lambda recipe, _: Speed(1e-5 * recipe.model.arguments["width"], 1000 * recipe.model.arguments["width"]),
    )
    monkeypatch.setattr("lowbit.train.search.probe_training", lambda recipe, *_: 10.0 * recipe.train.epochs)
    monkeypatch.setattr("lowbit.train.search.POLL_SECONDS", 0.005)

    def hasty(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", hasty)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", hasty)


@pytest.fixture
def path(tmp_path: Path, images: Path) -> Path:
    recipe = {**TREE["recipe"], "data": {**TREE["recipe"]["data"], "root": str(images)}}
    return write(tmp_path, recipe=recipe)


def alter(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))
    return path


def study(folder: Path) -> list[Any]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}").trials


SMALL = {
    "width": {"field": "model.width", "values": [4, 8, 12]},
    "method": {"choices": {"sign": {}, "slb": {"set": {"quantize.method": "slb", "train.latent_lr_scale": 10}}}},
}


@pytest.mark.usefixtures("no_probes")
def test_a_whole_space_is_searched_once(path: Path, tmp_path: Path) -> None:
    space, executor, events = load_space(alter(path, space=SMALL, runs={}, prune={})), MadeUp(2), []
    with Search(space, tmp_path / "out", executor, events.append) as search:
        search.run(60)
        front = search.front
    trials = study(tmp_path / "out")
    assert (trials[0].params, trials[0].state) == (space.first, TrialState.COMPLETE), "the first values come first"
    complete = [t for t in trials if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs]
    assert len(complete) == len(executor.jobs), "nothing is trained twice"
    assert len({tuple(t.params.items()) for t in complete}) == len(complete) <= 6
    assert {e.kind for e in events} <= {"start", "epoch", "finish"}
    by_width = {t.params["width"] for t in complete if t.params["method"] == "slb"}
    assert [f.params["width"] for f in front if f.params["method"] == "slb"] == [
        w for w in ("4", "8", "12") if w in by_width
    ]
    assert [f.file_bytes for f in front] == pytest.approx([1e8 * f.seconds for f in front])
    assert len(by_width) == 3


@pytest.mark.usefixtures("no_probes")
def test_slow_networks_are_not_trained(path: Path, tmp_path: Path) -> None:
    executor = MadeUp()
    with Search(load_space(alter(path, space=SMALL, runs={}, limit_ms=0.1)), tmp_path / "out", executor) as search:
        search.run(60)
    trials = study(tmp_path / "out")
    slow = [t for t in trials if t.params["width"] == "12" and "same_as" not in t.user_attrs]
    assert slow
    assert {t.state for t in slow} == {TrialState.PRUNED}
    assert {t.user_attrs["why"] for t in slow} == {"0.12 ms: slower than the limit of 0.1"}
    widths = {load_recipe(job.recipe).model.arguments["width"] for job in executor.jobs}
    assert widths == {4, 8}


@pytest.mark.usefixtures("no_probes")
def test_a_trial_that_is_dominated_at_a_rung_is_stopped(path: Path, tmp_path: Path) -> None:
    """sign is 3 points below slb at every rung: stopped with a margin of 2, not with one of 4."""
    for margin, stopped in ((2.0, True), (4.0, False)):
        tree = {"space": {"method": SMALL["method"]}, "prune": {"rungs": [2], "margin": margin}, "runs": {}}
        executor, out = MadeUp(seconds=0.05), tmp_path / f"out{margin}"
        tree["space"] = {"method": {"choices": dict(reversed(SMALL["method"]["choices"].items()))}}
        with Search(load_space(alter(path, **tree)), out, executor) as search:
            search.run(60)
            numbers = [f.number for f in search.front]
        trials = [t for t in study(out) if "same_as" not in t.user_attrs]
        assert [(t.params["method"], t.state) for t in trials if t.state != TrialState.FAIL] == [
            ("slb", TrialState.COMPLETE),
            ("sign", TrialState.PRUNED if stopped else TrialState.COMPLETE),
        ]
        assert bool(executor.interrupted) is stopped
        assert numbers == [0]
        sign = trials[1]
        if stopped:
            assert sign.user_attrs["why"] == "56.00 % after epoch 2, where trial 0, no slower, had 59.00 %"
            assert json.loads((executor.jobs[1].run_dir / "run.json").read_text())["epochs_done"] < 4


@pytest.mark.usefixtures("no_probes")
def test_a_slower_trial_and_one_of_other_epochs_stop_nothing(path: Path, tmp_path: Path) -> None:
    """Width 4 is 4 points below width 8, which is slower; of fewer epochs width 4 would be as good."""
    space = {"width": {"field": "model.width", "values": [12, 4]}}
    with Search(
        load_space(alter(path, space=space, runs={}, prune={"rungs": [1], "margin": 0.5})), tmp_path / "a", MadeUp()
    ) as s:
        s.run(60)
        assert len(s.front) == 2
    space = {"length": {"field": "train.epochs", "values": [4, 3]}, "method": SMALL["method"]}
    executor = MadeUp(seconds=0.02)
    with Search(
        load_space(alter(path, space=space, runs={}, prune={"rungs": [1], "margin": 2.0})), tmp_path / "b", executor
    ) as s:
        s.run(60)
    for t in study(tmp_path / "b"):
        if t.state == TrialState.PRUNED and "same_as" not in t.user_attrs:
            rival = int(t.user_attrs["why"].split("trial ")[1].split(",")[0])
            assert study(tmp_path / "b")[rival].params["length"] == t.params["length"]


@pytest.mark.usefixtures("no_probes")
def test_a_killed_worker_fails_its_trial_which_is_tried_again(path: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    executor = MadeUp(deaths=("trial",))
    with Search(load_space(path), tmp_path / "out", executor, events.append) as search:
        search.run(60, trials=2)
    first, again = study(tmp_path / "out")[:2]
    assert (first.state, first.user_attrs["why"]) == (TrialState.FAIL, "its worker was killed (SIGKILL)")
    assert (again.state, again.params) == (TrialState.COMPLETE, first.params)
    assert [job.resume for job in executor.jobs] == [False, True], "it goes on where it was"
    assert [e.kind for e in events if e.kind in ("back", "finish")] == ["back", "finish"]

    executor = MadeUp(deaths=("trial",) * 9)
    executor._write = lambda *_: None  # type: ignore[method-assign]  # it never comes to an epoch
    folder = tmp_path / "never"
    with Search(load_space(path), folder, executor) as search:
        search.run(60, trials=3)
    assert [t.state for t in study(folder)] == [TrialState.FAIL] * 3
    assert study(folder)[2].user_attrs["why"] == "its worker was killed (SIGKILL), 3 times"


@pytest.mark.usefixtures("no_probes")
def test_a_search_that_was_killed_goes_on(path: Path, tmp_path: Path) -> None:
    """A killed process leaves its trial RUNNING in the study and its run half done."""
    space, out = load_space(path), tmp_path / "out"
    executor = MadeUp(deaths=("trial",))
    search = Search(space, out, executor)
    search._ended = lambda _: (_ for _ in ()).throw(SystemExit)  # type: ignore[method-assign]
    search._leave = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        search.run(60)
    for active in search._active:
        os.close(active.descriptor)
    search.close()
    assert [t.state for t in study(out)] == [TrialState.RUNNING]
    executor = MadeUp()
    with Search(space, out, executor) as search:
        search.run(60, trials=1)
    assert [t.state for t in study(out)] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study(out)[0].params == study(out)[1].params
    assert [job.resume for job in executor.jobs] == [True]


@pytest.mark.usefixtures("no_probes")
def test_the_end_of_the_time_and_an_interrupt_put_back(path: Path, tmp_path: Path) -> None:
    space, out = load_space(path), tmp_path / "out"
    executor = MadeUp(seconds=0.05)

    def late(event: Event) -> None:
        if event.kind == "epoch":
            search._end_at = time.monotonic() - 1

    with Search(space, out, executor, late) as search:
        search.run(60)
    assert executor.stopped
    (first, *_) = study(out)
    assert (first.state, first.user_attrs["why"]) == (TrialState.FAIL, "the time was over")

    def stop(event: Event) -> None:
        if event.kind == "epoch":
            raise KeyboardInterrupt

    executor = MadeUp(seconds=0.05)
    with Search(space, out, executor, stop) as search, pytest.raises(KeyboardInterrupt):
        search.run(60)
    assert executor.stopped
    assert study(out)[1].user_attrs["why"] == "interrupted"
    executor = MadeUp()
    with Search(space, out, executor) as search:
        search.run(60, trials=1)
    assert study(out)[2].state == TrialState.COMPLETE
    assert {tuple(t.params.items()) for t in study(out)[:3]} == {tuple(space.first.items())}
    assert executor.jobs[0].resume


@pytest.mark.usefixtures("no_probes")
def test_what_trials_start_from_is_trained_once(path: Path, tmp_path: Path) -> None:
    space, out = load_space(path), tmp_path / "out"
    executor, events = MadeUp(2), []
    asked = [{**space.first, "start": "float", "teacher": "float", "method": m} for m in ("sign", "slb")]
    with Search(space, out, executor, events.append) as search:
        for params in asked:
            search._study.enqueue_trial(params)
        search.run(60, trials=3)
        paths = search_report.write(search)
        rows = search_report.front_rows(search)
    places = [job.run_dir.parent.name for job in executor.jobs]
    assert sorted(places) == ["float", "teacher", "trial", "trial", "trial"]
    assert sum(e.kind == "run" for e in events) == 2
    started = [load_recipe(job.recipe) for job in executor.jobs if job.run_dir.parent.name == "trial"]
    assert sorted(bool(r.train.start_from) for r in started) == [False, True, True]

    assert [p.name for p in paths] == ["trials.json", "front.md", "front.png", "tiny-front.yaml"]
    assert all(p.is_file() for p in paths)
    kept = json.loads(paths[0].read_text())
    assert len(kept["trials"]) == len(study(out))
    assert kept["front"] == [int(row[0]) for row in rows[1:]]
    table = load_table(paths[-1])
    assert table.config.seeds == 3
    assert table.cell("twin", 0).recipe.quantize.method == "float"
    for number in kept["front"]:
        params = study(out)[number].params
        recipe = table.cell(f"trial{number}", 0).recipe
        expected = space.cell(params).recipe
        assert recipe.train.final, "table.set"
        assert recipe.train.epochs == 3
        for section in ("model", "quantize", "data", "schedule"):
            assert getattr(recipe, section) == getattr(expected, section)
        assert recipe.train.lr == expected.train.lr
        needs = {k: need.label for k, need in table.cell(f"trial{number}", 0).needs.items()}
        assert needs == space.needs(params)


@pytest.mark.usefixtures("no_probes")
def test_searches_that_cannot_be(path: Path, images: Path, tmp_path: Path) -> None:
    space, out = load_space(path), tmp_path / "out"
    with Search(space, out, MadeUp()) as search:
        with pytest.raises(
            RunError, match=r"0\.1 minutes are too few for one trial: .*about 0\.7 minutes.*--minutes 1"
        ):
            search.run(0.1)
        with pytest.raises(RunError, match="another search runs here"):
            Search(space, out, MadeUp())
        search.run(60, trials=1)
    other = load_space(alter(path, space=SMALL, runs={}))
    with pytest.raises(RunError, match="was searched with another space; it differs in runs.*--out another folder"):
        Search(other, out, MadeUp())
    space, out = load_space(alter(path, space=SMALL, runs={})), tmp_path / "small"
    with Search(space, out, MadeUp()) as search:
        search.run(60, trials=1)
    picture = next((images / "train" / "dark").iterdir())
    renamed = picture.rename(picture.with_name("another.png"))
    try:
        with pytest.raises(RunError, match=r"small: was trained on other data \(.*\); give it that again"):
            Search(space, out, MadeUp())
    finally:
        renamed.rename(picture)
    (out / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(RunError, match="study.db: can't be read"):
        Search(load_space(path), out, MadeUp())
    Search(load_space(path), tmp_path / "fresh", MadeUp()).close()


@pytest.mark.usefixtures("no_probes")
def test_a_refused_budget_binds_the_folder_to_nothing(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Search(load_space(path), out, MadeUp()) as search, pytest.raises(RunError, match="too few for one trial"):
        search.run(0.1)
    space = load_space(alter(path, space=SMALL, runs={}))
    with Search(space, out, MadeUp()) as search:
        search.run(60, trials=1)
        assert [t.params for t in search.trials] == [space.first]


@pytest.mark.usefixtures("no_probes")
def test_failures_in_a_row_end_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Speed:
        raise RunError("no such kernel")

    monkeypatch.setattr("lowbit.train.search.probe_speed", broken)
    with (
        Search(load_space(path), tmp_path / "out", MadeUp()) as search,
        pytest.raises(RunError, match="20 trials in a row"),
    ):
        search.run(60)
    assert {t.user_attrs["why"].split(": ")[-1] for t in study(tmp_path / "out")} == {"no such kernel"}


# ------------------------------------------------------------------------------------------ for real


def test_what_is_known_before_training(path: Path) -> None:
    space = load_space(path)
    recipes = [space.cell({**space.first, "width": w}).recipe for w in ("4", "12")]
    data = load_data(recipes[0])
    small, large = (probe_speed(recipe, InputSpec.of(data)) for recipe in recipes)
    assert 0 < small.seconds < 0.1
    assert small.file_bytes < large.file_bytes
    short, long = (
        probe_training(r, data)
        for r in (recipes[0], load_space(alter(path, set={"train.epochs": 400})).cell(space.first).recipe)
    )
    assert 0 < short < long
    assert "image_folder" in DATASETS


def test_the_command_killed_and_resumed(path: Path, tmp_path: Path) -> None:
    """A search in a process of its own, killed with its worker while it trains, goes on."""
    alter(path, space={"width": {"field": "model.width", "values": [4, 8]}}, runs={}, set={"train.epochs": 25})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lowbit", "search", path.name, "--out", "out", "--jobs", "1", "--trials", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not list(out.glob("trial/*/metrics.csv")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [t.state for t in study(out)] == [TrialState.RUNNING]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [t.state for t in study(out)][:2] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study(out)[1].params == {"width": "4"}
    assert "trial 0: put back: the search was killed" in done.stderr
    assert "front: " in done.stderr
    runs = [json.loads(p.read_text()) for p in out.glob("trial/*/run.json")]
    assert [run["status"] for run in runs] == ["finished"]
    assert load_table(out / "tables" / "tiny-front.yaml").labels == ("trial1", "twin")
    assert "next: lowbit compare out/tables/tiny-front.yaml --front" in done.stdout


def test_the_command_says_what_is_wrong(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (["nowhere.yaml"], "can't read this space"),
        ([str(path), "--minutes", "0.01", "--out", "a"], "minutes are too few for one trial"),
        ([str(path), "--on", "moon", "--out", "b"], "--on moon"),
    ):
        monkeypatch.setattr(sys, "argv", ["lowbit", "search", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        assert stop.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "trials.json").exists()
