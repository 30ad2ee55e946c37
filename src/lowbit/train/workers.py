"""Where the cells of a table are trained: one process for each, so that a crash loses one cell."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lowbit.remote import lock, send_signal

__all__ = ["Executor", "Job", "LocalExecutor", "default_jobs", "lock"]


@dataclass(frozen=True)
class Job:
    """One training, as a command that can be run wherever these paths are.

    Attributes:
        recipe: the recipe's file.
        run_dir: where the run goes.
        log: what it says is appended here.
        resume: go on with the run that lies there.
        test: evaluate the test images at the end.
        lock: a file descriptor that a local worker keeps open: the lock lasts as long as the worker does, also where
            its parent was killed.
    """

    recipe: Path
    run_dir: Path
    log: Path
    resume: bool
    test: bool
    lock: int

    def command(self) -> list[str]:
        """Python's arguments."""
        resume = ["--resume"] if self.resume else []
        test = "--test" if self.test else "--no-test"
        return ["-m", "lowbit", "train", str(self.recipe), *resume, "--run-dir", str(self.run_dir), test]


class Executor(Protocol):
    """Where cells are trained."""

    @property
    def slots(self) -> int:
        """How many at once."""

    def submit(self, job: Job) -> Future[int]:
        """Start a job; its exit status, negative where a signal killed it. At most ``slots`` are under way."""

    def interrupt(self, run_dir: Path) -> None:
        """Interrupt the job that trains there, if one does; it ends as after Ctrl-C, and its place is free."""

    def stop(self) -> None:
        """Interrupt what is under way, so that it can be resumed, and wait for its end."""


def default_jobs(device: str = "auto", devices: int = 1) -> int:
    """How many trainings of ``devices`` processes each fit: one process for each GPU; without one (or with ``device``
    "cpu"), one for each core this process may use."""
    there = len(_gpus()) if device != "cpu" and _gpus() else len(os.sched_getaffinity(0))
    return max(1, there // devices)


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
        devices: the recipes' ``train.devices``: GPUs of each job.
    """

    def __init__(self, jobs: int | None = None, device: str = "auto", devices: int = 1) -> None:
        self._slots = jobs or default_jobs(device, devices)
        gpus = _gpus() if device != "cpu" else []
        self._free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for i in range(self._slots):
            own = [gpus[k % len(gpus)] for k in range(i * devices, (i + 1) * devices)] if gpus else []
            self._free.put({"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(own))})
        threads = max(1, len(os.sched_getaffinity(0)) // self._slots) if gpus else 1
        self._threads = {"OMP_NUM_THREADS": str(threads)}
        self._pool = ThreadPoolExecutor(self._slots)
        self._guard = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], Path] = {}
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
                    self._running[process] = job.run_dir
                try:
                    return process.wait()
                finally:
                    with self._guard:
                        del self._running[process]
        finally:
            self._free.put(slot)

    def interrupt(self, run_dir: Path) -> None:
        """Interrupt one process."""
        with self._guard:
            for process, place in self._running.items():
                if place == run_dir:
                    send_signal(process, signal.SIGINT)

    def stop(self, patience: float = 20.0) -> None:
        """Interrupt every process, and kill those that have not ended after ``patience`` seconds."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                send_signal(process, signal.SIGINT)
        end = time.monotonic() + patience
        while self._running and time.monotonic() < end:
            time.sleep(0.1)
        with self._guard:
            for process in self._running:
                send_signal(process, signal.SIGKILL)
        self._pool.shutdown(wait=True, cancel_futures=True)
