"""CIFAR-10 and CIFAR-100: 50,000 + 10,000 colour images, 32x32 (Krizhevsky, "Learning multiple layers of features from
tiny images", 2009), in the authors' binary layout.

A batch is a row of records: the label (CIFAR-100: the coarse one, then the fine one), a byte each, then 1024 bytes of red,
of green and of blue, each row-major.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.train.data import DATASETS, download
from lowbit.train.data.images import DataError, ImageData

__all__ = ["CIFAR10", "CIFAR100", "Layout", "cifar10", "cifar100", "find", "read_batch", "there"]

PIXELS = 3 * 32 * 32
VALIDATION, SPLIT_SEED = 5_000, 20_201_204
"""5,000 of the 50,000 training images are held out, as many as in He et al. (1512.03385, section 4.2): the first of the
permutation with this seed."""
MIRRORS = ("https://www.cs.toronto.edu/~kriz/",)


@dataclass(frozen=True)
class Layout:
    """One of the two sets: its files, its labels, its pixels.

    Attributes:
        name: of the data set.
        archive, md5: the official archive and its MD5.
        folder: the folder in the archive.
        train, test: the batches, each with its number of records.
        labels: name and number of values of each label byte of a record; the last one is the class.
        names_file: the file with one class name a line; `classes` are the official ones.
        zero_point, deviation: rounded means of the channels and standard deviation of the training pixels.
    """

    name: str
    archive: str
    md5: str
    folder: str
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    labels: tuple[tuple[str, int], ...]
    names_file: str
    classes: tuple[str, ...]
    zero_point: tuple[int, int, int]
    deviation: int


CIFAR10 = Layout(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    train=tuple((f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
    test=(("test_batch.bin", 10_000),),
    labels=(("label", 10),),
    names_file="batches.meta.txt",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    zero_point=(125, 123, 114),  # means 125.31, 122.95, 113.87
    deviation=64,  # 62.99, 62.09, 66.70 by channel
)
# fmt: off
_FINE = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on
CIFAR100 = Layout(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    train=(("train.bin", 50_000),),
    test=(("test.bin", 10_000),),
    labels=(("coarse label", 20), ("fine label", 100)),
    names_file="fine_label_names.txt",
    classes=_FINE,
    zero_point=(129, 124, 112),  # means 129.30, 124.07, 112.43
    deviation=68,  # 68.17, 65.39, 70.42 by channel
)


def read_batch(data: bytes, where: str, records: int, labels: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    """Images u8 ``[N, 3, 32, 32]`` and labels int64 ``[N]`` (the last label byte) of one batch.

    Args:
        data: the file's bytes.
        where: its name, for messages.
        records: N.
        labels: name and number of values of each label byte.

    Raises:
        DataError: too few or too many bytes, or a label that is none; names file and record, counted from 1.
    """
    size = len(labels) + PIXELS
    if len(data) != records * size:
        whole = len(data) // size
        if whole < records:
            problem = f"is cut short in record {whole + 1} of {records}"
        else:
            problem = f"goes on after record {records} with {len(data) - records * size} bytes"
        raise DataError(f"{where}: {problem} ({len(data)} bytes, not {records} records of {size}); unpack it again")
    table = np.frombuffer(data, np.uint8).reshape(records, size)
    for column, (name, values) in enumerate(labels):
        wrong = np.flatnonzero(table[:, column] >= values)
        if len(wrong):
            label = int(table[wrong[0], column])
            raise DataError(f"{where}: record {wrong[0] + 1} has the {name} {label}, expected 0 to {values - 1}")
    images = torch.from_numpy(table[:, len(labels) :].reshape(records, 3, 32, 32).copy())
    return images, torch.from_numpy(table[:, len(labels) - 1].astype(np.int64))


def there(layout: Layout, place: Path) -> Path | None:
    """The folder of batches or the archive at `place`, if either is there."""
    if place.is_file():
        return place
    for folder in (place, place / layout.folder):
        if any((folder / name).is_file() for name, _ in (*layout.train, *layout.test)):
            return folder
    return place / layout.archive if (place / layout.archive).is_file() else None


def find(layout: Layout, root: str | Path | None = None, fetch: bool = True) -> Path | None:
    """The folder of .bin files or the .tar.gz to read from: at ``root`` if given, else in the user's cache, else downloaded.

    Args:
        layout: which of the two sets.
        root: a folder with the .bin files, with the archive's folder or with the archive in it; or the archive.
        fetch: download what is not there; if not, it is None.

    Raises:
        DataError: ``root`` holds nothing of the kind, or nothing could be downloaded.
    """
    if root is not None:
        place = Path(root).expanduser()
        found = there(layout, place)
        if found is None:
            raise DataError(
                f"{place}: no {layout.train[0][0]} and no {layout.archive} here; data.root must hold the binary version of "
                f"{layout.name}, or be its archive"
            )
        return found
    cache = download.cache_folder(layout.name)
    found = there(layout, cache)
    if found is not None or not fetch:
        return found
    otherwise = f"Put {layout.archive} into that folder, or say with data.root where it lies"
    return download.fetch(layout.archive, MIRRORS, cache, partial(_problem, md5=layout.md5), otherwise)


def _problem(path: Path, md5: str) -> str | None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return None if found == md5 else f"MD5 {found}, expected {md5}"


def _read(layout: Layout, place: Path, batches: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
    content = _unpack(layout, place, [name for name, _ in batches]) if place.is_file() else {}
    parts = []
    for name, records in batches:
        if place.is_file():
            where, data = f"{place}, {layout.folder}/{name}", content[name]
        else:
            where = str(place / name)
            try:
                data = (place / name).read_bytes()
            except OSError as error:
                raise DataError(f"{where}: can't be read ({error.strerror})") from None
        parts.append(read_batch(data, where, records, layout.labels))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _unpack(layout: Layout, archive: Path, names: list[str]) -> dict[str, bytes]:
    wanted = {f"{layout.folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                content = tar.extractfile(member) if name is not None else None
                if name is not None and content is not None:
                    found[name] = content.read()
            while stream.read(1 << 20):  # gzip's checksum stands at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        again = "; delete it and it is fetched again" if archive.parent == download.cache_folder(layout.name) else ""
        raise DataError(f"{archive}: not a whole archive ({error}){again}") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{archive}: has no {layout.folder}/{missing[0]}; {layout.archive} is needed")
    return found


def _class_names(layout: Layout, place: Path | None) -> tuple[str, ...]:
    """The names in the file beside the batches; the official archive's are known."""
    if place is None or place.is_file() or not (place / layout.names_file).is_file():
        return layout.classes
    path = place / layout.names_file
    names = tuple(path.read_text(encoding="utf-8", errors="replace").split())
    if len(names) != len(layout.classes) or len(set(names)) != len(names):
        raise DataError(
            f"{path}: {len(set(names))} different names, expected {len(layout.classes)}; it can be left out"
        )
    return names


