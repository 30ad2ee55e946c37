"""Pictures as arrays, at their full depth, and MATLAB's bicubic resizing. Needs Pillow (``lowbit[cli]``), no torch.

`lowbit.predict` reads images as a classifier wants them: eight bits, cropped, white behind them. Here nothing is lost: 16-bit
PNGs keep their 16 bits, transparency and the colour profile stay, gray stays gray.
"""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit import exif
from lowbit.predict import ImageError, named, open_image, orientation

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "ImageError",
    "Picture",
    "from_float",
    "imresize",
    "luma",
    "read_header",
    "read_picture",
    "read_texts",
    "rgb_to_ycbcr",
    "to_float",
    "write_picture",
    "ycbcr_to_rgb",
]

Floats = NDArray[np.float32]

_TO_YCBCR: Final = (
    np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]], np.float64) / 255
)
_OFFSET: Final = np.array([16.0, 128.0, 128.0]) / 255
_FROM_YCBCR: Final = np.linalg.inv(_TO_YCBCR)


# --------------------------------------------------------------------------------------------- colour


def luma(rgb: Floats) -> Floats:
    """Y of ITU-R BT.601 in studio range, as MATLAB's ``rgb2ycbcr`` gives it:
    Y = (65.481 R + 128.553 G + 24.966 B + 16) / 255.

    Args:
        rgb: float32 (H, W, 3) in 0..1.

    Returns:
        float32 (H, W): 16/255 for black to 235/255 for white.
    """
    return _sum([rgb[..., i] for i in range(3)], _TO_YCBCR[0], _OFFSET[0])


def rgb_to_ycbcr(rgb: Floats) -> Floats:
    """Y, Cb, Cr of ITU-R BT.601 in studio range (MATLAB's ``rgb2ycbcr``): float32 (H, W, 3) from float32 (H, W, 3), all in 0..1."""
    planes = [rgb[..., i] for i in range(3)]
    return _stack([_sum(planes, _TO_YCBCR[i], _OFFSET[i]) for i in range(3)])


def ycbcr_to_rgb(ycbcr: Floats) -> Floats:
    """The inverse of `rgb_to_ycbcr`, not clipped: float32 (H, W, 3) from float32 (H, W, 3)."""
    planes = [ycbcr[..., i] - np.float32(_OFFSET[i]) for i in range(3)]
    return _stack([_sum(planes, _FROM_YCBCR[i]) for i in range(3)])


def _stack(planes: Sequence[Floats]) -> Floats:
    """(H, W, channels), of which every channel lies in one piece: what works on channels is fast so."""
    return np.moveaxis(np.stack(planes), 0, -1)


def _sum(planes: Sequence[Floats], factors: Floats, term: float = 0.0) -> Floats:
    """planes[0] factors[0] + planes[1] factors[1] + ... + term, in this order."""
    out = planes[0] * np.float32(factors[0])
    other = np.empty_like(out)
    for plane, factor in zip(planes[1:], factors[1:], strict=True):
        out += np.multiply(plane, np.float32(factor), out=other)
    out += np.float32(term)
    return out


def to_float(pixels: NDArray[Any]) -> Floats:
    """uint8 or uint16 pixels as float32 in 0..1: pixel / 255 or pixel / 65535, rounded once."""
    return np.divide(pixels, np.float32(np.iinfo(pixels.dtype).max), dtype=np.float32)


def from_float(x: Floats, dtype: Any) -> NDArray[Any]:
    """float32 in 0..1 as uint8 or uint16: clipped, times 255 or 65535, rounded to nearest (ties to even)."""
    scaled = np.clip(x, np.float32(0), np.float32(1))
    scaled *= np.float32(np.iinfo(dtype).max)
    return np.rint(scaled, out=scaled).astype(dtype)


# --------------------------------------------------------------------------------------------- resizing


