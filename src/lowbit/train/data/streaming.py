"""Data sets that don't fit in memory: images stay encoded on disk, worker processes read and decode them.

Everything random is a function of (seed, epoch) for the order and of (seed, epoch, number of the image) for what is done to
an image. So the batches are the same for every number of workers, and a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowbit.train.data.batches import Augment, TrainingBatches, generator_of
from lowbit.train.data.decode import BrokenImageError, Geometry, decode
from lowbit.train.data.images import DataError, DataSource, Labelled, Part, refuse_rotation, split_indices

__all__ = ["Broken", "Encoded", "Records", "StreamingBatches", "StreamingData", "default_workers"]

Broken = Literal["stop", "skip"]
Numbers = NDArray[np.int64]

_log = logging.getLogger("lowbit.train")

_IN_A_ROW = 100
"""So many images one behind the other that can't be read are no broken images, but a broken data set."""
_EVALUATION, _CALIBRATION = 1, 2  # with the split's seed in front, keys of orders that don't change


@dataclass(frozen=True)
class Encoded:
    """One image as it lies on disk: the bytes, the class, the name for messages (relative to the data set's folder)."""

    data: bytes
    label: int
    name: str


class Records(ABC):
    """Encoded images by number, 0 to ``len - 1``. Goes to worker processes, so it must be picklable and small."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, number: int) -> Encoded:
        """One image.

        Raises:
            DataError: what it lies in is missing or broken, other than the image itself.
        """

    @abstractmethod
    def order(self, generator: torch.Generator) -> Numbers:
        """All numbers in a random order that can be read fast."""

    @property
    @abstractmethod
    def identity(self) -> bytes:
        """Names and labels, or whatever else tells these images from others without reading them."""


def default_workers(world_size: int = 1) -> int:
    """One worker for each core this process may use, shared between the ranks of a machine; 16 at most.

    Args:
        world_size: ranks in all; how many of them are on this machine is torchrun's LOCAL_WORLD_SIZE, where it is set.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    return max(1, min(cores // here, 16))


# ------------------------------------------------------------------------------------------------ workers

_Request = tuple[int, Numbers]
"""Epoch (-1: none), numbers of the images."""
_Found = tuple[Tensor, Tensor, list[tuple[str, str]]]
"""Images, labels, (name, reason) of the broken ones."""


class _Worker(Dataset[_Found | DataError]):
    """Makes a batch of a request; runs in a worker process. An error is handed over, not raised: a DataLoader would wrap it
    into a page of traceback."""

    def __init__(
        self,
        records: Records,
        geometry: Geometry,
        members: Numbers,
        broken: Broken,
        augment: Augment | None = None,
        seed: int | None = None,
    ) -> None:
        self.records, self.geometry, self.members, self.broken = records, geometry, members, broken
        self.augment, self.seed = augment, seed

    def __getitem__(self, request: _Request) -> _Found | DataError:
        try:
            return self._batch(*request)
        except DataError as error:
            return error

    def _batch(self, epoch: int, numbers: Numbers) -> _Found:
        training = self.seed is not None
        size = self.geometry.size
        x = np.empty((len(numbers), 3, size, size), np.uint8)
        labels: list[int] = []
        skipped: list[tuple[str, str]] = []
        for wanted in numbers.tolist():
            number, in_a_row = wanted, 0
            while True:
                record = self.records.read(number)
                random = np.random.default_rng((self.seed, epoch, wanted)) if self.seed is not None else None
                try:
                    x[len(labels)] = decode(record.data, self.geometry, self.augment, random).transpose(2, 0, 1)
                except BrokenImageError as error:
                    if self.broken == "stop":
                        raise DataError(
                            f"{record.name}: {error}; repair or remove it, or pass over such images with data.broken: skip"
                        ) from None
                    skipped.append((record.name, str(error)))
                    in_a_row += 1
                    if not training:
                        break  # left out: no other image may be counted twice
                    if in_a_row == min(_IN_A_ROW, len(self.members)):
                        raise DataError(f"{record.name}: and {in_a_row - 1} images before it: {error}") from None
                    number = self._next(number)
                else:
                    labels.append(record.label)
                    break
        return torch.from_numpy(x[: len(labels)]), torch.tensor(labels, dtype=torch.int64), skipped

    def _next(self, number: int) -> int:
        """The next image of the same part: a held-out one never takes a training image's place."""
        return int(self.members[(np.searchsorted(self.members, number) + 1) % len(self.members)])


