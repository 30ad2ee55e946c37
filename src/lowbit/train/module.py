"""The Lightning module: one training step, one epoch's end, and what a checkpoint of it holds."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.train.batchnorm import calibrate_batchnorm, update_state_batchnorm
from lowbit.train.data import DataSource
from lowbit.train.distill import Distillation
from lowbit.train.distributed import ALONE, Ranks
from lowbit.train.layers import quantized_layers
from lowbit.train.prepare import (
    FlipCounter,
    auxiliary_loss,
    mapping_parameters,
    parameter_groups,
    weight_statistics,
)
from lowbit.train.recipe import Recipe
from lowbit.train.rundir import InputSpec, RunError, write_checkpoint, write_metrics
from lowbit.train.schedule import Schedule
from lowbit.train.tasks import Task

__all__ = ["TrainingModule", "calibrate", "lr_factor", "network_checkpoint"]

_log = logging.getLogger("lowbit.train")


def calibrate(model: nn.Module, recipe: Recipe, batches: Iterable[Tensor]) -> None:
    """BN statistics of the hard network, on clean images; the two-statistics state BN keeps its own."""
    if recipe.quantize.state_batchnorm or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return
    device = next(model.parameters()).device
    calibrate_batchnorm(model, (batch.to(device) for batch in batches))


def lr_factor(recipe: Recipe, steps_per_epoch: int, step: int) -> float:
    """What the learning rate is multiplied with at a step."""
    t = recipe.train
    total, warm = t.epochs * steps_per_epoch, t.warmup * steps_per_epoch
    factor = 1.0
    u = min(max((step - warm) / max(total - warm, 1), 0.0), 1.0)
    if t.lr_schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * u))
    elif t.lr_schedule == "linear":
        factor = 1 - u
    elif t.lr_schedule == "step":
        factor = t.gamma ** sum(step >= m * steps_per_epoch for m in t.milestones)
    return min(factor, (step + 1) / warm) if step < warm else factor


class TrainingModule(L.LightningModule):
    """One step, one epoch's end; everything else is Lightning's.

    Of several processes each normalises with its own batches' statistics (as each of ``train.accumulate`` forward passes does);
    at an epoch's end the running statistics are averaged, rank 0 calibrates, evaluates and writes, and the others take over
    its statistics. A step is one of the optimiser throughout.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        task: Task,
        data: DataSource,
        calibration: Iterable[Tensor],
        run_dir: Path,
        teacher: Distillation | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.task = model, recipe, task
        self._data, self._calibration, self.run_dir = data, calibration, run_dir
        self._teacher, self._ranks = teacher, ranks
        mapping = {id(p) for p in mapping_parameters(model)}
        self._still = [p for p in model.parameters() if id(p) not in mapping]
        self.steps_per_epoch = 1
        self.schedule: Schedule | None = None
        self.flips = FlipCounter(model)
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.after_epoch: Callable[[], None] = lambda: None
        self._state_bn = recipe.quantize.state_batchnorm
        self._channels_last = recipe.train.channels_last
        self._by_step = recipe.schedule.every == "step"
        self._equal = ranks.world_size == 1

    def configure_optimizers(self) -> Any:
        t = self.recipe.train
        groups = parameter_groups(
            self.model,
            lr=t.lr,
            weight_decay=t.weight_decay,
            latent_lr_scale=t.latent_lr_scale,
            latent_weight_decay=t.latent_weight_decay,
            mapping_lr_scale=t.mapping_lr_scale,
        )
        # clipping scales gradients before the step; one fused kernel a group is the fastest on CPU and GPU
        optimizer: torch.optim.Optimizer
        if t.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=t.lr, momentum=t.momentum, fused=True)
        elif t.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, lr=t.lr, fused=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=t.lr, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(self.recipe, self.steps_per_epoch, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)
        s, t = self.recipe.schedule, self.recipe.train
        total = t.epochs * (self.steps_per_epoch if self._by_step else 1)
        self.schedule = Schedule(
            self.model,
            total_steps=total,
            every=s.every,
            growth=s.total_growth(t.epochs),
            kind=s.kind,
            start=s.start,
            end=s.end,
        )

    def on_train_epoch_start(self) -> None:
        # a network with random parts of its own draws the same numbers whether it was resumed or not
        key = (self.recipe.seed, self.current_epoch, self._ranks.rank)
        state = np.random.SeedSequence(key[: 2 + (key[2] > 0)]).generate_state(1)[0]
        torch.manual_seed(int(state))
        self.model.train()
        self._loss = torch.zeros((), device=self.device)
        self._score = torch.zeros((), device=self.device)
        self._aux: Tensor | None = None
        self._ratio: float | None = None
        self._batches = self._images = 0
        self._clock = time.perf_counter()
        if not self._by_step and self.schedule is not None:
            self.schedule.step(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if self._by_step and self.schedule is not None:
            self.schedule.step(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self._channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        outputs = self.model(x)
        loss = self.task.loss(outputs, y)
        if self._teacher is not None:
            loss = self._teacher.loss(x, outputs, loss)
        self._loss += loss.detach()
        self._score += self.task.score(outputs, y)
        self._images += len(y)
        self._batches += 1
        if self._state_bn:
            update_state_batchnorm(self.model, x)
        aux = auxiliary_loss(self.model)
        if aux.requires_grad:
            self._aux = aux.detach() + (0 if self._aux is None else self._aux)
            if batch_idx == 0:
                self._ratio = _gradient_ratio(self.model, aux, loss)
        return loss + aux

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        if (
            not self._equal
        ):  # a parameter that its first batch sets (LSQ) has been set to something else by each process
            self._ranks.average(self.model.parameters())
            self._equal = True
        if self.global_step < round(self.recipe.train.warm_start * self.steps_per_epoch):
            for parameter in self._still:  # without a gradient neither momentum nor decay moves it
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.recipe.train.grad_clip_by == "norm" or gradient_clip_val is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for group in optimizer.param_groups:
            if group["lr"] > 0:  # at 0 nothing moves, however large
                torch.nn.utils.clip_grad_value_(group["params"], gradient_clip_val / group["lr"])

    def on_train_epoch_end(self) -> None:
        seconds = time.perf_counter() - self._clock
        recipe, metric, epoch = self.recipe, self.task.metric, self.current_epoch
        weights = weight_statistics(self.model)
        steps = self.steps_per_epoch
        seen = (float(self._loss), float(self._score), float(self._aux or 0), self._batches, self._images)
        loss, score, aux, batches, images = self._ranks.sum(*seen)
        self._equalize()
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.global_step,
            "lr": recipe.train.lr * lr_factor(recipe, steps, self.global_step - 1),
            "train_loss": loss / batches,
            f"train_{metric}": score / images,
            "aux_loss": None if self._aux is None else aux / batches,
            "gap": weights.gap,
            "temperature": weights.temperature,
            "noisy_gradient_ratio": self._ratio,
            **self.flips.update(),
            "images_per_second": images / seconds,
            "seconds": seconds,
        }
        if not math.isfinite(row["train_loss"]):
            raise RunError(f"epoch {epoch + 1}: the training loss is {row['train_loss']}; try a lower train.lr")
        last = epoch + 1 == recipe.train.epochs
        if not recipe.train.final and (last or (epoch + 1) % recipe.train.validate_every == 0):
            found = self._evaluate()
            row["val_loss"], row[f"val_{metric}"] = found["loss"], found[metric]
            if not self.best or found[metric] > self.best[metric]:
                self.best = {"epoch": epoch + 1, **found}
                if self._ranks.main:
                    write_checkpoint(
                        self.run_dir / "checkpoints" / "best.ckpt",
                        network_checkpoint(self.model, recipe, epoch + 1, self._data),
                    )
        self.rows.append(row)
        if self._ranks.main:
            write_metrics(self.run_dir / "metrics.csv", self.rows, metric)
            self.after_epoch()
        shown = {k: v for k, v in row.items() if v is not None and k not in ("epoch", "step")}
        if self.logger is not None:
            self.logger.log_metrics(shown, step=epoch + 1)
        for key in (f"val_{metric}", "gap"):
            if key in shown:
                self.log(key, shown[key], prog_bar=True, logger=False)
        val = f", val {row[f'val_{metric}']:.4f}" if f"val_{metric}" in row else ""
        _log.info(
            "epoch %d/%d: loss %.4g, train %s %.4f%s, gap %.4f, flips %.4f, %.0f images/s",
            epoch + 1,
            recipe.train.epochs,
            row["train_loss"],
            metric,
            row[f"train_{metric}"],
            val,
            row["gap"],
            row["flips_start"],
            row["images_per_second"],
        )

    def _equalize(self) -> None:
        """The same bits everywhere: running statistics become their mean, and nothing else may differ."""
        if self._ranks.world_size == 1:
            return
        self._ranks.average(self.model.buffers())
        if names := self._ranks.differing(self.model):
            raise RunError(
                f"epoch {self.current_epoch + 1}: the processes' networks have come apart in {', '.join(names[:3])}: a "
                "quantizer or model changes its parameters by itself, or the machines compute differently"
            )

    def _evaluate(self) -> Mapping[str, Any]:
        """Calibrate and evaluate: on rank 0, the others wait and get the result and the statistics."""
        t = self.recipe.train
        found: Mapping[str, Any] = {}
        if self._ranks.main:
            calibrate(self.model, self.recipe, self._calibration)
            self.model.eval()
            try:
                images = self._data.evaluation("val", t.eval_batch_size, workers=t.workers)
                found = self.task.evaluate(self.model, images)
            finally:
                self.model.train()
        found = self._ranks.broadcast(found)
        self._ranks.copy(self.model.buffers())
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lowbit"] = {"flips": self.flips.state_dict(), "rows": self.rows, "best": self.best}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint["lowbit"]
        self.flips.load_state_dict(own["flips"])
        self.rows, self.best = own["rows"], own["best"]


def _gradient_ratio(model: nn.Module, aux: Tensor, loss: Tensor) -> float:
    """Norm of the auxiliary loss's gradient over that of the loss's, with respect to the latents that both reach."""
    latents = [layer.weight for _, layer in quantized_layers(model)]
    pairs = zip(
        torch.autograd.grad(aux, latents, retain_graph=True, allow_unused=True),
        torch.autograd.grad(loss, latents, retain_graph=True, allow_unused=True),
        strict=True,
    )
    both = [(a.float().square().sum(), b.float().square().sum()) for a, b in pairs if a is not None and b is not None]
    return math.sqrt(float(sum(a for a, _ in both)) / max(float(sum(b for _, b in both)), 1e-30))


def network_checkpoint(model: nn.Module, recipe: Recipe, epoch: int, data: DataSource) -> dict[str, Any]:
    """A network alone: what building and running it again takes."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    return {"state_dict": state, "recipe": recipe.plain(), "input": InputSpec.of(data).to_json(), "epoch": epoch}
