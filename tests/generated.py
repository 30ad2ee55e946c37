"""Data sets of official layouts with generated images, small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lowbit.train.data.cifar import Layout


def shortened(layout: Layout, records: int) -> Layout:
    """The layout with so many records in each batch in place of the official number."""
    return replace(
        layout,
        train=tuple((name, records) for name, _ in layout.train),
        test=tuple((name, records) for name, _ in layout.test),
    )


def write_cifar(folder: Path, layout: Layout, seed: int = 0) -> Path:
    """The batches of a layout, in the official binary format; the number of records is the layout's own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, records in (*layout.train, *layout.test):
        distinct = rng.integers(0, 256, (min(records, 500), len(layout.labels) + 3 * 32 * 32), np.uint8)
        for column, (_, values) in enumerate(layout.labels):
            distinct[:, column] %= values
        whole = np.resize(distinct, (records, distinct.shape[1]))  # repeats them, where there are more
        (folder / name).write_bytes(whole.tobytes())
    return folder


def write_imagenet(
    root: Path, classes: int, train: int, val: int, size: tuple[int, int] = (80, 72), seed: int = 0
) -> Path:
    """``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``: smooth colours with noise, of varied sizes.

    Args:
        root: the folder.
        classes: how many; named as ImageNet's are, n00000000 and on.
        train: images of each class.
        val: images of each class in ``val``; 0 leaves it out.
        size: width and height of the largest ones.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            if count:
                folder.mkdir(parents=True)
            for i in range(count):
                width, height = (int(side * (1 - 0.3 * rng.random())) for side in size)
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
                pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-20, 21, (height, width, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{folder.name}_{i}.JPEG", quality=85)
    return root
