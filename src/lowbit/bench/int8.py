"""The float twin in 8 bits: static quantization by ONNX Runtime's own tool, as QuantizeLinear and DequantizeLinear around the ops (QDQ).

The model reads and answers 8-bit codes where it can: as a layer inside a network does, and as a network of images does.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowbit.bench.twin import rename

Array = NDArray[Any]


@dataclass(frozen=True)
class Scale:
    """Codes of a tensor: x = scale * (code - zero_point), `zero_point` of the codes' dtype."""

    scale: float
    zero_point: Any  # a NumPy scalar, int8 or uint8

    def encode(self, x: Array) -> Array:
        """The nearest codes."""
        limits = np.iinfo(self.zero_point.dtype)
        codes = np.rint(x / self.scale) + float(self.zero_point)
        return codes.clip(limits.min, limits.max).astype(self.zero_point.dtype)

    def decode(self, codes: Array) -> Array:
        """What codes stand for, float32."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class Quantized:
    """A model in 8 bits; `input` and `output` are None where that end has stayed float32."""

    model: onnx.ModelProto
    input: Scale | None
    output: Scale | None


def quantized(model: onnx.ModelProto, examples: Array, signed: bool, sums: bool = True) -> Quantized:
    """`model` with 8-bit weights, one scale a filter, and 8-bit activations.

    Args:
        model: a float twin.
        examples: inputs to measure the ranges on, (n, C, H, W) or (n, features), n a multiple of the model's batch.
        signed: activations as int8 (s8s8), else as uint8 (u8s8); weights are int8.
        sums: sums of two values in 8 bits too, else in float32.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.split(examples, len(examples) // batch))

        def get_next(self) -> dict[str, Array] | None:
            x = next(self.batches, None)
            return None if x is None else {"input": x}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            _without_identity(model),
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=None if sums else sorted({node.op_type for node in model.graph.node} - {"Add"}),
        )
        found = onnx.load(path)
    return Quantized(found, _codes_in(found.graph), _codes_out(found.graph))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tool's advice to run its pre-processing: the twin is folded already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _without_identity(model: onnx.ModelProto) -> onnx.ModelProto:
    """The twin without the Identity that names its output, which would stay float32."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    last = out.graph.node[-1]
    source = last.input[0]
    if last.op_type != "Identity" or source == "input":
        return out
    del out.graph.node[-1]
    for node in out.graph.node:
        rename(node.input, source, "output")
        rename(node.output, source, "output")
    return out


def _scale(graph: onnx.GraphProto, node: onnx.NodeProto) -> Scale:
    constants = {t.name: t for t in graph.initializer}
    scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    return Scale(scale.item(), zero_point[()])


def _retype(value: onnx.ValueInfoProto, scale: Scale) -> None:
    value.type.tensor_type.elem_type = TensorProto.INT8 if scale.zero_point.dtype == np.int8 else TensorProto.UINT8


def _codes_in(graph: onnx.GraphProto) -> Scale | None:
    users = [node for node in graph.node if "input" in node.input]
    if [node.op_type for node in users] != ["QuantizeLinear"]:
        return None
    (first,) = users
    scale, codes = _scale(graph, first), first.output[0]
    graph.node.remove(first)
    for node in graph.node:
        rename(node.input, codes, "input")
    _retype(graph.input[0], scale)
    return scale


def _codes_out(graph: onnx.GraphProto) -> Scale | None:
    last = next(node for node in graph.node if "output" in node.output)
    if last.op_type != "DequantizeLinear" or any("output" in node.input for node in graph.node):
        return None
    scale, codes = _scale(graph, last), last.input[0]
    graph.node.remove(last)
    for node in graph.node:
        rename(node.input, codes, "output")
        rename(node.output, codes, "output")
    _retype(graph.output[0], scale)
    return scale
