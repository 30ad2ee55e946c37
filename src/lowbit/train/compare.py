"""Run the cells of a table: resumable, in parallel, each in a process of its own.

Below the table's folder of runs (big, not committed)::

    LABEL/seed0/         the run directory, as ``lowbit train`` leaves it
    LABEL/seed0.yaml     the recipe the worker got: `lowbit train LABEL/seed0.yaml --run-dir LABEL/seed0` does the same
    LABEL/seed0.json     which cell and which code the run belongs to
    LABEL/seed0.log      what the worker said
    LABEL/.seed0.lock    held while the cell is trained, so that no second process trains it

and in the folder of results (small, committed) one ``LABEL-seed0.json`` for each cell, written at its end: ``format,
table, label, run, seed, hash, recipe, needs, changes, code, versions, machine, date, seconds, resumed, metric, epochs,
parameters, warnings, results`` (run.json's, without confusion) and ``curve`` (column of metrics.csv -> values, and their epochs).
A cell whose file is there, with the recipe the table has now, is done.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import yaml

import lowbit
from lowbit.train.evaluation import evaluate_run
from lowbit.train.recipe import RecipeError, differing_keys, parse_recipe
from lowbit.train.rundir import RunError, read_metrics, read_run, write_json, write_text
from lowbit.train.statistics import summary
from lowbit.train.table import Cell, Table, TableError, stored_recipe
from lowbit.train.trainer import load_data

__all__ = [
    "Action",
    "Check",
    "Event",
    "Executor",
    "Failure",
    "Job",
    "LocalExecutor",
    "Places",
    "Step",
    "best_tries",
    "check_one",
    "code_version",
    "default_jobs",
    "estimate",
    "plan",
    "read_results",
    "refuse",
    "run",
]

FORMAT: Final = 1
CURVE_POINTS: Final = 100
POLL_SECONDS: Final = 0.5
_IGNORED: Final = frozenset({"name", "description", "data.root", "train.device"})


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

    def below(self, name: str) -> Places:
        """The same, one folder deeper."""
        return Places(self.runs / name, self.results / name)


# ------------------------------------------------------------------------------------------------ what is there


def read_result(path: Path) -> dict[str, Any] | None:
    """A result file; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read ({error}); delete it, then its cell is run again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or not {"hash", "recipe", "needs"} <= tree.keys():
        raise RunError(f"{path}: is no result of format {FORMAT}; delete it, then its cell is run again")
    return tree


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
    keys = [key for key in differing_keys(then, cell.recipe) if key not in _IGNORED]
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
        why: for a refusal, what is there; for a resume, how far it came.
        for_run: its result is there, its run directory is needed too: another cell starts from it.
    """

    cell: Cell
    action: Action
    why: str = ""
    for_run: bool = False


def _look(cell: Cell, places: Places, *, test: bool, refresh: bool, for_run: bool = False) -> Step:
    """What a cell needs now."""

    def step(action: Action, why: str = "") -> Step:
        return Step(cell, action, why, for_run)

    blocked = ""
    if not for_run:
        result = read_result(places.result(cell))
        if result is not None:
            keys = _differences(cell, result, places)
            if keys:
                blocked = f"{places.result(cell)} was made with another recipe ({_differs_in(keys)})"
            elif not test or result["results"]["test"] is not None:
                return step(Action.done)
            else:
                blocked = f"{places.result(cell)} has no test result, and its run directory is not there"
    standing, why = _look_at_run(cell, places)
    if standing == Action.collect:
        if blocked and not refresh and "no test result" not in blocked:
            return step(Action.refused, blocked)
        return step(Action.done if for_run else Action.collect)
    blocked = blocked or (why if standing == Action.overwrite else "")
    if blocked and not refresh:
        return step(Action.refused, blocked)
    return step(standing, why)


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
    if keys:
        return Action.overwrite, f"{run_dir} was started from another recipe ({_differs_in(keys)})"
    run = read_run(run_dir)
    if run["status"] == "finished":
        return Action.collect, ""
    if not (run_dir / "checkpoints" / "last.ckpt").is_file():
        return Action.overwrite if run["epochs_done"] else Action.resume, "no epoch had ended"
    return Action.resume, f"{run['epochs_done']} of {run['epochs']} epochs are done"


def plan(cells: Iterable[Cell], places: Places, *, test: bool = True, refresh: bool = False) -> list[Step]:
    """What each cell needs, the cells they start from included, in an order that can be run.

    Raises:
        RunError: a damaged file.
    """
    steps: dict[tuple[str, str], Step] = {}

    def add(cell: Cell, for_run: bool) -> None:
        before = steps.get(cell.key)
        step = before or _look(cell, places, test=test, refresh=refresh)
        if for_run and step.action == Action.done and not step.for_run:
            step = _look(cell, places, test=test, refresh=refresh, for_run=True)
        if step.action not in (Action.done, Action.collect, Action.refused):
            for need in cell.needs.values():
                add(need, True)
            steps.pop(cell.key, None)  # behind what it needs
        steps[cell.key] = step

    for cell in cells:
        if cell.key not in steps:
            add(cell, False)
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


def check_data(steps: Iterable[Step], test: bool) -> None:
    """Look for the data of the cells that will run, before any of them does.

    Raises:
        DataError: it is missing. TableError: nothing would be measured.
    """
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
            if not load_data(recipe).has_test and test:
                raise TableError(f"{step.cell.title}: {recipe.data.name} has no test images here; use --no-test")


def read_results(cells: Iterable[Cell], places: Places) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of the cells that have one made with the table's recipe."""
    found = {}
    for cell in cells:
        result = read_result(places.result(cell))
        if result is not None and not _differences(cell, result, places):
            found[cell.key] = result
    return found


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


