"""Shards in the WebDataset layout: tar files in which ``key.jpg`` and ``key.cls`` (or ``key.json``) are one sample.

A file system reads a few thousand large files faster than a million small ones. Beside the shards lies an index::

    shards.json    {"format": 1, "classes": [name, ...],
                    "train": [{"name": "train-000000.tar", "samples": 1000, "bytes": 112640000}, ...], "test": [...]}

Without one the shards are counted at first use (``train-*.tar``; ``val-*.tar`` or, where there are none, ``test-*.tar``) and
the index is written; class names come from ``classes.txt``, a line each, or are the numbers. Shards of these names that came
later than the index are an error.

Beside it lies ``shards.npz``, which says of every sample where its image is and which label it has, so that no run, epoch or
worker looks for samples again: 20 bytes each, 26 MB for ImageNet. It is made anew when it is missing or when a shard has another
size or time of modification.

``key`` is a member's name up to the first dot behind the last slash; members of one sample stand next to each other. ``cls``
holds the class's number as text, ``json`` an object with it under ``label``.

A shard is read by offset, not as a pipe: the epoch's order is worked out from the counts alone, so that every rank and
every worker knows its images beforehand, none is read twice, and all ranks get equally many. That is what the
``webdataset`` library can't promise: there, the order depends on the number of workers, and an epoch's size is a number of
samples after which a stream is cut, or begun again. So this reader stands on ``tarfile`` instead. The shards have to lie on
a file system, uncompressed.

``python -m lowbit.train.data.shards FOLDER OUT`` makes shards of an image folder.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lowbit.files import write_atomic
from lowbit.train.data.images import DataError
from lowbit.train.data.streaming import Encoded, Numbers, Records

__all__ = ["Index", "Shard", "ShardRecords", "open_index", "write_shards"]

INDEX, PLACES, CLASSES, FORMAT = "shards.json", "shards.npz", "classes.txt", 1
IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
SHUFFLE_SEED = 20_201_204
_OPEN = 500
"""Shards a worker may hold open; processes are often allowed 1024 files."""

_log = logging.getLogger("lowbit.train")

Part = Literal["train", "test"]
Places = NDArray[np.void]
_PLACE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
"""Where an image lies in its shard, and its label. The tar header of its file is the block in front of it."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, its number of samples, its size."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """What lies in a folder of shards; `test` may be empty. `places`: of all samples, those of `train` first."""

    classes: tuple[str, ...]
    train: tuple[Shard, ...]
    test: tuple[Shard, ...] = ()
    places: Places = field(default_factory=lambda: np.empty(0, _PLACE), repr=False, compare=False)

    def to_json(self) -> str:
        """The content of shards.json; the places have a file of their own."""
        tree = {
            "format": FORMAT,
            "classes": list(self.classes),
            "train": [asdict(shard) for shard in self.train],
            "test": [asdict(shard) for shard in self.test],
        }
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------ one shard


@dataclass(frozen=True)
class _Sample:
    key: str
    image: tuple[int, int]
    """Offset and size."""
    label: tuple[int, int]
    label_kind: str


