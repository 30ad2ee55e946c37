"""How fast the readers are, beside how fast a network trains: is the loader the bottleneck?

``python -m lowbit.train.data.bench`` generates JPEG images of ImageNet's size, 500 x 375, and about 110 kB each; with ``--root`` it reads
a folder of yours (``train/<class>/*.JPEG``). An epoch is timed from the start of the worker processes to its last batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowbit.files import write_atomic
from lowbit.train.data import Augment, Batches, DataError, DataSource
from lowbit.train.data.cifar import CIFAR10
from lowbit.train.data.imagenet import SCALE, ZERO_POINT, imagenet_folder, imagenet_shards
from lowbit.train.data.shards import write_shards
from lowbit.train.data.streaming import default_workers
from lowbit.train.network import build_network
from lowbit.train.prepare import parameter_groups
from lowbit.train.recipe import parse_recipe
from lowbit.train.rundir import InputSpec, machine, versions

__all__ = ["Rate", "generate", "main", "training_rate"]

CROP = Augment(flip=True, resized_crop=(0.08, 1.0))
SHIFT = Augment(crop=4, flip=True)
BUSY = 0.9
"""Below this share of a core for a process that does nothing but compute, others use the machine."""


@dataclass(frozen=True)
class Rate:
    """Images a second of one reader with one number of workers (None: it has none) or of one network.

    ``cpu_seconds`` is the time that this process itself was given.
    """

    what: str
    workers: int | None
    images: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Images a second."""
        return self.images / self.seconds


def generate(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """Write ``count`` JPEG images, two classes below ``root/train``: soft shapes with grain on them, at quality 90."""
    random = np.random.default_rng(0)
    width, height = size
    for i in range(count):
        folder = root / "train" / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 15, (height, width, 1)).astype(np.float32)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(folder / f"{i:06d}.JPEG", quality=90)


def _timed(what: str, workers: int | None, batches: Iterable[tuple[Tensor, Tensor]]) -> Rate:
    start, cpu = time.perf_counter(), time.process_time()
    images = sum(len(y) for _, y in batches)
    return Rate(what, workers, images, time.perf_counter() - start, time.process_time() - cpu)


def _reader(what: str, data: DataSource, batch_size: int, workers: Sequence[int]) -> list[Rate]:
    list(data.batches(batch_size, augment=CROP, workers=max(workers)))  # the files are in the page cache from now on
    return [_timed(what, w, data.batches(batch_size, augment=CROP, workers=w)) for w in workers]


