"""Enlarged pictures side by side: nearest, bicubic, the network, a second network; zoomed crops as one HTML page and one PNG.

Needs ``lowbit[train]`` for templates and plots. Crops are where a picture has most detail.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

import lowbit
from lowbit import page
from lowbit.files import check_file, write_atomic
from lowbit.pictures import Picture, from_float, imresize, read_picture, to_float
from lowbit.upscale import Job, UpscaleError, Upscaler

__all__ = ["beside_originals", "check_place", "places", "write_page"]

Pixels = NDArray[np.uint8]

PICTURES: Final = 8
"""At most so many are shown."""

CROPS: Final = 3
SIDE: Final = 48
"""Of a crop, in pixels of the picture given."""

_OVERVIEW: Final = 420
_MARGIN: Final = 4  # bicubic reaches 2


@dataclass(frozen=True)
class Crop:
    """A part of a picture: its place in it, and what it became by each way."""

    top: int
    left: int
    height: int
    width: int
    variants: tuple[Pixels, ...]


@dataclass(frozen=True)
class Shown:
    """A picture on the page."""

    name: str
    size: str
    overview: Pixels
    zoom: float
    crops: tuple[Crop, ...]


def check_place(path: Path, work: Sequence[Job], larger: Upscaler, beside: Upscaler | None) -> None:
    """Refuse what would only be found out after the work. Nothing is written here.

    Raises:
        UpscaleError: a name that doesn't end in .html, one that a picture has or takes, or a second network that enlarges otherwise.
        OSError: a folder has the name, or one can't be made or written to.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UpscaleError(f"{path}: the page's name must end in .html")
    picture = path.with_suffix(".png")
    for own in (path, picture):
        check_file(own, made=True)
    for job in work:
        for other in (job.source, job.target):
            if other == picture or (other.exists() and picture.exists() and other.samefile(picture)):
                raise UpscaleError(
                    f"{path}: the picture beside the page would take the place of {other}; give it another name"
                )
    if beside is not None and beside.scale != larger.scale:
        raise UpscaleError(f"the files enlarge by {larger.scale} and {beside.scale}; side by side they must be equal")