def _key(name: str) -> tuple[str, str]:
    """("a/b", "jpg") of "a/b.jpg"; ("a/b", "seg.png") of "a/b.seg.png"."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def _scan(stream: BinaryIO, path: Path) -> list[_Sample]:
    """Where each sample of a shard lies. Reads the headers alone.

    Raises:
        DataError: not a tar file, cut short, or a sample without an image or label; names the shard.
    """
    members: list[tuple[str, str, tuple[int, int]]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    members.append((*_key(member.name), (member.offset_data, member.size)))
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a whole tar file ({error}); compressed shards have to be unpacked") from None
    # tarfile takes whatever is no header for the end; the end is a block of zeros
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{path}: this shard is cut short or damaged at byte {end}")
    samples = []
    groups: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for key, extension, place in members:
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        if extension in groups[-1][1]:
            raise DataError(f"{path}: sample {key!r} has two members .{extension}")
        groups[-1][1][extension] = place
    if len({key for key, _ in groups}) != len(groups):
        raise DataError(f"{path}: the members of a sample do not stand next to each other, or two have one key")
    for key, places in groups:
        image = [place for extension, place in places.items() if extension in IMAGES]
        kind = next((kind for kind in ("cls", "json") if kind in places), None)
        if len(image) != 1 or kind is None:
            raise DataError(f"{path}: sample {key!r} needs one image and a .cls or .json, has .{', .'.join(places)}")
        samples.append(_Sample(key, image[0], places[kind], kind))
    return samples


def _label(data: bytes, kind: str, where: str) -> int:
    try:
        label = int(data) if kind == "cls" else json.loads(data)["label"]
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        asked = "one number of a class" if kind == "cls" else 'an object with "label": number'
        raise DataError(f"{where}: .{kind} holds {data[:40]!r}, not {asked}") from None
    return label


class _OpenShard:
    """A shard that is read by offset; refused where it has not the expected size."""

    def __init__(self, path: Path, expected: int | None = None) -> None:
        self._path = path
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise _unreadable(path, error) from None
        try:
            self.size = os.fstat(self._stream.fileno()).st_size
            if expected is not None:
                _check_size(path, expected, self.size)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> _OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._stream.fileno(), size, offset)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        if len(data) != size:
            raise DataError(f"{self._path}: this shard has become shorter: {len(data)} of {size} bytes at {offset}")
        return data

    def places(self) -> Places:
        """Of all samples, found by reading through the headers."""
        samples = _scan(self._stream, self._path)
        found = np.empty(len(samples), _PLACE)
        for i, sample in enumerate(samples):
            where = f"{self._path}: sample {sample.key!r}"
            found[i] = (*sample.image, _label(self._bytes(*sample.label), sample.label_kind, where))
        return found

    def read(self, place: np.void) -> Encoded:
        offset, size, label = place.item()
        # the header is read with the image: it has the name for messages, and tells whether the place still holds
        data = self._bytes(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        try:
            header = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        if header is None or header.size != size:
            raise DataError(
                f"{self._path}: this shard has changed: no image of {size} bytes at {offset}; start again, or, if that does "
                f"not help, remove {self._path.with_name(PLACES)}"
            )
        return Encoded(data[tarfile.BLOCKSIZE :], label, f"{self._path.name}/{_key(header.name)[0]}")


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: this shard is missing; {INDEX} says that it belongs to the data set")
    return DataError(f"{path}: can't be read ({error.strerror})")


def _check_size(path: Path, expected: int, size: int) -> None:
    if size != expected:
        raise DataError(
            f"{path}: {size} bytes, {expected} in {INDEX}: this shard is cut short or another; put the right one there, or "
            f"remove {INDEX} to have the shards counted again"
        )


# ------------------------------------------------------------------------------------------------ the index


def open_index(folder: Path) -> Index:
    """The index of a folder of shards, and the places of all samples.

    What is not there or does not fit is found out by reading through the shards, and written if the folder lets us.

    Raises:
        DataError: no folder, no shards, a broken index or shard, a shard of the index that is not there or is another, a
            shard that is there and not in the index, a label without a class.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; data.root must hold shards, train-*.tar")
    path = folder / INDEX
    if not path.is_file():
        return _count(folder)
    index = _read_index(path)
    shards = (*index.train, *index.test)
    unlisted = sorted({name for names in _names(folder).values() for name in names} - {shard.name for shard in shards})
    if unlisted:
        more = f" and {len(unlisted) - 3} more" if len(unlisted) > 3 else ""
        raise DataError(
            f"{folder}: {', '.join(unlisted[:3])}{more} not in {INDEX}, which knows {len(shards)} shards; delete {path} to "
            "have the shards counted again, or put what does not belong to the data set elsewhere"
        )
    stamp = _stamp(folder, shards)
    places = _read_places(folder / PLACES, stamp, sum(shard.samples for shard in shards))
    if places is None:
        places = _read_through(folder, shards)
        _write_if_allowed(folder / PLACES, _places_file(places, stamp))
    index = replace(index, places=places)
    _check_labels(folder, index)
    return index


