"""freeze: a prepared network in evaluation -> Graph. Reads torch.export, so it knows no module but the quantized layers.

A quantized layer is one `lowbit::` op in the exported graph, beside plain aten ops. Whatever does not depend on the input is computed to a
constant; everything else, batch norm and a layer's scale as well, becomes the float steps of docs/OPS.md in the order in
which the network computes them. What can't be represented is refused with the layer's name.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import lowbit.train.resize  # noqa: F401  # registers the op lowbit::resize_bicubic
from lowbit import graph as lg
from lowbit.bits import Codes
from lowbit.train.batchnorm import fold
from lowbit.train.layers import QuantLayer, constant_weights
from lowbit.train.quantizers import ActivationQuantizer

_INSTEAD = {"div": "x * (1 / c)", "neg": "x * -1.0", "rsub": "x * -1.0 + c"}
"""What to write for an op that is not in a Graph, where another one does."""

FxNode = Any
"""A torch.fx.Node; the types of its arguments are as wide as can be, and say nothing here."""


class FreezeError(ValueError):
    """A network that can't be frozen. The message names the layer and says what to do."""


def freeze(model: nn.Module, example_input: Tensor, meta: Mapping[str, Any] | None = None) -> lg.Graph:
    """The Graph that `model` computes in evaluation.

    Args:
        model: a prepared network (`lowbit.train.prepare`), after ``eval()``, with calibrated batch-norm statistics.
        example_input: one input or a batch as the network takes it, NCHW or (N, features); only shape and dtype count.
            A network prepared with `Pixels` becomes a Graph of uint8 images.
        meta: plain JSON for whoever feeds the Graph: task, classes, preprocessing.

    Returns:
        A validated `lowbit.Graph`; `lowbit.save` writes it.

    Raises:
        FreezeError: the model is not in evaluation, torch.export can't trace it, or it has an op, shape or dtype that a Graph
            can't represent. The message names the layer.
    """
    if not isinstance(example_input, Tensor):
        raise FreezeError(f"example_input is a torch tensor, not a {type(example_input).__name__}")
    for name, module in model.named_modules():
        if module.training or getattr(module, "hard", True) is False:
            raise FreezeError(f"{name or 'the model'} is in training mode or soft: call model.eval() before freeze")
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise FreezeError(f"{name} holds infinities or NaN: training has diverged")
    example = example_input[:1].detach().cpu()
    example = torch.cat([example, example])  # a batch of 1 would be taken for a constant
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with constant_weights(model):
        graph = _frozen(model, example.to(device), tuple(example_input.shape), meta or {})
    try:
        graph.validate()
    except lg.GraphError as e:
        raise FreezeError(str(e)) from None
    return graph


def _frozen(model: nn.Module, example: Tensor, shape: tuple[int, ...], meta: Mapping[str, Any]) -> lg.Graph:
    try:
        with torch.no_grad():
            model(example)
    except Exception as e:
        raise FreezeError(f"the model fails on the example input, {example.dtype} of shape {shape}: {_first(e)}") from e
    try:
        with warnings.catch_warnings(), _quiet_torch(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, (example,)).run_decompositions({})
    except Exception as e:
        raise FreezeError(
            f"torch.export can't trace the model: {_first(e)}\n"
            "A network must be a plain function of its input tensor: no branches on values."
        ) from e
    return _Freezer(model, exported, example.cpu(), meta).run()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without torch.export's own lines and listings, hundreds where it fails: the error says what is wrong."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def to_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    """A batch as a Graph takes it: NHWC where the network has NCHW, C-contiguous."""
    x = x.detach().cpu()
    if x.ndim == 4:
        x = x.permute(0, 2, 3, 1)
    out: np.ndarray[Any, Any] = np.ascontiguousarray(x.numpy())
    return out


@dataclass(eq=False)
class _Value:
    """A value of the Graph under construction: its node's name.

    `integer`: the accumulators of a layer of scale 1, `label`. Whatever multiplies may take them; everything else needs a `mul` by 1.
    `order` is set behind a flatten: element n of the Graph's vector is element order[n] of the network's, because the
    Graph flattens H, W, C and PyTorch C, H, W.
    """

    name: str
    integer: bool = False
    codes: bool = False
    label: str = ""
    order: np.ndarray[Any, Any] | None = None


