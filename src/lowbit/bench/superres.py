"""Super-resolution beside the peers: networks with random weights, and a photograph enlarged."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from lowbit.bench.file import bench_network, twin_input
from lowbit.bench.layers import compared, noise
from lowbit.bench.measure import Core, Timing, in_turn, pinned, timed
from lowbit.bench.peers import Peer, Session, open_all
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.inspect import macs
from lowbit.packfile import save
from lowbit.pictures import Picture, write_picture
from lowbit.runtime import load
from lowbit.tiles import grid
from lowbit.upscale import Upscaler

PHOTOGRAPH: Final = (1024, 2048)
"""Height and width: 2 megapixels."""

BODY: Final = (256, 256)
"""Height and width of the map that VDSR's body runs on."""

BODY_PEERS: Final = ("ort-fp32", "ort-int8", "openvino-fp32")
PHOTOGRAPH_PEERS: Final = ("ort-fp32",)

LARGE: Final = (4000, 6000)
"""Height and width: 24 megapixels."""

MEMORY_GOAL: Final = 3 << 29
"""Bytes, 1.5 GiB, of a process that reads such a photograph, enlarges it by 2 and writes it."""

PEER_TILE: Final = 256
"""Largest side of the tiles that peers are given beside the whole picture: their maps overflow the caches otherwise."""

META = {"task": "superres", "superres": {"scale": 2}}


