"""Train a recipe into a run directory: what is built, claimed, fitted with Lightning and left behind."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lowbit.train.data import DATASETS, Augment, DataError, DataSource, TrainingBatches
from lowbit.train.data.images import Part
from lowbit.train.distill import Distillation, load_distillation
from lowbit.train.distributed import (
    Ranks,
    check_equal_recipes,
    check_launch,
    join,
    leaves_parameters_out,
    once_a_machine,
)
from lowbit.train.freeze import FreezeError, freeze
from lowbit.train.module import TrainingModule, calibrate, network_checkpoint
from lowbit.train.network import build_network, load_run
from lowbit.train.prepare import mapping_parameters
from lowbit.train.quantizers import QuantizerWarning
from lowbit.train.recipe import ELSEWHERE, Recipe, RecipeError, differing_keys, load_recipe
from lowbit.train.rundir import (
    FORMAT,
    LOCK,
    InputSpec,
    RunError,
    RunLock,
    check_same_data,
    empty,
    fingerprint,
    never_started,
    now,
    read_checkpoint,
    read_metrics,
    read_run,
    session,
    sessions,
    write_checkpoint,
    write_json,
    write_text,
)
from lowbit.train.start import check_start, read_start
from lowbit.train.tasks import TASKS, Task

__all__ = ["RunResult", "build_network", "evaluate", "load_data", "load_run", "train"]

GAP_LIMIT = 0.01
"""Above this mean |W_c - W_q| at the end, the network that was trained is not the one that is kept."""

_log = logging.getLogger("lowbit.train")


@dataclass(frozen=True)
class RunResult:
    """What ``train`` gives back: where the run lies, the network (calibrated, hard, in eval mode), its ``run.json``."""

    run_dir: Path
    model: nn.Module = field(repr=False)
    run: dict[str, Any]

    @property
    def results(self) -> dict[str, Any]:
        """``run.json``'s results."""
        return self.run["results"]


# ------------------------------------------------------------------------------------------------ building


def load_data(recipe: Recipe) -> DataSource:
    """The recipe's data set; images are read when they are first used.

    Raises:
        DataError: it is missing or broken.
    """
    return DATASETS.get(recipe.data.name)(root=recipe.data.root, **recipe.data.arguments)


def _starting_network(recipe: Recipe, spec: InputSpec) -> nn.Module:
    """The network as training begins with it; what its method needs for that is checked."""
    start = None if recipe.train.start_from is None else read_start(recipe.train.start_from)
    model = build_network(recipe, spec, start)
    try:
        check_start(model, start)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from None
    for key, without in (("warm_start", 0), ("mapping_lr_scale", 1)):
        if getattr(recipe.train, key) != without and not mapping_parameters(model):
            raise RecipeError(
                f"{recipe.name}: train.{key} needs a method with a mapping network, like lns; method "
                f"{recipe.quantize.method!r} has none"
            )
    return model


@contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """What quantizers warn of inside goes to ``notes``, each warning once; other warnings pass."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizerWarning)
        yield
    for each in caught:
        if not issubclass(each.category, QuantizerWarning):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif str(each.message) not in notes:
            notes.append(str(each.message))


def _try_out(model: nn.Module, recipe: Recipe, spec: InputSpec) -> list[str]:
    """Run and freeze a copy of the untrained network: what is wrong with it is said now, not after hours.

    Returns:
        Warnings: why it can't be exported, if it can't.

    Raises:
        RecipeError: it fails on the data's images, or gives something of another shape than the task's.
    """
    trial = copy.deepcopy(model).eval()
    x = spec.example(2)
    images = f"images of {spec.channels}x{spec.height}x{spec.width}"
    try:
        with torch.no_grad():
            y = trial(x)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"{recipe.name}: model {recipe.model.name!r} fails on {images}: {first}") from error
    shape, words = _task(recipe, spec).output_shape(spec)
    if not isinstance(y, Tensor) or y.shape != (2, *shape):
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise RecipeError(
            f"{recipe.name}: model {recipe.model.name!r} gives {got} for 2 {images}, not {(2, *shape)}: {words}"
        )
    try:
        freeze(trial, x)
    except FreezeError as error:
        return [f"this network can be trained but not exported: {error}"]
    return []


def _task(recipe: Recipe, spec: InputSpec) -> Task:
    try:
        return TASKS.get(recipe.task).of(recipe, spec)
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: {error}") from None


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    model: nn.Module, recipe: Recipe, spec: InputSpec, batches: Iterable[tuple[Tensor, Tensor]]
) -> Mapping[str, Any]:
    """Evaluate the hard network as it is (its BN statistics must be calibrated already) on ``DataSource.evaluation``;
    its mode is left as it was."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return _task(recipe, spec).evaluate(model, batches)
    finally:
        for module, training in modes:  # parents come first, so every module ends as it was
            module.train(training)


