"""A run directory: what a training run leaves behind, and how it is read again.

::

    recipe.yaml        the resolved recipe: load_recipe reads it back equal
    run.json           status, seed, sessions, data, input, results (see ``lowbit.train.trainer.train``)
    metrics.csv        one row for each epoch
    tensorboard/       the same numbers for TensorBoard
    checkpoints/       last.ckpt (everything a resume needs), best.ckpt, final.ckpt (the network alone)
    run.lock           who writes here, while somebody does

Every file is written beside its place and then renamed, so none is ever half there.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import lowbit.machine
from lowbit.files import SUFFIX, remove_leftovers, write_atomic
from lowbit.remote import source_digest
from lowbit.train.data import DataSource
from lowbit.train.layers import Pixels

__all__ = [
    "InputSpec",
    "RunError",
    "RunLock",
    "check_same_data",
    "code_version",
    "columns",
    "empty",
    "fingerprint",
    "machine",
    "never_started",
    "read_checkpoint",
    "read_json",
    "read_metrics",
    "read_run",
    "session",
    "sessions",
    "versions",
    "write_checkpoint",
    "write_json",
    "write_metrics",
    "write_text",
]

FORMAT = 1
LOCK = "run.lock"
EXPORTING = ".export-"
"""Start of the name of the folder an export works in."""

_log = logging.getLogger("lowbit.train")

_ALWAYS = ("status", "epochs", "epochs_done", "wall_seconds", "resumed", "input", "results")
"""Keys of run.json from the start on, which readers rely on."""


def columns(metric: str) -> tuple[str, ...]:
    """Columns of metrics.csv. ``metric`` is the task's ("accuracy", 0 to 1); an empty field was not measured.

    ``train_loss`` is what the task and a teacher ask for, ``aux_loss`` the method's own part of the loss (LNS);
    ``noisy_gradient_ratio`` the norm of the latter's gradient over that of the former's, with respect to the latent weights,
    on the first batch of the epoch.
    """
    return (
        "epoch",
        "step",
        "lr",
        "train_loss",
        f"train_{metric}",
        "aux_loss",
        "val_loss",
        f"val_{metric}",
        "gap",
        "temperature",
        "noisy_gradient_ratio",
        "flips_epoch",
        "flips_start",
        "images_per_second",
        "seconds",
    )


class RunError(RuntimeError):
    """A run directory that can't be used for what was asked; the message says what to do."""


@dataclass(frozen=True)
class InputSpec:
    """What the network reads and answers: all that building it again needs from the data.

    With ``classes`` it reads raw pixels and names a class; without (super-resolution) it reads luma in 0..1 and gives it back
    ``upscale`` times as large. Then height and width are those of the training patches: pictures may have any.
    """

    channels: int
    height: int
    width: int
    zero_point: tuple[int, ...]
    scale: float
    classes: tuple[str, ...]
    upscale: int = 1

    @property
    def pixels(self) -> Pixels | None:
        """How the first layer reads raw pixels; None for luma."""
        return Pixels(zero_point=self.zero_point, scale=self.scale) if self.classes else None

    def example(self, count: int) -> torch.Tensor:
        """So many black inputs."""
        dtype = torch.uint8 if self.classes else torch.float32
        return torch.zeros(count, self.channels, self.height, self.width, dtype=dtype)

    @staticmethod
    def of(data: DataSource) -> InputSpec:
        """The input of a network for ``data``."""
        return InputSpec(*data.shape, tuple(data.zero_point), data.scale, tuple(data.classes), data.upscale)

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> InputSpec:
        """Read back what ``to_json`` gave."""
        values = dict(tree)
        values["zero_point"], values["classes"] = tuple(values["zero_point"]), tuple(values["classes"])
        return InputSpec(**values)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return json.loads(json.dumps(asdict(self)))


