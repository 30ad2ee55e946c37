"""One file: the network whole and layer by layer, beside the peers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lowbit.bench.layers import beside, compared, example, noise, peak_share, rows_of
from lowbit.bench.measure import Core, Sample, in_turn, pinned, timed
from lowbit.bench.peers import Peer, Session, chosen, installed, open_all
from lowbit.bench.startup import bench_startup
from lowbit.bench.twin import layer_graph
from lowbit.graph import Graph, Node, ValueType
from lowbit.inspect import macs
from lowbit.machine import machine, versions
from lowbit.packfile import read
from lowbit.runtime import Engine, load
from lowbit.zoo import locate

Array = NDArray[Any]

FORMAT: Final = 2
"""Of the JSON that `bench_file` and ``python -m lowbit.bench`` write."""

PACKAGES: Final = ("lowbit", "numpy", "onnx", "onnxruntime", "openvino", "torch")


def bench_file(
    path: str | os.PathLike[str],
    threads: int = 1,
    isa: str | None = None,
    batch: int = 1,
    repeats: int = 100,
    layers: bool = True,
    peers: Sequence[str] = ("ort-fp32",),
) -> dict[str, Any]:
    """The network in a file, whole and layer by layer, beside the same network in other runtimes.

    Args:
        path: a .lowbit file, or the name of a network of the zoo.
        threads: of all; all are pinned to as many cores.
        isa: the engine's instruction set; None for the best there is.
        batch: images in a call.
        repeats: samples of each.
        layers: measure every step of the engine too. The peers' are models of one convolution with bias and ReLU, less the
            time of an empty call.
        peers: names in `lowbit.bench.PEERS`, or "all".

    Returns:
        Plain JSON: ``format, file, sha256, network, isa, threads, batch, input, machine, versions, missing, peak, startup, whole, layers,
        warnings``. Seconds are of one call, so of `batch` images. ``whole`` has ``ours`` and ``peers``, ``missing`` a sentence for each
        peer that is not installed.

    Raises:
        FileError: not a lowbit file. ValueError: more threads than cores, an unknown isa or peer.
    """
    if batch < 1 or repeats < 2:
        raise ValueError(f"batch = {batch} must be at least 1, repeats = {repeats} at least 2")
    there, missing = installed(chosen(peers))
    path = locate(path)
    graph = read(path)
    with pinned(threads):
        engine = load(graph, threads=threads, isa=isa)
        core = Core(engine.isa)
        whole = bench_network(graph, engine, there, core, batch, repeats)
        rows, doubts = _bench_steps(graph, engine, there, core, batch, repeats) if layers else ([], [])
        startup = bench_startup(path, engine.isa, threads, repeats=5)
    warnings = [f"whole network: {text}" for text in whole.pop("warnings")]
    return {
        "format": FORMAT,
        "file": Path(path).name,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "network": graph.meta.get("recipe", ""),
        "isa": engine.isa,
        "threads": threads,
        "batch": batch,
        "input": list(graph.input.attrs["shape"]),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "missing": missing,
        "peak": core.as_dict(),
        "startup": startup,
        "whole": whole,
        "layers": rows,
        "warnings": warnings + doubts + core.warnings(),
    }


def bench_network(
    graph: Graph, engine: Engine, peers: Sequence[Peer], core: Core, batch: int, repeats: int
) -> dict[str, Any]:
    """A whole network: a call of the engine beside a call of each peer, on the same images.

    Returns:
        Plain JSON: ``ours, peers, trusted, warnings``.
    """
    x = example(engine, batch)
    sessions, failures = open_all(peers, graph, engine.threads, batch, twin_input(graph, x))
    with core.watched() as watch:
        found = beside(timed(lambda: engine(x)), sessions, repeats)
    return {
        **found,
        "trusted": not watch.warnings,
        "warnings": [*failures, *watch.warnings, *noise(found)],
    }


def twin_input(graph: Graph, x: Array) -> Array:
    """A batch as the float twin takes it: float32, zero points subtracted, channels first."""
    zero = np.asarray(graph.input.attrs.get("zero_point", 0), np.float32)
    y = x.astype(np.float32) - zero
    return np.ascontiguousarray(y.transpose(0, 3, 1, 2) if y.ndim == 4 else y)


def _bench_steps(
    graph: Graph, engine: Engine, peers: Sequence[Peer], core: Core, batch: int, repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each step of the plan; steps with a convolution or linear layer beside the peers'. The sums of codes that a layer
    needs are part of its row. And a sentence for each peer that can't run a layer, and where the core was not ours alone."""
    types = graph.validate()
    nodes = {node.name: node for node in graph.nodes}
    parts = rows_of(engine.plan)
    plan = [engine.plan[indices[-1]] for indices in parts]
    heads = [next((nodes[n] for n in step["nodes"] if nodes[n].op in ("conv2d", "linear")), None) for step in plan]
    opened: list[dict[str, Session]] = []
    warnings: list[str] = []
    for head in heads:
        sessions, failures = _open_layer(graph, head, types, peers, engine.threads, batch) if head else ({}, [])
        opened.append(sessions)
        warnings += [f"{head.name}: {text}" for text in failures if head]
    empty = {peer.name: timed(peer.empty(engine.threads).run) for peer in peers}
    theirs = [(i, name, timed(session.run)) for i, found in enumerate(opened) for name, session in found.items()]
    x = example(engine, batch)
    profiles: list[list[float]] = []

    def profile() -> float:
        profiles.append(engine.profile(x, 5))
        return 0.0

    with core.watched() as watch:
        samples: list[Sample] = [profile, *empty.values(), *(sample for _, _, sample in theirs)]
        _, *seconds = in_turn(samples, min(max(repeats // 2, 3), 30))
    less = {name: float(np.percentile(s, 10)) for name, s in zip(empty, seconds, strict=False)}
    found: list[dict[str, Any]] = [{} for _ in heads]
    for (i, name, _), taken in zip(theirs, seconds[len(empty) :], strict=True):
        ours = [sum(p[j] for j in parts[i]) for p in profiles]
        found[i][name] = compared(ours, [max(s - less[name], 1e-9) for s in taken], opened[i][name].note)
    medians = [float(np.median([sum(p[j] for j in indices) for p in profiles])) for indices in parts]
    rows = []
    for step, head, seconds_here, peers_here in zip(plan, heads, medians, found, strict=True):
        count = macs(graph, head, types) if head else 0
        speed = count * batch / seconds_here / engine.threads if seconds_here else 0.0
        rows.append(
            {
                "name": head.name if head else step["name"],
                "kernel": step["kernel"],
                "isa": step["isa"],
                "nodes": list(step["nodes"]),
                "macs": count,
                "seconds": seconds_here,
                "share": seconds_here / sum(medians) if sum(medians) else 0.0,
                "peak_share": peak_share(step, speed, engine.isa, watch.peak) if count else None,
                "peers": peers_here,
                "trusted": not watch.warnings,
            }
        )
    return rows, warnings + [f"layers: {text}" for text in watch.warnings]


def _open_layer(
    graph: Graph, head: Node, types: Mapping[str, ValueType], peers: Sequence[Peer], threads: int, batch: int
) -> tuple[dict[str, Session], list[str]]:
    one = layer_graph(graph, head, dict(types))
    shape = one.input.attrs["shape"]
    x = np.maximum(np.random.default_rng(0).standard_normal((batch, *shape), np.float32), 0)
    return open_all(peers, one, threads, batch, twin_input(one, x))
