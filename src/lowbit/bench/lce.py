"""``python -m lowbit.bench.lce``: the binary layers beside Larq Compute Engine, which needs an environment of its own (TensorFlow,
NumPy 1). ``make bench-lce`` makes it and runs this.

The other engine runs in a process of that environment, on the same cores; the two take turns. Its layer is the difference of a
long and a short chain of layers, so that what its calls cost cancels, and is padded with ones, not with zeros: its fastest form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lowbit.bench import show
from lowbit.bench.file import FORMAT, PACKAGES
from lowbit.bench.layers import LAYERS, Layer, Ours, compared
from lowbit.bench.measure import Core, Timing, in_turn, pinned
from lowbit.machine import machine, versions

NAME: Final = "lce"
_WORKER: Final = Path(__file__).with_name("lce_worker.py")


class LceError(RuntimeError):
    """The other environment is not there or can't run the layers. The message says why."""


class Worker:
    """The other process, its layers built."""

    def __init__(self, process: subprocess.Popen[str], layers: Sequence[Layer], threads: int) -> None:
        self._process = process
        self._say(json.dumps({"layers": [asdict(layer) for layer in layers], "threads": threads}))
        found = self._hear()
        self.modes: list[str] = found["modes"]
        self.versions: dict[str, str] = found["versions"]

    def sample(self, index: int) -> float:
        """Seconds of layer `index`, now."""
        self._say(str(index))
        return float(self._hear())

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._hear()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            last = (self._process.stderr.read().strip().splitlines() or ["no message"])[-1]
            raise LceError(f"Larq Compute Engine ends: {last}")
        return json.loads(line)


@contextmanager
def worker(python: Path, layers: Sequence[Layer], threads: int) -> Iterator[Worker]:
    """Start the other environment's process, pinned as this one is, and end it afterwards.

    Raises:
        LceError: no such environment, or it fails.
    """
    if not python.is_file():
        raise LceError(f"{python}: no such Python; make bench-lce makes the environment")
    pipe = subprocess.PIPE
    command = [str(python), str(_WORKER)]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        yield Worker(process, layers, threads)
    finally:
        process.kill()
        process.communicate()


def bench_lce(
    python: Path, layers: Sequence[Layer] = LAYERS, threads: int = 1, isa: str | None = None, repeats: int = 15
) -> dict[str, Any]:
    """Each layer beside Larq Compute Engine's.

    Returns:
        Plain JSON: ``format, machine, versions, peak, layers, warnings``, rows as those of `bench_layers` with the peer "lce".

    Raises:
        LceError: no such environment, or it fails. ValueError: more threads than cores, an unknown isa.
    """
    with pinned(threads), worker(python, layers, threads) as other:
        rows = []
        core = Core(Ours.of(layers[0], threads, isa).isa)
        for i, layer in enumerate(layers):
            ours = Ours.of(layer, threads, isa)
            with core.watched() as watch:
                mine, theirs = in_turn([ours.sample, lambda i=i: other.sample(i)], repeats)  # type: ignore[misc]
            peers = {NAME: compared(mine, theirs, other.modes[i])}
            rows.append(ours.row(layer, {"ours": asdict(Timing.of(mine)), "peers": peers}, watch))
        packages = {**versions(*PACKAGES), **other.versions}
    warnings = [*core.warnings(), *(text for row in rows for text in row["warnings"])]
    found = {"format": FORMAT, "machine": machine(), "versions": packages, "peak": core.as_dict()}
    return {**found, "layers": rows, "warnings": warnings}


def main(arguments: Sequence[str] | None = None) -> None:
    """Binary layers beside Larq Compute Engine."""
    parser = argparse.ArgumentParser(prog="python -m lowbit.bench.lce", description=main.__doc__)
    parser.add_argument("--python", type=Path, default=Path(".venv-lce/bin/python"), help="of the other environment")
    parser.add_argument("--threads", type=int, default=1, help="of both")
    parser.add_argument("--isa", help="force a row of kernels")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each")
    parser.add_argument("--json", type=Path, default=Path("bench-lce.json"), help="where the numbers go")
    options = parser.parse_args(arguments)
    console = show.wide_console()
    try:
        with console.status("Larq Compute Engine builds its layers"):
            found = bench_lce(options.python, LAYERS, options.threads, options.isa, options.repeats)
    except (LceError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    console.print(show.single_layers_table(found["layers"]))
    packages = ", ".join(f"{name} {found['versions'][name]}" for name in ("larq-compute-engine", "larq", "tensorflow"))
    console.print(
        f"beside {packages}; its fastest way each: {', '.join(sorted({_mode(row) for row in found['layers']}))}"
    )
    console.print(show.peak_line(found["peak"]))
    show.print_warnings(console, found["warnings"])
    show.write_result(options.json, found)
    console.print(f"numbers in {options.json}")


def _mode(row: dict[str, Any]) -> str:
    return str(row["peers"][NAME]["note"])


if __name__ == "__main__":
    main()
