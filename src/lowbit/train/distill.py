"""Knowledge distillation: a trained network teaches the one that trains. Combines with every method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.train.network import load_trained
from lowbit.train.recipe import DistillConfig
from lowbit.train.rundir import InputSpec, RunError

__all__ = ["Distillation", "distillation_loss", "load_distillation"]


def distillation_loss(outputs: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p || s) with p = softmax(teacher / T), s = softmax(outputs / T), the mean over the batch.

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv 1503.02531). With T = 1 this is the distributional loss
    of ReActNet (Liu et al., ECCV 2020, arXiv 2003.03488), which stands there alone, in place of the cross-entropy with the labels:
    ``weight: 1, temperature: 1``. The authors' code leaves out the teacher's entropy, which has no gradient.

    Args:
        outputs: logits [N, classes] of the network that trains.
        teacher: logits of the teacher, the same shape, without gradient.
        temperature: T.
    """
    p = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    s = F.log_softmax(outputs.float() / temperature, dim=1)
    return F.kl_div(s, p, reduction="batchmean", log_target=True) * temperature**2


@dataclass
class Distillation:
    """(1 - weight) * the task's loss + weight * `distillation_loss`.

    Not a Module, so that the teacher is no part of checkpoints, optimisers or ``train()``.

    Attributes:
        teacher: in evaluation, without gradients.
        weight: share of the teacher.
        temperature: T.
    """

    teacher: nn.Module = field(repr=False)
    weight: float
    temperature: float

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.teacher.to(device)

    def loss(self, x: Tensor, outputs: Tensor, task_loss: Tensor) -> Tensor:
        """The training loss of a batch of raw pixels ``x``, augmented as the network saw them. The teacher runs in float32."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            answers = self.teacher(x)
        return (1 - self.weight) * task_loss + self.weight * distillation_loss(outputs, answers, self.temperature)


def load_distillation(config: DistillConfig, spec: InputSpec) -> Distillation:
    """The recipe's teacher, built by its own recipe.

    Args:
        config: the recipe's section ``train.distill``.
        spec: what the network that trains reads and answers.

    Raises:
        RunError: no such run or checkpoint, or a teacher of other classes or other images.
    """
    what = "train.distill.teacher"
    found = load_trained(config.teacher, what)
    theirs, ours = ((s.channels, s.height, s.width) for s in (found.spec, spec))
    if theirs != ours:
        raise RunError(
            f"{what}: {config.teacher} reads images of {'x'.join(map(str, theirs))}, this data has {'x'.join(map(str, ours))}"
        )
    if found.spec.classes != spec.classes:
        raise RunError(
            f"{what}: {config.teacher} answers {_listed(found.spec.classes)}, this data has {_listed(spec.classes)}"
        )
    return Distillation(found.model, config.weight, config.temperature)


def _listed(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
