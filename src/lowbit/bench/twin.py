"""The float twin: a Graph's topology in float32, as an ONNX model that the peers run."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lowbit.graph import Graph, Node, Tensor, ValueType
from lowbit.interpreter import bicubic_taps, mirrored

Array = NDArray[Any]

BORDER = 2
"""Pixels that `resize_bicubic` reaches over, each way."""


def float_twin(graph: Graph, batch: int = 1) -> onnx.ModelProto:
    """The same topology in float32, as ONNX Runtime likes it best: NCHW, fixed batch, everything folded that can be.

    Weights are the decoded codes, their offset included; the factor and term behind a convolution go into its weights and bias.
    An input offset has no place: it belongs to the two values that the activation function stands for. `quantize` is
    the activation function of the float network: ReLU for 1 bit, a clip at 0 and the largest code for unsigned codes;
    signed 8-bit codes and casts vanish. The input is float32: the pixel minus its zero point.

    Args:
        graph: any Graph.
        batch: images in a run.

    Returns:
        A checked model with the input ``input`` and the output ``output``.
    """
    return _Twin(graph, batch).build()


class _Twin:
    """Builds a model node by node. A value may stand for ``scale`` times the tensor that holds it, so that the step of
    quantized codes lands in the next layer's weights."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self.types = graph.validate()
        self.users: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self.users.setdefault(name, []).append(node)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value: dict[str, str] = {}
        self.scale: dict[str, float] = {}

    def build(self) -> onnx.ModelProto:
        for node in self.graph.nodes:
            if node.name not in self.value:
                getattr(self, f"_{node.op}")(node)
        first, last = self.types[self.graph.input.name], self.types[self.graph.output.name]
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                "float_twin",
                [helper.make_tensor_value_info("input", TensorProto.FLOAT, self._shape(first))],
                [helper.make_tensor_value_info("output", TensorProto.FLOAT, self._shape(last))],
                self.constants,
            ),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=9,
        )
        onnx.checker.check_model(model)
        return model

    def _shape(self, t: ValueType) -> list[int]:
        return [self.batch, t.shape[2], t.shape[0], t.shape[1]] if len(t.shape) == 3 else [self.batch, *t.shape]

    def _constant(self, name: str, data: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(data), name))
        return name

    def _per_channel(self, node: Node, role: str) -> str:
        data = self.graph.tensors[node.params[role]].data
        image = len(self.types[node.name].shape) == 3
        return self._constant(f"{node.name}:{role}", data.reshape(-1, 1, 1) if image else data)

    def _emit(self, op: str, node: Node, inputs: Sequence[str], scale: float = 1.0, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, list(inputs), [node.name + ":out"], node.name, **attributes))
        self.value[node.name], self.scale[node.name] = node.name + ":out", scale

    def _alias(self, node: Node, scale: float | None = None) -> None:
        source = node.inputs[0]
        self.value[node.name] = self.value[source]
        self.scale[node.name] = self.scale[source] if scale is None else scale

    def _plain(self, name: str) -> str:
        """The tensor of a value with its scale applied."""
        if self.scale[name] != 1.0:
            factor = self._constant(f"{name}:scale", np.array(self.scale[name], np.float32))
            self.nodes.append(helper.make_node("Mul", [self.value[name], factor], [name + ":scaled"]))
            self.value[name], self.scale[name] = name + ":scaled", 1.0
        return self.value[name]

    # one method per op

    def _input(self, node: Node) -> None:
        self.value[node.name], self.scale[node.name] = "input", 1.0

    def _output(self, node: Node) -> None:
        self.nodes.append(helper.make_node("Identity", [self._plain(node.inputs[0])], ["output"], node.name))
        self.value[node.name], self.scale[node.name] = "output", 1.0

    def _quantize(self, node: Node) -> None:
        x = self._plain(node.inputs[0])
        if node.attrs["kind"] == "bipolar":
            self._emit("Relu", node, [x])
        elif node.attrs["kind"] == "unsigned":
            reciprocal = float(node.attrs["reciprocal"])
            low = self._constant(f"{node.name}:low", np.array(0, np.float32))
            high = self._constant(f"{node.name}:high", np.array((2 ** node.attrs["bits"] - 1) / reciprocal, np.float32))
            self._emit("Clip", node, [x, low, high], reciprocal)
        else:
            self._alias(node, float(node.attrs["reciprocal"]))

    def _folded(self, node: Node) -> tuple[Array, Array, str]:
        """Weights and bias with the factors and terms behind the node, and the name of the last of these."""
        weight = self.graph.tensors[node.params["weight"]].data.astype(np.float64)
        if "weight_offset" in node.params:
            weight = (weight.T + self.graph.tensors[node.params["weight_offset"]].data).T
        weight = weight * self.scale[node.inputs[0]]
        bias = np.zeros(len(weight))
        last = node.name
        while len(self.users[last]) == 1:
            after = self.users[last][0]
            if after.op == "mul":
                factor = self.graph.tensors[after.params["factor"]].data.astype(np.float64)
                weight, bias = (weight.T * factor).T, bias * factor
            elif after.op == "add" and "term" in after.params:
                bias = bias + self.graph.tensors[after.params["term"]].data
            else:
                break
            last = after.name
        return weight.astype(np.float32), bias.astype(np.float32), last

    def _product(self, op: str, node: Node, layout: tuple[int, ...], **attributes: Any) -> None:
        weight, bias, last = self._folded(node)
        inputs = [self.value[node.inputs[0]], self._constant(f"{node.name}:weight", weight.transpose(layout))]
        inputs.append(self._constant(f"{node.name}:bias", bias))
        self._emit(op, node, inputs, **attributes)
        name = node.name
        while name != last:
            name = self.users[name][0].name
            self.value[name], self.scale[name] = self.value[node.name], 1.0

    def _conv2d(self, node: Node) -> None:
        self._product(
            "Conv",
            node,
            (0, 3, 1, 2),
            strides=list(node.attrs["stride"]),
            pads=list(node.attrs["padding"]),
            dilations=list(node.attrs["dilation"]),
            group=node.attrs["groups"],
        )

    def _linear(self, node: Node) -> None:
        self._product("Gemm", node, (0, 1), transB=1)

    def _mul(self, node: Node) -> None:
        self._emit("Mul", node, [self._plain(node.inputs[0]), self._per_channel(node, "factor")])

    def _add(self, node: Node) -> None:
        inputs = [self._plain(name) for name in node.inputs]
        self._emit("Add", node, inputs if len(inputs) == 2 else [*inputs, self._per_channel(node, "term")])

    def _prelu(self, node: Node) -> None:
        self._emit("PRelu", node, [self._plain(node.inputs[0]), self._per_channel(node, "slope")])

    def _relu(self, node: Node) -> None:
        self._emit("Relu", node, [self._plain(node.inputs[0])])

    def _clip(self, node: Node) -> None:
        ends = [self._constant(f"{node.name}:{k}", np.array(node.attrs[k], np.float32)) for k in ("low", "high")]
        self._emit("Clip", node, [self._plain(node.inputs[0]), *ends])

    def _cast(self, node: Node) -> None:
        self._alias(node)

    def _pool(self, op: str, node: Node, **attributes: Any) -> None:
        source = node.inputs[0]
        attributes |= {k + "s": list(node.attrs[k]) for k in ("stride",)} | {"pads": list(node.attrs["padding"])}
        self._emit(
            op, node, [self.value[source]], self.scale[source], kernel_shape=list(node.attrs["kernel"]), **attributes
        )

    def _max_pool(self, node: Node) -> None:
        self._pool("MaxPool", node)

    def _avg_pool(self, node: Node) -> None:
        self._pool("AveragePool", node, count_include_pad=int(node.attrs["count_include_pad"]))

    def _global_avg_pool(self, node: Node) -> None:
        self._emit("GlobalAveragePool", node, [self.value[node.inputs[0]]], self.scale[node.inputs[0]])

    def _pixel_shuffle(self, node: Node) -> None:
        source = node.inputs[0]
        self._emit(
            "DepthToSpace", node, [self.value[source]], self.scale[source], blocksize=node.attrs["factor"], mode="CRD"
        )

    def _resize_bicubic(self, node: Node) -> None:
        """One convolution of the mirrored map to the phases of each channel, and a shuffle: ONNX's Resize repeats the border
        where the Graph mirrors it, and runtimes compute it many times slower."""
        source, r = node.inputs[0], node.attrs["factor"]
        x, shape = self.value[source], self.types[source].shape
        for axis, size in ((2, shape[0]), (3, shape[1])):
            x = self._mirrored(f"{node.name}:{axis}", x, axis, size)
        first, taps = bicubic_taps(r)
        line = np.zeros((r, 2 * BORDER + 1))
        for phase in range(r):
            line[phase, first[phase] + BORDER : first[phase] + BORDER + 4] = taps[phase]
        kernels = np.einsum("iy,jx->ijyx", line, line).reshape(r * r, 1, *line.shape[1:] * 2)
        weight = self._constant(f"{node.name}:weight", np.tile(kernels, (shape[2], 1, 1, 1)).astype(np.float32))
        bias = self._constant(f"{node.name}:bias", np.zeros(shape[2] * r * r, np.float32))
        phases = f"{node.name}:phases"
        geometry: dict[str, Any] = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": shape[2]}
        self.nodes.append(helper.make_node("Conv", [x, weight, bias], [phases], **geometry))
        self._emit("DepthToSpace", node, [phases], self.scale[source], blocksize=r, mode="CRD")

    def _mirrored(self, name: str, x: str, axis: int, size: int) -> str:
        """`BORDER` more pixels at either end of an axis, as `resize_bicubic` mirrors them."""
        at = mirrored(np.arange(-BORDER, size + BORDER), size)
        parts = []
        for i, position in enumerate((*at[:BORDER], *at[-BORDER:])):
            ends = [
                self._constant(f"{name}:{k}{i}", np.array([v])) for k, v in (("from", position), ("to", position + 1))
            ]
            along = self._constant(f"{name}:axis{i}", np.array([axis]))
            parts.append(f"{name}:{i}")
            self.nodes.append(helper.make_node("Slice", [x, *ends, along], [parts[-1]]))
        parts.insert(BORDER, x)
        self.nodes.append(helper.make_node("Concat", parts, [name], axis=axis))
        return name

    def _concat(self, node: Node) -> None:
        self._emit("Concat", node, [self._plain(name) for name in node.inputs], axis=1)

    def _flatten(self, node: Node) -> None:
        source = node.inputs[0]
        x = self.value[source]
        if self.types[source].shape[:2] != (1, 1):  # the Graph flattens H, W, C
            self.nodes.append(helper.make_node("Transpose", [x], [node.name + ":nhwc"], perm=[0, 2, 3, 1]))
            x = node.name + ":nhwc"
        self._emit("Flatten", node, [x], self.scale[source])


