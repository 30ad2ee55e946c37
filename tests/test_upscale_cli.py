"""`lowbit upscale`: pictures, folders, the page side by side, and everything that can be wrong."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lowbit
from lowbit import sidebyside, upscale
from lowbit.bench import superres
from lowbit.pictures import Picture, imresize, read_picture, read_texts, to_float, write_picture
from lowbit.upscale import Job, Upscaler
from networks import classifier
from test_cli import Call, call, image  # noqa: F401


@pytest.fixture
def x2(tmp_path: Path) -> Path:
    lowbit.save(superres.low_resolution(residual=0.02), tmp_path / "x2.lowbit")
    return tmp_path / "x2.lowbit"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    place.mkdir()
    for name, size in (("a.png", (30, 20)), ("b.jpg", (20, 30)), ("c.bmp", (9, 5))):
        image(place / name, size=size)
    return place


def test_a_picture(call: Call, x2: Path, tmp_path: Path) -> None:  # noqa: F811
    given = image(tmp_path / "a.png", size=(30, 20))
    status, out, _ = call("upscale", x2, given, tmp_path / "out.png")
    assert status == 0
    assert f"{tmp_path / 'out.png'}: 60 x 40" in out
    want = Upscaler(x2).picture(read_picture(given))
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, want.pixels)
    assert call("upscale", x2, given, tmp_path / "small.png", "--tile", 20, "--isa", "scalar")[0] == 0
    assert (tmp_path / "small.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert call("upscale", x2, given, tmp_path / "out.jpg")[0] == 0
    (tmp_path / "into").mkdir()
    assert call("upscale", x2, given, tmp_path / "into")[0] == 0
    assert (tmp_path / "into/a.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_nothing_is_overwritten_without_force(call: Call, x2: Path, tmp_path: Path) -> None:  # noqa: F811
    given = image(tmp_path / "a.png")
    (tmp_path / "out.png").write_text("mine")
    status, _, err = call("upscale", x2, given, tmp_path / "out.png")
    assert status == 2
    assert "is there already" in err
    assert (tmp_path / "out.png").read_text() == "mine"
    assert call("upscale", x2, given, tmp_path / "out.png", "--force")[0] == 0
    assert read_picture(tmp_path / "out.png").width == 40


def test_a_folder_and_going_on_with_it(call: Call, x2: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    status, out, err = call("upscale", x2, folder, tmp_path / "new/out")
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "new/out").iterdir()) == ["a.png", "b.png", "c.png"]
    assert out.count(" x ") == 3
    first = {p: p.read_bytes() for p in (tmp_path / "new/out").iterdir()}
    (tmp_path / "new/out/b.png").unlink()
    (tmp_path / "new/out/a.png").write_text("kept")
    status, out, err = call("upscale", x2, folder, tmp_path / "new/out")
    assert status == 0
    assert "2 of 3 are there already" in err
    assert out.count(" x ") == 1
    assert (tmp_path / "new/out/a.png").read_text() == "kept"
    assert call("upscale", x2, folder, tmp_path / "new/out", "--force")[0] == 0
    assert {p: p.read_bytes() for p in (tmp_path / "new/out").iterdir()} == first


def test_a_folder_is_of_one_network(call: Call, x2: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    other = tmp_path / "other.lowbit"
    lowbit.save(superres.low_resolution(residual=0.03), other)
    out = tmp_path / "out"
    assert call("upscale", x2, folder, out)[0] == 0
    assert read_texts(out / "a.png") == {"lowbit network": hashlib.sha256(x2.read_bytes()).hexdigest()}
    first = {p: p.read_bytes() for p in out.iterdir()}
    (out / "c.png").unlink()
    status, _, err = call("upscale", other, folder, out)
    assert (status, err.count("\n")) == (2, 1)
    assert "out/a.png: and 1 more were made by another network; give OUT another name, or make all again with" in err
    assert not (out / "c.png").exists()
    assert call("upscale", other, folder, out, "--force")[0] == 0
    second = {p: p.read_bytes() for p in out.iterdir()}
    assert not set(second.values()) & set(first.values())
    (out / "b.png").write_bytes(first[out / "b.png"])  # as an interrupted --force leaves it
    assert "out/b.png: was made by another network" in call("upscale", other, folder, out)[2]
    x2.rename(tmp_path / "renamed.lowbit")
    status, _, err = call("upscale", tmp_path / "renamed.lowbit", folder / "b.jpg", out, "--compare", out / "p.html")
    assert (status, err) == (0, "1 of 1 are there already; --force makes them again\n")
    assert call("upscale", other, folder / "b.jpg", out, "--compare", out / "p.html")[0] == 2
    write_picture(out / "b.png", read_picture(out / "b.png"))  # any other program would leave the text out, too
    status, _, err = call("upscale", other, folder, out)
    assert status == 0
    assert "3 of 3 are there already (1 of them say not by which network)" in err


def test_a_kill_leaves_no_half_picture(x2: Path, folder: Path, tmp_path: Path) -> None:
    """Killed while it writes the second picture: the first is there, whole; the second isn't; the same command goes on."""
    out = tmp_path / "out"
    code = (
        "import os, sys\nfrom lowbit import files\nfrom lowbit.__main__ import main\nwhole = files._sync_directory\n"
        "written = []\ndef temporary(target, real=files._temporary):\n"
        "    written.append(target)\n    made = real(target)\n    if len(written) == 2:\n"
        "        os.write(made[0], b'half')\n        os._exit(9)\n    return made\n"
        f"files._temporary = temporary\nsys.argv = ['lowbit', 'upscale', {str(x2)!r}, {str(folder)!r}, {str(out)!r}]\nmain()"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert [p.name for p in out.glob("*.png")] == ["a.png"]
    arguments = [sys.executable, "-m", "lowbit", "upscale", str(x2), str(folder), str(out)]
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "c.png"]


