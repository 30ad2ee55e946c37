"""Tables: their schema, what counts as the same cell, the runner (resume, kills, failures, locks), statistics, the page."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lowbit import cli
from lowbit.train import aggregate, cells, compare
from lowbit.train.cells import Action, Places
from lowbit.train.data import DATASETS, ImageData
from lowbit.train.data.shards import write_shards
from lowbit.train.recipe import RecipeError, load_recipe, parse_recipe
from lowbit.train.rundir import (
    RunError,
    RunLock,
    fingerprint,
    read_metrics,
    read_run,
    sessions,
    write_json,
    write_metrics,
)
from lowbit.train.statistics import paired, summary
from lowbit.train.table import Cell, Table, TableError, hash_recipe, load_cell, load_table, stored_recipe
from lowbit.train.trainer import load_data, train
from lowbit.train.workers import Job, LocalExecutor, lock

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

RECIPE: dict[str, Any] = {
    "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
    "data": {"name": "image_folder", "root": "nowhere", "size": 8, "channels": 1},
    "train": {"epochs": 2, "batch_size": 8, "lr": 0.05, "device": "cpu"},
}
GRID: dict[str, Any] = {
    "name": "tiny",
    "recipe": RECIPE,
    "set": {"train.lr": 0.1},
    "axes": {
        "weights": {"1": {"quantize.weight_bits": 1}, "2": {"quantize.weight_bits": 2}},
        "activations": {
            "1": {"quantize.activation_bits": 1},
            "32": {"quantize.activation_bits": 32, "train.lr": 0.2},
        },
    },
    "skip": ["2/1"],
    "cells": {"1/32": {"set": {"train.lr": 0.3}}, "float": {"set": {"quantize.method": "float"}}},
    "seeds": 2,
}
PAIR: dict[str, Any] = {
    "name": "pair",
    "recipe": RECIPE,
    "cells": {"slow": {"set": {"train.lr": 0.01}}, "fast": {"set": {"train.lr": 0.1}}},
    "seeds": 2,
}
CHAIN: dict[str, Any] = {
    "name": "chain",
    "recipe": RECIPE,
    "cells": {
        "tuned": {"set": {"train.lr": 0.01}, "after": "float"},
        "float": {"set": {"quantize.method": "float", "quantize.edges": "float"}},
        "taught": {"set": {"train.distill.weight": 0.5}, "teacher": "float"},
    },
    "seeds": 1,
}


def write(folder: Path, tree: dict[str, Any], **changes: Any) -> Path:
    path = folder / f"{tree['name']}.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}, sort_keys=False))
    return path


def load(folder: Path, tree: dict[str, Any], *overrides: str, **changes: Any) -> Table:
    return load_table(write(folder, tree, **changes), overrides)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "runs", tmp_path / "results")


# ------------------------------------------------------------------------------------------ one cell by itself


def test_one_cell_is_a_recipe_of_its_own(tmp_path: Path) -> None:
    """`lowbit train TABLE --cell LABEL`: the same training that compare would do."""
    path, runs = write(tmp_path, CHAIN), tmp_path / "runs"
    table = load_table(path)
    assert load_cell(path, "float", 1, runs=runs) == table.cells(2, ["float"])[1].recipe
    with pytest.raises(
        TableError, match=r"cell 'tuned' starts from a run of 'float', and .*chain-float-seed1 is not there"
    ):
        load_cell(path, "tuned", 1, runs=runs)
    start = made_up(load_cell(path, "float", 1), runs / "chain-float-seed1")
    tuned = load_cell(path, "tuned", 1, runs=runs)
    assert (tuned.name, tuned.seed, tuned.train.start_from) == ("chain-tuned-seed1", 1, str(start))
    assert tuned.train.lr == 0.01
    mine = load_cell(path, "taught", 0, ["train.distill.teacher=mine", "train.lr=0.5"], runs)
    assert (mine.train.distill.teacher, mine.train.lr) == ("mine", 0.5)
    with pytest.raises(TableError, match="no cell 'floats': did you mean"):
        load_cell(path, "floats")


def made_up(recipe: Any, run_dir: Path, status: str = "finished") -> Path:
    """A run without a network."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    keys = {"epochs": 2, "epochs_done": 1, "wall_seconds": 1, "resumed": 0, "input": {}, "results": None}
    write_json(run_dir / "run.json", {"format": 1, "status": status, **keys})
    return run_dir


def test_a_cell_starts_from_the_run_that_its_table_has(tmp_path: Path) -> None:
    tree = {**CHAIN, "cells": {**CHAIN["cells"], "again": {"set": {"train.lr": 0.001}, "after": "tuned"}}}
    path, runs = write(tmp_path, tree), tmp_path / "runs"
    start = made_up(load_cell(path, "float", 0, ["train.epochs=1"]), runs / "chain-float-seed0")
    with pytest.raises(
        TableError,
        match=r"'tuned' starts from a run of 'float', and \S+chain-float-seed0 was trained with another recipe "
        r"\(train\.epochs: 1, not 2\): train it first \(--cell float --seed 0 --overwrite\), or .*--set train\.start_from=RUN",
    ):
        load_cell(path, "tuned", runs=runs)
    trial = load_cell(path, "tuned", 0, ["train.epochs=1"], runs)
    assert trial.train.start_from == str(start), "a trial of a trial"
    with pytest.raises(TableError, match=r"train\.epochs: 1, not 3"):
        load_cell(path, "tuned", 0, ["train.epochs=3"], runs)
    assert load_cell(path, "tuned", 0, [f"train.start_from={start}"], runs).train.start_from == str(start)

    made_up(load_cell(path, "float", 0, ["data.root=elsewhere", "train.workers=3"]), start)
    tuned = load_cell(path, "tuned", 0, ["train.lr=0.7"], runs)
    assert tuned.train.lr == 0.7, "its own override, not that of the run it starts from"
    made_up(load_cell(path, "float", 0), start, "failed")
    with pytest.raises(TableError, match=r"has not finished \(failed\): .*--cell float --seed 0 --resume"):
        load_cell(path, "tuned", runs=runs)
    made_up(load_cell(path, "float", 0), start)
    mine = made_up(load_cell(path, "tuned", 0, ["train.start_from=mine"]), runs / "chain-tuned-seed0")
    with pytest.raises(TableError, match=r"\(train\.start_from: mine, not \S+chain-float-seed0\)"):
        load_cell(path, "again", runs=runs)
    made_up(load_cell(path, "tuned", runs=runs), mine)
    assert load_cell(path, "again", runs=runs).train.start_from == str(mine)


