"""What a camera wrote beside the pixels (EXIF 2.32), kept as far as it stays true. Needs Pillow (``lowbit[cli]``), no torch.

Date, camera, lens, exposure, place, author stay as they are. What describes the file's own pixels does not: it is corrected (size,
resolution) or left out (orientation, which has been applied; thumbnail; where in the picture the subject is; how the old
file was compressed; the maker's notes, which are full of offsets into the old file).
"""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["corrected", "parse", "read"]

_EXIF, _GPS = 0x8769, 0x8825  # where IFD0 points to the camera's tags and to the place

_FORGOTTEN: Final = frozenset((0x9101, 0x9102, 0x9214, 0x927C, 0xA005, 0xA20C, 0xA214, 0xA420))
"""Of the camera's: ComponentsConfiguration, CompressedBitsPerPixel, SubjectArea, MakerNote, Interoperability,
SpatialFrequencyResponse, SubjectLocation, ImageUniqueID."""
_KEPT: Final = frozenset(
    (0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x012D, 0x0131, 0x0132, 0x013B, 0x013C, 0x013E, 0x013F, 0x8298)
)
"""Of IFD0, which also describes how pixels are stored: ImageDescription, Make, Model, XResolution, YResolution, ResolutionUnit,
TransferFunction, Software, DateTime, Artist, HostComputer, WhitePoint, PrimaryChromaticities, Copyright."""

_SIZE: Final = (0xA002, 0xA003)  # PixelXDimension, PixelYDimension
_RESOLUTIONS: Final = {0: (0x011A, 0x011B), _EXIF: (0xA20E, 0xA20F)}  # X, Y; the second pair on the sensor


def parse(data: bytes) -> Image.Exif:
    """EXIF data as Pillow has it; empty where it can't be read."""
    from PIL import Image

    found = Image.Exif()
    try:
        found.load(data)
    except MemoryError:
        raise
    except Exception:  # damaged metadata of a sound picture: struct.error, SyntaxError, ...
        return Image.Exif()
    return found


def read(opened: Image.Image) -> Image.Exif:
    """What an open picture has; empty where it can't be read."""
    from PIL import Image

    try:
        return opened.getexif()
    except MemoryError:
        raise
    except Exception:  # as above
        return Image.Exif()


def corrected(exif: Image.Exif, width: int, height: int, turned: bool = False, scale: int = 1) -> bytes | None:
    """EXIF data of a picture that was turned upright or enlarged.

    Args:
        exif: of the picture before. Damaged tags, and those whose values can't be written, are left out.
        width, height: of the picture now.
        turned: by a quarter: horizontal is vertical now.
        scale: how many pixels there are now for one, across and down alike.

    Returns:
        The data as JPEG has it, ``Exif\\0\\0`` in front; None where nothing is left.
    """
    from PIL import Image

    made = Image.Exif()
    for where in (0, _EXIF, _GPS):
        tags = _tags(exif, where)
        kept = {tag: value for tag, value in tags.items() if _stays(where, tag) and _can_be_written(tag, value, where)}
        if where in _RESOLUTIONS:
            _rescale(kept, _RESOLUTIONS[where], turned, scale)
        if where == 0:
            for tag, value in kept.items():
                made[tag] = value
        elif kept:
            if where == _EXIF and any(tag in kept for tag in _SIZE):
                kept.update(zip(_SIZE, (width, height), strict=True))
            made[where] = kept
    return made.tobytes() if len(made) else None


def _stays(where: int, tag: int) -> bool:
    return tag in _KEPT if where == 0 else where == _GPS or tag not in _FORGOTTEN


def _tags(exif: Image.Exif, where: int) -> dict[int, Any]:
    try:
        return dict(exif) if where == 0 else dict(exif.get_ifd(where))
    except MemoryError:
        raise
    except Exception:  # as above
        return {}


def _can_be_written(tag: int, value: Any, where: int) -> bool:
    from PIL import Image

    alone = Image.Exif()
    alone[where or tag] = {tag: value} if where else value
    try:
        alone.tobytes()
    except MemoryError:
        raise
    except Exception:  # a type that the standard does not give the tag: struct.error, TypeError, ...
        return False
    return True


def _rescale(tags: dict[int, Any], pair: tuple[int, int], turned: bool, scale: int) -> None:
    """Pixels for an inch or centimetre: as many times more as there are more pixels. Senseless ones are left out."""
    values = [tags.pop(tag, None) for tag in pair]
    for tag, value in zip(pair, reversed(values) if turned else values, strict=True):
        if isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0:
            tags[tag] = float(value) * scale
