"""Results of a table's cells, and what each cell needs.

Below the table's folder of runs (big, not committed)::

    LABEL/seed0/         the run directory, as ``lowbit train`` leaves it
    LABEL/seed0.yaml     the recipe the worker got: `lowbit train LABEL/seed0.yaml --run-dir LABEL/seed0` does the same
    LABEL/seed0.json     which cell the run belongs to: the upper part of its result
    LABEL/seed0.log      what the worker said
    LABEL/.seed0.lock    held while the cell is trained, so that no second process trains it
    LABEL/.seed0.worker  held by a worker on another machine, and who that is (``lowbit.remote``)

and in the folder of results (small, committed) one ``LABEL-seed0.json`` for each cell, written at its end: ``format,
table, label, run, seed, hash, recipe, needs, changes, code, versions, machine`` (where the run was resumed, of its last
session, and ``sessions`` of each), ``data`` (its fingerprint), ``date, seconds, resumed, metric, epochs, parameters,
warnings, results`` (run.json's, without confusion) and ``curve`` (columns of metrics.csv and their epochs). A cell whose
file is there, made with the recipe the table has now, is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from lowbit.train.recipe import ELSEWHERE, RecipeError, differing_keys, parse_recipe
from lowbit.train.rundir import RunError, check_same_data, fingerprint, read_json, read_run
from lowbit.train.statistics import summary
from lowbit.train.table import Cell, TableError, slug, stored_recipe
from lowbit.train.trainer import load_data
from lowbit.train.units import show, unit

__all__ = [
    "FORMAT",
    "Action",
    "Places",
    "Step",
    "check_data",
    "check_one_data_set",
    "estimate",
    "look",
    "measured",
    "plan",
    "read_result",
    "read_results",
    "refuse",
    "show",
    "unit",
]

FORMAT: Final = 1


@dataclass(frozen=True)
class Places:
    """Folders of a table: ``runs`` (run directories) and ``results`` (one small file for each cell)."""

    runs: Path
    results: Path

    def run_dir(self, cell: Cell) -> Path:
        """Where a cell is trained."""
        return self.runs / cell.place

    def beside(self, cell: Cell, suffix: str) -> Path:
        """A file beside the run directory."""
        return self.runs / cell.place.parent / f"{cell.run}{suffix}"

    def result(self, cell: Cell) -> Path:
        """The file with a cell's result."""
        return self.results / cell.file

    @property
    def front(self) -> Path:
        """The file with the cells' times and sizes (``lowbit.train.front``)."""
        return self.results / "front.json"

    def below(self, name: str) -> Places:
        """The same, one folder deeper."""
        return Places(self.runs / name, self.results / name)


# ------------------------------------------------------------------------------------------------ what is there


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    return read_json(path, "delete it, then its cell is run again", FORMAT, ("hash", "recipe", "needs"))


def _differences(cell: Cell, head: Mapping[str, Any], places: Places) -> list[str]:
    """Keys in which the recipe a result or run was made with differs from the table's; [] where it is current.

    Fields that came to recipes since then have their defaults, so a new field makes no result old.
    """
    if head["hash"] == cell.hash:
        return []
    try:
        then = parse_recipe(head["recipe"], "recipe")
    except RecipeError as error:
        return [str(error).removeprefix("recipe: ")]
    keys = differing_keys(then, cell.recipe, ELSEWHERE)
    for key, need in cell.needs.items():
        if head["needs"].get(key, {}).get("hash") not in _hashes(need, places):
            keys.append(f"{key} (another run of {need.label})")
    return keys


def _hashes(cell: Cell, places: Places) -> set[str]:
    """A cell's hash, and those it had when its current result and run were made."""
    found = {cell.hash}
    for path in (places.result(cell), places.beside(cell, ".json")):
        head = read_result(path)
        if head is not None and not _differences(cell, head, places):
            found.add(head["hash"])
    return found


def _differs_in(keys: Sequence[str]) -> str:
    return f"differs in {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"