def test_train_takes_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, CHAIN)
    trained: list[Any] = []
    monkeypatch.setattr(
        "lowbit.train.trainer.train", lambda recipe, place, **_: trained.append((recipe, place)) or exit(9)
    )
    for words, status in ((["tuned", "--set", "train.start_from=x"], 130), (["tuned"], 2), (["nothing"], 2)):
        monkeypatch.setattr(sys, "argv", ["lowbit", "train", str(path), "--seed", "4", "--cell", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        assert stop.value.code == status
    assert [(recipe.name, recipe.seed, place) for recipe, place in trained] == [
        ("chain-tuned-seed4", 4, Path("runs/chain-tuned-seed4"))
    ]
    said = capsys.readouterr().err
    assert "train it first (--cell float --seed 4)" in " ".join(said.split())
    assert said.count("error:") == 2


# ------------------------------------------------------------------------------------------ executors of these tests


SESSION: dict[str, Any] = {
    "started": "2030-01-02T03:00:00+00:00",
    "code": {"lowbit": "1", "source": "s", "commit": "c", "dirty": False},
    "versions": {"python": "3", "torch": "2", "numpy": "2", "lightning": "2"},
    "machine": {"architecture": "x", "processor": "some CPU", "cores": 2, "threads": 1, "device": "cpu", "gpu": None},
}


def accuracy(recipe: Any) -> float:
    """What a made-up run of a recipe ends with: some number of everything that matters."""
    return int(hash_recipe(recipe)[:6], 16) % 9000 / 10000 + 0.05


class MadeUp:
    """An executor that writes run directories without training.

    ``statuses`` are exit statuses of the jobs, in order, 0 at their end; a job that does not end with 0 leaves one of its
    epochs behind.
    """

    def __init__(self, *statuses: int, slots: int = 2, seconds: float = 0.0) -> None:
        self.jobs: list[Job] = []
        self.recipes: list[Any] = []
        self.statuses, self.slots, self.seconds, self.stopped = list(statuses), slots, seconds, 0

    def submit(self, job: Job) -> Future[int]:
        status = self.statuses.pop(0) if self.statuses else 0
        self.jobs.append(job)
        self.recipes.append(load_recipe(job.recipe))
        future: Future[int] = Future()

        def work() -> None:
            time.sleep(self.seconds)
            self.make(job, self.recipes[-1] if not self.seconds else load_recipe(job.recipe), status)
            future.set_result(status)

        threading.Thread(target=work).start() if self.seconds else work()
        return future

    def make(self, job: Job, recipe: Any, status: int) -> None:
        (job.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (job.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
        done = recipe.train.epochs if status == 0 else 1
        found = {"accuracy": accuracy(recipe), "loss": 1.0, "images": 10, "confusion": [[1]]}
        run = {
            "format": 1,
            "name": recipe.name,
            "status": "finished" if status == 0 else "running",
            "error": None,
            "epochs": recipe.train.epochs,
            "epochs_done": done,
            "wall_seconds": 90.0,
            "resumed": int(job.resume),
            "input": {},
            "finished": "2030-01-02T03:04:05+00:00",
            **SESSION,
            "sessions": [*(sessions(read_run(job.run_dir)) if job.resume else ()), SESSION],
            "metric": "accuracy",
            "parameters": 7,
            "warnings": [],
            "results": {
                "selected_epoch": done,
                "gap": 0.0,
                "temperature": 1.0,
                "flips_start": 0.25,
                "train_seconds": 80.0,
                "images_per_second": 100.0,
                "validation": {**found, "accuracy": found["accuracy"] + 0.01},
                "test": found if job.test else None,
            },
        }
        if status:
            run["results"] = None
            job.log.write_text("Traceback\nerror: it broke\n")
        write_json(job.run_dir / "run.json", run)
        rows = [{"epoch": i + 1, "val_accuracy": 0.5, "train_accuracy": 0.6} for i in range(done)]
        write_metrics(job.run_dir / "metrics.csv", rows, "accuracy")

    def stop(self) -> None:
        self.stopped += 1


def go(
    table: Table, places: Places, executor: Any = None, *, test: bool = True, refresh: bool = False, **options: Any
) -> Any:
    """Run a table; (executor, failures)."""
    executor = executor or MadeUp()
    steps = cells.plan(options.pop("cells", None) or table.cells(), places, test=test, refresh=refresh)
    cells.refuse(steps)
    return executor, compare.run(table.name, steps, places, executor, test=test, refresh=refresh, **options)


def titles(executor: MadeUp) -> list[str]:
    return [f"{job.run_dir.parent.name} {job.run_dir.name}" for job in executor.jobs]


def results(table: Table, places: Places, split: str = "test") -> dict[str, float]:
    return {
        f"{k[0]} {k[1]}": r["results"][split]["accuracy"] for k, r in cells.read_results(table.cells(), places).items()
    }


# ------------------------------------------------------------------------------------------ the schema


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, r"unknown key 'seed': did you mean 'seeds'\?"),
        ({"cells": {"a": {"sett": {}}}}, r"unknown key 'cells\.a\.sett': did you mean 'set'\?"),
        (
            {"published": {"datset": "x"}},
            r"unknown key 'published\.datset': did you mean 'dataset'\?|'published.dataset' is missing",
        ),
        ({"tune": {"tries": [{}], "sed": 1}}, r"unknown key 'tune\.sed': did you mean 'seed'\?"),
        ({"set": {"train.epoch": 3}}, r"cell '1/1': unknown key 'train\.epoch': did you mean 'epochs'\?"),
        (
            {"axes": {"w": {"1": {"quantize.weight_bit": 1}}}, "skip": []},
            r"unknown key 'quantize\.weight_bit': did you mean",
        ),
        (
            {"axes": {"w": {"1": {"model.widht": 1}}}, "skip": []},
            r"cell '1': unknown key 'model\.widht': did you mean 'width'",
        ),
        ({"set": {"train.lr.x": 3}}, r"cell '1/1': set: 'lr' is not a section"),
        ({"set": {"seed": 3}}, r"set: 'seed' is filled in by the table"),
        ({"skip": ["2/9"]}, r"skip: no cell '2/9' in the grid: did you mean"),
        ({"skip": ["1/32"]}, r"cell '1/32' is both skipped and described"),
        ({"compare": [["1/1", "flaot"]]}, r"compare: no cell 'flaot': did you mean 'float'"),
        ({"compare": [["1/1", "1/1"]]}, r"compare: '1/1' with itself"),
        ({"published": {"dataset": "x", "source": "y", "values": {"9/9": 1}}}, r"published: no cell '9/9'"),
        ({"cells": {"a": {"after": "b"}}}, r"cells\.a: no cell 'b'"),
        ({"cells": {"a": {"after": "b"}, "b": {"teacher": "a"}}}, r"cells start from each other: a -> b -> a"),
        ({"cells": {"a": {"after": "a"}}}, r"cells start from each other: a -> a"),
        (
            {"cells": {"a": {"after": "float", "set": {"train.start_from": "x"}}, "float": {}}},
            r"cells\.a\.set: 'train\.start_from' is filled in with the run of 'float'",
        ),
        ({"cells": {"1-1": {}}}, r"cells '1/1' and '1-1' would share their files"),
        ({"cells": {"../x": {}}}, r"cells\.\.\./x"),
        ({"axes": {}, "cells": {}, "skip": []}, r"has no cells"),
        ({"recipe": "no.yaml"}, r"recipe: .*no\.yaml: can't read this recipe"),
        ({"recipe": 3}, r"recipe: is a recipe written out, or the path of one"),
        ({"seeds": 0}, r"seeds: .*greater than or equal to 1"),
        ({"tune": {"tries": []}}, r"tune: tries is a list"),
        ({"tune": {"tries": {"float": [{}]}}}, r"tune\.tries: 1 for 'float', 0 for '1/1': each cell gets the same"),
        ({"tune": {"tries": {"x": [{}]}, "equal": False}}, r"tune\.tries: no cell 'x'"),
        ({"tune": {"tries": [{}], "seed": 1}}, r"tune\.seed: 1 is one of the table's seeds 0 to 1"),
        ({"tune": {"tries": [{"train.final": True}]}}, r"1/1 try 1 has train\.final: true"),
        ({"tune": {"tries": [{"train.lrr": 1}]}}, r"unknown key 'train\.lrr'"),
    ],
)
def test_a_wrong_table_is_one_clear_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=message) as error:
        load(tmp_path, GRID, **changes)
    assert str(error.value).startswith(str(tmp_path / "tiny.yaml"))
    assert "\n" not in str(error.value)


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="can't read this table"):
        load_table(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(TableError, match="key 'a' is written twice"):
        load_table(tmp_path / "a.yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", **RECIPE}))
    with pytest.raises(TableError, match="is a recipe, not a table"):
        load_table(tmp_path / "r.yaml")
    with pytest.raises(TableError, match="did you mean 'fast'"):
        load(tmp_path, PAIR).cells(1, ["fsat"])
    with pytest.raises(TableError, match="--set 'seed=1': is filled in by the table"):
        load(tmp_path, PAIR, "seed=1")
    for text, where in (
        ("train.start_from=x", "train.start_from of cell 'tuned'"),
        ("train={epochs: 1}", "train.start_from of cell 'tuned'"),
        ("train.distill.teacher=x", "train.distill.teacher of cell 'taught'"),
    ):
        with pytest.raises(TableError, match=rf"--set '{text}': \S+ fills in {where} with its run of 'float'; another"):
            load(tmp_path, CHAIN, text)


