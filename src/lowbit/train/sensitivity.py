"""Which layer costs how much at which bits, measured on a trained network, and the best bits for a budget.

One layer at a time goes to other bits, the weights of all others stay as they were trained: a few steps of fine-tuning, batch norms
calibrated, the held-out images answered. The network without a change takes the same steps on the same images, and what a layer
costs is the difference, image by image. `lowbit.train.mixed` adds the losses up and chooses bits for a budget.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowbit.graph import Graph
from lowbit.inspect import layer_table
from lowbit.packfile import dumps
from lowbit.runtime import Engine
from lowbit.train.data import Augment, DataError, DataSource
from lowbit.train.export import file_meta
from lowbit.train.freeze import freeze, to_numpy
from lowbit.train.layers import PixelInput, QuantLayer, constant_weights, quantized_layers
from lowbit.train.module import calibrate
from lowbit.train.network import Trained, build_network, float_network, load_trained
from lowbit.train.prepare import auxiliary_loss
from lowbit.train.recipe import Recipe
from lowbit.train.rundir import InputSpec, RunError, RunLock, machine, read_json, write_json
from lowbit.train.start import Start
from lowbit.train.tasks import TASKS
from lowbit.train.tasks.superres import psnr
from lowbit.train.trainer import load_data

__all__ = ["PAIRS", "RESULT", "STEPS", "Bits", "Images", "Network", "measure", "parse_bits", "size_of"]

FORMAT: Final = 1
RESULT: Final = "sensitivity.json"
STEPS: Final = 50
LR: Final = 1e-3
"""Of Adam, falling linearly to 0. Adam's steps have a size of their own, so one rate does for float and for latent weights."""

_WEIGHTS: Final = {1: "sign", 2: "lsq", 3: "lsq", 4: "lsq", 8: "int8", 32: "float"}
_ACTIVATIONS: Final = {1: "sign", 2: "lsq", 3: "lsq", 4: "lsq", 8: "int8", 32: "auto"}
"""What a layer is quantized with at each number of bits: methods that start from real weights and need no schedule."""

