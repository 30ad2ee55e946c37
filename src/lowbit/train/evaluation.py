"""Accuracy, or PSNR and SSIM, of what there is already: a run's training graph, or a .lowbit file on the engine."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lowbit.graph import Graph
from lowbit.packfile import read
from lowbit.predict import ImageError
from lowbit.published import published
from lowbit.runtime import Engine, load
from lowbit.train.data import DATASETS, DataError, DataSource, ImageData, cifar, rounds
from lowbit.train.data.images import Part
from lowbit.train.data.superres import Pictures, find_pictures
from lowbit.train.freeze import to_numpy
from lowbit.train.recipe import Recipe, load_recipe, parse_recipe
from lowbit.train.resize import resize_bicubic
from lowbit.train.rundir import InputSpec, read_run, write_json
from lowbit.train.tasks.classify import CONFUSION_CLASSES
from lowbit.train.tasks.superres import compare, means
from lowbit.train.trainer import evaluate, load_data, load_run
from lowbit.upscale import Upscaler
from lowbit.zoo import card_at, locate

__all__ = ["evaluate_file", "evaluate_pictures", "evaluate_run", "task_of"]

BATCH = 500
_log = logging.getLogger(__name__)


def evaluate_run(run_dir: str | os.PathLike[str], data: str | None = None, split: str = "val") -> dict[str, Any]:
    """Evaluate the training graph of a finished run.

    Args:
        run_dir: the run.
        data: another folder for the recipe's data set; None for the recipe's own. Of super-resolution any folder of pictures,
            all of which are used.
        split: "val" or "test". With ``train.final`` the network was trained on the images of "val": a warning says so.

    Returns:
        What ``Task.evaluate`` gives, of classification ``accuracy`` (0 to 1), ``loss``, ``images``, ``confusion``, of
        super-resolution ``psnr``, ``ssim`` and what else ``tasks.superres.means`` gives; ``metric`` and ``computed_by``. Of the latter
        also ``broken``, the names of pictures that were passed over, and ``written``, the file in the run directory that holds all
        this: ``evaluation-SPLIT.json``, or of a folder ``evaluation-folder-NAME.json`` (a warning says where it can't be written); and
        ``published``, where the folder is a standard set (`lowbit.published`), with ``set, scale, psnr``.

    Raises:
        RunError: not a finished run. DataError: the data is missing.
    """
    with _option_named(data):
        return _evaluate_run(run_dir, data, split)


def _evaluate_run(run_dir: str | os.PathLike[str], data: str | None, split: str) -> dict[str, Any]:
    run_dir = Path(run_dir)
    recipe, model = load_run(run_dir)
    run = read_run(run_dir)
    spec = InputSpec.from_json(run["input"])
    t = recipe.train
    by = {"metric": run["metric"], "computed_by": "the training graph"}
    if not spec.classes:
        name, source, part = _pictures(recipe, data, split, spec.upscale)
        found = dict(evaluate(model, recipe, spec, source.evaluation(part, 1)))
        found |= {**by, "broken": list(source.broken), **_papers(data, spec.upscale, found)}
        return _kept(run_dir / f"evaluation-{name}.json", found)
    batches = _split(_of_recipe(recipe, data, split), split, spec.classes, t.eval_batch_size, t.workers)
    return {**evaluate(model, recipe, spec, batches), **by}


def evaluate_file(
    path: str | os.PathLike[str], data: str | None = None, split: str = "val", threads: int = 1
) -> dict[str, Any]:
    """Evaluate a file on the engine.

    Args:
        path: a .lowbit file, or the name of a network of the zoo.
        data: for a file in a run directory, or of the zoo, another folder for its recipe's data set (None for the recipe's own).
            Else, and always for the name of a data set: that name, or a folder: the files of Fashion-MNIST or CIFAR, or one folder
            of images for each class (all of them are used where there is no ``test`` folder). Of super-resolution any folder of
            pictures.
        split: "val" or "test", as in ``evaluate_run``.
        threads: of the engine.

    Returns:
        ``accuracy`` (0 to 1), ``images``, ``confusion`` (rows are truth), ``metric``, ``computed_by``; of super-resolution as
        ``evaluate_run`` but for the loss, and ``written`` (``evaluation-SPLIT-engine.json``) for a file in a run directory only.

    Raises:
        FileError: not a lowbit file. DataError: no data, or of other classes.
    """
    with _option_named(data):
        return _evaluate_file(locate(path), data, split, threads)


def _evaluate_file(path: Path, data: str | None, split: str, threads: int) -> dict[str, Any]:
    graph = read(path)
    if graph.meta.get("task") == "superres":
        return _evaluate_pictures(path, graph, data, split, threads)
    engine = load(graph, threads=threads)
    recipe = _recipe_of(path)
    classes = tuple(engine.meta.get("classes", ()))
    if recipe is not None and data not in DATASETS:
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
        "metric": "accuracy",
        "computed_by": _by(engine.isa, engine.threads),
    }


def task_of(path: str | os.PathLike[str]) -> str:
    """The task, "classify" or "superres", of a run directory, a .lowbit file, or a network of the zoo by its name.

    Raises:
        RunError: a folder that is no run. FileError: not a lowbit file.
    """
    if Path(path).is_dir():
        return str(read_run(Path(path))["task"])
    return str(read(locate(path)).meta.get("task", "classify"))


@contextmanager
def _option_named(data: str | None) -> Iterator[None]:
    """Data sets speak of a recipe's key; who names a folder has written none."""
    try:
        yield
    except DataError as error:
        if data is None or data in DATASETS:
            raise
        raise DataError(str(error).replace("data.root", "--data")) from None


