"""Means over seeds, and differences paired by seed with Student's t interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

__all__ = ["Difference", "Summary", "paired", "summary"]


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (division by n - 1) of n values; ``sd`` is None for one."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Differences one - other, seed by seed.

    Attributes:
        n: seeds that both have.
        mean: of the differences.
        sd: their sample standard deviation; None for one seed.
        low, high: mean -+ t(confidence, n - 1) sd / sqrt(n); None for one seed.
        confidence: of the interval, for normally distributed differences.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    confidence: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out 0. One seed resolves nothing."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation.

    Raises:
        ValueError: no values.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / n
    return Summary(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None)


def paired(one: Mapping[int, float], other: Mapping[int, float], confidence: float = 0.95) -> Difference | None:
    """Differences of the seeds that both have; None if they share none.

    Args:
        one, other: seed -> value. What a seed fixes for both (order of the images, the start) drops out.
        confidence: of the two-sided interval.
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    if not differences:
        return None
    found = summary(differences)
    if found.sd is None:
        return Difference(found.n, found.mean, None, None, None, confidence)
    half = float(stdtrit(found.n - 1, (1 + confidence) / 2)) * found.sd / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.sd, found.mean - half, found.mean + half, confidence)
