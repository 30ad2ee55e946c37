"""Pictures through a super-resolution network: tiles are the whole, colours are what they should be, memory stays bounded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lowbit
import lowbit.tiles
from lowbit import upscale
from lowbit.bench import superres
from lowbit.graph import Graph
from lowbit.interpreter import run
from lowbit.pictures import (
    Header,
    Picture,
    from_float,
    imresize,
    luma,
    read_picture,
    rgb_to_ycbcr,
    to_float,
    ycbcr_to_rgb,
)
from lowbit.runtime import load
from lowbit.upscale import UpscaleError, Upscaler
from networks import classifier

BUILDERS = (superres.low_resolution, superres.vdsr)


def network(seed: int) -> Graph:
    """A random super-resolution network."""
    rng = np.random.default_rng(seed)
    build = BUILDERS[seed % 2]
    options = {
        "scale": int(rng.integers(2, 5)),
        "channels": int(rng.choice([3, 8, 16, 33, 64])),
        "layers": int(rng.integers(0, 4)),
        "half": bool(rng.random() < 0.5),
        "residual": 1.0,
        "seed": seed,
    }
    if build is superres.low_resolution:
        options |= {
            "kernel": int(rng.choice([1, 3, 5])),
            "dilation": int(rng.integers(1, 3)),
            "bits": int(rng.choice([1, 2])),
        }
    return build(**options)


@pytest.mark.parametrize("seed", range(24))
def test_tiles_are_the_whole(seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    graph = network(seed)
    around = lowbit.tiles.reach(graph)
    least = max(around.top + around.bottom, around.left + around.right) + 1
    height, width = (int(n) for n in rng.integers(1, 90, 2))
    y = rng.random((height, width), np.float32)
    whole = load(graph.resized(height, width))(y[..., None])[..., 0]
    for tile in (least, least + 1, least + int(rng.integers(2, 40)), 200):
        larger = Upscaler(graph, tile=tile)
        got = larger(y)
        assert got.tobytes() == whole.tobytes(), f"seed {seed}, {height}x{width}, tile {tile}"
        sizes = {engine.input_shape for engine in larger._engines.values() if engine.input_shape[0] != 64}
        assert all(max(shape) <= max(tile, 1) for shape in sizes)


def test_tiles_are_what_the_interpreter_says() -> None:
    graph = superres.low_resolution(layers=2, residual=1.0)
    y = np.random.default_rng(0).random((37, 23), np.float32)
    want = run(graph.resized(37, 23), y[None, ..., None])[0, ..., 0]
    assert Upscaler(graph, tile=14)(y).tobytes() == want.tobytes()


@pytest.mark.skipif((upscale.os.cpu_count() or 1) < 2, reason="one core")
def test_threads_change_nothing() -> None:
    graph = superres.low_resolution(residual=1.0)
    y = np.random.default_rng(0).random((150, 90), np.float32)
    assert Upscaler(graph, threads=2, tile=100)(y).tobytes() == Upscaler(graph)(y).tobytes()


def test_wide_rows_are_right() -> None:
    """Rows of one channel are worked on in pieces of 960 pixels."""
    for scale in (2, 3, 4):
        graph = superres.low_resolution((3, 1001), scale=scale, channels=16, layers=1)
        x = np.random.default_rng(scale).random((1, 3, 1001, 1), np.float32)
        assert load(graph)(x).tobytes() == run(graph, x).tobytes()


def test_a_residual_of_zero_is_bicubic() -> None:
    graph = superres.low_resolution(residual=0.0)
    y = np.random.default_rng(0).random((31, 44), np.float32)
    np.testing.assert_allclose(Upscaler(graph, tile=20)(y), imresize(y, 2), atol=1e-6)


def test_the_row_of_kernels_can_be_chosen() -> None:
    assert Upscaler(superres.low_resolution(), tile=20, isa="scalar").isa == "scalar"
    assert Upscaler(superres.low_resolution()).isa == load(superres.low_resolution()).isa


def test_progress_counts_tiles() -> None:
    seen = []
    Upscaler(superres.low_resolution(), tile=20)(np.zeros((30, 50), np.float32), lambda *at: seen.append(at))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 4


# --------------------------------------------------------------------------------------------- pictures


def picture(channels: int = 3, bits: int = 8, alpha: bool = False, size: tuple[int, int] = (40, 29)) -> Picture:
    """Smooth and bright enough that nothing is clipped."""
    rng = np.random.default_rng(channels)
    coarse = rng.random((size[0] // 8 + 2, size[1] // 8 + 2, channels + alpha)).astype(np.float32)
    smooth = imresize(coarse, 8)[: size[0], : size[1]] * 0.6 + 0.2
    dtype = np.uint8 if bits == 8 else np.uint16
    pixels = from_float(smooth, dtype)
    return Picture(np.ascontiguousarray(pixels[..., :channels]), pixels[..., -1].copy() if alpha else None, b"icc")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_colours(bits: int, scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y is the network's, Cb, Cr and alpha are imresize's; bands of any height make no difference."""
    given = picture(3, bits, alpha=True)
    graph = superres.low_resolution(scale=scale, residual=0.02)
    larger = Upscaler(graph, tile=24)
    got = larger.picture(given)
    assert got.pixels.dtype == given.pixels.dtype
    assert got.icc == b"icc"
    ycbcr = imresize(rgb_to_ycbcr(to_float(given.pixels)), scale)
    ycbcr[..., 0] = larger(luma(to_float(given.pixels)))
    want = from_float(ycbcr_to_rgb(ycbcr), given.pixels.dtype)
    assert np.abs(got.pixels.astype(int) - want).max() <= 1  # the bicubic sums differ in their last bit
    assert (got.pixels != want).mean() < (0.01 if bits == 8 else 0.2)
    assert (
        np.abs(got.alpha.astype(int) - from_float(imresize(to_float(given.alpha), scale), given.pixels.dtype)).max()
        <= 1
    )
    for chunk in (1, 5000):
        monkeypatch.setattr(upscale, "_CHUNK", chunk)
        again = Upscaler(graph, tile=31).picture(given)
        assert np.array_equal(again.pixels, got.pixels)
        assert np.array_equal(again.alpha, got.alpha)