# ------------------------------------------------------------------------------------------------ a run


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's tips and notes on hardware; warnings of the network's own stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r"Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _device(recipe: Recipe) -> str:
    wanted = recipe.train.device
    if wanted == "gpu" and not torch.cuda.is_available():
        raise RecipeError("train.device: gpu, but PyTorch finds none here; use auto or cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _claim(run_dir: Path, lock: RunLock, recipe: Recipe, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Check that the directory may be used; the run.json that is resumed, or None. Nothing but the lock is written here."""
    if resume and overwrite:
        raise RunError("resume and overwrite exclude each other")
    ours = (run_dir / LOCK).is_file() or (run_dir / "run.json").is_file()
    if ours:
        lock.take()
    if never_started(run_dir):
        return None
    if resume:
        run = read_run(run_dir)
        if run["status"] == "finished":
            raise RunError(f"{run_dir}: this run is finished; there is nothing to resume")
        keys = differing_keys(recipe, load_recipe(run_dir / "recipe.yaml"), ELSEWHERE)
        if keys:
            raise RunError(
                f"{run_dir}: was started from another recipe; it differs in {', '.join(keys)}. "
                f"`lowbit train {run_dir} --resume` goes on with its own"
            )
        last = run_dir / "checkpoints" / "last.ckpt"
        if last.is_file():
            read_checkpoint(last, f"{run_dir} can't be resumed")
        return run
    if run_dir.exists() and not run_dir.is_dir():
        raise RunError(f"{run_dir}: is a file, not a directory")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not overwrite:
            raise RunError(
                f"{run_dir}: is not empty; choose another directory (--run-dir), or for a run that lies there --resume "
                "or --overwrite"
            )
        if not ours:
            raise RunError(f"{run_dir}: is not empty and not a run directory; it is not overwritten")
    return None


def _check_processes(run_dir: Path, before: Mapping[str, Any] | None, ranks: Ranks) -> None:
    count = ranks.world_size if before is None else before.get("processes", 1)
    if count != ranks.world_size:
        raise RunError(
            f"{run_dir}: was started with {count} processes, now there are {ranks.world_size}: a step would see other images; "
            f"resume with {count}"
        )


def train(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    test: bool = False,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train a recipe into a run directory.

    Before every evaluation BN is calibrated with hard weights on clean training images. Without ``train.final``
    the best network on the held-out images is kept, with it the last one, trained on all images. Same recipe, machine
    and number of threads give the same network, whether the run was interrupted or not.

    The run directory holds ``recipe.yaml``, ``run.json``, ``metrics.csv``, ``tensorboard/`` and ``checkpoints/`` with
    ``last.ckpt`` (for a resume), ``best.ckpt`` (not with ``train.final``) and ``final.ckpt``. Keys of ``run.json``:
    ``format, name, status ("running" | "finished" | "failed"), error, seed, started, code, versions, machine, sessions, finished,
    wall_seconds, resumed, processes, data, input, task, metric, parameters, epochs, epochs_done, broken_images,
    warnings, results``. ``sessions`` has ``started, code, versions, machine`` of every process that trained, the last of
    which stand beside it again. ``data`` is the fingerprint of the images; a resume with others is refused.
    ``broken_images`` are the names of those that were passed over (``data.broken: skip``).
    ``results`` is null until the end, then ``selected_epoch, gap, temperature, flips_start, train_seconds,
    images_per_second, validation, test``; the last two are null or ``{accuracy, loss, images, confusion}``.

    Where torchrun started several processes (docs/DISTRIBUTED.md) all of them call this with the same recipe and get the same
    result; rank 0 writes. ``processes`` of ``run.json`` says how many they were.

    Args:
        recipe: what to train.
        run_dir: where; must be empty or new.
        resume: go on with the unfinished run that lies there, from its last whole epoch; ``recipe`` is the run's own, but for
            the keys of ``ELSEWHERE``.
        overwrite: replace the run that lies there.
        test: evaluate the final network on the test images, once, at the end.
        progress: show a progress bar; by default where standard error is a terminal.
        callbacks: Lightning callbacks to add.

    Raises:
        RecipeError: the recipe can't be built, or its network not run on the data. DataError: the data is missing or
        broken. RunError: the directory can't be used, or the loss is not finite. Up to there nothing was written.
    """
    run_dir = Path(run_dir)
    with once_a_machine():
        check_launch(recipe)
        device = _device(recipe)
    ranks = join(device)
    ranks.begin()
    check_equal_recipes(recipe, ranks)
    with RunLock(run_dir) as lock:
        return _train(recipe, run_dir, ranks, lock, resume, overwrite, test, progress, callbacks)


@dataclass(frozen=True)
class _Parts:
    """What training needs, built from a recipe."""

    data: DataSource
    spec: InputSpec
    model: nn.Module
    teacher: Distillation | None
    batches: TrainingBatches
    calibration: Iterable[Tensor]
    task: Task
    notes: list[str]


def _build(recipe: Recipe, ranks: Ranks, before: Mapping[str, Any] | None, resumed: Path | None) -> _Parts:
    """Everything of a recipe that can be wrong before training."""
    t = recipe.train
    data = load_data(recipe)
    spec = InputSpec.of(data) if before is None else InputSpec.from_json(before["input"])
    task = _task(recipe, spec)
    notes: list[str] = []
    with _noting(notes):
        model = build_network(recipe, spec) if resumed else _starting_network(recipe, spec)
    teacher = None if t.distill is None else load_distillation(t.distill, spec)
    # a run that goes on has its notes in run.json
    notes = notes + _try_out(model, recipe, spec) if before is None and ranks.main else []
    augment = Augment(**recipe.data.augment.model_dump())
    part: Literal["train", "full"] = "full" if t.final else "train"
    try:
        batches = data.batches(
            t.batch_size,
            part=part,
            seed=recipe.seed,
            augment=augment,
            workers=t.workers,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        if len(batches) < t.accumulate:
            raise ValueError(f"accumulate = {t.accumulate}, but an epoch has {len(batches)} batches")
    except DataError:
        raise
    except ValueError as error:
        raise RecipeError(f"{recipe.name}: train.{error}") from None
    calibration = data.calibration(
        t.calibration_images or max(data.count("val"), t.eval_batch_size), t.eval_batch_size, workers=t.workers
    )
    return _Parts(data, spec, model, teacher, batches, calibration, task, notes)


def _train(
    recipe: Recipe,
    run_dir: Path,
    ranks: Ranks,
    lock: RunLock,
    resume: bool,
    overwrite: bool,
    test: bool,
    progress: bool | None,
    callbacks: Sequence[Callback],
) -> RunResult:
    device, t = _device(recipe), recipe.train
    training = session(device)  # now: the code may change while data is read
    before: dict[str, Any] | None = None
    with ranks.together():
        if ranks.main:
            before = _claim(run_dir, lock, recipe, resume, overwrite)
            _check_processes(run_dir, before, ranks)
    before = ranks.broadcast(before)
    last = run_dir / "checkpoints" / "last.ckpt"
    resumed = ranks.broadcast(last if resume and last.is_file() else None)
    with ranks.together():
        if resumed and not resumed.is_file():
            raise RunError(f"{resumed}: is not there on every machine; the run directory must lie where all see it")
        parts = _build(recipe, ranks, before, resumed)
        identity = fingerprint(parts.data)
        if before and "data" in before:
            way_out = "give it that again (data.root), or remove the run directory and train anew"
            check_same_data(f"{run_dir}:", before["data"], identity, way_out)
    data, spec, model, task, notes = parts.data, parts.spec, parts.model, parts.task, parts.notes

    earlier = sessions(before) if before else []
    run: dict[str, Any] = before or {
        "format": FORMAT,
        "name": recipe.name,
        "status": "running",
        "error": None,
        "seed": recipe.seed,
        **training,
        "sessions": [],
        "finished": None,
        "wall_seconds": 0.0,
        "resumed": 0,
        "processes": ranks.world_size,
        "data": identity,
        "input": spec.to_json(),
        "task": recipe.task,
        "metric": task.metric,
        # of the network that is kept
        "parameters": sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in mapping_parameters(model)),
        "epochs": t.epochs,
        "epochs_done": 0,
        "broken_images": [],
        "warnings": notes,
        "results": None,
    }
    if before:
        run |= {"name": recipe.name, "status": "running", "error": None, "finished": None}
        run |= {"resumed": before["resumed"] + 1, **{key: training[key] for key in ("code", "versions", "machine")}}
    run["sessions"] = [*earlier, training]

    def begin() -> None:
        new = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.take()
            if before is None:
                _claim(run_dir, lock, recipe, resume, overwrite)  # nobody was quicker
                empty(run_dir)
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            write_text(run_dir / "recipe.yaml", recipe.to_yaml())
            write_json(run_dir / "run.json", run)
        except OSError:
            if new:  # a full or read-only disk: no half of a run stays behind
                shutil.rmtree(run_dir, ignore_errors=True)
            raise

    with ranks.together():
        if ranks.main:
            begin()
    for warning in notes:
        _log.warning(warning)
    already, clock = float(run["wall_seconds"]), time.perf_counter()

    def note(status: str, error: str | None = None) -> None:
        run.update(
            status=status,
            error=error,
            finished=None if status == "running" else now(),
            wall_seconds=round(already + time.perf_counter() - clock, 3),
            epochs_done=len(read_metrics(run_dir)),
            broken_images=sorted({*run.get("broken_images", ()), *data.broken}),
        )
        write_json(run_dir / "run.json", run)

    try:
        module = TrainingModule(model, recipe, task, data, parts.calibration, run_dir, parts.teacher, ranks)
        module.after_epoch = lambda: note("running")  # so that a run that is killed tells how far it came
        _fit(module, parts.batches, spec, ranks, device, progress, callbacks, resumed)
        everywhere = {name for names in ranks.gather(data.broken) for name in names}
        run["broken_images"] = sorted(everywhere.union(run.get("broken_images", ())))
        with ranks.together():
            if ranks.main:
                with _back_on(device, model):
                    run["results"] = _finish(module, data, parts.calibration, test, run["warnings"])
                note("finished")
        run = ranks.broadcast(run)
        ranks.copy((*model.parameters(), *model.buffers()))
        model.eval()
    except BaseException as broken:
        error = ranks.failure(broken)
        stopped = isinstance(error, KeyboardInterrupt)
        if ranks.main:
            with suppress(OSError):  # a full disk can't be told about itself; the first error is the one to see
                note("failed", "interrupted" if stopped else f"{type(error).__name__}: {error}")
        if error is not broken:
            raise error from broken
        raise
    return RunResult(run_dir, model, json.loads(json.dumps(run)))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with SystemExit and leaves the signal ignored; this gives back what was there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning's own writes to the system's temporary folder and copies: a full disk leaves half a file, over a whole one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: ARG002
        write_checkpoint(Path(path), checkpoint)


def _strategy(model: nn.Module, spec: InputSpec, ranks: Ranks, device: str) -> str | DDPStrategy:
    if ranks.world_size == 1:
        return "auto"
    return DDPStrategy(
        process_group_backend="nccl" if device == "cuda" else "gloo",
        find_unused_parameters=leaves_parameters_out(model, spec),
        broadcast_buffers=False,  # every process has statistics of its own until the epoch ends, see TrainingModule
    )


def _fit(
    module: TrainingModule,
    batches: TrainingBatches,
    spec: InputSpec,
    ranks: Ranks,
    device: str,
    progress: bool | None,
    callbacks: Sequence[Callback],
    checkpoint: Path | None,
) -> None:
    t, run_dir = module.recipe.train, module.run_dir
    module.steps_per_epoch = len(batches) // t.accumulate
    if t.channels_last:
        for parameter in module.model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    bar = sys.stderr.isatty() if progress is None else progress
    extra: list[Callback] = [
        ModelCheckpoint(
            run_dir / "checkpoints",
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    ]
    if bar and ranks.main:
        extra.append(TQDMProgressBar(refresh_rate=20))
    with _quiet_lightning(), _interruptible():
        trainer = L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=ranks.local_world_size,
            num_nodes=ranks.world_size // ranks.local_world_size,
            strategy=_strategy(module.model, spec, ranks, device),
            use_distributed_sampler=False,  # the batches know their rank
            accumulate_grad_batches=t.accumulate,
            limit_train_batches=module.steps_per_epoch * t.accumulate,  # no step of fewer
            precision="bf16-mixed" if t.precision == "bf16" else "32-true",
            max_epochs=t.epochs,
            gradient_clip_val=t.grad_clip,
            logger=TensorBoardLogger(run_dir / "tensorboard", name="", version=""),
            callbacks=[*callbacks, *extra],
            enable_progress_bar=bar and ranks.main,
            enable_model_summary=False,
            log_every_n_steps=max(len(batches), 1),
            num_sanity_val_steps=0,
            default_root_dir=run_dir,
            plugins=[_WholeCheckpoints()],
        )
        trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _back_on(device: str, model: nn.Module) -> Iterator[None]:
    """Lightning leaves a network on the CPU when it ends; what evaluates it belongs on the device that trained it."""
    model.to(device)
    try:
        yield
    finally:
        model.cpu()


def _finish(
    module: TrainingModule, data: DataSource, calibration: Iterable[Tensor], test: bool, notes: list[str]
) -> dict[str, Any]:
    """Choose, calibrate, evaluate, write final.ckpt; the results."""
    model, recipe, run_dir = module.model, module.recipe, module.run_dir
    last = module.rows[-1]
    if last["temperature"] is not None and last["gap"] >= GAP_LIMIT:
        note = (
            f"the soft weights end {last['gap']:.3f} away from the hard ones (mean |W_c - W_q|, should be below "
            f"{GAP_LIMIT}): raise schedule.growth or train longer"
        )
        notes.append(note)
        _log.warning(note)
    selected = int(last["epoch"])
    if not recipe.train.final:
        best = read_checkpoint(run_dir / "checkpoints" / "best.ckpt", "best network")
        model.load_state_dict(best["state_dict"])
        selected = int(best["epoch"])
    calibrate(model, recipe, calibration)
    model.eval()
    t = recipe.train

    def measure(part: Part) -> Mapping[str, Any]:
        return module.task.evaluate(model, data.evaluation(part, t.eval_batch_size, workers=t.workers))

    validation = None if t.final else measure("val")
    tested = measure("test") if test else None
    write_checkpoint(run_dir / "checkpoints" / "final.ckpt", network_checkpoint(model, recipe, selected, data))
    seconds = sum(row["seconds"] for row in module.rows)
    return {
        "selected_epoch": selected,
        "gap": last["gap"],
        "temperature": last["temperature"],
        "flips_start": last["flips_start"],
        "train_seconds": round(seconds, 3),
        "images_per_second": float(np.median([row["images_per_second"] for row in module.rows])),
        "validation": validation,
        "test": tested,
    }
