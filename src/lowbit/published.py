"""What papers report on super-resolution's standard sets: PSNR on luma in dB, ``scale`` border pixels cut. Shown beside our own
numbers on the same set only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["SAME", "published"]

SAME: Final = 0.05
"""dB that bicubic may be off the published one: what says that the pictures, and how they are made small and measured, are those."""

_SETS: Final = {
    "set5": ("Set5", 5),
    "set14": ("Set14", 14),
    "b100": ("B100", 100),
    "bsd100": ("B100", 100),
    "urban100": ("Urban100", 100),
}
_ORDER: Final = ("Set5", "Set14", "B100", "Urban100")

_PSNR: Final[Mapping[int, Mapping[str, tuple[float, float, float, float]]]] = MappingProxyType({
    2: {
        "bicubic": (33.66, 30.24, 29.56, 26.88),
        "VDSR float": (37.53, 33.05, 31.90, 30.77),
        "VDSR DoReFa 1/1": (34.70, 31.22, 30.25, 28.25),
        "VDSR BAM 1/1": (36.60, 32.41, 31.32, 29.43),
        "VDSR IR-Net 1/1": (36.94, 32.64, 31.47, 29.80),
        "VDSR BTM 1/1": (37.06, 32.72, 31.53, 29.96),
    },
    3: {
        "bicubic": (30.39, 27.55, 27.21, 24.46),
        "VDSR float": (33.66, 29.77, 28.82, 27.14),
        "VDSR DoReFa 1/1": (31.79, 28.68, 27.98, 25.53),
        "VDSR BAM 1/1": (32.52, 29.17, 28.29, 26.07),
        "VDSR IR-Net 1/1": (32.88, 29.40, 28.43, 26.30),
        "VDSR BTM 1/1": (33.07, 29.53, 28.50, 26.41),
    },
    4: {
        "bicubic": (28.42, 26.00, 25.96, 23.14),
        "VDSR float": (31.35, 28.01, 27.29, 25.18),
        "VDSR DoReFa 1/1": (29.39, 26.79, 26.45, 23.81),
        "VDSR BAM 1/1": (30.31, 27.46, 26.83, 24.38),
        "VDSR IR-Net 1/1": (30.66, 27.62, 26.93, 24.56),
        "VDSR BTM 1/1": (30.83, 27.76, 27.03, 24.73),
    },
})  # fmt: skip
"""Scale -> network -> PSNR on the sets in `_ORDER`. VDSR: Kim et al., CVPR 2016; below it its published binary forms."""


def published(folder: str, images: int, scale: int, psnr_bicubic: float) -> tuple[str, dict[str, float]] | None:
    """A standard set's name, and what papers report on it; None where these are not its pictures.

    Args:
        folder: the folder's name.
        images: how many pictures are in it.
        scale: 2, 3 or 4.
        psnr_bicubic: mean PSNR of bicubic as measured there.
    """
    name, count = _SETS.get(folder.lower(), ("", 0))
    if not name or images != count or scale not in _PSNR:
        return None
    at = _ORDER.index(name)
    rows = {network: values[at] for network, values in _PSNR[scale].items()}
    return (name, rows) if abs(rows["bicubic"] - psnr_bicubic) <= SAME else None