@pytest.mark.parametrize("bits", [8, 16])
def test_gray_stays_gray(bits: int) -> None:
    given = picture(1, bits)
    graph = superres.low_resolution(residual=0.02)
    got = Upscaler(graph).picture(given)
    assert got.pixels.shape == (80, 58, 1)
    y = Upscaler(graph)(given.luma())
    np.testing.assert_allclose(
        to_float(got.pixels)[..., 0], (y * 255 - 16) / 219, atol=0.51 / np.iinfo(got.pixels.dtype).max + 2e-6
    )
    three = Upscaler(graph).picture(Picture(np.repeat(given.pixels, 3, axis=2)))
    assert np.abs(three.pixels.astype(int) - got.pixels).max() <= 1


def test_white_and_black_are_clipped() -> None:
    checks = (np.indices((20, 20)).sum(axis=0) % 7 < 3).astype(np.uint8)[..., None].repeat(3, axis=2) * 255
    got = Upscaler(superres.low_resolution(residual=0.5)).picture(Picture(checks))
    assert {0, 255} <= set(got.pixels.ravel().tolist())


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: Graph(g.nodes, g.tensors, {**g.meta, "task": "classify"}), "its task is 'classify'"),
        (
            lambda g: Graph(g.nodes, g.tensors, {**g.meta, "superres": {"scale": 3}}),
            "says that it enlarges by 3, but it does by 2",
        ),
        (lambda g: Graph(g.nodes, g.tensors, {"task": "superres"}), "says that it enlarges by None"),
    ],
)
def test_other_networks_are_refused(change, message: str) -> None:
    with pytest.raises(UpscaleError, match=f"the graph: .*{message}"):
        Upscaler(change(superres.low_resolution()))


def test_a_classification_file_is_refused(tmp_path: Path) -> None:
    lowbit.save(classifier(), tmp_path / "c.lowbit")
    with pytest.raises(
        UpscaleError, match="c.lowbit: its task is 'classify'; upscale needs a network of the task 'superres'"
    ):
        Upscaler(tmp_path / "c.lowbit")