Floats = NDArray[np.float64]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, order=True)
class Bits:
    """Bits of a layer's weights and of its inputs; 32 stands for float."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}"


PAIRS: Final = (Bits(1, 1), Bits(2, 2), Bits(4, 4), Bits(8, 8))


def parse_bits(text: str) -> Bits:
    """``"2/4"``: 2-bit weights, 4-bit inputs.

    Raises:
        ValueError: not of this form, or bits that there is no method for.
    """
    parts = text.split("/")
    known = ", ".join(map(str, _WEIGHTS))
    if len(parts) != 2 or not all(part.isdecimal() and int(part) in _WEIGHTS for part in parts):
        raise ValueError(f"--bits {text}: write bits of weights / bits of inputs, such as 2/4; each is one of {known}")
    return Bits(int(parts[0]), int(parts[1]))


# ------------------------------------------------------------------------------------------------ the networks


def _override(bits: Bits, signed: bool) -> dict[str, Any]:
    """The entry of ``quantize.overrides`` that gives a layer these bits."""
    options = {"signed": True} if signed and _ACTIVATIONS[bits.activations] == "lsq" else {}
    return {
        "method": _WEIGHTS[bits.weights],
        "weight_bits": bits.weights,
        "activation": _ACTIVATIONS[bits.activations],
        "activation_bits": bits.activations,
        "options": {},
        "activation_options": options,
    }


def _bits_of(module: nn.Module) -> Bits:
    if not isinstance(module, QuantLayer):
        return Bits(32, 32)
    inputs = module.input_quantizer
    return Bits(module.weight_quantizer.bits, 32 if inputs is None else inputs.bits)


def _same_kind(one: nn.Module | None, other: nn.Module | None) -> bool:
    if one is None or other is None:
        return False
    return type(one) is type(other) and getattr(one, "bits", 0) == getattr(other, "bits", 0)


class Network:
    """A trained network, and what it becomes when layers change their bits."""

    def __init__(self, trained: Trained, place: str) -> None:
        self.recipe, self.spec, self.model = trained.recipe, trained.spec, trained.model
        layers = [
            (name, m)
            for name, m in float_network(self.recipe, self.spec).named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear)
        ]
        self.first = layers[0][0]
        self.weights = {name: m.weight.numel() for name, m in layers}
        q = self.recipe.quantize
        left_alone = [*q.skip, *(pattern for pattern, change in q.overrides.items() if change.get("skip"))]
        self.layers = {
            name: _bits_of(self.model.get_submodule(name))
            for name, m in layers
            if getattr(m, "padding_mode", "zeros") == "zeros" and not any(fnmatch.fnmatch(name, p) for p in left_alone)
        }
        self.signed: dict[str, bool] = {}
        # the float weights that a layer starts from: latent ones, or where those are logits the values the network runs with
        state = dict(self.model.state_dict())
        for name, layer in quantized_layers(self.model):
            if not layer.weight_quantizer.real_latent:
                state[f"{name}.weight"] = layer.encode().decode()
        self._start = Start(place, state, None)

    def pair(self, name: str, bits: Bits) -> Bits:
        """What a layer can have of these bits: the first layer of a network for images reads pixels, of 8 bits."""
        return Bits(bits.weights, 8) if name == self.first and self.spec.classes else bits

    def look_at_inputs(self, x: Tensor) -> None:
        """Note which layers' inputs can be negative."""
        handles = []

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                self.signed[name] = self.signed.get(name, False) or bool((args[0] < 0).any())

            return hook

        for name in self.layers:
            handles.append(self.model.get_submodule(name).register_forward_pre_hook(note(name)))
        try:
            with torch.no_grad():
                self.model.eval()(x)
        finally:
            for handle in handles:
                handle.remove()

    def overrides(self, choice: Mapping[str, Bits]) -> dict[str, dict[str, Any]]:
        """Of the layers that don't keep the bits they were trained with, in the network's order."""
        return {
            name: _override(choice[name], self.signed.get(name, True))
            for name, trained in self.layers.items()
            if choice.get(name, trained) != trained
        }

    def changed(self, choice: Mapping[str, Bits], x: Tensor) -> nn.Module:
        """The trained network with some layers at other bits, in evaluation; ranges of new inputs are measured on `x`.

        What did not change has every number of the trained network, quantizers included.
        """
        overrides = self.overrides(choice)
        q = self.recipe.quantize
        # the overrides of a layer come last: later patterns win
        merged = {**{k: v for k, v in q.overrides.items() if k not in overrides}, **overrides}
        recipe = self.recipe.model_copy(update={"quantize": q.model_copy(update={"overrides": merged})})
        if any(layer.weight_quantizer.binary_start for _, layer in quantized_layers(self.model)):
            model = build_network(recipe, self.spec, Start(self._start.place, self._start.state, self.model))
        else:
            model = build_network(recipe, self.spec, self._start)
        trained = dict(quantized_layers(self.model))
        own = model.state_dict()
        kept = {
            key: value
            for key, value in self.model.state_dict().items()
            if key in own and not any(key.startswith(f"{name}.") for name in overrides)
        }
        model.load_state_dict(kept, strict=False)
        new_inputs = []
        for name in overrides:
            layer, before = model.get_submodule(name), trained.get(name)
            if not isinstance(layer, QuantLayer):
                continue
            if before is not None and _same_kind(layer.weight_quantizer, before.weight_quantizer):
                layer.weight_quantizer.load_state_dict(before.weight_quantizer.state_dict())
                layer.weight.data.copy_(before.weight.data)
            if before is not None and _same_kind(layer.input_quantizer, before.input_quantizer):
                assert layer.input_quantizer is not None
                assert before.input_quantizer is not None
                layer.input_quantizer.load_state_dict(before.input_quantizer.state_dict())
            elif layer.input_quantizer is not None and not isinstance(layer.input_quantizer, PixelInput):
                new_inputs.append(layer)
        model.eval()
        if new_inputs:
            self._measure_ranges(model, new_inputs, x)
        return model

    @staticmethod
    def _measure_ranges(model: nn.Module, layers: Sequence[QuantLayer], x: Tensor) -> None:
        """Steps and ranges that a method takes from its first batch, and nothing else of the network."""
        for layer in layers:
            layer.hard = False
            assert layer.input_quantizer is not None
            layer.input_quantizer.train()
        with torch.no_grad():
            model(x)
        model.eval()


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Cost:
    """Of a layer in the file and on the engine: bytes (its share of the description included) and seconds (None: not measured)."""

    bytes: float
    seconds: float | None


