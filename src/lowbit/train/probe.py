"""What is known of a recipe before it is trained: how fast its network is on the engine, its bytes, and how long training takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.bench.layers import example
from lowbit.bench.measure import Timing, pinned, timed
from lowbit.graph import Graph
from lowbit.packfile import dumps
from lowbit.runtime import load
from lowbit.train.data import Augment, DataSource
from lowbit.train.export import CROP
from lowbit.train.freeze import freeze
from lowbit.train.module import calibrate
from lowbit.train.network import build_network
from lowbit.train.prepare import auxiliary_loss
from lowbit.train.recipe import Recipe
from lowbit.train.rundir import InputSpec
from lowbit.train.tasks import TASKS

__all__ = ["Speed", "probe_speed", "probe_training"]

SAMPLES: Final = 60
STEPS: Final = 4
"""Training steps that are timed, after one that is not."""
STARTING: Final = 6.0
"""Seconds that a training process takes to begin and to end."""


@dataclass(frozen=True)
class Speed:
    """Of a network with random weights, which its speed and size do not depend on.

    Attributes:
        seconds: of one call for one input, on one thread: the 10th percentile of the samples, because others train on this machine
            meanwhile and can only add to it. Of super-resolution an input of 64 x 64.
        file_bytes: of the .lowbit file, without its names.
    """

    seconds: float
    file_bytes: int


def probe_speed(recipe: Recipe, spec: InputSpec) -> Speed:
    """Build, freeze and time the recipe's network.

    Raises:
        RecipeError: it can't be built. FreezeError: it can't be exported.
    """
    graph = _graph(recipe, spec)
    engine = load(graph, threads=1)
    x = example(engine, 1)
    with pinned(1):
        sample = timed(lambda: engine(x))
        seconds = Timing.of([sample() for _ in range(SAMPLES)]).p10
    return Speed(seconds, len(dumps(graph)))


def _graph(recipe: Recipe, spec: InputSpec) -> Graph:
    model = build_network(recipe, spec)
    generator = torch.Generator().manual_seed(0)
    if spec.classes:
        shape = (4, spec.channels, spec.height, spec.width)
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        x = torch.rand(4, spec.channels, CROP, CROP, generator=generator)
    with torch.no_grad():
        if any(isinstance(m, _BatchNorm) for m in model.modules()):
            calibrate(model, recipe, [x])
        model.train()
        model(x)  # 8-bit activations measure their range
        calibrate(model, recipe, [x])
    return freeze(model.eval(), x[:1])


def probe_training(recipe: Recipe, data: DataSource, teacher: Recipe | None = None) -> float:
    """Seconds that the training takes on one thread: a few steps of it, timed, and one batch of an evaluation.

    Args:
        recipe: what to train. It starts from random weights here, whatever it starts from.
        data: its data.
        teacher: the recipe of the network that teaches it.
    """
    t, spec = recipe.train, InputSpec.of(data)
    model = build_network(recipe, spec).train()
    if t.channels_last:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    teaching = None if teacher is None else build_network(teacher, spec).eval()
    task = TASKS.get(recipe.task).of(recipe, spec)
    augment = Augment(**recipe.data.augment.model_dump())
    batches = data.batches(t.batch_size, part="train", seed=recipe.seed, augment=augment, workers=0)
    x, y = next(iter(batches))
    if t.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    images, _ = next(iter(data.evaluation("val", t.eval_batch_size, workers=0)))

    def step() -> None:
        loss = task.loss(model(x), y) + auxiliary_loss(model)
        if teaching is not None:
            with torch.no_grad():
                teaching(x)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            parameter.grad = None

    steps = len(batches) * t.epochs
    shown = max(1, data.count("val"))
    # calibration and evaluation read as many images
    evaluations = 2 * shown / len(images) * (t.epochs / t.validate_every + 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training = _median_seconds(step, STEPS)
        evaluating = _median_seconds(lambda: _forward(model, images), 2)
    finally:
        torch.set_num_threads(before)
    return STARTING + 1.1 * steps * training + evaluations * evaluating


@torch.no_grad()
def _forward(model: nn.Module, images: Tensor) -> None:
    model.eval()(images)


def _median_seconds(run: Callable[[], None], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
