"""Batch norms of the hard network: evaluation as the Graph does it, calibration, and the two-statistics state batch norm.

The statistics of W_c * x (training) and W_q * x (inference) differ, so a network trained with W_c and run with W_q is off
(SLB, 2009.08695). Calibration re-measures them with hard weights; `StateBatchNorm1d` and `StateBatchNorm2d` keep both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.train.layers import constant_weights, set_hard


class _HardBatchNorm(_BatchNorm):
    """Batch normalisation that evaluates as the Graph does: ``y = x * a + b``, the product and the sum rounded to float32 each.

    With a = float32(weight / sqrt(var + eps)) and b = float32(bias - mean * weight / sqrt(var + eps)), per channel, both
    computed in float64. PyTorch's own evaluation fuses the two, so that a threshold right on a number falls to the other side.
    Training mode, and evaluation with `hard` off, are PyTorch's. `prepare` makes one of every BatchNorm1d and 2d.
    """

    hard: bool

    def train(self, mode: bool = True) -> Self:
        self.hard = not mode
        return super().train(mode)

    def hard_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance that the hard network is evaluated with: the buffers themselves."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not self.hard:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        factor, term = fold(*self.hard_statistics(), self.weight, self.bias, self.eps)
        y: Tensor = torch.ops.lowbit.affine(x, factor.float(), term.float())
        return y


class _StateBatchNorm(_HardBatchNorm):
    """State batch normalisation: two sets of running statistics, one affine (SLB, 2009.08695).

    ``running_mean, running_var`` follow the soft network, ``hard_mean, hard_var`` the hard one. Which set a forward pass
    updates (in training mode) or uses (in evaluation) is up to the flag `hard`.
    """

    hard_mean: Tensor
    hard_var: Tensor

    def hard_statistics(self) -> tuple[Tensor, Tensor]:
        return self.hard_mean, self.hard_var

    def forward(self, x: Tensor) -> Tensor:
        if not (self.hard and self.training):
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        momentum = 0.1 if self.momentum is None else self.momentum
        return F.batch_norm(x, self.hard_mean, self.hard_var, self.weight, self.bias, True, momentum, self.eps)


class HardBatchNorm1d(_HardBatchNorm, nn.BatchNorm1d):
    __doc__ = _HardBatchNorm.__doc__


class HardBatchNorm2d(_HardBatchNorm, nn.BatchNorm2d):
    __doc__ = _HardBatchNorm.__doc__


class StateBatchNorm1d(_StateBatchNorm, nn.BatchNorm1d):
    __doc__ = _StateBatchNorm.__doc__


class StateBatchNorm2d(_StateBatchNorm, nn.BatchNorm2d):
    __doc__ = _StateBatchNorm.__doc__


def hard_batchnorm(norm: _BatchNorm) -> None:
    """Make a BatchNorm1d or BatchNorm2d with running statistics one that evaluates as the Graph does; leave any other alone.

    In place, so that parameters it shares, hooks and requires_grad stay as they are.
    """
    for kind, hard in ((nn.BatchNorm1d, HardBatchNorm1d), (nn.BatchNorm2d, HardBatchNorm2d)):
        if type(norm) is kind and norm.running_mean is not None:
            norm.__class__ = hard
            norm.train(norm.training)


def state_batchnorm(norm: _BatchNorm) -> None:
    """Make a BatchNorm1d or BatchNorm2d the two-statistics norm, in place.

    Raises:
        ValueError: another kind of norm, or one without running statistics.
    """
    for kind, state in ((nn.BatchNorm1d, StateBatchNorm1d), (nn.BatchNorm2d, StateBatchNorm2d)):
        if type(norm) is kind and norm.running_mean is not None:
            assert norm.running_var is not None
            norm.__class__ = state
            norm.register_buffer("hard_mean", norm.running_mean.clone())
            norm.register_buffer("hard_var", norm.running_var.clone())
            norm.train(norm.training)
            return
    what = type(norm).__name__ + (" without running statistics" if norm.running_mean is None else "")
    raise ValueError(f"state_batchnorm replaces BatchNorm1d and BatchNorm2d with running statistics, not {what}")


def fold(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Factor and term of a batch norm in evaluation, float64 (C,): ``(x - mean) / sqrt(var + eps) * weight + bias``."""
    factor = 1 / torch.sqrt(var.double() + eps) if weight is None else weight.double() / torch.sqrt(var.double() + eps)
    term = -mean.double() * factor
    return factor, term if bias is None else bias.double() + term


@torch.library.custom_op("lowbit::affine", mutates_args=())
def _affine(x: Tensor, factor: Tensor, term: Tensor) -> Tensor:
    # an op of its own: a compiler would fuse the two
    dtype, shape = torch.promote_types(x.dtype, torch.float32), (-1, *[1] * (x.ndim - 2))
    return (x.to(dtype) * factor.view(shape)).add_(term.view(shape)).to(x.dtype)


