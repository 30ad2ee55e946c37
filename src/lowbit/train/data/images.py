"""What a classification data set is to the library: u8 images, labels, a fixed split, integer zero points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataError", "ImageData", "split_indices"]

Labelled = tuple[Tensor, Tensor]


class DataError(ValueError):
    """A data set is missing or broken; the message names the file and the way out."""


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """A fixed split of ``count`` images: ``(training indices, validation indices)``.

    The permutation comes from NumPy's legacy Mersenne Twister, whose stream NumPy promises never to change, so the
    same images are held out on every machine and version.
    """
    order = np.random.RandomState(seed).permutation(count)
    picked = torch.from_numpy(order.astype(np.int64))
    return picked[validation:], picked[:validation]


@dataclass
class ImageData:
    """Images with one label each.

    Images are u8 ``[N, C, H, W]`` and labels int64 ``[N]``. The network sees ``(pixel - zero_point[c]) * scale``, with
    integer zero points, so that an 8-bit first layer gets exact integers and padding with the zero point is zero.
    Nothing is read before it is asked for; the test images are read only through ``test_x`` and ``test_y``.

    Attributes:
        name: the data set's name.
        classes: class names, in label order.
        shape: ``(C, H, W)`` of every image.
        zero_point: one integer for each channel (the rounded mean of the training pixels).
        scale: one factor for all channels (1 / standard deviation of the training pixels).
        read_train: reads all training images (validation included).
        read_test: reads the test images.
        validation: how many training images are held out to choose by.
        split_seed: seed of the permutation whose first ``validation`` entries are held out.
        train_images: use only this many of the training images (in permuted order); None for all.
        has_test: False where no images are set apart for a test; ``read_test`` then raises DataError.
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
