"""Data sets, by name, and the in-memory batches they are trained from."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.train.data.batches import Augment, Batches, rounds
from lowbit.train.data.images import DataError, ImageData
from lowbit.train.registry import Registry

__all__ = ["DATASETS", "Augment", "Batches", "DataError", "ImageData", "rounds"]

#: ``name -> function(root=None, **arguments) -> ImageData``. A new data set: one file, one line here.
DATASETS: Registry[Callable[..., ImageData]] = Registry(
    "data set",
    {
        "fashion_mnist": "lowbit.train.data.fashion_mnist",
        "image_folder": "lowbit.train.data.image_folder",
    },
)