def _as_it_is(found: Any) -> Any:
    return found


def _load(worker: _Worker, requests: Sequence[_Request], workers: int, broken: dict[str, str]) -> Iterator[Labelled]:
    """The batches of all requests in order. Names of broken images and the reasons are added to ``broken``."""
    loader: DataLoader[Any] = DataLoader(
        worker,
        sampler=requests,  # one request is one batch
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        generator=torch.Generator(),  # the network's own random numbers stay as they were
    )
    batches = iter(loader)
    try:
        while True:
            try:
                found = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    "a process that loads images was killed; is memory or shared memory (/dev/shm) used up? Fewer "
                    "train.workers or a smaller batch need less"
                ) from None
            if isinstance(found, DataError):
                raise found
            x, y, skipped = found
            for name, reason in skipped:
                if name not in broken:
                    broken[name] = reason
                    _log.warning("%s: %s; passed over", name, reason)
            if len(y):
                yield x, y
    finally:
        # ends the workers now: where a traceback keeps the iterator for the garbage collector, that waits 5 s for each
        del batches


class StreamingBatches(TrainingBatches):
    """Training batches of a ``StreamingData``; see ``DataSource.batches``."""

    def __init__(
        self,
        data: StreamingData,
        part: Part,
        batch_size: int,
        worker: _Worker,
        workers: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(data.count(part), batch_size, rank, world_size)
        self._data, self._part, self._worker, self._workers = data, part, worker, workers

    def __iter__(self) -> Iterator[Labelled]:
        # a generator, so that the epoch is the one at the first batch: Lightning may call iter() before set_epoch()
        epoch, seed = self.epoch, self._worker.seed
        assert seed is not None
        order = self._data.order(self._part, seed, epoch)
        requests = [(epoch, order[where]) for _, where in self.pieces()]
        yield from _load(self._worker, requests, min(self._workers, len(requests)), self._data.found_broken)


@dataclass(frozen=True)
class _Again:
    """An iterable that can be gone through again."""

    worker: _Worker
    requests: Sequence[_Request]
    workers: int
    broken: dict[str, str]

    def __iter__(self) -> Iterator[Labelled]:
        return _load(self.worker, self.requests, self.workers, self.broken)


@dataclass(frozen=True)
class _Images:
    """The images alone."""

    pairs: Iterable[Labelled]

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self.pairs)


# ------------------------------------------------------------------------------------------------ the data set


