"""The float twin in PyTorch: the ONNX model that `lowbit.bench` compares with, as a module."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

Array = NDArray[Any]
Attributes = Mapping[str, Any]


def _padding(attributes: Attributes, value: float) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """Symmetric padding as an argument; any other one by a function before."""
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if (top, left) == (bottom, right):
        return [top, left], lambda x: x
    return [0, 0], lambda x: F.pad(x, (left, right, top, bottom), value=value)


def _conv(x: Sequence[Tensor], a: Attributes) -> Tensor:
    padding, pad = _padding(a, 0.0)
    return F.conv2d(pad(x[0]), x[1], x[2], a["strides"], padding, a["dilations"], a["group"])


def _max_pool(x: Sequence[Tensor], a: Attributes) -> Tensor:
    padding, pad = _padding(a, -float("inf"))
    return F.max_pool2d(pad(x[0]), a["kernel_shape"], a["strides"], padding)


def _avg_pool(x: Sequence[Tensor], a: Attributes) -> Tensor:
    padding, pad = _padding(a, 0.0)
    counted = bool(a["count_include_pad"])
    if (
        padding == [0, 0] and any(a.get("pads", ())) and not counted
    ):  # one-sided: divide by the positions that are there
        ones = F.avg_pool2d(pad(torch.ones_like(x[0][:1, :1])), a["kernel_shape"], a["strides"])
        return F.avg_pool2d(pad(x[0]), a["kernel_shape"], a["strides"]) / ones
    return F.avg_pool2d(pad(x[0]), a["kernel_shape"], a["strides"], padding, count_include_pad=counted)


_OPS: Mapping[str, Callable[[Sequence[Tensor], Attributes], Tensor]] = {
    "Add": lambda x, _: x[0] + x[1],
    "AveragePool": _avg_pool,
    "Clip": lambda x, _: torch.clamp(x[0], x[1], x[2]),
    "Concat": lambda x, a: torch.cat(list(x), a["axis"]),
    "Conv": _conv,
    "DepthToSpace": lambda x, a: F.pixel_shuffle(x[0], a["blocksize"]),
    "Flatten": lambda x, _: x[0].flatten(1),
    "Gemm": lambda x, _: F.linear(x[0], x[1], x[2]),
    "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
    "Identity": lambda x, _: x[0],
    "MaxPool": _max_pool,
    "Mul": lambda x, _: x[0] * x[1],
    "PRelu": lambda x, _: F.prelu(x[0], x[1].flatten()),
    "Relu": lambda x, _: F.relu(x[0]),
    "Slice": lambda x, _: x[0].narrow(int(x[3]), int(x[1]), int(x[2] - x[1])),
    "Transpose": lambda x, a: x[0].permute(a["perm"]),
}


class TorchTwin(nn.Module):
    """A float twin (`lowbit.bench.float_twin`) as a module; weights of convolutions lie channels last."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        for i, constant in enumerate(model.graph.initializer):
            data = torch.from_numpy(np.array(numpy_helper.to_array(constant)))
            if data.ndim == 4:
                data = data.contiguous(memory_format=torch.channels_last)
            self.register_buffer(f"constant{i}", data)
        self._constants = {t.name: f"constant{i}" for i, t in enumerate(model.graph.initializer)}
        self._nodes = [
            (
                _OPS[node.op_type],
                list(node.input),
                node.output[0],
                {a.name: helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in model.graph.node
        ]

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for op, inputs, output, attributes in self._nodes:
            read = [values[n] if n in values else getattr(self, self._constants[n]) for n in inputs]
            values[output] = op(read, attributes)
        return values["output"]


def open_twin(
    model: onnx.ModelProto, threads: int, x: Array
) -> tuple[Callable[[], None], Callable[[Array], Array], str]:
    """A float twin ready to run on `x` (channels first): in inference mode, channels last, compiled where that is faster.

    Networks are tried with torch.compile, single layers are not: there is nothing to fuse but a ReLU, and each takes seconds.

    Returns:
        What runs it once, what answers a batch, and whether it is compiled.
    """
    torch.set_num_threads(threads)
    module = TorchTwin(model).eval()
    given = _tensor(x)
    forms: list[tuple[nn.Module, str]] = [(module, "eager, channels last")]
    if sum(node.op_type in ("Conv", "Gemm") for node in model.graph.node) > 1:
        forms.append((torch.compile(module), "torch.compile, channels last"))  # type: ignore[arg-type]
    best, note = forms[0]
    if len(forms) > 1:
        seconds = []
        for form, _ in forms:
            try:
                seconds.append(_median_seconds(form, given))
            except (
                Exception
            ) as error:  # no compiler, or one that can't: the eager form is the peer, and the note says why
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                seconds.append(float("inf"))
                note = f"{note}; torch.compile fails: {first}"
        if np.argmin(seconds):
            best, note = forms[1]

    def run() -> None:
        with torch.inference_mode():
            best(given)

    def answer(x: Array) -> Array:
        with torch.inference_mode():
            found: Array = best(_tensor(x)).contiguous().numpy()
        return found

    return run, answer, note


def _tensor(x: Array) -> Tensor:
    tensor = torch.from_numpy(x)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _median_seconds(module: nn.Module, x: Tensor, calls: int = 7) -> float:
    seconds = []
    with torch.inference_mode():
        module(x)  # compiles
        for _ in range(calls):
            start = time.perf_counter()
            module(x)
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))
