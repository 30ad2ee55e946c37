"""Search a space for its front: held-out score against milliseconds on the engine. With Optuna, resumable, over a budget of minutes.

One process decides and is the only one that writes the study (``study.db`` in the search's folder); trials are trained in
processes of their own, as the cells of a table are (``lowbit.train.workers``, or a Ray cluster). A trial's run directory is named
after its recipe's hash, so a trial that is put back and asked for again goes on from its last whole epoch, and one that was
trained already is not trained again.

Speed is known before training: the network is built, frozen and timed with random weights. One slower than the limit is not
trained. A trial is stopped (state PRUNED) where at a rung another one, no slower, was better by a margin; Optuna's own
pruners are for one objective. States: COMPLETE, PRUNED (``why`` says by which, or too slow), FAIL (``why``: it can't be built, its
worker was killed, the time was over; the latter two are put back and are tried again).

The search's own numbers choose; nothing is claimed from them: ``table`` makes a table of the front for ``lowbit compare``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

from lowbit.remote import RemoteError, withdraw
from lowbit.train.cells import Action, Places, Step, look
from lowbit.train.compare import exit_status, interruptible, last_words, launch
from lowbit.train.data import DataSource
from lowbit.train.freeze import FreezeError
from lowbit.train.front import SAME, beaten_by
from lowbit.train.probe import Speed, probe_speed, probe_training
from lowbit.train.recipe import RecipeError
from lowbit.train.rundir import InputSpec, RunError, check_same_data, fingerprint, read_metrics, read_run
from lowbit.train.space import Dimension, Space
from lowbit.train.statistics import summary
from lowbit.train.table import TEACHER, Cell
from lowbit.train.tasks import TASKS
from lowbit.train.trainer import load_data
from lowbit.train.units import unit
from lowbit.train.workers import Executor, lock

__all__ = ["Event", "Found", "Search"]

POLL_SECONDS: Final = 0.5
SAME_AGAIN: Final = 50
"""After so many proposals in a row that had been tried before, the space is taken to be searched."""
BROKEN: Final = 20
"""After so many failures in a row something is wrong with all of them."""
TOO_LONG: Final = 4
"""Proposals that don't fit into what is left of the budget, before no more are asked for."""
RETRIES: Final = 2
"""How often a trial whose worker was killed is put back."""


@dataclass(frozen=True)
class Event:
    """Something to show. ``kind``: "start" (``text`` says what it is), "run" (one that the trial starts from is trained),
    "epoch" (``done`` of ``total``), "finish", "prune", "skip" (not trained), "back" (put back), "fail", "wait"."""

    kind: str
    trial: int
    text: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Found:
    """A trial that was trained to its end.

    Attributes:
        number: of the trial.
        params: what was chosen.
        score: on the held-out images, in the metric's own unit.
        seconds: of one call on the engine, before training.
        file_bytes: of its file.
        trained: seconds that the training took.
    """

    number: int
    params: Mapping[str, Any]
    score: float
    seconds: float
    file_bytes: int
    trained: float


@dataclass
class _Active:
    """A trial between its being asked for and its end."""

    trial: optuna.Trial
    params: dict[str, Any]
    cell: Cell
    speed: Speed
    under_way: Step | None = None
    future: Future[int] | None = None
    descriptor: int = -1
    log_start: int = 0
    epochs_done: int = -1
    pruned: str = ""
    told: bool = False


