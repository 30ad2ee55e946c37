"""``python -m lowbit.bench``: layers, whole networks, training steps and starting up, beside the peers."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lowbit.bench import show
from lowbit.bench.file import FORMAT, PACKAGES, bench_network
from lowbit.bench.layers import LAYERS, LOW_BIT, bench_layers, example
from lowbit.bench.measure import Core, alternate, pinned
from lowbit.bench.peers import Peer, chosen, installed
from lowbit.bench.startup import GOALS, bench_startup
from lowbit.bench.superres import BODY_PEERS, MEMORY_GOAL, PHOTOGRAPH_PEERS, bench_memory, bench_superres
from lowbit.machine import machine, versions
from lowbit.runtime import load

if TYPE_CHECKING:
    from rich.console import Console

    from lowbit.graph import Graph

GROUPS: Final = ("layers", "low-bit", "networks", "superres", "training", "load")

STEP_GOALS: Final = (("slb", "float", 50, 1.2), ("lns", "sign", 128, 2.0))
"""Training steps: method, what it is measured against, batch, and how many times the latter's time it may take."""

_LOW_BIT_PEERS: Final = ("ort-fp32", "ort-int8")

_NETWORK_GOALS: Final[Mapping[str, Mapping[str, float]]] = {
    "Bi-Real ResNet-18, 224x224": {"ort-fp32": 10.0, "ort-int8": 3.0, "openvino-int8": 2.7},
    "ResNet-20, CIFAR": {"ort-fp32": 6.0},
    "VGG-Small, CIFAR": {"ort-fp32": 12.0},
    "the demo's network": {"ort-fp32": 6.0},
}


@dataclass
class _Run:
    """What all groups share: what was asked for, and what has been found so far."""

    threads: int
    isa: str
    repeats: int
    peers: Sequence[Peer]
    core: Core
    console: Console
    graphs: dict[str, Graph] = field(default_factory=dict)

    def graph(self, name: str) -> Graph:
        """A network of `lowbit.train.benchmark.NETWORKS`, built once."""
        from lowbit.train.benchmark import network_graph

        if name not in self.graphs:
            self.graphs[name] = network_graph(name)
        return self.graphs[name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Layers, whole networks and training steps beside other runtimes, on the same cores, in turn."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.bench", description=main.__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of all; all are pinned to as many cores")
    parser.add_argument("--isa", help="force a row of kernels")
    parser.add_argument("--repeats", type=int, default=40, help="samples of each, at least 2")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"some of {', '.join(GROUPS)}, with commas between")
    parser.add_argument(
        "--peers", default="all", help="some of ort-fp32, ort-int8, openvino-fp32, openvino-int8, torch; all"
    )
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where the numbers go")
    options = parser.parse_args(arguments)
    try:
        groups = _chosen_groups(options.only)
        there, missing = installed(chosen(options.peers.split(",")))
        if options.repeats < 2:
            raise ValueError(f"repeats = {options.repeats} must be at least 2")
        with pinned(options.threads):
            isa = load(_nothing(), threads=options.threads, isa=options.isa).isa
    except ValueError as error:
        parser.error(str(error))
    from rich.markup import escape

    console = show.wide_console()
    run = _Run(options.threads, isa, options.repeats, there, Core(isa), console)
    for text in missing:
        console.print(f"[yellow]left out:[/] {escape(text)}", soft_wrap=True)
    found: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "missing": missing,
    }
    for group in groups:
        found[group.replace("-", "_")] = _MEASURE[group](run)
    peak = run.core.as_dict()
    console.print(show.peak_line(peak))
    found |= {"isa": isa, "threads": options.threads, "peak": peak, "warnings": run.core.warnings()}
    show.print_warnings(console, [*found["warnings"], *_warnings(found)])
    show.write_result(options.json, found)
    console.print(f"numbers in {options.json}")


def _chosen_groups(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"unknown group {name!r}; there are {', '.join(GROUPS)}")
    return [group for group in GROUPS if group in names]


def _nothing() -> Graph:
    from lowbit.graph import Graph, Node

    attributes = {"shape": (1,), "dtype": "float32"}
    return Graph((Node("input", "input", attrs=attributes), Node("output", "output", ("input",))), {})


def _warnings(found: Mapping[str, Any]) -> Iterable[str]:
    for group in GROUPS:
        rows = found.get(group.replace("-", "_"))
        for row in rows if isinstance(rows, list) else ():
            yield from row["warnings"]


# --------------------------------------------------------------------------------------------- groups


def _layers(run: _Run) -> list[dict[str, Any]]:
    with run.console.status("") as status:
        rows = bench_layers(LAYERS, run.peers, run.core, run.threads, run.isa, run.repeats, status.update)
    run.console.print(show.single_layers_table(rows))
    _goals(run, rows)
    return rows


def _low_bit(run: _Run) -> list[dict[str, Any]]:
    peers = [peer for peer in run.peers if peer.name in _LOW_BIT_PEERS]
    others = [peer.name for peer in run.peers if peer not in peers]
    if others:
        run.console.print(f"low-bit layers: not beside {', '.join(others)}")
    with run.console.status("") as status:
        rows = bench_layers(LOW_BIT, peers, run.core, run.threads, run.isa, run.repeats, status.update)
    run.console.print(show.single_layers_table(rows))
    _goals(run, rows)
    return rows