def test_bad_pictures_of_a_folder_are_named_and_left_out(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    Image.new("CMYK", (4, 4)).save(folder / "inks.jpg")
    write_picture(folder / "tiny.png", Picture(np.zeros((1, 1, 1), np.uint16)))
    Image.new("1", (8, 8), 1).save(folder / "bits.png")
    status, _, err = call("upscale", x2, folder, tmp_path / "out")
    assert status == 1
    for name in ("cut.png", "text.jpg", "inks.jpg"):
        assert f"left out: {folder / name}: " in err
    assert "CMYK" in err
    assert "3 of 8 pictures could not be enlarged" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "bits.png", "c.png", "tiny.png"]
    assert read_picture(tmp_path / "out/tiny.png").pixels.dtype == np.uint16
    status, _, err = call("upscale", x2, folder, tmp_path / "out")  # and again, with nothing left to do but these
    assert status == 1
    assert "5 of 8 are there already" in err


def test_pictures_too_large_for_memory(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_picture(folder / "large.png", Picture(np.zeros((1500, 1500, 3), np.uint8)))
    limit = (Upscaler(x2).memory(upscale.read_header(folder / "large.png"))) - 1
    monkeypatch.setattr(upscale, "available_memory", lambda: limit)
    status, _, err = call("upscale", x2, folder, tmp_path / "out")
    assert status == 1
    assert "large.png: 1500 x 1500 pixels enlarged by 2 need 0.2 GB of memory, 0.2 GB are free" in err
    assert len(list((tmp_path / "out").iterdir())) == 3
    status, _, err = call("upscale", x2, folder / "large.png", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)


def test_memory_that_runs_out_costs_one_picture(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(path: Path) -> Picture:
        if path.name == "b.jpg":
            raise MemoryError
        return read_picture(path)

    monkeypatch.setattr(upscale, "read_picture", read)
    status, out, err = call("upscale", x2, folder, tmp_path / "out")
    assert status == 1
    assert f"left out: {folder / 'b.jpg'}: ran out of memory; cut the picture into parts" in err
    assert out.count(" x ") == 2
    status, _, err = call("upscale", x2, folder / "b.jpg", tmp_path / "b.png")
    assert (status, err.count("\n")) == (2, 1)


def test_a_folder_called_like_a_picture_is_in_the_way(call: Call, x2: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "out/b.png").mkdir(parents=True)
    status, out, err = call("upscale", x2, folder, tmp_path / "out")
    assert status == 1
    assert f"left out: {folder / 'b.jpg'}: {tmp_path / 'out/b.png'} is a folder; move it away" in err
    assert "there already" not in err
    assert out.count(" x ") == 2


def test_names_of_another_encoding(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    (folder / "a.png").rename(folder / os.fsdecode(b"\xff.png"))
    (folder / "b.jpg").rename(folder / "$\\frac$.jpg")  # would be a formula, and a wrong one
    status, out, err = call("upscale", x2, folder, tmp_path / "out", "--compare", tmp_path / "page.html")
    assert status == 0, err
    assert "\\udcff.png: 60 x 40" in out
    text = (tmp_path / "page.html").read_text()
    assert "?.png" in text
    assert "$\\frac$.jpg" in text
    assert (tmp_path / "page.png").is_file()


@pytest.mark.parametrize("whole", [True, False])
def test_an_interruption_says_what_is_left(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upscale, "read_picture", stop)
    (tmp_path / "out").mkdir()
    status, _, err = call("upscale", x2, folder if whole else folder / "a.png", tmp_path / "out")
    left = "the same command goes on" if whole else f"{tmp_path / 'out/a.png'} was not written"
    assert (status, err) == (130, f"interrupted; {left}\n")


ERRORS = {
    "no file": ("none.lowbit in/a.png out.png", "none.lowbit: no such file"),
    "no lowbit file": ("f.txt in/a.png out.png", "f.txt: not a lowbit file"),
    "classes": ("classes.lowbit in/a.png out.png", "classes.lowbit: its task is 'classify'; upscale needs a network of the task 'superres'"),
    "no picture": ("x2.lowbit none.png out.png", "none.png: no such file or folder"),
    "bad picture": ("x2.lowbit f.txt out.png", "f.txt: not a readable image"),
    "empty folder": ("x2.lowbit empty out.png", "empty: no images in this folder"),
    "suffix": ("x2.lowbit in/a.png out.tif", "out.tif: pictures are written as .png"),
    "itself": ("x2.lowbit in/a.png in/a.png --force", "a.png: is the picture itself"),
    "its own folder": ("x2.lowbit in in", "a.png: is the picture itself"),
    "a folder into a file": ("x2.lowbit in f.txt", "f.txt: is a file"),
    "no such folder": ("x2.lowbit in/a.png none/out.png", "none: no such folder"),
    "tile": ("x2.lowbit in/a.png out.png --tile 8", "--tile 8: a tile must be larger .* 9 pixels or more"),
    "threads": ("x2.lowbit in/a.png out.png --threads 10000", "threads must be 1"),
    "isa": ("x2.lowbit in/a.png out.png --isa sse", "unknown isa 'sse'"),
    "float alone": ("x2.lowbit in/a.png out.png --float x2.lowbit", "--float FILE is shown on a page: add --compare PAGE"),
    "page": ("x2.lowbit in/a.png out.png --compare page.png", "page.png: the page's name must end in .html"),
    "page in the way": ("x2.lowbit in/a.png out.png --compare out.html", "would take the place of .*out.png"),
    "page is a folder": ("x2.lowbit in out --compare empty.html", "empty.html: Is a directory"),
    "page below a file": ("x2.lowbit in out --compare f.txt/new/p.html", "f.txt: Not a directory"),
    "other scale, new folders": ("x2.lowbit in out/a --compare new/p.html --float x3.lowbit", "enlarge by 2 and 3"),
    "other scale": ("x2.lowbit in/a.png out.png --compare p.html --float x3.lowbit", "enlarge by 2 and 3"),
}  # fmt: skip
"""Arguments, and what is said of them."""


@pytest.mark.usefixtures("x2", "folder")
@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_clear_line(
    call: Call,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.html").mkdir()
    Path("f.txt").write_text("x")
    lowbit.save(classifier(), "classes.lowbit")
    lowbit.save(superres.low_resolution(scale=3), "x3.lowbit")
    arguments, message = ERRORS[what]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call("upscale", *arguments.split())
    assert (status, out) == (2, "")
    assert re.search(message, " ".join(err.replace("│", " ").split())), err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_pictures_of_one_name(call: Call, x2: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    image(folder / "a.jpg")
    status, _, err = call("upscale", x2, folder, tmp_path / "out")
    assert status == 2
    assert "a.jpg and" in err
    assert "would both become" in err
    assert "rename one of them" in err
    assert not (tmp_path / "out").exists()


def test_jpeg_for_what_it_cannot_hold(call: Call, x2: Path, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGBA", (8, 8)).save(tmp_path / "a.png")
    status, _, err = call("upscale", x2, tmp_path / "a.png", tmp_path / "out.jpg")
    assert (status, err.count("\n")) == (2, 1)
    assert "JPEG has no transparency" in err
    write_picture(tmp_path / "wide.png", Picture(np.zeros((1, 32751, 1), np.uint8)))
    status, _, err = call("upscale", x2, tmp_path / "wide.png", tmp_path / "out.jpg")
    assert (status, err.count("\n")) == (2, 1)
    assert "JPEG ends at 65,500 pixels a side" in err


def test_no_permission_to_write(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "locked"
    place.mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != place or mode != os.W_OK
    )  # tests may run as root, who may write anywhere
    for source, target in ((folder / "a.png", place / "out.png"), (folder, place)):
        status, _, err = call("upscale", x2, source, target)
        assert (status, err) == (2, f"error: {place}: Permission denied\n")
    status, _, err = call("upscale", x2, folder, tmp_path / "out", "--compare", place / "page.html")
    assert (status, err) == (2, f"error: {place}: Permission denied\n")


def test_a_full_disk_is_named(
    call: Call,  # noqa: F811
    x2: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lowbit import files

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    status, _, err = call("upscale", x2, folder, tmp_path / "out")
    assert (status, err) == (2, f"error: {tmp_path / 'out/a.png'}: No space left on device\n")
    assert not list((tmp_path / "out").iterdir())


def test_a_superres_file_given_to_predict(call: Call, x2: Path, folder: Path) -> None:  # noqa: F811
    status, _, err = call("predict", x2, folder)
    assert status == 2
    assert f"{x2}: its task is 'superres'; predict names classes; enlarge pictures with lowbit upscale" in err


# --------------------------------------------------------------------------------------------- side by side


def test_the_page(call: Call, x2: Path, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    lowbit.save(superres.low_resolution(residual=0.0), tmp_path / "zero.lowbit")
    (folder / "bad.png").write_text("no picture")
    page = tmp_path / "pages/page.html"
    status, out, _ = call(
        "upscale", x2, folder, tmp_path / "out", "--compare", page, "--float", tmp_path / "zero.lowbit"
    )
    assert status == 1
    assert f"wrote {page}" in out
    html = page.read_text()
    for word in ("nearest", "bicubic", "x2.lowbit", "zero.lowbit", "a.png", "b.jpg", "c.bmp", "30 x 20 to 60 x 40"):
        assert word in html
    assert "bad.png" not in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert html.count("data:image/png;base64,") == 3 * (1 + 4)
    with Image.open(page.with_suffix(".png")) as picture:
        assert picture.size[0] > 1000
    # pictures that were there already are shown too
    assert call("upscale", x2, folder, tmp_path / "out", "--compare", page)[0] == 1
    assert page.read_text().count("data:image/png;base64,") == 3 * (1 + 3)


def test_a_page_of_nothing_is_not_written(call: Call, x2: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_text("no picture")
    status, _, err = call("upscale", x2, tmp_path / "in", tmp_path / "out", "--compare", tmp_path / "new/page.html")
    assert status == 1
    assert "page.html: not written, there is no enlarged picture to show" in err
    assert err.endswith("2 of 2 pictures could not be enlarged\n")
    assert not (tmp_path / "new").exists()


def test_crops_are_what_they_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.full((160, 200, 3), 90, np.uint8)
    pixels[60:90, 100:140] = rng.integers(0, 256, (30, 40, 3))  # the only detail
    given, zero = Picture(pixels), Upscaler(superres.low_resolution(residual=0.0))
    other = Upscaler(superres.low_resolution(residual=0.05, layers=3))
    write_picture(tmp_path / "a.png", given)
    write_picture(tmp_path / "b.png", zero.picture(given))
    (shown,) = [sidebyside._shown(Job(tmp_path / "a.png", tmp_path / "b.png"), zero, other)]
    assert len(shown.crops) == 3
    places = [(c.top, c.left) for c in shown.crops]
    assert (48, 96) in places
    assert places == sorted(places)
    whole = other.picture(given).pixels
    bicubic = imresize(to_float(pixels), 2)
    for c in shown.crops:
        nearest, smooth, ours, beside = c.variants
        at = slice(2 * c.top, 2 * (c.top + c.height)), slice(2 * c.left, 2 * (c.left + c.width))
        assert np.array_equal(nearest, pixels.repeat(2, 0).repeat(2, 1)[at])
        assert np.abs(smooth / 255 - bicubic[at].clip(0, 1)).max() < 0.003
        assert np.abs(ours.astype(int) - smooth).max() <= 1  # a residual of zero
        assert np.array_equal(beside, whole[at])  # computed from the crop's surroundings alone


def test_small_pictures_are_one_crop() -> None:
    assert sidebyside.places(Picture(np.zeros((1, 1, 1), np.uint8))) == [(0, 0)]
    assert sidebyside.places(Picture(np.zeros((30, 60, 3), np.uint8))) == [(0, 0)]


def test_a_page_of_other_pictures_is_refused(tmp_path: Path) -> None:
    larger = Upscaler(superres.low_resolution())
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    with pytest.raises(upscale.UpscaleError, match="b.png: is not .*a.png enlarged by 2; make it again with --force"):
        sidebyside.write_page(tmp_path / "p.html", [Job(tmp_path / "a.png", tmp_path / "b.png")], larger, "x2.lowbit")
    with pytest.raises(upscale.UpscaleError, match="no enlarged picture to show"):
        sidebyside.write_page(tmp_path / "p.html", [], larger, "x2.lowbit")
