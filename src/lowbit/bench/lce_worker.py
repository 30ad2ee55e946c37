"""Layers in Larq Compute Engine. Run by `lowbit.bench.lce` with the Python of an environment of its own, which has no lowbit.

Reads a line of JSON with the layers and the threads, builds and checks them, writes a line that says what runs; then, for each line with
a layer's number, writes the seconds of one layer. TensorFlow's own lines go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # Larq is written for Keras 2
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import larq
import larq_compute_engine
import numpy as np
import tensorflow as tf
from larq_compute_engine.tflite.python.interpreter import Interpreter

MODES: dict[str, dict[str, bool]] = {
    "im2col": {},
    "indirect": {"use_indirect_bgemm": True},
    "reference": {"use_reference_bconv": True},
}
"""Its ways to run a binary convolution on x86; the fastest is taken."""


def chain(layer: dict[str, Any], blocks: int) -> Any:
    """`blocks` layers in a row, bits to bits, padded with ones, which is what its fused thresholds need.

    With a stride the chain is one layer of stride 1 and the strided ones behind it.
    """
    x = first = tf.keras.layers.Input((layer["side"], layer["side"], layer["channels"]), batch_size=1)
    for i in range(blocks):
        strided = layer["stride"] > 1 and i > 0
        y = larq.layers.QuantConv2D(
            layer["filters"] if strided else layer["channels"],
            3,
            strides=layer["stride"] if strided else 1,
            padding="same",
            pad_values=1.0,
            input_quantizer="ste_sign",
            kernel_quantizer="ste_sign",
            kernel_constraint="weight_clip",
            use_bias=False,
        )(x)
        y = tf.keras.layers.BatchNormalization()(y)
        x = tf.keras.layers.add([y, x]) if layer["residual"] else y
    return tf.keras.Model(first, x)


class Chains:
    """A short and a long chain of a layer; their difference is what one layer costs inside a network."""

    def __init__(self, layer: dict[str, Any], threads: int) -> None:
        self.more = 1 if layer["stride"] > 1 else 8 if layer["side"] * layer["channels"] <= 1024 else 4
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((1, layer["side"], layer["side"], layer["channels"]), np.float32)
        models = [chain(layer, blocks) for blocks in (1, 1 + self.more)]
        files = [larq_compute_engine.convert_keras_model(model) for model in models]
        modes = {}
        for name, options in MODES.items():
            modes[name] = [Interpreter(file, num_threads=threads, **options) for file in files]
            expected, found = models[0].predict(self.x, verbose=0), modes[name][0].predict(self.x)
            if not np.allclose(expected, found, atol=1e-2 * np.abs(expected).max()):
                raise SystemExit(f"{layer}: Larq Compute Engine ({name}) does not compute what Larq does")
        fastest = {name: min(self._seconds(pair[1], 1) for _ in range(2)) for name, pair in modes.items()}
        self.mode = min(fastest, key=lambda name: fastest[name])
        self.short, self.long = modes[self.mode]

    def _seconds(self, interpreter: Any, calls: int) -> float:
        taken = []
        interpreter.predict(self.x)
        for _ in range(calls):
            start = time.perf_counter()
            interpreter.predict(self.x)
            taken.append(time.perf_counter() - start)
        return min(taken)  # the difference of two long calls: other programs would be in it

    def sample(self) -> float:
        """Seconds of one layer."""
        return max((self._seconds(self.long, 3) - self._seconds(self.short, 3)) / self.more, 1e-9)


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever TensorFlow prints is no answer
    task = json.loads(sys.stdin.readline())
    chains = [Chains(layer, task["threads"]) for layer in task["layers"]]
    packages = {name: version(name) for name in ("larq-compute-engine", "larq", "tensorflow")}
    print(json.dumps({"modes": [c.mode for c in chains], "versions": packages}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(chains[int(line)].sample()), file=answers, flush=True)


if __name__ == "__main__":
    main()
