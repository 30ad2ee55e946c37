"""Measure the front of a table: every cell's network in one run, in turn, on one core. Needs the extra ``lowbit[bench]``.

Of each cell one seed's run is exported, with its proof, and timed on our engine: the topology is the same for all seeds. A network
without a low-bit layer is timed in ONNX Runtime too, in float32 and in 8 bits (static quantization, as ``lowbit.bench`` does
it, ranges from training images), and what those networks score is measured in ONNX Runtime, for every seed whose run is there.
The float twin of a low-bit network is no point: nobody trained it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lowbit.bench.file import PACKAGES, twin_input
from lowbit.bench.layers import example
from lowbit.bench.measure import Core, Sample, Timing, in_turn, pinned, timed
from lowbit.bench.peers import Session, chosen, installed, open_all
from lowbit.graph import Graph
from lowbit.machine import machine, versions
from lowbit.packfile import read
from lowbit.runtime import Engine, load
from lowbit.tiles import TileError, cuts, reach
from lowbit.train.cells import Action, Places, look
from lowbit.train.data import DataSource
from lowbit.train.data.images import Part
from lowbit.train.data.superres import Pair
from lowbit.train.export import crops, export_run
from lowbit.train.freeze import freeze, to_numpy
from lowbit.train.front import FORMAT
from lowbit.train.rundir import RunError, code_version, now, read_json
from lowbit.train.table import Cell, Table
from lowbit.train.tasks.superres import psnr
from lowbit.train.trainer import load_data, load_run

__all__ = ["measure", "runs_to_time"]

Array = NDArray[Any]

PEERS: Final = ("ort-fp32", "ort-int8")
CALIBRATION: Final = 512
"""Training images (of super-resolution 16 crops of held-out pictures) that 8-bit ranges are measured on."""

_CHECKED: Final = 4
"""Inputs on which the float twin of a float network is held against our engine."""

_PROOF: Final = (
    "inputs",
    "integers",
    "integers_differ",
    "root_flips",
    "root_activations",
    "decisions",
    "decisions_changed",
    "isa",
)
"""What front.json keeps of a proof."""

Progress = Callable[[str], None]


def runs_to_time(cells: Sequence[Cell], places: Places) -> list[Cell]:
    """Of each label the cell whose network is timed: of its seeds the first whose run is there, else the first."""
    found: dict[str, Cell] = {}
    for cell in cells:
        there = look(cell, places, test=False, refresh=False, for_run=True).action == Action.done
        before = found.get(cell.label)
        if before is None or (there and not _there(before, places)):
            found[cell.label] = cell
    return list(found.values())


def _there(cell: Cell, places: Places) -> bool:
    return look(cell, places, test=False, refresh=False, for_run=True).action == Action.done


@dataclass
class _Network:
    """A cell's exported network, and what of it is timed beside our engine."""

    cell: Cell
    graph: Graph
    engine: Engine
    file_bytes: int
    proof: dict[str, Any]
    sessions: dict[str, Session] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def measure(
    table: Table,
    cells: Sequence[Cell],
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    places: Places,
    *,
    split: str = "test",
    repeats: int = 100,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The content of front.json.

    Args:
        table: the table.
        cells: all seeds of all cells.
        results: those of the cells that have one.
        places: where their runs lie.
        split: which images the table's scores are of: "test" or "validation".
        repeats: samples of each network.
        on_progress: called with a line about what is done now.

    Raises:
        RunError: no cell has a result, or a timed cell's run is not there. ExportError: a proof does not hold.
    """
    if repeats < 2:
        raise ValueError(f"repeats = {repeats} must be at least 2")
    timed_cells = [cell for cell in runs_to_time(cells, places) if cell.key in results]
    if not timed_cells:
        raise RunError(f"{table.path}: no cell has a result yet; there is no front to measure")
    peers, missing = installed(chosen(PEERS))
    left_out = list(missing)
    networks: list[_Network] = []
    sources: dict[str, DataSource] = {}
    for i, cell in enumerate(timed_cells, 1):
        on_progress(f"exporting {cell.title} ({i} of {len(timed_cells)})")
        networks.append(_network(cell, places))
    with pinned(1):
        for network in networks:
            if _low_bit(network.graph):
                continue
            recipe = network.cell.recipe
            data = sources.setdefault(recipe.data.model_dump_json(), load_data(recipe))
            for cell in [c for c in cells if c.label == network.cell.label and c.key in results]:
                if not _there(cell, places):
                    continue
                on_progress(f"{cell.title} in ONNX Runtime")
                own = cell.key == network.cell.key
                graph = network.graph if own else _frozen(places.run_dir(cell), network.graph)
                examples = _examples(data, graph, cell)
                sessions, failures = open_all(peers, graph, 1, 1, examples)
                if "ort-fp32" in sessions and _float(graph) and not _same(graph, sessions["ort-fp32"], examples):
                    raise RunError(
                        f"{cell.title}: ONNX Runtime computes something else than our engine; there is no front to draw"
                    )
                if own:
                    network.sessions = sessions
                    left_out += [f"{cell.label}: {text}" for text in failures]
                for name, session in sessions.items():
                    score = _score(session, graph, data, split, cell, lambda text: on_progress(text))
                    if isinstance(score, str):
                        left_out += [f"{cell.label}: {score}"] if own else []
                        continue
                    network.values.setdefault(name, {})[str(cell.recipe.seed)] = score
                    network.notes.setdefault(name, []).append(session.note)
        on_progress(f"timing {sum(1 + len(n.sessions) for n in networks)} networks in turn")
        core = Core(networks[0].engine.isa)
        inputs = [example(network.engine, 1) for network in networks]
        with core.watched() as watch:
            ours: list[Sample] = [timed(lambda n=n, x=x: n.engine(x)) for n, x in zip(networks, inputs, strict=True)]  # type: ignore[misc]
            others = [(n, name, s) for n in networks for name, s in n.sessions.items() if name in n.values]
            seconds = in_turn([*ours, *(timed(session.run) for _, _, session in others)], repeats)
    points = []
    for network, samples in zip(networks, seconds, strict=False):
        points.append(_point(network, results, "lowbit", samples, network.file_bytes, None, ""))
    for (network, name, session), samples in zip(others, seconds[len(networks) :], strict=True):
        note = "; ".join(dict.fromkeys(network.notes[name]))
        points.append(_point(network, results, name, samples, session.file_bytes, network.values[name], note))
    order = {network.cell.label: i for i, network in enumerate(networks)}
    points.sort(key=lambda point: order[point["cell"]])
    first = networks[0].engine
    return {
        "format": FORMAT,
        "table": table.name,
        "metric": results[networks[0].cell.key]["metric"],
        "split": split,
        "date": now(),
        "code": code_version(),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "isa": first.isa,
        "threads": 1,
        "repeats": repeats,
        "input": list(first.input_shape),
        "trusted": not watch.warnings,
        "warnings": watch.warnings,
        "left_out": left_out,
        "points": points,
    }


def _point(
    network: _Network,
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    runtime: str,
    samples: Sequence[float],
    file_bytes: int,
    values: Mapping[str, float] | None,
    note: str,
) -> dict[str, Any]:
    cell = network.cell
    return {
        "cell": cell.label,
        "runtime": runtime,
        "seed": cell.recipe.seed,
        "hash": results[cell.key]["hash"],
        "seconds": asdict(Timing.of(samples)),
        "bytes": file_bytes,
        "note": note,
        "values": None if values is None else dict(values),
        "proof": network.proof if runtime == "lowbit" else None,
    }


# ------------------------------------------------------------------------------------------------ networks


def _network(cell: Cell, places: Places) -> _Network:
    run_dir = places.run_dir(cell)
    if not _there(cell, places):
        raise RunError(f"{cell.title}: its run {run_dir} is not there, and its network has to be timed")
    path, proof_path = run_dir / "model.lowbit", run_dir / "proof.json"
    if not (path.is_file() and proof_path.is_file()):  # a run that is replaced takes its file with it
        export_run(run_dir)
    proof = read_json(proof_path, f"make it again with `lowbit export {run_dir}`", keys=("failures",))
    assert proof is not None
    if proof["failures"]:
        raise RunError(f"{run_dir}: its proof does not hold ({proof['failures'][0]}); export it again")
    graph = read(path)
    kept = {key: proof[key] for key in _PROOF}
    return _Network(cell, graph, load(graph, threads=1), path.stat().st_size, kept)


def _low_bit(graph: Graph) -> bool:
    """Whether weights or activations of a layer have fewer than 8 bits."""
    codes = [tensor.codes for tensor in graph.tensors.values() if tensor.codes is not None]
    return any(c.bits < 8 for c in codes) or any(n.attrs["bits"] < 8 for n in graph.nodes if n.op == "quantize")


def _float(graph: Graph) -> bool:
    """Whether nothing in it is quantized, so that the float twin is the same network."""
    return not any(node.op == "quantize" for node in graph.nodes) and all(
        t.codes is None for t in graph.tensors.values()
    )


def _same(graph: Graph, session: Session, examples: Array) -> bool:
    """Whether the peer computes what our engine does, but for rounding."""
    shape = graph.input.attrs["shape"]
    zero = np.asarray(graph.input.attrs.get("zero_point", 0), np.float32)
    engine = load(graph, threads=1)
    for x in examples[:_CHECKED]:
        y = x.transpose(1, 2, 0).reshape(shape) if x.ndim == 3 else x
        y = (y + zero).astype(engine.input_dtype)[None]
        ours = _channels_first(np.asarray(engine(np.ascontiguousarray(y))))
        theirs = session.answer(x[None])
        if not np.allclose(ours, theirs, rtol=0, atol=1e-3 * float(np.abs(ours).max())):
            return False
    return True


def _channels_first(y: Array) -> Array:
    """(N, H, W, C) as (N, C, H, W); vectors as they are."""
    return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y


def _frozen(run_dir: Path, like: Graph) -> Graph:
    """The Graph of another seed's run."""
    height, width, channels = like.input.attrs["shape"]
    dtype = torch.uint8 if like.input.attrs["dtype"] == "uint8" else torch.float32
    return freeze(load_run(run_dir)[1], torch.zeros(1, channels, height, width, dtype=dtype))


def _examples(data: DataSource, graph: Graph, cell: Cell) -> Array:
    """Inputs of the twin that 8-bit ranges are measured on."""
    workers = cell.recipe.train.workers
    if not data.classes:
        return twin_input(graph, to_numpy(crops(data, CALIBRATION, workers)))
    found: list[Array] = []
    for x in data.calibration(CALIBRATION, CALIBRATION, workers=workers):
        found.append(to_numpy(x))
    return twin_input(graph, np.concatenate(found)[:CALIBRATION])


# ------------------------------------------------------------------------------------------------ scores


def _score(
    session: Session, graph: Graph, data: DataSource, split: str, cell: Cell, on_progress: Progress
) -> float | str:
    """What the network scores in the peer; or why that can't be measured."""
    part: Part = "test" if split == "test" else "val"
    t = cell.recipe.train
    if not data.classes:
        return _psnr(session, graph, data, part, t.workers)
    right = total = 0
    count = data.count(part)
    for images, labels in data.evaluation(part, t.eval_batch_size, workers=t.workers):
        x = twin_input(graph, to_numpy(images))
        answers = [int(session.answer(x[i : i + 1]).reshape(-1).argmax()) for i in range(len(x))]
        right += int((np.array(answers) == labels.numpy()).sum())
        total += len(x)
        on_progress(f"{cell.title} in ONNX Runtime: {total:,} of {count:,} images")
    return right / total


def _psnr(session: Session, graph: Graph, data: DataSource, part: Part, workers: int | None) -> float | str:
    """Mean over the pictures, each put together of tiles of the size that the network was opened for."""
    height, width, _ = graph.input.attrs["shape"]
    try:
        around = reach(graph)
    except TileError as error:
        return f"in ONNX Runtime it can't run on tiles of the pictures ({error})"
    if height <= around.top + around.bottom or width <= around.left + around.right:
        return f"in ONNX Runtime it reads {height}x{width} pixels, no more than one pixel of its output depends on"
    scores: list[float] = []
    for pair in data.evaluation(part, 1, workers=workers):
        low, high = (v[0, 0].numpy() for v in pair)
        if low.shape[0] < height or low.shape[1] < width:
            name = pair.name if isinstance(pair, Pair) else f"picture {len(scores) + 1}"
            return f"in ONNX Runtime it reads {height}x{width} pixels, and {name} has {low.shape[0]}x{low.shape[1]}"
        out = np.empty((around.scale * low.shape[0], around.scale * low.shape[1]), np.float32)
        for top, first, last in _fixed(low.shape[0], height, around.top, around.bottom):
            for left, start, end in _fixed(low.shape[1], width, around.left, around.right):
                tile = low[top : top + height, left : left + width]
                y = session.answer(twin_input(graph, tile[None, ..., None]))[0, 0]
                s = around.scale
                part_y = y[s * (first - top) : s * (last - top), s * (start - left) : s * (end - left)]
                out[s * first : s * last, s * start : s * end] = part_y
        scores.append(psnr(out, high, around.scale))
    return fmean(scores)


def _fixed(length: int, tile: int, before: int, after: int) -> Iterator[tuple[int, int, int]]:
    """Tiles of exactly ``tile`` pixels along an axis: where each starts, and which pixels of the axis it gives."""
    for cut in cuts(length, tile, before, after):
        start = min(cut.start, length - tile)
        yield start, cut.first, cut.last