def test_the_grid(tmp_path: Path) -> None:
    table = load(tmp_path, GRID)
    assert table.labels == ("1/1", "1/32", "2/32", "float")
    found = {cell.key: cell for cell in table.cells()}
    assert list(found) == [(label, f"seed{seed}") for label in table.labels for seed in (0, 1)]
    # the table's recipe, then set, the axes, the cell's own, the command line's
    assert {k[0]: c.recipe.train.lr for k, c in found.items()} == {"1/1": 0.1, "1/32": 0.3, "2/32": 0.2, "float": 0.1}
    assert all(c.recipe.train.lr == 7 for c in load(tmp_path, GRID, "train.lr=7").cells())
    cell = found["2/32", "seed1"]
    assert (cell.recipe.seed, cell.recipe.name, cell.file) == (1, "tiny-2-32-seed1", "2-32-seed1.json")
    assert (cell.recipe.quantize.weight_bits, cell.recipe.quantize.activation_bits) == (2, 32)
    assert [c.title for c in table.cells(1, ["float"])] == ["float seed 0"]
    assert table.comparisons == [(label, "1/1") for label in table.labels[1:]]


def test_a_recipe_beside_the_table(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"name": "base", **RECIPE}))
    (tmp_path / "tables").mkdir()
    assert load(tmp_path / "tables", PAIR, recipe="../base.yaml").cells() == [
        Cell(c.label, c.run, c.recipe, c.hash) for c in load(tmp_path, PAIR).cells()
    ]


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    table = load(
        tmp_path, PAIR, axes={"bits": {1: {"quantize.weight_bits": 1}, 2: {"quantize.weight_bits": 2}}}, cells={}
    )
    assert table.labels == ("1", "2")


# ------------------------------------------------------------------------------------------ what is the same cell


def test_a_cell_may_have_seeds_of_its_own(tmp_path):
    cells = {**PAIR["cells"], "slow": {**PAIR["cells"]["slow"], "seeds": 3}}
    table = load(tmp_path, {**PAIR, "cells": cells})
    assert [cell.run for cell in table.cells() if cell.label == "slow"] == ["seed0", "seed1", "seed2"]
    assert {cell.run for cell in table.cells() if cell.label != "slow"} == {"seed0", "seed1"}
    assert {cell.run for cell in table.cells(1)} == {"seed0"}


def test_the_hash_is_of_what_matters(tmp_path: Path) -> None:
    def of(tree: dict[str, Any], label: str, *overrides: str, **changes: Any) -> str:
        return load(tmp_path, tree, *overrides, **changes).cells(1, [label])[0].hash

    one = of(PAIR, "slow")
    assert re.fullmatch("[0-9a-f]{64}", one)
    turned = {**RECIPE, "train": dict(reversed(RECIPE["train"].items()))}
    same = (
        of(PAIR, "slow", recipe=dict(reversed(turned.items()))),
        of(PAIR, "slow", "data.root=elsewhere"),
        of(PAIR, "slow", "train.device=auto"),
        of(PAIR, "slow", title="other", recipe={**RECIPE, "description": "other"}),
        of(PAIR, "slow", "train.epochs=2"),
    )
    assert set(same) == {one}
    other = [of(PAIR, "slow", text) for text in ("train.epochs=3", "model.width=8", "data.size=9", "schedule.growth=9")]
    seeds = [cell.hash for cell in load(tmp_path, PAIR).cells(3, ["slow"])]
    assert len({*other, *seeds, of(PAIR, "fast")}) == 8
    # of what it starts from, too: the same recipe, another baseline
    tuned = of(CHAIN, "tuned")
    assert tuned != of(CHAIN, "tuned", cells={**CHAIN["cells"], "float": {"set": {"quantize.method": "sign"}}})
    assert tuned == of(CHAIN, "tuned", "data.root=elsewhere")


def test_a_field_that_came_later_makes_no_result_old(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, CHAIN)
    go(table, places)
    float_, tuned = table.cells(1, ["float"])[0], table.cells(1, ["tuned"])[0]
    for cell in (float_, tuned):  # as before label_smoothing: another hash, no such key
        path = places.result(cell)
        tree = json.loads(path.read_text())
        tree["hash"] = f"{cell.label}'s former hash"
        for need in tree["needs"].values():
            need["hash"] = "float's former hash"
        del tree["recipe"]["train"]["label_smoothing"]
        path.write_text(json.dumps(tree))
    assert {s.action for s in cells.plan(table.cells(), places)} == {Action.done}
    tree["recipe"]["train"]["label_smoothing"] = 0.1
    path.write_text(json.dumps(tree))
    steps = {s.cell.label: s for s in cells.plan(table.cells(), places)}
    assert steps["tuned"].action == Action.refused
    assert "differs in train.label_smoothing" in steps["tuned"].why
    tree["recipe"]["train"]["a_key_that_went"] = 1
    path.write_text(json.dumps(tree))
    assert "a_key_that_went" in cells.plan([tuned], places)[0].why


def test_stored_recipes_read_back(tmp_path: Path) -> None:
    for cell in (*load(tmp_path, GRID).cells(), *load(tmp_path, CHAIN).cells()):
        stored = stored_recipe(cell.recipe)
        assert "root" not in stored["data"]
        again = parse_recipe(json.loads(json.dumps(stored)))
        assert hash_recipe(again) == hash_recipe(cell.recipe)


# ------------------------------------------------------------------------------------------ the runner


def test_each_cell_once(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR)
    executor, failures = go(table, places)
    assert not failures
    assert sorted(titles(executor)) == ["fast seed0", "fast seed1", "slow seed0", "slow seed1"]
    assert all(job.test and not job.resume for job in executor.jobs)
    found = cells.read_results(table.cells(), places)
    for cell in table.cells():
        tree = found[cell.key]
        assert tree["results"]["test"] == {"accuracy": accuracy(cell.recipe), "loss": 1.0, "images": 10}
        assert (tree["hash"], tree["seed"], tree["label"]) == (cell.hash, cell.recipe.seed, cell.label)
        assert tree["code"]["lowbit"]
        assert tree["machine"]["processor"] == "some CPU"
        assert tree["date"]
        assert tree["seconds"] == 90
        assert tree["curve"]["val_accuracy"] == [0.5, 0.5]
        assert tree["curve"]["val_accuracy_epochs"] == [1, 2]
        assert str(tmp_path) not in places.result(cell).read_text()
    assert not [p for p in places.results.iterdir() if p.name.startswith(".")]
    assert go(table, places)[0].jobs == []
    places.result(table.cells()[0]).unlink()  # trained, not collected
    before = places.runs / "slow" / "seed0" / "run.json"
    stamp = before.stat().st_mtime_ns
    executor, failures = go(table, places)
    assert (executor.jobs, failures, before.stat().st_mtime_ns) == ([], [], stamp)
    assert len(results(table, places)) == 4


def test_another_recipe_is_refused_and_refreshed(tmp_path: Path, places: Places) -> None:
    go(load(tmp_path, PAIR), places)
    changed = load(tmp_path, PAIR, cells={**PAIR["cells"], "fast": {"set": {"train.lr": 0.5}}})
    with pytest.raises(
        RunError,
        match=r"fast seed 0: .*fast-seed0\.json was made with another recipe \(differs in train\.lr\) \(and 1 more\); --refresh",
    ):
        go(changed, places)
    assert set(results(changed, places)) == {"slow seed0", "slow seed1"}, "old results are not shown"
    executor, failures = go(changed, places, refresh=True)
    assert sorted(titles(executor)) == ["fast seed0", "fast seed1"]
    assert not failures
    assert [recipe.train.lr for recipe in executor.recipes] == [0.5, 0.5]
    assert results(changed, places)["fast seed0"] == accuracy(changed.cells(1, ["fast"])[0].recipe)
    # the run directory alone
    for path in places.results.iterdir():
        path.unlink()
    with pytest.raises(RunError, match=r"was started from another recipe \(differs in train\.lr\)"):
        go(load(tmp_path, PAIR), places)
    with pytest.raises(
        RunError, match=r"a run of another table, .* \(differs in train\.lr\): give each table its own --out"
    ):
        go(load(tmp_path, PAIR, name="other"), places)


