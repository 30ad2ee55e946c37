"""Batches from images that lie in memory, and augmentation on whole batches.

Every random choice is a function of (seed, epoch, batch) alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Augment", "Batches", "random_crop_flip", "rounds"]


def _generator(*key: int) -> torch.Generator:
    """A generator for a tuple of integers; neighbouring tuples give unrelated streams."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


@dataclass(frozen=True)
class Augment:
    """Random shift by up to ``crop`` pixels each way (padding is the zero point, 0 after normalisation) and flip."""

    crop: int = 0
    flip: bool = False

    def __bool__(self) -> bool:
        return self.crop > 0 or self.flip


def random_crop_flip(x: Tensor, augment: Augment, zero_point: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Shift and mirror each image of a batch on its own, by one gather.

    Args:
        x: u8 ``[N, C, H, W]``.
        augment: how far to shift, and whether to mirror half of the images left to right.
        zero_point: the padding value of each channel.
        generator: where the random numbers come from.

    Returns:
        u8 ``[N, C, H, W]``.
    """
    count, channels, height, width = x.shape
    pad = augment.crop
    padded = x
    if pad:
        fill = torch.tensor(zero_point, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        padded = fill.expand(count, channels, height + 2 * pad, width + 2 * pad).clone()
        padded[:, :, pad : pad + height, pad : pad + width] = x
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows = shift[0] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    if augment.flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shift[1]
    sample = torch.arange(count).view(-1, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


class Batches:
    """Training batches: a fresh permutation each epoch, augmented, the incomplete last batch dropped.

    Lightning calls ``sampler.set_epoch``; this object is its own sampler.

    Args:
        x: u8 ``[N, C, H, W]``.
        y: int64 ``[N]``.
        batch_size: images in a batch; all batches are full.
        seed: seed of permutations and augmentation.
        augment: None, or what to do to each image.
        zero_point: padding value of each channel, for the crop.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        zero_point: tuple[int, ...] = (0,),
    ) -> None:
        if not 0 < batch_size <= len(x):
            raise ValueError(f"batch_size = {batch_size}, but there are {len(x)} training images")
        self.x, self.y = x, y
        self.batch_size, self.seed = batch_size, seed
        self.augment, self.zero_point = augment, zero_point
        self.epoch = 0

    @property
    def sampler(self) -> Batches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; 0 is the first."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.randperm(len(self.x), generator=_generator(self.seed, epoch))
        for step in range(len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            x = self.x[index]
            if self.augment:
                x = random_crop_flip(x, self.augment, self.zero_point, _generator(self.seed, epoch, step))
            yield x, self.y[index]


def rounds(x: Tensor, y: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """All images once, in order, the last batch as large as what is left: for evaluation and calibration."""
    return list(zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True))
