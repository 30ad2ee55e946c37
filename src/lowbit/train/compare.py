"""Run the cells of a table: resumable, in parallel, each in a process of its own; check one; choose among tries."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from lowbit.remote import HEADING, RemoteError, withdraw, worker_of
from lowbit.train.cells import (
    FORMAT,
    Action,
    Places,
    Step,
    check_one_data_set,
    look,
    measured,
    plan,
    read_result,
    read_results,
    show,
)
from lowbit.train.evaluation import evaluate_run
from lowbit.train.recipe import flatten, load_recipe
from lowbit.train.rundir import LOCK, RunError, RunLock, empty, read_metrics, read_run, sessions, write_json, write_text
from lowbit.train.statistics import summary
from lowbit.train.table import Cell, Table, stored_recipe
from lowbit.train.workers import Executor, Job, lock

__all__ = [
    "Check",
    "Event",
    "Failure",
    "best_tries",
    "check_one",
    "draw",
    "exit_status",
    "interruptible",
    "last_words",
    "launch",
    "run",
]

CURVE_POINTS: Final = 100
TRAINED: Final = (LOCK, "recipe.yaml", "metrics.csv", "checkpoints", "tensorboard")
MADE_OF_IT: Final = ("model.lowbit", "proof.json", "bench.json", "report.html")
"""What lies in a run directory beside run.json."""
POLL_SECONDS: Final = 0.5


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Event:
    """Something to show. ``kind``: "start", "place" (a worker on the node ``text`` has it), "epoch" (``done`` of
    ``total``), "wait" (another process trains this cell; ``text`` says which, where that is known), "retry" (its worker was
    killed), "finish" (``text`` says the result), "fail" (``text`` says why)."""

    kind: str
    cell: Cell
    text: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Failure:
    """A cell without a result."""

    cell: Cell
    error: str
    log: Path | None = None


@dataclass
class _Running:
    step: Step
    lock: int
    log_start: int
    tries: int
    began_at: int
    epochs_done: int = -1
    place: str = ""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and a closed terminal end like Ctrl-C: the workers are interrupted too. What is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)}
    for each, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run(
    table: str,
    steps: Sequence[Step],
    places: Places,
    executor: Executor,
    *,
    test: bool = True,
    refresh: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> list[Failure]:
    """Do what a plan's cells need. A cell that fails loses only itself and those that start from it.

    A cell whose worker was killed by a signal is resumed, and again as long as it comes further by an epoch. A cell that
    another process trains, a worker on another machine too, is waited for.
    Interrupted (KeyboardInterrupt, SIGTERM), the workers are interrupted and everything can be resumed.

    Returns:
        The cells that have no result, with the reason.
    """
    return _Runner(table, places, executor, test, refresh, on_event or (lambda _: None)).run(steps)


@dataclass
class _Runner:
    table: str
    places: Places
    executor: Executor
    test: bool
    refresh: bool
    on_event: Callable[[Event], None]
    running: dict[Future[int], _Running] = field(default_factory=dict)
    failed: dict[tuple[str, str], Failure] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)

    def run(self, steps: Sequence[Step]) -> list[Failure]:
        pending = {step.cell.key: step for step in steps if step.action != Action.done}
        with interruptible():
            try:
                while pending or self.running:
                    for step in list(pending.values()):
                        if len(self.running) < self.executor.slots and self._begin(step, pending):
                            del pending[step.cell.key]
                    done, _ = wait(self.running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                    if not self.running and pending:
                        time.sleep(POLL_SECONDS)  # others train what is left
                    for future in done:
                        self._end(future)
                    self._watch()
            except BaseException:
                self.executor.stop()
                raise
            finally:
                for each in self.running.values():
                    os.close(each.lock)
        return list(self.failed.values())

    def _begin(self, step: Step, pending: Mapping[tuple[str, str], Step]) -> bool:
        """Start a cell; whether it needs no more looking at."""
        cell = step.cell
        under_way = {each.step.cell.key for each in self.running.values()}
        for need in cell.needs.values():
            if need.key in self.failed:
                self._fail(cell, f"not run: {need.title}, which it starts from, has no result")
                return True
            if need.key in pending or need.key in under_way:
                return False
        descriptor = lock(self.places.beside(cell, ".lock").with_name(f".{cell.run}.lock"))
        run_dir = self.places.run_dir(cell)
        free = descriptor is not None and withdraw(run_dir)
        if descriptor is None or not free:
            if descriptor is not None:
                os.close(descriptor)
            if cell.key not in self.told:
                self.told.add(cell.key)
                self.on_event(Event("wait", cell, "" if free else worker_of(run_dir)))
            return False
        started = False
        try:
            started = self._go(self._look(step), descriptor)  # another process may have come further since the plan
        except (RunError, RemoteError, ValueError, OSError) as error:
            self._fail(cell, str(error))
        finally:
            if not started:
                os.close(descriptor)
        return True

    def _look(self, step: Step) -> Step:
        return look(step.cell, self.places, test=self.test, refresh=self.refresh, for_run=step.for_run)

    def _go(self, step: Step, descriptor: int, tries: int = 1) -> bool:
        """Do what a cell needs; whether a worker was started for it, which keeps the lock."""
        if step.action == Action.refused:
            raise RunError(step.why)
        if step.action == Action.collect:
            self._collect(step.cell)
        elif step.action != Action.done:
            self._start(step, descriptor, tries)
            return True
        return False

    def _start(self, step: Step, descriptor: int, tries: int) -> None:
        future, log_start, began_at = launch(self.table, step, self.places, self.executor, descriptor, test=self.test)
        self.running[future] = _Running(step, descriptor, log_start, tries, began_at)
        self.on_event(Event("start", step.cell, step.why, total=step.cell.recipe.train.epochs))

    def _end(self, future: Future[int]) -> None:
        each = self.running.pop(future)
        step, cell, retried = each.step, each.step.cell, False
        each.place = worker_of(self.places.run_dir(cell)) or each.place
        try:
            code = exit_status(future)
            if code == 0 or (code == 1 and self._passed_over(cell)):
                if step.for_run:
                    self.on_event(Event("finish", cell, "its run directory is there again"))
                else:
                    self._collect(cell)
            elif code < 0 and (each.tries == 1 or self._came_further(each)):
                name = signal.Signals(-code).name
                self.on_event(Event("retry", cell, f"its worker was killed ({name}{_on(each)}); it goes on"))
                retried = self._go(self._look(step), each.lock, tries=each.tries + 1)
            else:
                log = self.places.beside(cell, ".log")
                killed = f"its worker was killed twice ({signal.Signals(-code).name})" if code < 0 else ""
                words = killed or last_words(log, each.log_start) or f"exit status {code}"
                self._fail(cell, words + _on(each), log)
        except (RunError, RemoteError, ValueError, OSError) as error:
            self._fail(cell, str(error))
        finally:
            if not retried:
                os.close(each.lock)

    def _fail(self, cell: Cell, error: str, log: Path | None = None) -> None:
        self.failed[cell.key] = Failure(cell, error, log)
        self.on_event(Event("fail", cell, error))

    def _passed_over(self, cell: Cell) -> bool:
        """Whether `lowbit train` ended with 1 for pictures that it passed over: the run is whole, and its result names them."""
        with suppress(RunError):
            run = read_run(self.places.run_dir(cell))
            return run["status"] == "finished" and run["task"] == "superres" and bool(run["broken_images"])
        return False

    def _came_further(self, each: _Running) -> bool:
        with suppress(RunError):
            return bool(read_run(self.places.run_dir(each.step.cell))["epochs_done"] > each.began_at)
        return False

    def _watch(self) -> None:
        for each in self.running.values():
            place = worker_of(self.places.run_dir(each.step.cell))
            if place and place != each.place:
                each.place = place
                self.on_event(Event("place", each.step.cell, place))
            with suppress(RunError):
                done = read_run(self.places.run_dir(each.step.cell))["epochs_done"]
                if done != each.epochs_done:
                    each.epochs_done = done
                    self.on_event(Event("epoch", each.step.cell, done=done, total=each.step.cell.recipe.train.epochs))

    def _collect(self, cell: Cell) -> None:
        """Write a trained cell's result."""
        places, run_dir = self.places, self.places.run_dir(cell)
        head = read_result(places.beside(cell, ".json"))
        if head is None:
            raise RunError(f"{places.beside(cell, '.json')}: is not there")
        found = read_run(run_dir)
        results = dict(found["results"])
        if self.test and results["test"] is None:
            results["test"] = evaluate_run(run_dir, split="test")
        broken = len(found.get("broken_images", ()))
        passed_over = (
            [f"{broken} of the images can't be read and were passed over (data.broken: skip)"] if broken else []
        )
        for part in ("validation", "test"):
            if results[part] is not None:
                results[part] = {k: v for k, v in results[part].items() if k not in ("confusion", "computed_by")}
        # of a run that an earlier version started, the head says with which code
        trained = [{"code": head.get("code"), **each} for each in sessions(found)]
        tree = {
            **head,
            "table": self.table,  # another table may have trained the same cell in the same folder
            **{key: trained[-1][key] for key in ("code", "versions", "machine")},
            **({"sessions": trained} if len(trained) > 1 else {}),
            **({"data": found["data"]} if "data" in found else {}),
            "date": found["finished"],
            "seconds": found["wall_seconds"],
            "resumed": found["resumed"],
            "metric": found["metric"],
            "epochs": found["epochs"],
            "parameters": found["parameters"],
            "warnings": found["warnings"] + passed_over,
            "results": results,
            "curve": _curve(read_metrics(run_dir), found["metric"]),
        }
        places.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        text = re.sub(r"\[[-+.\deE,\s]*\]", lambda m: " ".join(m[0].split()), text)  # numbers in one line
        write_text(places.result(cell), text + "\n")
        split, value = measured(tree)
        self.on_event(Event("finish", cell, f"{split} {show(value, tree['metric'])}, {tree['seconds']:.0f} s"))