def test_a_cell_that_another_table_trained_in_the_same_folder(tmp_path: Path, places: Places) -> None:
    go(load(tmp_path, PAIR), places)
    other = Places(places.runs, places.results.with_name("other"))
    executor, failures = go(load(tmp_path, PAIR, name="other"), other)
    assert (executor.recipes, failures) == ([], []), "the same recipes"
    assert {json.loads(path.read_text())["table"] for path in other.results.iterdir()} == {"other"}


def test_a_failed_cell_loses_itself_and_what_starts_from_it(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR)
    executor, failures = go(table, places, MadeUp(2))
    assert [(f.cell.title, f.error) for f in failures] == [("slow seed 0", "it broke")]
    assert failures[0].log is not None
    assert failures[0].log.is_file()
    assert len(executor.jobs) == 4
    assert len(results(table, places)) == 3
    executor, failures = go(table, places)  # goes on with the half of a run
    assert [job.resume for job in executor.jobs] == [True]
    assert len(results(table, places)) == 4

    chain, places = load(tmp_path, CHAIN), places.below("chain")
    executor, failures = go(chain, places, MadeUp(2))
    assert titles(executor) == ["float seed0"]
    assert {f.cell.label: f.error for f in failures} == {
        "float": "it broke",
        "tuned": "not run: float seed 0, which it starts from, has no result",
        "taught": "not run: float seed 0, which it starts from, has no result",
    }


def test_a_run_that_passed_over_pictures_is_whole(tmp_path: Path, places: Places) -> None:
    """Of super-resolution it ends with 1. Any other run that does has failed."""

    class PassedOver(MadeUp):
        def make(self, job: Job, recipe: Any, status: int) -> None:
            super().make(job, recipe, status - 1)
            task = "superres" if recipe.train.lr == 0.1 else "classify"  # fast, slow
            run = read_run(job.run_dir) | {"task": task, "broken_images": ["cut.png"]}
            write_json(job.run_dir / "run.json", run)

    table = load(tmp_path, PAIR, seeds=1)
    _, failures = go(table, places, PassedOver(1, 1))
    assert [f.error for f in failures] == ["exit status 1"]
    assert list(results(table, places)) == ["fast seed0"]
    (result,) = cells.read_results(table.cells(), places).values()
    assert result["warnings"] == ["1 of the images can't be read and were passed over (data.broken: skip)"]


@pytest.mark.parametrize("status", [-9, 137])  # 137: one of a cell's several processes was killed
def test_a_killed_worker_goes_on_once(status: int, tmp_path: Path, places: Places) -> None:
    table, events = load(tmp_path, PAIR, seeds=1), []
    executor, failures = go(
        table, places, MadeUp(status, slots=1), on_event=lambda e: events.append((e.kind, e.cell.label))
    )
    assert titles(executor) == ["slow seed0", "slow seed0", "fast seed0"]
    assert [job.resume for job in executor.jobs] == [False, True, False]
    assert ("retry", "slow") in events
    assert not failures
    places = places.below("again")
    executor, failures = go(table, places, MadeUp(status, status, slots=1))
    assert [f.error for f in failures] == ["its worker was killed twice (SIGKILL)"]
    assert titles(executor) == ["slow seed0", "slow seed0", "fast seed0"]