class Action(StrEnum):
    """What a cell needs."""

    done = "done"
    collect = "collect"
    """It is trained; its result has to be written (the test images are evaluated where that is missing)."""
    resume = "resume"
    run = "run"
    overwrite = "overwrite"
    """Run it in place of a run of another recipe."""
    refused = "refused"
    """Something is there that only ``refresh`` may replace."""


@dataclass(frozen=True)
class Step:
    """A cell of a plan.

    Attributes:
        cell: which.
        action: what it needs.
        why: for a refusal, what is there; for a resume, how far it came; for a run whose result is there, what the run is for.
        for_run: its result may be there, its run directory is needed too: another cell starts from it, or it has to be timed.
    """

    cell: Cell
    action: Action
    why: str = ""
    for_run: bool = False


def look(cell: Cell, places: Places, *, test: bool, refresh: bool, for_run: bool = False) -> Step:
    """What a cell needs now."""

    def step(action: Action, why: str = "") -> Step:
        return Step(cell, action, why, for_run)

    standing, why = _look_at_run(cell, places)
    blocked = why if standing == Action.overwrite else ""
    path = places.result(cell)
    if for_run:
        if standing == Action.collect:
            return step(Action.done)
    elif (result := read_result(path)) is not None:
        keys = _differences(cell, result, places)
        if keys:
            blocked = f"{path} was made with another recipe ({_differs_in(keys)})"
        elif not test or result["results"]["test"] is not None:
            return step(Action.done)
        elif standing != Action.collect:
            blocked = f"{path} has no test result, and its run directory is not there"
    return step(Action.refused, blocked) if blocked and not refresh else step(standing, why)


def _look_at_run(cell: Cell, places: Places) -> tuple[Action, str]:
    """What the run directory allows: collect, resume, run (nothing is there) or overwrite."""
    run_dir = places.run_dir(cell)
    if not (run_dir / "run.json").is_file():
        return Action.run, ""
    head = read_result(places.beside(cell, ".json"))
    if head is None:
        return (
            Action.overwrite,
            f"{run_dir} is a run of something else ({places.beside(cell, '.json').name} is not there)",
        )
    keys = _differences(cell, head, places)
    if keys and f"{head.get('table')}-{slug(cell.label)}-{cell.run}" != cell.recipe.name:
        other = f"{run_dir} is a run of another table, {head.get('table')} ({_differs_in(keys)})"
        return Action.overwrite, f"{other}: give each table its own --out"
    if keys:
        return Action.overwrite, f"{run_dir} was started from another recipe ({_differs_in(keys)})"
    run = read_run(run_dir)
    if run["status"] == "finished":
        return Action.collect, ""
    return Action.resume, f"{run['epochs_done']} of {run['epochs']} epochs are done"


def plan(
    cells: Iterable[Cell], places: Places, *, test: bool = True, refresh: bool = False, runs_of: Iterable[Cell] = ()
) -> list[Step]:
    """What each cell needs, the cells they start from included, in an order that can be run.

    ``runs_of``: cells whose run directories are needed too, not their results alone: they are timed.

    Raises:
        RunError: a damaged file.
    """
    steps: dict[tuple[str, str], Step] = {}

    def add(cell: Cell, for_run: str = "") -> None:
        """``for_run``: what its run directory is needed for."""
        step = steps.get(cell.key) or look(cell, places, test=test, refresh=refresh)
        if for_run and step.action == Action.done and not step.for_run:
            step = look(cell, places, test=test, refresh=refresh, for_run=True)
            if step.action == Action.run:
                step = replace(step, why=f"its run is not here and {for_run}")
        elif cell.key in steps:
            return
        if step.action not in (Action.done, Action.collect, Action.refused):
            for need in cell.needs.values():
                add(need, f"{cell.title} starts from it")
        steps.pop(cell.key, None)
        steps[cell.key] = step

    for cell in cells:
        add(cell)
    for cell in runs_of:
        add(cell, "has to be timed")
    return list(steps.values())