def layer_graph(graph: Graph, node: Node, types: dict[str, ValueType]) -> Graph:
    """One convolution or linear layer of `graph` alone, float32, with bias and ReLU."""
    weight = graph.tensors[node.params["weight"]]
    tensors = {
        "weight": Tensor(weight.data.astype(np.float32) / np.float32(weight.data[0].size)),
        "term": Tensor(np.full(len(weight.data), 0.1, np.float32)),
    }
    nodes = (
        Node("input", "input", attrs={"shape": types[node.inputs[0]].shape, "dtype": "float32"}),
        Node(node.op, "layer", ("input",), {"weight": "weight"}, node.attrs),
        Node("add", "add", ("layer",), {"term": "term"}),
        Node("relu", "relu", ("add",)),
        Node("output", "output", ("relu",)),
    )
    return Graph(nodes, tensors)


def channels_last(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with images read and written as (N, H, W, C): peers whose kernels work on that order save a copy at either end.

    The transposition stands where the numbers are float32, behind a DequantizeLinear at the input and before a QuantizeLinear at
    the output: runtimes fold it there.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    for value in (graph.input[0], graph.output[0]):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            for dim, size in zip(dims, [dims[i].dim_value for i in (0, 2, 3, 1)], strict=True):
                dim.dim_value = size
    nodes = list(graph.node)
    del graph.node[:]
    read = "input"
    if len(graph.input[0].type.tensor_type.shape.dim) == 4:
        users = [node for node in nodes if "input" in node.input]
        if [node.op_type for node in users] == ["DequantizeLinear"]:
            (first,) = users
            nodes.remove(first)
            graph.node.append(first)
            read = first.output[0]
        graph.node.append(helper.make_node("Transpose", [read], [f"{read}:nchw"], perm=[0, 3, 1, 2]))
        for node in nodes:
            rename(node.input, read, f"{read}:nchw")
    if len(graph.output[0].type.tensor_type.shape.dim) == 4:
        at = next(i for i, node in enumerate(nodes) if "output" in node.output)
        if nodes[at].op_type == "QuantizeLinear":
            written = nodes[at].input[0]
            nodes.insert(at, helper.make_node("Transpose", [written], ["output:nhwc"], perm=[0, 2, 3, 1]))
            nodes[at + 1].input[0] = "output:nhwc"
        else:
            for node in nodes:
                rename(node.input, "output", "output:nchw")
                rename(node.output, "output", "output:nchw")
            nodes.append(helper.make_node("Transpose", ["output:nchw"], ["output"], perm=[0, 2, 3, 1]))
    graph.node.extend(nodes)
    onnx.checker.check_model(out)
    return out


def rename(names: MutableSequence[str], old: str, new: str) -> None:
    """Replace a tensor's name among a node's inputs or outputs."""
    for i, name in enumerate(names):
        if name == old:
            names[i] = new