class StreamingData(DataSource):
    """Images on disk, with one label each.

    ``validation`` of the training images are held out, by the rule that ``ImageData`` has. A broken image stops
    everything, by default. With ``broken: skip`` a training batch takes the next image of the same part in its place, so
    that the number of batches stays; evaluation and calibration leave it out. Each is logged once and kept in ``broken``.

    Args:
        name: the data set's name.
        classes: class names, in label order.
        zero_point, scale: see ``DataSource``.
        geometry: size of the images, and how evaluation resizes.
        train: the training images.
        test: the test images; None where there are none.
        validation: how many training images are held out.
        split_seed: seed of the permutation whose first ``validation`` entries are held out.
        train_images: use only this many of the training images; None for all.
        broken: "stop" or "skip".
        no_test: what to say where ``test`` is None.

    Raises:
        DataError: too few images for ``validation`` or ``train_images``.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        zero_point: tuple[int, ...],
        scale: float,
        geometry: Geometry,
        train: Records,
        test: Records | None,
        validation: int,
        split_seed: int,
        train_images: int | None = None,
        broken: Broken = "stop",
        no_test: str = "no test set",
    ) -> None:
        if broken not in ("stop", "skip"):
            raise DataError(f"data.broken = {broken!r}: stop or skip")
        if not 0 < validation < len(train):
            raise DataError(f"{name}: {len(train)} training images are too few to hold {validation} out")
        self.name, self.classes, self.zero_point, self.scale = name, classes, zero_point, scale
        self.shape = (3, geometry.size, geometry.size)
        self.has_test, self.resize = test is not None, geometry.resize
        self.found_broken: dict[str, str] = {}
        self._geometry, self._train, self._test, self._broken, self._no_test = geometry, train, test, broken, no_test
        self._split_seed = split_seed
        kept, held = (index.numpy() for index in split_indices(len(train), validation, split_seed))
        if train_images is not None:
            if not 0 < train_images <= len(kept):
                raise DataError(f"{name}: train_images = {train_images}, but there are {len(kept)} to take")
            kept = kept[:train_images]
        self._members: dict[Part, Numbers] = {"train": np.sort(kept), "val": np.sort(held)}

    @property
    def identity(self) -> bytes:
        return self._train.identity

    @property
    def broken(self) -> tuple[str, ...]:
        return tuple(sorted(self.found_broken))

    def _records(self, part: Part) -> Records:
        if part != "test":
            return self._train
        if self._test is None:
            raise DataError(f"{self.name}: {self._no_test}")
        return self._test

    def count(self, part: Part) -> int:
        return len(self._members[part]) if part in self._members else len(self._records(part))

    def order(self, part: Part, *key: int) -> Numbers:
        """The numbers of a part's images in a random order that depends on the part and ``key`` alone."""
        records = self._records(part)
        numbers = records.order(generator_of(*key))
        if part not in self._members:
            return numbers
        wanted = np.zeros(len(records), bool)
        wanted[self._members[part]] = True
        return numbers[wanted[numbers]]

    def _worker(self, part: Part, augment: Augment | None = None, seed: int | None = None) -> _Worker:
        records = self._records(part)
        members = self._members.get(part, np.arange(len(records)))
        return _Worker(records, self._geometry, members, self._broken, augment, seed)

    def batches(
        self,
        batch_size: int,
        *,
        part: Literal["train", "full"] = "train",
        seed: int = 0,
        augment: Augment | None = None,
        workers: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> TrainingBatches:
        augment = augment or Augment()
        if augment.crop:
            raise DataError(
                f"data.augment.crop shifts images of their final size; {self.name} cuts them out of larger ones: use "
                "data.augment.resized_crop, [0.08, 1.0] as published for ImageNet"
            )
        refuse_rotation(self.name, augment)
        processes = default_workers(world_size) if workers is None else workers
        return StreamingBatches(self, part, batch_size, self._worker(part, augment, seed), processes, rank, world_size)

    def _rounds(
        self, part: Part, numbers: Numbers, batch_size: int, workers: int | None, world_size: int = 1
    ) -> _Again:
        requests = [(-1, numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]
        processes = default_workers(world_size) if workers is None else workers
        return _Again(self._worker(part), requests, min(processes, len(requests)), self.found_broken)

    def evaluation(
        self, part: Part, batch_size: int, *, workers: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterable[Labelled]:
        # in the records' own order, batches of a folder would hold one class each, and the first hundreds a few
        numbers = self.order(part, self._split_seed, _EVALUATION)[rank::world_size]
        return self._rounds(part, numbers, batch_size, workers, world_size)

    def calibration(self, count: int, batch_size: int, *, workers: int | None = None) -> Iterable[Tensor]:
        numbers = self.order("train", self._split_seed, _CALIBRATION)[:count]
        return _Images(self._rounds("train", numbers, batch_size, workers))
