"""Readers refuse broken files by name; batches and augmentation depend on (seed, epoch, batch) alone."""

from __future__ import annotations

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowbit.train.data import DATASETS, Augment, Batches, DataError, ImageData, fashion_mnist, rounds
from lowbit.train.data.batches import random_crop_flip
from lowbit.train.data.images import split_indices

COUNTS = {"train": 50, "t10k": 20}


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    header = struct.pack(">I", magic if magic is not None else 0x0800 | array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, count in COUNTS.items():
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            written[name] = idx(array)
            (folder / name).write_bytes(gzip.compress(written[name]))
    return written


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four small files of Fashion-MNIST's layout; no cache, no system folder, no network."""
    monkeypatch.setattr(fashion_mnist, "COUNTS", COUNTS)
    monkeypatch.setattr(fashion_mnist, "VALIDATION", 10)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_fashion(tmp_path / "given")
    return tmp_path / "given"


def test_fashion_mnist_is_read(folder):
    data = DATASETS.get("fashion_mnist")(root=folder)
    assert data.train_x.shape == (40, 1, 28, 28)
    assert data.train_x.dtype == torch.uint8
    assert data.val_x.shape == (10, 1, 28, 28)
    assert data.test_x.shape == (20, 1, 28, 28)
    assert data.test_y.dtype == torch.int64
    assert data.full_x.shape == (50, 1, 28, 28)


def test_the_test_set_is_not_read_before_it_is_asked_for(folder):
    for path in folder.glob("t10k*"):
        path.write_bytes(b"")
    data = DATASETS.get("fashion_mnist")(root=folder)
    assert len(data.train_x) == 40
    with pytest.raises(DataError):
        _ = data.test_x


def test_train_and_validation_are_disjoint_and_fixed():
    train, val = split_indices(60_000, 10_000, fashion_mnist.SPLIT_SEED)
    assert len(train) == 50_000
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(60_000))
    assert val[:3].tolist() == EXPECTED_SPLIT


EXPECTED_SPLIT = [24867, 5045, 6938]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: None, "no such file"),
        (lambda raw: gzip.compress(raw)[:-40], "not a whole gzip file"),
        (lambda raw: raw, "not a whole gzip file"),
        (lambda raw: gzip.compress(b"\0\0\x0d\x03" + raw[4:]), r"magic number 0x00000d03, expected 0x00000803"),
        (lambda raw: gzip.compress(raw[:7]), "too few for an idx header"),
        (lambda raw: gzip.compress(raw[:-1]), "bytes follow"),
        (lambda raw: gzip.compress(raw + b"\0"), "bytes follow"),
        (lambda _: gzip.compress(idx(np.zeros((49, 28, 28), np.uint8))), "49 entries, expected 50"),
        (lambda _: gzip.compress(idx(np.zeros((50, 28, 27), np.uint8))), "28x27, expected 28x28"),
    ],
    ids=["missing", "truncated", "not gzip", "magic", "header", "short", "long", "count", "size"],
)
def test_broken_files_are_refused_by_name(folder, damage, message):
    path = folder / "train-images-idx3-ubyte.gz"
    damaged = damage(gzip.decompress(path.read_bytes()))
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(DataError, match=message) as caught:
        _ = DATASETS.get("fashion_mnist")(root=folder).train_x
    assert str(path) in str(caught.value)
    assert "fetched again" not in str(caught.value), "nothing is ever fetched into a folder that was given"


def test_wrong_label_is_refused(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.full(50, 10, np.uint8))))
    with pytest.raises(DataError, match="label 10, expected 0 to 9"):
        _ = DATASETS.get("fashion_mnist")(root=folder).train_x


@pytest.mark.usefixtures("folder")
def test_download_goes_to_the_cache_once_it_is_checked(tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    written = write_fashion(mirror)
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in written.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "MIRRORS", ((tmp_path / "gone").as_uri() + "/", mirror.as_uri() + "/"))
    assert len(DATASETS.get("fashion_mnist")().train_x) == 40
    cache = tmp_path / "cache" / "lowbit" / "fashion-mnist"
    assert sorted(p.name for p in cache.iterdir()) == sorted(digests)
    whole = (cache / "train-images-idx3-ubyte.gz").read_bytes()
    (cache / "train-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match="delete it and it is fetched again"):
        _ = DATASETS.get("fashion_mnist")().train_x
    (cache / "train-images-idx3-ubyte.gz").write_bytes(whole)
    (cache / "train-labels-idx1-ubyte.gz").unlink()
    name = "train-labels-idx1-ubyte.gz"
    (mirror / name).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match="SHA-256"):
        _ = DATASETS.get("fashion_mnist")().train_x
    assert not (cache / name).exists()
    assert not list(cache.glob(".*")), "a temporary file was left"


@pytest.mark.usefixtures("folder")
def test_nowhere_to_be_found_says_what_to_do():
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        _ = DATASETS.get("fashion_mnist")().train_x


@pytest.mark.skipif(
    not fashion_mnist.SYSTEM_FOLDER.is_dir(), reason="the package dataset-fashion-mnist is not installed"
)
def test_the_real_one():
    data = DATASETS.get("fashion_mnist")(root=fashion_mnist.SYSTEM_FOLDER)
    assert data.full_x.shape == (60_000, 1, 28, 28)
    assert data.full_y.bincount().tolist() == [6000] * 10
    pixels = data.full_x.double()
    assert data.zero_point == (round(pixels.mean().item()),)
    assert 1 / data.scale == pytest.approx(pixels.std().item(), abs=0.05)