@dataclass
class _Freezer:
    model: nn.Module
    exported: Any
    example: Tensor
    meta: Mapping[str, Any]
    nodes: list[lg.Node] = field(default_factory=list)
    tensors: dict[str, lg.Tensor] = field(default_factory=dict)
    env: dict[FxNode, Any] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    flushed: dict[_Value, _Value] = field(default_factory=dict)
    quantized: dict[tuple[Any, ...], _Value] = field(default_factory=dict)

    def run(self) -> lg.Graph:
        self._placeholders()
        result: _Value | None = None
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                outputs = node.args[0]
                if len(outputs) != 1:
                    raise FreezeError(
                        f"the network returns {len(outputs)} tensors; a Graph has one output: wrap it to return one"
                    )
                result = self.env[outputs[0]]
        if not isinstance(result, _Value):
            raise FreezeError("the network's output does not depend on its input")
        out = self._flush(result)
        if out.order is not None:
            raise FreezeError(
                "the network's output is a flattened image; put a linear layer behind it or return the image"
            )
        self._emit("output", "output", (out.name,))
        return self._pruned()

    def _pruned(self) -> lg.Graph:
        """Only what the output needs."""
        needed: set[str] = {self.nodes[-1].name}
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.inputs)
        nodes = tuple(n for n in self.nodes if n.name in needed or n.op == "input")
        used = {t for n in nodes for t in n.params.values()}
        return lg.Graph(nodes, {k: t for k, t in self.tensors.items() if k in used}, self.meta)

    # --- the exported program ---

    def _placeholders(self) -> None:
        signature = self.exported.graph_signature
        inputs = list(signature.user_inputs)
        if len(inputs) != 1:
            raise FreezeError(f"the network takes {len(inputs)} inputs; a Graph has one")
        state = {**dict(self.exported.named_parameters()), **dict(self.exported.named_buffers())}
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = dict(signature.inputs_to_lifted_tensor_constants)
        for node in self.exported.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                self.env[node] = state[names[node.name]].detach()
            elif node.name in lifted:
                self.env[node] = self.exported.constants[lifted[node.name]].detach()
            else:
                self.env[node] = self._input(node)

    def _input(self, node: FxNode) -> _Value:
        shape = tuple(int(s) for s in self.example.shape[1:])
        if len(shape) == 3:
            shape = (shape[1], shape[2], shape[0])
        elif len(shape) != 1:
            raise FreezeError(f"inputs are images (N, C, H, W) or vectors (N, C), not {tuple(self.example.shape)}")
        pixels = [u for u in node.users if u.target is torch.ops.lowbit.quantize.default and u.args[2] is not None]
        if not pixels:
            self._emit("input", "input", (), attrs={"shape": shape, "dtype": "float32"})
            return _Value("input")
        note = torch.ops.aten._assert_tensor_metadata.default
        for other in node.users:
            if other not in pixels and other.target is not note:
                raise FreezeError(
                    f"{_path(other) or other.name}: uses the raw pixels beside {_path(pixels[0])}; "
                    "with image=Pixels(...) only the first layer may"
                )
        module = self._layer(pixels[0])
        assert module.input_quantizer is not None
        zero_point = module.input_quantizer.code_type.zero_point or (0,) * shape[-1]
        if len(zero_point) != shape[-1]:
            raise FreezeError(
                f"{_path(pixels[0])}: {len(zero_point)} zero points do not fit inputs of {shape[-1]} channels"
            )
        self._emit("input", "input", (), attrs={"shape": shape, "dtype": "uint8", "zero_point": tuple(zero_point)})
        return _Value("input", codes=True)

    def _call(self, node: FxNode) -> Any:
        target = node.target
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        arguments = [*node.args, *node.kwargs.values()]
        flat = [a for arg in arguments for a in (arg if isinstance(arg, list | tuple) else [arg])]
        if not any(isinstance(self.env.get(a), _Value | tuple) for a in flat if isinstance(a, fx.Node)):
            return self._constant(node)
        handler = _HANDLERS.get(target)
        if handler is None:
            name = _op_name(target).rstrip("_")
            hint = f" (write {_INSTEAD[name]})" if name in _INSTEAD else ""
            raise self._refuse(node, f"the op {name} has no place in a Graph{hint}")
        return handler(self, node)

    def _constant(self, node: FxNode) -> Any:
        def value(arg: Any) -> Any:
            return fx.node.map_arg(arg, lambda n: self.env[n])

        assert callable(node.target)
        with torch.no_grad():
            return node.target(*value(node.args), **value(node.kwargs))

    def _refuse(self, node: FxNode, why: str) -> FreezeError:
        where = _path(node) or "the model's own forward"
        supported = (
            "conv2d, linear, batch_norm, relu, prelu, clamp, add, mul by a constant, max_pool2d, avg_pool2d, "
            "mean over H and W, flatten, cat, pixel_shuffle, lowbit.train.resize_bicubic, dropout"
        )
        return FreezeError(
            f"{where} ({node.name}): {why}. A Graph has: {supported}. Replace the op, or move it behind the network's output."
        )

    # --- building ---

    def _name(self, wish: str) -> str:
        name, n = wish, 2
        while name in self.names:
            name, n = f"{wish}_{n}", n + 1
        self.names.add(name)
        return name

    def _emit(
        self,
        op: str,
        wish: str,
        inputs: Sequence[str],
        params: Mapping[str, lg.Tensor] | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> str:
        name = self._name(wish)
        roles = {}
        for role, tensor in (params or {}).items():
            key = f"{name}.{role}"
            self.tensors[key] = tensor
            roles[role] = key
        self.nodes.append(lg.Node(op, name, tuple(inputs), roles, attrs or {}))
        return name

    def _layer(self, node: FxNode) -> QuantLayer:
        layer = self.model.get_submodule(_path(node))
        assert isinstance(layer, QuantLayer), node
        return layer

    def value(self, node: Any, at: FxNode) -> _Value:
        """The value of an input, with nothing left to apply."""
        found = self.env.get(node)
        if not isinstance(found, _Value):
            raise self._refuse(at, "it computes with a constant in a place where a Graph needs a value")
        if found.codes and found.name == "input":
            raise self._refuse(at, "it uses raw pixels, which only the first layer may")
        return self._flush(found)

    def _flush(self, v: _Value) -> _Value:
        if not v.integer:
            return v
        if v not in self.flushed:
            self.flushed[v] = self.times(v, np.ones(1), v.label)
        return self.flushed[v]

    def times(self, v: _Value, factor: np.ndarray[Any, Any], label: str) -> _Value:
        factor = factor if v.order is None else _reorder(factor, v.order)
        params = {"factor": self._per_channel(factor, label)}
        return _Value(self._emit("mul", f"{label}.mul", (v.name,), params), order=v.order)

    def plus(self, v: _Value, term: np.ndarray[Any, Any], label: str) -> _Value:
        term = term if v.order is None else _reorder(term, v.order)
        params = {"term": self._per_channel(term, label)}
        return _Value(self._emit("add", f"{label}.add", (v.name,), params), order=v.order)

    def multiplicand(self, node: Any, at: FxNode) -> _Value:
        """The value of an input for whatever multiplies it: by 1 first would change nothing."""
        found = self.env.get(node)
        return found if isinstance(found, _Value) and found.integer else self.value(node, at)

    def _per_channel(self, x: np.ndarray[Any, Any], label: str) -> lg.Tensor:
        x = np.atleast_1d(x)
        if x.size > 1 and (x == x[0]).all():
            x = x[:1]
        with np.errstate(over="ignore"):
            data = x.astype(np.float32)
        if not np.isfinite(data).all():
            raise FreezeError(f"{label}: a constant is beyond float32: training has diverged")
        return lg.Tensor(data)

    def step(
        self,
        node: FxNode,
        op: str,
        v: _Value,
        suffix: str = "",
        params: Mapping[str, lg.Tensor] | None = None,
        **attrs: Any,
    ) -> _Value:
        name = self._emit(op, _label(node) + suffix, (v.name,), params, attrs)
        keeps = op in ("quantize", "max_pool", "pixel_shuffle")
        return _Value(name, codes=v.codes if keeps else False, order=v.order)

    def constant(self, node: Any, at: FxNode) -> Tensor:
        if isinstance(node, int | float):
            return torch.tensor(float(node))
        found = self.env.get(node)
        if not isinstance(found, Tensor):
            raise self._refuse(at, "it needs a constant where the network has a value")
        return found.float()

    def channel_constant(self, node: Any, at: FxNode, v: _Value) -> np.ndarray[Any, Any]:
        """A constant that is one number per channel, or one in all."""
        x = self.constant(node, at)
        shape = _shape(at)
        channels = shape[1]
        if x.numel() == 1:
            return _array(x).reshape(1)
        padded = (1,) * (len(shape) - x.ndim) + tuple(x.shape)
        if len(padded) != len(shape) or padded[1] != channels or any(s != 1 for i, s in enumerate(padded) if i != 1):
            raise self._refuse(at, f"its constant of shape {tuple(x.shape)} is not one number per channel")
        out = _array(x).reshape(-1)
        return out if v.order is None else out[v.order]


def _path(node: FxNode) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path: str = next(reversed(stack.values()), ("",))[0]
    path = path.removeprefix("L['self'].")
    return path.split("@")[0]


def _label(node: FxNode) -> str:
    return _path(node) or node.name


def _op_name(target: Any) -> str:
    return (
        str(target).removeprefix("aten.").split(".")[0]
        if not callable(target) or hasattr(target, "_schema")
        else str(target)
    )


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(s) for s in node.meta["val"].shape)


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    out: np.ndarray[Any, Any] = x.detach().cpu().double().numpy()
    return out