def training_rate(model: str, spec: InputSpec, batch_size: int, seconds: float) -> Rate:
    """Training steps (forward, backward, SGD; SLB, 1-bit weights and activations) on images that are there already.

    On a GPU where there is one, in bf16; else on all threads PyTorch has.
    """
    recipe = parse_recipe(
        {
            "name": "bench",
            "model": {"name": model},
            "data": {"name": "imagenet_folder"},
            "quantize": {"method": "slb", "weight_bits": 1, "activation_bits": 1},
        }
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(recipe, spec).train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    groups = parameter_groups(network, lr=1e-3, weight_decay=0.0, latent_lr_scale=10.0, latent_weight_decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
    x = torch.randint(0, 256, (batch_size, spec.channels, spec.height, spec.width), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, len(spec.classes), (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = network(x)
        cross_entropy(out.float(), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    count, start, cpu = 0, time.perf_counter(), time.process_time()
    while count < 1 or time.perf_counter() - start < seconds:
        step()
        count += 1
    what = f"{model}, {spec.height}x{spec.width}, {device.type}"
    return Rate(what, None, count * batch_size, time.perf_counter() - start, time.process_time() - cpu)


def _verdict(readers: Sequence[Rate], model: Rate) -> str:
    """Plain words: which of the two waits for the other, and from which model on it would turn."""
    best = max(readers, key=lambda rate: rate.per_second)
    workers = f" with {best.workers} worker{'s'[: best.workers != 1]}" if best.workers else ""
    loader, network = best.per_second, model.per_second
    if loader < network:
        return (
            f"{best.what}: the loader IS the bottleneck: {loader:,.0f} images/s{workers}, {model.what} could train "
            f"{network:,.0f}; {network / loader:.1f} times as many cores would keep up"
        )
    return (
        f"{best.what}: the loader is not the bottleneck: {loader:,.0f} images/s{workers}, {model.what} trains {network:,.0f} "
        f"({loader / network:.1f} times slower); it would be with a network that trains more than {loader:,.0f} images/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m lowbit.train.data.bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m lowbit.train.data.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--root", type=Path, help="an image folder of yours, train/<class>/*")
    parser.add_argument(
        "--generate", type=int, default=500, metavar="N", help="images to generate where there is no --root (500)"
    )
    parser.add_argument("--images", type=int, default=5000, help="images of --root to read at most (5000)")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch (32)")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of workers to try")
    parser.add_argument(
        "--model", default="bireal_resnet18", help="network to compare with at 224x224 (bireal_resnet18)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the training steps of each network (5)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(arguments)
    try:
        result = _run(given, print)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if given.json is not None:
        write_atomic(given.json, (json.dumps(result, indent=1) + "\n").encode("utf-8"))
    return 0


def _run(given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    workers = given.workers or sorted({0, 1, 2, default_workers()})
    with tempfile.TemporaryDirectory(prefix="lowbit-") as temporary:
        scratch = Path(temporary)
        root = given.root
        if root is None:
            root = scratch / "images"
            generate(root, given.generate)
        folder = imagenet_folder(root, validation_images=1)
        if folder.count("train") > given.images:
            folder = imagenet_folder(root, validation_images=1, train_images=given.images)
        rates = {"image folder, 224x224": _reader("image folder, 224x224", folder, given.batch, workers)}
        write_shards(root, scratch / "shards", samples=250)
        kept = {} if folder.count("train") < given.images else {"train_images": given.images}
        shards = imagenet_shards(scratch / "shards", validation_images=1, shuffle=500, **kept)
        rates["shards, 224x224"] = _reader("shards, 224x224", shards, given.batch, workers)
    x, y = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (20_000,))
    cifar = Batches(x, y, 128, augment=SHIFT, zero_point=CIFAR10.zero_point)
    rates["CIFAR in memory"] = [_timed("CIFAR in memory", None, cifar)]

    large = InputSpec(3, 224, 224, ZERO_POINT, SCALE, tuple(map(str, range(1000))))
    small = InputSpec(3, 32, 32, CIFAR10.zero_point, 1 / CIFAR10.deviation, CIFAR10.classes)
    batch = given.batch if torch.cuda.is_available() else min(given.batch, 8)
    models = [
        training_rate(given.model, large, batch, given.seconds),
        training_rate("resnet20", small, 4 * batch, given.seconds),
    ]
    found = machine("cuda" if torch.cuda.is_available() else "cpu")
    say(f"{found['processor']}, {default_workers()} cores for this process, {found['gpu'] or 'no GPU'}")
    say(f"{'reader':<34}{'workers':>8}{'images/s':>10}")
    for rate in [rate for group in rates.values() for rate in group]:
        say(f"{rate.what:<34}{'-' if rate.workers is None else rate.workers:>8}{rate.per_second:>10,.0f}")
    for rate in models:
        say(f"{'training: ' + rate.what:<42}{rate.per_second:>10,.0f}")
    verdicts = [_verdict(group, models[1] if name == "CIFAR in memory" else models[0]) for name, group in rates.items()]
    for verdict in verdicts:
        say(verdict)
    alone = [rate for group in rates.values() for rate in group if not rate.workers]
    for rate in alone:
        if rate.cpu_seconds < BUSY * rate.seconds:
            say(
                f"the machine is busy: {rate.what} got {rate.cpu_seconds / rate.seconds:.0%} of a core and would read "
                f"{rate.images / rate.cpu_seconds:,.0f} images/s on a free one"
            )
    if found["gpu"] is None:
        say("Loader and network were measured one after the other; on a CPU they share its cores while training.")
    return {
        "readers": [{**asdict(rate), "per_second": rate.per_second} for group in rates.values() for rate in group],
        "training": [{**asdict(rate), "per_second": rate.per_second} for rate in models],
        "verdicts": verdicts,
        "machine": found,
        "versions": versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
