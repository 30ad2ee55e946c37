"""Images too many for memory: the same batches for every number of workers, every image where it belongs, no silent loss."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

import lowbit
from lowbit.predict import ImageError, predict, read_image
from lowbit.train.data import DATASETS, Augment, DataError, bench
from lowbit.train.data import shards as shards_module
from lowbit.train.data.decode import BrokenImageError, Geometry, decode, random_box
from lowbit.train.data.imagenet import imagenet_folder, imagenet_shards, read_folder
from lowbit.train.data.shards import Index, Shard, ShardRecords, main, open_index, write_shards
from lowbit.train.data.streaming import Encoded, Records, StreamingData, default_workers
from lowbit.train.evaluation import evaluate_file, evaluate_run
from lowbit.train.export import export_run
from lowbit.train.freeze import to_numpy
from lowbit.train.recipe import RecipeError, load_recipe, parse_recipe
from lowbit.train.rundir import InputSpec, read_metrics, read_run
from lowbit.train.trainer import load_data, train

PER_CLASS, TESTS = 20, 5
CLASSES = ("ant", "bee", "cow")
COUNT = PER_CLASS * len(CLASSES)
SMALL = {"size": 12, "resize": 16, "validation_images": 9}
AUGMENT = Augment(flip=True, resized_crop=(0.1, 1.0))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def picture(number: int) -> Image.Image:
    """Red tells the number, whatever is cut out and resized; green and blue tell where it was cut out."""
    across, down = np.meshgrid(np.arange(40), np.arange(30))
    pixels = np.stack([np.full((30, 40), number), 6 * across, 8 * down], 2)
    return Image.fromarray(pixels.astype(np.uint8))


def write_tree(root: Path) -> Path:
    """Image n of the training set has red n, of the test set 100 + n. PNG, so that pixels come back as they were."""
    for part, count, first in (("train", PER_CLASS, 0), ("val", TESTS, 100)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture(first + label * count + i).save(root / part / name / f"{name}_{i:02}.png")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tree):
    """Nine shards of 7, the last of 4."""
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards(tree, out, samples=7)
    return out


@pytest.fixture
def own_shards(tmp_path, shards):
    return Path(shutil.copytree(shards, tmp_path / "own"))


@pytest.fixture(params=["folder", "shards"])
def data(request, tree, shards):
    return imagenet_folder(tree, **SMALL) if request.param == "folder" else imagenet_shards(shards, **SMALL, shuffle=15)


def reds(x: torch.Tensor) -> list[int]:
    assert x.dtype == torch.uint8
    assert torch.equal(x[:, 0].amax((1, 2)), x[:, 0].amin((1, 2)))
    return x[:, 0, 0, 0].tolist()


def seen(pairs) -> list[int]:
    """Numbers of all images; their labels must fit."""
    numbers = []
    for x, y in pairs:
        found = reds(x)
        per_class = [n // PER_CLASS if n < 100 else (n - 100) // TESTS for n in found]
        assert y.tolist() == per_class
        assert y.dtype == torch.int64
        numbers += found
    return numbers


# --- what is read


def test_every_image_once_in_one_part(data):
    assert data.classes == CLASSES
    assert data.shape == (3, 12, 12)
    assert [data.count(p) for p in ("train", "full", "val", "test")] == [COUNT - 9, COUNT, 9, 3 * TESTS]
    val, test = seen(data.evaluation("val", 4, workers=0)), seen(data.evaluation("test", 4, workers=0))
    train = seen(data.evaluation("train", 4, workers=0))
    assert sorted(train + val) == list(range(COUNT)), (
        "of 60 images 9 are held out, and in training there are the others"
    )
    assert sorted(test) == [100 + i for i in range(3 * TESTS)]
    assert seen(data.evaluation("val", 4, workers=0)) == val
    assert sorted(seen(data.evaluation("full", 7, workers=0))) == list(range(COUNT))
    assert len({n // PER_CLASS for n in val[:6]}) > 1, "the first ones are not of one class"


def test_ranks_share_an_evaluation(data):
    shares = [seen(data.evaluation("test", 4, workers=0, rank=r, world_size=2)) for r in (0, 1)]
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert sorted(shares[0] + shares[1]) == [100 + i for i in range(3 * TESTS)]


def test_calibration_takes_training_images(data):
    held_out = set(seen(data.evaluation("val", 9, workers=0)))
    calibration = data.calibration(20, 8, workers=0)
    first = [reds(x) for x in calibration]
    assert [len(batch) for batch in first] == [8, 8, 4]
    assert first == [reds(x) for x in calibration]
    numbers = [n for batch in first for n in batch]
    assert len(set(numbers) - held_out) == 20
    assert {n // PER_CLASS for n in numbers} == {0, 1, 2}
    assert sum(len(x) for x in data.calibration(999, 8, workers=0)) == COUNT - 9


@pytest.mark.parametrize(
    ("count", "batch", "ranks"), [(51, 4, 1), (51, 4, 2), (51, 8, 3), (48, 8, 3), (47, 8, 3), (51, 25, 2), (51, 51, 1)]
)
@pytest.mark.parametrize("name", ["imagenet_folder", "imagenet_shards"])
def test_epochs_have_their_exact_size_on_every_rank(name, tree, shards, count, batch, ranks):
    root = tree if name == "imagenet_folder" else shards
    data = DATASETS.get(name)(root=root, **SMALL, train_images=count)
    alone = [reds(x) for x, _ in data.batches(batch, seed=3, workers=0)]
    assert len(alone) == count // batch
    together = []
    for rank in range(ranks):
        share = data.batches(batch, seed=3, workers=0, rank=rank, world_size=ranks)
        got = [reds(x) for x, _ in share]
        assert len(got) == len(share) == count // (batch * ranks)
        assert all(len(b) == batch for b in got)
        assert got == [alone[k * ranks + rank] for k in range(len(got))]
        together += [n for b in got for n in b]
    assert len(set(together)) == len(together)
    held_out = set(seen(data.evaluation("val", 9, workers=0)))
    assert not held_out & set(together)


def test_workers_change_nothing(data):
    def epoch(workers: int, number: int, **share) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batches = data.batches(4, seed=5, augment=AUGMENT, workers=workers, **share)
        batches.set_epoch(number)
        return list(batches)

    def same(a, b) -> bool:
        return len(a) == len(b) and all(
            torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True)
        )

    one = epoch(0, 1)
    assert len(one) == 51 // 4
    assert same(one, epoch(1, 1))
    assert same(one, epoch(3, 1))
    assert not same(one, epoch(0, 2))
    assert same(epoch(0, 1, rank=1, world_size=2), epoch(2, 1, rank=1, world_size=2))
    assert seen(data.evaluation("val", 2, workers=0)) == seen(data.evaluation("val", 2, workers=3))


def test_an_image_is_augmented_by_seed_epoch_and_number_alone(data):
    def by_number(seed: int, epoch: int, batch: int, **share) -> dict[int, torch.Tensor]:
        batches = data.batches(batch, seed=seed, augment=AUGMENT, workers=0, **share)
        batches.set_epoch(epoch)
        torch.rand(2)  # somebody else's draws don't matter
        return {n: image for x, _ in batches for n, image in zip(reds(x), x, strict=True)}

    one, other = by_number(0, 1, 4), by_number(0, 1, 7, rank=1, world_size=2)
    assert len(other) == 21
    assert all(torch.equal(one[n], image) for n, image in other.items() if n in one)
    for different in (by_number(1, 1, 4), by_number(0, 2, 4)):
        both = one.keys() & different.keys()
        assert sum(torch.equal(one[n], different[n]) for n in both) < len(both) / 4


@pytest.mark.parametrize("workers", [0, 2])
def test_the_network_s_random_numbers_are_left_alone(data, workers):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(data.batches(8, augment=AUGMENT, workers=workers))
    assert torch.equal(torch.rand(3), expected)


def test_default_workers(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert default_workers() == min(cores, 16)
    assert default_workers(10**6) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert default_workers(10**6) == min(cores, 16), "the others are on other machines"


def test_refusals(tree, data):
    with pytest.raises(DataError, match=r"data\.augment\.crop .*use data\.augment\.resized_crop"):
        data.batches(4, augment=Augment(crop=2))
    with pytest.raises(ValueError, match="batch_size = 30 on each of 2 ranks, but there are 51 training images"):
        data.batches(30, rank=0, world_size=2)
    with pytest.raises(DataError, match=r"data\.size = 12, data\.resize = 8"):
        imagenet_folder(tree, size=12, resize=8)
    with pytest.raises(DataError, match="60 training images are too few to hold 10000 out"):
        imagenet_folder(tree)
    with pytest.raises(DataError, match="train_images = 52, but there are 51 to take"):
        imagenet_folder(tree, **SMALL, train_images=52)
    with pytest.raises(DataError, match="data.broken = 'sikp': stop or skip"):
        imagenet_folder(tree, **SMALL, broken="sikp")  # type: ignore[arg-type]
    assert imagenet_folder(tree, **SMALL, train_images=50).count("train") == 50


# --- folders


def test_folder_refusals(tmp_path):
    for root, message in (
        (None, r"needs data\.root"),
        (tmp_path / "gone", "no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            imagenet_folder(root)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="1 class folders, at least 2"):
        imagenet_folder(tmp_path)
    shutil.rmtree(tmp_path / "train")
    write_tree(tmp_path)
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(DataError, match=r"val/dog: the training set has no such class"):
        imagenet_folder(tmp_path)
    (tmp_path / "val" / "dog").rmdir()
    shutil.rmtree(tmp_path / "val" / "bee")
    with pytest.raises(DataError, match=r"val/bee: no such folder; .* must have the classes of the training set"):
        imagenet_folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    data = imagenet_folder(tmp_path, **SMALL)
    assert not data.has_test
    with pytest.raises(DataError, match="no test set; put images into .*val/<class>"):
        data.evaluation("test", 4)
    (tmp_path / "train" / "ant" / "ant_03.png").unlink()
    with pytest.raises(DataError, match=r"ant_03\.png: can't be read \(No such file"):
        list(data.evaluation("full", 8, workers=0))
    shutil.rmtree(tmp_path / "train" / "ant")
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(DataError, match="ant: no images"):
        imagenet_folder(tmp_path)


def test_a_flat_val_folder_with_a_list(tmp_path):
    write_tree(tmp_path)
    lines = ["ImageId,PredictionString"]
    for path in sorted((tmp_path / "val").rglob("*.png")):
        lines.append(f"{path.stem},{path.parent.name} 1 2 3 4")  # as Kaggle has it
        path.rename(tmp_path / "val" / path.name)
    for name in CLASSES:
        (tmp_path / "val" / name).rmdir()
    with pytest.raises(DataError, match=r"no class folders; data\.val_labels"):
        imagenet_folder(tmp_path)
    (tmp_path / "val.csv").write_text("\n".join(lines))
    data = imagenet_folder(tmp_path, **SMALL, val_labels="val.csv")
    assert sorted(seen(data.evaluation("test", 4, workers=0))) == [100 + i for i in range(3 * TESTS)]
    (tmp_path / "val.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"val\.csv: has no line for cow_04\.png"):
        imagenet_folder(tmp_path, **SMALL, val_labels="val.csv")
    (tmp_path / "val.csv").write_text("\n".join([*lines, "x.png dog"]))
    with pytest.raises(DataError, match=r"val\.csv: line 17 is no name and class: 'x\.png dog'"):
        imagenet_folder(tmp_path, **SMALL, val_labels="val.csv")
    with pytest.raises(DataError, match="none.csv: can't be read"):
        imagenet_folder(tmp_path, **SMALL, val_labels="none.csv")


def test_names_that_are_no_utf8(tmp_path):
    write_tree(tmp_path)
    odd = os.fsencode(tmp_path / "train" / "ant") + b"/\xff\xe9.png"
    os.rename(tmp_path / "train" / "ant" / "ant_00.png", odd)  # noqa: PTH104
    data = pickle.loads(pickle.dumps(imagenet_folder(tmp_path, **SMALL)))
    assert sorted(seen(data.evaluation("full", 8, workers=0))) == list(range(COUNT))


# --- one image


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(4)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize(("width", "height"), [(50, 37), (37, 50), (16, 16), (200, 13), (12, 90)])
def test_evaluation_resizes_the_shorter_side_and_cuts_the_centre(width, height):
    image = noise(width, height)
    shorter = min(width, height)
    w, h = (16, 16 * height // width) if width <= height else (16 * width // height, 16)
    assert min(w, h) == 16
    assert shorter in (width, height)
    left, top = round((w - 12) / 2), round((h - 12) / 2)
    expected = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 12, top + 12))
    found = decode(encoded(image, "PNG"), Geometry(12, 16))
    assert found.shape == (12, 12, 3)
    assert np.array_equal(found, np.asarray(expected))


def test_random_boxes():
    random = np.random.default_rng(0)
    boxes = [random_box(500, 375, (0.08, 1.0), (3 / 4, 4 / 3), random) for _ in range(2000)]
    areas, shapes = [], []
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 500
        assert 0 <= top < bottom <= 375
        areas.append((right - left) * (bottom - top) / (500 * 375))
        shapes.append((right - left) / (bottom - top))
    assert 0.079 < min(areas) < 0.1
    assert max(areas) > 0.9
    assert 0.74 < min(shapes) < 0.76
    assert 1.3 < max(shapes) < 1.35
    assert abs(np.mean(np.log(shapes))) < 0.05
    assert min(b[0] for b in boxes) == 0
    assert max(b[2] for b in boxes) == 500
    # no part of an allowed shape is so large: the largest that fits, from the centre
    assert random_box(1000, 10, (0.9, 1.0), (3 / 4, 4 / 3), random) == (493, 0, 506, 10)
    assert random_box(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), random) == (0, 493, 10, 506)
    assert random_box(1, 1, (1.0, 1.0), (1.0, 1.0), random) == (0, 0, 1, 1)


def test_a_training_cut_is_the_box_resized():
    image = noise(90, 70)
    found = decode(encoded(image, "PNG"), Geometry(12, 16), Augment(resized_crop=(0.2, 0.5)), np.random.default_rng(8))
    box = random_box(90, 70, (0.2, 0.5), (3 / 4, 4 / 3), np.random.default_rng(8))
    assert np.array_equal(found, np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR, box=box)))


def test_half_of_the_images_are_mirrored():
    data, plain = encoded(noise(30, 30), "PNG"), decode(encoded(noise(30, 30), "PNG"), Geometry(12, 16))
    mirrored = 0
    for seed in range(200):
        found = decode(data, Geometry(12, 16), Augment(flip=True), np.random.default_rng(seed))
        same, flipped = np.array_equal(found, plain), np.array_equal(found, plain[:, ::-1])
        assert same != flipped
        mirrored += flipped
    assert 70 < mirrored < 130


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_smaller_decoding_shows_the_same(mode, monkeypatch):
    data, drafts = encoded(noise(1600, 1201, mode), quality=95), []
    whole = Image.open(io.BytesIO(data))
    draft = type(whole).draft
    monkeypatch.setattr(type(whole), "draft", lambda self, m, s: (draft(self, m, s), drafts.append(self.size))[0])
    for seed in range(8):
        found = decode(data, Geometry(100, 110), Augment(resized_crop=(0.3, 1.0)), np.random.default_rng(seed))
        box = random_box(1600, 1201, (0.3, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
        expected = whole.convert("RGB").resize((100, 100), Image.Resampling.BILINEAR, box=box)
        assert np.abs(found.astype(int) - np.asarray(expected, int)).mean() < 1.5
    assert max(width for width, _ in drafts) <= 400, "each was decoded at a quarter or less"


def test_orientation_and_transparency():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(80, 60)
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270).resize((16, 21), Image.Resampling.BILINEAR), int)
    data = encoded(image, quality=95, exif=exif)
    assert np.abs(decode(data, Geometry(16, 16)).astype(int) - turned[2:18]).mean() < 3
    cut = decode(data, Geometry(16, 16), Augment(resized_crop=(1.0, 1.0), ratio=(0.75, 0.75)), np.random.default_rng(0))
    whole = np.asarray(image.transpose(Image.Transpose.ROTATE_270).resize((16, 16), Image.Resampling.BILINEAR), int)
    assert np.abs(cut.astype(int) - whole).mean() < 3
    clear = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    assert (decode(encoded(clear, "PNG"), Geometry(16, 16)) == 255).all()


def seen_by_all(data: bytes, size: tuple[int, int], path: Path) -> list[np.ndarray]:
    """The whole image as prediction, evaluation and training see it, RGB."""
    path.write_bytes(data)
    width, height = size
    assert width == height
    whole = Augment(resized_crop=(1.0, 1.0), ratio=(1.0, 1.0))
    return [
        read_image(path, (height, width), 3),
        decode(data, Geometry(width, width)),
        decode(data, Geometry(width, width), whole, np.random.default_rng(0)),
    ]


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A block of (tag, type, count, value of 4 bytes)."""
    body = b"".join(struct.pack("<HHL4s", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(4)


SIX = (0x0112, 3, 1, b"\6\0\0\0")
DAMAGED_EXIF = {
    "a resolution of letters": (exif(SIX, (0x011A, 2, 4, b"abc\0")), True),
    "a date that is a float": (exif(SIX, (0x0132, 11, 1, b"abcd")), True),
    "a compression of letters": (exif(SIX, (0x0103, 2, 4, b"abc\0")), True),
    "an orientation of letters": (exif((0x0112, 2, 2, b"6\0\0\0")), False),
    "an orientation that is a float": (exif((0x0112, 11, 1, struct.pack("<f", 6))), False),
    "orientation 9": (exif((0x0112, 3, 1, b"\x09\0\0\0")), False),
    "no header": (b"Exif\0\0" + exif(SIX)[8:], False),
    "cut short": (exif(SIX)[:20], False),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("block", "turned"), DAMAGED_EXIF.values(), ids=DAMAGED_EXIF.keys())
def test_damaged_exif_data_of_a_sound_image(kind, block, turned, tmp_path):
    image = noise(16, 16)
    data = encoded(image, kind, exif=block)
    expected = np.asarray(Image.open(io.BytesIO(encoded(image, kind))).convert("RGB"))
    if turned:
        expected = np.rot90(expected, -1)
    for found in seen_by_all(data, (16, 16), tmp_path / "image"):
        assert np.array_equal(found, expected)


def sixteen_bits(pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of gray or RGB, by hand: Pillow writes no 16-bit RGB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">LLBBBBB", width, height, 16, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    inside = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in inside)


def test_16_bits_of_a_png_keep_the_high_byte(tmp_path):
    gray = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, 2)
    assert expected[0, 0, 0] == 0
    assert expected[1, 0, 0] == 1
    assert expected[255, 255, 0] == 255
    path = tmp_path / "image.png"
    for pixels in (gray, np.repeat(gray[..., None], 3, 2)):
        for found in seen_by_all(sixteen_bits(pixels), (256, 256), path):
            assert np.array_equal(found, expected)
        assert np.array_equal(read_image(path, (256, 256), 1), expected[..., :1])
    turned = sixteen_bits(gray, (b"eXIf", exif(SIX)[6:]))
    for found in seen_by_all(turned, (256, 256), path):
        assert np.array_equal(found, np.rot90(expected, -1))
    # one gray value is declared transparent, and so white; its neighbours with the same high byte are not
    white = expected.copy()
    white[3, 232] = 255
    for found in seen_by_all(sixteen_bits(gray, (b"tRNS", struct.pack(">H", 1000))), (256, 256), path):
        assert np.array_equal(found, white)


@pytest.mark.parametrize("pixels", [np.int32, np.float32, np.uint16])
def test_pixels_whose_white_is_not_known_are_refused(pixels, tmp_path):
    data = encoded(Image.fromarray(np.full((9, 9), 300, pixels)), "TIFF")
    (tmp_path / "image.tif").write_bytes(data)
    with pytest.raises(
        ImageError, match=r"image\.tif: wide pixels \(mode .* of a TIFF file\).*save it as an 8-bit PNG"
    ):
        read_image(tmp_path / "image.tif", (9, 9), 3)
    for augment in (None, AUGMENT):
        with pytest.raises(BrokenImageError, match="wide pixels"):
            decode(data, Geometry(9, 9), augment, np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_any_damage_is_one_kind_of_error(kind, tmp_path):
    """Pillow's decoders raise what they like: here all that a damaged file gives is an image or its refusal."""
    random, whole = np.random.default_rng(6), encoded(noise(24, 20), kind)
    path, refused = tmp_path / "image", 0
    for i in range(150):
        data = bytearray(whole)
        for at in random.integers(0, min(len(data), 120), 3):
            data[at] = random.integers(256)
        path.write_bytes(data)
        errors = []
        for read in (
            lambda: read_image(path, (8, 8), 3),
            lambda: decode(bytes(data), Geometry(8, 8)),  # noqa: B023
            lambda: decode(bytes(data), Geometry(8, 8), AUGMENT, np.random.default_rng(0)),  # noqa: B023
        ):
            try:
                read()
            except (ImageError, BrokenImageError) as error:
                errors.append(str(error))
        assert len(errors) in (0, 3), f"damage {i}: the three do not agree"
        refused += bool(errors)
    assert refused > 0


def test_an_error_of_a_decoder_that_no_list_has(tmp_path, monkeypatch):
    path = tmp_path / "odd.png"
    path.write_bytes(encoded(noise(9, 9), "PNG"))

    def load(_: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match=r"odd\.png: not a readable image \(unpack requires"):
        read_image(path, (8, 8), 3)
    for augment in (None, AUGMENT):
        with pytest.raises(BrokenImageError, match=r"not a readable image \(unpack requires"):
            decode(path.read_bytes(), Geometry(8, 8), augment, np.random.default_rng(0))


BROKEN = {
    "cut short": encoded(noise(60, 50))[:700],
    "no image": b"something else",
    "empty": b"",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_images(data):
    for augment in (None, AUGMENT):
        with pytest.raises(BrokenImageError, match="not a"):
            decode(data, Geometry(12, 16), augment, np.random.default_rng(0))


# --- broken images of a data set


@pytest.fixture(params=["folder", "shards"])
def damaged(request, tmp_path, tree):
    """Three broken images: 4 and 5 in a row, and 47."""
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    for number, content in zip((4, 5, 47), BROKEN.values(), strict=True):
        name = CLASSES[number // PER_CLASS]
        (root / "train" / name / f"{name}_{number % PER_CLASS:02}.png").write_bytes(content)
    if request.param == "folder":
        return lambda **options: imagenet_folder(root, **{**SMALL, **options})
    write_shards(root, tmp_path / "out", samples=7)
    return lambda **options: imagenet_shards(tmp_path / "out", **{**SMALL, **options}, shuffle=15)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_by_default(damaged, workers):
    data = damaged()
    with pytest.raises(DataError, match=r"(ant_04|ant_05|cow_07).*not an? .*image.*data\.broken: skip") as caught:
        list(data.batches(4, part="full", workers=workers))
    assert "\n" not in str(caught.value), "one line, no traceback of a worker"
    assert multiprocessing.active_children() == [], "workers end with the error, while its traceback is still held"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_passed_over(damaged, workers, logged):
    data = damaged(broken="skip")
    bad = {4, 5, 47}
    batches = data.batches(4, part="full", workers=workers)
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        numbers = seen(batches)
        assert len(numbers) == COUNT
        assert not bad & set(numbers)
        assert set(numbers) == set(range(COUNT)) - bad, "each of the three is replaced by another"
    assert len(data.broken) == 3
    assert all(any(stem in name for name in data.broken) for stem in ("ant_04", "ant_05", "cow_07"))
    assert not any(str(Path.cwd().anchor) == name[0] for name in data.broken), "names are relative"
    assert sum("passed over" in line for line in logged) == 3, "each is logged once"
    assert sorted(seen(data.evaluation("full", 8, workers=workers))) == sorted(set(range(COUNT)) - bad), "left out"


def test_a_held_out_image_never_takes_the_place_of_a_broken_one(tmp_path, tree):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    held_out = seen(imagenet_folder(root, **SMALL).evaluation("val", 9, workers=0))
    before = {n - 1 for n in held_out if n > 0} - set(held_out)
    assert before
    for number in before:
        name = CLASSES[number // PER_CLASS]
        (root / "train" / name / f"{name}_{number % PER_CLASS:02}.png").write_bytes(b"")
    data = imagenet_folder(root, **SMALL, broken="skip")
    numbers = seen(data.batches(3, workers=0))
    assert len(numbers) == 51
    assert not set(numbers) & set(held_out)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_images_is_an_error(tmp_path, tree, workers):
    root = Path(shutil.copytree(tree, tmp_path / "tree"))
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    data = imagenet_folder(root, **SMALL, broken="skip")
    with pytest.raises(DataError, match="and 50 images before it: not a readable image"):
        list(data.batches(4, workers=workers))


class _Deadly(Records):
    def __len__(self) -> int:
        return 10

    def read(self, number: int) -> Encoded:  # noqa: ARG002
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def order(self, generator: torch.Generator) -> np.ndarray:  # noqa: ARG002
        return np.arange(10)

    @property
    def identity(self) -> bytes:
        return b""


def test_a_killed_worker_is_one_clear_error():
    data = StreamingData("deadly", ("a", "b"), (0, 0, 0), 1.0, Geometry(2, 2), _Deadly(), None, 2, 0)
    with pytest.raises(DataError, match=r"a process that loads images was killed.*Fewer train\.workers"):
        list(data.batches(2, workers=1))


# --- shards


def test_shards_hold_the_files_as_they_are(tree, shards, tmp_path):
    index = open_index(shards)
    assert index.classes == CLASSES
    assert [s.samples for s in index.train] == [7] * 8 + [4]
    assert [s.samples for s in index.test] == [7, 7, 1]
    assert not [p.name for p in shards.iterdir() if p.name.startswith(".")], "a temporary file was left"
    with tarfile.open(shards / "train-000000.tar") as tar:
        names = tar.getnames()
        assert names[0].endswith(".png")
        assert names[1] == names[0].removesuffix("png") + "cls"
    folder, records = read_folder(tree), ShardRecords(shards, index, "train", 1)
    files = {(e.data, e.label) for e in map(folder.train.read, range(COUNT))}
    assert {(e.data, e.label) for e in map(records.read, range(COUNT))} == files
    assert len(files) == COUNT
    write_shards(tree, tmp_path / "again", samples=7)
    names = {path.name for path in shards.iterdir()} - {"shards.npz"}  # which holds times of modification
    assert len(names) == 9 + 3 + 2
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (shards / name).read_bytes()
    with pytest.raises(DataError, match="is not empty"):
        write_shards(tree, tmp_path / "again")
    with pytest.raises(DataError, match="at least 1"):
        write_shards(tree, tmp_path / "none", samples=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out: can't be written"):
        write_shards(tree, tmp_path / "file" / "out")


def test_the_writer_s_command(tree, tmp_path, capsys):
    assert main([str(tree), str(tmp_path / "out"), "--samples", "32"]) == 0
    assert "train: 60 images in 2 shards" in capsys.readouterr().out
    assert main([str(tree), str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err
    photos = tmp_path / "photos" / "train"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        noise(20, 20).save(photos / name / "my.photo 1.JPEG")
    assert main([str(photos.parent), str(tmp_path / "jpeg")]) == 0
    with tarfile.open(tmp_path / "jpeg" / "train-000000.tar") as tar:
        assert sorted(tar.getnames()) == [f"0000000{i}_my_photo_1.{e}" for i in (0, 1) for e in ("cls", "jpg")]


def test_an_epoch_mixes_neighbouring_shards(shards):
    index = open_index(shards)
    starts = np.cumsum([0, *(s.samples for s in index.train)])

    def order(shuffle: int, seed: int = 0) -> np.ndarray:
        return ShardRecords(shards, index, "train", shuffle).order(torch.Generator().manual_seed(seed))

    for shuffle in (1, 8, 15, 1000):
        numbers = order(shuffle)
        assert sorted(numbers.tolist()) == list(range(COUNT))
        assert np.array_equal(numbers, order(shuffle))
        assert not np.array_equal(numbers, order(shuffle, 1))
        which = np.searchsorted(starts, numbers, side="right") - 1
        spread = [np.ptp(np.flatnonzero(which == s)) for s in range(9)]
        if shuffle == 1:
            assert spread == [6] * 8 + [3], "one shard after the other"
            assert not np.array_equal(np.sort(numbers), numbers)
            assert any((np.diff(numbers[which == s]) < 0).any() for s in range(9)), "mixed within the shard"
        else:
            assert max(spread) > 6
        if shuffle == 15:
            assert max(spread) < 21


def test_too_many_shards_at_once(tmp_path):
    many = tuple(Shard(f"train-{i:06}.tar", 2, 1) for i in range(400))
    with pytest.raises(DataError, match=r"data\.shuffle = 600 mixes the images of 300 shards, at most 250"):
        ShardRecords(tmp_path, Index(("a", "b"), many), "train", 600)
    ShardRecords(tmp_path, Index(("a", "b"), (*many, Shard("train-last.tar", 1, 1))), "train", 400)


def test_few_shards_are_open_at_a_time(shards):
    records = ShardRecords(shards, open_index(shards), "train", 1)
    for number in range(COUNT):
        records.read(number)
        assert len(records._opened) <= 2
    assert len(pickle.loads(pickle.dumps(records))._opened) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_within_an_epoch_is_named(own_shards, workers):
    data = imagenet_shards(own_shards, **SMALL, shuffle=1)
    batches = iter(data.batches(2, workers=workers))
    next(batches)
    for path in own_shards.glob("train-*.tar"):
        if path.name != "train-000003.tar":
            path.rename(path.with_suffix(".gone"))
    with pytest.raises(DataError, match=r"train-\d{6}\.tar: this shard is missing") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named_at_the_start(own_shards):
    (own_shards / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar: this shard is missing; shards\.json says"):
        imagenet_shards(own_shards, **SMALL)


def test_a_shard_of_another_size_is_named_at_the_start(own_shards):
    with (own_shards / "train-000002.tar").open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(
        DataError, match=r"train-000002\.tar: \d+ bytes, \d+ in shards\.json: .* put the right one there"
    ):
        imagenet_shards(own_shards, **SMALL)


def read_all(folder: Path) -> None:
    data = imagenet_shards(folder, **SMALL)
    list(data.evaluation("full", 8, workers=0))


@pytest.mark.parametrize("cut", [1, 512, 10240, 20000])
def test_a_truncated_shard_is_named(own_shards, cut):
    path = own_shards / "train-000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with pytest.raises(DataError, match=rf"train-000002\.tar: {len(whole) - cut} bytes, {len(whole)} in shards\.json"):
        read_all(own_shards)


def test_every_cut_of_a_shard_without_an_index_is_found(tmp_path):
    """A tar file may be cut at any byte: in a header, in the data, between two members, before the end."""
    folder = tmp_path / "one"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(2):
            add(tar, f"{i}.png", encoded(noise(4, 4), "PNG"))
            add(tar, f"{i}.cls", str(i).encode())
    path = folder / "train-0.tar"
    whole = path.read_bytes()
    end = next(at for at in range(0, len(whole), 512) if not any(whole[at:]))
    assert open_index(folder).train[0].samples == 2
    for size in [*range(0, end + 512, 256), end - 1, end + 511]:
        (folder / "shards.json").unlink(missing_ok=True)
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"train-0\.tar: (not a whole tar|this shard is cut short)"):
            open_index(folder)
    for at in range(0, end, 512):  # a damaged header in the middle is no end
        if whole[at + 257 : at + 262] == b"ustar":
            path.write_bytes(whole[:at] + b"x" * 512 + whole[at + 512 :])
            with pytest.raises(DataError, match=r"train-0\.tar: (not a whole tar|this shard is cut short)"):
                open_index(folder)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_one(folder: Path, members: list[tuple[str, bytes]], name: str = "train-0.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for key, content in members:
            add(tar, key, content)
    return folder


def test_shards_of_others_are_counted_once(tmp_path):
    png = encoded(noise(20, 20), "PNG")
    folder = tmp_path / "wds"
    write_one(
        folder,
        [
            (f"d.x/{i}.{e}", c)
            for i in range(5)
            for e, c in (("json", b'{"label": %d, "a": 1}' % (i % 2)), ("png", png))
        ],
    )
    write_one(
        folder,
        [m for i in range(4) for m in ((f"{i}.cls", b"%d\n" % (i % 3)), (f"{i}.jpg", png), (f"{i}.txt", b""))],
        "train-1.tar",
    )
    write_one(folder, [("a.jpg", png), ("a.cls", b"0")], "val-0.tar")
    index = open_index(folder)
    assert index.classes == ("0", "1", "2")
    assert [(s.name, s.samples) for s in index.train] == [("train-0.tar", 5), ("train-1.tar", 4)]
    assert [(s.name, s.samples) for s in index.test] == [("val-0.tar", 1)]
    assert json.loads((folder / "shards.json").read_text())["format"] == 1
    assert open_index(folder) == index
    (folder / "shards.json").unlink()
    (folder / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"classes\.txt: 2 classes, but there is a label 2"):
        open_index(folder)
    (folder / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    data = imagenet_shards(folder, size=12, resize=16, validation_images=2)
    assert data.classes == ("ant", "bee", "cow", "dog")
    labels = torch.cat([y for _, y in data.evaluation("full", 4, workers=0)])
    assert labels.bincount().tolist() == [5, 3, 1]


def test_a_folder_that_can_not_keep_the_index(own_shards, monkeypatch, logged):
    def full(path, content):  # noqa: ARG001
        raise OSError(30, "Read-only file system")

    expected = open_index(own_shards)
    (own_shards / "shards.json").unlink()
    (own_shards / "shards.npz").unlink()
    monkeypatch.setattr(shards_module, "write_atomic", full)
    found = open_index(own_shards)
    assert found == expected, "class names too: they come from classes.txt"
    assert np.array_equal(found.places, expected.places)
    for name in ("shards.json", "shards.npz"):
        assert any(
            f"{name} can't be kept (Read-only file system): the shards are read through at every start" in line
            for line in logged
        )
        assert not (own_shards / name).exists()


def count_scans(monkeypatch) -> list[str]:
    """The names of the shards whose headers are read through from now on, in this process or one forked from it."""
    scanned, scan = [], shards_module._scan

    def counted(stream, path):
        scanned.append(path.name)
        return scan(stream, path)

    monkeypatch.setattr(shards_module, "_scan", counted)
    return scanned


def test_no_shard_is_read_through_twice(own_shards, monkeypatch):
    scanned = count_scans(monkeypatch)
    data = imagenet_shards(own_shards, **SMALL)
    for epoch in (0, 1):
        batches = data.batches(8, workers=0)
        batches.set_epoch(epoch)
        seen(batches)
    assert scanned == [], "the writer knows where it put the images"

    written = (own_shards / "shards.npz").read_bytes()
    expected = open_index(own_shards).places
    whole = [f"train-{i:06d}.tar" for i in range(9)] + [f"val-{i:06d}.tar" for i in range(3)]
    for damage in (None, b"", written[:-400], written[:60], b"no archive"):
        path = own_shards / "shards.npz"
        path.unlink() if damage is None else path.write_bytes(damage)
        assert np.array_equal(open_index(own_shards).places, expected), "found by reading as by writing"
        assert scanned == whole
        scanned.clear()
        assert np.array_equal(open_index(own_shards).places, expected)
        assert scanned == []
        assert path.read_bytes() == written

    shard = own_shards / "train-000001.tar"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    open_index(own_shards)
    assert scanned == whole, "a shard that was written again may be another"
    scanned.clear()
    monkeypatch.setattr(shards_module, "_scan", None)  # in a worker process nothing could count it
    assert sorted(seen(imagenet_shards(own_shards, **SMALL).evaluation("full", 8, workers=2))) == list(range(COUNT))


def test_places_of_1_3_million_images_are_small(tmp_path):
    count = 1_281_167
    places = np.zeros(count, shards_module._PLACE)
    records = ShardRecords(tmp_path, Index(("a", "b"), (Shard("train-0.tar", count, 1),), (), places), "train", 1)
    assert len(pickle.dumps(records)) < 30e6
    assert np.shares_memory(records._places, places), "forked workers share them"


def test_an_image_that_is_no_longer_in_its_place(own_shards):
    records = ShardRecords(own_shards, open_index(own_shards), "train", 1)
    path, place = own_shards / "train-000000.tar", records._places[1]
    whole = path.read_bytes()
    start, end = int(place["offset"]), int(place["offset"] + place["size"])
    label = end + -end % 512  # where the header of the label's file lies, which is 1 byte large
    for header in (bytes(512), b"x" * 512, whole[label : label + 512]):
        damaged = whole[: start - 512] + header + whole[start:]
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train-000000\.tar: this shard has changed: no image of \d+ bytes at \d+"):
            records.read(1)
    path.write_bytes(whole)
    assert records.read(1).data == whole[start:end]


def test_shards_that_came_after_the_index_are_refused(own_shards):
    whole = open_index(own_shards)
    for name in ("train-000009.tar", "train-000010.tar", "val-000003.tar"):
        shutil.copy(own_shards / "train-000002.tar", own_shards / name)
    with pytest.raises(
        DataError, match=r"train-000009\.tar, train-000010\.tar, val-000003\.tar not in shards\.json"
    ) as caught:
        open_index(own_shards)
    assert f"delete {own_shards / 'shards.json'} to have the shards counted again" in str(caught.value)
    shutil.copy(own_shards / "train-000002.tar", own_shards / "train-000011.tar")
    with pytest.raises(DataError, match=r"train-000011\.tar and 1 more not in shards\.json, which knows 12 shards"):
        imagenet_shards(own_shards, **SMALL)
    (own_shards / "shards.json").unlink()
    again = open_index(own_shards)
    assert again == open_index(own_shards), "now they are known"
    assert (len(again.train), len(again.test)) == (12, 4)
    assert again.classes == whole.classes


def test_empty_shards_and_both_kinds_of_test_shards(own_shards, logged):
    """What counting makes of a folder is what it accepts afterwards."""
    expected = open_index(own_shards)
    write_one(own_shards, [], "train-000004a.tar")
    write_one(own_shards, [], "train-999999.tar")
    for path in list(own_shards.glob("val-*.tar")):
        shutil.copy(path, own_shards / path.name.replace("val", "test"))
    (own_shards / "shards.json").unlink()
    assert open_index(own_shards) == open_index(own_shards)
    index = open_index(own_shards)
    assert [shard.samples for shard in index.train] == [7] * 5 + [0] + [7] * 3 + [4, 0]
    assert index.test == expected.test
    assert sum("val-*.tar are taken for the test set, test-*.tar are passed over" in line for line in logged) == 1
    data = imagenet_shards(own_shards, **SMALL, shuffle=15)
    assert sorted(seen(data.evaluation("full", 7, workers=0))) == list(range(COUNT))
    assert sorted(seen(data.evaluation("test", 7, workers=0))) == [100 + i for i in range(3 * TESTS)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"")], r"sample 'a' needs one image and a \.cls or \.json, has \.jpg"),
        ([("a.cls", b"1")], r"sample 'a' needs one image"),
        ([("a.jpg", b""), ("a.png", b""), ("a.cls", b"1")], r"sample 'a' needs one image"),
        ([("a.jpg", b""), ("a.jpg", b""), ("a.cls", b"1")], r"sample 'a' has two members \.jpg"),
        ([("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"1"), ("b.cls", b"1")], r"do not stand next to each other"),
        ([("a.jpg", b""), ("a.cls", b"ant")], r"sample 'a': \.cls holds b'ant', not one number"),
        ([("a.jpg", b""), ("a.cls", b"-1")], r"sample 'a': \.cls holds b'-1'"),
        ([("a.jpg", b""), ("a.json", b'{"name": 1}')], r"sample 'a': \.json holds .*not an object with \"label\""),
        ([("a.jpg", b""), ("a.json", b'{"label": true}')], r"sample 'a': \.json holds"),
        ([("a.jpg", b""), ("a.json", b"[1")], r"sample 'a': \.json holds"),
        ([("a.jpg", b""), ("a.cls", b"%d" % 2**31)], r"sample 'a': \.cls holds b'2147483648'"),
        ([("a.jpg", b""), ("a.cls", b"0")], r"1 classes in these shards, at least 2"),
    ],
)
def test_samples_that_are_none(tmp_path, members, message):
    with pytest.raises(DataError, match=message) as caught:
        open_index(write_one(tmp_path / "one", members))
    assert "train-0.tar" in str(caught.value) or "classes" in message


def test_index_refusals(own_shards, tmp_path):
    with pytest.raises(DataError, match=r"needs data\.root"):
        imagenet_shards()
    with pytest.raises(DataError, match="no such folder"):
        imagenet_shards(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no shards\.json and no train-\*\.tar"):
        imagenet_shards(tmp_path)
    with pytest.raises(DataError, match=r"data\.shuffle = 0"):
        imagenet_shards(own_shards, shuffle=0)
    path = own_shards / "shards.json"
    whole = json.loads(path.read_text())

    def refused(message: str, **changes) -> None:
        path.write_text(json.dumps({**whole, **changes}))
        with pytest.raises(DataError, match=message):
            read_all(own_shards)

    refused("format 2, this version reads 1", format=2)
    refused("0 training shards", train=[])
    refused("1 classes", classes=["ant"])
    refused("a broken index", train=3)
    refused("is no shard of this folder", train=[{**whole["train"][0], "name": "../train-000000.tar"}])
    refused("with -1 samples", train=[{**whole["train"][0], "samples": -1}, *whole["train"][1:]])
    refused(
        r"train-000000\.tar: 7 samples, 8 in shards\.json",
        train=[{**whole["train"][0], "samples": 8}, *whole["train"][1:]],
    )
    refused(
        r"train-000000\.tar: 7 samples, 6 in shards\.json",
        train=[{**whole["train"][0], "samples": 6}, *whole["train"][1:]],
    )
    refused(r"train-\d*\.tar/\d+_cow_\d\d: label 2, but there are 2 classes", classes=["ant", "bee"])
    path.write_text(json.dumps(whole)[:-20])
    with pytest.raises(DataError, match=r"shards\.json: a broken index"):
        read_all(own_shards)


# --- training


def recipe(name: str, root: Path, **changes):
    tree = {
        "name": "streamed",
        "seed": 2,
        "model": {"name": "bireal_resnet14", "width": 4, "blocks": 1},
        "data": {"name": name, "root": str(root), **SMALL, "augment": {"resized_crop": [0.3, 1.0], "flip": True}},
        "train": {"epochs": 3, "batch_size": 10, "eval_batch_size": 20, "workers": 0},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        tree[section][field] = value
    return parse_recipe(tree)


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_args):
        if trainer.current_epoch == 1 and trainer.global_step % trainer.num_training_batches == 2:
            raise ValueError("power cut")


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "final.ckpt", weights_only=True)["state_dict"]


def rows(run_dir: Path) -> list[dict]:
    times = ("images_per_second", "seconds")
    return [{key: value for key, value in row.items() if key not in times} for row in read_metrics(run_dir)]


@pytest.mark.parametrize("name", ["imagenet_folder", "imagenet_shards"])
def test_a_resumed_run_is_the_same_with_any_number_of_workers(name, tree, shards, tmp_path):
    root = tree if name == "imagenet_folder" else shards
    whole = train(recipe(name, root), tmp_path / "whole", test=True)
    assert whole.results["test"]["images"] == 3 * TESTS
    assert whole.results["validation"]["images"] == 9
    assert whole.run["broken_images"] == []
    assert read_metrics(tmp_path / "whole")[-1]["step"] == 3 * (51 // 10)
    with pytest.raises(ValueError, match="power cut"):
        train(recipe(name, root, train__workers=2), tmp_path / "cut", callbacks=[Stop()])
    train(recipe(name, root, train__workers=2), tmp_path / "cut", resume=True, test=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_run(tmp_path / "cut")["results"]["test"] == whole.results["test"]


def test_broken_images_are_reported_in_run_json(damaged, tmp_path):
    data = damaged()
    root = data._train._root if data.name == "imagenet_folder" else data._train._folder
    with pytest.raises(DataError, match="data.broken: skip"):
        train(recipe(data.name, root, train__final=True, train__epochs=2), tmp_path / "stop")
    assert read_run(tmp_path / "stop")["status"] == "failed"
    made = recipe(data.name, root, data__broken="skip", train__final=True, train__epochs=2, train__batch_size=20)
    found = train(made, tmp_path / "skip").run
    assert len(found["broken_images"]) == 3
    assert read_metrics(tmp_path / "skip")[-1]["step"] == 2 * 3
    assert str(tmp_path) not in json.dumps(found)
    assert read_run(tmp_path / "skip") == found


def test_a_streamed_network_is_evaluated_and_exported(tree, tmp_path):
    run = train(recipe("imagenet_folder", tree, train__epochs=1), tmp_path / "run", test=True)
    done = export_run(run.run_dir)
    assert done.proof.inputs == COUNT, "all there are, where there are fewer than asked for"
    assert done.proof.decisions == 3 * TESTS
    assert done.proof.integers_differ == 0
    on_engine = evaluate_file(done.path, split="test")
    assert on_engine["confusion"] == evaluate_run(run.run_dir, split="test")["confusion"]
    assert on_engine["images"] == 3 * TESTS
    assert evaluate_file(done.path, data=str(tree))["images"] == 9

    # predict resizes and cuts as evaluation did: the file says how
    net = lowbit.load(done.path)
    source = load_data(load_recipe(run.run_dir / "recipe.yaml"))
    assert net.meta["image"]["resize"] == source.resize == SMALL["resize"]
    paths = sorted((tree / "val").glob("*/*.png"))
    seen_as = {image.tobytes(): image for x, _ in source.evaluation("test", 7) for image in to_numpy(x)}
    for path, found in zip(paths, predict(net, paths, top=1), strict=True):
        image = seen_as.pop(read_image(path, net.input_shape[:2], 3, resize=source.resize).tobytes())
        assert found.classes[0][0] == net.meta["classes"][int(net(image[None]).argmax())]


def test_recipes_check_the_cut(tree):
    for cut in ([0.0, 1.0], [0.5, 0.2], [0.5, 1.1]):
        with pytest.raises(RecipeError, match="resized_crop"):
            recipe("imagenet_folder", tree, data__augment={"resized_crop": cut})
    with pytest.raises(RecipeError, match="ratio"):
        recipe("imagenet_folder", tree, data__augment={"ratio": [2.0, 1.0]})
    with pytest.raises(RecipeError, match=r"data\.broken"):
        recipe("imagenet_folder", tree, data__broken="ignore")
    assert recipe("imagenet_folder", tree).data.augment.resized_crop == (0.3, 1.0)


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    def rate(model: str, spec, batch_size: int, seconds: float) -> bench.Rate:  # noqa: ARG001
        return bench.Rate(model, None, 10**9 if spec.height == 32 else 1, 1.0, 1.0)

    monkeypatch.setattr(bench, "training_rate", rate)
    path = tmp_path / "bench.json"
    assert bench.main(["--generate", "9", "--batch", "2", "--workers", "0", "1", "--json", str(path)]) == 0
    told, found = capsys.readouterr().out, json.loads(path.read_text())
    readers = [(r["what"], r["workers"], r["images"]) for r in found["readers"]]
    assert readers[:2] == [("image folder, 224x224", 0, 8), ("image folder, 224x224", 1, 8)]
    assert readers[2:4] == [("shards, 224x224", 0, 8), ("shards, 224x224", 1, 8)]
    assert all(v in told for v in found["verdicts"])
    assert ["not the bottleneck" in v for v in found["verdicts"]] == [True, True, False]
    assert "IS the bottleneck" in found["verdicts"][2]
    assert bench.main(["--root", str(tmp_path / "gone")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_training_rate():
    spec = InputSpec(3, 16, 16, (1, 2, 3), 1 / 50, tuple("abc"))
    found = bench.training_rate("bireal_resnet14", spec, 2, 0.0)
    assert found.images == 2
    assert found.what == "bireal_resnet14, 16x16, " + ("cuda" if torch.cuda.is_available() else "cpu")


def test_both_are_registered():
    assert DATASETS.get("imagenet_folder") is imagenet_folder
    assert DATASETS.get("imagenet_shards") is imagenet_shards