def imresize(x: Floats, scale: float) -> Floats:
    """Resize as MATLAB's ``imresize(x, scale, "bicubic")`` does, antialiased where it shrinks.

    The result has ceil(scale H) x ceil(scale W) pixels. Pixel o lies at u = (o + 0.5) / scale - 0.5 of the input and is the mean
    of the pixels p around it with the weights k(u - p), or scale k(scale (u - p)) for scale < 1, which are divided by their
    sum. k is Keys' cubic (1981) with a = -0.5::

        k(t) = 1.5 |t|^3 - 2.5 |t|^2 + 1                for |t| <= 1
               -0.5 |t|^3 + 2.5 |t|^2 - 4 |t| + 2       for 1 < |t| < 2

    Beyond the border the picture is mirrored, the outermost pixels doubled: -1 -> 0, -2 -> 1. Not clipped. Pillow computes it,
    in double precision with float32 between the two directions.

    Args:
        x: float32, (H, W) or (H, W, C).
        scale: any positive factor.

    Raises:
        ValueError: another dtype or shape, or a scale that is not positive.
    """
    from PIL import Image

    if not isinstance(x, np.ndarray) or x.dtype != np.float32 or x.ndim not in (2, 3) or x.size == 0:
        what = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"imresize takes float32 (H, W) or (H, W, C), got {what}")
    if not (0 < scale < math.inf):
        raise ValueError(f"the scale must be positive, got {scale!r}")
    if x.ndim == 3:
        return np.stack([imresize(np.ascontiguousarray(x[..., c]), scale) for c in range(x.shape[2])], axis=-1)
    out = [math.ceil(round(scale * side, 6)) for side in x.shape]  # 99 * (1 / 3) is 33 whatever the rounding
    covered = [
        round(side / scale, 6) for side in out
    ]  # a part of a pixel more than there is where a side doesn't divide
    pad = math.ceil(2 * max(1.0, 1 / scale) + max(c - side for c, side in zip(covered, x.shape, strict=True))) + 1
    mirrored = np.pad(x, pad, mode="symmetric")
    box = (pad, pad, pad + covered[1], pad + covered[0])
    resized = Image.fromarray(mirrored).resize((out[1], out[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, np.float32)


# --------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as its file has it, upright.

    Attributes:
        pixels: uint8 or uint16, (H, W, 3) for RGB or (H, W, 1) for gray.
        alpha: (H, W) of the same dtype, its largest value opaque; None without transparency.
        icc: the colour profile.
        exif: what the camera wrote, as far as it is true of these pixels (`lowbit.exif`).
        dpi: pixels for an inch, across and down, where the file says so itself; EXIF has its own.
    """

    pixels: NDArray[Any]
    alpha: NDArray[Any] | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def gray(self) -> bool:
        return self.pixels.shape[2] == 1

    def rgb(self) -> Floats:
        """float32 (H, W, 3) in 0..1, gray three times."""
        return np.broadcast_to(to_float(self.pixels), (self.height, self.width, 3))

    def luma(self) -> Floats:
        """float32 (H, W): `luma` of `rgb`."""
        return luma(self.rgb())


@dataclass(frozen=True)
class Header:
    """What a picture's file says before it is decoded. A picture that EXIF turns has width and height the other way round."""

    width: int
    height: int
    channels: int  # 1 or 3
    alpha: bool
    bits: int  # 8 or 16


_WIDE_PNG: Final = {"I;16B": 1, "RGB;16B": 3, "LA;16B": 1, "RGBA;16B": 3}
"""How Pillow says that a PNG has 16 bits a channel, and how many colour channels these are."""


def _rawmode(opened: Image.Image) -> str:
    """How the file's pixels lie in a PNG; empty for other files."""
    tile = getattr(opened, "tile", None)
    return tile[0][3] if opened.format == "PNG" and tile and isinstance(tile[0][3], str) else ""


def _header(opened: Image.Image) -> Header:
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":  # an MPO is a photograph with previews behind it
        raise ImageError(f"holds {frames} frames; one picture is wanted")
    raw = _rawmode(opened)
    transparent = opened.has_transparency_data
    if raw in _WIDE_PNG:
        return Header(*opened.size, _WIDE_PNG[raw], transparent, 16)
    if opened.mode in ("1", "L", "LA", "La"):
        return Header(*opened.size, 1, transparent, 8)
    if opened.mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        return Header(*opened.size, 3, transparent, 8)
    if opened.mode == "CMYK":
        raise ImageError("CMYK: what its inks look like is not known here; save it as RGB")
    raise ImageError(
        f"pixels of mode {opened.mode} of a {opened.format} file are not read; save it as an 8- or 16-bit PNG"
    )


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and kind of a picture, without decoding it.

    Raises:
        ImageError: as `read_picture`, as far as the first bytes tell.
    """
    with named(path), open_image(path) as opened:
        return _header(opened)


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """A picture at full depth, turned as its EXIF data says, which stays as far as it is true of the turned picture.

    1-bit pixels become 0 and 255, palettes RGB, a transparent colour an alpha channel. XMP, IPTC and PNG's texts are not read.

    Args:
        path: PNG (1 to 16 bits a channel), JPEG, or what else Pillow reads with 8 bits.

    Raises:
        ImageError: no such file, not a picture, cut short, several frames, CMYK or pixels of an unknown white (32 bits,
            floats, 16 bits in other files than PNG). The message names the file.
    """
    with named(path):
        with open_image(path) as opened:
            header = _header(opened)
            icc = opened.info.get("icc_profile")
            if header.bits == 16:
                planes = _wide_planes(path, opened)
            else:
                planes = _planes(opened, header)
            with warnings.catch_warnings(action="ignore"):  # of damaged metadata, which are left out
                turn = orientation(opened)
                upright = _turned(planes, turn)
                height, width = upright.shape[:2]
                said = exif.corrected(exif.read(opened), width, height, turned=turn >= 5)
            dpi = _dpi(opened)
        pixels = np.ascontiguousarray(upright[..., : header.channels])
        alpha = np.ascontiguousarray(upright[..., header.channels]) if header.alpha else None
        return Picture(
            pixels, alpha, icc if isinstance(icc, bytes) else None, said, dpi[::-1] if dpi and turn >= 5 else dpi
        )


def _dpi(opened: Image.Image) -> tuple[float, float] | None:
    """Of a PNG's pHYs or a JPEG's JFIF header, where they have a unit; Pillow makes up others."""
    if opened.format != "PNG" and opened.info.get("jfif_unit") not in (1, 2):
        return None
    across, down = opened.info.get("dpi", (0, 0))
    return (float(across), float(down)) if across > 0 and down > 0 else None


def _planes(opened: Image.Image, header: Header) -> NDArray[Any]:
    """8 bits: (H, W, channels + alpha)."""
    mode = ("L" if header.channels == 1 else "RGB") + ("A" if header.alpha else "")
    opened.load()
    image = opened
    if opened.mode == "L" and header.alpha:  # a transparent gray; Pillow knows it for RGB only
        image = opened.convert("RGBA").convert("LA")
    elif opened.mode != mode:
        image = opened.convert(mode)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _wide_planes(path: str | os.PathLike[str], opened: Image.Image) -> NDArray[Any]:
    """16 bits of a PNG: (H, W, channels + alpha). Pillow has no image of 16-bit colours, but its decoder gives either byte."""
    raw = _rawmode(opened)
    key = opened.info.get("transparency")
    if raw == "I;16B":
        wide = np.asarray(opened).astype(np.uint16)[..., None]
    elif raw == "LA;16B":
        wide = _bytes_as(opened, "RGBA").view(">u2").astype(np.uint16)
    else:
        high = _bytes_as(opened, raw)
        wide = high.astype(np.uint16)
        wide <<= 8
        with open_image(path) as again:
            wide |= _bytes_as(again, raw.replace("16B", "16L"))
    if key is not None:
        seen = (wide != np.asarray(key, np.uint16)).any(axis=-1, keepdims=True)
        wide = np.concatenate([wide, seen * np.uint16(65535)], axis=-1)
    return wide


def _bytes_as(opened: Image.Image, rawmode: str) -> NDArray[np.uint8]:
    """A PNG's pixels, decoded as if they lay as `rawmode` says, which must be as many bits long."""
    codec, extents, offset, _ = opened.tile[0]  # type: ignore[attr-defined]
    opened.tile = [type(opened.tile[0])(codec, extents, offset, rawmode)]  # type: ignore[attr-defined]
    opened.load()
    return np.asarray(opened)


def _turned(x: NDArray[Any], turn: int) -> NDArray[Any]:
    """Upright: `turn` is EXIF's number (2.3, table 6): 1 as it is, 2 to 8 mirrored or turned."""
    match turn:
        case 2:
            return x[:, ::-1]
        case 3:
            return x[::-1, ::-1]
        case 4:
            return x[::-1]
        case 5:
            return x.swapaxes(0, 1)
        case 6:
            return np.rot90(x, -1)
        case 7:
            return x[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(x, 1)
    return x


# --------------------------------------------------------------------------------------------- writing

WRITES: Final = (".png", ".jpg", ".jpeg")


_JPEG_SIDE: Final = 65500
_JPEG_EXIF: Final = 65533


def check_suffix(path: str | os.PathLike[str], alpha: bool = False, bits: int = 8, side: int = 1) -> None:
    """Refuse a name whose kind of file can't hold such a picture.

    Raises:
        ImageError: another suffix than .png, .jpg and .jpeg, or JPEG for transparency, 16 bits or a side of more than 65,500 pixels.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITES:
        raise ImageError(f"{os.fspath(path)}: pictures are written as {', '.join(WRITES)}")
    if suffix != ".png" and (alpha or bits != 8):
        raise ImageError(
            f"{os.fspath(path)}: JPEG has no {'transparency' if alpha else '16-bit pixels'}; give a name that ends in .png"
        )
    if suffix != ".png" and side > _JPEG_SIDE:
        raise ImageError(f"{os.fspath(path)}: JPEG ends at {_JPEG_SIDE:,} pixels a side; give a name that ends in .png")


def write_picture(
    path: str | os.PathLike[str], picture: Picture, texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a PNG (8 or 16 bits, lossless) or a JPEG (quality 95, colours at full size). The file appears whole or not at all.

    Args:
        path: its suffix says which.
        picture: what is written, all of it.
        texts: keyword -> text, Latin-1, into a PNG in front of its pixels (see `read_texts`); a JPEG has none.

    Raises:
        ImageError: see `check_suffix`; or EXIF data that is too long for a JPEG.
        OSError: it can't be written.
    """
    from PIL.PngImagePlugin import PngInfo

    from lowbit.files import write_atomic

    bits = picture.pixels.dtype.itemsize * 8
    check_suffix(path, picture.alpha is not None, bits, max(picture.width, picture.height))
    stream = io.BytesIO()
    beside: dict[str, Any] = {"icc_profile": picture.icc}
    beside |= {key: value for key, value in (("exif", picture.exif), ("dpi", picture.dpi)) if value is not None}
    if bits == 16:
        _encode_wide_png(picture, stream, texts)
    elif Path(path).suffix.lower() == ".png":
        info = PngInfo()
        for keyword, text in texts.items():
            info.add_text(keyword, text)
        _image(picture).save(stream, "PNG", pnginfo=info, **beside)
    else:
        if picture.exif is not None and len(picture.exif) > _JPEG_EXIF:
            raise ImageError(f"{os.fspath(path)}: its EXIF data is too long for a JPEG; give a name that ends in .png")
        _image(picture).save(stream, "JPEG", quality=95, subsampling=0, **beside)
    write_atomic(path, stream.getbuffer())


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of a PNG, keyword -> text, as far as they stand in front of its pixels; none of anything else."""
    try:
        with open_image(path) as opened:
            return (
                {str(key): str(text) for key, text in getattr(opened, "text", {}).items()}
                if opened.format == "PNG"
                else {}
            )
    except (OSError, SyntaxError, ValueError):  # not a picture, or a damaged one
        return {}


def _image(picture: Picture) -> Image.Image:
    from PIL import Image

    image = Image.fromarray(picture.pixels[..., 0] if picture.gray else picture.pixels)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    return image


_BAND: Final = 64
"""Rows that are encoded at once."""


def _encode_wide_png(picture: Picture, stream: IO[bytes], texts: Mapping[str, str]) -> None:
    """A 16-bit PNG (ISO/IEC 15948), which Pillow writes for gray only: rows filtered by "up", in bands."""
    colour = (0 if picture.gray else 2) + (4 if picture.alpha is not None else 0)

    def chunk(kind: bytes, data: bytes) -> None:
        stream.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    stream.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 16, colour, 0, 0, 0))
    if picture.icc is not None:
        chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.dpi is not None:
        chunk(b"pHYs", struct.pack(">IIB", *(int(v / 0.0254 + 0.5) for v in picture.dpi), 1))  # a metre
    if picture.exif is not None:
        chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    for keyword, text in texts.items():
        chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1"))
    packer = zlib.compressobj(6, strategy=zlib.Z_FILTERED)
    above: NDArray[np.uint8] | None = None
    for y in range(0, picture.height, _BAND):
        rows = picture.pixels[y : y + _BAND]
        if picture.alpha is not None:
            rows = np.concatenate([rows, picture.alpha[y : y + _BAND, :, None]], axis=-1)
        raw = rows.astype(">u2").reshape(len(rows), -1).view(np.uint8)
        before = np.concatenate([np.zeros_like(raw[:1]) if above is None else above, raw[:-1]])
        filtered = np.empty((len(rows), raw.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2
        np.subtract(raw, before, out=filtered[:, 1:])
        above = raw[-1:]
        packed = packer.compress(filtered.data)
        if packed:
            chunk(b"IDAT", packed)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")
