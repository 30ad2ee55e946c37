"""The proof that ends every export: interpreter against engine, training graph against engine, on real inputs.

Three questions, from hard to soft (docs/OPS.md says why the first has no tolerance and the others a bound):

1. Does any value that the engine's fused plan materialises differ from the interpreter's, in any bit? Must be 0.
2. *Root flips*: with every layer fed the training graph's own inputs, how many activation codes does the Graph give
   otherwise than the training graph? What may differ is the order of summation in a float layer or an average of floats, where a
   number lies next to a threshold; a code of B bits has 2^B - 1 of them. At most 1 in 10^6 comparisons with a threshold.
3. Left to run, how many decisions (argmax) change? At most 2 in 10,000. Codes that differ by then are counted as cascaded flips.
   For pictures: by how much does the PSNR of a whole picture change? At most 0.01 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit import interpreter
from lowbit.graph import Graph, Node, ValueType
from lowbit.runtime import Engine
from lowbit.train.data.superres import Pair
from lowbit.train.freeze import to_numpy
from lowbit.train.layers import PixelInput, QuantLayer, Residual
from lowbit.train.resize import resize_bicubic
from lowbit.train.tasks.classify import CONFUSION_CLASSES
from lowbit.train.tasks.superres import psnr
from lowbit.upscale import Upscaler

ROOT_FLIP_BOUND = 1e-6
DECISION_BOUND = 2e-4
PSNR_BOUND = 0.01
DECISION_BATCH = 500
_BATCH = 64
_CROPS = 2
"""Of pictures, which keep many more values each."""

Array = np.ndarray[Any, Any]


@dataclass
class Proof:
    """What was compared, and what differed.

    Attributes:
        inputs: inputs on which interpreter and engine were compared.
        integers, integers_differ: integer values compared (codes, accumulators, bits of float outputs); those that differ.
        first_difference: name of the first value that differs, or None.
        root_inputs, root_activations, root_flips: see the module; `root_by_layer` holds the layers with flips.
        root_comparisons: of those activations with their thresholds: for 1 bit as many as activations, for 8 bits 255 times.
        cascaded_flips: codes that differ on `root_inputs` inputs when nothing is corrected.
        decisions, decisions_changed: argmax of training graph and engine.
        accuracy_training, accuracy_engine: on the labelled inputs, or None without labels.
        confusion: on the same inputs, rows are the truth, columns the engine's answers; None without labels, or with many classes.
        isa: the engine's instruction set.
        pictures: of super-resolution: ``name, psnr_training, psnr_engine, psnr_bicubic`` of every picture; None for other tasks.
    """

    inputs: int = 0
    integers: int = 0
    integers_differ: int = 0
    first_difference: str | None = None
    root_inputs: int = 0
    root_activations: int = 0
    root_comparisons: int = 0
    root_flips: int = 0
    root_by_layer: dict[str, int] = field(default_factory=dict)
    cascaded_flips: int = 0
    decisions: int = 0
    decisions_changed: int = 0
    accuracy_training: float | None = None
    accuracy_engine: float | None = None
    confusion: list[list[int]] | None = None
    isa: str = ""
    pictures: list[dict[str, Any]] | None = None

    @property
    def psnr_apart(self) -> float:
        """The largest difference between training graph and engine, dB."""
        return max((abs(p["psnr_training"] - p["psnr_engine"]) for p in self.pictures or ()), default=0.0)

    def psnr(self, of: str) -> float | None:
        """Mean PSNR over the pictures of "training", "engine" or "bicubic"; None for other tasks."""
        return None if self.pictures is None else fmean(p[f"psnr_{of}"] for p in self.pictures)

    @property
    def root_flip_rate(self) -> float:
        """Root flips per activation."""
        return self.root_flips / max(self.root_activations, 1)

    def failures(self) -> list[str]:
        """What is beyond its bound, one sentence each; empty where the proof holds."""
        found = []
        if self.integers_differ:
            found.append(
                f"{self.integers_differ} of {self.integers} integers differ between interpreter and engine ({self.isa}), "
                f"first in {self.first_difference}"
            )
        if self.root_flips > ROOT_FLIP_BOUND * self.root_comparisons:
            worst = max(self.root_by_layer, key=lambda k: self.root_by_layer[k])
            found.append(
                f"{self.root_flips} root flips in {self.root_activations} activations against the training graph "
                f"(bound {ROOT_FLIP_BOUND:g} of their {self.root_comparisons} comparisons with a threshold), most in {worst}"
            )
        if self.decisions_changed > DECISION_BOUND * self.decisions:
            found.append(
                f"{self.decisions_changed} of {self.decisions} decisions changed against the training graph "
                f"(bound {DECISION_BOUND:g} of them)"
            )
        if self.psnr_apart > PSNR_BOUND:
            found.append(
                f"the PSNR of a picture differs by {self.psnr_apart:.4f} dB from the training graph's (bound {PSNR_BOUND:g})"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        tree = {**asdict(self), "root_flip_rate": self.root_flip_rate, "failures": self.failures()}
        return tree if self.pictures is None else {**tree, "psnr_apart": self.psnr_apart}


def prove(
    model: nn.Module,
    graph: Graph,
    engine: Engine,
    inputs: Tensor,
    test: tuple[Tensor, Tensor | None] | Iterable[tuple[Tensor, Tensor]] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    test_count: int = 0,
) -> Proof:
    """Compare interpreter, engine and training graph.

    Args:
        model: the prepared network in evaluation, which `graph` was frozen from.
        graph, engine: the Graph and an engine that loaded it from its file.
        inputs: at least 500 real inputs, as the model takes them (NCHW or (N, C)).
        test: inputs to compare decisions on, with labels where there are any, or batches of both; None takes `inputs`.
        on_progress: called with (stage, done, total).
        test_count: how many inputs the batches hold, for the progress.

    Returns:
        The Proof; `Proof.failures` tells whether it holds.
    """
    report = on_progress or (lambda *_: None)
    proof = _compare_inputs(model, graph, engine, inputs, _BATCH, report)
    whole = (inputs, None) if test is None else test
    if isinstance(whole, tuple):
        test_count = len(whole[0])
    right_training = right_engine = 0
    confusion: Array | None = None
    for batch, labels in _batches(whole):
        with torch.no_grad():
            ours = model(batch).float().cpu().numpy().reshape(len(batch), -1).argmax(axis=1)
        theirs = np.asarray(engine(to_numpy(batch))).reshape(len(batch), -1).argmax(axis=1)
        proof.decisions += len(batch)
        proof.decisions_changed += int((ours != theirs).sum())
        if labels is not None:
            truth = labels.cpu().numpy()
            right_training += int((ours == truth).sum())
            right_engine += int((theirs == truth).sum())
            if confusion is None:
                confusion = np.zeros((int(np.prod(engine.output_shape)),) * 2, np.int64)
            np.add.at(confusion, (truth, theirs), 1)
        report("decisions", proof.decisions, test_count)
    if confusion is not None:
        proof.accuracy_training = right_training / proof.decisions
        proof.accuracy_engine = right_engine / proof.decisions
        proof.confusion = confusion.tolist() if len(confusion) <= CONFUSION_CLASSES else None
    return proof


def prove_pictures(
    model: nn.Module,
    graph: Graph,
    engine: Engine,
    crops: Tensor,
    pictures: Iterable[tuple[Tensor, Tensor]],
    upscale: int,
    on_progress: Callable[[str, int, int], None] | None = None,
    count: int = 0,
) -> Proof:
    """`prove` for super-resolution: interpreter, engine and training graph on crops, the PSNR of whole pictures.

    Args:
        model, graph, engine: as for `prove`.
        crops: small luma ``[N, 1, H, W]`` of the Graph's input size, of real pictures.
        pictures: (small, large) of each, as ``DataSource.evaluation`` gives them.
        upscale: how much larger the large ones are.
        on_progress: called with (stage, done, total).
        count: how many pictures there are, for the progress.

    Raises:
        ValueError: there are no pictures, or the network can't run on pictures of any size (`lowbit.upscale`).
    """
    report = on_progress or (lambda *_: None)
    proof = _compare_inputs(model, graph, engine, crops, _CROPS, report)
    proof.pictures = []
    upscaler = Upscaler(graph, engine.threads, isa=engine.isa)
    for pair in pictures:
        low, high = pair
        with torch.no_grad():
            ours, bicubic = model(low).float(), resize_bicubic(low, upscale)
        theirs = upscaler(low[0, 0].numpy())
        target = high[0, 0].numpy()
        row: dict[str, Any] = {"name": pair.name if isinstance(pair, Pair) else str(len(proof.pictures))}
        for key, y in (("training", ours[0, 0].cpu().numpy()), ("engine", theirs), ("bicubic", bicubic[0, 0].numpy())):
            row[f"psnr_{key}"] = psnr(y, target, upscale)
        proof.pictures.append(row)
        report("pictures", len(proof.pictures), count)
    if not proof.pictures:
        raise ValueError("there are no pictures to compare the PSNR of")
    return proof


def _compare_inputs(
    model: nn.Module,
    graph: Graph,
    engine: Engine,
    inputs: Tensor,
    batch_size: int,
    report: Callable[[str, int, int], None],
) -> Proof:
    proof = Proof(isa=engine.isa)
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        _compare_engine(proof, graph, engine, to_numpy(batch))
        _compare_training(proof, model, graph, engine, batch)
        report("interpreter against engine", min(start + batch_size, len(inputs)), len(inputs))
    return proof


def _batches(
    test: tuple[Tensor, Tensor | None] | Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if not isinstance(test, tuple):
        yield from test
        return
    x, labels = test
    for start in range(0, len(x), DECISION_BATCH):
        part = slice(start, start + DECISION_BATCH)
        yield x[part], None if labels is None else labels[part]


def _bits(x: Array) -> Array:
    """Floats as the integers of their bits, so that equal means equal."""
    kinds = {np.dtype(np.float32): np.int32, np.dtype(np.float16): np.int16}
    return x.view(kinds[x.dtype]) if x.dtype in kinds else x


def _compare_engine(proof: Proof, graph: Graph, engine: Engine, x: Array) -> None:
    _, expected = interpreter.run(graph, x, trace=True)
    out, actual = engine.run(x, trace=True)
    actual[graph.output.name] = out
    missing = [n.name for n in graph.nodes if n.op == "quantize" and n.name not in actual]
    if missing:
        raise RuntimeError(f"the engine's trace lacks {', '.join(missing)}")
    for node in graph.nodes:
        if node.op == "input" or node.name not in actual:
            continue
        ours, theirs = expected[node.name], actual[node.name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise RuntimeError(
                f"{node.name}: {ours.dtype}{ours.shape} in the interpreter, {theirs.dtype}{theirs.shape} in the engine"
            )
        differ = int((_bits(np.ascontiguousarray(ours)) != _bits(np.ascontiguousarray(theirs))).sum())
        proof.integers += ours.size
        proof.integers_differ += differ
        if differ and proof.first_difference is None:
            proof.first_difference = node.name
    proof.inputs += len(x)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """The training graph's own codes by quantize node's name, and its residual streams by node's name."""
    codes: dict[str, Array] = {}
    streams: dict[str, Array] = {}

    def key(wish: str, into: dict[str, Array]) -> str:
        name, n = wish, 2
        while name in into:
            name, n = f"{wish}_{n}", n + 1
        return name

    def layer_hook(name: str) -> Callable[..., None]:
        def hook(module: QuantLayer, args: tuple[Tensor, ...]) -> None:
            assert module.input_quantizer is not None
            codes[key(f"{name}.quantize", codes)] = to_numpy(module.input_quantizer.encode(args[0])).astype(np.int16)

        return hook

    def stream_hook(name: str) -> Callable[..., None]:
        def hook(module: Residual, args: tuple[Tensor, ...], out: Tensor) -> None:
            value = to_numpy(out)
            if module.dtype == "float16":
                streams[key(name, streams)] = value.astype(np.float16)
            elif len(args) == 2:
                streams[key(f"{name}.add", streams)] = value

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer) and module.input_quantizer is not None:
            if not isinstance(module.input_quantizer, PixelInput):
                handles.append(module.register_forward_pre_hook(layer_hook(name)))
        elif isinstance(module, Residual):
            handles.append(module.register_forward_hook(stream_hook(name)))
    try:
        yield codes, streams
    finally:
        for handle in handles:
            handle.remove()


