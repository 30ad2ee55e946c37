"""One layer of the engine beside ONNX Runtime float32, one thread, side by side: medians of interleaved runs.

    python engine/bench/layers.py                    # 1-bit 3x3, bits to bits and with a float16 residual
    python engine/bench/layers.py --isa avx2 --rounds 50

The engine's times are those of its own fused step (`Engine.profile`), activations in the form the next layer reads.
ONNX Runtime runs Conv -> Relu of the same shape, all optimisations on, one thread, inputs and outputs bound once.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.runtime import load

# name: (input channels, output channels, side, stride)
LAYERS = {
    "64 ch @56": (64, 64, 56, 1),
    "128 ch @28": (128, 128, 28, 1),
    "256 ch @14": (256, 256, 14, 1),
    "512 ch @7": (512, 512, 7, 1),
    "64>128 @56 stride 2": (64, 128, 56, 2),
    "16 ch @32": (16, 16, 32, 1),
    "32 ch @16": (32, 32, 16, 1),
    "64 ch @8": (64, 64, 8, 1),
}


def network(rng: np.random.Generator, layer: tuple[int, int, int, int], residual: bool) -> tuple[Graph, str]:
    """A Graph with that layer in the middle, and the name of the step to time."""
    c, o, side, stride = layer
    sign = {"kind": "bipolar", "bits": 1}
    conv = {"stride": (stride, stride), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}
    out = (side - 1) // stride + 1
    tensors = {
        "w": Tensor(rng.choice([-1, 1], (o, 3, 3, c)), Codes("bipolar", 1)),
        "factor": Tensor(rng.normal(size=o) * 0.05),
        "term": Tensor(rng.normal(size=o)),
        "last": Tensor(rng.choice([-1, 1], (1, 1, 1, o)), Codes("bipolar", 1)),
        "one": Tensor(np.ones(1)),
    }
    nodes = [
        Node("input", "x", attrs={"shape": (side, side, c), "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs=sign),
        Node("conv2d", "c", ("q",), {"weight": "w"}, conv),
        Node("mul", "m", ("c",), {"factor": "factor"}),
        Node("add", "a", ("m",), {"term": "term"}),
    ]
    if residual:
        assert (c, side) == (o, out)
        nodes += [
            Node("cast", "x16", ("x",), attrs={"dtype": "float16"}),
            Node("add", "r", ("a", "x16")),
            Node("cast", "h", ("r",), attrs={"dtype": "float16"}),
            Node("quantize", "q1", ("h",), attrs=sign),
            Node("max_pool", "keep", ("h",), attrs={"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0, 0, 0)}),
        ]
        # the stream's cast comes first, so that the convolution can add it
        nodes[2:2] = [nodes.pop(5)]
        nodes += [Node("mul", "keep1", ("keep",), {"factor": "one"})]
    else:
        nodes += [Node("quantize", "q1", ("a",), attrs=sign)]
    point = {**conv, "stride": (1, 1), "padding": (0, 0, 0, 0)}
    nodes += [Node("conv2d", "c1", ("q1",), {"weight": "last"}, point), Node("mul", "m1", ("c1",), {"factor": "one"})]
    if residual:
        nodes += [Node("concat", "both", ("m1", "keep1")), Node("output", "y", ("both",))]
    else:
        nodes += [Node("output", "y", ("m1",))]
    return Graph(tuple(nodes), tensors), "q1"


def onnx_layer(rng: np.random.Generator, layer: tuple[int, int, int, int], threads: int) -> Any:
    c, o, side, stride = layer
    w = numpy_helper.from_array(rng.normal(size=(o, c, 3, 3)).astype(np.float32), "w")
    b = numpy_helper.from_array(rng.normal(size=o).astype(np.float32), "b")
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["t"], kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    out = (side - 1) // stride + 1
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, c, side, side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, o, out, out])
    model = helper.make_model(
        helper.make_graph(nodes, "layer", [x], [y], [w, b]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    data = rng.normal(size=(1, c, side, side)).astype(np.float32)
    result = np.empty((1, o, out, out), np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(data))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(result))

    def run() -> float:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - start

    return run


def measure(layer: tuple[int, int, int, int], residual: bool, isa: str | None, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    graph, step = network(rng, layer, residual)
    engine = load(graph, threads=1, isa=isa)
    at = next(i for i, s in enumerate(engine.plan) if step in s["nodes"])
    x = rng.normal(size=(1, *engine.input_shape)).astype(np.float32)
    reference = onnx_layer(rng, layer, threads=1)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(engine.profile(x, repeats=5)[at])
        theirs.append(min(reference() for _ in range(2)))
    macs = engine.plan[at]["macs"]
    return {
        "engine": median(ours),
        "onnxruntime": median(theirs),
        "ratio": median(theirs) / median(ours),
        "gmacs": macs / median(ours) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help="part of a layer's name")
    arguments = parser.parse_args()
    results = {}
    print(f"{'3x3 layer, W1A1, 1 thread':34}{'engine us':>11}{'ORT fp32 us':>13}{'ratio':>8}{'GMAC/s':>9}")
    for name, layer in LAYERS.items():
        for residual in (False, True):
            if (residual and layer[3] != 1) or (arguments.only and arguments.only not in name):
                continue
            label = name + (", f16 residual" if residual else ", bits to bits")
            r = results[label] = measure(layer, residual, arguments.isa, arguments.rounds)
            print(
                f"{label:34}{r['engine'] * 1e6:11.1f}{r['onnxruntime'] * 1e6:13.1f}{r['ratio']:8.1f}{r['gmacs']:9.0f}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
