"""Readers refuse broken files by name; batches and augmentation depend on (seed, epoch, batch) alone."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import struct
import tarfile
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.train.data import DATASETS, Augment, Batches, DataError, DataSource, ImageData, cifar, fashion_mnist, rounds
from lowbit.train.data import image_folder as image_folder_module
from lowbit.train.data.batches import generator_of, random_crop_flip
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


# --- CIFAR


def write_cifar(folder: Path, layout: cifar.Layout) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every batch's pixels and classes, as they were written."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, records in (*layout.train, *layout.test):
        labels = np.stack([rng.integers(0, values, records) for _, values in layout.labels], 1).astype(np.uint8)
        pixels = rng.integers(0, 256, (records, 3072), np.uint8)
        (folder / name).write_bytes(np.concatenate([labels, pixels], 1).tobytes())
        written[name] = pixels.reshape(records, 3, 32, 32), labels[:, -1]
    return written


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def layout(request, tmp_path, monkeypatch):
    """The layout of one of the two, with four records a batch; no cache, no network."""
    real = getattr(cifar, request.param)
    small = dataclasses.replace(
        real, train=tuple((name, 4) for name, _ in real.train), test=tuple((name, 3) for name, _ in real.test)
    )
    monkeypatch.setattr(cifar, request.param, small)
    monkeypatch.setattr(cifar, "VALIDATION", 2)
    monkeypatch.setattr(cifar, "MIRRORS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return small


def packed(folder: Path, archive: Path, inside: str) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{inside}/{path.name}")
    return archive


def test_cifar_layouts_are_the_official_ones():
    assert [n for _, n in cifar.CIFAR10.train] == [10_000] * 5
    assert cifar.CIFAR10.train[0][0] == "data_batch_1.bin"
    assert cifar.CIFAR100.train == (("train.bin", 50_000),)
    for real in (cifar.CIFAR10, cifar.CIFAR100):
        assert sum(n for _, n in real.test) == 10_000
        assert len(set(real.classes)) == len(real.classes) == real.labels[-1][1]
        assert list(real.classes) == sorted(real.classes)


def test_cifar_is_read_from_every_place(layout, tmp_path):
    build = DATASETS.get(layout.name)
    written = write_cifar(tmp_path / "given" / layout.folder, layout)
    archive = packed(tmp_path / "given" / layout.folder, tmp_path / "packed" / layout.archive, layout.folder)
    places = [tmp_path / "given", tmp_path / "given" / layout.folder, archive, archive.parent]
    for place in places:
        data = build(root=place)
        for part, x, y in (("train", data.full_x, data.full_y), ("test", data.test_x, data.test_y)):
            names = [name for name, _ in getattr(layout, part)]
            assert np.array_equal(x.numpy(), np.concatenate([written[name][0] for name in names]))
            assert np.array_equal(y.numpy(), np.concatenate([written[name][1] for name in names]))
            assert y.dtype == torch.int64
        assert len(data.val_x) == 2
        assert data.classes == layout.classes
        assert data.shape == (3, 32, 32)
    (tmp_path / "cache" / "lowbit").mkdir(parents=True)
    archive.parent.rename(tmp_path / "cache" / "lowbit" / layout.name)
    assert torch.equal(build().full_x, data.full_x)


def test_cifar_class_names_come_from_their_file(layout, tmp_path):
    write_cifar(tmp_path, layout)
    names = [f"class{i}" for i in range(len(layout.classes))]
    path = tmp_path / layout.names_file
    path.write_text("\n".join(names) + "\n\n")
    assert DATASETS.get(layout.name)(root=tmp_path).classes == tuple(names)
    path.write_text("\n".join(names[:-1]))
    with pytest.raises(
        DataError, match=f"{layout.names_file}: {len(names) - 1} different names, expected {len(names)}"
    ):
        DATASETS.get(layout.name)(root=tmp_path)


def _set(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.parametrize("unpacked", [True, False], ids=["folder", "archive"])
def test_broken_batches_are_refused_by_name_and_record(layout, tmp_path, unpacked):
    write_cifar(tmp_path / "bin", layout)
    name, size = layout.train[-1][0], len(layout.labels) + 3072
    path = tmp_path / "bin" / name
    whole = path.read_bytes()
    last, values = layout.labels[-1]
    for data, message in (
        (whole[: 2 * size + 100], r"is cut short in record 3 of 4"),
        (whole[:-1], r"is cut short in record 4 of 4 .*unpack it again"),
        (whole[:size], r"is cut short in record 2 of 4"),
        (b"", r"is cut short in record 1 of 4"),
        (whole + b"ab", r"goes on after record 4 with 2 bytes"),
        (
            _set(whole, 2 * size + len(layout.labels) - 1, values),
            rf"record 3 has the {last} {values}, expected 0 to {values - 1}",
        ),
        (_set(whole, 3 * size, 255), r"record 4 has the .*label 255, expected 0 to"),
    ):
        path.write_bytes(data)
        root = path.parent if unpacked else packed(path.parent, tmp_path / "some.tar.gz", layout.folder)
        with pytest.raises(DataError, match=message) as caught:
            _ = DATASETS.get(layout.name)(root=root).train_x
        assert name in str(caught.value)
        assert str(root) in str(caught.value)


def test_missing_batches_and_broken_archives(layout, tmp_path):
    build = DATASETS.get(layout.name)
    with pytest.raises(DataError, match=f"no {layout.train[0][0]} and no {layout.archive} here"):
        build(root=tmp_path)
    with pytest.raises(DataError, match="not here and not to be fetched"):
        _ = build().train_x
    write_cifar(tmp_path / "bin", layout)
    (tmp_path / "bin" / layout.train[-1][0]).unlink()
    archive = packed(tmp_path / "bin", tmp_path / layout.archive, layout.folder)
    with pytest.raises(DataError, match=rf"has no {layout.folder}/{layout.train[-1][0]}"):
        _ = build(root=archive).train_x
    assert len(build(root=archive).test_x) == 3
    with pytest.raises(DataError, match=rf"{layout.train[-1][0]}: can't be read \(No such file"):
        _ = build(root=tmp_path / "bin").train_x
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(DataError, match="not a whole archive"):
        _ = build(root=archive).train_x
    archive.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="not a whole archive"):
        _ = build(root=archive).train_x


def test_cifar_is_fetched_once_its_md5_is_right(layout, tmp_path, monkeypatch):
    write_cifar(tmp_path / "bin", layout)
    archive = packed(tmp_path / "bin", tmp_path / "mirror" / layout.archive, layout.folder)
    monkeypatch.setattr(cifar, "MIRRORS", ((tmp_path / "gone").as_uri() + "/", archive.parent.as_uri() + "/"))
    with pytest.raises(DataError, match=f"MD5 .*expected {layout.md5}"):
        _ = DATASETS.get(layout.name)().train_x
    cache = tmp_path / "cache" / "lowbit" / layout.name
    assert list(cache.iterdir()) == [], "a temporary file was left"
    right = dataclasses.replace(layout, md5=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, layout.name.upper(), right)
    assert len(DATASETS.get(layout.name)().full_x) == sum(n for _, n in layout.train)
    archive.unlink()
    assert len(DATASETS.get(layout.name)().test_x) == 3
    kept = cache / layout.archive
    kept.write_bytes(kept.read_bytes()[:-2000])
    with pytest.raises(DataError, match="delete it and it is fetched again"):
        _ = DATASETS.get(layout.name)().full_x


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


def write_noise(root: Path, counts: tuple[int, ...], size: int) -> list[np.ndarray]:
    random, written = np.random.default_rng(3), []
    for label, count in enumerate(counts):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count):
            written.append(random.integers(0, 256 - 80 * label, (size, size, 3)).astype(np.uint8))
            Image.fromarray(written[-1]).save(root / f"class{label}" / f"{i:03}.png")
    return written


def test_mean_and_deviation_are_exact(tmp_path, monkeypatch):
    pixels = np.stack(write_noise(tmp_path, (11, 8, 5), 7)).transpose(0, 3, 1, 2)
    found = set()
    for at_once in (2**22, 500, 1):
        monkeypatch.setattr(image_folder_module, "_AT_ONCE", at_once)
        data = DATASETS.get("image_folder")(root=tmp_path, size=7)
        train, _ = split_indices(24, 5, image_folder_module.SPLIT_SEED)
        x = pixels[train].astype(int)
        assert np.array_equal(data.train_x, x)
        assert data.zero_point == tuple(round(Fraction(int(x[:, c].sum()), x[:, c].size)) for c in range(3))
        mean = Fraction(int(x.sum()), x.size)
        variance = sum((v - mean) ** 2 for v in x.ravel().tolist()) / (x.size - 1)
        assert data.scale == 1 / math.sqrt(variance)
        found.add((data.zero_point, data.scale))
    assert len(found) == 1
    one = tmp_path / "one"
    write_noise(one, (1, 1), 1)
    assert DATASETS.get("image_folder")(root=one, size=1, channels=1).scale == 1, "one pixel has no deviation"


class LargestResult(TorchDispatchMode):
    """The size of the largest tensor that an operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


