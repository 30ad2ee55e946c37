"""How the values of each metric are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["result_line", "show", "unit"]


def unit(metric: str) -> tuple[str, float, int]:
    """Name of a metric's unit, the factor to it, and the digits worth showing: accuracy lies between 0 and 1, and is
    shown in percent, as papers do."""
    return (
        ("dB", 1.0, 3) if metric.startswith("psnr") else ("", 1.0, 4) if metric.startswith("ssim") else ("%", 100.0, 2)
    )


def show(value: float, metric: str) -> str:
    """A value in its unit."""
    name, factor, digits = unit(metric)
    return f"{factor * value:.{digits}f}{' ' if name else ''}{name}"


def result_line(found: Mapping[str, Any], metric: str) -> str:
    """What a task's evaluation found, in one line."""
    if metric == "psnr":
        return (
            f"{found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}; bicubic {found['psnr_bicubic']:.2f} dB, "
            f"{found['ssim_bicubic']:.4f}; {found['images']:,} picture{'s'[: found['images'] != 1]}"
        )
    return f"{found[metric]:.2%} of {found['images']:,} images"
