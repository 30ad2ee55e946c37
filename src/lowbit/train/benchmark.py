"""What a low-bit training step costs beside a float one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lowbit.bench import alternate, pinned
from lowbit.train.prepare import parameter_groups
from lowbit.train.recipe import parse_recipe
from lowbit.train.rundir import InputSpec
from lowbit.train.schedule import Schedule
from lowbit.train.trainer import build_network


def bench_training_step(repeats: int = 20, batch_size: int = 50, threads: int = 1) -> dict[str, Any]:
    """One training step of the demo's network (forward, backward, SGD, temperature): SLB with 1-bit weights and
    activations beside the same network in float32.

    `ours` is the SLB step, `theirs` the float step, `slowdown` ours / theirs.
    """
    spec = InputSpec(1, 28, 28, (73,), 1 / 90, tuple(map(str, range(10))))
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (batch_size, 1, 28, 28), generator=generator, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (batch_size,), generator=generator)

    def step_of(quantize: dict[str, Any]) -> Callable[[], None]:
        recipe = parse_recipe(
            {
                "name": "bench",
                "model": {"name": "bireal_resnet14", "nonlinearity": "prelu"},
                "data": {"name": "fashion_mnist"},
                "quantize": quantize,
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
            cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    slb = step_of({"method": "slb", "weight_bits": 1, "activation_bits": 1, "residual_dtype": "float16"})
    plain = step_of({"method": "float", "weight_bits": 32, "activation_bits": 32, "edges": "float"})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pinned(threads):
            found = alternate(slb, plain, repeats)
    finally:
        torch.set_num_threads(before)
    return {
        "step": f"bireal_resnet14, batch {batch_size}",
        "threads": threads,
        **asdict(found),
        "slowdown": found.ours.median / found.theirs.median,
        "warnings": found.warnings("training step"),
    }
