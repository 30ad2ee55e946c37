"""What the trainer asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Task"]


class Task(ABC):
    """Loss and score of one kind of problem.

    Attributes:
        metric: name of the score that the best network is chosen by; larger is better.
    """

    metric: str

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar to minimise, without the method's own terms (``auxiliary_loss``)."""

    @abstractmethod
    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum of the score over a batch, as a tensor: ``score / images`` is the metric. Detached."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, Any]:
        """Loss, metric and what else belongs in run.json, of a network that is in evaluation already.

        ``batches`` gives inputs and targets (``DataSource.evaluation``) and is gone through once. Runs in float32, outside
        autocast, on the device of the network.
        """