def test_a_worker_killed_before_its_first_word(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR, seeds=1)
    slow = places.run_dir(table.cells(1, ["slow"])[0])
    (slow / "checkpoints").mkdir(parents=True)
    (slow / "recipe.yaml").write_text("")
    (slow / "model.lowbit").write_text("half removed, by an --overwrite that was killed")
    with RunLock(slow) as held:
        held.take()
        _, failures = go(table, places, cells=table.cells(1, ["slow"]))
        assert [f.error.partition("; ")[0] for f in failures] == [
            f"{slow}: is in use by {(slow / 'run.lock').read_text().strip()}"
        ]
        assert (slow / "recipe.yaml").is_file()
    assert (slow / "run.lock").is_file(), "as a start that was killed leaves it"
    (places.run_dir(table.cells(1, ["fast"])[0])).mkdir(parents=True)
    (places.run_dir(table.cells(1, ["fast"])[0]) / "notes.txt").write_text("mine")
    executor, failures = go(table, places)
    assert titles(executor) == ["slow seed0"]
    assert not (slow / "model.lowbit").exists()
    assert [f.cell.label for f in failures] == ["fast"]
    assert "not a run directory; it is not overwritten" in failures[0].error
    assert (places.run_dir(failures[0].cell) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_stops_the_workers(number: signal.Signals, tmp_path: Path, places: Places) -> None:
    def interrupt(event: compare.Event) -> None:
        if event.kind == "finish":
            signal.raise_signal(number)

    table, executor = load(tmp_path, PAIR), MadeUp()
    with pytest.raises(KeyboardInterrupt):
        go(table, places, executor, on_event=interrupt)
    assert executor.stopped == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    executor, failures = go(table, places)
    assert not failures
    assert len(results(table, places)) == 4
    assert 1 <= len(executor.jobs) <= 3


def test_cells_that_start_from_others(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, CHAIN)
    executor, failures = go(table, places, MadeUp(slots=1))
    assert not failures
    assert titles(executor)[0] == "float seed0"
    assert len(executor.jobs) == 3
    by_name = {recipe.name: recipe for recipe in executor.recipes}
    baseline = str(places.runs / "float" / "seed0")
    assert by_name["chain-tuned-seed0"].train.start_from == baseline
    assert by_name["chain-taught-seed0"].train.distill.teacher == baseline
    tree = json.loads(places.result(table.cells(1, ["tuned"])[0]).read_text())
    assert tree["needs"]["train.start_from"]["hash"] == table.cells(1, ["float"])[0].hash
    assert tree["recipe"]["train"]["start_from"] == "run of float"


def test_on_a_clean_checkout_the_start_is_trained_again(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, CHAIN)
    go(table, places)
    float_, tuned = table.cells(1, ["float"])[0], table.cells(1, ["tuned"])[0]
    places.result(tuned).unlink()
    committed = places.result(float_).read_bytes()
    elsewhere = Places(tmp_path / "other runs", places.results)
    assert [(s.cell.label, s.action, s.for_run) for s in cells.plan(table.cells(), elsewhere)] == [
        ("float", Action.run, True),
        ("tuned", Action.run, False),
        ("taught", Action.done, False),
    ]
    executor, failures = go(table, elsewhere, MadeUp(slots=1), cells=[tuned])
    assert titles(executor) == ["float seed0", "tuned seed0"]
    assert not failures
    assert places.result(float_).read_bytes() == committed


def test_without_a_test_and_then_with(tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load(tmp_path, PAIR, seeds=1)
    executor, _ = go(table, places, test=False)
    assert not any(job.test for job in executor.jobs)
    assert all(r["results"]["test"] is None for r in cells.read_results(table.cells(), places).values())
    asked = []

    def evaluated(run_dir: Path, split: str) -> dict[str, Any]:
        asked.append((run_dir.parent.name, split))
        return {"accuracy": 0.5, "loss": 1.0, "images": 10, "confusion": [[1]], "computed_by": "x"}

    monkeypatch.setattr(compare, "evaluate_run", evaluated)
    executor, failures = go(table, places)
    assert (executor.jobs, failures) == ([], [])
    assert sorted(asked) == [("fast", "test"), ("slow", "test")]
    assert set(results(table, places).values()) == {0.5}
    go(table, places)
    assert len(asked) == 2, "the test images are read once"


def test_two_processes_share_a_table(tmp_path: Path, places: Places) -> None:
    table, outcomes, waits = load(tmp_path, PAIR, seeds=3), [], []
    both = [MadeUp(seconds=0.2), MadeUp(seconds=0.2)]

    def work(executor: MadeUp) -> None:
        watch = lambda e: waits.append(e.kind) if e.kind == "wait" else None  # noqa: E731
        outcomes.append(go(table, places, executor, on_event=watch)[1])

    threads = [threading.Thread(target=work, args=(executor,)) for executor in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [[], []]
    assert sorted(titles(both[0]) + titles(both[1])) == sorted(f"{c.label} {c.run}" for c in table.cells()), "each once"
    assert waits
    assert len(results(table, places)) == 6


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    one = lock(tmp_path / "below" / ".lock")
    assert one is not None
    assert lock(tmp_path / "below" / ".lock") is None
    os.close(one)
    two = lock(tmp_path / "below" / ".lock")
    assert two is not None
    os.close(two)


def test_damaged_results_are_named(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR)
    places.results.mkdir()
    for text in ("{", "[]", '{"format": 99}'):
        places.result(table.cells()[0]).write_text(text)
        with pytest.raises(RunError, match=r"slow-seed0\.json: .*delete it"):
            cells.plan(table.cells(), places)


def test_jobs_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.train import workers

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert workers.default_jobs() == 2
    assert workers.default_jobs("cpu") == 6
    executor = LocalExecutor(3)
    assert [executor._free.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["5", "7", "5"]
    assert executor._threads == {"OMP_NUM_THREADS": "2"}
    executor = LocalExecutor(devices=2)
    assert executor.slots == 1
    assert executor._free.get()["CUDA_VISIBLE_DEVICES"] == "5,7"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    executor = LocalExecutor()
    assert executor.slots == 6
    assert executor._threads == {"OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------ real workers


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


def test_real_workers_in_parallel_one_killed_one_failing(images: Path, tmp_path: Path, places: Places) -> None:
    """Equal, to the last digit, to the same recipes trained here one after the other."""
    broken = {"set": {"model.name": "bireal_resnet14", "train.batch_size": 5000}}
    tree = {**PAIR, "cells": {**PAIR["cells"], "broken": broken}, "seeds": 1}
    table = load(tmp_path, tree, f"data.root={images}", "train.epochs=3")
    executor, events = LocalExecutor(2, "cpu"), []

    def watch(event: compare.Event) -> None:
        events.append((event.kind, event.cell.label))
        if events.count(("start", "slow")) == 1 and (event.kind, event.cell.label) == ("start", "slow"):
            threading.Thread(target=kill, args=(places.run_dir(event.cell),)).start()

    def kill(run_dir: Path) -> None:
        while not (run_dir / "run.json").is_file():
            time.sleep(0.002)
        for process in list(executor._running):
            if str(run_dir) in process.args:  # type: ignore[operator]
                process.kill()

    _, failures = go(table, places, executor, on_event=watch)
    assert events.count(("retry", "slow")) == 1
    assert [f.cell.label for f in failures] == ["broken"]
    assert "batch_size" in failures[0].error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for cell in table.cells(1, ["slow", "fast"]):
            here = train(cell.recipe, tmp_path / "here" / cell.label, test=True).results
            found = cells.read_results([cell], places)[cell.key]["results"]
            for split in ("validation", "test"):
                assert found[split]["accuracy"] == here[split]["accuracy"]
                assert found[split]["loss"] == here[split]["loss"]
    finally:
        torch.set_num_threads(threads)


class Sleeper(Job):
    """A worker without training."""

    def command(self) -> list[str]:
        ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN); " if self.resume else ""
        return ["-c", f"import signal, time; {ignore}print('there', flush=True); time.sleep(60)"]


def test_workers_are_stopped_and_keep_their_lock(tmp_path: Path) -> None:
    executor = LocalExecutor(2, "cpu")
    descriptors = [lock(tmp_path / f".{i}") for i in range(2)]
    jobs = [
        Sleeper(tmp_path, tmp_path, tmp_path / f"{i}.log", bool(i), False, d or 0) for i, d in enumerate(descriptors)
    ]
    futures = [executor.submit(job) for job in jobs]
    while not all(job.log.is_file() and job.log.read_text() for job in jobs):
        time.sleep(0.02)
    for descriptor in descriptors:
        os.close(descriptor or 0)
    assert lock(tmp_path / ".0") is None, "the worker holds it, whatever becomes of its parent"
    executor.stop(patience=0.5)
    assert [future.result() for future in futures] == [-signal.SIGINT, -signal.SIGKILL]
    assert lock(tmp_path / ".0") is not None
    assert not executor._running


def test_data_is_looked_for_first(images: Path, tmp_path: Path, places: Places) -> None:
    def check(*overrides: str, test: bool = True) -> None:
        table = load(tmp_path, PAIR, *overrides)
        known = cells.read_results(table.cells(), places)
        cells.check_data(cells.plan(table.cells(), places, test=test), test, known, places)

    check(f"data.root={images}")
    with pytest.raises(ValueError, match="no such folder"):
        check()
    with pytest.raises(TableError, match="image_folder has no test images here; use --no-test"):
        check(f"data.root={images / 'train'}")
    check(f"data.root={images / 'train'}", test=False)
    with pytest.raises(TableError, match=r"without a test nothing is measured"):
        check(f"data.root={images}", "train.final=true", test=False)
    # one cell is done, with these images or with others
    table = load(tmp_path, PAIR, f"data.root={images}")
    (done, *_) = table.cells()
    go(table, places, cells=[done])
    path = places.result(done)
    tree = json.loads(path.read_text())
    check(f"data.root={images}")  # the result doesn't tell
    own = fingerprint(load_data(done.recipe))
    write_json(path, {**tree, "data": own})
    check(f"data.root={images}")
    write_json(path, {**tree, "data": {**own, "held_out": 17}})
    with pytest.raises(
        RunError, match=r"slow-seed0\.json was trained on other data \(held_out: 17 there, 16 here\); give"
    ):
        check(f"data.root={images}")
    check(f"data.root={images}", "data.size=9")  # another cell, then


# ------------------------------------------------------------------------------------------ the same images


def test_a_fingerprint_tells_images_from_others(images: Path, tmp_path: Path) -> None:
    def of(name: str, root: Path, **arguments: Any) -> dict[str, Any]:
        return fingerprint(DATASETS.get(name)(root=root, **arguments))

    copy = tmp_path / "elsewhere"
    shutil.copytree(images, copy)
    (copy / "test").rename(copy / "val")
    shards = [tmp_path / name for name in ("shards", "shards again")]
    for folder in shards:
        write_shards(copy, folder, samples=25)
    small: dict[str, Any] = {"size": 8, "resize": 8, "validation_images": 8}
    sets = {
        "image_folder": (copy / "train", {"size": 8, "channels": 1}),
        "imagenet_folder": (copy, small),
        "imagenet_shards": (shards[1], small),
    }
    before = {name: of(name, root, **arguments) for name, (root, arguments) in sets.items()}
    assert before["image_folder"] == of("image_folder", images / "train", size=8, channels=1), "wherever it lies"
    assert before["imagenet_shards"] == of("imagenet_shards", shards[0], **small)
    assert (before["imagenet_folder"]["train"], before["imagenet_folder"]["held_out"]) == (72, 8)
    assert before["imagenet_folder"] == json.loads(json.dumps(before["imagenet_folder"]))

    def differ(name: str) -> list[str]:
        now = of(name, sets[name][0], **sets[name][1])
        return [key for key in now if now[key] != before[name][key]]

    (copy / "train" / "dark" / "0.png").rename(copy / "train" / "dark" / "first.png")
    assert differ("imagenet_folder") == ["sha256"]
    assert differ("image_folder")[-1] == "sha256", "others may be held out, with another deviation"
    (copy / "train" / "dark" / "first.png").rename(copy / "train" / "light" / "0a.png")
    assert "sha256" in differ("imagenet_folder"), "the same number of images"
    (copy / "train" / "light" / "0a.png").rename(copy / "train" / "dark" / "0.png")
    for path in (copy / "train" / "light").iterdir():
        Image.fromarray(np.full((8, 8), 200, np.uint8)).save(path)
    assert differ("image_folder") == ["zero_point", "scale"]
    (copy / "train" / "dark").rename(copy / "train" / "black")
    assert "sha256" in differ("image_folder")
    shutil.rmtree(shards[1])
    (copy / "train" / "black" / "0.png").unlink()
    shutil.rmtree(copy / "val")
    write_shards(copy, shards[1], samples=25)
    assert {"train", "sha256"} <= {*differ("imagenet_shards")}


def test_a_fingerprint_of_arrays() -> None:
    def of(x: torch.Tensor, y: torch.Tensor, classes: tuple[str, ...] = ("a", "b")) -> dict[str, Any]:
        data = ImageData("mine", classes, (1, 2, 2), (3,), 1 / 7, lambda: (x, y), lambda: exit(9), validation=5)
        return fingerprint(data)

    x, y = torch.arange(80, dtype=torch.uint8).reshape(20, 1, 2, 2), torch.arange(20) % 2
    one = of(x, y)
    assert {key: value for key, value in one.items() if key != "sha256"} == {
        "train": 15,
        "held_out": 5,
        "classes": 2,
        "zero_point": [3],
        "scale": 0.142857,
    }
    assert one == of(x.clone(), y.clone())
    assert len({f["sha256"] for f in (one, of(x, 1 - y), of(x + 1, y), of(x, y, ("b", "a")))}) == 4


def test_results_of_two_data_sets_make_no_table(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR, tune=TUNE)
    for part, own in ((places, table.cells()), (places.below("tune"), table.tries())):
        go(table, part, cells=own, test=part is places)
        for cell, train_images in zip(own, (60, 60, 61, 60), strict=True):
            path = part.result(cell)
            data = {} if cell is own[0] else {"data": {"train": train_images, "sha256": "a"}}
            write_json(path, {**json.loads(path.read_text()), **data})
    with pytest.raises(
        RunError,
        match=r"fast-seed0\.json, unlike slow-seed1\.json, was trained on other data \(train: 61 there, 60 here\)",
    ):
        aggregate.aggregate(table, places)
    with pytest.raises(RunError, match=r"fast-try1\.json, unlike slow-try2\.json, was trained on other data"):
        compare.best_tries(table, table.tries(), places.below("tune"))
    path = places.result(table.cells()[2])
    write_json(path, {**json.loads(path.read_text()), "data": {"train": 60, "sha256": "a"}})
    assert aggregate.aggregate(table, places)["cells"][1]["n"] == 2


class Here:
    """An executor that trains in this process; ``stops`` says after how many epochs each job in turn breaks off."""

    slots = 1

    def __init__(self, *stops: int) -> None:
        self.stops, self.jobs = list(stops), []

    def submit(self, job: Job) -> Future[int]:
        self.jobs.append(job)
        future: Future[int] = Future()
        try:
            stop = [Stop(self.stops.pop(0))] if self.stops else []
            train(load_recipe(job.recipe), job.run_dir, resume=job.resume, test=job.test, callbacks=stop)
            future.set_result(0)
        except (RunError, InterruptedError) as error:
            with job.log.open("a") as log:
                log.write(f"error: {error}\n")
            future.set_result(1)
        return future

    def stop(self) -> None:
        raise AssertionError


class Stop(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epochs:
            raise InterruptedError(f"after {self.epochs} epochs")


def test_a_resume_may_move_but_not_change_its_data(
    images: Path, tmp_path: Path, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root, the number of processes that load it, the device: the new ones are taken. Every session tells with what."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(images, here)
    table = load(tmp_path, PAIR, f"data.root={here}", seeds=1)
    (cell, _) = table.cells()
    _, failures = go(table, places, Here(1), cells=[cell])
    assert [failure.error for failure in failures] == ["after 1 epochs"]
    run_dir = places.run_dir(cell)
    started = read_run(run_dir)
    assert started["sessions"] == sessions(started)
    assert len(started["sessions"]) == 1
    assert {key: started[key] for key in ("code", "versions", "machine")} == {
        key: value for key, value in started["sessions"][0].items() if key != "started"
    }

    here.rename(there)
    new = there / "train" / "dark" / "99.png"
    shutil.copy(there / "train" / "dark" / "0.png", new)
    (cell, _) = (moved := load(tmp_path, PAIR, f"data.root={there}", "train.workers=2", "train.device=auto")).cells(1)
    _, failures = go(moved, places, Here(), cells=[cell])
    assert [failure.error for failure in failures] == [
        f"{run_dir}: was trained on other data (train: 64 there, 65 here); give it that again (data.root), or remove the "
        "run directory and train anew"
    ]
    assert read_run(run_dir) == started
    new.unlink()
    monkeypatch.setattr("lowbit.train.rundir.source_digest", lambda: "later code")
    executor, failures = go(moved, places, Here(), cells=[cell])
    assert not failures
    (job,) = executor.jobs
    assert job.command()[2:5] == ["train", str(places.beside(cell, ".yaml")), "--resume"]
    recipe = load_recipe(run_dir / "recipe.yaml")
    assert (recipe.data.root, recipe.train.workers, recipe.train.device) == (str(there), 2, "auto")

    result = cells.read_result(places.result(cell))
    assert result is not None
    assert result["data"] == started["data"] == fingerprint(load_data(recipe))
    assert [each["code"]["source"] == "later code" for each in result["sessions"]] == [False, True]
    assert [each["started"] for each in result["sessions"]] == [s["started"] for s in read_run(run_dir)["sessions"]]
    assert result["code"]["source"] == "later code"
    assert "code" in compare._other_conditions(result, result), "two sessions are no one condition"
    again = {key: value for key, value in result.items() if key != "sessions"}
    assert compare._other_conditions(again, again) == (
        [] if result["machine"]["device"] == "cpu" else ["order of sums on a GPU"]
    )
    assert compare._other_conditions(again, {**again, "data": {**again["data"], "train": 1}})[0] == "data"
    assert len(aggregate.aggregate(moved, places)["code"]) == 1, "as a reader sees it: version and commit"


def test_a_run_that_an_earlier_version_began(tmp_path: Path, places: Places) -> None:
    """Its run.json has no sessions, no code and no data; what began it stands in the file beside it."""
    table = load(tmp_path, PAIR, seeds=1)
    (cell, _) = table.cells()
    go(table, places, MadeUp(2), cells=[cell])
    path, head = places.run_dir(cell) / "run.json", places.beside(cell, ".json")
    before = {"lowbit": "0", "source": "before", "commit": None, "dirty": None}
    write_json(
        path, {k: v for k, v in json.loads(path.read_text()).items() if k not in ("sessions", "code", "started")}
    )
    write_json(head, {**json.loads(head.read_text()), "code": before})
    _, failures = go(table, places, cells=[cell])
    assert not failures
    result = json.loads(places.result(cell).read_text())
    assert [each["code"] for each in result["sessions"]] == [before, SESSION["code"]]
    assert result["code"] == SESSION["code"]
    assert "data" not in result
    assert aggregate.aggregate(table, places)["code"] == ["lowbit 0", "lowbit 1, commit c"]


# ------------------------------------------------------------------------------------------ statistics


def test_summary() -> None:
    found = summary([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (found.n, found.mean) == (8, 5.0)
    assert found.sd == pytest.approx(math.sqrt(32 / 7))
    assert summary([3.0]) == summary([3.0])
    assert summary([3.0]).sd is None
    with pytest.raises(ValueError, match="no values"):
        summary([])


def test_differences_are_paired_by_seed() -> None:
    one = {0: 1.0, 1: 12.0, 2: 103.0, 7: 5.0}
    other = {2: 100.0, 1: 10.0, 0: 0.0, 9: 5.0}
    found = paired(one, other)
    assert found is not None
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)  # 1, 2, 3: the spread between seeds drops out
    half = 4.3026527297 / math.sqrt(3)
    assert found.low == pytest.approx(2 - half)
    assert found.high == pytest.approx(2 + half)
    assert not found.resolved
    assert paired({0: 2.0, 1: 2.1, 2: 2.05}, {0: 1.0, 1: 1.0, 2: 1.0}).resolved  # type: ignore[union-attr]
    alone = paired({0: 2.0}, {0: 1.0})
    assert alone is not None
    assert (alone.mean, alone.sd, alone.low, alone.resolved) == (1.0, None, None, False)
    assert paired({0: 1.0}, {1: 1.0}) is None


# ------------------------------------------------------------------------------------------ the table of results


class Text(HTMLParser):
    """A page's words, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(" ".join(data.split()))


def store(table: Table, places: Places, values: dict[str, list[float]]) -> None:
    """Results with these test accuracies."""
    go(table, places)
    for cell in table.cells():
        path = places.result(cell)
        tree = json.loads(path.read_text())
        if cell.recipe.seed >= len(values[cell.label]):
            path.unlink()
            continue
        tree["results"]["test"]["accuracy"] = values[cell.label][cell.recipe.seed]
        path.write_text(json.dumps(tree))


PUBLISHED = {
    "dataset": "image_folder",
    "source": "A & B, Table 1",
    "values": {"slow": 92, "fast": 93.4},
    "runs": {"fast": 93},
}


def test_the_table_of_results(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR, seeds=3, title="A <table>", published=PUBLISHED)
    store(table, places, {"slow": [0.90, 0.91, 0.92], "fast": [0.92, 0.94, 0.93]})
    tree = aggregate.aggregate(table, places)
    slow, fast = tree["cells"]
    assert (slow["n"], slow["mean"], slow["published"], slow["missing"]) == (3, pytest.approx(0.91), 92, [])
    assert slow["sd"] == pytest.approx(0.01)
    (difference,) = tree["comparisons"]
    assert (difference["one"], difference["other"], difference["n"]) == ("fast", "slow", 3)
    assert difference["mean"] == pytest.approx(0.02)
    assert difference["low"] == pytest.approx(0.02 - 4.3026527297 * 0.01 / math.sqrt(3))
    assert not difference["resolved"]

    written = aggregate.write(table, tree, tmp_path / "out")
    assert [p.name for p in written] == ["pair.json", "pair.md", "pair.html"]
    assert json.loads(written[0].read_text())["cells"][1]["mean"] == fast["mean"]
    text = written[1].read_text()
    assert "| fast | 93.00 +- 1.00 | 3 | 93.4 | 93 | 2 | 1.5 |" in text
    assert "| slow | 91.00 +- 1.00 | 3 | 92.0 |  | 2 | 1.5 |" in text
    assert "| fast less slow | +2.00 | -0.48 to +4.48 | 3 | not resolved |" in text
    assert f"lowbit compare {table.path}\n" in text
    page = Text(written[2])
    assert not page.loads
    for words in (
        "93.00 ± 1.00",
        "93.4",
        "92.0",
        "+2.00",
        "-0.48 to +4.48",
        "not resolved",
        "6 of 6",
        "92.00 94.00 93.00",
    ):
        assert words in page.words, words
    assert any("A & B, Table 1" in words for words in page.words)
    assert page.words.count("A <table>") == 1
    source = written[2].read_text()
    assert source.count("<svg") == 5
    assert "url(http" not in source
    assert 'src="http' not in source
    assert "@media (prefers-color-scheme: dark)" in source
    assert aggregate.render(table, tree) == source, "the same page twice"


def test_top5_stands_beside_the_published_one(tmp_path: Path, places: Places) -> None:
    published = {**PUBLISHED, "dataset": ["imagenet_folder", "image_folder"], "top5": {"slow": 98.7}}
    table = load(tmp_path, PAIR, published=published)
    go(table, places)
    for cell in table.cells():
        path = places.result(cell)
        tree = json.loads(path.read_text())
        tree["results"]["test"]["top5"] = 0.98 + 0.01 * cell.recipe.seed
        path.write_text(json.dumps(tree))
    header, slow, fast = aggregate.table_rows(aggregate.aggregate(table, places))
    found = [dict(zip(header, row, strict=True)) for row in (slow, fast)]
    assert [row["top-5 (%)"] for row in found] == ["98.50", "98.50"]
    assert [row["published top-5"] for row in found] == ["98.7", ""]
    assert [row["published"] for row in found] == ["92.0", "93.4"]


def test_results_that_are_not_all_there(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR, seeds=3, published={**PUBLISHED, "dataset": "cifar10"})
    tree = aggregate.aggregate(table, places)
    aggregate.write(table, tree, tmp_path)
    assert "No cell has a result yet." in (tmp_path / "pair.html").read_text()
    store(table, places, {"slow": [0.9], "fast": [0.92, 0.94]})
    tree = aggregate.aggregate(table, places)
    assert [(c["n"], c["missing"], c["published"]) for c in tree["cells"]] == [(1, [1, 2], None), (2, [2], None)]
    assert tree["comparisons"][0]["n"] == 1
    text = aggregate.markdown(tree)
    assert "published" not in text
    assert "one seed: not resolved" in text
    assert "| slow | 90.00 | 1 |" in text
    assert "slow (seeds 1, 2)" in " ".join(aggregate.render(table, tree).split())


def test_validation_is_shown_where_no_test_was_made(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR)
    go(table, places, test=False)
    tree = aggregate.aggregate(table, places)
    assert tree["split"] == "validation"
    assert "validation accuracy (%)" in aggregate.markdown(tree)
    assert "--no-test" in aggregate.markdown(tree)


# ------------------------------------------------------------------------------------------ the check


def test_check_one(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, PAIR)
    with pytest.raises(RunError, match="no cell has a result"):
        compare.draw(table.cells(), {}, 0)
    go(table, places)
    found = cells.read_results(table.cells(), places)
    drawn = {compare.draw(table.cells(), found, seed).key for seed in range(40)}
    assert len(drawn) == 4
    cell = compare.draw(table.cells(), found, 3)
    assert cell == compare.draw(table.cells(), found, 3)

    executor = MadeUp()
    done = compare.check_one("pair", cell, found, executor)
    assert titles(executor) == [f"{cell.label} {cell.run}"]
    assert done.passed
    assert done.again == done.stored
    assert done.tolerance == 0
    assert done.differs == ()
    assert not executor.jobs[0].run_dir.exists(), "nothing stays behind"
    value = found[cell.key]["results"]["test"]
    value["accuracy"] += 0.0001
    assert not compare.check_one("pair", cell, found, MadeUp()).passed, (
        "same machine, versions, code: the last digit counts"
    )
    assert compare.check_one("pair", cell, found, MadeUp(), tolerance=0.001).passed
    found[cell.key]["machine"]["processor"] = "another CPU"
    done = compare.check_one("pair", cell, found, MadeUp())
    assert done.differs == ("processor",)
    groups = {
        label: [r["results"]["test"]["accuracy"] for r in found.values() if r["label"] == label]
        for label in table.labels
    }
    variance = sum((summary(v).sd or 0) ** 2 for v in groups.values()) / 2
    assert done.tolerance == pytest.approx(3 * math.sqrt(2 * variance))
    assert done.passed
    with pytest.raises(RunError, match="it broke"):
        compare.check_one("pair", cell, found, MadeUp(2))


def test_check_one_of_cells_that_start_from_others(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, CHAIN)
    go(table, places)
    found = cells.read_results(table.cells(), places)
    assert {compare.draw(table.cells(), found, seed).label for seed in range(20)} == {"float"}
    (tuned,) = table.cells(1, ["tuned"])
    assert compare.draw([tuned], found, 0) == tuned
    executor = MadeUp(slots=1)
    compare.check_one("chain", tuned, found, executor)
    assert titles(executor) == ["float seed0", "tuned seed0"]


# ------------------------------------------------------------------------------------------ tuning


TUNE = {"set": {"train.epochs": 1}, "seed": 9, "tries": [{"train.lr": 0.3}, {"train.lr": 0.7, "train.momentum": 0.5}]}


def test_tries(tmp_path: Path, places: Places) -> None:
    table = load(tmp_path, CHAIN, tune=TUNE)
    tries = table.tries()
    assert [t.title for t in tries if t.label == "tuned"] == ["tuned try 1", "tuned try 2"]
    assert all(t.recipe.seed == 9 and t.recipe.train.epochs == 1 for t in tries)
    assert [dict(t.changes) for t in tries[:2]] == TUNE["tries"]
    executor, failures = go(table, places, MadeUp(slots=1), test=False, cells=tries)
    assert not failures
    assert not any(job.test for job in executor.jobs), "the test images choose nothing"
    assert titles(executor)[0] == "float start", "the start is trained once, with the shared changes alone"
    assert len(executor.jobs) == 7
    rows, text = compare.best_tries(table, tries, places)
    assert len(rows) == 6
    chosen = yaml.safe_load(text)["cells"]
    for label in table.labels:
        own = {
            json.dumps(dict(t.changes)): accuracy(t.resolve({k: places.run_dir(c) for k, c in t.needs.items()}))
            for t in tries
            if t.label == label
        }
        assert json.dumps(chosen[label]["set"]) == max(own, key=lambda k: own[k])
        assert sum(best for cell, _, best in rows if cell.label == label) == 1
    load(tmp_path, CHAIN, tune=TUNE, cells={k: {**v, **chosen[k]} for k, v in CHAIN["cells"].items()})
    # the table has another lr than all tries but one share: that one says so too
    shared = {**TUNE, "set": {"train.lr": 0.1}, "tries": [{"train.lr": 0.1}, {"train.lr": 0.05}]}
    again = load(tmp_path, CHAIN, tune=shared).tries(["float"])
    assert [(dict(t.changes), t.recipe.train.lr) for t in again] == [({"train.lr": lr}, lr) for lr in (0.1, 0.05)]
    with pytest.raises(TableError, match="has no section tune"):
        load(tmp_path, PAIR).tries()


def test_unequal_tries_need_a_word(tmp_path: Path) -> None:
    tries = {"slow": [{"train.lr": 0.3}], "fast": [{"train.lr": 0.3}, {"train.lr": 0.4}]}
    with pytest.raises(TableError, match="2 for 'fast', 1 for 'slow': each cell gets the same number"):
        load(tmp_path, PAIR, tune={"tries": tries})
    assert len(load(tmp_path, PAIR, tune={"tries": tries, "equal": False}).tries()) == 3


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = MadeUp()
    monkeypatch.setattr("lowbit.train.workers.LocalExecutor", lambda jobs, device, devices: made)

    def run(*arguments: object) -> tuple[int, str, str]:
        made.jobs.clear()
        monkeypatch.setattr(sys, "argv", ["lowbit", "compare", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run()
        shown = capsys.readouterr()
        return int(str(stop.value.code or 0)), shown.out, shown.err

    run.executor = made  # type: ignore[attr-defined]
    return run


def test_the_command_has_the_changes_of_every_cell(tmp_path: Path, places: Places) -> None:
    tree = aggregate.aggregate(load(tmp_path, PAIR, "train.lr=0.3", "data.root=my images"), places, 2)
    path = (tmp_path / "pair.yaml").as_posix()
    assert aggregate.command(tree) == f"lowbit compare {path} --seeds 2 --set train.lr=0.3 --set 'data.root=my images'"


def test_the_command(call: Any, images: Path, tmp_path: Path) -> None:
    table = write(tmp_path, PAIR, tune=TUNE, recipe={**RECIPE, "data": {**RECIPE["data"], "root": str(images)}})
    code, out, _ = call(table, "--dry-run")
    assert code == 0
    assert "4 cells, 4 to train" in out
    assert not call.executor.jobs
    assert not (tmp_path / "results").exists()
    code, out, err = call(table, "--only", "slow", "--seeds", 1)
    assert code == 0, err
    assert titles(call.executor) == ["slow seed0"]
    assert "slow seed 0: started" in err
    assert "slow seed 0: finished: test" in err
    code, out, _ = call(table, "--dry-run")
    assert "4 cells, 3 to train, about 2 min with 2 at once" in out
    code, out, err = call(table)
    assert code == 0
    assert len(call.executor.jobs) == 3
    assert {p.name for p in (tmp_path / "results").iterdir()} == {"pair", "pair.json", "pair.md", "pair.html"}
    assert (tmp_path / "runs/pair/slow/seed0/run.json").is_file()
    assert "fast less slow" in out
    # a clean checkout: results alone; one is trained
    (tmp_path / "results/pair/fast-seed1.json").unlink()
    code, out, err = call(table, "--check-one", "--check-seed", 5, "--out", tmp_path / "clean")
    assert code == 0, err
    assert len(call.executor.jobs) == 1
    assert "--check-seed 5" in err
    assert "passed" in out
    cell = next(
        p for p in (tmp_path / "results/pair").iterdir() if titles(call.executor)[0].replace(" ", "-") == p.stem
    )
    tree = json.loads(cell.read_text())
    tree["results"]["test"]["accuracy"] -= 0.9
    cell.write_text(json.dumps(tree))
    code, out, _ = call(table, "--check-one", "--check-seed", 5, "--tolerance", 50)
    assert code == 1
    assert "FAILED" in out
    assert call(table, "--check-one", "--check-seed", 5, "--tolerance", 95)[0] == 0
    code, out, _ = call(table, "--tune")
    assert code == 0
    assert len(call.executor.jobs) == 4
    assert "cells:" in out
    assert (tmp_path / "results/pair/tune/slow-try1.json").is_file()
    for arguments, message in [
        (["nothing.yaml"], "can't read this table"),
        ([table, "--only", "no"], "no cell 'no'"),
        ([table, "--set", "train.epoch=1"], "did you mean 'epochs'"),
        ([table, "--set", "train.epochs=9"], "--refresh runs it again"),
        ([table, "--tune", "--check-one"], "--tune goes without"),
    ]:
        code, _, err = call(*arguments)
        assert code == 2, (arguments, err)
        assert message in " ".join(err.replace("│", " ").split())
    call.executor.statuses[:] = [2]
    code, out, err = call(table, "--cells", tmp_path / "new", "--out", tmp_path / "new runs")
    assert code == 1
    assert "failed: slow seed 0: it broke" in err
    assert "seed0.log" in err
    assert "fast" in out, "the others are shown"


# ------------------------------------------------------------------------------------------ schedule.speed


def test_speed_multiplies_the_temperature_in_every_epoch(images: Path, tmp_path: Path) -> None:
    data = {**RECIPE["data"], "root": str(images)}
    schedule = {"speed": 2.0, "end": 1.0, "every": "epoch"}
    tree = {"name": "x", **RECIPE, "data": data, "train": {**RECIPE["train"], "epochs": 3}, "schedule": schedule}
    train(parse_recipe(tree), tmp_path / "run")
    assert [row["temperature"] for row in read_metrics(tmp_path / "run")] == pytest.approx([1, 2, 4])


def test_speed_in_place_of_growth() -> None:
    tree = {"name": "x", **RECIPE}
    assert parse_recipe(tree).schedule.total_growth(7) == 1000
    assert parse_recipe({**tree, "schedule": {"growth": 50}}).schedule.total_growth(7) == 50
    found = parse_recipe({**tree, "schedule": {"speed": 1.1, "start": 0.2, "end": 0.7}})
    assert found.schedule.total_growth(20) == pytest.approx(1.1**10)
    assert parse_recipe(yaml.safe_load(found.to_yaml())) == found
    with pytest.raises(RecipeError, match="schedule: give growth .* or speed .*, not both"):
        parse_recipe({**tree, "schedule": {"speed": 1.1, "growth": 100}})