def write_page(
    path: Path,
    work: Sequence[Job],
    larger: Upscaler,
    file: str | os.PathLike[str],
    beside: Upscaler | None = None,
    twin: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the page and the PNG beside it, and make their folder; returns both.

    Args:
        path: of the page, ending in .html.
        work: pictures that have been enlarged; the first `PICTURES` are shown.
        larger: what has enlarged them, from `file`.
        beside: another network, from `twin`.

    Raises:
        ImageError: a picture that can't be read any more.
        UpscaleError: no pictures, or one that is not what it should have become.
    """
    if not work:
        raise UpscaleError(f"{path}: no enlarged picture to show")
    files = [Path(file)] if beside is None or twin is None else [Path(file), Path(twin)]
    apart = len({f.name for f in files}) == len(files)  # else both are RUN/model.lowbit, say
    titles = ["nearest", "bicubic", *(f.name if apart else str(f) for f in files)]
    shown = [_shown(job, larger, beside) for job in work[:PICTURES]]
    html = page.render(
        "sidebyside.html.j2",
        title=f"{Path(file).name}: {len(work)} picture{'s'[: len(work) > 1]} enlarged by {larger.scale}",
        version=lowbit.__version__,
        titles=titles,
        pictures=[
            {
                "name": s.name,
                "size": s.size,
                "overview": _uri(s.overview),
                "crops": [
                    (f"{c.left}, {c.top}", [_uri(v) for v in c.variants], c.width * larger.scale) for c in s.crops
                ],
                "boxes": [(c.left * s.zoom, c.top * s.zoom, c.width * s.zoom, c.height * s.zoom) for c in s.crops],
                "height": s.overview.shape[0],
                "width": s.overview.shape[1],
            }
            for s in shown
        ],
        left_out=len(work) - len(shown),
    )
    picture = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode())
    write_atomic(picture, _png(shown, titles))
    return [path, picture]


def _shown(job: Job, larger: Upscaler, beside: Upscaler | None) -> Shown:
    given, made = read_picture(job.source), read_picture(job.target)
    s = larger.scale
    if (made.height, made.width) != (given.height * s, given.width * s):
        raise UpscaleError(f"{job.target}: is not {job.source} enlarged by {s}; make it again with --force")
    zoom = min(1.0, _OVERVIEW / max(given.height, given.width))
    small = Image.fromarray(_rgb(given)).resize(
        (max(1, round(given.width * zoom)), max(1, round(given.height * zoom))), Image.Resampling.BOX
    )
    crops = tuple(_crop(given, made, place, s, beside) for place in places(given))
    size = f"{given.width} x {given.height} to {made.width} x {made.height}"
    return Shown(job.source.name, size, np.asarray(small), zoom, crops)


def places(picture: Picture, count: int = CROPS) -> list[tuple[int, int]]:
    """Top and left of so many crops: of a grid of them, where the gray values of neighbours differ most."""
    height, width = min(SIDE, picture.height), min(SIDE, picture.width)
    found = []
    for top in range(0, picture.height - height + 1, height):
        rows = to_float(picture.pixels[top : top + height]).mean(axis=2)
        down, across = np.abs(np.diff(rows, axis=0)), np.abs(np.diff(rows, axis=1))
        for left in range(0, picture.width - width + 1, width):
            detail = down[:, left : left + width].sum() + across[:, left : left + width - 1].sum()
            found.append((-float(detail), top, left))
    return [(top, left) for _, top, left in sorted(sorted(found)[:count], key=lambda f: f[1:])]


def _crop(given: Picture, made: Picture, place: tuple[int, int], s: int, beside: Upscaler | None) -> Crop:
    top, left = place
    height, width = min(SIDE, given.height), min(SIDE, given.width)
    part, inside = _around(given, place, _MARGIN, s)
    nearest = _rgb(part).repeat(s, axis=0).repeat(s, axis=1)[inside]
    kept = slice(s * top, s * (top + height)), slice(s * left, s * (left + width))
    alpha = None if made.alpha is None else made.alpha[kept]
    variants = [nearest, _bicubic(given, place, s), _rgb(Picture(made.pixels[kept], alpha))]
    if beside is not None:
        variants.append(_enlarged(given, place, beside))
    return Crop(top, left, height, width, tuple(variants))


def _around(given: Picture, place: tuple[int, int], margin: int, s: int) -> tuple[Picture, tuple[slice, slice]]:
    """The crop with a margin, where the picture has one, and the crop's place in what that becomes."""
    top, left = place
    height, width = min(SIDE, given.height), min(SIDE, given.width)
    y0, x0 = max(0, top - margin), max(0, left - margin)
    rows, columns = slice(y0, top + height + margin), slice(x0, left + width + margin)
    alpha = None if given.alpha is None else given.alpha[rows, columns]
    inside = slice(s * (top - y0), s * (top - y0 + height)), slice(s * (left - x0), s * (left - x0 + width))
    return Picture(given.pixels[rows, columns], alpha), inside


def _bicubic(given: Picture, place: tuple[int, int], s: int) -> Pixels:
    part, inside = _around(given, place, _MARGIN, s)
    pixels: Pixels = from_float(imresize(to_float(_rgb(part)), s), np.uint8)[inside]
    return pixels


def _enlarged(given: Picture, place: tuple[int, int], larger: Upscaler) -> Pixels:
    """The crop of the enlarged picture, computed from its surroundings alone: as if all of it had been."""
    r = larger.reach
    part, inside = _around(given, place, max(_MARGIN, r.top, r.left, r.bottom, r.right), larger.scale)
    return _rgb(larger.picture(part))[inside]


def beside_originals(
    paths: Sequence[Path], larger: Upscaler, shrink: int = 1
) -> list[tuple[str, list[str], tuple[int, int]]]:
    """Crops of pictures that are made small and enlarged again, one of each picture.

    Args:
        paths: of the originals; the first `PICTURES` are shown.
        larger: the network.
        shrink: the originals are first made so many times smaller.

    Returns:
        Name; bicubic, the network's and the original crop, as ``data:`` addresses; their width and height.

    Raises:
        ImageError: a picture that can't be read.
    """
    s = larger.scale
    found = []
    for path in paths[:PICTURES]:
        x = to_float(_rgb(read_picture(path)))
        if shrink > 1:
            x = imresize(x, 1 / shrink)
        x = x[: x.shape[0] // s * s, : x.shape[1] // s * s]
        given = Picture(from_float(imresize(np.ascontiguousarray(x), 1 / s), np.uint8))
        ((top, left),) = places(given, 1)
        bicubic = _bicubic(given, (top, left), s)
        height, width = bicubic.shape[:2]
        original = from_float(x[s * top : s * top + height, s * left : s * left + width], np.uint8)
        crops = (bicubic, _enlarged(given, (top, left), larger), original)
        found.append((path.name, [_uri(crop) for crop in crops], (width, height)))
    return found


def _rgb(picture: Picture) -> Pixels:
    """8 bits on white."""
    x = picture.rgb()
    if picture.alpha is not None:
        x = 1 - (1 - x) * to_float(picture.alpha)[..., None]
    return from_float(x, np.uint8)


def _uri(pixels: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _png(shown: Sequence[Shown], titles: Sequence[str]) -> bytes:
    """A row for each crop: where it is, then the ways."""
    rows = [(s, i) for s in shown for i in range(len(s.crops))]
    columns = len(titles) + 1
    figure = Figure(figsize=(2.6 * columns, 2.75 * len(rows) + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (s, i) in zip(axes, rows, strict=True):
        crop = s.crops[i]
        line[0].imshow(s.overview)
        box = (crop.left * s.zoom, crop.top * s.zoom), crop.width * s.zoom, crop.height * s.zoom
        line[0].add_patch(Rectangle(*box, fill=False, edgecolor=page.ORANGE, linewidth=2))
        name = s.name if len(s.name) <= 30 else f"{s.name[:20]}...{s.name[-8:]}"
        _title(line[0], f"{name}\nat {crop.left}, {crop.top}")
        for axis, title, pixels in zip(line[1:], titles, crop.variants, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            _title(axis, title)
    for axis in axes.flat:
        axis.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _title(axis: Axes, text: str) -> None:
    """A file's name may not be UTF-8, and a "$" in it begins no formula."""
    axis.set_title(text.encode(errors="replace").decode(), fontsize=9, parse_math=False)
