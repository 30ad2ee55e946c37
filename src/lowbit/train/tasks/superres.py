"""Super-resolution: PSNR and SSIM on luma as the field measures them, beside bicubic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lowbit.train.data.superres import Pair
from lowbit.train.layers import constant_weights
from lowbit.train.resize import resize_bicubic
from lowbit.train.tasks import TASKS
from lowbit.train.tasks.base import Task

if TYPE_CHECKING:
    from lowbit.train.recipe import Recipe
    from lowbit.train.rundir import InputSpec

__all__ = ["SuperRes", "compare", "means", "psnr", "ssim"]

Luma = NDArray[np.float32]

MSE_FLOOR = 1e-7
"""Of a patch in training, 70 dB: a patch of one colour is not infinitely good."""


def _measured(y: Luma, border: int) -> NDArray[np.float64]:
    """What the metrics look at: rounded to 8 bits, without its border, in 0..1."""
    inner = y[border : y.shape[0] - border, border : y.shape[1] - border]
    return np.rint(np.clip(inner, 0, 1) * np.float32(255)).astype(np.float64) / 255


def psnr(y: Luma, target: Luma, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(1 / mean (y - target)^2), at most 100: pictures that are equal leave means finite.

    Both are clipped to 0..1 and rounded to 8 bits first, and ``border`` pixels cut off each side, as the code of SRCNN and VDSR does.

    Args:
        y, target: float32 (H, W), luma in 0..1.
        border: pixels that are left out on each side; the scale.
    """
    mse = float(np.mean((_measured(y, border) - _measured(target, border)) ** 2))
    return float(-10 * np.log10(max(mse, 1e-10)))


def ssim(y: Luma, target: Luma, border: int = 0) -> float:
    """Structural similarity (Wang et al., IEEE TIP 13(4), 2004), the mean over the picture, as there: a Gaussian window of
    sigma 1.5, 11 x 11; K1 0.01, K2 0.03; means and variances weighted by the window. Rounded and cut as in `psnr`.
    """
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(  # type: ignore[no-untyped-call]
            _measured(y, border),
            _measured(target, border),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
    )


def compare(name: str, y: Luma, bicubic: Luma, target: Luma, scale: int) -> dict[str, Any]:
    """One picture: ``name, width, height`` (of the large one), ``psnr, ssim, psnr_bicubic, ssim_bicubic``."""
    return {
        "name": name,
        "width": int(target.shape[1]),
        "height": int(target.shape[0]),
        "psnr": psnr(y, target, scale),
        "ssim": ssim(y, target, scale),
        "psnr_bicubic": psnr(bicubic, target, scale),
        "ssim_bicubic": ssim(bicubic, target, scale),
    }


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``psnr, ssim, psnr_bicubic, ssim_bicubic`` (means over pictures), ``gain`` (mean dB over bicubic), ``smallest_gain``,
    ``images`` (their number) and ``pictures`` (the rows).

    Raises:
        ValueError: there are no pictures.
    """
    if not rows:
        raise ValueError("there are no pictures to evaluate on")
    found: dict[str, Any] = {
        key: fmean(row[key] for row in rows) for key in ("psnr", "ssim", "psnr_bicubic", "ssim_bicubic")
    }
    found["gain"] = found["psnr"] - found["psnr_bicubic"]
    found["smallest_gain"] = min(row["psnr"] - row["psnr_bicubic"] for row in rows)
    return {**found, "images": len(rows), "pictures": list(rows)}


@TASKS.register("superres")
class SuperRes(Task):
    """Mean error of luma patches; PSNR and SSIM of whole pictures.

    Args:
        scale: how much larger the output is.
        loss: "l1", "mse" or "patch", see ``TrainConfig``.
    """

    metric = "psnr"

    def __init__(self, scale: int, loss: str = "l1") -> None:
        self.scale = scale
        self._loss = loss

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.train.loss == "cross_entropy":
            raise ValueError("train.loss: cross_entropy is for classes; task superres has l1, mse and patch")
        if recipe.train.label_smoothing:
            raise ValueError("train.label_smoothing belongs to task classify, not superres")

    @classmethod
    def of(cls, recipe: Recipe, spec: InputSpec) -> SuperRes:
        if spec.classes:
            raise ValueError(f"data {recipe.data.name!r} has classes: it is for task classify, not superres")
        return cls(spec.upscale, "l1" if recipe.train.loss == "auto" else recipe.train.loss)

    def output_shape(self, spec: InputSpec) -> tuple[tuple[int, ...], str]:
        shape = (1, spec.upscale * spec.height, spec.upscale * spec.width)
        return shape, "the larger luma; an argument named `upscale` is filled in"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        outputs = outputs.float()
        if self._loss == "l1":
            return F.l1_loss(outputs, targets)
        mse = F.mse_loss(outputs, targets)
        return mse if self._loss == "mse" else mse * (targets[0].numel() / 2)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the patches' PSNR, at most 70 dB each."""
        mse = (outputs.detach().float() - targets).square().flatten(1).mean(1)
        return (-10 * torch.log10(mse.clamp(min=MSE_FLOOR))).sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """What `means` gives, of whole pictures, and ``loss``, the mean over pictures.

        Raises:
            ValueError: there are no pictures.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        rows: list[dict[str, Any]] = []
        losses = []
        with torch.autocast(device.type, enabled=False), constant_weights(model):
            for pair in batches:
                low, high = pair[0].to(device), pair[1].to(device)
                out = model(low).float()
                losses.append(float(self.loss(out, high)))
                name = pair.name if isinstance(pair, Pair) else str(len(rows))
                y, bicubic, target = (x[0, 0].cpu().numpy() for x in (out, resize_bicubic(low, self.scale), high))
                rows.append(compare(name, y, bicubic, target, self.scale))
        return {**means(rows), "loss": fmean(losses)}
