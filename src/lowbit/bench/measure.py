"""Timing in turn, and how far to trust it.

Functions that are compared take turns, so that all of them see the same machine. What they reach is held against what this core
does at most, measured in the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from lowbit import _engine

NOISY: Final = 0.25
"""Above this (p90 - p10) / median of the ratios of neighbouring samples, a result comes with a warning."""

DRIFT: Final = 0.05
"""Above this difference of two measurements of the core's peak, its clock has changed in between."""

SHARED: Final = 0.8
"""Below this share of its fastest slice over the whole time, others use the core."""

_SLOT: Final = 0.0005  # seconds one sample lasts at least: well below a scheduler's time slice

_LONG: Final = 0.1  # seconds of a call beside which cold caches, of one call before another, count for nothing

Sample = Callable[[], float]
"""Takes one sample: seconds of one call."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 10th and 90th percentile of the samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        """From one number per sample."""
        p10, median, p90 = (float(v) for v in np.percentile(seconds, [10, 50, 90]))
        return Timing(median, p10, p90, len(seconds))


@dataclass(frozen=True)
class Comparison:
    """Ours beside theirs. `ratio` is theirs / ours, of the medians; `p10`, `p90` of neighbouring samples'."""

    ours: Timing
    theirs: Timing
    ratio: float
    p10: float
    p90: float

    @staticmethod
    def of(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
        """From samples that were taken in turn."""
        a, b = Timing.of(ours), Timing.of(theirs)
        low, high = np.percentile(np.asarray(theirs) / np.asarray(ours), [10, 90])
        return Comparison(a, b, b.median / a.median, float(low), float(high))

    @property
    def noise(self) -> float:
        """Spread of the ratios of neighbouring samples, as a share of the ratio."""
        return (self.p90 - self.p10) / self.ratio

    @property
    def noisy(self) -> bool:
        """Whether the machine was too busy to believe the ratio."""
        return self.noise > NOISY

    def warnings(self, what: str) -> list[str]:
        """One sentence where the machine was too busy to believe the numbers."""
        if not self.noisy:
            return []
        return [
            f"{what}: noisy: the ratio of neighbouring samples goes from {self.p10:.2f} to {self.p90:.2f}; "
            "close other programs and repeat"
        ]


def timed(run: Callable[[], object]) -> Sample:
    """Samples of `run`: the median of as many calls as fill half a millisecond, after one that is not counted; one call where that
    takes long."""

    def taken() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    short = taken() < _LONG
    calls = max(1, round(_SLOT / max(taken(), 1e-7))) if short else 1

    def sample() -> float:
        if short:
            run()
        return float(np.median([taken() for _ in range(calls)]))

    return sample


def in_turn(samples: Sequence[Sample], repeats: int) -> list[list[float]]:
    """`repeats` samples of each, one after the other, every second time in the opposite order."""
    seconds: list[list[float]] = [[] for _ in samples]
    for turn in range(repeats):
        order = range(len(samples))
        for which in order if turn % 2 == 0 else reversed(order):
            seconds[which].append(samples[which]())
    return seconds


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> Comparison:
    """Time two functions in turn, `repeats` samples each."""
    return Comparison.of(*in_turn([timed(first), timed(second)], repeats))


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on the first `threads` cores it may use.

    Raises:
        ValueError: there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads = {threads}, but this process may use {len(allowed)} cores")
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True)
class Peak:
    """Multiply-accumulates a second of one core at most: an ISA's inner loops on registers alone.

    ``bits`` of 1-bit products, ``integers`` of integer ones (VNNI where there is), both in the fastest slice of time; ``share`` is the
    mean over the whole time as a part of that.
    """

    bits: float
    integers: float
    share: float

    @staticmethod
    def measure(isa: str, seconds: float = 0.04) -> Peak | None:
        """Of this core, now; None for the portable row, whose instructions are the compiler's choice.

        Raises:
            ValueError: an unknown isa, or one that this CPU can't run.
        """
        found = _engine.peak(isa, seconds)
        if found is None:
            return None
        (bits, bits_mean), (integers, integers_mean) = found
        return Peak(bits, integers, min(bits_mean / bits, integers_mean / integers))

    def of(self, kernel: str) -> float | None:
        """The peak that a kernel of the engine is held against; None where there is none of its kind."""
        base = kernel.partition("+")[0]
        return {"bit_conv": self.bits, "byte_gemm": self.integers, "int_gemm": self.integers}.get(base)


def _larger(a: Peak, b: Peak) -> Peak:
    return Peak(max(a.bits, b.bits), max(a.integers, b.integers), min(a.share, b.share))


@dataclass
class Core:
    """The core under the measurements: its peak is measured before and after each of them.

    `seen` has every measurement in order.
    """

    isa: str
    seen: list[Peak] = field(default_factory=list)

    @contextmanager
    def watched(self) -> Iterator[Watch]:
        """What was measured within can be held against the peak just before and after."""
        watch = Watch()
        before = self._look()
        yield watch
        after = self._look()
        if before and after:
            watch.peak = _larger(before, after)
            watch.warnings += _warnings(before, after)

    def _look(self) -> Peak | None:
        peak = Peak.measure(self.isa)
        if peak:
            self.seen.append(peak)
        return peak

    def as_dict(self) -> dict[str, Any] | None:
        """Plain JSON: the first and the last peak, and the largest; None for the portable row."""
        if not self.seen:
            return None
        largest = self.seen[0]
        for peak in self.seen:
            largest = _larger(largest, peak)
        return {"start": asdict(self.seen[0]), "end": asdict(self.seen[-1]), "largest": asdict(largest)}

    def warnings(self) -> list[str]:
        """One sentence where the core was not the same from the first to the last measurement."""
        if not self.seen:
            return []
        return [f"the whole run: {text}" for text in _warnings(self.seen[0], self.seen[-1])]


@dataclass
class Watch:
    """The core's peak around one measurement (None for the portable row), and why not to trust what was measured."""

    peak: Peak | None = None
    warnings: list[str] = field(default_factory=list)


def _warnings(before: Peak, after: Peak) -> list[str]:
    found = []
    for name in ("bits", "integers"):
        a, b = getattr(before, name), getattr(after, name)
        if abs(a - b) > DRIFT * max(a, b):
            found.append(
                f"this core's peak in {name} went from {a / 1e9:,.0f} to {b / 1e9:,.0f} GMAC/s: its clock changes, "
                "or something else runs on it"
            )
    share = min(before.share, after.share)
    if share < SHARED:
        found.append(f"this core was ours for {share:.0%} of the time: others use it")
    return found