# ------------------------------------------------------------------------------------------------ code and machine


def code_version() -> dict[str, Any]:
    """``{lowbit, commit, dirty}``: the package's version, and where its files are tracked by git HEAD and whether they
    differ from it; None, None elsewhere."""
    home = Path(lowbit.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=home, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    version: dict[str, Any] = {"lowbit": lowbit.__version__, "commit": None, "dirty": None}
    if git("ls-files", "--error-unmatch", "__init__.py"):
        version["commit"] = git("rev-parse", "HEAD")
        version["dirty"] = bool(git("status", "--porcelain", "--", "."))
    return version


# ------------------------------------------------------------------------------------------------ workers


@dataclass(frozen=True)
class Job:
    """One training, as a command that can be run wherever these paths are.

    Attributes:
        recipe: the recipe's file.
        run_dir: where the run goes.
        log: what it says is appended here.
        action: run, resume or overwrite.
        test: evaluate the test images at the end.
        lock: a file descriptor that a local worker keeps open: the lock lasts as long as the worker does, also where
            its parent was killed.
    """

    recipe: Path
    run_dir: Path
    log: Path
    action: Action
    test: bool
    lock: int

    def command(self) -> list[str]:
        """Python's arguments."""
        what = self.run_dir if self.action == Action.resume else self.recipe
        options = {Action.resume: ["--resume"], Action.overwrite: ["--overwrite"]}.get(self.action, [])
        test = ["--test" if self.test else "--no-test"]
        return ["-m", "lowbit", "train", str(what), "--run-dir", str(self.run_dir), *options, *test]


class Executor(Protocol):
    """Where cells are trained."""

    @property
    def slots(self) -> int:
        """How many at once."""

    def submit(self, job: Job) -> Future[int]:
        """Start a job; its exit status, negative where a signal killed it. At most ``slots`` are under way."""

    def stop(self) -> None:
        """Interrupt what is under way, so that it can be resumed, and wait for its end."""


def default_jobs(device: str = "auto") -> int:
    """One for each GPU; without one (or with ``device`` "cpu"), one for each core this process may use."""
    return len(_gpus()) if device != "cpu" and _gpus() else len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in visible.split(",") if name] if visible is not None else None
    count = torch.cuda.device_count()
    return [str(i) for i in range(count)] if names is None else names[:count]


