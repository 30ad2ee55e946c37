"""Classification: cross-entropy, accuracy, confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train.layers import constant_weights
from lowbit.train.tasks import TASKS
from lowbit.train.tasks.base import Task

if TYPE_CHECKING:
    from lowbit.train.recipe import Recipe
    from lowbit.train.rundir import InputSpec

__all__ = ["Classify"]


CONFUSION_CLASSES = 100
"""With more classes a confusion matrix is not kept: nobody reads it, and run.json would have megabytes of it."""


@TASKS.register("classify")
class Classify(Task):
    """Cross-entropy over ``classes``, with optional label smoothing.

    Args:
        classes: number of classes.
        label_smoothing: share of each target that is spread over all classes; evaluation is without it.
    """

    metric = "accuracy"

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes = classes
        self.label_smoothing = label_smoothing

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        if recipe.train.loss not in ("auto", "cross_entropy"):
            raise ValueError(f"train.loss: {recipe.train.loss} is for pictures; task classify has cross_entropy")

    @classmethod
    def of(cls, recipe: Recipe, spec: InputSpec) -> Classify:
        if not spec.classes:
            raise ValueError(f"data {recipe.data.name!r} has no classes: it is for task superres, not classify")
        return cls(len(spec.classes), recipe.train.label_smoothing)

    def output_shape(self, spec: InputSpec) -> tuple[tuple[int, ...], str]:
        return (len(spec.classes),), "one number for each class; an argument named `classes` is filled in"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().argmax(1) == targets).sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """``loss`` (mean), ``accuracy``, ``top5`` (0 to 1), ``images``, ``confusion``: rows are truth, columns the answer.

        ``top5`` is None with five classes or fewer, ``confusion`` with more than 100.

        Raises:
            ValueError: there are no images.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        loss = torch.zeros((), dtype=torch.float64, device=device)
        confusion = torch.zeros(self.classes * self.classes, dtype=torch.int64, device=device)
        near = torch.zeros((), dtype=torch.int64, device=device)
        count = 0
        with torch.autocast(device.type, enabled=False), constant_weights(model):
            for images, labels in batches:
                count += len(labels)
                labels = labels.to(device)
                logits = model(images.to(device)).float()
                loss += F.cross_entropy(logits, labels, reduction="sum").double()
                if self.classes > 5:
                    near += (logits.topk(5, dim=1).indices == labels[:, None]).sum()
                cell = labels * self.classes + logits.argmax(1)
                confusion += torch.bincount(cell, minlength=self.classes**2)
        if not count:
            raise ValueError("there are no images to evaluate on")
        table = confusion.view(self.classes, self.classes)
        return {
            "accuracy": int(table.diagonal().sum()) / count,
            "top5": int(near) / count if self.classes > 5 else None,
            "loss": float(loss) / count,
            "images": count,
            "confusion": table.tolist() if self.classes <= CONFUSION_CLASSES else None,
        }
