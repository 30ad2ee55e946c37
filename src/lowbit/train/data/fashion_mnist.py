"""Fashion-MNIST: 60,000 + 10,000 gray images, 28x28, ten classes (Xiao, Rasul, Vollgraf, arXiv 1708.07747; MIT)."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowbit.train.data import DATASETS, download
from lowbit.train.data.download import fetch
from lowbit.train.data.images import DataError, ImageData

__all__ = ["CLASSES", "fashion_mnist", "find_folder", "read_idx"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
VALIDATION, SPLIT_SEED = 10_000, 20_201_204
"""10,000 of the 60,000 training images are held out: the first of the permutation with this seed."""

COUNTS = {"train": 60_000, "t10k": 10_000}
# SHA-256 of the unpacked content: packers differ in the gzip header, the images don't.
SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MIRRORS = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/lowbit/fashion-mnist``, by default below ``~/.cache``."""
    return download.cache_folder("fashion-mnist")


def _way_out(path: Path) -> str:
    if path.parent == cache_folder():
        return "delete it and it is fetched again"
    if path.parent == SYSTEM_FOLDER:
        return "reinstall the package dataset-fashion-mnist, or give another folder (data.root)"
    return "put the original there, or leave data.root out and it is found or fetched"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: big-endian 0x08DD (DD dimensions), DD sizes, the bytes.

    Raises:
        DataError: missing, not gzip or cut short, wrong magic number, or fewer or more bytes than the sizes say.
    """
    try:
        with gzip.open(path) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_way_out(path)}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); {_way_out(path)}") from None
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise DataError(f"{path}: {len(data)} bytes are too few for an idx header of {header}; {_way_out(path)}")
    magic = int.from_bytes(data[:4], "big")
    expected = 0x0800 | dimensions
    if magic != expected:
        raise DataError(f"{path}: magic number {magic:#010x}, expected {expected:#010x}; {_way_out(path)}")
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    body = np.frombuffer(data, np.uint8, offset=header)
    if body.size != int(np.prod(sizes, dtype=np.int64)):
        raise DataError(f"{path}: sizes {sizes} but {body.size} bytes follow; {_way_out(path)}")
    return body.reshape(sizes)


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    for path, array in ((images_path, images), (labels_path, labels)):
        if len(array) != COUNTS[part]:
            raise DataError(f"{path}: {len(array)} entries, expected {COUNTS[part]}; {_way_out(path)}")
    if images.shape[1:] != (28, 28):
        raise DataError(
            f"{images_path}: images of {images.shape[1]}x{images.shape[2]}, expected 28x28; {_way_out(images_path)}"
        )
    if labels.max(initial=0) >= len(CLASSES):
        raise DataError(
            f"{labels_path}: label {labels.max()}, expected 0 to {len(CLASSES) - 1}; {_way_out(labels_path)}"
        )
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SHA256)


def find_folder(root: str | Path | None = None) -> Path:
    """The folder to read from: ``root`` if given, else the user's cache, else the system's, else a download.

    Raises:
        DataError: ``root`` lacks a file, or nothing is here and nothing could be downloaded.
    """
    if root is not None:
        folder = Path(root).expanduser()
        missing = [name for name in SHA256 if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder / missing[0]}: no such file; data.root must hold {', '.join(SHA256)}")
        return folder
    for folder in (cache_folder(), SYSTEM_FOLDER):
        if _whole(folder):
            return folder
    return _download(cache_folder())


def _problem(path: Path, digest: str) -> str | None:
    try:
        found = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return str(error)
    return None if found == digest else f"SHA-256 {found[:12]}..., expected {digest[:12]}..."


def _download(folder: Path) -> Path:
    """Fetch what is missing into ``folder``; every file is checked before it takes its name."""
    otherwise = (
        "Install the Debian package dataset-fashion-mnist, or put the four .gz files into that folder or into data.root"
    )
    for name, digest in SHA256.items():
        if not (folder / name).is_file():
            fetch(name, MIRRORS, folder, partial(_problem, digest=digest), otherwise)
    return folder


@DATASETS.register("fashion_mnist")
def fashion_mnist(root: str | Path | None = None, train_images: int | None = None) -> ImageData:
    """Fashion-MNIST, 28x28x1.

    ``zero_point`` 73 and ``scale`` 1/90 are the training pixels' mean 72.94 and standard deviation 90.02, rounded.

    Args:
        root: folder with the four idx .gz files; by default the user's cache, the system's folder, or a download.
        train_images: use only this many of the 50,000 training images that are left after the split.
    """
    return ImageData(
        name="fashion_mnist",
        classes=CLASSES,
        shape=(1, 28, 28),
        zero_point=(73,),
        scale=1 / 90,
        read_train=lambda: _read_pair(find_folder(root), "train"),
        read_test=lambda: _read_pair(find_folder(root), "t10k"),
        validation=VALIDATION,
        split_seed=SPLIT_SEED,
        train_images=train_images,
    )
