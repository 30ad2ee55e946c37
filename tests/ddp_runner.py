"""What one of two processes does for test_distributed.py, which starts them with torchrun: ddp_runner.py FOLDER.

Results lie in FOLDER/same-RANK.pt and FOLDER/errors-RANK.pt. The end is an error, as it should be: status 3.
"""

# ruff: noqa: ARG002
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lowbit.train.data import DataError
from lowbit.train.distributed import RankError
from lowbit.train.recipe import Recipe
from lowbit.train.rundir import RunError
from lowbit.train.trainer import train
from test_trainer import Stop, recipe  # registers the data set, too

METHODS = ("sign", "slb", "lns")
STEPS = 10


class Own(nn.Module):
    """A model of anybody's own: its first batch sets a parameter, each process to something else, and one layer is not used."""

    def __init__(self, classes: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, classes)
        self.unused = nn.Linear(blocks, 2)
        self.scale = nn.Parameter(torch.ones(()))
        self.fresh = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        if self.training and self.fresh:
            self.scale.data.copy_(x[:, 0, :3].abs().mean())
            self.fresh = False
        return self.head((x * self.scale).relu().mean((2, 3)))


def untried() -> Any:
    """Without the trial export before training: it takes longer than the training here, and is tested elsewhere."""
    return mock.patch("lowbit.train.trainer._try_out", return_value=[])


class Recorder(Callback):
    """Losses of every forward pass, and the gradients of the first step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


class Broken(Callback):
    """An image that only this process comes upon."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module._data.found_broken.append(f"{trainer.global_rank}.jpeg")


def equal_recipe(method: str, start: Path, **changes: Any) -> Recipe:
    """Float edges: the 8-bit ones measure the range of their inputs, batch after batch, each process its own."""
    more = {"train__start_from": str(start)} if method == "lns" else {}
    return recipe(
        quantize__method=method, quantize__edges="float", train__epochs=2, train__batch_size=18, **more, **changes
    )


def recorded(made: Recipe, run_dir: Path, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    recorder = Recorder()
    with untried():
        result = train(made, run_dir, callbacks=[recorder, *callbacks], **options)
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "state": result.model.state_dict(),
        "run": result.run,
    }


def same(folder: Path) -> dict[str, Any]:
    """Train, each method; and once more, interrupted and resumed."""
    found: dict[str, Any] = {m: recorded(equal_recipe(m, folder / "one-sign"), folder / f"two-{m}") for m in METHODS}
    made = recipe(train__epochs=2)  # with 8-bit edges
    found["whole"] = recorded(made, folder / "two-whole")
    try:
        train(made, folder / "two-cut", callbacks=[Stop(1, ValueError("power cut"))])
    except (ValueError, RankError) as error:  # whichever process is first
        assert "power cut" in str(error)  # noqa: PT017
    found["resumed"] = recorded(made, folder / "two-cut", resume=True)
    # statistics, and steps that the first batch sets, differ between the processes until they are made equal
    lsq = recipe(
        quantize__method="lsq", quantize__weight_bits=2, quantize__activation="lsq", quantize__activation_bits=2,
        quantize__state_batchnorm=True, train__epochs=1,
    )  # fmt: skip
    found["lsq"] = recorded(lsq, folder / "two-lsq")
    found["own"] = recorded(recipe(model__name="ddp_runner:Own", train__epochs=1), folder / "two-own", Broken())
    return found


def errors(folder: Path) -> None:
    """Four starts that all processes refuse, then one process that breaks in the middle of an epoch."""
    rank = int(os.environ["RANK"])

    def refusal(made: Recipe, **options: Any) -> tuple[str, str, bool]:
        try:
            train(made, folder / "refused", **options)
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "told", False)
        return "nothing", "", False

    found = {
        "recipes": refusal(recipe(train__lr=0.1 * (rank + 1), model__width=4 + rank)),
        "resume": refusal(recipe(), resume=True),
        "devices": refusal(recipe(train__devices=3)),
    }
    if rank == 1:
        import lowbit.train.trainer as trainer

        def broken(_: Recipe) -> None:
            raise DataError("images.bin: is cut short")

        load, trainer.load_data = trainer.load_data, broken
    found["data"] = refusal(recipe())
    if rank == 1:
        trainer.load_data = load
    assert not (folder / "refused").exists()
    torch.save(found, folder / f"errors-{rank}.pt")
    stop = [Stop(1, RunError("images.bin: gone"))] if rank == 1 else []
    try:
        train(recipe(), folder / "broken", callbacks=stop)
    except RunError as error:
        found["epoch"] = type(error).__name__, str(error), isinstance(error, RankError)
    torch.save(found, folder / f"errors-{rank}.pt")
    raise SystemExit(3)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    with untried():
        torch.save(same(where), where / f"same-{os.environ['RANK']}.pt")
        errors(where)
