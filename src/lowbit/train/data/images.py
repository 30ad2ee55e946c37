"""What a data set is to the library: batches to train on, to evaluate and to calibrate; and the kind that lies in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.train.data.batches import Augment, Batches, TrainingBatches, rounds

__all__ = ["DataError", "DataSource", "ImageData", "Labelled", "Part", "refuse_rotation", "split_indices"]

Labelled = tuple[Tensor, Tensor]
Part = Literal["train", "full", "val", "test"]
"""``full`` is ``train`` and ``val`` together: for a final run whose settings are fixed."""


class DataError(ValueError):
    """A data set is missing or broken; the message names the file and the way out."""


def refuse_rotation(name: str, augment: Augment | None) -> None:
    """What is upright says something about an object's class: only pictures of super-resolution are turned.

    Raises:
        DataError: ``augment.rotate``.
    """
    if augment is not None and augment.rotate:
        raise DataError(
            f"data.augment.rotate turns the patches of super-resolution's pictures, not the images of {name}"
        )


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """A fixed split of ``count`` images: ``(training indices, validation indices)``.

    The permutation comes from NumPy's legacy Mersenne Twister, whose stream NumPy promises never to change, so the
    same images are held out on every machine and version.
    """
    order = np.random.RandomState(seed).permutation(count)
    picked = torch.from_numpy(order.astype(np.int64))
    return picked[validation:], picked[:validation]


class DataSource(ABC):
    """What training, evaluation and export ask of a data set. Images are u8 ``[N, C, H, W]``, labels int64 ``[N]``.

    Data sets for super-resolution (``upscale`` > 1) have no classes; their inputs are luma, float32 ``[N, 1, h, w]`` in
    0..1, their targets ``[N, 1, upscale h, upscale w]``, and of an evaluation each batch is one picture of a size of its own.

    The network sees ``(pixel - zero_point[c]) * scale``, with integer zero points, so that an 8-bit first layer gets exact
    integers and padding with the zero point is zero. All iterables may be gone through again and give the same.

    Attributes:
        name: the data set's name.
        classes: class names, in label order.
        shape: ``(C, H, W)`` of every image.
        zero_point: one integer for each channel (the rounded mean of the training pixels).
        scale: one factor for all channels (1 / standard deviation of the training pixels).
        has_test: False where no images are set apart for a test; asking for them then raises DataError.
        upscale: how many times larger the pictures are that a network gives back; 1 where it names classes.
        resize: what evaluation makes the shorter side before it cuts the centre out (``lowbit.predict.centre``); None where
            images have their size already. It goes into the exported file, so that ``predict`` does the same.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    zero_point: tuple[int, ...]
    scale: float
    has_test: bool
    upscale: int = 1
    resize: int | None = None

    @abstractmethod
    def count(self, part: Part) -> int:
        """How many images a part has."""

    @abstractmethod
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
        """Batches to train on.

        Args:
            batch_size: images in a batch of one rank.
            part: "train", or "full" for the held-out images too.
            seed: of permutations and augmentation.
            augment: what to do to each image.
            workers: processes that load images, where they don't lie in memory; 0 for none, None for one on each core.
            rank, world_size: this process's share of each epoch, see ``TrainingBatches``.

        Raises:
            DataError: this kind of augmentation is not for this data set. ValueError: no batch can be filled.
        """

    @abstractmethod
    def evaluation(
        self, part: Part, batch_size: int, *, workers: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterable[Labelled]:
        """Every image of a part once, as it is, in a fixed order; every ``world_size``-th from ``rank`` on."""

    @abstractmethod
    def calibration(self, count: int, batch_size: int, *, workers: int | None = None) -> Iterable[Tensor]:
        """The same ``count`` training images (or all, where there are fewer) every time, as they are, mixed."""

    @property
    @abstractmethod
    def identity(self) -> bytes:
        """What tells the training images, held-out ones included, from others: cheap, and the same on every machine."""

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the images that could not be read so far and were passed over."""
        return ()


@dataclass
class ImageData(DataSource):
    """Images in memory, with one label each.

    Nothing is read before it is asked for; the test images are read only through ``test_x`` and ``test_y``.

    Attributes:
        name, classes, shape, zero_point, scale, has_test: see ``DataSource``.
        read_train: reads all training images (validation included).
        read_test: reads the test images.
        validation: how many training images are held out to choose by.
        split_seed: seed of the permutation whose first ``validation`` entries are held out.
        train_images: use only this many of the training images (in permuted order); None for all.
        found_broken: names of images that were passed over.
        files: names of the training images' files, which tell them from others; None where they come as arrays, and the
            labels and some of the pixels do.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    zero_point: tuple[int, ...]
    scale: float
    read_train: Callable[[], Labelled] = field(repr=False)
    read_test: Callable[[], Labelled] = field(repr=False)
    validation: int = 0
    split_seed: int = 0
    train_images: int | None = None
    has_test: bool = True
    resize: int | None = None
    found_broken: list[str] = field(default_factory=list)
    files: bytes | None = field(default=None, repr=False)

    @property
    def identity(self) -> bytes:
        if self.files is not None:
            return self.files
        x, y = self._all
        some = x[:: max(1, len(x) // 1000)]
        return y.numpy().astype("<i8").tobytes() + some.contiguous().numpy().tobytes()

    @property
    def broken(self) -> tuple[str, ...]:
        return tuple(self.found_broken)

    @cached_property
    def _all(self) -> Labelled:
        return self.read_train()

    @cached_property
    def _train(self) -> Labelled:
        x, y = self._all
        index, _ = split_indices(len(x), self.validation, self.split_seed)
        if self.train_images is not None:
            if not 0 < self.train_images <= len(index):
                raise DataError(f"{self.name}: train_images = {self.train_images}, but there are {len(index)} to take")
            index = index[: self.train_images]
        return x[index], y[index]

    @cached_property
    def _val(self) -> Labelled:
        x, y = self._all
        _, index = split_indices(len(x), self.validation, self.split_seed)
        return x[index], y[index]

    @cached_property
    def _test(self) -> Labelled:
        return self.read_test()

    @property
    def train_x(self) -> Tensor:
        """Training images without the validation images."""
        return self._train[0]

    @property
    def train_y(self) -> Tensor:
        """Labels of ``train_x``."""
        return self._train[1]

    @property
    def val_x(self) -> Tensor:
        """The held-out training images."""
        return self._val[0]

    @property
    def val_y(self) -> Tensor:
        """Labels of ``val_x``."""
        return self._val[1]

    @property
    def full_x(self) -> Tensor:
        """All training images, validation included: for a final run whose settings are fixed."""
        return self._all[0]

    @property
    def full_y(self) -> Tensor:
        """Labels of ``full_x``."""
        return self._all[1]

    @property
    def test_x(self) -> Tensor:
        """The test images; reading them is a decision, made once, at the end."""
        return self._test[0]

    @property
    def test_y(self) -> Tensor:
        """Labels of ``test_x``."""
        return self._test[1]

    def _part(self, part: Part) -> Labelled:
        return {"train": lambda: self._train, "full": lambda: self._all, "val": lambda: self._val}.get(
            part, lambda: self._test
        )()

    def count(self, part: Part) -> int:
        return len(self._part(part)[1])

    def batches(
        self,
        batch_size: int,
        *,
        part: Literal["train", "full"] = "train",
        seed: int = 0,
        augment: Augment | None = None,
        workers: int | None = None,  # noqa: ARG002  # indexing memory is faster than any other process could hand it over
        rank: int = 0,
        world_size: int = 1,
    ) -> TrainingBatches:
        if augment is not None and augment.resized_crop is not None:
            raise DataError(
                f"data.augment.resized_crop cuts images out as they are decoded; {self.name} lies in memory at its final "
                "size: use data.augment.crop"
            )
        refuse_rotation(self.name, augment)
        x, y = self._part(part)
        return Batches(x, y, batch_size, seed, augment, self.zero_point, rank, world_size)

    def evaluation(
        self,
        part: Part,
        batch_size: int,
        *,
        workers: int | None = None,  # noqa: ARG002
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterable[Labelled]:
        x, y = self._part(part)
        return rounds(x[rank::world_size], y[rank::world_size], batch_size)

    def calibration(
        self,
        count: int,
        batch_size: int,
        *,
        workers: int | None = None,  # noqa: ARG002
    ) -> Iterable[Tensor]:
        return torch.split(self.train_x[:count], batch_size)