def _reorder(x: np.ndarray[Any, Any], order: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x[order] if x.size > 1 else x


def _weight(codes: Tensor, kind: Codes | None) -> lg.Tensor:
    data = codes.detach().cpu()
    if data.ndim == 4:
        data = data.permute(0, 2, 3, 1)
    data = data.contiguous()
    if kind is None:
        return lg.Tensor(data.float().numpy())
    return lg.Tensor(data.to(torch.int16).numpy(), kind)


def _weight_type(layer: QuantLayer, node: FxNode) -> Codes | None:
    try:
        return layer.weight_quantizer.code_type
    except ValueError as e:
        raise FreezeError(f"{_label(node)}: {e}") from None


# --- one function per op of the exported graph ---

_HANDLERS: dict[Any, Callable[[_Freezer, FxNode], Any]] = {}


def _handles(*targets: Any) -> Callable[[Callable[[_Freezer, FxNode], Any]], Callable[[_Freezer, FxNode], Any]]:
    def add(f: Callable[[_Freezer, FxNode], Any]) -> Callable[[_Freezer, FxNode], Any]:
        for t in targets:
            _HANDLERS[t] = f
        return f

    return add


aten = torch.ops.aten


@_handles(torch.ops.lowbit.quantize.default)
def _quantize(f: _Freezer, node: FxNode) -> _Value:
    source = f.env[node.args[0]]
    if source.codes and source.name == "input":
        return source
    layer = f._layer(node)
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    if quantizer.zero_point is not None:
        raise f._refuse(
            node, "it reads pixels but is not the network's first layer; check the order in which layers are defined"
        )
    v = f._flush(source)
    attrs: dict[str, Any] = {"kind": quantizer.code_type.kind, "bits": quantizer.code_type.bits}
    if quantizer.reciprocal is not None:
        attrs["reciprocal"] = float(np.float32(quantizer.reciprocal.item()))
    key = (v.name, *sorted(attrs.items()))
    if key not in f.quantized:
        name = f._emit("quantize", f"{_path(node)}.quantize", (v.name,), None, attrs)
        f.quantized[key] = _Value(name, codes=True, order=v.order)
    return f.quantized[key]


def _after_product(f: _Freezer, node: FxNode, v: _Value, scale: Any, bias: Any) -> _Value:
    v.label = _label(node)
    factor = np.ones(1) if scale is None else _array(f.constant(scale, node)).reshape(-1)
    if (factor != 1).any():
        v = f.times(v, factor, v.label)
    return v if bias is None else f.plus(f._flush(v), _array(f.constant(bias, node)), _label(node))


def _offsets(f: _Freezer, node: FxNode, given: Sequence[FxNode | None]) -> dict[str, lg.Tensor]:
    """The constants of a product whose codes stand for code + offset; the exported graph leaves out trailing Nones."""
    found = {role: x for role, x in zip(lg.OFFSETS, given, strict=False) if x is not None}
    return {role: f._per_channel(_array(f.constant(x, node)), _label(node)) for role, x in found.items()}


@_handles(torch.ops.lowbit.conv2d.default)
def _lowbit_conv2d(f: _Freezer, node: FxNode) -> _Value:
    x, _w, scale, bias, stride, padding, dilation, groups = node.args[:8]
    layer = f._layer(node)
    v = f.env[x] if f.env[x].codes else f.value(x, node)
    encoded, kind = layer.encode(), _weight_type(layer, node)
    attrs = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation), "groups": groups}
    offsets = _offsets(f, node, node.args[9:])
    name = f._emit("conv2d", _label(node), (v.name,), {"weight": _weight(encoded.codes, kind), **offsets}, attrs)
    return _after_product(f, node, _Value(name, integer=v.codes and kind is not None and not offsets), scale, bias)


