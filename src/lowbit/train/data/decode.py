"""From an encoded image to a u8 array of the network's size: what is cut out, and how it is resized.

Training cuts out a random part ("Inception" cropping: Szegedy et al., arXiv 1409.4842, section 6) and resizes it;
evaluation resizes the shorter side and takes the centre (Krizhevsky et al., 2012). Resizing is Pillow's bilinear filter
with its antialiasing, in both.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowbit.predict import ImageError, centre, decoding, orientation, upright
from lowbit.train.data.batches import Augment
from lowbit.train.data.images import DataError

__all__ = ["BrokenImageError", "Geometry", "decode", "random_box"]

_TRIES = 10


class BrokenImageError(DataError):
    """An image that can't be decoded; the message says why, not which."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of one data set: evaluation resizes the shorter side to ``resize`` and cuts ``size`` x ``size`` out."""

    size: int
    resize: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise DataError(f"data.size = {self.size}, data.resize = {self.resize}: 1 <= size <= resize is needed")


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random part of an image: (left, top, right, bottom).

    Its area is uniform in ``scale`` times the image's, the logarithm of its width / height uniform between those of
    ``ratio``, its place uniform. After ten draws that don't fit: the largest part of an allowed ratio, from the centre.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * random.random())
        shape = math.exp(low + (high - low) * random.random())
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode(
    data: bytes, geometry: Geometry, augment: Augment | None = None, random: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """Decode one image.

    What the file holds is read as prediction reads it: ``lowbit.predict.orientation`` and ``upright``. Where a training cut
    is shrunk to half or less, a JPEG is decoded at a half, quarter or eighth of its size ("draft"), never below the size
    that is asked for; evaluation decodes in full.

    Args:
        data: a file that Pillow reads.
        geometry: the sizes.
        augment: what to do at random; None for evaluation.
        random: where the random numbers come from; needed with ``augment``.

    Returns:
        u8 ``[size, size, 3]``, RGB.

    Raises:
        BrokenImageError: not an image, cut short, or of pixels that ``upright`` refuses.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # broken EXIF data of sound images
            if augment is not None and augment.resized_crop is not None:
                assert random is not None
                image = _cut(data, geometry.size, augment, augment.resized_crop, random)
            else:
                with decoding():
                    opened = Image.open(io.BytesIO(data))
                    whole = upright(opened, 3, orientation(opened))
                image = centre(whole, (geometry.size, geometry.size), geometry.resize)
    except ImageError as error:
        raise BrokenImageError(str(error)) from None
    pixels = np.asarray(image, np.uint8)
    if augment is not None and augment.flip:
        assert random is not None
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
    return pixels


def _cut(
    data: bytes, size: int, augment: Augment, scale: tuple[float, float], random: np.random.Generator
) -> Image.Image:
    with decoding():
        opened = Image.open(io.BytesIO(data))
        turn = orientation(opened)
    # the box is drawn from the size in the header, so that a smaller decoding does not change what is drawn
    width, height = opened.size if turn < 5 else opened.size[::-1]
    box: tuple[float, float, float, float] = random_box(width, height, scale, augment.ratio, random)
    if turn == 1 and opened.format == "JPEG":
        wide, high = box[2] - box[0], box[3] - box[1]
        # draft takes the smallest decoding that is at least as large; ceil keeps the cut at `size` pixels or more
        opened.draft(opened.mode, (math.ceil(width * size / wide), math.ceil(height * size / high)))
        # one pixel of a draft stands for `shrink` x `shrink`; the last row and column may stand for fewer
        shrink = next(s for s in (1, 2, 4, 8) if (-(-width // s), -(-height // s)) == opened.size)
        box = (box[0] / shrink, box[1] / shrink, box[2] / shrink, box[3] / shrink)
    with decoding():
        whole = upright(opened, 3, turn)
    return whole.resize((size, size), Image.Resampling.BILINEAR, box=box)