def launch(
    table: str, step: Step, places: Places, executor: Executor, descriptor: int, *, test: bool
) -> tuple[Future[int], int, int]:
    """Start or resume a cell's training, after what is replaced was removed.

    Args:
        table: its name, or the search's.
        step: the cell, and whether it is resumed.
        places: where its run goes; the runs that it needs lie there.
        executor: where it is trained.
        descriptor: holds the cell's lock.
        test: evaluate the test images at the end.

    Returns:
        The exit status to come, where the log of this training begins, and the epochs that were done before.
    """
    cell, run_dir = step.cell, places.run_dir(step.cell)
    starts: dict[str, str | Path] = {key: places.run_dir(need) for key, need in cell.needs.items()}
    if step.action == Action.resume:
        own = dict(flatten(load_recipe(run_dir / "recipe.yaml").plain()))
        starts = {key: own.get(key, place) for key, place in starts.items()}  # as it was started
    else:
        _clear(run_dir)
        write_json(places.beside(cell, ".json"), _head(table, cell))
    write_text(places.beside(cell, ".yaml"), cell.resolve(starts).to_yaml())
    log = places.beside(cell, ".log")
    log_start = log.stat().st_size if log.is_file() else 0
    job = Job(places.beside(cell, ".yaml"), run_dir, log, step.action == Action.resume, test, descriptor)
    began_at = read_run(run_dir)["epochs_done"] if job.resume else 0
    return executor.submit(job), log_start, began_at