def refuse(steps: Iterable[Step]) -> None:
    """Raise for the first cell that can't be run without ``refresh``.

    Raises:
        RunError: what is there, and the way out.
    """
    refused = [step for step in steps if step.action == Action.refused]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise RunError(f"{refused[0].cell.title}: {refused[0].why}{more}; --refresh runs it again")


def check_data(steps: Iterable[Step], test: bool, results: Mapping[Any, Mapping[str, Any]], places: Places) -> None:
    """Look for the data of the cells that will run, before any of them does, and hold it against that of results.

    Raises:
        DataError: it is missing. TableError: nothing would be measured. RunError: a result was made with other data.
    """
    made = check_one_data_set(results.values(), places)
    seen: set[str] = set()
    for step in steps:
        if step.action in (Action.done, Action.collect, Action.refused):
            continue
        recipe = step.cell.recipe
        if recipe.train.final and not test:
            raise TableError(
                f"{step.cell.title}: train.final holds no images out, and without a test nothing is measured; "
                "leave out --no-test or set train.final=false"
            )
        key = recipe.data.model_dump_json()
        if key not in seen:
            seen.add(key)
            data = load_data(recipe)
            if not data.has_test and test:
                raise TableError(f"{step.cell.title}: {recipe.data.name} has no test images here; use --no-test")
            before = made.get(_data_keys(stored_recipe(recipe)))
            if before is not None:
                way_out = "give the table that again (data.root), or keep results of their own (--out, --cells)"
                check_same_data(str(_path(before, places)), before["data"], fingerprint(data), way_out)


def read_results(cells: Iterable[Cell], places: Places) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of the cells that have one made with the table's recipe."""
    found = {}
    for cell in cells:
        result = read_result(places.result(cell))
        if result is not None and not _differences(cell, result, places):
            found[cell.key] = result
    return found


def check_one_data_set(results: Iterable[Mapping[str, Any]], places: Places) -> dict[str, Mapping[str, Any]]:
    """Results whose recipes name the same data must have been made with the same images. Those of earlier versions don't
    tell.

    Returns:
        A result that tells for each data set named.

    Raises:
        RunError: two have other fingerprints.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for result in results:
        if "data" in result:
            first = found.setdefault(_data_keys(result["recipe"]), result)
            way_out = "delete the results of one of the two data sets, then these cells are run again"
            where = f"{_path(result, places)}, unlike {_path(first, places).name},"
            check_same_data(where, result["data"], first["data"], way_out)
    return found


def _data_keys(recipe: Mapping[str, Any]) -> str:
    """The data set that a stored recipe names, wherever it lies."""
    return json.dumps({k: v for k, v in recipe["data"].items() if k not in ("root", "augment")}, sort_keys=True)


def _path(result: Mapping[str, Any], places: Places) -> Path:
    return places.results / f"{slug(result['label'])}-{result['run']}.json"


def estimate(steps: Iterable[Step], results: Iterable[Mapping[str, Any]], jobs: int) -> float | None:
    """Seconds that a plan takes with ``jobs`` at once: results' seconds for an epoch, of the same label where there is
    one; None where nothing is known."""
    by_label: dict[str, list[float]] = {}
    for result in results:
        by_label.setdefault(result["label"], []).append(result["seconds"] / result["epochs"])
    every = [s for seconds in by_label.values() for s in seconds]
    if not every:
        return None
    total = 0.0
    for step in steps:
        if step.action in (Action.run, Action.overwrite, Action.resume):
            known = by_label.get(step.cell.label, every)
            total += step.cell.recipe.train.epochs * summary(known).mean
    return total / jobs


# ------------------------------------------------------------------------------------------------ values


def measured(result: Mapping[str, Any]) -> tuple[str, float]:
    """What a result is compared by: ("test", value), without a test ("validation", value)."""
    for split in ("test", "validation"):
        found = result["results"][split]
        if found is not None:
            return split, float(found[result["metric"]])
    raise RunError(f"{result['label']} {result['run']}: has neither a test nor a validation result")
