"""Image files in, classes out. Needs Pillow (the extra ``lowbit[cli]``), no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

    from lowbit.runtime import Engine

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_BATCH: Final = 64


class ImageError(ValueError):
    """An image that can't be read, or a network that does not read images. The message names the file."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first: (name, probability)."""

    path: Path
    classes: tuple[tuple[str, float], ...]


def upright(opened: Image.Image, channels: int) -> Image.Image:
    """Turned as its EXIF data says, transparent parts white, gray (1 channel) or RGB (3). Pillow's errors pass through."""
    from PIL import Image, ImageOps

    image: Image.Image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def centre(image: Image.Image, size: tuple[int, int], resize: int | None = None) -> Image.Image:
    """The centre of an image, (height, width) = `size` pixels large.

    With `resize` the shorter side becomes that long (bilinear, with antialiasing) and `size` is cut out of the middle, as
    networks for ImageNet are evaluated (Krizhevsky et al. 2012); without it as much as possible is kept (bicubic).
    """
    from PIL import Image, ImageOps

    height, width = size
    if resize is None:
        return ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
    shorter = min(image.size)
    wide, high = (resize * side // shorter for side in image.size)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + width, top + height))


def read_image(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    channels: int,
    invert: bool = False,
    resize: int | None = None,
) -> NDArray[np.uint8]:
    """One image as uint8 (H, W, C): turned as its EXIF data says, resized, the centre cut out.

    Args:
        path: a file that Pillow reads.
        size: height and width.
        channels: 1 (gray) or 3 (RGB). Transparent parts become white.
        invert: give 255 - pixel, for dark drawings on a light ground where the network knows light on dark.
        resize: see `centre`; a file's ``meta["image"]["resize"]`` says what its network was evaluated with.

    Raises:
        ImageError: no such file, or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise ImageError(f"{path}: the network reads {channels} channels; an image gives 1 (gray) or 3 (RGB)")
    try:
        with Image.open(path) as opened:
            image = upright(opened, channels)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not a readable image (PNG, JPEG, BMP or WebP)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a readable image ({error})") from None
    pixels = np.asarray(centre(image, size, resize), np.uint8)
    if invert:
        pixels = 255 - pixels
    return pixels.reshape(*size, channels)


def find_images(places: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are; of a folder, the images in it, sorted.

    Raises:
        ImageError: no such file, or a folder without images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ImageError(f"{place}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise ImageError(f"{place}: no such file or folder")
    return found


def class_names(engine: Engine) -> list[str]:
    """The names of the classes that the engine's file holds, or their numbers."""
    count = int(np.prod(engine.output_shape))
    names = engine.meta.get("classes", [])
    return [str(name) for name in names] if len(names) == count else [str(i) for i in range(count)]


def predict(engine: Engine, paths: Sequence[Path], top: int = 3, invert: bool = False) -> Iterator[Prediction]:
    """The `top` likeliest classes of every image, in order.

    Raises:
        ImageError: an unreadable image, or a network that does not classify images.
    """
    task = engine.meta.get("task", "classify")
    if task != "classify":
        raise ImageError(f"this network's task is {task!r}; predict names classes")
    if len(engine.input_shape) != 3 or np.dtype(engine.input_dtype) != np.uint8:
        raise ImageError(
            f"this network reads {engine.input_dtype} of shape {engine.input_shape}, not images; call it from Python"
        )
    height, width, channels = engine.input_shape
    names = class_names(engine)
    resize = engine.meta.get("image", {}).get("resize")
    for start in range(0, len(paths), _BATCH):
        part = paths[start : start + _BATCH]
        images = np.stack([read_image(path, (height, width), channels, invert, resize) for path in part])
        logits = np.asarray(engine(images), np.float64).reshape(len(part), -1)
        for path, shares in zip(part, _softmax(logits), strict=True):
            best = np.argsort(-shares, kind="stable")[: max(top, 1)]
            yield Prediction(path, tuple((names[i], float(shares[i])) for i in best))


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: NDArray[Any] = e / e.sum(axis=1, keepdims=True)
    return out
