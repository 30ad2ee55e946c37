"""Data sets, by name, and the batches they are trained from."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.train.data.batches import Augment, Batches, TrainingBatches, rounds
from lowbit.train.data.images import DataError, DataSource, ImageData
from lowbit.train.registry import Registry

__all__ = ["DATASETS", "Augment", "Batches", "DataError", "DataSource", "ImageData", "TrainingBatches", "rounds"]

#: ``name -> function(root=None, **arguments) -> DataSource``. A new data set: one file, one line here.
DATASETS: Registry[Callable[..., DataSource]] = Registry(
    "data set",
    {
        "cifar10": "lowbit.train.data.cifar",
        "cifar100": "lowbit.train.data.cifar",
        "div2k": "lowbit.train.data.superres",
        "fashion_mnist": "lowbit.train.data.fashion_mnist",
        "image_folder": "lowbit.train.data.image_folder",
        "imagenet_folder": "lowbit.train.data.imagenet",
        "imagenet_shards": "lowbit.train.data.imagenet",
        "photographs": "lowbit.train.data.superres",
        "picture_folder": "lowbit.train.data.superres",
    },
)