@dataclass(frozen=True)
class Size:
    """Of a whole network: bytes of the file, seconds of the engine for one input, and every layer's part.

    What no layer has, most of it the description of the graph, is shared out among the layers evenly: so the bytes of a layer at
    two kinds of bits differ by what the file of a network does whose layers all change.
    """

    bytes: int
    seconds: float | None
    rows: Mapping[str, Cost]


def size_of(model: nn.Module, here: Images, names: Sequence[str], timed: bool, recipe: Recipe | None = None) -> Size:
    """Freeze a network, and count. The file says about itself what that of a run of `recipe` would; by default the trained network's."""
    x, recipe = here.example, recipe or here.recipe
    meta = file_meta(recipe, here.spec, recipe.train.epochs, here.data.resize)
    graph = freeze(model, x[:1], meta=meta)
    found = {row.name: row for row in layer_table(graph)}
    missing = [name for name in names if name not in found]
    if missing:
        raise RunError(
            f"{missing[0]}: this layer does not stand in the exported network under its name, so its size is not known"
        )
    seconds, by_layer = _seconds(graph, to_numpy(x[:1]), names) if timed else (None, {})
    whole = len(dumps(graph))
    share = (whole - sum(found[name].file_bytes for name in names)) / len(names)
    return Size(whole, seconds, {name: Cost(found[name].file_bytes + share, by_layer.get(name)) for name in names})