def _build(layout: Layout, root: str | Path | None, train_images: int | None) -> ImageData:
    def read(batches: tuple[tuple[str, int], ...]) -> tuple[Tensor, Tensor]:
        place = find(layout, root)
        assert place is not None
        return _read(layout, place, batches)

    return ImageData(
        name=layout.name,
        classes=_class_names(layout, find(layout, root, fetch=False)),
        shape=(3, 32, 32),
        zero_point=layout.zero_point,
        scale=1 / layout.deviation,
        read_train=lambda: read(layout.train),
        read_test=lambda: read(layout.test),
        validation=VALIDATION,
        split_seed=SPLIT_SEED,
        train_images=train_images,
    )


@DATASETS.register("cifar10")
def cifar10(root: str | Path | None = None, train_images: int | None = None) -> ImageData:
    """CIFAR-10, 32x32x3, ten classes.

    ``zero_point`` and ``scale`` are the training pixels' means and 1 / standard deviation, rounded: (125, 123, 114), 1/64.

    Args:
        root: the binary version's folder or archive; by default the user's cache, or a download of 162 MiB.
        train_images: use only this many of the 45,000 training images that are left after the split.
    """
    return _build(CIFAR10, root, train_images)


@DATASETS.register("cifar100")
def cifar100(root: str | Path | None = None, train_images: int | None = None) -> ImageData:
    """CIFAR-100, 32x32x3, the hundred fine classes.

    ``zero_point`` and ``scale`` are the training pixels' means and 1 / standard deviation, rounded: (129, 124, 112), 1/68.

    Args:
        root: the binary version's folder or archive; by default the user's cache, or a download of 161 MiB.
        train_images: use only this many of the 45,000 training images that are left after the split.
    """
    return _build(CIFAR100, root, train_images)