def test_a_network_that_cannot_be_cut_is_refused() -> None:
    graph = classifier()
    with pytest.raises(UpscaleError, match="so the image can't be cut into tiles"):
        Upscaler(Graph(graph.nodes, graph.tensors, {"task": "superres", "superres": {"scale": 2}}))


def test_small_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="--tile 8: a tile must be larger .* 9 pixels or more"):
        Upscaler(superres.low_resolution(), tile=8)


@pytest.mark.parametrize(
    "y", [np.zeros((4, 4)), np.zeros((4, 4, 1), np.float32), np.zeros((0, 4), np.float32), [[1.0]]]
)
def test_other_arrays_are_refused(y: object) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \(H, W\), got"):
        Upscaler(superres.low_resolution())(y)  # type: ignore[arg-type]


def test_pictures_too_large_for_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = Upscaler(superres.low_resolution())
    photo = Header(6000, 4000, 3, False, 8)
    need = larger.memory(photo)
    assert 0.5e9 < need < 1.4e9
    monkeypatch.setattr(upscale, "available_memory", lambda: need)
    larger.refuse_too_large(photo, "photo.jpg")
    monkeypatch.setattr(upscale, "available_memory", lambda: 300_000_000)
    with pytest.raises(
        UpscaleError, match=r"photo.jpg: 6000 x 4000 pixels enlarged by 2 need \d\.\d GB of memory, 0.3 GB are free"
    ):
        larger.refuse_too_large(photo, "photo.jpg")


def test_pictures_wider_than_maps_are_refused() -> None:
    larger = Upscaler(superres.low_resolution())
    larger.refuse_too_large(Header(65536, 1, 3, False, 8), "wide.png")
    with pytest.raises(UpscaleError, match=r"wide.png: is 65537 pixels wide; 65536 are the most"):
        larger.refuse_too_large(Header(65537, 1, 3, False, 8), "wide.png")
    wide = Picture(np.random.default_rng(0).integers(0, 256, (1, 65536, 3), np.uint8))
    assert larger.picture(wide).pixels.shape == (2, 131072, 3)


def test_available_memory_knows_the_process_own_limit() -> None:
    code = (
        "import resource\nfrom lowbit.machine import available_memory\nbefore = available_memory()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "assert before > 0\nassert 0 < available_memory() <= 8 << 30\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells it there")
def test_memory_is_what_it_says(tmp_path: Path) -> None:
    """A picture read, enlarged and written in a process of its own: the largest it ever was is at most what was said before."""
    lowbit.save(superres.low_resolution(channels=16, layers=1), tmp_path / "x2.lowbit")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    Image.fromarray(pixels).resize((2600, 2000)).save(tmp_path / "in.png")
    code = f"""
from pathlib import Path
from lowbit.pictures import read_header, read_picture, write_picture
from lowbit.upscale import Upscaler
folder = Path({str(tmp_path)!r})
larger = Upscaler(folder / "x2.lowbit")
small = folder / "small.png"
import numpy as np
from lowbit.pictures import Picture
write_picture(small, larger.picture(Picture(np.zeros((8, 8, 3), np.uint8))))  # everything is imported
read_picture(small)

def largest():  # ru_maxrss remembers the process that started this one
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

before = largest()
write_picture(folder / "out.png", larger.picture(read_picture(folder / "in.png")))
print(largest() - before, larger.memory(read_header(folder / "in.png")))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    taken, said = map(int, done.stdout.split())
    assert taken <= said, (taken, said)
    assert taken > said / 3, (taken, said)  # no idle promise


def test_reading_and_writing(tmp_path: Path) -> None:
    """Sixteen bits and transparency, from file to file."""
    from lowbit.pictures import write_picture

    write_picture(tmp_path / "in.png", Picture(picture(3, 16, alpha=True).pixels, picture(3, 16, alpha=True).alpha))
    got = Upscaler(superres.low_resolution()).picture(read_picture(tmp_path / "in.png"))
    write_picture(tmp_path / "out.png", got)
    again = read_picture(tmp_path / "out.png")
    assert np.array_equal(again.pixels, got.pixels)
    assert np.array_equal(again.alpha, got.alpha)
    assert again.pixels.dtype == np.uint16
