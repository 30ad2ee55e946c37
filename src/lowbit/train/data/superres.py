"""Pictures for super-resolution: read once, made small by MATLAB's bicubic, cut into random patches as training asks for them.

As in the code of SRCNN and VDSR, the large picture is luma rounded to 8 bits, cut at the bottom and right to a multiple of the
scale; the small one is its antialiased bicubic reduction (``lowbit.pictures.imresize``), not rounded. Transparency is left out.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.machine import available_memory
from lowbit.pictures import ImageError, from_float, imresize, read_header, read_picture, to_float
from lowbit.predict import SUFFIXES, named, refuse_too_large
from lowbit.train.data import DATASETS
from lowbit.train.data.batches import Augment, TrainingBatches, generator_of
from lowbit.train.data.images import DataError, DataSource, Labelled, Part, split_indices
from lowbit.train.resize import FACTORS, resize_bicubic

__all__ = ["Pair", "PatchBatches", "Pictures", "degrade", "div2k", "find_pictures", "photographs", "picture_folder"]

SPLIT_SEED = 20_201_204
SMALLEST: Final = 11
"""SSIM's window: so many pixels a side are needed within the border that evaluation cuts off."""

_READING: Final = 32
"""Bytes of memory for each pixel that `Pictures.read` takes at most: 20 to 28 were measured (gray of 8 bits to RGBA of 16)."""

_MEASURING: Final = 180
"""And what is done with a test picture then: 165 were measured, SSIM's float64 planes."""

_log = logging.getLogger("lowbit.train")

Gray8 = NDArray[np.uint8]
Floats = NDArray[np.float32]
Broken = Literal["stop", "skip"]


# ------------------------------------------------------------------------------------------------ one picture


class Pair(tuple[Tensor, Tensor]):
    """(small, large) of one picture, float32 ``[1, 1, h, w]`` and ``[1, 1, scale h, scale w]`` in 0..1, with its name."""

    name: str

    @staticmethod
    def of(name: str, low: Floats, high: Gray8) -> Pair:
        """From the arrays of `degrade`."""
        pair = Pair((torch.from_numpy(low)[None, None], torch.from_numpy(to_float(high))[None, None]))
        pair.name = name
        return pair


def degrade(y: Floats, scale: int) -> tuple[Floats, Gray8]:
    """The small and the large picture of a luma picture.

    Args:
        y: float32 (H, W) in 0..1.
        scale: 2, 3 or 4.

    Returns:
        float32 (H // scale, W // scale), not clipped; uint8 (scale (H // scale), scale (W // scale)).
    """
    height, width = (side - side % scale for side in y.shape)
    high = from_float(np.ascontiguousarray(y[:height, :width]), np.uint8)
    return np.array(imresize(to_float(high), 1 / scale)), high  # Pillow's own array is read-only