def _as_flattened(nodes: dict[str, Node], types: Mapping[str, ValueType], name: str, value: Array) -> Array:
    """The training graph's vector in the Graph's order: behind a flatten that is H, W, C where PyTorch has C, H, W."""
    node = nodes[name]
    while node.op in ("quantize", "mul", "add", "prelu", "relu", "clip", "cast"):
        node = nodes[node.inputs[0]]
    if node.op != "flatten":
        return value
    h, w, c = types[node.inputs[0]].shape
    return np.ascontiguousarray(value.reshape(-1, c, h, w).transpose(0, 2, 3, 1)).reshape(value.shape)


def _is_step(node: Node) -> bool:
    """Whether a node is an elementwise step of one value."""
    return node.op in ("mul", "add", "prelu", "relu", "clip") and len(node.inputs) == 1


def _compare_training(proof: Proof, model: nn.Module, graph: Graph, engine: Engine, batch: Tensor) -> None:
    with _recorded(model) as (codes, streams), torch.no_grad():
        model(batch)
    nodes, types = {n.name: n for n in graph.nodes}, graph.validate()
    for recorded in (codes, streams):
        for name in recorded.keys() & nodes.keys():
            recorded[name] = _as_flattened(nodes, types, name, recorded[name])
    readers: dict[str, list[list[Node]]] = {}  # by stream, the steps from there to a quantize: its shift, a batch norm
    for name in codes:
        if name in nodes:  # two layers may share one quantize
            steps = [nodes[name]]
            while steps[0].inputs[0] not in streams and _is_step(nodes[steps[0].inputs[0]]):
                steps.insert(0, nodes[steps[0].inputs[0]])
            if steps[0].inputs[0] in streams:
                readers.setdefault(steps[0].inputs[0], []).append(steps)
    counted_at_stream = {steps[-1].name for each in readers.values() for steps in each}

    def follow(steps: list[Node], value: Array) -> Array:
        for node in steps:
            params = {role: graph.tensors[key] for role, key in node.params.items()}
            value = interpreter.RULES[node.op](node, [value], params, [types[name] for name in node.inputs])
        return value

    def count(name: str, ours: Array) -> None:
        flips = int((ours != codes[name].reshape(ours.shape)).sum())
        proof.root_activations += ours.size
        proof.root_comparisons += ours.size * (2 ** nodes[name].attrs["bits"] - 1)
        proof.root_flips += flips
        if flips:
            proof.root_by_layer[name] = proof.root_by_layer.get(name, 0) + flips

    def replace(name: str, value: Array) -> Array:
        if name in streams:
            # the next layers see the training graph's stream, but a code that this node's own rounding turns is its root flip
            for steps in readers.get(name, ()):
                count(steps[-1].name, follow(steps, value))
            return streams[name]
        if name in codes:
            if name not in counted_at_stream:
                count(name, value)
            return codes[name].reshape(value.shape)
        return value

    x = to_numpy(batch)
    interpreter.run(graph, x, replace=replace)
    _, free = engine.run(x, trace=True)
    proof.cascaded_flips += sum(int((free[n] != codes[n].reshape(free[n].shape)).sum()) for n in codes if n in free)
    proof.root_inputs += len(batch)