class LocalExecutor:
    """Processes of this machine: on the CPU with one thread each (so that a result does not depend on how many run at
    once; OMP_NUM_THREADS says otherwise), on GPUs in turn.

    Args:
        jobs: how many at once; by default ``default_jobs``.
        device: the recipes' ``train.device``: "cpu" leaves GPUs alone.
    """

    def __init__(self, jobs: int | None = None, device: str = "auto") -> None:
        self._slots = jobs or default_jobs(device)
        gpus = _gpus() if device != "cpu" else []
        self._free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for i in range(self._slots):
            self._free.put({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
        self._threads = {} if gpus else {"OMP_NUM_THREADS": "1"}
        self._pool = ThreadPoolExecutor(self._slots)
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @property
    def slots(self) -> int:
        """How many at once."""
        return self._slots

    def submit(self, job: Job) -> Future[int]:
        """Start a process."""
        return self._pool.submit(self._run, job)

    def _run(self, job: Job) -> int:
        slot = self._free.get()
        environment = {**self._threads, **os.environ, **slot, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        try:
            with job.log.open("ab") as log:
                with self._guard:
                    if self._stopped:
                        return 130
                    process = subprocess.Popen(
                        [sys.executable, *job.command()],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        pass_fds=[job.lock],
                        start_new_session=True,  # Ctrl-C is ours to hand on
                    )
                    self._running.add(process)
                try:
                    return process.wait()
                finally:
                    with self._guard:
                        self._running.discard(process)
        finally:
            self._free.put(slot)

    def stop(self, patience: float = 20.0) -> None:
        """Interrupt every process, and kill those that have not ended after ``patience`` seconds."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)
        end = time.monotonic() + patience
        while self._running and time.monotonic() < end:
            time.sleep(0.1)
        with self._guard:
            for process in self._running:
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Event:
    """Something to show. ``kind``: "start", "epoch" (``done`` of ``total``), "wait" (another process trains this cell),
    "retry" (its worker was killed), "finish" (``text`` says the result), "fail" (``text`` says why)."""

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
    epochs_done: int = -1


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock, None where another process does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C: the workers are interrupted too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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

    A cell whose worker was killed by a signal is resumed once. A cell that another process trains is waited for.
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
    code: dict[str, Any] = field(default_factory=code_version)
    running: dict[Future[int], _Running] = field(default_factory=dict)
    failed: dict[tuple[str, str], Failure] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)

    def run(self, steps: Sequence[Step]) -> list[Failure]:
        pending = {step.cell.key: step for step in steps if step.action != Action.done}
        with _terminated():
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
        descriptor = _lock(self.places.beside(cell, ".lock").with_name(f".{cell.run}.lock"))
        if descriptor is None:
            if cell.key not in self.told:
                self.told.add(cell.key)
                self.on_event(Event("wait", cell))
            return False
        started = False
        try:
            # another process may have come further since the plan was made
            look = _look(cell, self.places, test=self.test, refresh=self.refresh, for_run=step.for_run)
            if look.action == Action.refused:
                self._fail(cell, look.why)
            elif look.action == Action.collect:
                self._collect(cell)
            elif look.action != Action.done:
                self._start(look, descriptor)
                started = True
        except (RunError, ValueError, OSError) as error:
            self._fail(cell, str(error))
        finally:
            if not started:
                os.close(descriptor)
        return True

    def _start(self, step: Step, descriptor: int, tries: int = 1) -> None:
        cell, places, run_dir = step.cell, self.places, self.places.run_dir(step.cell)
        action = step.action
        if action == Action.run and run_dir.is_dir():
            _clear(run_dir)
        if action != Action.resume:
            recipe = cell.resolve({key: places.run_dir(need) for key, need in cell.needs.items()})
            write_text(places.beside(cell, ".yaml"), recipe.to_yaml())
            write_json(places.beside(cell, ".json"), self._head(cell))
        log = places.beside(cell, ".log")
        start = log.stat().st_size if log.is_file() else 0
        job = Job(places.beside(cell, ".yaml"), run_dir, log, action, self.test, descriptor)
        self.running[self.executor.submit(job)] = _Running(step, descriptor, start, tries)
        self.on_event(Event("start", cell, step.why, total=cell.recipe.train.epochs))

    def _head(self, cell: Cell) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "table": self.table,
            "label": cell.label,
            "run": cell.run,
            "seed": cell.recipe.seed,
            "hash": cell.hash,
            "recipe": stored_recipe(cell.recipe),
            "needs": {key: {"label": c.label, "run": c.run, "hash": c.hash} for key, c in cell.needs.items()},
            "changes": dict(cell.changes),
            "code": self.code,
        }

    def _end(self, future: Future[int]) -> None:
        each = self.running.pop(future)
        step, cell, retried = each.step, each.step.cell, False
        try:
            code = future.result()
            if code == 0:
                if step.for_run:
                    self.on_event(Event("finish", cell, "its run directory is there again"))
                else:
                    self._collect(cell)
            elif code < 0 and each.tries == 1:
                name = signal.Signals(-code).name
                self.on_event(Event("retry", cell, f"its worker was killed ({name}); it goes on once more"))
                look = _look(cell, self.places, test=self.test, refresh=self.refresh, for_run=step.for_run)
                if look.action == Action.overwrite and not self.refresh:  # its own beginning
                    look = Step(cell, Action.overwrite, look.why, step.for_run)
                self._start(look, each.lock, tries=2)
                retried = True
            else:
                log = self.places.beside(cell, ".log")
                killed = f"its worker was killed twice ({signal.Signals(-code).name})" if code < 0 else ""
                self._fail(cell, killed or _last_words(log, each.log_start) or f"exit status {code}", log)
        except (RunError, ValueError, OSError) as error:
            self._fail(cell, str(error))
        finally:
            if not retried:
                os.close(each.lock)

    def _fail(self, cell: Cell, error: str, log: Path | None = None) -> None:
        self.failed[cell.key] = Failure(cell, error, log)
        self.on_event(Event("fail", cell, error))

    def _watch(self) -> None:
        for each in self.running.values():
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
        for part in ("validation", "test"):
            if results[part] is not None:
                results[part] = {k: v for k, v in results[part].items() if k != "confusion"}
        tree = {
            **head,
            "versions": found["versions"],
            "machine": found["machine"],
            "date": found["finished"],
            "seconds": found["wall_seconds"],
            "resumed": found["resumed"],
            "metric": found["metric"],
            "epochs": found["epochs"],
            "parameters": found["parameters"],
            "warnings": found["warnings"],
            "results": results,
            "curve": _curve(read_metrics(run_dir), found["metric"]),
        }
        places.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        text = re.sub(r"\[[-+.\deE,\s]*\]", lambda m: " ".join(m[0].split()), text)  # numbers in one line
        write_text(places.result(cell), text + "\n")
        split, value = measured(tree)
        self.on_event(Event("finish", cell, f"{split} {show(value, tree['metric'])}, {tree['seconds']:.0f} s"))


def _clear(run_dir: Path) -> None:
    """Remove what a worker left that was killed before it wrote run.json; nothing else is removed."""
    for path in sorted(run_dir.rglob("*"), reverse=True):
        known = path.is_dir() or path.name == "recipe.yaml" or path.name.startswith(".")
        if not known:
            raise RunError(f"{run_dir}: is not empty and not a run directory; it is not overwritten")
    for path in sorted(run_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _last_words(log: Path, start: int) -> str:
    """The error a worker ended with."""
    with suppress(OSError):
        lines = [
            line.strip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()
        ]
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


# ------------------------------------------------------------------------------------------------ results


def measured(result: Mapping[str, Any]) -> tuple[str, float]:
    """What a result is compared by: ("test", value), without a test ("validation", value)."""
    for split in ("test", "validation"):
        found = result["results"][split]
        if found is not None:
            return split, float(found[result["metric"]])
    raise RunError(f"{result['label']} {result['run']}: has neither a test nor a validation result")


def unit(metric: str) -> tuple[str, float, int]:
    """Name of a metric's unit, the factor to it, and the digits worth showing: accuracy lies between 0 and 1, and is
    shown in percent, as papers do."""
    return (
        ("dB", 1.0, 3) if metric.startswith("psnr") else ("", 1.0, 4) if metric.startswith("ssim") else ("%", 100.0, 2)
    )


def show(value: float, metric: str) -> str:
    """A value in its unit."""
    name, factor, digits = unit(metric)
    return f"{factor * value:.{digits}f}{' ' if name else ''}{name}"


@dataclass(frozen=True)
class Check:
    """A cell that was run again.

    Attributes:
        cell: which.
        split, metric: what was compared.
        stored, again: the committed value and the new one.
        tolerance: the largest difference that passes; 0 where machine, versions and code are the same.
        differs: in what of machine, versions and code the two runs differ.
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
        on_event: as for ``run``.

    Raises:
        RunError: the cell fails.
    """
    stored = results[cell.key]
    split, value = measured(stored)
    with tempfile.TemporaryDirectory(prefix="lowbit-check-") as folder:
        places = Places(Path(folder) / "runs", Path(folder) / "results")
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
    names += [f"versions.{k}" for k in ("torch", "numpy", "lightning")] + ["code.commit"]
    found = []
    for name in names:
        part, key = name.split(".")
        if one[part].get(key) != other[part].get(key):
            found.append(key)
    if one["machine"]["device"] != "cpu" and "device" not in found:
        found.append("order of sums on a GPU")
    if one["code"]["dirty"] or other["code"]["dirty"]:
        found.append("uncommitted code")
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


def best_tries(table: Table, cells: Sequence[Cell], places: Places) -> tuple[list[tuple[Cell, float, bool]], str]:
    """Every try with its result on the held-out images and whether it is its cell's best (the first of equals), and the
    YAML for the table's ``cells`` that takes the best."""
    results = read_results(cells, places)
    values = {key: float(r["results"]["validation"][r["metric"]]) for key, r in results.items()}
    rows, chosen = [], {}
    for label in table.labels:
        own = [cell for cell in cells if cell.label == label and cell.key in values]
        best = max(own, key=lambda cell: values[cell.key], default=None)
        for cell in own:
            rows.append((cell, values[cell.key], cell is best))
        if best is not None:
            chosen[label] = {"set": dict(best.changes)}
    return rows, yaml.safe_dump({"cells": chosen}, sort_keys=False, default_flow_style=None, width=120)
