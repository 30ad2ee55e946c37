"""A run directory: what a training run leaves behind, and how it is read again.

::

    recipe.yaml        the resolved recipe: load_recipe reads it back equal
    run.json           status, seed, versions, machine, input, results (see ``lowbit.train.trainer.train``)
    metrics.csv        one row for each epoch
    tensorboard/       the same numbers for TensorBoard
    checkpoints/       last.ckpt (everything a resume needs), best.ckpt, final.ckpt (the network alone)

Every file is written beside its place and then renamed, so none is ever half there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lowbit.machine
from lowbit.files import write_atomic
from lowbit.train.data import ImageData

__all__ = [
    "InputSpec",
    "RunError",
    "columns",
    "machine",
    "read_metrics",
    "read_run",
    "versions",
    "write_checkpoint",
    "write_json",
    "write_metrics",
    "write_text",
]

FORMAT = 1
_ALWAYS = ("status", "epochs", "epochs_done", "wall_seconds", "resumed", "input", "results")
"""Keys of run.json from the start on, which readers rely on."""


def columns(metric: str) -> tuple[str, ...]:
    """Columns of metrics.csv. ``metric`` is the task's ("accuracy", 0 to 1); an empty field was not measured."""
    return (
        "epoch",
        "step",
        "lr",
        "train_loss",
        f"train_{metric}",
        "val_loss",
        f"val_{metric}",
        "gap",
        "temperature",
        "flips_epoch",
        "flips_start",
        "images_per_second",
        "seconds",
    )


class RunError(RuntimeError):
    """A run directory that can't be used for what was asked; the message says what to do."""


@dataclass(frozen=True)
class InputSpec:
    """What the network reads and answers: all that building it again needs from the data."""

    channels: int
    height: int
    width: int
    zero_point: tuple[int, ...]
    scale: float
    classes: tuple[str, ...]

    @staticmethod
    def of(data: ImageData) -> InputSpec:
        """The input of a network for ``data``."""
        return InputSpec(*data.shape, tuple(data.zero_point), data.scale, tuple(data.classes))

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> InputSpec:
        """Read back what ``to_json`` gave."""
        values = dict(tree)
        values["zero_point"], values["classes"] = tuple(values["zero_point"]), tuple(values["classes"])
        return InputSpec(**values)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return json.loads(json.dumps(asdict(self)))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all (``write_atomic``)."""
    write_atomic(path, text.encode("utf-8"))


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """As ``write_text``, readable, keys in the order given."""
    write_text(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def write_checkpoint(path: Path, tree: Mapping[str, Any]) -> None:
    """With ``torch.save``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(tree), buffer)
    write_atomic(path, buffer.getvalue())


def write_metrics(path: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Write metrics.csv: the columns of ``columns``, floats so that they read back exactly, nothing for None."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = columns(metric)
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if row.get(c) is None else row[c] for c in names])
    write_text(path, stream.getvalue())


def read_metrics(run_dir: str | Path) -> list[dict[str, float | None]]:
    """The rows of a run's metrics.csv, numbers or None. An empty list before the first epoch ended.

    Raises:
        RunError: the file is damaged.
    """
    path = Path(run_dir) / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        try:
            return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(stream)]
        except (ValueError, TypeError) as error:
            raise RunError(f"{path}: is damaged ({error})") from None


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        RunError: no run directory, or run.json is broken.
    """
    path = Path(run_dir) / "run.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run_dir}: not a run directory (it has no run.json)") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise RunError(f"{path}: not a run of format {FORMAT}")
    missing = [key for key in _ALWAYS if key not in tree]
    if missing:
        raise RunError(f"{path}: is damaged, it lacks {', '.join(missing)}")
    return tree


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of everything a result may depend on."""
    return lowbit.machine.versions("lowbit", "torch", "lightning", "numpy")


def machine(device: str) -> dict[str, Any]:
    """Processor, cores and threads of this machine, and the GPU where one is used; no names, no paths."""
    return {
        **lowbit.machine.machine(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
