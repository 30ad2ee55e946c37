"""What the trainer asks of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

if TYPE_CHECKING:
    from lowbit.train.recipe import Recipe
    from lowbit.train.rundir import InputSpec

__all__ = ["Task"]


class Task(ABC):
    """Loss and score of one kind of problem.

    Attributes:
        metric: name of the score that the best network is chosen by; larger is better.
    """

    metric: str

    @classmethod
    @abstractmethod
    def check(cls, recipe: Recipe) -> None:
        """Hold a recipe's settings against the task.

        Raises:
            ValueError: a key that is not for this task; the message names it.
        """

    @classmethod
    @abstractmethod
    def of(cls, recipe: Recipe, spec: InputSpec) -> Self:
        """The task of a run.

        Raises:
            ValueError: data of another task.
        """

    @abstractmethod
    def output_shape(self, spec: InputSpec) -> tuple[tuple[int, ...], str]:
        """The shape of a network's output for one input, and what it is in words."""

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