def _centre(y: Floats, size: int | None) -> Floats:
    if size is None:
        return y
    top, left = (max(0, (side - size) // 2) for side in y.shape)
    return np.ascontiguousarray(y[top : top + size, left : left + size])


def find_pictures(folder: str | Path, scale: int | None = None) -> list[Path]:
    """Every picture of a folder and of those in it, sorted by name; hidden ones are left out.

    Where the folder is one of the standard sets as they are handed round, the large pictures are found: in ``HR``, or as
    ``image_SRF_<scale>/*_HR.png`` (Set5, Set14, B100, Urban100).

    Raises:
        DataError: no such folder, or no picture in it. OSError: no permission to look into it.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise DataError(f"{place}: no such folder; pictures are looked for there")
    if not os.access(place, os.R_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    pattern = "*"
    if (place / "HR").is_dir():
        place = place / "HR"
    elif scale is not None and (place / f"image_SRF_{scale}").is_dir():
        place, pattern = place / f"image_SRF_{scale}", "*_HR.*"
    found = [
        path
        for path in place.rglob(pattern)
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    ]
    if not found:
        raise DataError(f"{place}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda path: path.relative_to(place).parts)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """File names; where two are alike, with the first folder in which they differ in front, or with all of them."""
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(path.name, []).append(path)
    names: dict[Path, str] = {}
    for name, group in alike.items():
        inner = [path.relative_to(os.path.commonpath(group)) for path in group] if len(group) > 1 else [Path(name)]
        short = [f"{path.parts[0]}/{name}" if len(path.parts) > 1 else name for path in inner]
        unique = len(set(short)) == len(group)
        names.update(zip(group, short if unique else [path.as_posix() for path in inner], strict=True))
    return {path: names[path] for path in paths}


# ------------------------------------------------------------------------------------------------ patches


class PatchBatches(TrainingBatches):
    """Batches of random patches, (small, large), float32 ``[N, 1, p, p]`` and ``[N, 1, scale p, scale p]`` in 0..1.

    Every place of every picture is as likely. Of ``best_of`` places drawn for a patch, the one where bicubic errs most is taken: most
    of a photograph is sky. An epoch is a number of patches. Everything is a function of (seed, epoch, batch).

    Args:
        pictures: small (float16, h x w) and large (uint8) ones.
        scale: how much larger the large ones are.
        patch: side of the small patches.
        count: patches of an epoch.
        best_of: places drawn for each patch.
        batch_size, seed, augment, rank, world_size: see ``DataSource.batches``. Of ``augment`` ``flip`` and ``rotate``.

    Raises:
        ValueError: no batch can be filled, or no such rank.
    """

    def __init__(
        self,
        pictures: Sequence[tuple[Tensor, Tensor]],
        scale: int,
        patch: int,
        count: int,
        best_of: int,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(count, batch_size, rank, world_size)
        self._pictures, self._scale, self._patch, self._best_of = pictures, scale, patch, best_of
        self._seed, self._augment = seed, augment or Augment()
        rows = [low.shape[0] - patch + 1 for low, _ in pictures]
        self._columns = [low.shape[1] - patch + 1 for low, _ in pictures]
        places = torch.tensor([r * c for r, c in zip(rows, self._columns, strict=True)])
        self._ends = places.cumsum(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        for piece, _ in self.pieces():
            yield self._batch(generator_of(self._seed, epoch, piece))

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count, best_of = self.batch_size, self._best_of
        places = torch.randint(0, int(self._ends[-1]), (count * best_of,), generator=generator)
        low, high = self._cut(places)
        if best_of > 1:
            error = (resize_bicubic(low, self._scale) - high).square().flatten(1).sum(1)
            best = error.view(count, best_of).argmax(1) + torch.arange(count) * best_of
            low, high = low[best], high[best]
        if not self._augment:
            return low, high
        flips = torch.rand(count, generator=generator) < (0.5 if self._augment.flip else 0)
        turns = torch.randint(0, 4 if self._augment.rotate else 1, (count,), generator=generator)

        def turned(x: Tensor) -> Tensor:
            each = (p.flip(-1) if f else p for p, f in zip(x, flips.tolist(), strict=True))
            return torch.stack([torch.rot90(p, k, (1, 2)) for p, k in zip(each, turns.tolist(), strict=True)])

        return turned(low), turned(high)

    def _cut(self, places: Tensor) -> tuple[Tensor, Tensor]:
        p, s = self._patch, self._scale
        which = torch.searchsorted(self._ends, places, right=True)
        first = torch.cat([self._ends.new_zeros(1), self._ends])[which]
        lows, highs = [], []
        for number, place in zip(which.tolist(), (places - first).tolist(), strict=True):
            low, high = self._pictures[number]
            y, x = divmod(place, self._columns[number])
            lows.append(low[y : y + p, x : x + p])
            highs.append(high[y * s : (y + p) * s, x * s : (x + p) * s])
        return torch.stack(lows)[:, None].float(), torch.stack(highs)[:, None].float() / 255


# ------------------------------------------------------------------------------------------------ a data set


class _Again(Iterable[Pair]):
    """Pairs read anew whenever they are gone through: whole pictures take memory."""

    def __init__(self, data: Pictures, part: Part, paths: Sequence[Path]) -> None:
        self._data, self._part, self._paths = data, part, paths

    def __iter__(self) -> Iterator[Pair]:
        return (Pair.of(name, low, high) for name, low, high in self._data.read(self._paths, self._part))


@dataclass(eq=False)
class Pictures(DataSource):
    """A list of pictures to train on, some of them held out, and one to test on.

    The pictures that are trained on lie in memory, 1.5 bytes for each pixel of the large one at scale 2. Those that are held out
    are evaluated after every epoch: of each the centre, ``validation_size`` pixels a side. Test pictures are whole.

    Attributes:
        name: the data set's name.
        train, val, test: the files.
        upscale: the scale, 2, 3 or 4.
        patch: side of the small patches.
        patches: patches of an epoch.
        best_of: see `PatchBatches`.
        shrink: the training and held-out pictures are first made so many times smaller: photographs as cameras give them are not
            sharp to the pixel, and JPEG leaves its marks.
        validation_size: see above; None for whole pictures.
        on_broken: what a picture that can't be read, or is too small or too large for the memory that is free, does: "stop", or "skip": it
            is named, passed over and counted.
        way_out: where to get files that are not there.
    """

    name: str
    train: Sequence[Path]
    val: Sequence[Path]
    test: Sequence[Path]
    upscale: int = 2
    patch: int = 24
    patches: int = 1600
    best_of: int = 4
    shrink: int = 1
    validation_size: int | None = 384
    on_broken: Broken = "skip"
    way_out: str = "it was there a moment ago"
    found_broken: list[str] = field(default_factory=list)

    classes = ()
    zero_point = (0,)
    scale = 1.0
    resize = None

    def __post_init__(self) -> None:
        if self.upscale not in FACTORS:
            raise DataError(f"data.scale = {self.upscale}: 2, 3 or 4")
        for key, least in (("patch", 4), ("patches", 1), ("best_of", 1), ("shrink", 1)):
            if getattr(self, key) < least:
                raise DataError(f"data.{key} = {getattr(self, key)}: at least {least}")
        smallest = SMALLEST + 3 * self.upscale
        if self.validation_size is not None and self.validation_size < smallest:
            raise DataError(f"data.validation_size = {self.validation_size}: at least {smallest}")
        if self.on_broken not in ("stop", "skip"):
            raise DataError(f"data.broken = {self.on_broken!r}: stop or skip")

    @property
    def shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        return (1, self.patch, self.patch)

    @property
    def has_test(self) -> bool:  # type: ignore[override]
        return bool(self.test)

    @property
    def broken(self) -> tuple[str, ...]:
        return tuple(self.found_broken)

    @property
    def identity(self) -> bytes:
        listed = [f"{name} {path.stat().st_size}" for path, name in _names(self._paths("full")).items()]
        return "\n".join(listed).encode(errors="surrogateescape")

    def _paths(self, part: Part) -> Sequence[Path]:
        if part == "test" and not self.test:
            raise DataError(
                f"{self.name}: no test pictures; `lowbit evaluate ... --data FOLDER` measures on any folder"
            )
        paths = {"train": self.train, "val": self.val, "full": [*self.train, *self.val], "test": self.test}[part]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{missing[0]}: no such file{more}; {self.way_out}")
        return paths

    def count(self, part: Part) -> int:
        return len(self._paths(part))

    def read(self, paths: Sequence[Path], part: Part) -> Iterator[tuple[str, Floats, Gray8]]:
        """Name, small and large picture of each file; what can't be read is passed over or stops.

        Raises:
            DataError: a picture is broken, too small or too large for the memory that is free, and ``on_broken`` is "stop"; or all of them
                are; or those that are kept in memory don't fit there together.
        """
        found = 0
        free = available_memory()  # before pictures are kept: what is passed over is too large by itself
        for path, name in _names(paths).items():
            try:
                low, high = self._read(path, part, free)
            except ImageError as error:
                self.pass_over(name, error)
            except MemoryError:
                if part != "test":
                    raise DataError(
                        f"{self.name}: out of memory after {found} of {len(paths)} {_WORDS[part]} pictures; take fewer, or smaller ones"
                    ) from None
                self.pass_over(name, ImageError(f"{path}: not enough memory is free"))
            else:
                found += 1
                yield name, low, high
        if not found:
            raise DataError(f"{self.name}: none of the {len(paths)} {_WORDS[part]} pictures can be used")

    def _read(self, path: Path, part: Part, free: int) -> tuple[Floats, Gray8]:
        header = read_header(path)
        with named(path):
            refuse_too_large(header.width, header.height, _MEASURING if part == "test" else _READING, free)
        y = read_picture(path).luma()
        if part != "test" and self.shrink > 1:
            y = np.clip(imresize(y, 1 / self.shrink), 0, 1)
        if part == "val":
            y = _centre(y, self.validation_size)
        cut = part in ("train", "full")
        least = self.patch * self.upscale if cut else SMALLEST + 2 * self.upscale
        if min(side - side % self.upscale for side in y.shape) < least:
            small = f" once made {self.shrink} times smaller" if part != "test" and self.shrink > 1 else ""
            what = f"a patch of {self.patch} x {self.patch} needs" if cut else "SSIM needs"
            raise ImageError(f"{path}: {y.shape[1]} x {y.shape[0]} pixels{small}; {what} {least} a side")
        return degrade(y, self.upscale)

    def pass_over(self, name: str, error: ImageError) -> None:
        """Leave a picture out: it is named once, with what is wrong with it, and counted.

        Raises:
            DataError: ``on_broken`` is "stop".
        """
        if self.on_broken == "stop":
            raise DataError(
                f"{error}; repair or remove it, or pass over such pictures with data.broken: skip"
            ) from None
        if name not in self.found_broken:
            self.found_broken.append(name)
            _log.warning("%s; passed over", error)

    def _in_memory(self, paths: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
        return [
            (torch.from_numpy(low.astype(np.float16)), torch.from_numpy(high))
            for _, low, high in self.read(paths, "train")
        ]

    @cached_property
    def _train(self) -> list[tuple[Tensor, Tensor]]:
        return self._in_memory(self._paths("train"))

    @cached_property
    def _full(self) -> list[tuple[Tensor, Tensor]]:
        return self._train + self._in_memory(self._paths("val"))

    @cached_property
    def _held_out(self) -> list[Pair]:
        return list(_Again(self, "val", self._paths("val")))

    def batches(
        self,
        batch_size: int,
        *,
        part: Literal["train", "full"] = "train",
        seed: int = 0,
        augment: Augment | None = None,
        workers: int | None = None,  # noqa: ARG002  # cutting out of memory is faster than any other process could hand it over
        rank: int = 0,
        world_size: int = 1,
    ) -> TrainingBatches:
        if augment is not None and (augment.crop or augment.resized_crop is not None):
            raise DataError(
                "data.augment.crop and resized_crop are for images with classes; patches have flip and rotate"
            )
        return PatchBatches(
            self._train if part == "train" else self._full,
            self.upscale,
            self.patch,
            self.patches,
            self.best_of,
            batch_size,
            seed,
            augment,
            rank,
            world_size,
        )

    def evaluation(
        self,
        part: Part,
        batch_size: int,  # noqa: ARG002  # pictures have sizes of their own: one at a time
        *,
        workers: int | None = None,  # noqa: ARG002
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterable[Labelled]:
        return self.pairs(part, rank, world_size)

    def pairs(self, part: Part, rank: int = 0, world_size: int = 1) -> Iterable[Pair]:
        """As `evaluation`: the pictures of a part, with their names."""
        if part == "val":
            return self._held_out[rank::world_size]
        return _Again(self, part, self._paths(part)[rank::world_size])

    def calibration(
        self,
        count: int,
        batch_size: int,
        *,
        workers: int | None = None,  # noqa: ARG002
    ) -> Iterable[Tensor]:
        sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        pieces = [
            PatchBatches(self._train, self.upscale, self.patch, size, 1, size, SPLIT_SEED + i)
            for i, size in enumerate(sizes)
        ]
        return _Small(pieces)


class _Small(Iterable[Tensor]):
    """The small patches of a few batches, the same every time."""

    def __init__(self, pieces: Sequence[PatchBatches]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[Tensor]:
        return (low for piece in self._pieces for low, _ in piece)


_WORDS: Final = {"train": "training", "full": "training", "val": "held-out", "test": "test"}


# ------------------------------------------------------------------------------------------------ registered ones


@DATASETS.register("picture_folder")
def picture_folder(
    root: str | Path | None = None,
    scale: int = 2,
    patch: int = 24,
    patches: int = 1600,
    best_of: int = 4,
    shrink: int = 1,
    validation_fraction: float = 0.1,
    validation_size: int | None = 384,
    broken: Broken = "skip",
) -> Pictures:
    """Any folder of pictures, for super-resolution; folders in it are looked through too.

    Args:
        root: the folder. With ``root/train`` and ``root/test``, the second is the test set; else there is none.
        scale: 2, 3 or 4.
        patch: side of the small patches.
        patches: patches of an epoch.
        best_of: places drawn for each patch, of which the one where bicubic errs most is taken.
        shrink: the pictures are first made so many times smaller: 2 for photographs straight from a camera.
        validation_fraction: share of the pictures that is held out, drawn with a fixed seed.
        validation_size: of those the centre, so many pixels a side, is evaluated after every epoch; None for all of it.
        broken: "skip" a picture that can't be read, is smaller than a patch or too large for memory (named, and counted in run.json), or
            "stop".

    Raises:
        DataError: no such folder, no pictures, impossible settings.
    """
    if root is None:
        raise DataError("picture_folder needs data.root: a folder of pictures")
    if not 0 < validation_fraction < 1:
        raise DataError(f"data.validation_fraction = {validation_fraction}: between 0 and 1")
    base = Path(root).expanduser()
    apart = (base / "train").is_dir() and (base / "test").is_dir()
    found = find_pictures(base / "train" if apart else base, scale)
    held_out = max(1, math.ceil(len(found) * validation_fraction))
    if held_out >= len(found):
        raise DataError(f"{base}: {len(found)} picture{'s'[: len(found) > 1]} are too few to hold {held_out} out")
    train, val = (sorted(index.tolist()) for index in split_indices(len(found), held_out, SPLIT_SEED))
    test = find_pictures(base / "test", scale) if apart else []
    return Pictures(
        "picture_folder",
        [found[i] for i in train],
        [found[i] for i in val],
        test,
        scale,
        patch,
        patches,
        best_of,
        shrink,
        validation_size,
        broken,
    )


@DATASETS.register("div2k")
def div2k(
    root: str | Path | None = None,
    scale: int = 2,
    patch: int = 48,
    patches: int = 16_000,
    best_of: int = 1,
    validation_size: int | None = 384,
    broken: Broken = "skip",
) -> Pictures:
    """DIV2K (Agustsson, Timofte, CVPRW 2017): 800 pictures to train on, 100 to test on, 2 K pixels wide.

    The last 20 of the 800 are held out. The large pictures alone are read; all in memory take 3.4 GB.

    Args:
        root: the folder that holds ``DIV2K_train_HR`` and ``DIV2K_valid_HR``; without the second there is no test set.
        scale: 2, 3 or 4.
        patch: side of the small patches.
        patches: patches of an epoch.
        best_of: places drawn for each patch, of which the one where bicubic errs most is taken.
        validation_size: of the held-out pictures the centre, so many pixels a side; None for all of it.
        broken: "skip" a picture that can't be read, or "stop".

    Raises:
        DataError: no such folder, no pictures, impossible settings.
    """
    if root is None:
        raise DataError("div2k needs data.root: the folder that holds DIV2K_train_HR")
    base = Path(root).expanduser()
    found = find_pictures(base / "DIV2K_train_HR")
    if len(found) <= 20:
        raise DataError(f"{base / 'DIV2K_train_HR'}: {len(found)} pictures; DIV2K has 800, of which 20 are held out")
    test = find_pictures(base / "DIV2K_valid_HR") if (base / "DIV2K_valid_HR").is_dir() else []
    return Pictures("div2k", found[:-20], found[-20:], test, scale, patch, patches, best_of, 1, validation_size, broken)


SYSTEM = Path("/usr/share")
_LOMIRI = ("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
           "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
           "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
           "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi")  # fmt: skip
_PLASMA = ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey", "Kite",
           "OneStandsOut", "Path", "summer_1am")  # fmt: skip
_MATE = ("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings",
         "Wood", "YellowFlower")  # fmt: skip
PHOTOGRAPHS: Final = (
    *(f"backgrounds/{name}.jpg" for name in _LOMIRI),
    *(f"wallpapers/{name}/contents/images/2560x1600.jpg" for name in _PLASMA),
    *(f"backgrounds/mate/nature/{name}.jpg" for name in _MATE),
)
"""The training photographs below ``/usr/share``: 13 of Debian's lomiri-wallpapers-16.04, 11 of plasma-workspace-wallpapers, 12 of
mate-backgrounds."""
HELD_OUT: Final = (
    "backgrounds/free_by_Peter_Nerlich.jpg",
    "backgrounds/life_by_Aitzol_Berasategi.jpg",
    "wallpapers/ColorfulCups/contents/images/2560x1600.jpg",
    "wallpapers/Path/contents/images/2560x1600.jpg",
    "backgrounds/mate/nature/Dune.jpg",
    "backgrounds/mate/nature/TwoWings.jpg",
)
"""Those that settings are chosen on: two of each package, as rich in detail as the test pictures (bicubic x2: 27 to 35 dB; of all
photographs 27 to 52)."""
_OPENCV = ("reg/home.png", "dnn_superres/butterfly.png", "data/baboon.jpg", "data/building.jpg", "data/fruits.jpg",
           "data/graf1.png")  # fmt: skip
_SKIMAGE = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "rocket.jpg")
_PACKAGES = "the Debian packages lomiri-wallpapers-16.04, plasma-workspace-wallpapers, mate-backgrounds and opencv-doc"


def _photographs_tested(base: Path) -> list[Path]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError("photographs: six of the test pictures come with scikit-image: pip install 'lowbit[train]'")
    folder = Path(spec.origin).parent / "data"
    examples = base / "doc" / "opencv-doc" / "examples"
    return [*(folder / name for name in _SKIMAGE), *(examples / name for name in _OPENCV)]


@DATASETS.register("photographs")
def photographs(
    root: str | Path | None = None,
    scale: int = 2,
    patch: int = 24,
    patches: int = 1600,
    best_of: int = 4,
    validation_size: int | None = 384,
) -> Pictures:
    """36 photographs that Debian packages hold, made 2 times smaller (47 megapixels), of which 6 are held out; 12 test pictures.

    Tested on scikit-image's astronaut, camera, chelsea, coffee, coins and rocket and the home, butterfly, baboon, building,
    fruits and graf1 of Debian's opencv-doc, as they are. ``make data-sr`` installs the packages. Results on them are results on them,
    not on Set5.

    Args:
        root: a folder to look in instead of /usr/share, laid out like that (unpacked packages).
        scale: 2, 3 or 4.
        patch: side of the small patches.
        patches: patches of an epoch.
        best_of: places drawn for each patch, of which the one where bicubic errs most is taken.
        validation_size: of the held-out photographs the centre, so many pixels a side; None for all of it.

    Raises:
        DataError: impossible settings; when they are first used, photographs that are not there.
    """
    base = SYSTEM if root is None else Path(root).expanduser()
    return Pictures(
        "photographs",
        [base / name for name in PHOTOGRAPHS if name not in HELD_OUT],
        [base / name for name in HELD_OUT],
        _photographs_tested(base),
        scale,
        patch,
        patches,
        best_of,
        2,
        validation_size,
        "stop",
        f"`make data-sr` as root installs {_PACKAGES}",
    )
