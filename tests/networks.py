"""A small classifier as a Graph, made without torch: 8-bit stem, two binary residual layers, pooling, float head."""

from __future__ import annotations

import numpy as np

from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor

CLASSES = ("circle", "square", "triangle")


def classifier(side: int = 12, channels: int = 3, width: int = 16, seed: int = 0) -> Graph:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}

    def floats(name: str, count: int) -> str:
        tensors[name] = Tensor(rng.uniform(0.01, 0.2, count).astype(np.float32) * rng.choice([-1, 1], count))
        return name

    def conv(stride: int) -> dict[str, object]:
        return {"stride": (stride, stride), "dilation": (1, 1), "padding": (1, 1, 1, 1), "groups": 1}

    tensors["stem.weight"] = Tensor(
        rng.integers(-127, 128, (width, 3, 3, channels)).astype(np.int16), Codes("signed", 8)
    )
    nodes = [
        Node(
            "input", "input", attrs={"shape": (side, side, channels), "dtype": "uint8", "zero_point": (100,) * channels}
        ),
        Node("conv2d", "stem", ("input",), {"weight": "stem.weight"}, conv(2)),
        Node("mul", "stem.mul", ("stem",), {"factor": floats("stem.mul", width)}),
        Node("add", "stem.add", ("stem.mul",), {"term": floats("stem.add", width)}),
        Node("cast", "stream", ("stem.add",), attrs={"dtype": "float16"}),
    ]
    stream = "stream"
    for i in range(2):
        name = f"block{i}"
        tensors[f"{name}.weight"] = Tensor(
            rng.choice(np.array([-1, 1], np.int16), (width, 3, 3, width)), Codes("bipolar", 1)
        )
        nodes += [
            Node("quantize", f"{name}.quantize", (stream,), attrs={"kind": "bipolar", "bits": 1}),
            Node("conv2d", name, (f"{name}.quantize",), {"weight": f"{name}.weight"}, conv(1)),
            Node("mul", f"{name}.mul", (name,), {"factor": floats(f"{name}.mul", width)}),
            Node("add", f"{name}.add", (f"{name}.mul",), {"term": floats(f"{name}.add", width)}),
            Node("add", f"{name}.sum", (f"{name}.add", stream)),
        ]
        stream = f"{name}.sum"
    tensors["head.weight"] = Tensor(rng.standard_normal((len(CLASSES), width)).astype(np.float32))
    nodes += [
        Node("global_avg_pool", "pool", (stream,)),
        Node("flatten", "flatten", ("pool",)),
        Node("linear", "head", ("flatten",), {"weight": "head.weight"}),
        Node("add", "head.add", ("head",), {"term": floats("head.add", len(CLASSES))}),
        Node("output", "output", ("head.add",)),
    ]
    meta = {"task": "classify", "classes": list(CLASSES), "recipe": "small", "seed": seed}
    return Graph(tuple(nodes), tensors, meta)