def _networks(run: _Run) -> list[dict[str, Any]]:
    from lowbit.inspect import macs
    from lowbit.train.benchmark import NETWORKS

    rows: list[dict[str, Any]] = []
    for name in NETWORKS:
        with run.console.status(name), pinned(run.threads):
            graph = run.graph(name)
            types = graph.validate()
            engine = load(graph, threads=run.threads, isa=run.isa)
            kernels = sorted({f"{step['kernel']} {step['isa']}" for step in engine.plan})
            row = bench_network(graph, engine, run.peers, run.core, 1, run.repeats)
        row["warnings"] = [f"{name}: {text}" for text in row["warnings"]]
        count = sum(macs(graph, node, types) for node in graph.nodes if node.op in ("conv2d", "linear"))
        row = {"network": name, "macs": count, "isa": engine.isa, "threads": run.threads, "kernels": kernels, **row}
        row["goals"] = dict(_NETWORK_GOALS.get(name, {}))
        row["two_threads"] = _two_threads(graph, run) if not rows else None
        rows.append(row)
    for table in show.networks_tables(rows, versions(*PACKAGES)):
        run.console.print(table)
    _goals(run, rows)
    two = rows[0]["two_threads"]
    if two:
        run.console.print(
            f"{rows[0]['network']}: two threads {two['ratio']:.2f}x one ({two['p10']:.2f} .. {two['p90']:.2f})"
        )
        good = None if two["noisy"] else two["ratio"] >= 1.7
        run.console.print(show.verdict("two threads, at least 1.7x one", good))
    return rows


def _superres(run: _Run) -> list[dict[str, Any]]:
    others = [peer.name for peer in run.peers if peer.name not in (*BODY_PEERS, *PHOTOGRAPH_PEERS)]
    if others:
        run.console.print(
            f"super-resolution: not beside {', '.join(others)}; the photograph beside {PHOTOGRAPH_PEERS[0]}"
        )
    with run.console.status("super-resolution"):
        rows = bench_superres(run.peers, run.core, run.threads, run.isa, run.repeats)
        rows[-1]["memory"] = memory = bench_memory(run.threads)
    for table in show.networks_tables(rows, versions(*PACKAGES)):
        run.console.print(table)
    _goals(run, rows)
    if memory["bytes"] is not None:
        run.console.print(
            f"a photograph of 24 MP from JPEG to PNG, x2: {memory['bytes'] / 2**30:.2f} GiB at most, {memory['seconds']:.0f} s"
        )
        run.console.print(show.verdict("at most 1.5 GiB", memory["bytes"] <= MEMORY_GOAL))
    return rows


def _two_threads(graph: Graph, run: _Run) -> dict[str, Any] | None:
    """Two threads of the engine beside one; None where there is but one core, and where more than one is measured anyway."""
    if run.threads != 1:
        return None
    try:
        with pinned(2):
            two, one = (load(graph, threads=n, isa=run.isa) for n in (2, 1))
            x = example(one, 1)
            found = alternate(lambda: two(x), lambda: one(x), run.repeats)
    except ValueError:  # this process may use one core only
        return None
    return {**asdict(found), "noisy": found.noisy}


def _training(run: _Run) -> list[dict[str, Any]]:
    from lowbit.train.benchmark import bench_training_step

    steps = []
    for method, reference, batch, most in STEP_GOALS:
        with run.console.status(f"one training step: {method} beside {reference}"):
            step = bench_training_step(run.repeats, batch, run.threads, method, reference)
        ours, theirs = (show.digits(1e3 * step[side]["median"]) for side in ("ours", "theirs"))
        run.console.print(
            f"W1A1 training step, {step['step']}: {method} {ours} ms, {reference} {theirs} ms, [bold]{step['slowdown']:.2f}[/] "
            f"times (p10 .. p90 of neighbours {1 / step['p90']:.2f} .. {1 / step['p10']:.2f})"
        )
        reached = None if step["warnings"] else step["slowdown"] <= most
        run.console.print(show.verdict(f"at most {most:g} times a {reference} step", reached))
        steps.append(step)
    return steps


def _load(run: _Run) -> dict[str, Any]:
    from lowbit.packfile import save
    from lowbit.train.benchmark import NETWORKS

    name = next(iter(NETWORKS))
    with run.console.status(f"loading {name}"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.lowbit"
        save(run.graph(name), path)
        with pinned(run.threads):
            found = bench_startup(path, run.isa, run.threads)
    run.console.print(f"{name}: {show.startup_line(found)}", soft_wrap=True)
    texts = {"import_seconds": "import in at most 150 ms", "load_seconds": "load in at most 60 ms"}
    for key, text in texts.items():
        run.console.print(show.verdict(text, found[key] <= GOALS[key]))
    if found["memory_ratio"] is not None:
        good = found["memory_ratio"] <= GOALS["memory"]
        run.console.print(show.verdict("memory at most 3x the file and buffers", good))
    return {"network": name, **found}


def _goals(run: _Run, rows: Sequence[Mapping[str, Any]]) -> None:
    for line in show.goals_lines(rows):
        run.console.print(line, soft_wrap=True)


_MEASURE: Final[Mapping[str, Callable[[_Run], Any]]] = {
    "layers": _layers,
    "low-bit": _low_bit,
    "networks": _networks,
    "superres": _superres,
    "training": _training,
    "load": _load,
}


if __name__ == "__main__":
    main()