def test_a_folder_needs_the_memory_of_its_images_once(tmp_path):
    write_noise(tmp_path, (40, 40), 100)
    with LargestResult():
        DATASETS.get("image_folder")(root=tmp_path, size=1)  # whatever is imported at first use is there now
    tracemalloc.start()
    try:
        with LargestResult() as largest:
            data = DATASETS.get("image_folder")(root=tmp_path, size=100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    images = 80 * 100 * 100 * 3
    assert data.full_x.nbytes == images
    assert peak < 1.5 * images, "arrays of NumPy"
    assert largest.bytes <= images, "tensors of PyTorch"


def test_image_folder_with_a_test_set(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", 3)
    data = DATASETS.get("image_folder")(root=tmp_path, size=8)
    assert data.test_x.shape == (6, 3, 8, 8)
    assert data.test_y.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_broken_image_of_a_folder_stops_or_is_passed_over(tmp_path):
    write_images(tmp_path)
    broken = sorted(tmp_path.rglob("*.png"))[0]
    broken.write_bytes(broken.read_bytes()[:60])
    build = DATASETS.get("image_folder")
    with pytest.raises(DataError, match=rf"{broken.name}.*data\.broken: skip"):
        build(root=tmp_path, size=8)
    whole = len(list(tmp_path.rglob("*.png")))
    data = build(root=tmp_path, size=8, broken="skip")
    assert data.broken == (f"{broken.parent.name}/{broken.name}",)
    assert data.count("full") == whole - 1
    with pytest.raises(DataError, match=r"data\.broken = 'ignore'"):
        build(root=tmp_path, size=8, broken="ignore")
    with pytest.raises(DataError, match=r"data\.resize = 7"):
        build(root=tmp_path, size=8, resize=7)


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


def test_the_streams_of_keys():
    """A resumed run needs the very numbers that another version drew."""
    assert generator_of(1, 2).initial_seed() == 6306526848564946091
    keys = [(s, e, p) for s in range(20) for e in range(20) for p in range(20)]
    assert len({generator_of(*key).initial_seed() for key in keys}) == len(keys)
    assert generator_of(3, 4).initial_seed() == generator_of(3, 4, 0).initial_seed()


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


@pytest.mark.parametrize(("count", "ranks"), [(40, 2), (41, 2), (47, 3), (24, 3)])
def test_ranks_share_what_one_process_sees(count, ranks):
    x, y = numbered(count)
    augment = Augment(crop=2, flip=True)
    for epoch in (0, 1):
        alone = Batches(x, y, 4, 7, augment, (9, 9))
        alone.set_epoch(epoch)
        micro = list(alone)
        for rank in range(ranks):
            share = Batches(x, y, 4, 7, augment, (9, 9), rank, ranks)
            share.set_epoch(epoch)
            got = list(share)
            assert len(got) == len(share) == count // (4 * ranks)
            for step, (images, labels) in enumerate(got):
                assert torch.equal(images, micro[step * ranks + rank][0])
                assert torch.equal(labels, micro[step * ranks + rank][1])


def test_impossible_shares_are_refused():
    x, y = numbered(10)
    with pytest.raises(ValueError, match="batch_size = 6 on each of 2 ranks, but there are 10"):
        Batches(x, y, 6, rank=0, world_size=2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank = {rank} of 2"):
            Batches(x, y, 2, rank=rank, world_size=2)
    with pytest.raises(ValueError, match="these lie in memory, use crop"):
        Batches(x, y, 2, augment=Augment(resized_crop=(0.1, 1)))


def test_images_in_memory_as_a_data_source():
    x, y = numbered(20)
    data = ImageData(
        "numbers", ("a", "b"), (2, 6, 5), (0, 0), 1.0, lambda: (x, y), lambda: (x[:7], y[:7]), validation=5
    )
    assert [data.count(part) for part in ("train", "full", "val", "test")] == [15, 20, 5, 7]
    val = data.evaluation("val", 2)
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _ in val]), data.val_x)
    shares = [torch.cat([labels for _, labels in data.evaluation("test", 2, rank=r, world_size=2)]) for r in (0, 1)]
    assert sorted(torch.cat(shares).tolist()) == list(range(7))
    assert torch.equal(torch.cat(list(data.calibration(9, 4))), data.train_x[:9])
    assert len(torch.cat(list(data.calibration(99, 4)))) == 15
    assert len(data.batches(4)) == 3
    assert len(data.batches(4, part="full")) == 5
    assert data.broken == ()
    with pytest.raises(
        DataError, match=r"data\.augment\.resized_crop.*numbers lies in memory.*use data\.augment\.crop"
    ):
        data.batches(4, augment=Augment(resized_crop=(0.1, 1)))


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


def test_every_data_set_is_a_data_source_or_says_what_it_needs():
    for name in DATASETS:
        try:
            data = DATASETS.get(name)()
        except DataError:
            continue
        assert isinstance(data, DataSource)
        assert len(data.zero_point) == data.shape[0]
