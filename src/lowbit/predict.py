"""Image files in, classes out. Needs Pillow (the extra ``lowbit[cli]``), no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.machine import available_memory

if TYPE_CHECKING:
    from PIL import Image

    from lowbit.runtime import Engine

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
_BATCH: Final = 64
_ORIENTATION: Final = 0x0112  # EXIF 2.3, table 4
_UPRIGHT: Final = 20
"""Bytes of memory that `upright` takes for a pixel at most; 16 were measured, with transparency."""


class ImageError(ValueError):
    """An image that can't be read, or a network that does not read images. The message names the file."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first: (name, probability)."""

    path: Path
    classes: tuple[tuple[str, float], ...]


@contextmanager
def decoding() -> Iterator[None]:
    """Around what Pillow does with a file: whatever it raises there becomes an ImageError that says why, not which file."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except UnidentifiedImageError:
        raise ImageError("not a readable image (PNG, JPEG, BMP or WebP)") from None
    except Exception as error:  # its decoders have no common error: struct.error, IndexError, zlib.error, ...
        raise ImageError(f"not a readable image ({str(error) or type(error).__name__})") from None


_bomb_check = threading.Lock()


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Pillow's handle on a file of any size: how much memory a picture may take is the caller's to say (`refuse_too_large`)."""
    from PIL import Image

    with _bomb_check:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            opened = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with opened:
        yield opened


