"""Pictures of any size through a super-resolution network, with bounded memory. Needs Pillow for files (``lowbit[cli]``), no torch.

>>> larger = Upscaler("x2.lowbit")
>>> y = larger(luma)                                # float32 (H, W) -> (2 H, 2 W), in 0..1 but not clipped
>>> picture = larger.picture(read_picture("photo.jpg"))

The network enlarges Y of ITU-R BT.601; Cb, Cr and transparency are enlarged bicubically, as MATLAB's ``imresize`` does it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.exif import corrected, parse
from lowbit.files import check_folder
from lowbit.graph import MAX_SIDE, Graph, Node
from lowbit.machine import available_memory
from lowbit.packfile import dumps, read
from lowbit.pictures import (
    Floats,
    Header,
    Picture,
    check_suffix,
    from_float,
    luma,
    read_header,
    read_picture,
    read_texts,
    rgb_to_ycbcr,
    to_float,
    write_picture,
    ycbcr_to_rgb,
)
from lowbit.predict import find_images
from lowbit.runtime import Engine
from lowbit.tiles import Reach, TileError, grid, reach

__all__ = ["Job", "UpscaleError", "Upscaler", "check_there", "jobs", "upscale_file"]

_ENGINES: Final = 4
"""Sizes that are kept ready."""

_LARGEST_WORKSPACE: Final = 128 << 20
"""Bytes that a tile of the default size takes at most."""

_CHUNK: Final = 1 << 20
"""Output pixels whose colours are computed at once."""

_CONTEXT: Final = 2
"""Pixels that an enlarged one depends on, each way."""

Progress = Callable[[int, int], None]


class UpscaleError(ValueError):
    """A file that does not enlarge pictures, or a picture that needs more memory than there is."""


class Upscaler:
    """A super-resolution network for pictures of any size.

    A picture is cut into tiles that overlap by the network's receptive field, so that the result is what one run on the whole
    picture gives, bit for bit (`lowbit.tiles`), while memory stays bounded by the tile.

    Args:
        source: a ``.lowbit`` file of the task "superres", a network of the zoo by its name, or a Graph: one float32 input (H, W, 1), Y
            in 0..1; one float32 output (scale H, scale W, 1).
        threads: of the engine.
        tile: the largest side of a tile, in pixels of the input. By default as large as is fastest: what is computed twice where
            tiles overlap grows as they shrink, what falls out of the cache as they grow.
        isa: forces a row of kernels.

    Raises:
        FileError: not a lowbit file.
        UpscaleError: a network of another task, or one that can't run on tiles.
        ValueError: a tile that is not larger than the receptive field.
    """

    def __init__(
        self, source: str | os.PathLike[str] | Graph, threads: int = 1, tile: int | None = None, isa: str | None = None
    ) -> None:
        name = "the graph" if isinstance(source, Graph) else os.fspath(source)
        self._graph = source if isinstance(source, Graph) else read(source)
        self.reach = _check(self._graph, name)
        self._threads, self._isa = threads, isa
        self._engines: OrderedDict[tuple[int, int], Engine] = OrderedDict()
        self._bicubic: OrderedDict[tuple[int, int], Engine] = OrderedDict()
        around = max(self.reach.top + self.reach.bottom, self.reach.left + self.reach.right)
        if tile is None:
            tile = self._fastest_tile(around)
        elif tile <= around:
            raise ValueError(
                f"--tile {tile}: a tile must be larger than what an output pixel depends on: {around + 1} pixels or more"
            )
        self.tile = tile

    @property
    def scale(self) -> int:
        """How many times as high and wide pictures become."""
        return self.reach.scale

    @property
    def meta(self) -> Any:
        """What the file says about itself."""
        return self._graph.meta

    @cached_property
    def network(self) -> str:
        """SHA-256 of the file: what tells this network from others."""
        return hashlib.sha256(dumps(self._graph)).hexdigest()

    @property
    def isa(self) -> str:
        """The row of kernels in use."""
        return (next(iter(self._engines.values()), None) or self._engine((64, 64))).isa

    def __call__(self, y: Floats, progress: Progress | None = None) -> Floats:
        """The network's output for a picture of any size.

        Args:
            y: float32 (H, W), in 0..1.
            progress: called with the tiles done and all tiles.

        Returns:
            float32 (scale H, scale W), not clipped.
        """
        if not isinstance(y, np.ndarray) or y.dtype != np.float32 or y.ndim != 2 or y.size == 0:
            what = f"{y.dtype} {y.shape}" if isinstance(y, np.ndarray) else type(y).__name__
            raise ValueError(f"expected float32 (H, W), got {what}")
        height, width = y.shape
        out = np.empty((height * self.scale, width * self.scale), np.float32)
        for first, last, rows in self.bands((height, width), lambda a, b: y[a:b], progress):
            out[first * self.scale : last * self.scale] = rows
        return out

    def bands(
        self, shape: tuple[int, int], rows: Callable[[int, int], Floats], progress: Progress | None = None
    ) -> Iterator[tuple[int, int, Floats]]:
        """The output band by band, top down, as one row of tiles after the other is done.

        Args:
            shape: height and width of the picture.
            rows: gives the picture's rows from one to before another, float32 (rows, width).
            progress: called with the tiles done and all tiles.

        Yields:
            Input rows from `first` to before `last`, and float32 (scale (last - first), scale width): what they became. The
            array is used again for the next band.
        """
        s = self.scale
        tiles = list(grid(shape, (self.tile, self.tile), self.reach))
        total = sum(len(row) for _, row in tiles)
        done = 0
        band = np.empty((s * max(row.last - row.first for row, _ in tiles), s * shape[1]), np.float32)
        for row, columns in tiles:
            source = rows(row.start, row.start + row.size)
            engine = self._engine((row.size, columns[0].size))
            for column in columns:
                part = engine(np.ascontiguousarray(source[:, column.start : column.start + column.size, None]))
                band[: s * (row.last - row.first), s * column.first : s * column.last] = part[
                    s * (row.first - row.start) : s * (row.last - row.start),
                    s * (column.first - column.start) : s * (column.last - column.start),
                    0,
                ]
                done += 1
                if progress is not None:
                    progress(done, total)
            yield row.first, row.last, band[: s * (row.last - row.first)]

    def picture(self, picture: Picture, progress: Progress | None = None) -> Picture:
        """A picture enlarged: Y by the network, Cb, Cr and transparency bicubically; gray stays gray, 16 bits stay 16 bits, the
        colour profile is kept, and EXIF data as far as it stays true. The picture is as large in inches: it has more pixels in each.

        Args:
            picture: 8 or 16 bits, gray or RGB.
            progress: called with the tiles done and all tiles.
        """
        height, width, s = picture.height, picture.width, self.scale
        dtype = picture.pixels.dtype
        pixels = np.empty((height * s, width * s, picture.pixels.shape[2]), dtype)
        alpha = None if picture.alpha is None else np.empty((height * s, width * s), dtype)

        def rows(first: int, last: int) -> Floats:
            if picture.gray:  # R = G = B: the same three products, at a third of the memory
                part = to_float(picture.pixels[first:last])
                return luma(np.broadcast_to(part, (*part.shape[:2], 3)))
            return luma(to_float(picture.pixels[first:last]))

        step = max(1, _CHUNK // (width * s * s))
        for first, last, y in self.bands((height, width), rows, progress):
            for a in range(first, last, step):
                b = min(a + step, last)
                self._colour(picture, pixels, a, b, y[s * (a - first) : s * (b - first)])
                if alpha is not None and picture.alpha is not None:
                    alpha[s * a : s * b] = from_float(self._enlarged(to_float, picture.alpha, a, b), dtype)
        said = None if picture.exif is None else corrected(parse(picture.exif), width * s, height * s, scale=s)
        dpi = None if picture.dpi is None else (picture.dpi[0] * s, picture.dpi[1] * s)
        return Picture(pixels, alpha, picture.icc, said, dpi)

    def _colour(self, picture: Picture, out: NDArray[Any], first: int, last: int, y: Floats) -> None:
        """Fill in the rows of `out` that input rows `first` to `last` become, whose Y is known."""
        to = out[first * self.scale : last * self.scale]
        if picture.gray:
            gray = (y - np.float32(16 / 255)) * np.float32(255 / 219)
            to[..., 0] = from_float(gray, out.dtype)
            return

        def colours(pixels: NDArray[Any]) -> Floats:
            return rgb_to_ycbcr(to_float(pixels))[..., 1:]

        ycbcr = np.moveaxis(np.empty((3, *y.shape), np.float32), 0, -1)  # every channel in one piece
        ycbcr[..., 0] = y
        ycbcr[..., 1:] = self._enlarged(colours, picture.pixels, first, last)
        to[:] = from_float(ycbcr_to_rgb(ycbcr), out.dtype)

    def _enlarged(self, numbers: Callable[[NDArray[Any]], Floats], x: NDArray[Any], first: int, last: int) -> Floats:
        """Rows `first` to `last` of ``numbers(x)``, float32 (H, W) or (H, W, C), enlarged bicubically."""
        a, b = max(0, first - _CONTEXT), min(len(x), last + _CONTEXT)
        part = numbers(x[a:b])
        engine = self._bicubic_engine((b - a, part.shape[1]))
        s = self.scale
        kept = slice(s * (first - a), s * (last - a))
        if part.ndim == 2:
            return np.asarray(engine(np.ascontiguousarray(part[..., None]))[kept, :, 0])
        planes = [engine(np.ascontiguousarray(part[..., c : c + 1]))[kept, :, 0] for c in range(part.shape[2])]
        return np.moveaxis(np.stack(planes), 0, -1)

    def memory(self, header: Header) -> int:
        """Bytes that enlarging a picture and writing it takes at most, the process itself left out."""
        planes = header.channels + header.alpha
        sample = header.bits // 8
        pixels, larger = header.width * header.height, header.width * header.height * self.scale**2
        stored = 1 if planes == 1 else 4  # bytes of a pixel in Pillow, which holds 8 bits
        read_in = pixels * (stored + 2 * planes * sample)
        rows = min(self.tile, header.height)
        work = 4 * header.width * rows * (1 + self.scale**2) + 20 * 4 * (_CHUNK + header.width * self.scale**2)
        engine = self._workspace(rows * min(self.tile, header.width)) + (32 << 20)  # and what allocators keep
        encoding = larger * (stored if sample == 1 else 0) + larger * planes * sample
        kept = pixels * planes * sample
        # What the work took is given back to the allocator, but hardly to the system, before the picture is encoded.
        return engine + max(read_in, kept + larger * planes * sample + work + encoding)

    def refuse_too_large(self, header: Header, name: str) -> None:
        """Raises UpscaleError where a picture needs more memory than is free, or is wider than the engine's maps may be."""
        if header.width > MAX_SIDE:
            raise UpscaleError(f"{name}: is {header.width} pixels wide; {MAX_SIDE} are the most")
        need, free = self.memory(header), available_memory()
        if need > free:
            raise UpscaleError(
                f"{name}: {header.width} x {header.height} pixels enlarged by {self.scale} need {need / 1e9:.1f} GB of memory, "
                f"{free / 1e9:.1f} GB are free; cut the picture into parts"
            )

    # --- engines ---

    def _engine(self, size: tuple[int, int]) -> Engine:
        return self._kept(self._engines, size, lambda: self._graph.resized(*size))

    def _bicubic_engine(self, size: tuple[int, int]) -> Engine:
        return self._kept(self._bicubic, size, lambda: _bicubic(size, self.scale))

    def _kept(
        self, kept: OrderedDict[tuple[int, int], Engine], size: tuple[int, int], graph: Callable[[], Graph]
    ) -> Engine:
        if size not in kept:
            kept[size] = Engine(graph(), threads=self._threads, isa=self._isa)
            if len(kept) > _ENGINES:
                kept.popitem(last=False)
        kept.move_to_end(size)
        return kept[size]

    def _workspace(self, pixels: int) -> int:
        """About the bytes of a run on a tile of so many pixels."""
        probe = next(iter(self._engines.items()), None)
        if probe is None:
            side = 64
            probe = (side, side), self._engine((side, side))
        (height, width), engine = probe
        return engine.workspace_bytes() * pixels // (height * width)

    def _fastest_tile(self, around: int) -> int:
        """Measured with 32 channels x 12 layers on one core of a Zen 5 (1 MiB of L2, 32 MiB of L3), nanoseconds a pixel: 117 with a
        workspace of 9 MB, 119 with 15, 122 with 21, 128 with 37, 135 with 58, 138 with 83. So about 1/20 more for each doubling
        beyond 8 MiB, against (tile / (tile - around))^2 for what is computed twice. Best was 448, which this gives.
        """
        pixel = self._workspace(64 * 64) / 64**2

        def cost(tile: int) -> float:
            workspace = pixel * tile**2
            return (tile / (tile - around)) ** 2 * (1 + 0.05 * max(0.0, math.log2(workspace / 2**23)))

        first = 32 * (around // 32 + 1)
        sizes = [tile for tile in range(first, 1025, 32) if pixel * tile**2 <= _LARGEST_WORKSPACE]
        return min(sizes, key=cost, default=max(first, around + 32))


def _bicubic(size: tuple[int, int], scale: int) -> Graph:
    nodes = (
        Node("input", "x", attrs={"shape": (*size, 1), "dtype": "float32"}),
        Node("resize_bicubic", "larger", ("x",), attrs={"factor": scale}),
        Node("output", "out", ("larger",)),
    )
    return Graph(nodes, {})


def _check(graph: Graph, name: str) -> Reach:
    task = graph.meta.get("task", "classify")
    if task != "superres":
        raise UpscaleError(f"{name}: its task is {task!r}; upscale needs a network of the task 'superres'")
    types = graph.validate()
    given, made = types[graph.input.name], types[graph.output.name]
    try:
        around = reach(graph)
    except TileError as error:
        raise UpscaleError(f"{name}: {error}") from None
    for what, t in (("reads", given), ("gives", made)):
        if t.dtype != "float32" or t.channels != 1:
            raise UpscaleError(f"{name}: the network {what} {t}; upscale needs float32 of one channel, Y")
    said = dict(graph.meta.get("superres", {})).get("scale")
    if said != around.scale:
        raise UpscaleError(f"{name}: the file says that it enlarges by {said}, but it does by {around.scale}")
    if around.scale not in (2, 3, 4):
        raise UpscaleError(f"{name}: enlarges by {around.scale}; colours can be enlarged by 2, 3 and 4")
    return around


# --------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Job:
    """One picture and where it goes."""

    source: Path
    target: Path

    @property
    def done(self) -> bool:
        """Pictures appear whole or not at all: a file that is there is finished."""
        return self.target.is_file()


def jobs(source: Path, target: Path) -> list[Job]:
    """What `lowbit upscale` has to do: a picture to a file (or into a folder that is there), or the pictures of a folder, sorted,
    to PNGs of the same name in another folder, which `upscale_file` makes. Nothing is written here.

    Raises:
        ImageError: no such picture, a folder without pictures, two pictures of one name, a name that says no kind of file.
        UpscaleError: the pictures would take each other's place.
        OSError: a folder that can't be made or written to.
    """
    pictures = find_images([source])
    folder = source.is_dir()
    if folder and target.exists() and not target.is_dir():
        raise UpscaleError(f"{target}: is a file; of a folder of pictures, OUT is a folder too")
    into = folder or target.is_dir()
    found = [Job(path, target / f"{path.stem}.png" if into else target) for path in pictures]
    by_target: dict[Path, Path] = {}
    for job in found:
        check_suffix(job.target)
        if job.target.exists() and job.target.samefile(job.source):
            raise UpscaleError(f"{job.target}: is the picture itself; give OUT another name or folder")
        if job.target in by_target:
            raise UpscaleError(
                f"{by_target[job.target]} and {job.source}: would both become {job.target}; rename one of them"
            )
        by_target[job.target] = job.source
    if not into and not target.parent.is_dir():
        raise UpscaleError(f"{target.parent}: no such folder")
    check_folder(target if into else target.parent)
    return found


NETWORK: Final = "lowbit network"
"""Keyword of the text in every PNG that says which network made it."""


def check_there(larger: Upscaler, there: Sequence[Job]) -> int:
    """Refuse to go on with pictures that another network has made: a folder would hold both, and nothing would tell them apart.

    Returns:
        How many of them were not made by `lowbit upscale`, or are JPEGs, which don't say.

    Raises:
        UpscaleError: another network has made some.
    """
    made_by = {job.target: read_texts(job.target).get(NETWORK) for job in there}
    others = [path for path, network in made_by.items() if network not in (None, larger.network)]
    if others:
        raise UpscaleError(
            f"{others[0]}: {'was' if len(others) == 1 else f'and {len(others) - 1} more were'} made by another network; give OUT "
            "another name, or make all again with --force"
        )
    return sum(network is None for network in made_by.values())


def upscale_file(larger: Upscaler, job: Job, progress: Progress | None = None) -> Picture:
    """Read, enlarge and write one picture; returns what was written. A PNG says which network made it (`NETWORK`). Its folder is made.

    Raises:
        ImageError: a picture that can't be read, or not written as its name says.
        UpscaleError: it needs more memory than is free, or a folder has the name.
        OSError: it can't be written.
    """
    if job.target.is_dir():
        raise UpscaleError(f"{job.source}: {job.target} is a folder; move it away")
    header = read_header(job.source)
    check_suffix(job.target, header.alpha, header.bits, max(header.width, header.height) * larger.scale)
    larger.refuse_too_large(header, str(job.source))
    try:
        made = larger.picture(read_picture(job.source), progress)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        write_picture(job.target, made, {NETWORK: larger.network})
    except MemoryError:  # somebody else has taken what was free
        raise UpscaleError(f"{job.source}: ran out of memory; cut the picture into parts") from None
    return made
