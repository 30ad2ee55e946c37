"""Quantizers: one file per method, one line in a registry of `base`."""

from lowbit.train.quantizers.base import (
    ACTIVATIONS,
    WEIGHTS,
    ActivationQuantizer,
    Encoded,
    QuantizerWarning,
    WeightQuantizer,
)

__all__ = ["ACTIVATIONS", "WEIGHTS", "ActivationQuantizer", "Encoded", "QuantizerWarning", "WeightQuantizer"]
