"""A cell trained on another machine: who may train it, and a process that ends with the one that started it.

Beside the run directory, on a file system that all machines share, lies ``.seed0.worker``: JSON, locked (flock) by whoever
trains the cell, in which the driver puts a ticket and the worker its name. A worker trains while it holds the lock, and
only if the ticket in the file is its own. A driver that was started again takes the ticket away before it touches the run
directory: a task of its predecessor either holds the lock, and is waited for, or never begins.

Nothing here needs PyTorch, which the process that trains imports, so that the one that watches it stays small. Nothing but
``on_ray`` needs Ray; ``lowbit.train.on_ray`` sends it to the nodes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "RemoteError",
    "Task",
    "issue",
    "lock",
    "on_ray",
    "send_signal",
    "source_digest",
    "train_cell",
    "withdraw",
    "worker_of",
]

SIGHT_SECONDS: Final = 10.0
"""How long a node looks for what the driver has just written: file systems between machines cache."""
PATIENCE_SECONDS: Final = 20.0
"""From the interrupt of a training to its kill."""
POLL_SECONDS: Final = 0.1
HEADING: Final = "--- "
"""Start of the log's lines that are not the training's own."""

_CHILD: Final = "from lowbit.remote import _child; _child()"


class RemoteError(RuntimeError):
    """This machine, or this process, can't train the cell; the message says what to do."""


def lock(path: Path) -> int | None:
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


def send_signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To a worker, which leads a session of its own, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def source_digest() -> str:
    """SHA-256 of the Python files that train, as they are on this machine."""
    home = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted((home / "train").rglob("*.py")):
        digest.update(path.relative_to(home).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ the ticket


def _worker_file(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.worker")


def _write(descriptor: int, ticket: str, worker: str = "") -> None:
    """In place, because the lock is on this very file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"ticket": ticket, "worker": worker}).encode(), 0)
    os.fsync(descriptor)


def _read(data: bytes, key: str) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(data)[key])
    return ""  # just being written


def issue(run_dir: Path) -> str:
    """A new ticket to train in a run directory; those before it are void.

    Raises:
        RemoteError: a worker is at it.
    """
    ticket = secrets.token_hex(16)
    if not _put(run_dir, ticket):
        raise RemoteError(f"{run_dir}: is trained by {worker_of(run_dir) or 'another process'}; wait for its end")
    return ticket


def withdraw(run_dir: Path) -> bool:
    """Make all tickets void, so that no worker begins; False where one is at it."""
    return not _worker_file(run_dir).is_file() or _put(run_dir, "")


def _put(run_dir: Path, ticket: str) -> bool:
    descriptor = lock(_worker_file(run_dir))
    if descriptor is None:
        return False
    try:
        _write(descriptor, ticket)
    finally:
        os.close(descriptor)
    return True


def worker_of(run_dir: Path) -> str:
    """Who trains there, or did last: node and process; "" for nobody yet."""
    try:
        return _read(_worker_file(run_dir).read_bytes(), "worker")
    except OSError:
        return ""


def _take(run_dir: Path, ticket: str, worker: str) -> int:
    """The descriptor that holds the lock; waits for a predecessor's end."""
    path = _worker_file(run_dir)
    end = time.monotonic() + SIGHT_SECONDS
    while True:
        if path.is_file():
            descriptor = lock(path)
            if descriptor is None:
                end = time.monotonic() + SIGHT_SECONDS
            elif _read(os.pread(descriptor, 1000, 0), "ticket") == ticket:
                _write(descriptor, ticket, worker)
                return descriptor
            else:
                os.close(descriptor)
        if time.monotonic() > end:
            raise RemoteError(
                f"{run_dir.parent} is not the folder here that `lowbit compare` sees: "
                "--out has to lie on a file system that all nodes share, under the same path"
            )
        time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------------------------ on the node


@dataclass(frozen=True)
class Task:
    """A training on another machine.

    Attributes:
        command: arguments of ``lowbit``.
        run_dir, log: absolute paths.
        ticket: from ``issue``.
        folder: the working directory: relative paths of recipes (data.root) start there.
        source: ``source_digest``, which has to be the same there.
        environment: variables of the training process.
    """

    command: list[str]
    run_dir: Path
    log: Path
    ticket: str
    folder: str
    source: str
    environment: dict[str, str]


def on_ray(task: Task) -> tuple[int, str]:
    """``train_cell`` on a node of a Ray cluster, by the name that Ray has for it."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    name = next((str(node["NodeName"]) for node in nodes if node["NodeID"] == own), own)
    host = os.uname().nodename
    return train_cell(task, name if name == host else f"{name} ({host})")


def train_cell(task: Task, node: str) -> tuple[int, str]:
    """Train a cell in a process of its own, which ends with this one, however that ends.

    Args:
        task: what to do.
        node: this machine's name.

    Returns:
        The exit status, negative where a signal killed it, and "" or why it was not started.
    """
    try:
        if source_digest() != task.source:
            raise RemoteError("has another version of lowbit than the machine that sends the cells; install the same")
        if not Path(task.folder).is_dir():
            raise RemoteError(
                f"has no folder {task.folder}, where `lowbit compare` was started and relative paths begin"
            )
        descriptor = _take(task.run_dir, task.ticket, f"{node}, process {os.getpid()}")
        try:
            return _run(task, node, descriptor), ""
        finally:
            os.close(descriptor)  # the child's copy keeps the lock until it has ended, too
    except (RemoteError, OSError) as error:
        return 2, f"node {node}: {error}"


def _run(task: Task, node: str, descriptor: int) -> int:
    reading, writing = os.pipe()  # nobody writes: the end of this process closes it
    try:
        with task.log.open("ab") as log:
            log.write(f"{HEADING}node {node}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(reading), *task.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=task.folder,
                env={**os.environ, **task.environment},
                pass_fds=[descriptor, reading],
                start_new_session=True,
            )
        try:
            while (status := process.poll()) is None:
                time.sleep(POLL_SECONDS)  # not wait(): an interrupt by Ray is seen between two calls only
            return status
        except BaseException:
            send_signal(process, signal.SIGINT)
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                send_signal(process, signal.SIGKILL)
                process.wait()
            raise
    finally:
        os.close(reading)
        os.close(writing)


def _child() -> None:
    """``lowbit`` with the arguments after the first, a descriptor: where that closes, this process and all that it
    started are killed."""
    parent = int(sys.argv[1])

    def watch() -> None:
        os.read(parent, 1)
        os.killpg(0, signal.SIGKILL)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's workers block it, and masks are inherited
    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["lowbit", *sys.argv[2:]]
    from lowbit.__main__ import main

    main()