def _head(table: str, cell: Cell) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "table": table,
        "label": cell.label,
        "run": cell.run,
        "seed": cell.recipe.seed,
        "hash": cell.hash,
        "recipe": stored_recipe(cell.recipe),
        "needs": {key: {"label": c.label, "run": c.run, "hash": c.hash} for key, c in cell.needs.items()},
        "changes": dict(cell.changes),
    }


def _clear(run_dir: Path) -> None:
    """Empty the directory of a run that is replaced, or of a worker that was killed before it wrote run.json.

    Raises:
        RunError: it holds something else, or another process is at it.
    """
    if not run_dir.exists():
        return
    if not (run_dir / "run.json").is_file():
        for path in run_dir.iterdir():
            if path.name not in TRAINED + MADE_OF_IT and not path.name.startswith("."):
                raise RunError(f"{run_dir}: is not empty and not a run directory; it is not overwritten")
    with RunLock(run_dir) as lock:
        lock.take()
        empty(run_dir)


def _on(each: _Running) -> str:
    return f", on {each.place}" if each.place else ""


def exit_status(future: Future[int]) -> int:
    """Of a training that has ended, negative where a signal killed it, or one of the processes it had started.

    Raises:
        RunError: it could not be started.
    """
    code = future.result()
    if 128 < code <= 128 + signal.SIGRTMAX and code != 128 + signal.SIGINT:
        return 128 - code  # the one that started them says so
    return code


def last_words(log: Path, start: int) -> str:
    """The error a worker ended with."""
    with suppress(OSError):
        text = log.read_bytes()[start:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(HEADING)]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors or lines:
            return (errors or lines)[-1].removeprefix("error: ")
    return ""


def _curve(rows: Sequence[Mapping[str, float | None]], metric: str) -> dict[str, list[float]]:
    """The metric by epoch, at most ``CURVE_POINTS`` of them, the last included."""
    curve: dict[str, list[float]] = {}
    for column in (f"train_{metric}", f"val_{metric}"):
        points = [(row["epoch"] or 0.0, row[column] or 0.0) for row in rows if row.get(column) is not None]
        every = max(1, math.ceil(len(points) / CURVE_POINTS))
        kept = points[::-1][::every][::-1]
        if kept:
            curve[f"{column}_epochs"] = [int(epoch) for epoch, _ in kept]
            curve[column] = [round(value, 5) for _, value in kept]
    return curve


# ------------------------------------------------------------------------------------------------ a check, and a choice


