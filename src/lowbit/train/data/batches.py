"""Training batches: what the trainer asks of them, and those of images that lie in memory, augmented a batch at a time.

Every random choice is a function of (seed, epoch, batch) alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Augment", "Batches", "TrainingBatches", "generator_of", "random_crop_flip", "rounds"]


def generator_of(*key: int) -> torch.Generator:
    """A generator for a tuple of integers, 0 to 2^32 - 1; tuples of one length that differ give unrelated streams.

    Zeros at the end don't count, as ``numpy.random.SeedSequence`` fills up with them: ``(s, e)`` and ``(s, e, 0)`` give one
    stream. So the order of epoch e and what is done to its batch 0 are drawn from the same numbers, used differently. It
    stays so: another rule would change the batches of every run there is.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


@dataclass(frozen=True)
class Augment:
    """What is done to each training image at random.

    Attributes:
        crop: shift by up to this many pixels each way (padding is the zero point, 0 after normalisation).
        flip: mirror half of the images left to right.
        resized_crop: share of the image's area that is cut out and resized, smallest and largest; None for no such cut.
            For data sets that are decoded image by image; those in memory have their final size and take ``crop``.
        ratio: width / height of the cut, smallest and largest.
        rotate: turn by a random multiple of 90 degrees; for pictures of super-resolution.
    """

    crop: int = 0
    flip: bool = False
    resized_crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: bool = False

    def __bool__(self) -> bool:
        return self.crop > 0 or self.flip or self.resized_crop is not None or self.rotate


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


class TrainingBatches(ABC):
    """Pairs (images, labels) for one epoch after the other, every batch full, the same number of them on every rank.

    An epoch is a permutation of the N images, cut into pieces of ``batch_size``; rank r of W takes the pieces r, r + W,
    r + 2 W, ...: together the ranks see what one process sees that adds up the gradients of W pieces. What does not fill
    a piece for every rank is left out of this epoch, so that no rank runs out before the others.

    Lightning calls ``sampler.set_epoch``; this object is its own sampler.

    Args:
        count: N.
        batch_size: images in a batch of one rank.
        rank, world_size: which share of each epoch this is.

    Raises:
        ValueError: no batch can be filled, or there is no such rank.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} of {world_size}")
        if not 0 < batch_size * world_size <= count:
            ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
            raise ValueError(f"batch_size = {batch_size}{ranks}, but there are {count} training images")
        self.count, self.batch_size = count, batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    @property
    def sampler(self) -> TrainingBatches:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; 0 is the first."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """This rank's pieces of the epoch's permutation: (number of the piece, where it lies)."""
        for step in range(len(self)):
            piece = step * self.world_size + self.rank
            yield piece, slice(piece * self.batch_size, (piece + 1) * self.batch_size)

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``self.epoch``."""


class Batches(TrainingBatches):
    """Batches of images in memory: a fresh permutation each epoch, augmented.

    Args:
        x: u8 ``[N, C, H, W]``.
        y: int64 ``[N]``.
        batch_size: images in a batch of one rank; all batches are full.
        seed: seed of permutations and augmentation.
        augment: None, or what to do to each image.
        zero_point: padding value of each channel, for the crop.
        rank, world_size: see ``TrainingBatches``.

    Raises:
        ValueError: no batch can be filled, no such rank, or ``augment.resized_crop``.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
        zero_point: tuple[int, ...] = (0,),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(x), batch_size, rank, world_size)
        if augment is not None and augment.resized_crop is not None:
            raise ValueError("resized_crop cuts images out as they are decoded; these lie in memory, use crop")
        self.x, self.y, self.seed = x, y, seed
        self.augment, self.zero_point = augment, zero_point

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.epoch
        order = torch.randperm(len(self.x), generator=generator_of(self.seed, epoch))
        for piece, where in self.pieces():
            index = order[where]
            x = self.x[index]
            if self.augment:
                x = random_crop_flip(x, self.augment, self.zero_point, generator_of(self.seed, epoch, piece))
            yield x, self.y[index]


def rounds(x: Tensor, y: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """All images once, in order, the last batch as large as what is left: for evaluation and calibration."""
    return list(zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True))