@_handles(torch.ops.lowbit.linear.default)
def _lowbit_linear(f: _Freezer, node: FxNode) -> _Value:
    x, _w, scale, bias = node.args[:4]
    layer = f._layer(node)
    v = f.env[x] if f.env[x].codes else f.value(x, node)
    encoded, kind = layer.encode(), _weight_type(layer, node)
    codes = encoded.codes if v.order is None else encoded.codes[:, torch.from_numpy(v.order)]
    offsets = _offsets(f, node, node.args[5:])
    name = f._emit("linear", _label(node), (v.name,), {"weight": _weight(codes, kind), **offsets})
    return _after_product(f, node, _Value(name, integer=v.codes and kind is not None and not offsets), scale, bias)


@_handles(aten.conv2d.default, aten.conv2d.padding, aten.convolution.default)
def _float_conv2d(f: _Freezer, node: FxNode) -> _Value:
    x, w, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    defaults = [(1, 1), (0, 0), (1, 1)]
    if node.target is aten.convolution.default:
        stride, padding, dilation, transposed, _output_padding, groups = node.args[3:9]
        if transposed:
            raise f._refuse(node, "transposed convolutions are not supported")
    else:
        rest = list(node.args[3:6]) + defaults[len(node.args[3:6]) :]
        stride, padding, dilation = rest
        groups = node.args[6] if len(node.args) > 6 else 1
    weight = f.constant(w, node)
    if weight.ndim != 4:
        raise f._refuse(node, "only two-dimensional convolutions are supported")
    kernel = weight.shape[2:]
    pair = [tuple(p) * 2 if len(p) == 1 else tuple(p) for p in (stride, dilation)]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(pair[1], kernel, strict=True)]
        pads = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        p = tuple(padding) * 2 if len(padding) == 1 else tuple(padding)
        pads = (p[0], p[1], p[0], p[1])
    v = f.value(x, node)
    attrs = {"stride": pair[0], "padding": pads, "dilation": pair[1], "groups": groups}
    name = f._emit("conv2d", _label(node), (v.name,), {"weight": _weight(weight, None)}, attrs)
    return _after_product(f, node, _Value(name), None, bias)