@_affine.register_fake
def _(x: Tensor, *_constants: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_affine(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For those who train with a norm in evaluation mode, its statistics frozen."""
    x, factor = ctx.saved_tensors
    shape, rest = (-1, *[1] * (x.ndim - 2)), [d for d in range(x.ndim) if d != 1]
    wide = grad.float()
    return (wide * factor.view(shape)).to(x.dtype), (wide * x).sum(rest), wide.sum(rest)


_affine.register_autograd(_affine_backward, setup_context=_save_affine)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _hard_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Hard weights everywhere, batch statistics in the norms, everything else as in evaluation."""
    modes = [(m, m.training, getattr(m, "hard", None)) for m in model.modules()]
    model.eval()
    set_hard(model, True)
    for norm in _norms(model):
        norm.training = True
    try:
        yield
    finally:
        for module, training, hard in modes:
            module.training = training
            if hard is not None:
                module.hard = hard


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Re-estimate every batch norm's running statistics with hard weights.

    The running mean and variance become the averages of the batches' own, each with the weight of its size, measured in
    float32 with hard weights (SLB authors' later recipe). One image behind a batch of more counts as a part of that
    batch. Call it before every evaluation; use clean (un-augmented) training images, about as
    many as there are to evaluate on. Gradients, modes and soft statistics of state batch norms are left as they were.

    Args:
        model: a prepared network.
        batches: input tensors.

    Returns:
        How many batches were given.

    Raises:
        ValueError: no batch was given, or one that is no tensor (and the statistics are left as they were).
    """
    if isinstance(batches, Tensor):
        raise ValueError("calibrate_batchnorm takes an iterable of batches, not one tensor: give x.split(100)")
    norms = _norms(model)
    sums: list[tuple[Tensor, Tensor]] = []
    saved: list[tuple[Tensor, Tensor, Tensor | None]] = []
    stats = [_statistics(norm) for norm in norms]
    for norm, (mean, var) in zip(norms, stats, strict=True):
        sums.append((torch.zeros_like(mean), torch.zeros_like(var)))
        counter = norm.num_batches_tracked
        saved.append((mean.clone(), var.clone(), None if counter is None else counter.clone()))
    momenta = [norm.momentum for norm in norms]
    count, first = 0, 0
    weight = 0.0  # in units of the first batch: equal batches are weighted by 1
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    done = False
    try:
        for norm in norms:
            norm.momentum = 1.0
        with _hard_batch_statistics(model), constant_weights(model), torch.autocast(device_type, enabled=False):
            for given, batch in _with_variance(batches):
                model(batch)
                count += given
                first = first or batch.numel()
                share = batch.numel() / first
                weight += share
                for (mean, var), (mean_sum, var_sum) in zip(stats, sums, strict=True):
                    mean_sum.add_(mean, alpha=share)
                    var_sum.add_(var, alpha=share)
        done = count > 0
    finally:
        for i, norm in enumerate(norms):
            norm.momentum = momenta[i]
            (mean, var), (old_mean, old_var, counter) = stats[i], saved[i]
            mean.copy_(sums[i][0] / weight if done else old_mean)
            var.copy_(sums[i][1] / weight if done else old_var)
            if counter is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(counter)
    if not done:
        raise ValueError("calibrate_batchnorm needs at least one batch")
    return count


def _with_variance(batches: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The batches, and how many of those given each is made of: one image that is left over, and may have no variance,
    goes with those before it."""
    count = 0
    held: Tensor | None = None
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise ValueError(
                f"calibrate_batchnorm takes batches of inputs alone, got a {type(batch).__name__}: "
                "for a loader of pairs give (x for x, _ in loader)"
            )
        if held is not None and len(held) > 1 and batch.shape == (1, *held.shape[1:]):
            count, held = count + 1, torch.cat((held, batch))
            continue
        if held is not None:
            yield count, held
        count, held = 1, batch
    if held is not None:
        yield count, held


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    if isinstance(norm, _HardBatchNorm):
        return norm.hard_statistics()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def update_state_batchnorm(model: nn.Module, batch: Tensor) -> None:
    """One step of the paper's state batch norm: a forward pass with hard weights that moves the hard statistics.

    Call it beside each training step of a network prepared with ``state_batchnorm=True``.

    Raises:
        ValueError: the network has no state batch norm.
    """
    if not any(isinstance(m, _StateBatchNorm) for m in model.modules()):
        raise ValueError("the network has no state batch norm; prepare it with state_batchnorm=True")
    soft = [(m, m.training) for m in _norms(model) if not isinstance(m, _StateBatchNorm)]
    with _hard_batch_statistics(model), torch.autocast(batch.device.type, enabled=False):
        for norm, _ in soft:
            norm.training = False
        model(batch)
