"""The engine of 64-bit ARM == the interpreter, bit for bit: cross-compiled, run under qemu, on random Graphs and by hand.

The Python module does not run there. So the calls by which `lowbit.runtime` builds a network are written to a file, and a
small program (engine/tests/replay.cc) makes them, runs the engine and writes down every value that it stores. The same
program, built for this machine, replays the same file: what it says of NEON is worth what it says of the rows known here.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import graphs
from lowbit import runtime
from lowbit.bits import Codes
from lowbit.graph import Graph, Node, Tensor
from lowbit.interpreter import run
from test_engine import AVAILABLE, KERNELS, NOWHERE, SEED, binary_net, every_half, one_product, same, signs

ROOT = Path(__file__).parents[1]
# `make test-arm` sets both: without the tools it fails, and it draws more graphs.
REQUIRED = os.environ.get("LOWBIT_TEST_ARM") == "1"
MORE_GRAPHS = int(os.environ.get("LOWBIT_TEST_ARM_GRAPHS", "0"))
CHUNK = 100  # networks of one file and one process
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
PACKAGES = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static"}
# The core that qemu plays for each row. The oldest one has the base instruction set and nothing else, so that a newer
# instruction is fatal.
CORES = {"i8mm": "max", "neon": "cortex-a53", "scalar": "cortex-a53"}
ISAS = tuple(CORES)


# --- the file of calls, and that of results: replay.cc is the reference ---


def _array(tag: str, dtype: str, x: Any) -> bytes:
    data = np.ascontiguousarray(x, dtype).reshape(-1)
    return tag.encode() + struct.pack("<I", data.size) + data.tobytes()


def _field(x: Any) -> bytes:
    match x:
        case None:
            return b"-"
        case str():
            return _array("s", "u1", list(x.encode()))
        case bool() | int():
            return b"i" + struct.pack("<q", x)
        case float():
            return b"f" + struct.pack("<f", x)
        case bytes():
            return b"B" + struct.pack("<I", len(x)) + x
        case np.ndarray() if x.dtype == np.int16:
            return _array("H", "<i2", x)
        case np.ndarray() if x.dtype == np.float32:
            return _array("F", "<f4", x)
        case list() | tuple():
            return _array("I", "<i8", x)
    raise TypeError(f"no field for {type(x)}")


class _Weights:
    """Stands for the native module's Weights: a call's fields."""

    @staticmethod
    def codes(values: np.ndarray, kind: str, bits: int, table: Sequence[int]) -> list[Any]:
        return ["codes", values.shape, values.astype(np.int16), kind, bits, tuple(table)]

    @staticmethod
    def floats(values: np.ndarray) -> list[Any]:
        return ["floats", values.shape, values.astype(np.float32)]


class _Builder:
    """Stands for the native module's Builder: every method writes its call down and returns the number of its value."""

    def __init__(self) -> None:
        self.calls = [_field("network")]
        self.values = 0

    def __getattr__(self, op: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(_field(op))
            for x in arguments:
                weights = isinstance(x, list) and x and isinstance(x[0], str)
                self.calls += [_field(part) for part in x] if weights else [_field(x)]
            self.values += 1
            return self.values - 1

        return call


def _calls(graph: Graph) -> bytes:
    """The calls by which `lowbit.runtime` builds the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "_engine", SimpleNamespace(Builder=_Builder, Weights=_Weights))
        return b"".join(runtime._build(graph).calls)


@dataclass
class Run:
    """One run of a network, and what it did."""

    isa: str
    x: np.ndarray
    threads: int = 1
    nudge: int = 0
    kernels: list[str] = field(default_factory=list)
    values: list[tuple[str, np.ndarray]] = field(default_factory=list)  # flat; a value stored in two forms comes twice
    output: bytes = b""

    def call(self) -> bytes:
        return b"".join(map(_field, ("run", self.isa, self.threads, self.nudge, len(self.x), self.x.tobytes())))

    def read(self, fields: Iterator[Any]) -> None:
        isa = next(fields)
        assert self.isa in ("", isa)
        self.isa = isa
        self.kernels = [next(fields) for _ in range(next(fields)[0])]
        for _ in range(next(fields)[0]):
            name, dtype, data = next(fields), next(fields), next(fields)
            self.values.append((name, np.frombuffer(data, runtime._NUMPY[dtype])))
        self.output = next(fields)

    def difference(self, output: np.ndarray, values: dict[str, np.ndarray]) -> str:
        """The first stored value in which the run differs from the interpreter, or nothing."""
        for name, value in self.values:
            wanted = values[name].reshape(-1)
            if not same(value, wanted):
                many = np.count_nonzero(value != wanted) if value.shape == wanted.shape else "all"
                return f"{name}: {many} of {wanted.size} differ"
        return "" if self.output == output.tobytes() else "the output"


def _fields(data: bytes) -> Iterator[Any]:
    at = 0
    while at < len(data):
        tag, count = data[at : at + 1], struct.unpack_from("<I", data, at + 1)[0]
        size = count * (8 if tag == b"I" else 1)
        part = data[at + 5 : at + 5 + size]
        at += 5 + size
        yield part.decode() if tag == b"s" else np.frombuffer(part, "<i8").tolist() if tag == b"I" else part


@dataclass
class Machine:
    """A way to run the program: under qemu, or here."""

    program: Path
    folder: Path
    cores: Mapping[str, str] = field(default_factory=dict)  # by isa; none for this machine's own

    def replay(self, networks: Sequence[tuple[Graph, Sequence[Run]]]) -> None:
        """Fills in the runs of each network, those of a core all in one process."""
        for core in {self.cores.get(r.isa): None for _, runs in networks for r in runs}:
            command = (EMULATOR, "-cpu", core, str(self.program)) if core else (str(self.program),)
            self._replay(command, [(g, [r for r in runs if self.cores.get(r.isa) == core]) for g, runs in networks])

    def _replay(self, command: tuple[str, ...], networks: Sequence[tuple[Graph, Sequence[Run]]]) -> None:
        cases, results = self.folder / "cases", self.folder / "results"
        cases.write_bytes(b"".join(_calls(graph) + b"".join(r.call() for r in runs) for graph, runs in networks))
        done = subprocess.run([*command, cases, results], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.returncode}"
        fields = _fields(results.read_bytes())
        for _, runs in networks:
            for r in runs:
                r.read(fields)
        assert next(fields, None) is None
        cases.unlink()
        results.unlink()

    def differences(self, graph: Graph, x: np.ndarray, isas: Sequence[str], nudge: int = 0) -> list[str]:
        """Of one network, on each isa."""
        output, values = run(graph, x, trace=True)
        runs = [Run(isa, x, nudge=nudge) for isa in isas]
        self.replay([(graph, runs)])
        return [r.difference(output, values) for r in runs]


def _build(name: str, *options: str) -> Path:
    """The program, in build/`name`; as `make` does, only what has changed is compiled."""
    tools = Path(sys.executable).parent  # cmake and ninja of this environment
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    folder = ROOT / "build" / name
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        ROOT,
        "-B",
        folder,
        "-DLOWBIT_PYTHON=OFF",
        "-DLOWBIT_REPLAY=ON",
        *options,
    ]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return folder / "lowbit_replay"


@pytest.fixture(scope="module")
def arm_program() -> Path:
    missing = [tool for tool in PACKAGES if shutil.which(tool) is None]
    if missing:
        reason = (
            f"the rows for ARM (i8mm, neon) are NOT tested: no {', '.join(missing)}. On Debian: "
            f"apt-get install {' '.join(PACKAGES[tool] for tool in missing)}"
        )
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    return _build("aarch64", "--toolchain", str(ROOT / "engine/cmake/aarch64-linux-gnu.cmake"))


@pytest.fixture(scope="module")
def arm(arm_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(arm_program, tmp_path_factory.mktemp("arm"), CORES)


# --- random graphs ---


@dataclass
class Campaign:
    """Every cell asked for once, then random Graphs; each on every row of ARM."""

    arm: Machine
    here: Machine | None
    failures: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))  # by machine and isa
    ran: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    seen: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    kernels: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    graphs: int = 0

    def go(self) -> None:
        asks = list(enumerate([*graphs.EXPECTED.values(), *[None] * MORE_GRAPHS], SEED))
        for first in range(0, len(asks), CHUNK):
            self.chunk(asks[first : first + CHUNK])

    def chunk(self, asks: list[tuple[int, dict[str, Any] | None]]) -> None:
        drawn = [graphs.draw(*ask) for ask in asks]
        batches = [graphs.inputs(graph, seed, batch=3) for graph, (seed, _) in zip(drawn, asks, strict=True)]
        expected = [run(graph, x, trace=True) for graph, x in zip(drawn, batches, strict=True)]
        for where, machine, isas in (("arm", self.arm, ISAS), ("here", self.here, AVAILABLE)):
            if machine is None:
                continue
            runs = [list(self.runs(seed, x, isas)) for (seed, _), x in zip(asks, batches, strict=True)]
            machine.replay(list(zip(drawn, runs, strict=True)))
            for ask, graph, (output, values), of_graph in zip(asks, drawn, expected, runs, strict=True):
                for r in of_graph:
                    self.ran[where, r.isa] += 1
                    n = len(r.x)
                    difference = r.difference(output[:n], {name: value[:n] for name, value in values.items()})
                    if difference:
                        what = f"draw{ask}, batch {n}, {r.threads} threads: {difference}"
                        self.failures[where, r.isa].append(what)
                if machine is self.arm:
                    self.count(graph, of_graph[: len(isas)])
        self.graphs += len(asks)

    @staticmethod
    def runs(seed: int, x: np.ndarray, isas: Sequence[str]) -> Iterator[Run]:
        for isa in isas:
            yield Run(isa, x)
        yield Run(isas[seed % len(isas)], x[:1])
        if (os.cpu_count() or 1) > 1:
            yield Run(isas[(seed + 1) % len(isas)], x, threads=2)

    def count(self, graph: Graph, runs: list[Run]) -> None:
        cells = graphs.cells(graph)
        for r in runs:
            for cell in cells:
                self.seen[cell, r.isa] += 1
            for kernel in r.kernels:
                self.kernels[kernel, r.isa] += 1

    def table(self) -> str:
        width = max(map(len, (*graphs.EXPECTED, *KERNELS))) + 2
        lines = [
            f"64-bit ARM under qemu against interpreter on {self.graphs} graphs (seed {SEED}), per op x type x ISA"
        ]
        lines.append(f"{'':{width}}" + "".join(f"{isa:>8}" for isa in ISAS))
        for title, counts in ((graphs.EXPECTED, self.seen), (KERNELS, self.kernels)):
            lines += [f"{cell:{width}}" + "".join(f"{counts[cell, isa]:>8}" for isa in ISAS) for cell in title]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def campaign(arm: Machine, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    here = Machine(_build("replay"), tmp_path_factory.mktemp("here")) if REQUIRED else None
    c = Campaign(arm, here)
    c.go()
    return c


def _first(campaign: Campaign, where: str, isa: str) -> str:
    """What is wrong with a row, or nothing."""
    assert campaign.ran[where, isa] >= campaign.graphs
    failures = campaign.failures[where, isa]
    return f"{len(failures)} runs differ on {isa}; the first: {failures[0]}" if failures else ""


@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_interpreter(campaign: Campaign, isa: str) -> None:
    assert not _first(campaign, "arm", isa)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_the_program_says_the_same_of_this_machine(campaign: Campaign, isa: str) -> None:
    if campaign.here is None:
        pytest.skip("`make test-arm` builds the program for this machine, too")
    assert not _first(campaign, "here", isa)


def test_no_cell_is_empty(campaign: Campaign, record_property: Callable[[str, object], None]) -> None:
    record_property("table", campaign.table())
    empty = [(cell, isa) for cell in graphs.EXPECTED for isa in ISAS if not campaign.seen[cell, isa]]
    empty += [(k, isa) for k in KERNELS for isa in ISAS if (k, isa) not in NOWHERE and not campaign.kernels[k, isa]]
    assert not empty


# --- by hand ---


def one_layer(op: str, weight: Tensor, shape: tuple[int, ...], code: Codes, **attrs: object) -> Graph:
    """float32 -> codes -> product -> output."""
    quantize = {"kind": code.kind, "bits": code.bits} | ({} if code.kind == "bipolar" else {"reciprocal": 1.0})
    nodes = (
        Node("input", "x", attrs={"shape": shape, "dtype": "float32"}),
        Node("quantize", "q", ("x",), attrs=quantize),
        Node(op, "p", ("q",), {"weight": "w"}, dict(attrs)),
        Node("output", "y", ("p",)),
    )
    return Graph(nodes, {"w": weight})


def zeros_and_ties() -> tuple[Graph, np.ndarray]:
    """Both zeros, denormals and ties through every step that compares or rounds."""
    rng = np.random.default_rng(SEED)
    special = np.array(
        [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 0.5, -0.5, 1.5, 2.5, -2.5, 127.5, -128.5, 1e9], np.float32
    )
    pool = {"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0, 0, 0)}
    nodes = (
        Node("input", "x", attrs={"shape": (4, 4, 33), "dtype": "float32"}),
        Node("prelu", "p", ("x",), {"slope": "slope"}),
        Node("relu", "r", ("x",)),
        Node("clip", "c", ("x",), attrs={"low": 0.0, "high": 0.0}),
        Node("clip", "d", ("x",), attrs={"low": -0.0, "high": -0.0}),
        Node("max_pool", "m", ("x",), attrs=pool),
        Node("quantize", "sign", ("x",), attrs={"kind": "bipolar", "bits": 1}),
        Node("quantize", "step", ("x",), attrs={"kind": "signed", "bits": 8, "reciprocal": 1.0}),
        *(Node("flatten", f"{v}.flat", (v,)) for v in ("p", "r", "c", "d", "m", "sign", "step")),
        Node("linear", "bits", ("sign.flat",), {"weight": "w"}),
        *(Node("mul", f"{v}.float", (f"{v}.flat",), {"factor": "one"}) for v in ("sign", "step")),
        Node("mul", "bits.float", ("bits",), {"factor": "one"}),
        Node(
            "concat",
            "all",
            ("p.flat", "r.flat", "c.flat", "d.flat", "m.flat", "sign.float", "step.float", "bits.float"),
        ),
        Node("output", "y", ("all",)),
    )
    tensors = {
        "slope": Tensor(rng.choice([-0.5, -0.0, 0.0, 0.25, 1e-3], 33)),
        "one": Tensor(np.ones(1)),
        "w": signs(rng, 16, 4 * 4 * 33),
    }
    return Graph(nodes, tensors), rng.choice(special, (64, 4, 4, 33))


def all_bits_differ(words: int) -> tuple[Graph, np.ndarray]:
    """The largest counts there are: a byte of a NEON lane holds 31 words' worth, then it has to be emptied."""
    channels = 32 * words
    graph = one_layer(
        "linear", Tensor(np.full((48, channels), -1), Codes("bipolar", 1)), (channels,), Codes("bipolar", 1)
    )
    return graph, np.ones((5, channels), np.float32)


def extreme_codes() -> tuple[Graph, np.ndarray]:
    """-128 x 255 throughout: pairs of products beyond 16 bits, sums near the end of 32."""
    size = 65_536
    weight = Tensor(np.full((17, size), -128), Codes("signed", 8))
    return one_layer("linear", weight, (size,), Codes("unsigned", 8)), np.full((3, size), 1e6, np.float32)


def binary(factor: float) -> tuple[Graph, np.ndarray]:
    rng = np.random.default_rng(SEED)
    graph = binary_net(rng, factor=np.full(48, factor, np.float32))
    return graph, rng.normal(size=(2, 9, 9, 48)).astype(np.float32)


def offsets(roles: str, x: Codes, w: Codes, **attrs: object) -> tuple[Graph, np.ndarray]:
    rng = np.random.default_rng(SEED)
    graph = one_product(rng, x, w, side=7, channels=64, filters=64, roles=roles, **attrs)
    return graph, (rng.normal(size=(2, 7, 7, 64)) * 40).astype(np.float32)


SIGN, TABLE = Codes("bipolar", 1), Codes("table", 2, (-5, 0, 1, 9))
BY_HAND: dict[str, Callable[[], tuple[Graph, np.ndarray]]] = {
    "every half": every_half,
    "zeros and ties": zeros_and_ties,
    "extreme codes": extreme_codes,
    **{f"{n} words of bits that differ": partial(all_bits_differ, n) for n in (1, 30, 31, 32, 62, 63, 64, 200)},
    **{f"factors {f}": partial(binary, f) for f in (0.0, -0.0, 1e-38, -1e-42, 1e30, 1e-45)},
    **{
        f"offsets of {roles}, {name}": partial(offsets, roles, *codes, padding=(1, 1, 1, 1), groups=groups)
        for roles in ("input", "weight", "input and weight")
        for name, codes, groups in (("bits", (SIGN, SIGN), 2), ("codes", (Codes("unsigned", 3), TABLE), 64))
    },
}


@pytest.mark.parametrize("what", BY_HAND)
def test_by_hand(arm: Machine, what: str) -> None:
    assert not any(arm.differences(*BY_HAND[what](), isas=ISAS))


def test_a_threshold_off_by_one_is_seen(arm: Machine) -> None:
    graph, x = binary(0.1)
    assert not any(arm.differences(graph, x, ISAS))
    for nudge in (1, -1):
        assert all(d.startswith("q1: ") for d in arm.differences(graph, x, ISAS, nudge))


@pytest.mark.parametrize(("core", "isa"), [("cortex-a53", "neon"), ("max", "i8mm")])
def test_the_best_row_that_a_core_has_is_taken(arm_program: Path, tmp_path: Path, core: str, isa: str) -> None:
    graph, x = binary(0.1)
    best = Run("", x)
    Machine(arm_program, tmp_path, {"": core}).replay([(graph, [best])])
    assert best.isa == isa


@pytest.mark.parametrize(
    ("isa", "match"),
    [("avx2", "unknown isa 'avx2'; this build has i8mm, neon, scalar"), ("i8mm", "isa 'i8mm' can't run on this CPU")],
)
def test_refuses_rows(arm_program: Path, tmp_path: Path, isa: str, match: str) -> None:
    graph, x = binary(0.1)
    with pytest.raises(AssertionError, match=f"network 0, run: {match}"):
        Machine(arm_program, tmp_path, {isa: "cortex-a53"}).differences(graph, x, [isa])


def test_no_multiply_add_is_fused(arm_program: Path) -> None:
    """Every step rounds on its own: the compiled engine has none of the instructions that round once for two."""
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    assert objdump, "it comes with the compiler"
    objects = sorted(arm_program.parent.glob("CMakeFiles/lowbit_engine.dir/**/*.o"))
    code = subprocess.run([objdump, "-d", *objects], capture_output=True, text=True, check=True).stdout
    names = {line.split("\t")[2] for line in code.splitlines() if line.count("\t") > 2}
    assert {"fmul", "fadd", "cnt", "smlal", "usdot"} <= names
    assert not {n for n in names if n.startswith(("fmla", "fmls", "fmadd", "fmsub", "fnmadd", "fnmsub", "fmlal"))}