def _read_index(path: Path) -> Index:
    """What shards.json says."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise DataError(f"{path}: format {tree['format']!r}, this version reads {FORMAT}")
        train, test = (
            tuple(Shard(str(s["name"]), int(s["samples"]), int(s["bytes"])) for s in tree[part])
            for part in ("train", "test")
        )
        index = Index(tuple(map(str, tree["classes"])), train, test)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path}: a broken index ({type(error).__name__}: {error}); without it the shards are counted"
        ) from None
    for shard in (*index.train, *index.test):
        if shard.samples < 0 or PurePosixPath(shard.name).name != shard.name:
            raise DataError(f"{path}: {shard.name!r} with {shard.samples} samples is no shard of this folder")
    if not index.train or len(index.classes) < 2:
        raise DataError(f"{path}: {len(index.train)} training shards, {len(index.classes)} classes")
    return index


def _names(folder: Path) -> dict[Part, list[str]]:
    """The shards that lie in a folder, by name."""

    def named(prefix: str) -> list[str]:
        return sorted(path.name for path in folder.glob(f"{prefix}-*.tar"))

    return {"train": named("train"), "test": named("val") or named("test")}


def _stamp(folder: Path, shards: Sequence[Shard]) -> bytes:
    """What the places depend on. Refuses a shard that is missing or of another size."""
    rows = []
    for shard in shards:
        path = folder / shard.name
        try:
            found = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from None
        _check_size(path, shard.bytes, found.st_size)
        rows.append([*astuple(shard), found.st_mtime_ns])
    return json.dumps(rows).encode()


def _places_file(places: Places, stamp: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, shards=np.frombuffer(stamp, np.uint8), places=places)
    return stream.getvalue()


def _read_places(path: Path, stamp: bytes, count: int) -> Places | None:
    """The places of `count` samples; None where the file is missing, damaged, or of other shards."""
    try:
        with np.load(path, allow_pickle=False) as found:
            if found["shards"].tobytes() != stamp:
                return None
            places: Places = found["places"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return places if places.dtype == _PLACE and places.shape == (count,) else None


def _read_through(folder: Path, shards: Sequence[Shard]) -> Places:
    _log.info("%s: reading through %d shards once", folder, len(shards))
    found = []
    for shard in shards:
        with _OpenShard(folder / shard.name, shard.bytes) as opened:
            found.append(opened.places())
        if len(found[-1]) != shard.samples:
            raise DataError(
                f"{folder / shard.name}: {len(found[-1])} samples, {shard.samples} in {INDEX}; remove {INDEX} to have the "
                "shards counted again"
            )
    return np.concatenate(found)


def _check_labels(folder: Path, index: Index) -> None:
    wrong = np.flatnonzero(index.places["label"] >= len(index.classes))
    if len(wrong):
        shards = (*index.train, *index.test)
        starts = np.cumsum([0, *(shard.samples for shard in shards)])
        shard = shards[int(np.searchsorted(starts, wrong[0], side="right")) - 1]
        with _OpenShard(folder / shard.name) as opened:
            found = opened.read(index.places[wrong[0]])
        raise DataError(f"{folder / found.name}: label {found.label}, but there are {len(index.classes)} classes")


def _count(folder: Path) -> Index:
    """The index of a folder that has none."""
    names = _names(folder)
    if not names["train"]:
        raise DataError(f"{folder}: no {INDEX} and no train-*.tar; `python -m lowbit.train.data.shards` writes both")
    if any(name.startswith("val-") for name in names["test"]) and any(folder.glob("test-*.tar")):
        _log.warning("%s: val-*.tar are taken for the test set, test-*.tar are passed over", folder)
    _log.info("%s: counting %d shards once", folder, sum(map(len, names.values())))
    shards: dict[Part, list[Shard]] = {"train": [], "test": []}
    found = []
    for part in names:
        for name in names[part]:
            with _OpenShard(folder / name) as opened:
                found.append(opened.places())
                shards[part].append(Shard(name, len(found[-1]), opened.size))
    places = np.concatenate(found)
    highest = int(places["label"].max(initial=0))
    path = folder / CLASSES
    if path.is_file():
        classes = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        if len(classes) <= highest:
            raise DataError(f"{path}: {len(classes)} classes, but there is a label {highest}")
    else:
        classes = tuple(map(str, range(highest + 1)))
    if len(classes) < 2:
        raise DataError(f"{folder}: {len(classes)} classes in these shards, at least 2 are needed")
    index = Index(classes, tuple(shards["train"]), tuple(shards["test"]), places)
    _write_if_allowed(folder / INDEX, index.to_json().encode("utf-8"))
    _write_if_allowed(folder / PLACES, _places_file(places, _stamp(folder, (*index.train, *index.test))))
    return index


def _write_if_allowed(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        _log.warning("%s can't be kept (%s): the shards are read through at every start", path, error.strerror)


# ------------------------------------------------------------------------------------------------ reading


class ShardRecords(Records):
    """The samples of a row of shards, numbered through.

    Args:
        folder: where the shards lie.
        index: its index.
        part: "train" or "test".
        shuffle: an epoch takes the shards in random order and mixes those that stand next to each other, until there
            are so many images to mix.

    Raises:
        DataError: so many images lie in more shards than can be open at once.
    """

    def __init__(self, folder: Path, index: Index, part: Part, shuffle: int) -> None:
        self._folder, self._shuffle = folder, shuffle
        self._shards: tuple[Shard, ...] = getattr(index, part)
        self._starts = np.cumsum([0, *(shard.samples for shard in self._shards)])
        count = len(self)
        self._places = index.places[:count] if part == "train" else index.places[len(index.places) - count :]
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()
        # a batch may reach from one pool into the next; the most shards a pool can have are so many of the smallest
        smallest = np.cumsum(sorted(shard.samples for shard in self._shards))
        self._keep = 2 * min(int(np.searchsorted(smallest, shuffle)) + 1, len(self._shards))
        if self._keep > _OPEN:
            raise DataError(
                f"data.shuffle = {shuffle} mixes the images of {self._keep // 2} shards, at most {_OPEN // 2} can be open at "
                "once; write larger shards, or mix less"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}  # file handles stay in their process

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, generator: torch.Generator) -> Numbers:
        """Shards in random order, pooled until `shuffle` images are together, each pool in random order."""
        pools: list[Numbers] = []
        pool: list[Numbers] = []
        for s in torch.randperm(len(self._shards), generator=generator).tolist():
            pool.append(np.arange(self._starts[s], self._starts[s + 1], dtype=np.int64))
            if sum(map(len, pool)) >= self._shuffle:
                pools.append(np.concatenate(pool))
                pool = []
        if pool:
            pools.append(np.concatenate(pool))
        return np.concatenate([p[torch.randperm(len(p), generator=generator).numpy()] for p in pools])

    @property
    def identity(self) -> bytes:
        return json.dumps([asdict(shard) for shard in self._shards]).encode()

    def read(self, number: int) -> Encoded:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._open(which).read(self._places[number])

    def _open(self, which: int) -> _OpenShard:
        if which in self._opened:
            self._opened.move_to_end(which)
            return self._opened[which]
        shard = self._shards[which]
        self._opened[which] = _OpenShard(self._folder / shard.name, shard.bytes)
        while len(self._opened) > self._keep:
            _, oldest = self._opened.popitem(last=False)
            oldest.__exit__()
        return self._opened[which]


# ------------------------------------------------------------------------------------------------ writing


def write_shards(
    root: Path, out: Path, samples: int = 1000, val_labels: str | None = None, show_progress: bool = False
) -> Index:
    """Write the shards of an image folder, and their index. The image files go in as they are.

    Args:
        root: an image folder, see ``imagenet_folder``.
        out: an empty or new folder.
        samples: images in a shard; training images are dealt out in a fixed random order, so that each shard is a mixture.
        val_labels: see ``imagenet_folder``.
        show_progress: draw a bar on standard error.

    Returns:
        The index.

    Raises:
        DataError: no image folder, or ``out`` can't be used.
    """
    from lowbit.train.data.imagenet import read_folder

    if samples < 1:
        raise DataError(f"{samples} samples in a shard: at least 1")
    folder = read_folder(root, val_labels)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DataError(f"{out}: is not empty; shards go into a folder of their own")
        write_atomic(out / CLASSES, "".join(f"{name}\n" for name in folder.classes).encode("utf-8"))
        written: dict[str, list[Shard]] = {"train": [], "test": []}
        places: list[Places] = []
        parts: dict[str, tuple[str, Records | None]] = {"train": ("train", folder.train), "test": ("val", folder.test)}
        for part, (prefix, records) in parts.items():
            if records is None:
                continue
            order = np.random.RandomState(SHUFFLE_SEED).permutation(len(records))
            pieces = [order[start : start + samples] for start in range(0, len(order), samples)]
            for i, numbers in enumerate(_progress(pieces, prefix, show_progress)):
                path = out / f"{prefix}-{i:06d}.tar"
                places.append(_write_shard(path, records, numbers))
                written[part].append(Shard(path.name, len(numbers), path.stat().st_size))
        index = Index(folder.classes, tuple(written["train"]), tuple(written["test"]), np.concatenate(places))
        write_atomic(out / PLACES, _places_file(index.places, _stamp(out, (*index.train, *index.test))))
        write_atomic(out / INDEX, index.to_json().encode("utf-8"))
    except OSError as error:
        raise DataError(f"{error.filename or out}: can't be written ({error.strerror or error})") from None
    return index


def _progress(pieces: list[Numbers], what: str, shown: bool) -> Iterator[Numbers]:
    from rich.console import Console
    from rich.progress import track

    yield from track(pieces, f"{what} shards", console=Console(stderr=True), disable=not shown)


def _write_shard(path: Path, records: Records, numbers: Numbers) -> Places:
    part = path.with_name(f".{path.name}.part")
    places = np.empty(len(numbers), _PLACE)
    try:
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, number in enumerate(numbers.tolist()):
                record = records.read(number)
                places[i] = (tar.offset + tarfile.BLOCKSIZE, len(record.data), record.label)
                stem, extension = os.path.splitext(PurePosixPath(record.name).name)  # noqa: PTH122
                extension = extension.lower().replace("jpeg", "jpg")
                # the number makes it unique, the file's own name tells in a message which image it was
                key = f"{number:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:60]}"
                for name, content in ((f"{key}{extension}", record.data), (f"{key}.cls", str(record.label).encode())):
                    member = tarfile.TarInfo(name)  # no time, no owner: the same images give the same bytes
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return places


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lowbit.train.data.shards FOLDER OUT``."""
    parser = argparse.ArgumentParser(
        prog="python -m lowbit.train.data.shards",
        description="Write the shards of an image folder, and their index. The image files go in as they are.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="train/<class>/*.JPEG and, for a test set, val/<class>/*.JPEG"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--samples", type=int, default=1000, help="images in a shard (1000)")
    parser.add_argument(
        "--val-labels", help="for a flat val: a file below FOLDER with a line 'name class' for each image"
    )
    given = parser.parse_args(arguments)
    try:
        index = write_shards(given.folder, given.out, given.samples, given.val_labels, show_progress=True)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for part in ("train", "test"):
        shards: tuple[Shard, ...] = getattr(index, part)
        print(f"{part}: {sum(s.samples for s in shards)} images in {len(shards)} shards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