def _by(isa: str, threads: int) -> str:
    return f"the engine, {isa}, {threads} thread{'s'[: threads > 1]}"


def _recipe_of(path: Path) -> Recipe | None:
    """The recipe that a file in a run directory, or in the zoo, was trained by; None for any other."""
    beside = path.parent / "recipe.yaml"
    if beside.is_file():
        return load_recipe(beside)
    card = card_at(path)
    return None if card is None else parse_recipe(dict(card.recipe), f"the card of {card.name}")


def _evaluate_pictures(path: Path, graph: Graph, data: str | None, split: str, threads: int) -> dict[str, Any]:
    upscaler = Upscaler(graph, threads)
    scale = upscaler.scale
    recipe = _recipe_of(path)
    if recipe is None and data is None:
        raise DataError(f"{path}: lies in no run directory; say what to evaluate on with --data")
    name, source, part = _pictures(recipe, data, split, scale)
    found = {
        **evaluate_pictures(upscaler, source, part),
        "metric": "psnr",
        "computed_by": _by(upscaler.isa, threads),
        "broken": list(source.broken),
    }
    found |= _papers(data, upscaler.scale, found)
    in_run = (path.parent / "recipe.yaml").is_file()
    return _kept(path.parent / f"evaluation-{name}-engine.json", found) if in_run else found


def evaluate_pictures(upscaler: Upscaler, source: Pictures, part: Part) -> dict[str, Any]:
    """What `tasks.superres.means` gives of the pictures of a part, enlarged by the engine."""
    scale, rows = upscaler.scale, []
    for pair in source.pairs(part):
        low, high = (x[0, 0].numpy() for x in pair)
        try:
            bicubic = resize_bicubic(pair[0], scale)[0, 0].numpy()
            rows.append(compare(pair.name, upscaler(low), bicubic, high, scale))
        except MemoryError:
            source.pass_over(pair.name, ImageError(f"{pair.name}: not enough memory is free to measure it"))
    return means(rows)


def _papers(data: str | None, scale: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """``published`` where these are the pictures that papers report on."""
    folder = "" if data is None else Path(data).resolve().name
    there = published(folder, found["images"], scale, found["psnr_bicubic"])
    return {} if there is None else {"published": {"set": there[0], "scale": scale, "psnr": there[1]}}


def _kept(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Written beside the run; what was measured is not lost where that can't be done."""
    try:
        write_json(path, found)
    except OSError as error:
        _log.warning("%s: not written (%s); what was measured is not kept", path, error.strerror or error)
        return found
    return {**found, "written": str(path)}


def _pictures(recipe: Recipe | None, data: str | None, split: str, scale: int) -> tuple[str, Pictures, Part]:
    """What to call them, the pictures, and which part of them: all those of a folder; else of the data set named, or of the recipe's.

    A folder's name alone could be that of a split, whose result the report shows.
    """
    part: Part = "test" if split == "test" else "val"
    if data is not None and data not in DATASETS:
        folder = Path(data)
        found = find_pictures(folder, scale)
        return f"folder-{folder.resolve().name}", Pictures(str(folder), (), (), found, scale), "test"
    if data is None:
        assert recipe is not None
        name, source = split, _of_recipe(recipe, None, split)
    else:
        known = DATASETS.get(data)
        if "scale" not in inspect.signature(known).parameters:
            raise DataError(f"{data}: is a data set for classification; super-resolution is measured on pictures")
        name, source = f"{data}-{split}", known(scale=scale)
    assert isinstance(source, Pictures)
    return name, source, part


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