def _seconds(graph: Graph, x: NDArray[Any], names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Of the whole network and of each layer, on one thread. What stands in front of a layer's step (sums of codes, a conversion of its
    input) belongs to it."""
    engine = Engine(graph)
    wanted, by_layer, before = set(names), dict.fromkeys(names, 0.0), 0.0
    taken = engine.profile(x, repeats=50)
    for step, seconds in zip(engine.plan, taken, strict=True):
        here = [name for name in step["nodes"] if name in wanted]
        if here:
            by_layer[here[0]] += before + seconds
        before = seconds + before if not here and step["kernel"] == "code_sums" else 0.0
    return sum(taken), by_layer


class Images:
    """What candidates learn from, are calibrated and answer on: the same for all."""

    def __init__(self, recipe: Recipe, spec: InputSpec, data: DataSource, images: int, steps: int) -> None:
        self.recipe, self.spec, self.data, self.steps = recipe, spec, data, steps
        if not data.count("val"):
            raise DataError(f"{data.name}: holds no images out, and sensitivity never looks at test images")
        there = data.count("val")
        self.apart = max(there // images, 1)
        self.count = min(images, there)
        self.task = TASKS.get(recipe.task).of(recipe, spec)
        t = recipe.train
        wanted = t.calibration_images or max(min(2000, data.count("val")), t.eval_batch_size)
        self.calibration = data.calibration(wanted, t.eval_batch_size, workers=t.workers)
        self.calibration_images = wanted
        self.example = next(iter(self.calibration))

    def fine_tune(self, model: nn.Module, layers: Collection[str]) -> None:
        """So many steps of Adam on soft weights, the same batches every time: of the layers named with their quantizers, and of what
        is small (batch norms, slopes, biases). All other weights stay as they were trained."""
        t = self.recipe.train
        if not self.steps:
            return
        theirs = {id(p) for name in layers for p in model.get_submodule(name).parameters()}
        for p in model.parameters():
            p.requires_grad_(id(p) in theirs or p.ndim < 2)
        learning = [p for p in model.parameters() if p.requires_grad]
        if not learning:
            return
        optimizer = torch.optim.Adam(learning, LR, fused=True)
        batches = self.data.batches(
            t.batch_size,
            seed=self.recipe.seed,
            augment=Augment(**self.recipe.data.augment.model_dump()),
            workers=t.workers,
        )
        model.train()
        done = epoch = 0
        while done < self.steps:
            batches.set_epoch(epoch)
            for x, y in islice(batches, self.steps - done):
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1 - done / self.steps)
                if t.channels_last and x.ndim == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                loss = self.task.loss(model(x), y) + auxiliary_loss(model)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done += 1
            epoch += 1
        model.eval()

    def reference(self, net: Network) -> Floats:
        """The scores of the network without a change, after the same steps."""
        return self.answers(net, {})

    def answers(self, net: Network, choice: Mapping[str, Bits]) -> Floats:
        """The scores of a network with some layers at other bits, after fine-tuning."""
        model = net.changed(choice, self.example)
        self.fine_tune(model, net.overrides(choice))
        return self.scores(model)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> Floats:
        """Of every held-out image that is used: 1 where the answer is right, else 0; of pictures their PSNR."""
        calibrate(model, self.recipe, self.calibration)
        model.eval()
        found: list[Floats] = []
        t, left = self.recipe.train, self.count
        with constant_weights(model):
            spread = self.data.evaluation("val", t.eval_batch_size, workers=t.workers, world_size=self.apart)
            for pair in spread:
                x, y = pair[0][:left], pair[1][:left]
                out = model(x).float()
                if self.spec.classes:
                    found.append((out.argmax(1) == y).double().numpy())
                else:
                    found.append(np.array([psnr(out[0, 0].numpy(), y[0, 0].numpy(), self.spec.upscale)]))
                left -= len(x)
                if left <= 0:
                    break
        return np.concatenate(found)


def mean_and_error(values: Floats) -> tuple[float, float]:
    """Mean and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def measure(
    run_dir: str | Path,
    pairs: Sequence[Bits] = PAIRS,
    *,
    layers: Sequence[str] = (),
    images: int = 2000,
    steps: int = STEPS,
    timed: bool = True,
    data: DataSource | None = None,
    overwrite: bool = False,
    on_progress: Report | None = None,
) -> dict[str, Any]:
    """What each layer alone costs at each pair of bits; written to ``RUN/sensitivity.json`` as it is found.

    The same call goes on where it was interrupted, and with more pairs or layers measures those.

    Args:
        run_dir: a finished run, float or low-bit.
        pairs: bits of weights and inputs to try. A pair that a layer was trained with is not tried on it.
        layers: name patterns (fnmatch) of the layers; all by default. Layers that the recipe skips are left alone.
        images: held-out images to answer, spread over all of them, the same every time. Of super-resolution pictures.
        steps: of fine-tuning, for each candidate and for the network it is compared with.
        timed: measure the layers' time on the engine, too.
        data: the run's data set; by default the recipe's own.
        overwrite: measure again what is there.
        on_progress: called with (stage, done, total).

    Returns:
        Plain JSON, what the file holds: ``format, run, task, metric, data, settings, machine, seconds, trained, reference, network,
        layers``.
        ``trained`` is the network as it is, ``reference`` after the steps that the candidates take, ``network`` has bytes and seconds of
        the whole as trained and with all layers at a pair. Each of ``layers`` has ``name, weights, trained`` (bits),
        ``bytes, seconds`` and ``bits``: by pair ``value, loss, standard_error`` (of the loss: differences image by image), ``bytes,
        seconds``. Accuracy is between 0 and 1, PSNR in dB, times in seconds for one input.

    Raises:
        RunError: not a finished run, or the file there was made with other settings. DataError: no held-out images.
        ValueError: no layer of such a name, or settings that make no sense.
    """
    if images < 2 or steps < 0:
        raise ValueError(f"images = {images} must be at least 2, steps = {steps} not negative")
    place = Path(run_dir)
    if not place.is_dir():
        raise RunError(f"{place}: not a run directory; sensitivity is measured on a run, not on a file")
    report = on_progress or (lambda *_: None)
    trained = load_trained(place)
    net = Network(trained, str(place))
    wanted = _chosen(net, layers)
    with RunLock(place) as lock:
        lock.take()
        here = Images(net.recipe, net.spec, data or load_data(net.recipe), images, steps)
        net.look_at_inputs(here.example)
        settings = _settings(place, here)
        tree = None if overwrite else _read(place / RESULT, settings)
        if tree is None:
            tree = _begin(net, here, settings)
        _measure_costs(net, here, tree, pairs, timed, report)
        rows = {row["name"]: row for row in tree["layers"]}
        todo = [
            (name, pair)
            for name in wanted
            for pair in dict.fromkeys(net.pair(name, bits) for bits in pairs)
            if pair != net.layers[name] and "loss" not in rows[name]["bits"][str(pair)]
        ]
        if todo:
            clock = time.perf_counter()
            report("layers", 0, len(todo) + 1)
            before = here.reference(net)
            tree["reference"] = dict(zip(("value", "standard_error"), mean_and_error(before), strict=True))
            for done, (name, pair) in enumerate(todo):
                report("layers", done + 1, len(todo) + 1)
                scores = here.answers(net, {name: pair})
                loss, error = mean_and_error(before - scores)
                rows[name]["bits"][str(pair)] |= {"value": float(scores.mean()), "loss": loss, "standard_error": error}
                now = time.perf_counter()
                tree["seconds"] += now - clock
                clock = now
                write_json(place / RESULT, tree)
            report("layers", len(todo) + 1, len(todo) + 1)
        write_json(place / RESULT, tree)
    return tree