def test_train_images_takes_the_first_of_the_permutation(folder):
    few = DATASETS.get("fashion_mnist")(root=folder, train_images=7)
    whole = DATASETS.get("fashion_mnist")(root=folder)
    assert torch.equal(few.train_x, whole.train_x[:7])
    with pytest.raises(DataError, match="there are 40 to take"):
        _ = DATASETS.get("fashion_mnist")(root=folder, train_images=41).train_x


# --- folders of images


def write_images(root: Path, per_class: int = 5, size: tuple[int, int] = (20, 14)) -> None:
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            colour = (200, 30 * i, 0) if label else (0, 30 * i, 200)
            Image.new("RGB", size, colour).save(root / name / f"{i}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder(tmp_path, channels):
    write_images(tmp_path)
    data = DATASETS.get("image_folder")(root=tmp_path, size=12, channels=channels)
    assert data.classes == ("ant", "bee")
    assert data.shape == (channels, 12, 12)
    assert data.train_x.shape == (8, channels, 12, 12)
    assert data.val_x.shape == (2, channels, 12, 12)
    assert len(data.zero_point) == channels
    mean = data.train_x.double().mean(dim=(0, 2, 3))
    assert data.zero_point == tuple(int(m) for m in mean.round())
    if channels == 3:
        reds = torch.cat([data.train_x, data.val_x])[:, 0].amax(dim=(1, 2))
        assert torch.equal(reds == 200, torch.cat([data.train_y, data.val_y]) == 1)
    with pytest.raises(DataError, match="no test set"):
        _ = data.test_x


def test_image_folder_with_a_test_set(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", 3)
    data = DATASETS.get("image_folder")(root=tmp_path, size=8)
    assert data.test_x.shape == (6, 3, 8, 8)
    assert data.test_y.tolist() == [0, 0, 0, 1, 1, 1]


def test_image_folder_refusals(tmp_path):
    build = DATASETS.get("image_folder")
    with pytest.raises(DataError, match=r"needs data\.root"):
        build()
    with pytest.raises(DataError, match="no such folder"):
        build(root=tmp_path / "gone")
    with pytest.raises(DataError, match="0 class folders"):
        build(root=tmp_path)
    write_images(tmp_path)
    with pytest.raises(DataError, match="channels = 2"):
        build(root=tmp_path, channels=2)
    broken = tmp_path / "ant" / "9.png"
    broken.write_bytes((tmp_path / "ant" / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match="not a readable image") as caught:
        build(root=tmp_path)
    assert str(broken) in str(caught.value)
    (tmp_path / "cow").mkdir()
    broken.unlink()
    with pytest.raises(DataError, match=r"cow: no images"):
        build(root=tmp_path)


# --- batches


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(count)
    return (y % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(count, 2, 6, 5).contiguous(), y


def test_batches_are_a_permutation_without_the_rest():
    x, y = numbered(23)
    batches = Batches(x, y, 5, seed=1)
    seen = torch.cat([labels for _, labels in batches])
    assert len(batches) == 4
    assert len(seen) == len(seen.unique()) == 20
    assert all(torch.equal(images[:, 0, 0, 0], labels.to(torch.uint8)) for images, labels in batches)


def test_batches_depend_on_seed_and_epoch_alone():
    x, y = numbered(40)

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(x, y, 8, seed)
        batches.set_epoch(epoch)
        torch.rand(3)  # somebody else's draws don't matter
        return torch.cat([labels for _, labels in batches]).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 0)


def test_augmentation_is_a_shift_and_a_flip():
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(1, 255, (200, 2, 6, 5), dtype=torch.uint8, generator=generator)
    zero_point = (7, 9)
    out = random_crop_flip(x, Augment(crop=2, flip=True), zero_point, torch.Generator().manual_seed(1))
    assert out.shape == x.shape
    assert out.dtype == torch.uint8
    padded = torch.tensor(zero_point, dtype=torch.uint8).view(1, 2, 1, 1).expand(200, 2, 10, 9).clone()
    padded[:, :, 2:8, 2:7] = x
    kinds = set()
    for i in range(200):
        found = _found(out[i], padded[i])
        assert found, f"image {i} is no crop of its padded self"
        kinds.update(found)
    assert len(kinds) > 35, "of 50 shifts and flips, most are drawn"


def _found(image: torch.Tensor, padded: torch.Tensor) -> list[tuple[int, int, bool]]:
    crops = [(dy, dx, padded[:, dy : dy + 6, dx : dx + 5]) for dy in range(5) for dx in range(5)]
    return [
        (dy, dx, flip)
        for dy, dx, crop in crops
        for flip in (False, True)
        if torch.equal(image, crop.flip(-1) if flip else crop)
    ]


def test_no_augmentation_by_default():
    assert not Augment()
    x, y = numbered(10)
    images, labels = next(iter(Batches(x, y, 10)))
    assert torch.equal(images, x[labels])


def test_a_batch_larger_than_the_data_is_refused():
    x, y = numbered(4)
    with pytest.raises(ValueError, match="batch_size = 5, but there are 4"):
        Batches(x, y, 5)


def test_rounds_keep_every_image():
    x, y = numbered(10)
    parts = rounds(x, y, 4)
    assert [len(labels) for _, labels in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in parts]), y)


def test_every_data_set_gives_image_data_or_says_what_it_needs():
    for name in DATASETS:
        try:
            data = DATASETS.get(name)()
        except DataError:
            continue
        assert isinstance(data, ImageData)
        assert len(data.zero_point) == data.shape[0]
