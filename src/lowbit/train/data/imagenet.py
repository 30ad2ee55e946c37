"""ImageNet (Russakovsky et al., arXiv 1409.0575), or any set of images too large for memory, as folders or as shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lowbit.predict import SUFFIXES
from lowbit.train.data import DATASETS
from lowbit.train.data.decode import Geometry
from lowbit.train.data.images import DataError
from lowbit.train.data.shards import ShardRecords, open_index
from lowbit.train.data.streaming import Encoded, Numbers, Records, StreamingData

__all__ = ["FileRecords", "ImageFolder", "imagenet_folder", "imagenet_shards", "read_folder"]

SPLIT_SEED = 20_201_204
VALIDATION = 10_000
ZERO_POINT, SCALE = (124, 116, 104), 1 / 58
"""ImageNet's training pixels, rounded: means 123.7, 116.3, 103.5, standard deviations 58.4, 57.1, 57.4."""


class FileRecords(Records):
    """Image files. Names are kept as arrays of bytes: a million Python strings would be copied into every worker.

    Args:
        root: the folder that names are relative to.
        folders: folder of each class, relative to ``root``; or one for all.
        names: file name of each image.
        labels: class of each image.
    """

    def __init__(self, root: Path, folders: list[str], names: list[bytes], labels: list[int]) -> None:
        self._root, self._folders = root, folders
        self._names, self._labels = np.array(names, np.bytes_), np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def order(self, generator: torch.Generator) -> Numbers:
        return torch.randperm(len(self), generator=generator).numpy()

    @property
    def identity(self) -> bytes:
        return self._names.tobytes() + self._labels.astype("<i4").tobytes()

    def read(self, number: int) -> Encoded:
        label = int(self._labels[number])
        folder = self._folders[label] if len(self._folders) > 1 else self._folders[0]
        name = f"{folder}/{os.fsdecode(bytes(self._names[number]))}"
        try:
            data = (self._root / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self._root / name}: can't be read ({error.strerror})") from None
        return Encoded(data, label, name)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images as it was found: classes in the order of their names, and the images."""

    classes: tuple[str, ...]
    train: FileRecords
    test: FileRecords | None


def _files(folder: Path) -> list[bytes]:
    with os.scandir(os.fsencode(folder)) as entries:
        found = [entry.name for entry in entries if not entry.name.startswith(b".")]
    kept = sorted(name for name in found if os.path.splitext(os.fsdecode(name))[1].lower() in SUFFIXES)  # noqa: PTH122
    if not kept:
        raise DataError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}); fill the folder or remove it")
    return kept


def _by_class(root: Path, part: str, classes: tuple[str, ...]) -> FileRecords:
    names: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / part / name
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; {root / part} must have the classes of the training set")
        found = _files(folder)
        names += found
        labels += [label] * len(found)
    return FileRecords(root, [f"{part}/{name}" for name in classes], names, labels)


def _by_list(root: Path, part: str, classes: tuple[str, ...], labels_file: Path) -> FileRecords:
    """A flat folder, and a file with a line ``name class`` for each image (more columns or a comma are fine)."""
    number = {name: i for i, name in enumerate(classes)}
    known: dict[bytes, int] = {}
    try:
        lines = labels_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{labels_file}: can't be read ({error}); data.val_labels names the classes of a flat val"
        ) from None
    for i, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words or (i == 1 and words[-1] not in number and len(words) > 1 and words[1] not in number):
            continue  # an empty line, a heading
        if len(words) < 2 or words[1] not in number:
            raise DataError(f"{labels_file}: line {i} is no name and class: {line[:60]!r}")
        known[os.fsencode(words[0])] = number[words[1]]
    names = _files(root / part)
    labels = []
    for name in names:
        stem = os.path.splitext(name)[0]  # noqa: PTH122
        label = known.get(name, known.get(stem))
        if label is None:
            raise DataError(f"{labels_file}: has no line for {os.fsdecode(name)}")
        labels.append(label)
    return FileRecords(root, [part], names, labels)


def read_folder(root: str | Path | None, val_labels: str | None = None) -> ImageFolder:
    """List the images of ``root/train/<class>/`` and ``root/val/``; none is opened.

    Raises:
        DataError: no such folder, fewer than two classes, an empty class, another class in val, a broken list.
    """
    if root is None:
        raise DataError("imagenet_folder needs data.root: a folder with train/<class>/ and val/<class>/")
    base = Path(root).expanduser()
    train = base / "train"
    if not train.is_dir():
        raise DataError(f"{train}: no such folder; data.root must hold train/<class>/ and val/<class>/")
    classes = tuple(sorted(p.name for p in train.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if len(classes) < 2:
        raise DataError(f"{train}: {len(classes)} class folders, at least 2 are needed, each full of images")
    records = _by_class(base, "train", classes)
    if not (base / "val").is_dir():
        return ImageFolder(classes, records, None)
    if val_labels is not None:
        return ImageFolder(classes, records, _by_list(base, "val", classes, base / val_labels))
    others = sorted(p.name for p in (base / "val").iterdir() if p.is_dir() and p.name not in classes)
    if others:
        raise DataError(f"{base / 'val' / others[0]}: the training set has no such class")
    if not any(p.is_dir() for p in (base / "val").iterdir()):
        raise DataError(
            f"{base / 'val'}: no class folders; data.val_labels can name a file of lines 'name class' instead"
        )
    return ImageFolder(classes, records, _by_class(base, "val", classes))


@DATASETS.register("imagenet_folder")
def imagenet_folder(
    root: str | Path | None = None,
    size: int = 224,
    resize: int = 256,
    validation_images: int = VALIDATION,
    val_labels: str | None = None,
    train_images: int | None = None,
    broken: Literal["stop", "skip"] = "stop",
) -> StreamingData:
    """ImageNet, or any images too many for memory, as folders: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

    The ``val`` folder is the test set: published accuracies are measured on it. To choose by, ``validation_images`` of the
    training images are held out. ``zero_point`` and ``scale`` are ImageNet's.

    Args:
        root: the folder.
        size: images are cut to ``size`` x ``size``.
        resize: evaluation resizes the shorter side to this first.
        validation_images: how many training images are held out, drawn with a fixed seed.
        val_labels: for a flat ``val`` folder: a file below ``root`` with a line "name class" for each of its images.
        train_images: use only this many training images.
        broken: what an unreadable image does: "stop", or "skip" (logged, counted in run.json; see ``StreamingData``).

    Raises:
        DataError: see ``read_folder``; impossible settings.
    """
    geometry = Geometry(size, resize)
    folder = read_folder(root, val_labels)
    return StreamingData(
        "imagenet_folder",
        folder.classes,
        ZERO_POINT,
        SCALE,
        geometry,
        folder.train,
        folder.test,
        validation_images,
        SPLIT_SEED,
        train_images,
        broken,
        no_test=f"no test set; put images into {Path(root or '').expanduser() / 'val'}/<class>",
    )


@DATASETS.register("imagenet_shards")
def imagenet_shards(
    root: str | Path | None = None,
    size: int = 224,
    resize: int = 256,
    validation_images: int = VALIDATION,
    shuffle: int = 10_000,
    train_images: int | None = None,
    broken: Literal["stop", "skip"] = "stop",
) -> StreamingData:
    """ImageNet, or any images too many for memory, as WebDataset shards: ``train-*.tar``, ``val-*.tar``, ``shards.json``.

    ``python -m lowbit.train.data.shards FOLDER OUT`` writes them. Splits, sizes and constants as for ``imagenet_folder``.
    An epoch takes the shards in random order, mixing neighbours until ``shuffle`` images are together: where the images of
    a shard are of one kind, it takes a large number.

    Args:
        root: the folder of shards.
        size: images are cut to ``size`` x ``size``.
        resize: evaluation resizes the shorter side to this first.
        validation_images: how many training images are held out, drawn with a fixed seed.
        shuffle: how many images are mixed at least.
        train_images: use only this many training images.
        broken: what an unreadable image does: "stop", or "skip" (logged, counted in run.json; see ``StreamingData``).

    Raises:
        DataError: no shards, a shard that is missing or cut short, impossible settings.
    """
    if root is None:
        raise DataError("imagenet_shards needs data.root: a folder of shards, train-*.tar and val-*.tar")
    if shuffle < 1:
        raise DataError(f"data.shuffle = {shuffle}: at least 1")
    geometry, base = Geometry(size, resize), Path(root).expanduser()
    index = open_index(base)
    return StreamingData(
        "imagenet_shards",
        index.classes,
        ZERO_POINT,
        SCALE,
        geometry,
        ShardRecords(base, index, "train", shuffle),
        ShardRecords(base, index, "test", shuffle) if index.test else None,
        validation_images,
        SPLIT_SEED,
        train_images,
        broken,
        no_test=f"no test set; put val-*.tar into {base}",
    )