@_handles(aten.linear.default)
def _float_linear(f: _Freezer, node: FxNode) -> _Value:
    v = f.value(node.args[0], node)
    if len(_shape(node)) != 2:
        raise f._refuse(node, "linear layers take vectors (N, C)")
    weight = f.constant(node.args[1], node)
    if v.order is not None:
        weight = weight[:, torch.from_numpy(v.order)]
    name = f._emit("linear", _label(node), (v.name,), {"weight": _weight(weight, None)})
    return _after_product(f, node, _Value(name), None, node.args[2] if len(node.args) > 2 else None)


@_handles(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def _batch_norm(f: _Freezer, node: FxNode) -> Any:
    x, gamma, beta, mean, var = node.args[:5]
    plain = node.target is aten.batch_norm.default
    if plain and node.args[5]:
        raise f._refuse(node, "the batch norm is in training mode")
    if mean is None or var is None:
        raise f._refuse(node, "a batch norm without running statistics depends on the batch")
    eps = float(node.args[7] if plain else node.args[6])
    weight, bias = (None if x is None else f.constant(x, node) for x in (gamma, beta))
    folded = fold(f.constant(mean, node), f.constant(var, node), weight, bias, eps)
    out = _scaled_and_shifted(f, node, x, *folded)
    return out if plain else (out,)


@_handles(torch.ops.lowbit.affine.default)
def _affine(f: _Freezer, node: FxNode) -> _Value:
    x, factor, term = node.args
    return _scaled_and_shifted(f, node, x, f.constant(factor, node), f.constant(term, node))


def _scaled_and_shifted(f: _Freezer, node: FxNode, x: FxNode, factor: Tensor, term: Tensor) -> _Value:
    v, label = f.multiplicand(x, node), _label(node)
    return f.plus(f.times(v, _array(factor), label), _array(term), label)


@_handles(operator.getitem)
def _getitem(f: _Freezer, node: FxNode) -> Any:
    return f.env[node.args[0]][node.args[1]]


@_handles(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.feature_dropout.default,
)
def _same(f: _Freezer, node: FxNode) -> Any:
    if "dropout" in str(node.target) and node.args[2]:
        raise f._refuse(node, "dropout is in training mode")
    return f.env[node.args[0]]


@_handles(aten._to_copy.default, aten.to.dtype)
def _to(f: _Freezer, node: FxNode) -> Any:
    source = node.args[0]
    if node.meta["val"].dtype != torch.float32:
        raise f._refuse(
            node, f"converts to {node.meta['val'].dtype}; use Residual and residual_dtype='float16' for a 16-bit stream"
        )
    return f.env[source]


@_handles(torch.ops.lowbit.round_float16.default)
def _round_float16(f: _Freezer, node: FxNode) -> _Value:
    return f.step(node, "cast", f.value(node.args[0], node), dtype="float16")


@_handles(aten.relu.default, aten.relu_.default)
def _relu(f: _Freezer, node: FxNode) -> _Value:
    return f.step(node, "relu", f.value(node.args[0], node))


@_handles(aten.prelu.default, aten._prelu_kernel.default)
def _prelu(f: _Freezer, node: FxNode) -> _Value:
    v = f.value(node.args[0], node)
    slope = _array(f.constant(node.args[1], node)).reshape(-1)
    if v.order is not None:
        slope = _reorder(slope, v.order)
    return f.step(node, "prelu", v, params={"slope": f._per_channel(slope, _label(node))})


@_handles(aten.leaky_relu.default, aten.leaky_relu_.default)
def _leaky_relu(f: _Freezer, node: FxNode) -> _Value:
    slope = np.array([node.args[1] if len(node.args) > 1 else 0.01])
    return f.step(node, "prelu", f.value(node.args[0], node), params={"slope": f._per_channel(slope, _label(node))})


@_handles(aten.hardtanh.default, aten.hardtanh_.default, aten.clamp.default, aten.relu6.default)
def _clip(f: _Freezer, node: FxNode) -> _Value:
    defaults: tuple[float | None, float | None]
    defaults = {"hardtanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}.get(_op_name(node.target).rstrip("_"), (None, None))
    given = list(node.args[1:3])
    low, high = given + list(defaults)[len(given) :]
    largest = float(np.finfo(np.float32).max)
    low = -largest if low is None else float(np.float32(low))
    high = largest if high is None else float(np.float32(high))
    return f.step(node, "clip", f.value(node.args[0], node), low=low, high=high)


@_handles(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor)
def _add(f: _Freezer, node: FxNode) -> _Value:
    a, b = node.args
    minus = "sub" in str(node.target)
    if node.kwargs.get("alpha", 1) != 1:
        raise f._refuse(node, "adds with alpha other than 1")
    if not isinstance(f.env.get(a), _Value):
        if minus:
            raise f._refuse(node, "subtracts a value from a constant; write x * -1.0 + c")
        a, b = b, a
    if isinstance(b, fx.Node) and isinstance(f.env[b], _Value):
        if minus:
            raise f._refuse(node, "subtracts one value from another; write a + b * -1.0")
        left, right = f.value(a, node), f.value(b, node)
        if _shape(node.args[0]) != _shape(node.args[1]):
            raise f._refuse(
                node, f"adds values of the shapes {_shape(node.args[0])[1:]} and {_shape(node.args[1])[1:]}"
            )
        name = f._emit("add", f"{_label(node)}.add", (left.name, right.name))
        return _Value(name, order=left.order)
    v = f.value(a, node)
    term = f.channel_constant(b, node, v)
    # a layer that shifts its input keeps its own name for its product
    suffix = ".shift" if isinstance(f.model.get_submodule(_path(node)), QuantLayer) else ""
    return f.step(node, "add", v, suffix, {"term": f._per_channel(-term if minus else term, _label(node))})


@_handles(aten.mul.Tensor, aten.mul_.Tensor)
def _mul(f: _Freezer, node: FxNode) -> _Value:
    a, b = node.args
    if not isinstance(f.env.get(a), _Value):
        a, b = b, a
    if isinstance(b, fx.Node) and isinstance(f.env[b], _Value):
        raise f._refuse(node, "multiplies two values")
    v = f.multiplicand(a, node)
    return f.step(node, "mul", v, params={"factor": f._per_channel(f.channel_constant(b, node, v), _label(node))})


def _pool_geometry(f: _Freezer, node: FxNode, out: tuple[int, int], ceil_mode: bool) -> dict[str, Any]:
    kernel = tuple(node.args[1]) * (2 if len(node.args[1]) == 1 else 1)
    stride = node.args[2] if len(node.args) > 2 and node.args[2] else kernel
    padding = node.args[3] if len(node.args) > 3 else (0, 0)
    stride, p = (tuple(x) * (2 if len(x) == 1 else 1) for x in (stride, padding))
    extra = (0, 0)
    if ceil_mode:  # the windows that ceil_mode adds reach beyond the map: as padding at the bottom and right
        size = _shape(node.args[0])[2:]
        extra = tuple(max((out[i] - 1) * stride[i] + kernel[i] - size[i] - 2 * p[i], 0) for i in (0, 1))
    return {"kernel": kernel, "stride": stride, "padding": (p[0], p[1], p[0] + extra[0], p[1] + extra[1])}


@_handles(aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
def _max_pool(f: _Freezer, node: FxNode) -> Any:
    dilation = tuple(node.args[4]) if len(node.args) > 4 else (1,)
    if any(d != 1 for d in dilation):
        raise f._refuse(node, "max pooling with dilation is not supported")
    plain = node.target is aten.max_pool2d.default
    shape = tuple(int(s) for s in (node.meta["val"] if plain else node.meta["val"][0]).shape)
    geometry = _pool_geometry(f, node, (shape[2], shape[3]), len(node.args) > 5 and bool(node.args[5]))
    out = f.step(node, "max_pool", f.value(node.args[0], node), **geometry)
    return out if plain else (out,)


@_handles(aten.avg_pool2d.default)
def _avg_pool(f: _Freezer, node: FxNode) -> _Value:
    if len(node.args) > 6 and node.args[6]:
        raise f._refuse(node, "average pooling with divisor_override is not supported")
    ceil_mode = len(node.args) > 4 and bool(node.args[4])
    include = bool(node.args[5]) if len(node.args) > 5 else True
    shape = _shape(node)
    geometry = _pool_geometry(f, node, (shape[2], shape[3]), ceil_mode)
    if ceil_mode:
        # PyTorch never counts what ceil_mode adds, whatever count_include_pad says of the padding proper
        if include and any(len(node.args) > 3 and p for p in node.args[3]):
            raise f._refuse(node, "average pooling with padding, ceil_mode and count_include_pad is not supported")
        include = False
    if geometry["padding"] == (0, 0, 0, 0):
        include = True  # the same thing; one way to say it
    return f.step(node, "avg_pool", f.value(node.args[0], node), **geometry, count_include_pad=include)


@_handles(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(f: _Freezer, node: FxNode) -> _Value:
    (h, w), (oh, ow) = _shape(node.args[0])[2:], node.args[1]
    v = f.value(node.args[0], node)
    if (oh, ow) == (1, 1):
        return f.step(node, "global_avg_pool", v)
    if (oh, ow) == (h, w):
        return v
    if h % oh or w % ow:
        raise f._refuse(node, f"adaptive pooling from {h}x{w} to {oh}x{ow} has windows of different sizes")
    kernel = (h // oh, w // ow)
    return f.step(node, "avg_pool", v, kernel=kernel, stride=kernel, padding=(0, 0, 0, 0), count_include_pad=True)


@_handles(aten.mean.dim)
def _mean(f: _Freezer, node: FxNode) -> _Value:
    rank = len(_shape(node.args[0]))
    axes = sorted(d % rank for d in node.args[1])
    if rank != 4 or axes != [2, 3]:
        raise f._refuse(node, "only means over height and width are supported")
    v = f.step(node, "global_avg_pool", f.value(node.args[0], node))
    keep = len(node.args) > 2 and node.args[2]
    return v if keep else f.step(node, "flatten", v, suffix=".flatten")


@_handles(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dims,
    aten.squeeze.dim,
)
def _reshape(f: _Freezer, node: FxNode) -> Any:
    before, after = _shape(node.args[0]), _shape(node)
    if before == after:
        return f.env[node.args[0]]
    size = int(np.prod(before[1:]))
    if len(before) != 4 or after != (before[0], size):
        raise f._refuse(node, f"reshapes {before[1:]} to {after[1:]}; only (C, H, W) to a vector is supported")
    v = f.value(node.args[0], node) if not f.env[node.args[0]].codes else f.env[node.args[0]]
    out = f.step(node, "flatten", v, suffix=".flatten")
    out.codes = v.codes
    _, c, h, w = before
    if h * w > 1 and c > 1:
        out.order = np.arange(size).reshape(c, h, w).transpose(1, 2, 0).reshape(-1)
    return out


@_handles(aten.cat.default)
def _cat(f: _Freezer, node: FxNode) -> _Value:
    inputs = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    rank = len(_shape(node))
    if axis % rank != 1:
        raise f._refuse(node, f"joins along dimension {axis}; only channels (1) are supported")
    values = [f.value(x, node) for x in inputs]
    orders = [v.order for v in values]
    order = None
    if any(o is not None for o in orders):
        offsets = np.cumsum([0, *[_shape(x)[1] for x in inputs]])
        parts = [np.arange(_shape(x)[1]) if o is None else o for x, o in zip(inputs, orders, strict=True)]
        order = np.concatenate([p + o for p, o in zip(parts, offsets, strict=False)])
    name = f._emit("concat", _label(node), [v.name for v in values])
    return _Value(name, order=order)


@_handles(torch.ops.lowbit.resize_bicubic.default)
def _resize_bicubic(f: _Freezer, node: FxNode) -> _Value:
    return f.step(node, "resize_bicubic", f.value(node.args[0], node), factor=int(node.args[1]))


@_handles(aten.pixel_shuffle.default)
def _pixel_shuffle(f: _Freezer, node: FxNode) -> _Value:
    return f.step(node, "pixel_shuffle", f.value(node.args[0], node), factor=int(node.args[1]))
