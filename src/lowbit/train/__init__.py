"""Training: low-bit layers for any nn.Module, and the way from there to a Graph. Needs the extra ``lowbit[train]``."""

from lowbit.train.batchnorm import (
    HardBatchNorm1d,
    HardBatchNorm2d,
    StateBatchNorm1d,
    StateBatchNorm2d,
    calibrate_batchnorm,
    update_state_batchnorm,
)
from lowbit.train.freeze import FreezeError, freeze
from lowbit.train.layers import Pixels, QuantConv2d, QuantLinear, Residual, set_hard
from lowbit.train.prepare import FlipCounter, auxiliary_loss, parameter_groups, prepare, weight_statistics
from lowbit.train.resize import ResizeBicubic, resize_bicubic
from lowbit.train.schedule import Schedule, published_growth

__all__ = [
    "FlipCounter",
    "FreezeError",
    "HardBatchNorm1d",
    "HardBatchNorm2d",
    "Pixels",
    "QuantConv2d",
    "QuantLinear",
    "Residual",
    "ResizeBicubic",
    "Schedule",
    "StateBatchNorm1d",
    "StateBatchNorm2d",
    "auxiliary_loss",
    "calibrate_batchnorm",
    "freeze",
    "parameter_groups",
    "prepare",
    "published_growth",
    "resize_bicubic",
    "set_hard",
    "update_state_batchnorm",
    "weight_statistics",
]