class Layers:
    """Nodes, one behind the other."""

    def __init__(self, size: tuple[int, int], seed: int, channels: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes = [Node("input", "y", attrs={"shape": (*size, channels), "dtype": "float32"})]
        self.tensors: dict[str, Tensor] = {}

    @property
    def last(self) -> str:
        return self.nodes[-1].name

    def add(self, op: str, *inputs: str, constant: Tensor | None = None, **attrs: object) -> str:
        name = f"{op}{len(self.nodes)}"
        params = {}
        if constant is not None:
            role = {"conv2d": "weight", "mul": "factor", "add": "term", "prelu": "slope"}[op]
            params[role] = f"{name}.{role}"
            self.tensors[params[role]] = constant
        self.nodes.append(Node(op, name, inputs or (self.last,), params, attrs))
        return name

    def floats(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        return Tensor((around + scale * self.rng.standard_normal(shape)).astype(np.float32))

    def conv(self, filters: int, channels: int, kernel: int = 3, bits: int = 0, dilation: int = 1) -> str:
        shape = (filters, kernel, kernel, channels)
        if bits:
            codes = Codes("bipolar", bits)
            weight = Tensor(codes.values[self.rng.integers(0, 2**bits, shape)], codes)
        else:
            weight = self.floats(*shape, scale=(kernel * kernel * channels) ** -0.5)
        pad = (kernel // 2 * dilation,) * 4
        return self.add("conv2d", constant=weight, stride=(1, 1), dilation=(dilation, dilation), padding=pad, groups=1)

    def graph(self, scale: int) -> Graph:
        self.add("output")
        return Graph(tuple(self.nodes), self.tensors, {**META, "superres": {"scale": scale}})


def low_resolution(
    size: tuple[int, int] = (16, 16),
    scale: int = 2,
    channels: int = 16,
    layers: int = 2,
    bits: int = 1,
    half: bool = True,
    residual: float = 0.1,
    kernel: int = 3,
    dilation: int = 1,
    seed: int = 0,
) -> Graph:
    """First convolution, `layers` times x += PReLU(s conv(quantize(x + b)) + o), last convolution, pixel shuffle, added to the
    enlarged picture. `half`: x is float16. `residual` scales what is added; 0 leaves bicubic."""
    n = Layers(size, seed)
    n.conv(channels, 1, kernel)
    x = n.add("add", constant=n.floats(channels, scale=0.3, around=-0.2))
    if half:
        x = n.add("cast", dtype="float16")
    for _ in range(layers):
        n.add("add", x, constant=n.floats(channels, scale=0.1))
        if bits == 1:
            n.add("quantize", kind="bipolar", bits=1)
        else:
            n.add("quantize", kind="unsigned", bits=bits, reciprocal=4.0)
        n.conv(channels, channels, kernel, bits, dilation)
        n.add("mul", constant=n.floats(channels, scale=0.3 / (kernel * kernel * channels) ** 0.5))
        n.add("add", constant=n.floats(channels, scale=0.05))
        n.add("prelu", constant=n.floats(channels, scale=0.1, around=0.25))
        x = n.add("add", n.last, x)
        if half:
            x = n.add("cast", dtype="float16")
    n.conv(scale * scale, channels, kernel)
    n.add("mul", constant=Tensor(np.full(1, residual, np.float32)))
    n.add("add", constant=n.floats(scale * scale, scale=0.01 * bool(residual)))
    shuffled = n.add("pixel_shuffle", factor=scale)
    n.add("resize_bicubic", "y", factor=scale)
    n.add("add", shuffled, n.last)
    return n.graph(scale)


def _vdsr_layers(n: Layers, channels: int, layers: int, bits: int, half: bool) -> None:
    x = n.add("cast", dtype="float16") if half else n.last
    for _ in range(layers):
        n.add("add", x, constant=n.floats(channels, scale=0.1, around=-0.2))
        n.add("quantize", kind="bipolar", bits=1)
        n.conv(channels, channels, bits=bits)
        n.add("mul", constant=n.floats(channels, scale=0.3 / (9 * channels) ** 0.5))
        n.add("add", constant=n.floats(channels, scale=0.05))
        n.add("relu")
        x = n.add("add", n.last, x)
        if half:
            x = n.add("cast", dtype="float16")


def vdsr_body(size: tuple[int, int] = (12, 12), channels: int = 16, layers: int = 3, seed: int = 0) -> Graph:
    """What lies between the first and last layer of `vdsr`: float32 (H, W, channels) in, the float16 stream out."""
    n = Layers(size, seed, channels)
    _vdsr_layers(n, channels, layers, 1, True)
    return n.graph(1)


def vdsr(
    size: tuple[int, int] = (12, 12),
    scale: int = 2,
    channels: int = 16,
    layers: int = 3,
    bits: int = 1,
    half: bool = True,
    residual: float = 0.1,
    seed: int = 0,
) -> Graph:
    """Very deep super-resolution (Kim et al. 2016): all convolutions on the enlarged picture, binary with scale and skip."""
    n = Layers(size, seed)
    enlarged = n.add("resize_bicubic", factor=scale)
    n.conv(channels, 1)
    n.add("relu")
    _vdsr_layers(n, channels, layers, bits, half)
    n.conv(1, channels)
    n.add("mul", constant=Tensor(np.full(1, residual, np.float32)))
    n.add("add", n.last, enlarged)
    return n.graph(scale)


def bench_superres(
    peers: Sequence[Peer], core: Core, threads: int, isa: str | None, repeats: int
) -> list[dict[str, Any]]:
    """The body of VDSR, 18 binary layers of 64 channels with a float16 stream, on a map of 256x256; and a photograph of 2 megapixels
    enlarged by 2 with the default network (32 channels, 12 binary layers), from array to array: Y alone, and all of it.

    A peer enlarges the photograph's Y whole or in tiles that overlap as ours do, whichever is faster; that its tiles would have to
    be put together is left out, and so are colours.

    Args:
        peers: of which those of `BODY_PEERS` and `PHOTOGRAPH_PEERS` run: the others would take minutes.

    Returns:
        Plain JSON, rows as those of networks.
    """
    rows = []
    with pinned(threads):
        graph = vdsr_body(BODY, channels=64, layers=18)
        engine = load(graph, threads=threads, isa=isa)
        chosen = [peer for peer in peers if peer.name in BODY_PEERS]
        row = bench_network(graph, engine, chosen, core, 1, max(2, min(repeats, 10)))  # up to half a second each
        name = "VDSR's body W1A1, 18 layers of 64 channels, 256x256, float16 stream"
        rows.append(_row(name, graph, engine.plan, engine.isa, threads, row, {"ort-fp32": 14.0, "ort-int8": 4.4}))
        graph = low_resolution(PHOTOGRAPH, channels=32, layers=12)
        larger = Upscaler(graph, threads=threads, isa=isa)
        chosen = [peer for peer in peers if peer.name in PHOTOGRAPH_PEERS]
        plan = load(graph.resized(64, 64), isa=isa).plan
        what = {"Y alone": {"ort-fp32": 8.0}, "Y, Cb and Cr, beside Y alone": {}}
        found = _photograph(graph, larger, chosen, core, threads, max(2, min(repeats, 5)))
        for (kind, goals), row in zip(what.items(), found, strict=True):
            title = f"a photograph of 2 MP, x2, {kind}"
            rows.append(_row(title, graph, plan, larger.isa, threads, row, goals))
    return rows


def bench_memory(threads: int) -> dict[str, Any]:
    """A photograph of 24 megapixels through ``lowbit upscale``, from JPEG to PNG, in a process of its own.

    Returns:
        Plain JSON: ``bytes`` (the largest that the process was; None where the system doesn't tell) and ``seconds``.
    """
    code = (
        "import sys\nfrom pathlib import Path\nfrom lowbit.__main__ import main\ntry:\n    main()\nexcept SystemExit as stop:\n"
        "    assert not stop.code\nstatus = Path('/proc/self/status')\n"
        "lines = status.read_text().splitlines() if status.is_file() else []\n"
        "print(*[line.split()[1] for line in lines if line.startswith('VmHWM')])"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(low_resolution(channels=32, layers=12), folder / "x2.lowbit")
        coarse = np.random.default_rng(0).integers(0, 256, (LARGE[0] // 8, LARGE[1] // 8, 3), np.uint8)
        write_picture(folder / "in.jpg", Picture(coarse.repeat(8, axis=0).repeat(8, axis=1)))
        places = [str(folder / part) for part in ("x2.lowbit", "in.jpg", "out.png")]
        command = [sys.executable, "-c", code, "upscale", *places, "--threads", str(threads)]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    said = done.stdout.split("\n")[-2].split()
    return {"bytes": int(said[0]) * 1024 if said else None, "seconds": seconds}


def _photograph(
    graph: Graph, larger: Upscaler, peers: Sequence[Peer], core: Core, threads: int, repeats: int
) -> list[dict[str, Any]]:
    """Ours on Y and on the whole picture, each beside the peers on Y."""
    rng = np.random.default_rng(0)
    y = rng.random(PHOTOGRAPH, np.float32)
    picture = Picture(rng.integers(0, 256, (*PHOTOGRAPH, 3), np.uint8))
    sessions, _ = open_all(peers, graph, threads, 1, twin_input(graph, y[None, ..., None]))
    tiles = [(row, column) for row, columns in grid(PHOTOGRAPH, (PEER_TILE,) * 2, larger.reach) for column in columns]
    row, column = tiles[0]
    part = graph.resized(row.size, column.size)
    x = twin_input(part, y[None, : row.size, : column.size, None])
    on_tiles, failures = open_all(peers, part, threads, 1, x)
    for name, tile in on_tiles.items():
        size = f"{len(tiles)} tiles of {row.size}x{column.size}"
        sessions[name] = _faster(sessions.get(name), tile, len(tiles), size)
    runs: list[Callable[[], object]] = [lambda: larger(y), lambda: larger.picture(picture)]
    runs += [session.run for session in sessions.values()]
    with core.watched() as watch:
        alone, all_of_it, *theirs = in_turn([timed(run) for run in runs], repeats)
    rows = []
    for ours in (alone, all_of_it):
        beside = zip(sessions.items(), theirs, strict=True)
        found = {
            "ours": asdict(Timing.of(ours)),
            "peers": {name: compared(ours, seconds, session.note) for (name, session), seconds in beside},
        }
        warnings = [*failures, *watch.warnings, *noise(found)]
        rows.append({**found, "trusted": not watch.warnings, "warnings": warnings})
    return rows


def _faster(whole: Session | None, tile: Session, count: int, size: str) -> Session:
    def all_tiles() -> None:
        for _ in range(count):
            tile.run()

    tiled = Session(all_tiles, tile.answer, ", ".join(filter(None, (tile.note, size))))
    if whole is None:
        return tiled
    seconds = in_turn([timed(whole.run), timed(all_tiles)], 1)
    return whole if min(seconds[0]) < min(seconds[1]) else tiled


def _row(
    name: str,
    graph: Graph,
    plan: Sequence[dict[str, Any]],
    isa: str,
    threads: int,
    found: dict[str, Any],
    goals: dict[str, float],
) -> dict[str, Any]:
    types = graph.validate()
    return {
        "network": name,
        "macs": sum(macs(graph, node, types) for node in graph.nodes if node.op in ("conv2d", "linear")),
        "isa": isa,
        "threads": threads,
        "kernels": sorted({f"{step['kernel']} {step['isa']}" for step in plan}),
        **found,
        "warnings": [f"{name}: {text}" for text in found["warnings"]],
        "goals": goals,
        "two_threads": None,
    }
