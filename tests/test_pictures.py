"""Pictures: what files hold is what comes out, and resizing is MATLAB's."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lowbit.bench.superres import low_resolution
from lowbit.pictures import (
    ImageError,
    Picture,
    from_float,
    imresize,
    luma,
    read_header,
    read_picture,
    rgb_to_ycbcr,
    to_float,
    write_picture,
    ycbcr_to_rgb,
)
from lowbit.upscale import Upscaler

# Keys' cubic with a = -0.5 at 1/4, 3/4, 5/4 and 7/4, by hand
NEAR, MIDDLE, FAR, FARTHEST = 0.8671875, 0.2265625, -0.0703125, -0.0234375


def impulse(size: int, at: int) -> np.ndarray:
    x = np.zeros((1, size), np.float32)
    x[0, at] = 1
    return x


def test_enlarging_by_two_has_the_weights_of_the_cubic() -> None:
    got = imresize(np.repeat(impulse(12, 5), 9, axis=0), 2)[4]
    # output o lies at o/2 - 1/4: 9.75, 10.25 ... around input 5
    want = np.zeros(24)
    want[7:15] = [FARTHEST, FAR, MIDDLE, NEAR, NEAR, MIDDLE, FAR, FARTHEST]
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_shrinking_by_two_is_antialiased() -> None:
    columns = [imresize(np.repeat(impulse(24, at), 24, axis=0), 0.5)[6, 6] for at in range(9, 17)]
    # output 6 lies at 12.5, between inputs 12 and 13: half the cubic at half the distance
    want = np.array([FARTHEST, FAR, MIDDLE, NEAR, NEAR, MIDDLE, FAR, FARTHEST]) / 2
    np.testing.assert_allclose(columns, want, atol=1e-7)


def cubic(t: np.ndarray) -> np.ndarray:
    t = np.abs(t)
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def reference(x: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's definition, one dense matrix a direction, in double."""

    def matrix(n: int) -> np.ndarray:
        out = int(np.ceil(n * scale - 1e-9))
        shrink = min(scale, 1.0)
        reach = int(np.ceil(2 / shrink)) + 2
        m = np.zeros((out, n))
        for o in range(out):
            u = (o + 0.5) / scale - 0.5
            taps = np.arange(int(np.floor(u)) - reach, int(np.floor(u)) + reach + 1)
            w = cubic(shrink * (u - taps))
            for p, share in zip(taps, w / w.sum(), strict=True):
                p %= 2 * n
                m[o, p if p < n else 2 * n - 1 - p] += share
        return m

    return matrix(x.shape[0]) @ x.astype(np.float64) @ matrix(x.shape[1]).T


@pytest.mark.parametrize("scale", [2, 3, 4, 1 / 2, 1 / 3, 1 / 4, 0.7, 1.5])
@pytest.mark.parametrize("shape", [(24, 36), (13, 7), (3, 2), (1, 1), (1, 9), (25, 31)])
def test_resizing_is_the_definition_borders_and_all(scale: float, shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random(shape, np.float32)
    got = imresize(x, scale)
    want = reference(x, scale)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=3e-6 if float(scale).is_integer() or scale < 0.6 else 3e-5)


@pytest.mark.parametrize(("scale", "out"), [(2, (80, 96)), (0.5, (20, 24)), (0.25, (10, 12))])
def test_the_interior_is_pillows_float_mode(scale: float, out: tuple[int, int]) -> None:
    x = np.random.default_rng(1).random((40, 48), np.float32)
    want = np.asarray(Image.fromarray(x).resize(out[::-1], Image.Resampling.BICUBIC))
    edge = 4
    inner = (slice(edge, -edge), slice(edge, -edge))
    np.testing.assert_allclose(imresize(x, scale)[inner], want[inner], atol=1e-6)
    assert np.abs(imresize(x, scale) - want).max() > 1e-3  # Pillow cuts the kernel at the border, MATLAB mirrors


def test_the_border_is_mirrored_with_its_pixel_doubled() -> None:
    a, b = 0.25, 0.75
    got = imresize(np.array([[a, b]], np.float32), 2)[0]
    # output 0 lies at -1/4: the taps -2, -1, 0, 1 are b, a, a, b
    first = (MIDDLE + NEAR) * a + (FARTHEST + FAR) * b
    # output 1 lies at 1/4: the taps -1, 0, 1, 2 are a, a, b, b
    second = (FAR + NEAR) * a + (MIDDLE + FARTHEST) * b
    np.testing.assert_allclose(got[:2], [first, second], atol=1e-7)
    np.testing.assert_allclose(imresize(np.array([[a]], np.float32), 3), np.full((3, 3), a), atol=1e-7)


