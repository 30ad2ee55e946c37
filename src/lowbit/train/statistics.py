"""Means over seeds, and differences paired by seed with Student's t interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Difference", "Summary", "paired", "summary", "t_cdf", "t_quantile"]


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
    half = t_quantile((1 + confidence) / 2, found.n - 1) * found.sd / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.sd, found.mean - half, found.mean + half, confidence)


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom.

    With theta = atan(t / sqrt(nu)), A = P(|T| <= |t|) is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)::

        nu odd    A = 2/pi (theta + sin(theta) (cos + 2/3 cos^3 + ... + 2 4 .. (nu-3) / (3 5 .. (nu-2)) cos^(nu-2)))
        nu even   A = sin(theta) (1 + 1/2 cos^2 + 1 3/(2 4) cos^4 + ... + 1 3 .. (nu-3) / (2 4 .. (nu-2)) cos^(nu-2))

    Raises:
        ValueError: fewer than 1 degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, got {freedom}")
    theta = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 + odd, freedom + 1, 2):  # the term with cos^(k-2), or of the smallest even power
        total += term
        term *= (k - 1) / k * cosine**2
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, by bisection of ``t_cdf`` to the last bit.

    Raises:
        ValueError: p outside (0, 1), fewer than 1 degree of freedom.
    """
    if not 0 < p < 1:
        raise ValueError(f"a probability between 0 and 1 is needed, got {p}")
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if t_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return high