def _chosen(net: Network, patterns: Sequence[str]) -> list[str]:
    found = [name for name in net.layers if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]
    unused = [p for p in patterns if not fnmatch.filter(net.layers, p)]
    if unused or not found:
        raise ValueError(
            f"--layer {unused[0] if unused else ''}: no layer that can change its bits is called so; there are {', '.join(net.layers)}"
        )
    return found


def _settings(place: Path, here: Images) -> dict[str, Any]:
    network = hashlib.sha256((place / "checkpoints" / "final.ckpt").read_bytes()).hexdigest()
    return {
        "network": network,
        "images": here.count,
        "steps": here.steps,
        "lr": LR,
        "calibration_images": here.calibration_images,
    }


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    tree = read_json(path, "measure again with --overwrite", FORMAT, ("settings",))
    if tree is None:
        return None
    there = tree["settings"]
    other = [key for key in settings if there.get(key) != settings[key]]
    if other:
        key = other[0]
        what = "another network" if key == "network" else f"{key}: {there.get(key)} there, {settings[key]} now"
        raise RunError(f"{path}: was measured otherwise ({what}); measure again with --overwrite")
    return tree


def _begin(net: Network, here: Images, settings: Mapping[str, Any]) -> dict[str, Any]:
    value, error = mean_and_error(here.scores(net.changed({}, here.example)))
    return {
        "format": FORMAT,
        "run": net.recipe.name,
        "task": net.recipe.task,
        "metric": here.task.metric,
        "data": {
            "name": net.recipe.data.name,
            "split": "validation",
            "images": here.count,
            "trained_on": net.recipe.train.final,
        },
        "settings": dict(settings),
        "machine": machine("cpu"),
        "seconds": 0.0,
        "trained": {"value": value, "standard_error": error},
        "reference": {},
        "network": {},
        "layers": [
            {"name": name, "weights": net.weights[name], "trained": str(bits), "bits": {}}
            for name, bits in net.layers.items()
        ],
    }


def _measure_costs(
    net: Network, here: Images, tree: dict[str, Any], pairs: Sequence[Bits], timed: bool, report: Report
) -> None:
    """Bytes and time of every layer at every pair: of networks that have all layers at that pair, one freeze for each."""
    sizes, names = tree["network"], list(net.layers)

    def known(key: str) -> bool:
        return key in sizes and not (timed and sizes[key]["seconds"] is None)

    wanted: list[tuple[str, dict[str, Bits]]] = [("trained", {})]
    wanted += [(str(bits), {name: net.pair(name, bits) for name in names}) for bits in dict.fromkeys(pairs)]
    wanted = [(key, choice) for key, choice in wanted if not known(key)]
    for done, (key, choice) in enumerate(wanted):
        report("bytes and time", done, len(wanted))
        size = size_of(net.changed(choice, here.example), here, names, timed)
        sizes[key] = {"bytes": size.bytes, "seconds": size.seconds}
        for row in tree["layers"]:
            cost = asdict(size.rows[row["name"]])
            if key == "trained":
                row |= cost
            elif choice[row["name"]] != net.layers[row["name"]]:
                bits = str(choice[row["name"]])
                row["bits"][bits] = row["bits"].get(bits, {}) | cost
    report("bytes and time", len(wanted), max(len(wanted), 1))