@dataclass(frozen=True)
class Check:
    """A cell that was run again.

    Attributes:
        cell: which.
        split, metric: what was compared.
        stored, again: the committed value and the new one.
        tolerance: the largest difference that passes; 0 where machine, versions and code are the same.
        differs: in what of machine, versions, code and data the two runs, or the sessions of one of them, differ.
    """

    cell: Cell
    split: str
    metric: str
    stored: float
    again: float
    tolerance: float
    differs: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the two are within the tolerance."""
        return abs(self.again - self.stored) <= self.tolerance


def draw(cells: Sequence[Cell], results: Mapping[tuple[str, str], Any], seed: int) -> Cell:
    """A finished cell by chance; one that starts from another only where there are no others.

    Raises:
        RunError: none is finished.
    """
    there = [cell for cell in cells if cell.key in results]
    if not there:
        raise RunError("no cell has a result that could be checked; run the table first")
    return random.Random(seed).choice([cell for cell in there if not cell.needs] or there)


def check_one(
    table: str,
    cell: Cell,
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    executor: Executor,
    *,
    tolerance: float | None = None,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Check:
    """Run a finished cell again, in a temporary folder, and hold the result against the stored one.

    On the same machine with the same versions and code, a run on the CPU gives the same number to the last digit, and
    the tolerance is 0. Elsewhere rounding sends training another way, as another seed would, and it is 3 sqrt(2) times
    the standard deviation over seeds, pooled over the table (0.01, or 0.1 dB, where no cell has two seeds).

    Args:
        table: its name.
        cell: from ``draw``.
        results: of the table.
        executor: where.
        tolerance: another one, in the metric's own unit (accuracy: 0 to 1).
        folder: where the temporary folder is made, if not in the system's: an executor of other machines has to see it.
        on_event: as for ``run``.

    Raises:
        RunError: the cell fails.
    """
    stored = results[cell.key]
    split, value = measured(stored)
    with tempfile.TemporaryDirectory(prefix="lowbit-check-", dir=folder) as below:
        places = Places(Path(below) / "runs", Path(below) / "results")
        test = split == "test"
        failures = run(table, plan([cell], places, test=test), places, executor, test=test, on_event=on_event)
        if failures:
            tail = "".join(f"\n{f.log.read_text(errors='replace')[-2000:]}" for f in failures[:1] if f.log)
            raise RunError(f"{failures[0].cell.title}: {failures[0].error}{tail}")
        result = read_result(places.result(cell))
        assert result is not None
    differs = _other_conditions(stored, result)
    if tolerance is None:
        tolerance = _spread(results, stored["metric"], split) if differs else 0.0
    return Check(cell, split, stored["metric"], value, measured(result)[1], tolerance, tuple(differs))


def _other_conditions(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = [f"machine.{k}" for k in ("architecture", "processor", "device", "gpu", "threads")]
    names += [f"versions.{k}" for k in ("torch", "numpy", "lightning")] + ["code.source"]
    trained = [*sessions(one), *sessions(other)]
    found = []
    for name in names:
        part, key = name.split(".")
        if len({each[part].get(key) for each in trained}) > 1:
            found.append({"source": "code"}.get(key, key))
    if "data" in one and "data" in other and one["data"] != other["data"]:
        found.append("data")
    if one["machine"]["device"] != "cpu" and "device" not in found:
        found.append("order of sums on a GPU")
    return found


def _spread(results: Mapping[Any, Mapping[str, Any]], metric: str, split: str) -> float:
    groups: dict[str, list[float]] = {}
    for result in results.values():
        if result["metric"] == metric and measured(result)[0] == split:
            groups.setdefault(result["label"], []).append(measured(result)[1])
    found = [summary(values) for values in groups.values() if len(values) > 1]
    freedom = sum(s.n - 1 for s in found)
    if not freedom:
        return 0.1 if metric.startswith("psnr") else 0.01
    return 3 * math.sqrt(2 * sum((s.n - 1) * (s.sd or 0.0) ** 2 for s in found) / freedom)


def best_tries(table: Table, cells: Sequence[Cell], places: Places) -> tuple[list[tuple[Cell, str, bool]], str]:
    """Every try with its result on the held-out images and whether it is its cell's best (the first of equals), and the
    YAML for the table's ``cells`` that takes the best.

    Raises:
        RunError: a damaged result, or tries on different data.
    """
    results = read_results(cells, places)
    check_one_data_set(results.values(), places)
    values = {key: float(r["results"]["validation"][r["metric"]]) for key, r in results.items()}
    rows, chosen = [], {}
    for label in table.labels:
        own = [cell for cell in cells if cell.label == label and cell.key in values]
        best = max(own, key=lambda cell: values[cell.key], default=None)
        for cell in own:
            rows.append((cell, show(values[cell.key], results[cell.key]["metric"]), cell is best))
        if best is not None:
            chosen[label] = {"set": dict(best.changes)}
    return rows, yaml.safe_dump({"cells": chosen}, sort_keys=False, default_flow_style=None, width=120)