def refuse_too_large(width: int, height: int, pixel: int, free: int) -> None:
    """Raises ImageError where a picture takes more than the `free` bytes of memory, with `pixel` bytes for each of its pixels."""
    need = width * height * pixel
    if need > free:
        raise ImageError(f"{width} x {height} pixels need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """As `decoding`, and the ImageError names the file."""
    try:
        with decoding():
            yield
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from None


def orientation(opened: Image.Image) -> int:
    """How the image has to be turned, as EXIF numbers it: 1 (not at all) to 8. 1 too where the EXIF data can't be read.

    A JPEG is not decoded for it, so that it can still be decoded at a smaller size.
    """
    if opened.format != "JPEG":
        opened.load()  # the EXIF data of a PNG may stand behind its pixels
    try:
        turn = opened.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged metadata of a sound image: struct.error, SyntaxError, TypeError, ...
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def upright(opened: Image.Image, channels: int, turn: int) -> Image.Image:
    """Turned, transparent parts white, gray (1 channel) or RGB (3), 8 bits. Pillow's errors pass through.

    16-bit PNGs keep the high byte, ``pixel >> 8``, gray as RGB (for RGB, Pillow reads no more).

    Args:
        opened: what ``Image.open`` gave.
        channels: 1 or 3.
        turn: see `orientation`.

    Raises:
        ImageError: pixels whose white is not known: 32 bits, floats, 16 bits in other files than PNG.
    """
    from PIL import Image

    transpose = Image.Transpose
    method = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }.get(turn)
    opened.load()
    image = _high_byte(opened) if opened.mode[0] in "IF" else opened
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    return image if method is None else image.transpose(method)


def _high_byte(opened: Image.Image) -> Image.Image:
    """8-bit gray of wide gray pixels; ``convert`` would clip them at 255 and give a white image."""
    from PIL import Image

    if opened.format != "PNG" or not opened.mode.startswith("I;16"):
        raise ImageError(
            f"wide pixels (mode {opened.mode} of a {opened.format} file), whose white is not known; save it as an 8-bit PNG"
        )
    wide = np.asarray(opened)
    gray = (wide >> 8).astype(np.uint8)
    gray[wide == opened.info.get("transparency", -1)] = 255
    return Image.fromarray(gray)


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
        channels: 1 (gray) or 3 (RGB). Transparent parts become white; of 16 bits, in a PNG, the high 8 are kept.
        invert: give 255 - pixel, for dark drawings on a light ground where the network knows light on dark.
        resize: see `centre`; a file's ``meta["image"]["resize"]`` says what its network was evaluated with.

    Raises:
        ImageError: no such file, not an image, one that needs more memory than is free, or one whose pixels have more than 8 bits and
            no known white (`upright`).
    """
    if channels not in (1, 3):
        raise ImageError(f"{path}: the network reads {channels} channels; an image gives 1 (gray) or 3 (RGB)")
    try:
        with named(path), open_image(path) as opened:
            refuse_too_large(*opened.size, _UPRIGHT, available_memory())
            image = upright(opened, channels, orientation(opened))
        pixels = np.asarray(centre(image, size, resize), np.uint8)
    except MemoryError:
        raise ImageError(f"{path}: not enough memory is free to read it") from None
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


def predict(
    engine: Engine,
    paths: Sequence[Path],
    top: int = 3,
    invert: bool = False,
    on_broken: Callable[[ImageError], None] | None = None,
) -> Iterator[Prediction]:
    """The `top` likeliest classes of every image, in order.

    Args:
        engine: a network that `check_network` takes.
        paths: the images.
        top: how many classes.
        invert: see `read_image`.
        on_broken: called with the error of an image that can't be read, which is then passed over; None: the error is raised.

    Raises:
        ImageError: an unreadable image, or a network that does not classify images.
    """
    check_network(engine)
    height, width, channels = engine.input_shape
    resize = engine.meta.get("image", {}).get("resize")
    for start in range(0, len(paths), _BATCH):
        read: list[Path] = []
        images: list[NDArray[np.uint8]] = []
        for path in paths[start : start + _BATCH]:
            try:
                images.append(read_image(path, (height, width), channels, invert, resize))
            except ImageError as error:
                if on_broken is None:
                    raise
                on_broken(error)
            else:
                read.append(path)
        if read:
            for path, classes in zip(read, _likeliest(engine, np.stack(images), top), strict=True):
                yield Prediction(path, classes)


def classify(
    engine: Engine, picture: str | os.PathLike[str] | NDArray[Any], top: int = 3, invert: bool = False
) -> tuple[tuple[str, float], ...]:
    """The `top` likeliest classes of one image file, or of one array that the engine takes; see `Engine.classify`."""
    check_network(engine)
    if isinstance(picture, np.ndarray):
        if picture.shape != engine.input_shape or picture.dtype != np.uint8:
            raise ValueError(
                f"classify takes one picture: a file, or uint8 of shape {engine.input_shape}; got {picture.dtype} of shape "
                f"{picture.shape}"
            )
        images = (255 - picture if invert else picture)[None]
        return next(_likeliest(engine, images, top))
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ImportError(
            "classify reads picture files with Pillow, which is not installed: pip install 'lowbit[cli]'", name="PIL"
        ) from None
    return next(predict(engine, [Path(picture)], top, invert)).classes


def check_network(engine: Engine, name: str = "this network") -> None:
    """Raises ImageError where a network, which the message calls `name`, does not classify images."""
    task = engine.meta.get("task", "classify")
    if task != "classify":
        raise ImageError(
            f"{name}: its task is {task!r}; predict names classes"
            + ("; enlarge pictures with lowbit upscale" if task == "superres" else "")
        )
    if len(engine.input_shape) != 3 or engine.input_shape[2] not in (1, 3) or engine.input_dtype != np.uint8:
        raise ImageError(
            f"{name}: reads {engine.input_dtype} of shape {engine.input_shape}, not images; call it from Python"
        )


def _likeliest(engine: Engine, images: NDArray[np.uint8], top: int) -> Iterator[tuple[tuple[str, float], ...]]:
    names = class_names(engine)
    logits = np.asarray(engine(images), np.float64).reshape(len(images), -1)
    for shares in _softmax(logits):
        best = np.argsort(-shares, kind="stable")[: max(top, 1)]
        yield tuple((names[i], float(shares[i])) for i in best)


def _softmax(logits: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: NDArray[Any] = e / e.sum(axis=1, keepdims=True)
    return out
