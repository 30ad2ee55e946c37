"""prepare: any nn.Module -> the same network on low-bit layers; and what a training loop needs beside it."""

from __future__ import annotations

import copy
import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit.train.batchnorm import hard_batchnorm
from lowbit.train.batchnorm import state_batchnorm as state_norm
from lowbit.train.layers import PixelInput, Pixels, QuantConv2d, QuantLayer, QuantLinear, Residual, quantized_layers
from lowbit.train.quantizers import ACTIVATIONS, WEIGHTS, ActivationQuantizer, WeightQuantizer
from lowbit.train.registry import nearest

Q = TypeVar("Q", WeightQuantizer, ActivationQuantizer)

SHORTCUTS = ("*downsample*", "*shortcut*", "*down_sample*")
"""Names of 1x1 convolutions that count as edges: the down-sampling of a skip connection."""


@dataclass(frozen=True)
class _Plan:
    """What becomes of one layer."""

    method: str = "float"
    weight_bits: int = 32
    activation: str = "auto"
    activation_bits: int = 32
    options: Mapping[str, Any] | None = None
    activation_options: Mapping[str, Any] | None = None
    skip: bool = False


def prepare(
    model: nn.Module,
    method: str = "slb",
    weight_bits: int = 1,
    activation_bits: int = 1,
    *,
    activation: str = "auto",
    edges: str = "int8",
    image: Pixels | None = None,
    residual_dtype: str = "float32",
    state_batchnorm: bool = False,
    skip: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    activation_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of `model` whose Conv2d and Linear layers compute with few bits. `model` itself stays as it is.

    The float weights are where training starts, so load a float state_dict into `model` first to fine-tune it.
    The result is an ordinary module: deepcopy, state_dict, torch.compile, autocast and clipping work on it.
    ``eval()`` runs it on integers, as the engine will; ``train()`` on soft weights. Batch norms (BatchNorm1d and 2d with running
    statistics) become `HardBatchNorm1d`, `HardBatchNorm2d`, which evaluate as the engine does.

    Edges: the first Conv2d or Linear, the 1x1 convolutions of skip connections (names like `SHORTCUTS`) and the last
    Conv2d or Linear, in order of definition. With ``edges="int8"`` the first layer and the skips have 8-bit weights
    and inputs and the last is float32; with ``edges="float"`` all of them are float32, as in most published tables;
    with ``edges="none"`` there are none.

    Args:
        model: any module that torch.export can trace.
        method: weight method, see `lowbit.train.quantizers.WEIGHTS`. "float" leaves weights and inputs in float32 where no
            bits are given; ``weight_bits=32, activation_bits=1`` are float weights on signs.
        weight_bits: K; 32 stands for float weights.
        activation_bits: B, any that `activation` has; 32 stands for float inputs.
        activation: quantizer of the layers' inputs, see `ACTIVATIONS`; "auto" takes sign for 1 bit, dorefa for 2 to 8.
        edges: "int8", "float" or "none".
        image: how the first layer reads pixels. With it the network takes raw pixels (0..255, uint8 or float, NCHW);
            without it floats that are already normalised.
        residual_dtype: "float32" or "float16", the precision of the `Residual` modules' sums in evaluation and engine.
        state_batchnorm: replace BatchNorm1d and BatchNorm2d by the two-statistics `StateBatchNorm1d`, `StateBatchNorm2d`.
        skip: name patterns (fnmatch) of layers to leave alone.
        overrides: per name pattern: any of method, weight_bits, activation, activation_bits, options, activation_options,
            skip. Later patterns win over earlier ones, and all win over edges.
        options: keyword arguments of the weight quantizer; the docstring of each names them (`lowbit list`: slb has init, spread,
            learn_values; lns form, alpha, reduction, rho, rho_plus, rho_minus, gradient; recu tau_min, tau_max; irnet, adabin t_min).
        activation_options: keyword arguments of the activation quantizer (sign: gradient; pact: alpha; lsq: signed; ...).

    Returns:
        The prepared copy.

    Raises:
        ValueError: an unknown method, bits or option, a pattern that matches no layer, a layer that can't be quantized
            (padding_mode other than zeros), a norm that `state_batchnorm` can't replace, float16 asked for without `Residual`
            modules. Messages name the layer.
    """
    if edges not in ("int8", "float", "none"):
        raise ValueError(f"edges is 'int8', 'float' or 'none', not {edges!r}")
    if residual_dtype not in ("float32", "float16"):
        raise ValueError(f"residual_dtype is 'float32' or 'float16', not {residual_dtype!r}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is an nn.Module, not a {type(model).__name__}")
    if isinstance(skip, str):
        raise ValueError(f"skip is a list of name patterns: write skip=[{skip!r}]")
    base = _Plan(method, weight_bits, activation, activation_bits, options, activation_options)
    _check_plan(base, "prepare")
    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise ValueError("the model is prepared already; prepare the float model")

    model = copy.deepcopy(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if not layers:
        raise ValueError("the model has no Conv2d or Linear layer to quantize")
    plans = _plan(layers, base, edges, skip, overrides or {})
    first = next(iter(layers))
    for name, layer in layers.items():
        new = _replacement(name, layer, plans[name], image if name == first else None)
        if new is not layer:
            model = _swap(model, layer, new)
    if image is not None and not isinstance(getattr(_find(model, first), "input_quantizer", None), PixelInput):
        raise ValueError(f"image= needs the first layer, {first!r}, to be prepared, but it is skipped")
    for name, norm in [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]:
        try:
            (state_norm if state_batchnorm else hard_batchnorm)(norm)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    _set_residual_dtype(model, residual_dtype)
    model.train(model.training)  # so that the hard flags follow
    return model


def _plan(
    layers: Mapping[str, nn.Module],
    base: _Plan,
    edges: str,
    skip: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]],
) -> dict[str, _Plan]:
    names = list(layers)
    plans = dict.fromkeys(names, base)
    if edges != "none":
        edge = _Plan("int8", 8, "int8", 8) if edges == "int8" else _Plan()
        for name, layer in layers.items():
            pointwise = isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) == (1, 1)
            if pointwise and any(fnmatch.fnmatch(name, pattern) for pattern in SHORTCUTS):
                plans[name] = edge
        plans[names[0]] = edge
        if len(names) > 1:
            plans[names[-1]] = _Plan()
    for pattern in skip:
        for name in _matching(pattern, names, "skip"):
            plans[name] = _Plan(skip=True)
    fields = ("method", "weight_bits", "activation", "activation_bits", "options", "activation_options", "skip")
    for pattern, change in overrides.items():
        for key in change:
            if key not in fields:
                raise ValueError(f"overrides[{pattern!r}]: unknown key {key!r}: {nearest(key, list(fields))}")
        for name in _matching(pattern, names, "overrides"):
            start = plans[name]
            known = {f: getattr(start, f) for f in fields}
            for what, options in (("method", "options"), ("activation", "activation_options")):
                now = change.get(what, getattr(start, what))
                if now != getattr(start, what):  # another quantizer has options of its own
                    known[options] = getattr(base, options) if now == getattr(base, what) else None
            plan = _Plan(**{**known, **change})
            _check_plan(plan, f"overrides[{pattern!r}]")
            plans[name] = plan
    return plans


def _matching(pattern: str, names: Sequence[str], where: str) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ValueError(
            f"{where}: the pattern {pattern!r} matches no Conv2d or Linear layer: {nearest(pattern, list(names))}"
        )
    return found


def _check_plan(plan: _Plan, where: str) -> None:
    try:
        _weight_quantizer(plan)
        _input_quantizer(plan)
    except (ValueError, TypeError) as e:
        raise ValueError(f"{where}: {e}") from None


def _asks_for_float(plan: _Plan) -> bool:
    """weight_bits=1 is prepare's default, not a wish of somebody who asks for float; so is activation_bits=1 then."""
    return plan.method == "float" and plan.weight_bits == 1


def _weight_quantizer(plan: _Plan) -> WeightQuantizer:
    quantizer = WEIGHTS.get(plan.method)
    bits = 32 if _asks_for_float(plan) else plan.weight_bits
    if bits == 32:
        return WEIGHTS.get("float")(32)
    return _built(quantizer, plan.method, bits, plan.options)


def _built(quantizer: type[Q], name: str, bits: int, options: Mapping[str, Any] | None) -> Q:
    known = [key for key in inspect.signature(quantizer).parameters if key != "bits"]
    for key in options or {}:
        if key not in known:
            raise ValueError(f"{name!r} has no option {key!r}: {nearest(key, known)}")
    return quantizer(bits, **(options or {}))


def _input_quantizer(plan: _Plan) -> ActivationQuantizer | None:
    name = plan.activation
    if name == "auto":
        name = "sign" if plan.activation_bits == 1 else "dorefa"
    quantizer = ACTIVATIONS.get(name)
    if plan.activation_bits == 32 or (name == "sign" and plan.activation == "auto" and _asks_for_float(plan)):
        return None
    return _built(quantizer, name, plan.activation_bits, plan.activation_options)


def _replacement(name: str, layer: nn.Module, plan: _Plan, image: Pixels | None) -> nn.Module:
    if plan.skip:
        return layer
    assert isinstance(layer.weight, Tensor)
    if layer.weight.numel() == 0:
        raise ValueError(f"{name}: has no weights, its shape is {tuple(layer.weight.shape)}")
    weights = _weight_quantizer(plan)
    inputs: ActivationQuantizer | None = _input_quantizer(plan)
    if image is not None:
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        if isinstance(layer, nn.Conv2d) and len(image.zero_point) != channels:
            raise ValueError(
                f"{name}: image has {len(image.zero_point)} zero points, but the layer {channels} input channels"
            )
        inputs = PixelInput(image)
    if inputs is None and weights.bits == 32:
        return layer
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise ValueError(
            f"{name}: padding_mode={layer.padding_mode!r} can't run on integers exactly; use 'zeros', or leave the layer "
            f"alone with skip=[{name!r}]"
        )
    new: QuantLayer
    try:
        if isinstance(layer, nn.Linear):
            new = QuantLinear(layer, weights, inputs)
        else:
            assert isinstance(layer, nn.Conv2d)
            new = QuantConv2d(layer, weights, inputs)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    return new.to(layer.weight.device).train(layer.training)


def _find(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _swap(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands (a layer may be used under several names)."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
    return model


def _set_residual_dtype(model: nn.Module, dtype: str) -> None:
    sums = [m for m in model.modules() if isinstance(m, Residual)]
    if dtype == "float16" and not sums:
        raise ValueError(
            "residual_dtype='float16' rounds where the model has Residual modules, and it has none: write "
            "self.add = lowbit.train.Residual() and out = self.add(y, x) for each skip, or use residual_dtype='float32'"
        )
    for m in sums:
        m.dtype = dtype


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The sum of the methods' own loss terms (LNS), to add to the task's loss. Zero for methods without one."""
    total: Tensor | None = None
    for _, layer in quantized_layers(model):
        term = layer.weight_quantizer.auxiliary_loss(layer.weight)
        if term is not None:
            total = term if total is None else total + term
    if total is not None:
        return total
    return torch.zeros((), device=next((p.device for p in model.parameters()), None))


def mapping_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the methods' own networks (LNS); no others learn in ``train.warm_start``."""
    return [p for _, layer in quantized_layers(model) for p in layer.weight_quantizer.mapping_parameters()]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    latent_lr_scale: float = 1.0,
    latent_weight_decay: float = 0.0,
    mapping_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser.

    ``latent``: the latent weights of low-bit layers, at ``lr * latent_lr_scale``, decayed by `latent_weight_decay`;
    ``mapping``: the methods' own networks (LNS), at ``lr * mapping_lr_scale``, never decayed;
    ``weights``: all other weights with two dimensions or more, and what a quantizer calls `decayed` (PACT's clipping levels,
    LSQ's steps), decayed by `weight_decay`;
    ``rest``: batch-norm and PReLU parameters, biases, all else that quantizers learn (RSign's shifts), never decayed.

    The learning rate of the latent weights is the first-order knob of low-bit training: at 1x few signs ever flip. Watch
    `FlipCounter`: the runs of docs/LOG.md flip a third to a half of their signs.
    """
    latent, mapping, weights, rest = [], [], [], []
    mapped = {id(p) for p in mapping_parameters(model)}
    low_bit = {id(layer.weight) for _, layer in quantized_layers(model) if layer.weight_quantizer.bits <= 4}
    quantizers = [m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)]
    decayed = {id(getattr(q, name)) for q in quantizers for name in q.decayed}
    for p in model.parameters():
        if id(p) in low_bit:
            latent.append(p)
        elif id(p) in mapped:
            mapping.append(p)
        elif p.ndim >= 2 or id(p) in decayed:
            weights.append(p)
        else:
            rest.append(p)
    groups = [
        {"name": "latent", "params": latent, "lr": lr * latent_lr_scale, "weight_decay": latent_weight_decay},
        {"name": "mapping", "params": mapping, "lr": lr * mapping_lr_scale, "weight_decay": 0.0},
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "rest", "params": rest, "lr": lr, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


@dataclass(frozen=True)
class WeightStatistics:
    """`gap`: mean |W_c - W_q| over all low-bit weights (0: the soft network is the hard one). `temperature`: T of SLB, or None."""

    gap: float
    temperature: float | None


@torch.no_grad()
def weight_statistics(model: nn.Module) -> WeightStatistics:
    """How far the training weights are from the hard ones. Warn when the gap ends at 0.01 or above: T grew too little."""
    total, count, temperature = 0.0, 0, None
    for _, layer in _low_bit_layers(model):
        quantizer = layer.weight_quantizer
        hard = quantizer.encode(layer.weight).decode()
        total += float((quantizer.fake(layer.weight) - hard).abs().sum(dtype=torch.float64))
        count += hard.numel()
        if hasattr(quantizer, "temperature"):
            temperature = float(quantizer.temperature)  # type: ignore[arg-type]
    return WeightStatistics(total / max(count, 1), temperature)


class FlipCounter:
    """Counts how many low-bit weights changed their integer, since the last look and since the start."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = self._codes()
        self._last = self._start

    @torch.no_grad()
    def _codes(self) -> dict[str, Tensor]:
        layers = _low_bit_layers(self._model)
        return {name: layer.weight_quantizer.encode(layer.weight).codes.to(torch.int16) for name, layer in layers}

    def update(self) -> dict[str, float]:
        """``flips_epoch`` and ``flips_start``: fractions of all low-bit weights."""
        now = self._codes()
        count = max(sum(c.numel() for c in now.values()), 1)

        def changed(then: dict[str, Tensor]) -> float:
            return sum(int((now[k] != then[k].to(now[k].device)).sum()) for k in now) / count

        result = {"flips_epoch": changed(self._last), "flips_start": changed(self._start)}
        self._last = now
        return result

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"start": self._start, "last": self._last}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]]) -> None:
        self._start, self._last = state["start"], state["last"]


def _low_bit_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    return [(name, layer) for name, layer in quantized_layers(model) if layer.weight_quantizer.bits <= 4]
