"""The cells of a table on a Ray cluster (``lowbit compare --on ray``). Needs the extra ``lowbit[ray]``.

A cell is a Ray task that starts the process a local worker is (``lowbit.remote``). Ray neither repeats a task nor
sees a result: a task answers with an exit status, the run directory lies on a file system that all nodes share, and the
runner alone writes results and runs a killed worker's cell again. So there is one place that decides, and it looks at
what is on the disk first.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray import exceptions

from lowbit.remote import PATIENCE_SECONDS, POLL_SECONDS, Task, issue, on_ray, source_digest, withdraw
from lowbit.train.rundir import RunError
from lowbit.train.workers import Job

__all__ = ["RayExecutor"]

_GONE: Final = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.LocalRayletDiedError,
    exceptions.OutOfMemoryError,
    exceptions.ObjectLostError,
)
"""The worker or its node went, with the training."""

_MANY: Final = 10_000
"""Threads that may wait for a task each; they are made as they are needed."""


class RayExecutor:
    """Tasks of a Ray cluster: each takes ``OMP_NUM_THREADS`` CPUs (1 by default, as local workers do) and, where the
    cluster has GPUs and the recipes may use them, one GPU, times ``devices``.

    Args:
        address: HOST:PORT of the cluster's head; by default RAY_ADDRESS, else the cluster this machine is a node of.
        jobs: how many at once; by default as many as the nodes hold.
        device: the recipes' ``train.device``: "cpu" leaves GPUs alone.
        devices: the recipes' ``train.devices``: processes of each job.

    Raises:
        RunError: no such cluster, or no node of it is large enough.
    """

    def __init__(
        self, address: str | None = None, jobs: int | None = None, device: str = "auto", devices: int = 1
    ) -> None:
        _connect(address)
        self._jobs = jobs
        threads = _threads()
        self._gpus = devices if device != "cpu" and any(node["Resources"].get("GPU") for node in _nodes()) else 0
        self._cpus = threads * devices
        if not self._room():
            wanted = f"{self._cpus} CPUs" + (f" and {self._gpus} GPUs" if self._gpus else "")
            raise RunError(f"no node of the Ray cluster has the {wanted} that a cell takes")
        self._environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        if not self._gpus:
            self._environment["CUDA_VISIBLE_DEVICES"] = ""
        self._remote = ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0, scheduling_strategy="SPREAD"
        )(on_ray)
        self._pool = ThreadPoolExecutor(_MANY)
        self._guard = threading.Lock()
        self._running: dict[Any, Path] = {}
        self._stopped = False

    @property
    def slots(self) -> int:
        """How many the cluster's nodes hold now; they may come and go."""
        return max(1, min(self._room(), self._jobs or _MANY))

    def _room(self) -> int:
        room = 0
        for there in (node["Resources"] for node in _nodes()):
            fit = int(there.get("CPU", 0)) // self._cpus
            room += min(fit, int(there.get("GPU", 0)) // self._gpus) if self._gpus else fit
        return room

    def submit(self, job: Job) -> Future[int]:
        """Send a task; it waits in the cluster's queue until a node has room."""
        ticket = issue(job.run_dir)
        run_dir, log = job.run_dir.absolute(), job.log.absolute()
        task = Task(job.command()[2:], run_dir, log, ticket, str(Path.cwd()), source_digest(), self._environment)
        return self._pool.submit(self._run, task)

    def _run(self, task: Task) -> int:
        with self._guard:
            if self._stopped:
                return 130
            reference = self._remote.remote(task)
            self._running[reference] = task.run_dir
        try:
            status, error = ray.get(reference)
        except exceptions.TaskCancelledError:
            return 130
        except _GONE:
            # Ray says so when it has lost sight of them; the training has ended when its lock is free
            while not withdraw(task.run_dir) and not self._stopped:
                time.sleep(POLL_SECONDS)
            return -signal.SIGKILL
        except exceptions.RayError as raised:
            node = f"node {raised.ip}: " if isinstance(raised, exceptions.RayTaskError) else ""
            raise RunError(f"{node}{_last_line(raised)}") from None
        finally:
            with self._guard:
                self._running.pop(reference, None)
        if error:
            raise RunError(error)
        return int(status)

    def interrupt(self, run_dir: Path) -> None:
        """Interrupt one task."""
        with self._guard:
            there = [reference for reference, place in self._running.items() if place == run_dir.absolute()]
        for reference in there:
            ray.cancel(reference)

    def stop(self, patience: float = 1.5 * PATIENCE_SECONDS) -> None:
        """Take back what waits, interrupt what runs, and kill what has not ended after ``patience`` seconds."""
        with self._guard:
            self._stopped = True
            running = list(self._running)
        for reference in running:
            ray.cancel(reference)
        end = time.monotonic() + patience
        while self._running and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        for reference in list(self._running):
            ray.cancel(reference, force=True)
        self._pool.shutdown(wait=True, cancel_futures=True)


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _threads() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "1")
    if not text.isdecimal() or not int(text):
        raise RunError(f"OMP_NUM_THREADS={text}: with --on ray it is the number of CPUs that a cell takes, as in 1")
    return int(text)


def _connect(address: str | None) -> None:
    """Join the cluster, without its banner, statistics and the output of its workers.

    Raises:
        RunError: it can't be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise RunError(
            f"{address}: Ray's client is not offered; start lowbit compare on a node of the cluster: --on ray:HOST:PORT"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    # Ray prints what happens to workers and nodes to standard output, log_to_driver or not; ``Event`` says it in a line
    ray._private.worker._worker_logs_enabled = False
    try:
        if address != "auto":
            _knock(address)
        with _own_handlers():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError, OSError, exceptions.RayError) as error:
        where = "of this machine" if address == "auto" else f"at {address}"
        raise RunError(
            f"no Ray cluster {where}: {_last_line(error)}; "
            "on the first machine `ray start --head`, on the others `ray start --address HOST:PORT`"
        ) from None


def _knock(address: str) -> None:
    """Whether somebody is there; Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("an address is HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself; here it ends like Ctrl-C (``compare.run``)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that Python did not set
            signal.signal(signal.SIGTERM, before)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
