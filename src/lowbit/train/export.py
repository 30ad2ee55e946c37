"""export: a finished run -> a .lowbit file, with the proof that it is the network that was trained."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.files import write_atomic
from lowbit.graph import Graph
from lowbit.packfile import FileError, dumps
from lowbit.train.data import DataSource
from lowbit.train.data.images import Part
from lowbit.train.freeze import freeze
from lowbit.train.layers import constant_weights
from lowbit.train.network import float_network
from lowbit.train.proof import DECISION_BATCH, Proof, prove, prove_pictures
from lowbit.train.recipe import Recipe
from lowbit.train.rundir import EXPORTING, InputSpec, RunLock, read_run, write_json
from lowbit.train.trainer import load_data, load_run

MIN_INPUTS, PROBE_BATCH = 500, 64
CROP, INPUTS_A_CROP = 64, 32
"""Of super-resolution: the side of a crop, which is the size that the file names, and the inputs that a crop counts for: it
has more pixels than five of the 28x28 images that the proof's 500 are meant for, and each of them is a result."""


class ExportError(ValueError):
    """The proof failed: what was frozen is not what was trained. The message says where they part."""


@dataclass(frozen=True)
class Export:
    """What `export_run` wrote.

    Attributes:
        path: the file.
        graph: what is in it.
        proof: see `lowbit.train.proof`.
        file_bytes: its size.
        float_bytes: 4 bytes for every parameter of the float32 network of the same recipe.
    """

    path: Path
    graph: Graph = field(repr=False)
    proof: Proof
    file_bytes: int
    float_bytes: int


def export_run(
    run_dir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    inputs: int = 512,
    data: DataSource | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Export:
    """Freeze a finished run into a file, load that file into the engine and prove the two equal; then give it its name.

    Interpreter and engine are compared on validation images, decisions over the whole test set, which is read once, here;
    a data set without one gives its validation images.

    Args:
        run_dir: the run.
        output: the file; `run_dir`/model.lowbit by default. `run_dir`/proof.json is written either way.
        inputs: images to compare interpreter, engine and training graph on, at least 500; a data set with fewer gives all. Of
            super-resolution a crop of 64 x 64 counts for 32 of them.
        data: the run's data set; by default the recipe's own.
        on_progress: called with (stage, done, total).

    Raises:
        ExportError: the proof does not hold (proof.json says more; no file is written).
        RunError, DataError, FreezeError, FileError: see there.
    """
    if inputs < MIN_INPUTS:
        raise ExportError(f"the proof needs at least {MIN_INPUTS} inputs, not {inputs}")
    run_dir = Path(run_dir)
    path = Path(output) if output is not None else run_dir / "model.lowbit"
    read_run(run_dir)
    with RunLock(run_dir) as lock:
        lock.take()
        return _export(run_dir, path, inputs, data, on_progress)


def _export(
    run_dir: Path, path: Path, inputs: int, data: DataSource | None, on_progress: Callable[[str, int, int], None] | None
) -> Export:
    run = read_run(run_dir)
    if not path.parent.is_dir():
        raise FileError(f"{path}: there is no directory {path.parent}")
    if path.is_dir():
        raise FileError(f"{path}: is a folder; give the file a name")
    recipe, model = load_run(run_dir)
    data = data or load_data(recipe)
    spec = InputSpec.from_json(run["input"])
    probe = (_probe if spec.classes else crops)(data, inputs, recipe.train.workers)
    graph = freeze(model, probe[:1], meta=file_meta(recipe, spec, run["epochs_done"], data.resize))

    with tempfile.TemporaryDirectory(prefix=EXPORTING, dir=run_dir) as folder:
        # the engine that is proved loads the very bytes that will be the file
        content = dumps(graph)
        trial = Path(folder) / "model.lowbit"
        trial.write_bytes(content)
        engine = lowbit.load(trial)
        part: Part = "test" if data.has_test else "val"
        labelled = data.evaluation(part, DECISION_BATCH, workers=recipe.train.workers)
        with constant_weights(model):
            if spec.classes:
                proof = prove(model, graph, engine, probe, labelled, on_progress, data.count(part))
            else:
                count = data.count(part)
                proof = prove_pictures(model, graph, engine, probe, labelled, spec.upscale, on_progress, count)
    float_bytes = 4 * sum(p.numel() for p in float_network(recipe, spec).parameters())
    write_json(run_dir / "proof.json", {**proof.as_dict(), "file_bytes": len(content), "float_bytes": float_bytes})
    failures = proof.failures()
    if failures:
        raise ExportError(f"{run_dir}: the exported network is not the one that was trained: {'; '.join(failures)}")
    try:
        write_atomic(path, content)
    except OSError as e:
        raise FileError(f"{path}: can't be written: {e.strerror or e}") from None
    return Export(path, graph, proof, len(content), float_bytes)


def _probe(data: DataSource, count: int, workers: int | None) -> Tensor:
    """Validation images, and training images where these are too few; all there are where both together are."""
    found: list[Tensor] = []
    held_out = (x for x, _ in data.evaluation("val", PROBE_BATCH, workers=workers))
    for x in chain(held_out, data.calibration(count, PROBE_BATCH, workers=workers)):
        found.append(x)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def crops(data: DataSource, count: int, workers: int | None) -> Tensor:
    """Crops of the small held-out pictures, spread over them; of training patches where these are too small for one."""
    wanted = -(-count // INPUTS_A_CROP)
    pictures = [low for low, _ in data.evaluation("val", 1, workers=workers) if min(low.shape[2:]) >= CROP]
    if not pictures:
        return torch.cat(list(data.calibration(count, PROBE_BATCH, workers=workers)))
    places = [(x, top, left) for x in pictures for top in _starts(x.shape[2]) for left in _starts(x.shape[3])]
    chosen = [places[i * len(places) // wanted] for i in range(wanted)] if len(places) > wanted else places
    return torch.cat([x[..., top : top + CROP, left : left + CROP] for x, top, left in chosen])


def _starts(side: int) -> range:
    return range(0, side - CROP + 1, CROP)


def file_meta(recipe: Recipe, spec: InputSpec, epochs: int, resize: int | None) -> dict[str, Any]:
    """What the file of a run says about itself (docs/FORMAT.md), plain JSON."""
    size = {} if resize is None else {"resize": resize}
    of_task: dict[str, Any] = {"superres": {"scale": spec.upscale}}
    if spec.classes:
        image = {"height": spec.height, "width": spec.width, "channels": spec.channels, **size}
        of_task = {"classes": list(spec.classes), "image": image}
    meta = {
        "task": recipe.task,
        **of_task,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "epochs": epochs,
    }
    plain: dict[str, Any] = json.loads(json.dumps(meta))
    return plain