class RunLock:
    """The right to write into a run directory, held by one process at a time, on whichever machine.

    An advisory lock of the system's (flock) on ``run.lock``: it goes with the process that holds it, also with one that was
    killed, so nothing is ever stale. The file stays, and says who holds it. ``with`` gives it back.

    Args:
        run_dir: the run directory; it need not exist before ``take``.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take it, if it is not held already, and remove what killed writers left behind.

        Raises:
            RunError: another process holds it. OSError: no such directory, or it is read-only.
        """
        if self._descriptor is not None:
            return
        path = self._run_dir / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(descriptor)
                raise RunError(
                    f"{self._run_dir}: is in use by {holder}; wait for its end, or stop it and then --resume"
                ) from None
            _log.warning("%s can't be locked (%s): take care that no second process writes there", path, error.strerror)
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n".encode(), 0)
        for folder in (self._run_dir, self._run_dir / "checkpoints"):
            remove_leftovers(folder)
        for folder in self._run_dir.glob(f"{EXPORTING}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def empty(run_dir: Path) -> None:
    """Remove everything in a run directory but its lock, run.json first: what is half removed is no run."""
    (run_dir / "run.json").unlink(missing_ok=True)
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            try:
                shutil.rmtree(path)
            except OSError as error:
                error.filename = str(path)  # rmtree names the file alone
                raise
        elif path.name != LOCK:
            path.unlink()


def never_started(run_dir: Path) -> bool:
    """Whether a start was killed here before it had written run.json: there is nothing to lose."""
    names = {path.name for path in run_dir.iterdir() if not path.name.endswith(SUFFIX)} if run_dir.is_dir() else set()
    checkpoints = run_dir / "checkpoints"
    return (
        LOCK in names
        and names <= {LOCK, "recipe.yaml", "checkpoints"}
        and not (checkpoints.is_dir() and any(checkpoints.iterdir()))
    )


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


def read_checkpoint(path: Path, what: str) -> dict[str, Any]:
    """A checkpoint as it was written, on the CPU; nothing in it is executed.

    Raises:
        RunError: it is not there, broken, or holds no network; ``what`` it is for in front.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{what}: {path} is not there") from None
    except Exception as error:
        raise RunError(f"{what}: {path} is not a checkpoint ({type(error).__name__}); it may be cut short") from None
    if not isinstance(tree, dict) or "state_dict" not in tree:
        raise RunError(f"{what}: {path} holds no network")
    return tree


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
    tree = read_json(path, "train again with --overwrite", FORMAT, _ALWAYS)
    if tree is None:
        raise RunError(f"{run_dir}: not a run directory (it has no run.json)")
    return tree


def read_json(path: Path, again: str, form: int | None = None, keys: Iterable[str] = ()) -> dict[str, Any] | None:
    """The object in a file that lowbit wrote; None where there is no file.

    Args:
        path: of the file.
        again: the way out, which ends every message.
        form: what its ``format`` has to be; None for a file without one.
        keys: what it has to have.

    Raises:
        RunError: it is no JSON, of another format, or lacks a key.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read ({error}); {again}") from None
    if not isinstance(tree, dict):
        raise RunError(f"{path}: is not what lowbit wrote; {again}")
    if form is not None and tree.get("format") != form:
        raise RunError(f"{path}: has format {tree.get('format')!r}, this version reads {form}; {again}")
    missing = [key for key in keys if key not in tree]
    if missing:
        raise RunError(f"{path}: is damaged, it lacks {', '.join(missing)}; {again}")
    return tree


# ------------------------------------------------------------------------------------------------ which data


def fingerprint(data: DataSource) -> dict[str, Any]:
    """What tells this data from other data, as plain values; the same on every machine, and cheap.

    Returns:
        ``train, held_out`` (numbers of images), ``classes`` (their number), ``zero_point, scale`` and ``sha256`` of the classes'
        names and ``DataSource.identity``. The test images are not looked at.
    """
    names = "\0".join(data.classes).encode(errors="surrogateescape")
    digest = hashlib.sha256(names + b"\0\0" + data.identity)
    return {
        "train": data.count("train"),
        "held_out": data.count("val"),
        "classes": len(data.classes),
        "zero_point": list(data.zero_point),
        "scale": float(f"{data.scale:.6g}"),  # a deviation's last digits may depend on the order of its sum
        "sha256": digest.hexdigest(),
    }


def check_same_data(place: str, then: Mapping[str, Any], here: Mapping[str, Any], way_out: str) -> None:
    """Hold the fingerprint of a run or result against another.

    Raises:
        RunError: they differ; ``place`` in front, then in what, and the way out.
    """
    keys = [key for key in then if then[key] != here.get(key)]
    if keys:
        key = keys[0]
        what = "other files or labels" if key == "sha256" else f"{key}: {then[key]} there, {here.get(key)} here"
        raise RunError(f"{place} was trained on other data ({what}); {way_out}")


# ------------------------------------------------------------------------------------------------ with what


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


def code_version() -> dict[str, Any]:
    """``{lowbit, source, commit, dirty}``: the package's version, SHA-256 of the Python files that train, and where git
    tracks them HEAD and whether the package differs from it (None, None elsewhere).
    """
    home = Path(lowbit.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            # without its optional locks, which would be in the way of somebody's commit
            command = ["git", "--no-optional-locks", *arguments]
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    version: dict[str, Any] = {
        "lowbit": lowbit.__version__,
        "source": source_digest(),
        "commit": None,
        "dirty": None,
    }
    if git("ls-files", "--error-unmatch", "__init__.py"):
        version["commit"] = git("rev-parse", "HEAD")
        version["dirty"] = bool(git("status", "--porcelain", "--", "."))
    return version


def session(device: str) -> dict[str, Any]:
    """``{started, code, versions, machine}`` of the process that calls it: what run.json says of each that trained."""
    return {"started": now(), "code": code_version(), "versions": versions(), "machine": machine(device)}


def sessions(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every process that trained a run, the last one last: of run.json, or of a cell's result.

    What has no list of them (a result of one session, run.json of an earlier version) tells of one.
    """
    one = {key: tree[key] for key in ("started", "code", "versions", "machine") if key in tree}
    return list(tree.get("sessions") or [one])
