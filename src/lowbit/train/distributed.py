"""Training in several processes: who is who, what they agree on, and how they stay equal.

``torchrun`` starts the processes (``launch`` does, for ``train.devices``), DistributedDataParallel averages the gradients. What is
here is the rest: rank 0 alone writes and evaluates and the others hear of it, an error of one process ends all of them, and
buffers, which DDP leaves alone, are made equal. One process is the case where all of it does nothing.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from lowbit.train.prepare import auxiliary_loss
from lowbit.train.recipe import Recipe, RecipeError, differing_keys
from lowbit.train.rundir import InputSpec, RunError

__all__ = [
    "ALONE",
    "RankError",
    "Ranks",
    "check_equal_recipes",
    "check_launch",
    "join",
    "launch",
    "leaves_parameters_out",
    "main_process",
    "once_a_machine",
]

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""The longest that processes wait for rank 0 to evaluate."""


FAILURE = "lowbit/failure"
"""Where the first process to fail says so: "RANK MESSAGE"."""


class RankError(RunError):
    """Another process failed; the message says which, and why.

    Attributes:
        told: rank 0 says it already; this process need not.
    """

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


def _describe(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if type(error).__module__.partition(".")[0] == "lowbit":
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. Every method but ``failure`` is a collective one: all processes call it, or none.

    Attributes:
        rank: this process's number, 0 to ``world_size`` - 1.
        world_size: how many processes there are.
        local_rank, local_world_size: the same on this machine; the local rank is the number of the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    _group: Any = None
    _store: Any = None

    @property
    def main(self) -> bool:
        """Rank 0: the one that writes."""
        return self.rank == 0

    def begin(self) -> None:
        """A new run: what failed before it is forgotten."""
        if self.world_size > 1 and self.main:
            self._store.delete_key(FAILURE)
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each number over all processes, in float64."""
        if self.world_size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        dist.broadcast(total, src=0, group=self._group)
        return tuple(total.tolist())

    @torch.no_grad()
    def average(self, tensors: Iterable[Tensor]) -> None:
        """Every floating-point tensor becomes its mean over the processes, the same bits on each; other tensors rank 0's.

        The mean is taken in float64, where float32 numbers that are equal already have themselves as their mean.
        """
        if self.world_size == 1:
            return
        tensors = list(tensors)
        floats = [t for t in tensors if t.is_floating_point()]
        if floats:
            flat = torch.cat([t.detach().double().flatten().cpu() for t in floats])
            dist.all_reduce(flat, group=self._group)
            # the sum may be rounded in another order elsewhere
            dist.broadcast(flat, src=0, group=self._group)
            flat /= self.world_size
            for tensor, values in zip(floats, torch.split(flat, [t.numel() for t in floats]), strict=True):
                tensor.copy_(values.view_as(tensor))
        self.copy(t for t in tensors if not t.is_floating_point())

    @torch.no_grad()
    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Every tensor becomes rank 0's."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            dist.broadcast(value, src=0, group=self._group)
            tensor.copy_(value)

    def differing(self, model: nn.Module) -> list[str]:
        """Names of parameters and buffers whose bits are not the same everywhere."""
        if self.world_size == 1:
            return []
        mine = {name: _digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        every = self.gather(mine)
        return [name for name in mine if any(other.get(name) != mine[name] for other in every)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all raise: nobody goes on alone, nobody waits for ever.

        Inside there may be no collective call. Rank 0 raises its own error, or RankError with the first other one's message; the
        others raise RankError, which is told already.
        """
        if self.world_size == 1:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        messages = self.gather(None if mine is None else _describe(mine))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if self.main and mine is not None:
            raise mine
        if failed:
            raise RankError(f"{self._name(failed[0])}: {messages[failed[0]]}", told=not self.main) from mine

    def failure(self, error: BaseException) -> BaseException:
        """What to raise where training broke off: ``error``, or RankError where another process failed before.

        The first process to call it is the one to blame. Not a collective call.
        """
        if self.world_size == 1 or isinstance(error, RankError):
            return error
        atexit.unregister(_leave)  # the others may be gone already, or wait for this one in vain
        if not isinstance(error, Exception):  # Ctrl-C, which all of them get
            return error
        with suppress(Exception):  # the store is gone with the launcher
            first = self._store.compare_set(FAILURE, "", f"{self.rank} {_describe(error)}").decode()
            rank, _, message = first.partition(" ")
            if int(rank) != self.rank:
                return RankError(f"{self._name(int(rank))}: {message}")
        if isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL")):
            return RankError(
                f"another process is gone, killed perhaps; --resume goes on ({str(error).splitlines()[0][:160]})"
            )
        return error

    def _name(self, rank: int) -> str:
        return f"process {rank} of {self.world_size}"


ALONE = Ranks()
"""The only process."""


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def main_process() -> bool:
    """Whether this process is the one that talks: rank 0, or the only one. Needs no connection."""
    return not dist.is_torchelastic_launched() or os.environ.get("RANK", "0") == "0"


@contextmanager
def once_a_machine() -> Iterator[None]:
    """For checks before ``join``, which end alike in all processes of a machine: the first of them says what is wrong.

    Needs no connection. The others raise RankError, which is told already.
    """
    try:
        yield
    except RecipeError as error:
        if dist.is_torchelastic_launched() and os.environ["LOCAL_RANK"] != "0":
            raise RankError(str(error), told=True) from None
        raise


def check_launch(recipe: Recipe) -> None:
    """Hold the recipe's wishes (``train.devices``, ``train.nodes``) against the processes there are.

    Raises:
        RecipeError: they differ; what to type is said.
    """
    t = recipe.train
    elastic = dist.is_torchelastic_launched()
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if elastic else 1
    nodes = int(os.environ["WORLD_SIZE"]) // local if elastic else 1
    gpus = torch.cuda.device_count() if t.device != "cpu" else 0
    if gpus and local > gpus:
        raise RecipeError(f"{recipe.name}: {local} processes on a machine with {gpus} GPUs; one for each is the most")
    wanted = (t.devices or local, t.nodes or nodes)
    if wanted == (local, nodes):
        return
    there = f"{local} processes on each of {nodes} machines were" if elastic else "one process was"
    raise RecipeError(
        f"{recipe.name}: train.devices: {wanted[0]} and train.nodes: {wanted[1]}, but {there} started; start them with "
        f"torchrun --nnodes {wanted[1]} --nproc-per-node {wanted[0]} (docs/DISTRIBUTED.md)"
    )


@cache
def join(device: str) -> Ranks:
    """Meet the other processes that ``torchrun`` started; at once where there are none.

    Args:
        device: "cuda" (NCCL) or "cpu" (gloo), for the gradients. Everything here goes through gloo.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    _die_with_parent()
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    store, rank, world_size = next(rendezvous("env://"))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    atexit.register(_leave)
    return Ranks(rank, world_size, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]), group, store)


_PR_SET_PDEATHSIG: Final = 1


def _die_with_parent() -> None:
    """Be killed when the launcher is: each process leads a session of its own, so that no signal to the launcher's group
    reaches it, and one that is left over keeps its GPU and the run directory. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave() -> None:
    with suppress(Exception):
        dist.destroy_process_group()


def leaves_parameters_out(model: nn.Module, spec: InputSpec) -> bool:
    """Whether some parameter gets no gradient in a step: DDP must look for those, which costs it time."""
    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        outputs = trial(spec.example(2))
    (outputs.float().sum() + auxiliary_loss(trial)).backward()
    return any(p.requires_grad and p.grad is None for p in trial.parameters())


def check_equal_recipes(recipe: Recipe, ranks: Ranks) -> None:
    """All processes must train the same.

    Raises:
        RunError: they don't; the keys that differ are named.
    """
    first: Recipe | None = None
    for rank, other in enumerate(ranks.gather(recipe)):
        first = first or other
        keys = differing_keys(first, other)
        if keys:
            message = f"process {rank} of {ranks.world_size} got another recipe than process 0: {', '.join(keys)}"
            raise RunError(message) if ranks.main else RankError(message, told=True)


def launch(recipe: Recipe, arguments: Sequence[str]) -> int | None:
    """Start ``python -m lowbit`` with the arguments ``train.devices`` times, with torchrun's launcher, and wait for all.

    Returns:
        The exit status: that of the first process to fail, 0 where none did. None where there is nothing to start: for one
        device, in a process that was started like this, or for several nodes, which torchrun must start itself.
    """
    devices = recipe.train.devices or 1
    if devices == 1 or (recipe.train.nodes or 1) > 1 or dist.is_torchelastic_launched():
        return None
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # the processes say themselves what went wrong
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # as torchrun does: the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // devices)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id="lowbit",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lowbit", *arguments)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0