class Search:
    """A search in a folder.

    Args:
        space: what to search.
        folder: ``study.db``, the trials' run directories and the results lie here.
        executor: where trials are trained.
        on_event: called with everything that happens.

    Raises:
        RunError: another search runs here, the folder's search has another space or other data, or its study is damaged.
    """

    def __init__(
        self, space: Space, folder: Path, executor: Executor, on_event: Callable[[Event], None] = lambda _: None
    ) -> None:
        self.space, self.folder, self.executor, self.on_event = space, folder, executor, on_event
        self.places = Places(folder, folder)
        self._first = space.cell(space.first)
        self.metric = TASKS.get(self._first.recipe.task).metric
        self._data: dict[str, DataSource] = {}
        self._speeds: dict[str, Speed] = {}
        self._costs: dict[str, float] = {}
        self._active: list[_Active] = []
        self._lock = lock(folder / ".search.lock")
        if self._lock is None:
            raise RunError(f"{folder}: another search runs here; wait for its end, or give --out another folder")
        try:
            self._study = self._open()
            self._rungs = {t.number: dict(t.user_attrs.get("rungs", {})) for t in self.trials}
            for attrs in (t.user_attrs for t in self.trials):
                if "network" in attrs:  # equal networks are equally fast, whenever they were measured
                    self._speeds[attrs["network"]] = Speed(attrs["ms"] / 1e3, attrs["file_bytes"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others search here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- the study

    def _open(self) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = self.folder / "study.db"
        identity = fingerprint(self._data_of(self._first))
        place: dict[str, Any] = {"storage": f"sqlite:///{path.absolute()}", "study_name": "search"}

        def opened() -> optuna.Study:
            return optuna.create_study(**place, directions=["maximize", "minimize"], load_if_exists=True)

        try:
            study = opened()
            attrs = study.user_attrs
            begun = any(t.state != TrialState.WAITING for t in study.get_trials(deepcopy=False))
            if "fingerprint" in attrs and not begun:  # a budget was refused, say: the folder is of no space yet
                optuna.delete_study(**place)
                study, attrs = opened(), {}
            if "fingerprint" not in attrs:
                if begun:
                    raise RunError(f"{path}: is a study of something else; give --out another folder")
                study.enqueue_trial(self.space.first, skip_if_exists=True)
                study.set_user_attr("space", self.space.identity)
                study.set_user_attr("data", identity)
                study.set_user_attr("fingerprint", self.space.fingerprint)  # last: with it the study is ours
                return self._sampled(study)
        except DatabaseError as error:
            raise RunError(
                f"{path}: can't be read ({str(error.orig).strip()}); remove it to begin anew, trained trials stay"
            ) from None
        if attrs["fingerprint"] != self.space.fingerprint:
            then, now = attrs["space"], self.space.identity
            keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise RunError(
                f"{self.folder}: was searched with another space; it differs in {', '.join(keys[:3])}{more}. Take that space again, or "
                "give --out another folder"
            )
        check_same_data(f"{self.folder}:", attrs["data"], identity, "give it that again (data.root), or another --out")
        return self._sampled(study)

    def _sampled(self, study: optuna.Study) -> optuna.Study:
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            # a resumed search draws other numbers than it began with
            seed = self.space.config.seed + len(study.get_trials(deepcopy=False))
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=10, constant_liar=True)
        return study

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, of earlier sessions too, but for those that wait."""
        found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state != TrialState.WAITING]

    @property
    def found(self) -> list[Found]:
        """What was trained to its end, each recipe once."""
        return [
            Found(
                t.number,
                t.params,
                t.values[0],
                t.values[1] / 1e3,
                t.user_attrs["file_bytes"],
                t.user_attrs.get("trained", 0.0),
            )
            for t in self.trials
            if t.state == TrialState.COMPLETE and "same_as" not in t.user_attrs
        ]

    @property
    def front(self) -> list[Found]:
        """Those that no other one beats, fastest first."""
        found = self.found
        beaten = beaten_by([f.score for f in found], [f.seconds for f in found], SAME)
        best = [f for f, other in zip(found, beaten, strict=True) if other is None]
        return sorted(best, key=lambda f: (f.seconds, f.number))

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        return {name: _suggest(trial, name, d) for name, d in self.space.dimensions.items()}

    def _put_back(self, trial: optuna.Trial, params: Mapping[str, Any], why: str, retries: int | None = None) -> None:
        """The trial fails, and what it tried is tried again next. ``retries``: how often its worker was killed."""
        kept = trial.user_attrs.get("retries", 0) if retries is None else retries
        self._tell(trial, TrialState.FAIL, why)
        self._study.enqueue_trial(dict(params), user_attrs={"retries": kept})
        self.on_event(Event("back", trial.number, why))

    def _tell(self, trial: optuna.Trial, state: TrialState, why: str) -> None:
        trial.set_user_attr("why", why)
        self._study.tell(trial, state=state)

    def _recover(self) -> None:
        """Trials that were under way when an earlier session was killed fail, and are put back."""
        for t in self.trials:
            if t.state == TrialState.RUNNING:
                self._study.tell(t.number, state=TrialState.FAIL)
                if set(t.params) == set(self.space.dimensions):
                    self._study.enqueue_trial(t.params, user_attrs={"retries": t.user_attrs.get("retries", 0)})
                self.on_event(Event("back", t.number, "the search was killed"))

    # ---------------------------------------------------------------------------------------- before training

    def _data_of(self, cell: Cell) -> DataSource:
        key = cell.recipe.data.model_dump_json()
        if key not in self._data:
            self._data[key] = load_data(cell.recipe)
        return self._data[key]

    def _speed(self, cell: Cell) -> Speed:
        """Measured once for each network."""
        key = _network(cell)
        if key not in self._speeds:
            self._speeds[key] = probe_speed(cell.recipe, InputSpec.of(self._data_of(cell)))
        return self._speeds[key]

    def _cost(self, cell: Cell) -> float:
        """Seconds that a trial takes, with the runs it starts from that are not trained yet."""
        total = 0.0
        for each in cell.with_needs():
            if each.hash not in self._costs:
                teacher = each.needs[TEACHER].recipe if TEACHER in each.needs else None
                self._costs[each.hash] = probe_training(each.recipe, self._data_of(each), teacher)
            action = self._look(each).action
            if action == Action.resume:
                run = read_run(self.places.run_dir(each))
                total += self._costs[each.hash] * (1 - run["epochs_done"] / run["epochs"])
            elif action != Action.done:
                total += self._costs[each.hash]
        return total

    def _pace(self) -> float:
        """How much longer trainings took than estimated."""
        known = [
            t.user_attrs["trained"] / t.user_attrs["estimate"]
            for t in self.trials
            if t.user_attrs.get("trained") and t.user_attrs.get("estimate")
        ]
        return summary(known).mean if known else 1.0

    def _look(self, cell: Cell) -> Step:
        return look(cell, self.places, test=False, refresh=True, for_run=True)

    def check_budget(self, minutes: float) -> float:
        """Seconds that the next trial is estimated to take, before anything is trained.

        Raises:
            RunError: that is more than the budget.
        """
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        tried = [{**self.space.first, **t.system_attrs.get("fixed_params", {})} for t in waiting[:1]] + [
            self.space.first
        ]
        costs = [self._cost(self.space.cell(params)) * self._pace() for params in tried]
        seconds, params = min(zip(costs, tried, strict=True), key=lambda each: each[0])
        if seconds > 60 * minutes:
            raise RunError(
                f"{minutes:g} minutes are too few for one trial: {_words(params)} takes about {seconds / 60:.1f} minutes "
                f"here (a few steps were timed); give --minutes {math.ceil(1.25 * seconds / 60)} or more, or a smaller one first"
            )
        return seconds

    # ---------------------------------------------------------------------------------------- running

    def run(self, minutes: float, trials: int | None = None) -> None:
        """Search for so many minutes, and train at most so many trials.

        A trial that does not fit into what is left of the time is not begun. What is under way at the end, or when this is interrupted, is
        put back and goes on the next time.

        Raises:
            RunError: the budget is too small for one trial, or trials fail one after the other. KeyboardInterrupt.
        """
        self._recover()
        self.check_budget(minutes)
        self._end_at = time.monotonic() + 60 * minutes
        self._left = math.inf if trials is None else trials
        self._open_for_more, self._same, self._broken, self._too_long = True, 0, 0, 0
        later: list[tuple[optuna.Trial, dict[str, Any]]] = []
        with interruptible():
            try:
                while True:
                    self._fill(later)
                    if not self._active:
                        break
                    futures = [a.future for a in self._active if a.future is not None]
                    done, _ = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                    if not futures:
                        time.sleep(POLL_SECONDS)
                    for active in [a for a in self._active if a.future in done]:
                        self._ended(active)
                    self._watch()
                    if time.monotonic() > self._end_at:
                        self._leave("the time was over")
                        break
            except BaseException:
                self._leave("interrupted")
                raise
            finally:
                for trial, params in later:
                    self._put_back(trial, params, "it did not fit into the time that was left")

    def _fill(self, later: list[tuple[optuna.Trial, dict[str, Any]]]) -> None:
        """Ask for trials and start trainings while there is room."""
        self._advance()
        while self._open_for_more and self._left > 0 and self._running() < self.executor.slots:
            if len(self._active) >= 2 * self.executor.slots:  # the others wait for a run that is under way
                break
            self._ask(later)
            self._advance()

    def _running(self) -> int:
        return sum(active.future is not None for active in self._active)

    def _ask(self, later: list[tuple[optuna.Trial, dict[str, Any]]]) -> None:
        """The next trial: known already, too slow, too long, or begun."""
        if time.monotonic() > self._end_at:
            self._open_for_more = False
            return
        trial = self._study.ask()
        params = self._suggest(trial)
        try:
            cell = self.space.cell(params)
            before = self._same_as(cell)
            if before is not None:
                self._same += 1
                self._open_for_more = self._same < min(SAME_AGAIN, 2 * self.space.size)
                self._repeat(trial, before)
                return
            self._same = 0
            trial.set_user_attr("hash", cell.hash)
            speed = self._speed(cell)
            trial.set_user_attr("ms", 1e3 * speed.seconds)
            trial.set_user_attr("file_bytes", speed.file_bytes)
            trial.set_user_attr("network", _network(cell))
            limit = self.space.config.limit_ms
            if limit is not None and 1e3 * speed.seconds > limit:
                why = f"{1e3 * speed.seconds:.3g} ms: slower than the limit of {limit:g}"
                self._tell(trial, TrialState.PRUNED, why)
                self.on_event(Event("skip", trial.number, f"{_words(params)}: {why}"))
                return
            cost = self._cost(cell)
        except (RecipeError, FreezeError, RunError) as error:
            self._fail(trial, f"{_words(params)}: {error}")
            return
        if time.monotonic() + cost * self._pace() > self._end_at:
            later.append((trial, params))
            self._too_long += 1
            self._open_for_more = self._too_long < TOO_LONG
            return
        trial.set_user_attr("estimate", self._costs[cell.hash])
        self._left -= 1
        self._active.append(_Active(trial, params, cell, speed))
        self.on_event(Event("start", trial.number, f"{_words(params)}; {1e3 * speed.seconds:.3g} ms"))

    def _same_as(self, cell: Cell) -> FrozenTrial | _Active | None:
        for active in self._active:
            if active.cell.hash == cell.hash:
                return active
        for t in self.trials:
            known = t.state in (TrialState.COMPLETE, TrialState.PRUNED)
            if known and t.user_attrs.get("hash") == cell.hash and "same_as" not in t.user_attrs:
                return t
        return None

    def _repeat(self, trial: optuna.Trial, before: FrozenTrial | _Active) -> None:
        """A recipe that is known ends as it did then."""
        if isinstance(before, _Active):
            self._tell(trial, TrialState.FAIL, f"the same as trial {before.trial.number}, which is under way")
            return
        trial.set_user_attr("same_as", before.number)
        if before.state == TrialState.COMPLETE:
            self._study.tell(trial, before.values)
        else:
            self._tell(trial, TrialState.PRUNED, f"the same as trial {before.number}")

    def _advance(self) -> None:
        """Start what can be started of the trials that are not being trained."""
        for active in list(self._active):
            if active.future is None and self._running() < self.executor.slots:
                try:
                    self._next_step(active)
                except (RunError, RemoteError, RecipeError, OSError) as error:
                    self._drop(active)
                    self._fail(active.trial, str(error))

    def _next_step(self, active: _Active) -> None:
        """Start the first of a trial's cells that is not trained, or complete it."""
        for cell in active.cell.with_needs():
            step = self._look(cell)
            if step.action == Action.done:
                continue
            if any(a.under_way is not None and a.under_way.cell.key == cell.key for a in self._active):
                return
            run_dir = self.places.run_dir(cell)
            descriptor = lock(self.places.beside(cell, ".lock").with_name(f".{cell.run}.lock"))
            if descriptor is None or not withdraw(run_dir):  # a worker that an earlier session left behind
                if descriptor is not None:
                    os.close(descriptor)
                if not active.told:
                    active.told = True
                    self.on_event(
                        Event("wait", active.trial.number, f"{run_dir} is trained by a worker of an earlier session")
                    )
                return
            try:
                future, active.log_start, _ = launch(
                    self.space.name, step, self.places, self.executor, descriptor, test=False
                )
            except BaseException:
                os.close(descriptor)
                raise
            active.future, active.under_way, active.descriptor, active.epochs_done = future, step, descriptor, -1
            if cell is not active.cell:
                text = f"{cell.label}, which it starts from" + (" (goes on)" if step.action == Action.resume else "")
                self.on_event(Event("run", active.trial.number, text, total=cell.recipe.train.epochs))
            return
        self._complete(active)

    def _complete(self, active: _Active) -> None:
        run = read_run(self.places.run_dir(active.cell))
        score = float(run["results"]["validation"][self.metric])
        active.trial.set_user_attr("trained", run["wall_seconds"])
        self._note_rungs(active)
        self._study.tell(active.trial, [score, 1e3 * active.speed.seconds])
        self._drop(active)
        self._broken = 0
        text = (
            f"{_score(score, self.metric)} held out, {1e3 * active.speed.seconds:.3g} ms, {run['wall_seconds']:.0f} s"
        )
        on_front = any(f.number == active.trial.number for f in self.front)
        self.on_event(Event("finish", active.trial.number, text + (", on the front" if on_front else "")))

    def _ended(self, active: _Active) -> None:
        """What its training came to."""
        assert active.future is not None
        assert active.under_way is not None
        future, step, trial = active.future, active.under_way, active.trial
        self._release(active)
        try:
            code = exit_status(future)
        except (RunError, RemoteError, OSError) as error:
            self._drop(active)
            self._fail(trial, str(error))
            return
        own = step.cell is active.cell
        if code == 0 or self._look(step.cell).action == Action.done:  # 1 where pictures were passed over
            self._advance()
        elif own and active.pruned:
            self._drop(active)
            self._tell(trial, TrialState.PRUNED, active.pruned)
            self.on_event(Event("prune", trial.number, active.pruned))
        elif code < 0:
            retries = active.trial.user_attrs.get("retries", 0) + 1
            why = f"its worker was killed ({signal.Signals(-code).name})"
            self._drop(active)
            if retries > RETRIES:
                self._fail(trial, f"{why}, {retries} times")
            else:
                self._put_back(trial, active.params, why, retries)
        else:
            log = self.places.beside(step.cell, ".log")
            words = last_words(log, active.log_start) or f"exit status {code}"
            self._drop(active)
            self._fail(trial, f"{'' if own else f'{step.cell.label}: '}{words} (log: {log})")

    def _fail(self, trial: optuna.Trial, why: str) -> None:
        self._tell(trial, TrialState.FAIL, why)
        self.on_event(Event("fail", trial.number, why))
        self._broken += 1
        if self._broken >= BROKEN:
            raise RunError(f"{BROKEN} trials in a row failed, the last one: {why}")

    def _release(self, active: _Active) -> None:
        if active.descriptor >= 0:
            os.close(active.descriptor)
        active.descriptor, active.future, active.under_way = -1, None, None

    def _drop(self, active: _Active) -> None:
        self._release(active)
        self._active.remove(active)

    def _leave(self, why: str) -> None:
        """Interrupt everything, and put it back."""
        self.executor.stop()
        for active in list(self._active):
            self._drop(active)
            self._put_back(active.trial, active.params, why)

    # ---------------------------------------------------------------------------------------- rungs

    def _watch(self) -> None:
        for active in self._active:
            step = active.under_way
            if step is None:
                continue
            with suppress(RunError):
                done = read_run(self.places.run_dir(step.cell))["epochs_done"]
                if done != active.epochs_done:
                    active.epochs_done = done
                    total = step.cell.recipe.train.epochs
                    self.on_event(Event("epoch", active.trial.number, done=done, total=total))
                    if step.cell is active.cell:
                        self._note_rungs(active)
                        self._judge(active)

    def _note_rungs(self, active: _Active) -> None:
        """Keep what the trial scored at each rung that it has passed."""
        rows = read_metrics(self.places.run_dir(active.cell))
        scores = {row["epoch"]: row[f"val_{self.metric}"] for row in rows}
        own = self._rungs.setdefault(active.trial.number, {})
        passed = {str(r): scores[r] for r in self.space.config.prune.rungs if scores.get(r) is not None}
        if passed.keys() - own.keys():
            epochs = {"epochs": active.cell.recipe.train.epochs}
            own.update(passed, **epochs)
            active.trial.set_user_attr("rungs", own)

    def _judge(self, active: _Active) -> None:
        """Stop a trial that another one has left behind at the last rung it has passed."""
        if active.pruned or active.epochs_done >= active.cell.recipe.train.epochs:
            return
        margin = self.space.config.prune.margin / unit(self.metric)[1]
        own = self._rungs[active.trial.number]
        speeds = {t.number: t.user_attrs.get("ms", math.inf) for t in self.trials}
        for rung in sorted((key for key in own if key != "epochs"), key=int, reverse=True)[:1]:
            rivals = [
                number
                for number, theirs in self._rungs.items()
                if number != active.trial.number
                and theirs.get("epochs") == own["epochs"]
                and speeds.get(number, math.inf) <= 1e3 * active.speed.seconds * (1 + SAME)
                and theirs.get(rung, -math.inf) >= own[rung] + margin
            ]
            if rivals:
                best = max(rivals, key=lambda n: self._rungs[n][rung])
                active.pruned = (
                    f"{_score(own[rung], self.metric)} after epoch {rung}, where trial {best}, no slower, had "
                    f"{_score(self._rungs[best][rung], self.metric)}"
                )
                assert active.under_way is not None
                self.executor.interrupt(self.places.run_dir(active.under_way.cell))


def _suggest(trial: optuna.Trial, name: str, d: Dimension) -> Any:
    if d.names is not None:
        return trial.suggest_categorical(name, d.names)
    assert d.low is not None
    assert d.high is not None
    if d.integer:
        return trial.suggest_int(name, int(d.low), int(d.high), step=int(d.step or 1), log=d.log)
    return trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)


def _network(cell: Cell) -> str:
    """What tells a trial's network from others, its weights apart."""
    recipe = cell.recipe
    plain = [recipe.task, recipe.model.model_dump(mode="json"), recipe.quantize.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _words(params: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def _score(value: float, metric: str) -> str:
    name, factor, digits = unit(metric)
    return f"{factor * value:.{digits}f} {name}".strip()
