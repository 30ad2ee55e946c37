"""Your own images: one folder for each class.

Layout: ``root/<class>/*.png|jpg``, or ``root/train/<class>/...`` and ``root/test/<class>/...`` with a test set apart.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.predict import SUFFIXES, ImageError, read_image
from lowbit.train.data import DATASETS
from lowbit.train.data.images import DataError, ImageData, split_indices

__all__ = ["image_folder"]

SPLIT_SEED = 20_201_204
_AT_ONCE = 2**22
"""So many pixels are copied at a time to be counted."""

_log = logging.getLogger("lowbit.train")


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data.root must hold one folder of images for each class")
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise DataError(f"{folder}: {len(found)} class folders, at least 2 are needed, each full of PNG or JPEG images")
    return found


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _read(
    folders: list[Path], size: tuple[int, int], channels: int, resize: int | None, passed_over: list[str] | None
) -> tuple[Tensor, Tensor]:
    """All images. Names of broken ones are added to `passed_over`; with None the first is an error."""
    inside = [_images(folder) for folder in folders]
    x = np.empty((sum(map(len, inside)), channels, *size), np.uint8)
    labels: list[int] = []
    for label, (folder, paths) in enumerate(zip(folders, inside, strict=True)):
        before = len(labels)
        for path in paths:
            try:
                x[len(labels)] = read_image(path, size, channels, resize=resize).transpose(2, 0, 1)
            except ImageError as error:
                if passed_over is None:
                    raise DataError(
                        f"{error}; repair or remove it, or pass over such images with data.broken: skip"
                    ) from None
                passed_over.append(f"{folder.name}/{path.name}")
                _log.warning("%s; passed over", error)
            else:
                labels.append(label)
        if len(labels) == before:
            what = "no image that can be read" if paths else f"no images ({', '.join(sorted(SUFFIXES))})"
            raise DataError(f"{folder}: {what}; fill the folder or remove it")
    return torch.from_numpy(x[: len(labels)]), torch.tensor(labels, dtype=torch.int64)


def _statistics(x: Tensor, which: Tensor) -> tuple[tuple[int, ...], float]:
    """Rounded mean of each channel, and the standard deviation (divisor count - 1) of all pixels together.

    From counts of the 256 values, so that no number of pixels costs memory, and sums are exact.

    Args:
        x: u8 ``[N, C, H, W]``.
        which: int64, the images to look at.
    """
    counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)
    for part in torch.split(which, max(1, _AT_ONCE // x[0].numel())):
        for channel, pixels in enumerate(x[part].transpose(0, 1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
    values = torch.arange(256)
    sums: list[int] = (counts * values).sum(1).tolist()
    in_channel = len(which) * x[0, 0].numel()
    # integers of any size; Python rounds their quotients once
    count, total, squares = in_channel * len(sums), sum(sums), int((counts * values**2).sum())
    variance = (count * squares - total**2) / (count * (count - 1)) if count > 1 else 0.0
    return tuple(round(s / in_channel) for s in sums), math.sqrt(variance)


@DATASETS.register("image_folder")
def image_folder(
    root: str | Path | None = None,
    size: int = 32,
    channels: int = 3,
    validation_fraction: float = 0.2,
    train_images: int | None = None,
    resize: int | None = None,
    broken: Literal["stop", "skip"] = "stop",
) -> ImageData:
    """A folder of images, one folder for each class; classes in the order of their sorted names.

    Zero points are the rounded mean of the training images' pixels for each channel, the scale is 1 / their standard
    deviation; neither looks at validation or test images.

    Args:
        root: the folder. With ``root/train`` and ``root/test``, the second is the test set; else there is none.
        size: images are resized and centre-cropped to ``size`` x ``size``.
        channels: 1 (gray) or 3 (RGB).
        validation_fraction: share of the training images that is held out, drawn with a fixed seed.
        train_images: use only this many training images.
        resize: the shorter side becomes this long before the centre is cut out; None keeps as much as possible
            (``lowbit.predict.centre``).
        broken: what an image that can't be read does: "stop", or "skip": it is passed over, logged and counted in run.json.

    Raises:
        DataError: no such folder, fewer than two classes, an empty class, an unreadable image, impossible settings.
    """
    if root is None:
        raise DataError("image_folder needs data.root: a folder with one folder of images for each class")
    if channels not in (1, 3):
        raise DataError(f"data.channels = {channels}: 1 (gray) or 3 (RGB)")
    if size < 1:
        raise DataError(f"data.size = {size}: at least 1")
    if resize is not None and resize < size:
        raise DataError(f"data.resize = {resize}: at least data.size = {size}")
    if broken not in ("stop", "skip"):
        raise DataError(f"data.broken = {broken!r}: stop or skip")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(f"data.validation_fraction = {validation_fraction}: between 0 and 1")
    base = Path(root).expanduser()
    apart = (base / "train").is_dir() and (base / "test").is_dir()
    folders = _class_folders(base / "train" if apart else base)
    names = tuple(folder.name for folder in folders)
    found: list[str] = []
    passed_over = found if broken == "skip" else None
    files = "\n".join(f"{folder.name}/{path.name}" for folder in folders for path in _images(folder))
    x, y = _read(folders, (size, size), channels, resize, passed_over)
    validation = max(1, round(len(x) * validation_fraction))
    if validation >= len(x):
        raise DataError(f"{base}: {len(x)} images are too few to hold {validation} out")
    train, _ = split_indices(len(x), validation, SPLIT_SEED)
    zero_point, deviation = _statistics(x, train)

    def read_test() -> tuple[Tensor, Tensor]:
        if not apart:
            raise DataError(f"{base}: no test set; put images into {base / 'test'}/<class> and the rest into train")
        test_folders = [base / "test" / name for name in names]
        for folder in test_folders:
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; the test set must have the classes of the training set")
        return _read(test_folders, (size, size), channels, resize, passed_over)

    return ImageData(
        name="image_folder",
        classes=names,
        shape=(channels, size, size),
        zero_point=zero_point,
        scale=1 / max(deviation, 1.0),
        read_train=lambda: (x, y),
        read_test=read_test,
        validation=validation,
        split_seed=SPLIT_SEED,
        train_images=train_images,
        has_test=apart,
        resize=resize,
        found_broken=found,
        files=files.encode(errors="surrogateescape"),
    )