def test_channels_are_resized_apart() -> None:
    x = np.random.default_rng(2).random((9, 11, 3), np.float32)
    got = imresize(x, 2)
    assert got.shape == (18, 22, 3)
    for c in range(3):
        assert np.array_equal(got[..., c], imresize(x[..., c].copy(), 2))


@pytest.mark.parametrize("x", [np.zeros((4, 4)), np.zeros((4, 4), np.uint8), np.zeros(4, np.float32), [[1.0]]])
def test_resizing_refuses_other_arrays(x: object) -> None:
    with pytest.raises(ValueError, match="takes float32"):
        imresize(x, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_resizing_refuses_other_scales(scale: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        imresize(np.zeros((4, 4), np.float32), scale)


def test_luma_is_matlabs() -> None:
    corners = np.array([[[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]], np.float32)
    want = [16, 235, 81.481, 144.553, 40.966]
    np.testing.assert_allclose(luma(corners)[0] * 255, want, atol=1e-4)
    ycbcr = rgb_to_ycbcr(corners)
    assert np.array_equal(ycbcr[..., 0], luma(corners))
    np.testing.assert_allclose(ycbcr[0, :, 1] * 255, [128, 128, 90.203, 53.797, 240], atol=1e-4)
    np.testing.assert_allclose(ycbcr[0, :, 2] * 255, [128, 128, 240, 34.214, 109.786], atol=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_survive_the_way_through_ycbcr(dtype: type) -> None:
    pixels = np.random.default_rng(3).integers(0, np.iinfo(dtype).max + 1, (20, 20, 3)).astype(dtype)
    assert np.array_equal(from_float(ycbcr_to_rgb(rgb_to_ycbcr(to_float(pixels))), dtype), pixels)
    assert np.array_equal(from_float(to_float(pixels), dtype), pixels)


def test_from_float_clips() -> None:
    assert from_float(np.array([-1, 2, 0.5], np.float32), np.uint8).tolist() == [0, 255, 128]


# ---------------------------------------------------------------------------------------------- files


def png(path: Path, rows: np.ndarray, colour: int, bits: int = 16, extra: bytes = b"") -> Path:
    """A PNG as the standard says, without any library: (H, W, channels), filter 0."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rows.shape[:2]
    raw = rows.astype(">u2" if bits == 16 else "u1").reshape(height, -1).view(np.uint8)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), raw], axis=1)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + chunk(b"IEND", b"")
    )
    return path


def chunk_of(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("colour", "channels", "alpha"), [(0, 1, False), (2, 3, False), (4, 1, True), (6, 3, True)])
def test_sixteen_bits_are_read_whole(tmp_path: Path, colour: int, channels: int, alpha: bool) -> None:
    want = np.random.default_rng(colour).integers(0, 65536, (7, 5, channels + alpha))
    path = png(tmp_path / "x.png", want, colour)
    header = read_header(path)
    assert (header.width, header.height, header.channels, header.alpha, header.bits) == (5, 7, channels, alpha, 16)
    got = read_picture(path)
    assert got.pixels.dtype == np.uint16
    assert np.array_equal(got.pixels, want[..., :channels])
    assert np.array_equal(got.alpha, want[..., -1]) if alpha else got.alpha is None


@pytest.mark.parametrize(("colour", "key"), [(0, (513,)), (2, (513, 2, 65535))])
def test_a_transparent_colour_of_sixteen_bits_is_alpha(tmp_path: Path, colour: int, key: tuple[int, ...]) -> None:
    want = np.random.default_rng(colour).integers(0, 65536, (4, 6, len(key)))
    want[1, 2] = key
    want[2, 3] = np.array(key) ^ 1  # differs in the low byte only
    got = read_picture(
        png(tmp_path / "x.png", want, colour, extra=chunk_of(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    )
    assert np.array_equal(got.pixels, want)
    opaque = np.full((4, 6), 65535)
    opaque[1, 2] = 0
    assert np.array_equal(got.alpha, opaque)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (130, 9), (64, 3)])
def test_what_is_written_is_read_back(
    tmp_path: Path, dtype: type, channels: int, alpha: bool, size: tuple[int, int]
) -> None:
    draw = np.random.default_rng(5)
    top = np.iinfo(dtype).max + 1
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = Picture(
        draw.integers(0, top, (*size, channels)).astype(dtype),
        draw.integers(0, top, size).astype(dtype) if alpha else None,
        icc,
    )
    write_picture(tmp_path / "x.png", picture)
    again = read_picture(tmp_path / "x.png")
    assert again.pixels.dtype == dtype
    assert np.array_equal(again.pixels, picture.pixels)
    assert np.array_equal(again.alpha, picture.alpha) if alpha else again.alpha is None
    assert again.icc == icc
    with Image.open(tmp_path / "x.png") as seen:  # and by others
        seen.load()
        assert seen.size == size[::-1]


def test_jpeg_is_written_at_high_quality(tmp_path: Path) -> None:
    y, x = np.mgrid[0:40, 0:40]
    smooth = np.stack([x * 6, y * 6, (x + y) * 3], axis=-1).astype(np.uint8)
    write_picture(tmp_path / "x.jpg", Picture(smooth, icc=b"profile"))
    got = read_picture(tmp_path / "x.jpg")
    assert np.abs(got.pixels.astype(int) - smooth).max() <= 6
    assert got.icc == b"profile"
    assert got.alpha is None


@pytest.mark.parametrize(
    ("mode", "channels", "alpha"),
    [("1", 1, False), ("L", 1, False), ("LA", 1, True), ("P", 3, False), ("RGB", 3, False), ("RGBA", 3, True)],
)
def test_eight_bit_kinds(tmp_path: Path, mode: str, channels: int, alpha: bool) -> None:
    rgba = Image.fromarray(np.random.default_rng(7).integers(0, 256, (6, 4, 4), np.uint8))
    image = rgba.convert("RGB").convert(mode) if mode in ("1", "L", "P", "RGB") else rgba.convert(mode)
    image.save(tmp_path / "x.png")
    got = read_picture(tmp_path / "x.png")
    assert got.pixels.shape == (6, 4, channels)
    assert got.pixels.dtype == np.uint8
    want = np.asarray(image.convert({1: "L", 3: "RGB"}[channels] if mode != "LA" else "LA")).reshape(6, 4, -1)
    assert np.array_equal(got.pixels, want[..., :channels])
    assert (got.alpha is not None) == alpha
    if alpha:
        assert np.array_equal(got.alpha, np.asarray(rgba)[..., 3])
    assert read_header(tmp_path / "x.png").channels == channels


def test_a_transparent_gray_is_alpha(tmp_path: Path) -> None:
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    Image.fromarray(gray).save(tmp_path / "x.png", transparency=80)
    got = read_picture(tmp_path / "x.png")
    assert np.array_equal(got.pixels[..., 0], gray)
    assert np.array_equal(got.alpha, np.where(gray == 80, 0, 255))


def test_a_palette_with_transparency_is_rgba(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "x.png", transparency=b"\x40\xff")
    got = read_picture(tmp_path / "x.png")
    assert got.pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert got.alpha.tolist() == [[64, 255]]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("wide", [False, True])
def test_pictures_are_upright(tmp_path: Path, turn: int, wide: bool) -> None:
    from PIL import ImageOps

    pixels = np.random.default_rng(9).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    plain = tmp_path / "plain.png"
    Image.fromarray(pixels).save(plain, exif=exif)
    with Image.open(plain) as opened:
        want = np.asarray(ImageOps.exif_transpose(opened))
    if wide:
        path = png(
            tmp_path / "x.png",
            pixels.astype(np.uint16) * 257,
            2,
            extra=chunk_of(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")),
        )
        assert np.array_equal(read_picture(path).pixels, want * np.uint16(257))
    else:
        assert np.array_equal(read_picture(plain).pixels, want)


def test_bad_files_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(noise).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    Image.new("F", (4, 4)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "wide.tif")
    Image.new("RGB", (4, 4)).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    cut = png(tmp_path / "cut16.png", noise.astype(np.uint16) * 256, 2)
    cut.write_bytes(cut.read_bytes()[:1500])
    for name, reason in (
        ("none.png", "no such file"),
        ("cut.png", "truncated"),
        ("cut16.png", "truncated"),
        ("text.png", "not a readable image"),
        ("cmyk.jpg", "CMYK: .*save it as RGB"),
        ("float.tif", "mode F of a TIFF file"),
        ("wide.tif", "mode I;16 of a TIFF file"),
        ("two.gif", "2 frames"),
    ):
        with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
            read_picture(tmp_path / name)


def test_large_pictures_are_no_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert read_header(tmp_path / "x.png").width == 4
    assert read_picture(tmp_path / "x.png").width == 4
    assert Image.MAX_IMAGE_PIXELS == 3


@pytest.mark.parametrize(
    ("name", "picture", "reason"),
    [
        ("x.bmp", Picture(np.zeros((2, 2, 3), np.uint8)), "written as .png, .jpg"),
        ("x.jpg", Picture(np.zeros((2, 2, 3), np.uint16)), "JPEG has no 16-bit pixels"),
        ("x.jpg", Picture(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)), "JPEG has no transparency"),
        ("x.jpg", Picture(np.zeros((1, 65501, 1), np.uint8)), "65,500"),
    ],
)
def test_writing_refuses_what_a_file_cannot_hold(tmp_path: Path, name: str, picture: Picture, reason: str) -> None:
    with pytest.raises(ImageError, match=f"{name}: .*{reason}"):
        write_picture(tmp_path / name, picture)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ metadata

CAMERA = {
    0x010F: "Maker",
    0x0100: 30,
    0x0112: 6,
    0x011A: 300.0,
    0x011B: 150.0,
    0x0128: 2,
    0x0132: "2020:01:02 03:04:05",
}
SHOT = {
    0x829A: 0.008,
    0x9003: "2020:01:02 03:04:05",
    0x9214: (4, 5),
    0x927C: b"offsets" * 9,
    0xA002: 30,
    0xA003: 20,
    0xA20E: 1000.5,
    0xA20F: 2000.25,
}
PLACE = {1: "N", 2: (50.0, 30.0, 1.5)}


def photograph(path: Path, **tags: object) -> Path:
    exif = Image.Exif()
    for tag, value in CAMERA.items():
        exif[tag] = value
    exif[0x8769], exif[0x8825] = SHOT, PLACE
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path, exif=exif, dpi=(72, 144), **tags)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("wide", [False, True])
def test_what_stays_true_is_kept(tmp_path: Path, suffix: str, wide: bool) -> None:
    """A picture that is turned and enlarged: date, camera and place as they were, sizes corrected, the rest gone."""
    given = read_picture(photograph(tmp_path / f"in{suffix}"))
    assert given.pixels.shape == (30, 20, 3)
    made = Upscaler(low_resolution(residual=0.0)).picture(given)
    if wide:
        made = dataclasses.replace(made, pixels=made.pixels.astype(np.uint16) * 257)
    write_picture(tmp_path / ("out.png" if wide else f"out{suffix}"), made)
    with Image.open(tmp_path / ("out.png" if wide else f"out{suffix}")) as opened:
        opened.load()
        found = opened.getexif()
        dpi = opened.info["dpi"]
    assert opened.size == (40, 60)
    assert dpi == pytest.approx((288, 144), abs=0.02)
    kept = {0x010F: "Maker", 0x0132: "2020:01:02 03:04:05", 0x0128: 2, 0x011A: 300.0, 0x011B: 600.0}
    assert {k: v for k, v in found.items() if k not in (0x8769, 0x8825)} == kept
    shot = {0x829A: 0.008, 0x9003: "2020:01:02 03:04:05", 0xA002: 40, 0xA003: 60, 0xA20E: 4000.5, 0xA20F: 2001.0}
    assert found.get_ifd(0x8769) == shot
    assert found.get_ifd(0x8825) == PLACE
    assert read_picture(tmp_path / ("out.png" if wide else f"out{suffix}")).pixels.shape == (60, 40, 3), (
        "not turned again"
    )


def test_a_thumbnail_is_left_out(tmp_path: Path) -> None:
    """Hand-made EXIF data: IFD0 with a maker, IFD1 with a thumbnail."""
    thumbnail = b"\xff\xd8small\xff\xd9"
    first = struct.pack("<HHHI4sI", 1, 0x010F, 2, 4, b"abc\0", 26)
    second = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + first + second + thumbnail
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert thumbnail in (tmp_path / "a.jpg").read_bytes()
    found = read_picture(tmp_path / "a.jpg")
    assert found.exif is not None
    assert b"abc\0" in found.exif
    assert thumbnail not in found.exif


@pytest.mark.filterwarnings("error")
def test_damaged_metadata_leaves_the_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = photograph(tmp_path / "a.jpg").read_bytes()
    start = whole.index(b"Exif\0\0") + 6
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(start, start + 200, 4):
            data[at] = rng.integers(256)
        (tmp_path / "b.jpg").write_bytes(data)
        found = read_picture(tmp_path / "b.jpg")
        assert sorted(found.pixels.shape) == [3, 20, 30]
        write_picture(tmp_path / "c.png", found)
        write_picture(tmp_path / "c.jpg", Upscaler(low_resolution(residual=0.0)).picture(found))


def test_metadata_that_a_jpeg_cannot_hold(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "long " * 20_000
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=exif)
    found = read_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png", found)
    assert read_picture(tmp_path / "b.png").exif == found.exif
    with pytest.raises(
        ImageError, match=r"b\.jpg: its EXIF data is too long for a JPEG; give a name that ends in \.png"
    ):
        write_picture(tmp_path / "b.jpg", found)
