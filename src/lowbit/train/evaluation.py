"""Accuracy of what there is already: a run's training graph, or a .lowbit file on the engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.runtime import Engine, load
from lowbit.train.data import DATASETS, DataError, DataSource, ImageData, cifar, rounds
from lowbit.train.data.images import Part
from lowbit.train.freeze import to_numpy
from lowbit.train.recipe import Recipe, load_recipe
from lowbit.train.rundir import InputSpec, read_run
from lowbit.train.tasks.classify import CONFUSION_CLASSES
from lowbit.train.trainer import evaluate, load_data, load_run

__all__ = ["evaluate_file", "evaluate_run"]

BATCH = 500
_log = logging.getLogger(__name__)


def evaluate_run(run_dir: str | os.PathLike[str], data: str | None = None, split: str = "val") -> dict[str, Any]:
    """Evaluate the training graph of a finished run.

    Args:
        run_dir: the run.
        data: another folder for the recipe's data set; None for the recipe's own.
        split: "val" or "test". With ``train.final`` the network was trained on the images of "val": a warning says so.

    Returns:
        ``accuracy`` (0 to 1), ``loss``, ``images``, ``confusion``, ``computed_by``.

    Raises:
        RunError: not a finished run. DataError: the data is missing.
    """
    run_dir = Path(run_dir)
    recipe, model = load_run(run_dir)
    spec = InputSpec.from_json(read_run(run_dir)["input"])
    t = recipe.train
    batches = _split(_of_recipe(recipe, data, split), split, spec.classes, t.eval_batch_size, t.workers)
    return {**evaluate(model, recipe, spec, batches), "computed_by": "the training graph"}


def evaluate_file(
    path: str | os.PathLike[str], data: str | None = None, split: str = "val", threads: int = 1
) -> dict[str, Any]:
    """Evaluate a file on the engine.

    Args:
        path: a .lowbit file.
        data: for a file in a run directory another folder for the run's data set (None for the run's own). Else, and always for the
            name of a data set: that name, or a folder: the files of Fashion-MNIST or CIFAR, or one folder of images for each
            class (all of them are used where there is no ``test`` folder).
        split: "val" or "test", as in ``evaluate_run``.
        threads: of the engine.

    Returns:
        ``accuracy`` (0 to 1), ``images``, ``confusion`` (rows are truth), ``computed_by``.

    Raises:
        FileError: not a lowbit file. DataError: no data, or of other classes.
    """
    engine = load(path, threads=threads)
    beside = Path(path).parent / "recipe.yaml"
    classes = tuple(engine.meta.get("classes", ()))
    if beside.is_file() and data not in DATASETS:
        recipe = load_recipe(beside)
        batches = _split(_of_recipe(recipe, data, split), split, classes, workers=recipe.train.workers)
    elif data is None:
        raise DataError(f"{os.fspath(path)}: lies in no run directory; say what to evaluate on with --data")
    else:
        batches = _of_folder(engine, data, split, classes)
    count = len(classes)
    confusion = np.zeros((count, count), np.int64)
    for images, truth in batches:
        answers = engine(to_numpy(images)).reshape(len(images), -1).argmax(axis=1)
        np.add.at(confusion, (truth.numpy(), answers), 1)
    total = int(confusion.sum())
    if not total:
        raise DataError(f"{data}: none of the images can be read")
    return {
        "accuracy": int(confusion.trace()) / total,
        "images": total,
        "confusion": confusion.tolist() if count <= CONFUSION_CLASSES else None,
        "computed_by": f"the engine, {engine.isa}, {engine.threads} thread{'s'[: engine.threads > 1]}",
    }


def _of_recipe(recipe: Recipe, folder: str | None, split: str) -> DataSource:
    if recipe.train.final and split == "val":
        _log.warning("%s: was trained on the held-out images too (train.final); --split test measures it", recipe.name)
    if folder is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": folder})})
    return load_data(recipe)


def _of_folder(engine: Engine, data: str, split: str, classes: tuple[str, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    if data in DATASETS and data != "image_folder":
        return _split(DATASETS.get(data)(), split, classes)
    folder = Path(data)
    if any(folder.glob("*-idx3-ubyte.gz")):
        return _split(DATASETS.get("fashion_mnist")(root=folder), split, classes)
    for layout in (cifar.CIFAR10, cifar.CIFAR100):
        if cifar.there(layout, folder) is not None:
            return _split(DATASETS.get(layout.name)(root=folder), split, classes)
    height, width, channels = engine.input_shape
    if height != width:
        raise DataError(f"{folder}: the network reads {height}x{width} images; folders are read as squares")
    resize = engine.meta.get("image", {}).get("resize")
    found = DATASETS.get("image_folder")(root=folder, size=height, channels=channels, resize=resize)
    if (folder / "test").is_dir():
        return _split(found, split, classes)
    assert isinstance(found, ImageData)
    _check_classes(found, classes)
    return rounds(found.full_x, found.full_y, BATCH)


def _split(
    data: DataSource, split: str, classes: tuple[str, ...], batch_size: int = BATCH, workers: int | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    _check_classes(data, classes)
    part: Part = "test" if split == "test" else "val"
    if not data.count(part):
        raise DataError(f"{data.name}: no {split} images")
    return data.evaluation(part, batch_size, workers=workers)


def _check_classes(data: DataSource, classes: tuple[str, ...]) -> None:
    if not classes:
        raise DataError("the file does not name its classes; freeze(..., meta={'classes': [...]}) writes them")
    if tuple(data.classes) != classes:
        raise DataError(
            f"{data.name}: has the classes {', '.join(data.classes[:5])}, ...; the network answers "
            f"{', '.join(classes[:5])}, ..."
        )
