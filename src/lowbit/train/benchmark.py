"""What a low-bit training step costs beside one of another method, and the networks that ``python -m lowbit.bench`` times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from lowbit.bench.measure import alternate, pinned
from lowbit.graph import Graph
from lowbit.train.batchnorm import calibrate_batchnorm
from lowbit.train.freeze import freeze
from lowbit.train.network import build_network
from lowbit.train.prepare import auxiliary_loss, parameter_groups
from lowbit.train.recipe import parse_recipe
from lowbit.train.rundir import InputSpec
from lowbit.train.schedule import Schedule


@dataclass(frozen=True)
class Network:
    """A registered model at the size it is known for."""

    model: str
    side: int
    channels: int = 3
    classes: int = 10
    arguments: dict[str, Any] = field(default_factory=dict)
    stream: str = "float16"


NETWORKS: Final = {
    "Bi-Real ResNet-18, 224x224": Network("bireal_resnet18", 224, classes=1000),
    "ResNet-20, CIFAR": Network("resnet20", 32),
    "VGG-Small, CIFAR": Network("vgg_small", 32, arguments={"nonlinearity": "none"}, stream="float32"),
    "the demo's network": Network("bireal_resnet14", 28, channels=1, arguments={"nonlinearity": "prelu"}),
}
"""Whole networks that are timed, the first one also with two threads and for what loading costs."""


def network_graph(name: str) -> Graph:
    """A network of `NETWORKS`, SLB W1A1 with 8-bit first convolution and shortcuts and a float16 stream (VGG-Small has none), as a Graph.

    Its weights are random, its statistics those of one batch of random images: speed does not depend on them.
    """
    network = NETWORKS[name]
    recipe = parse_recipe(
        {
            "name": "bench",
            "model": {"name": network.model, **network.arguments},
            "data": {"name": "fashion_mnist"},  # not read
            "quantize": {
                "method": "slb",
                "weight_bits": 1,
                "activation_bits": 1,
                "edges": "int8",
                "residual_dtype": network.stream,
            },
        }
    )
    classes = tuple(map(str, range(network.classes)))
    spec = InputSpec(network.channels, network.side, network.side, (118,) * network.channels, 1 / 64, classes)
    model = build_network(recipe, spec)
    shape = (4, network.channels, network.side, network.side)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.train()
        calibrate_batchnorm(model, [x])
        model(x)  # the 8-bit activations measure their range
        calibrate_batchnorm(model, [x])
    return freeze(model.eval(), x[:1])


def bench_training_step(
    repeats: int = 20, batch_size: int = 50, threads: int = 1, method: str = "slb", reference: str = "float"
) -> dict[str, Any]:
    """One training step of the demo's network (forward, backward, SGD, temperature, the method's own loss) with 1-bit
    weights and activations, beside the same step with another method. They alternate, so that both see the same machine.

    Args:
        repeats: samples of each.
        batch_size: images in a step.
        threads: of PyTorch.
        method: of the step that is measured.
        reference: of the step it is measured against; "float" is the same network in float32.

    Returns:
        `ours` is the step of `method`, `theirs` that of `reference`, `slowdown` ours / theirs of the medians.
    """
    spec = InputSpec(1, 28, 28, (73,), 1 / 90, tuple(map(str, range(10))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (batch_size, 1, 28, 28), generator=generator, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch_size,), generator=generator)

    def step_of(method: str) -> Callable[[], None]:
        bits, edges, stream = (32, "float", "float32") if method == "float" else (1, "int8", "float16")
        recipe = parse_recipe(
            {
                "name": "bench",
                "model": {"name": "bireal_resnet14", "nonlinearity": "prelu"},
                "data": {"name": "fashion_mnist"},
                "quantize": {
                    "method": method,
                    "weight_bits": bits,
                    "activation_bits": bits,
                    "edges": edges,
                    "residual_dtype": stream,
                },
            }
        )
        model = build_network(recipe, spec).train()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = parameter_groups(model, lr=1e-3, weight_decay=0.0, latent_lr_scale=10.0, latent_weight_decay=0.0)
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, fused=True)
        schedule = Schedule(model, total_steps=1000)

        def step() -> None:
            schedule.step(100)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y) + auxiliary_loss(model)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    one, other = step_of(method), step_of(reference)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pinned(threads):
            found = alternate(one, other, repeats)
    finally:
        torch.set_num_threads(before)
    return {
        "step": f"bireal_resnet14, batch {batch_size}",
        "method": method,
        "reference": reference,
        "threads": threads,
        **asdict(found),
        "slowdown": found.ours.median / found.theirs.median,
        "warnings": found.warnings(f"training step, {method} beside {reference}"),
    }
