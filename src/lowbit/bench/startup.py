"""What starting costs: importing lowbit, loading a file, memory. Each figure is of a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, Final

GOALS: Final = {"import_seconds": 0.150, "load_seconds": 0.060, "memory": 3.0}
"""Of a Bi-Real ResNet-18: seconds to import without torch, seconds to load, memory as a multiple of the file, buffers left out."""

_CHILD: Final = """
import json, os, sys, time
path, isa, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])

def resident():
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None

start = time.perf_counter()
import lowbit, lowbit.packfile
load = lowbit.load
imported = time.perf_counter()
assert "torch" not in sys.modules
before = resident()
ready = time.perf_counter()
net = load(path, threads=threads, isa=isa)
loaded = time.perf_counter()
after = resident()
import numpy
net(numpy.zeros((1, *net.input_shape), net.input_dtype))
ran = resident()
memory = None if before is None else {"loaded": after - before, "ran": ran - before}
print(json.dumps({"import": imported - start, "load": loaded - ready, "memory": memory, "buffers": net.workspace_bytes(1)}))
"""


def bench_startup(path: str | os.PathLike[str], isa: str, threads: int = 1, repeats: int = 5) -> dict[str, Any]:
    """Import, load and memory of a file, medians over fresh processes; the file is in the system's cache.

    Returns:
        Plain JSON: ``import_seconds`` (of lowbit with what running a file needs; no torch), ``load_seconds`` (reading, checking and
        packing), ``file_bytes``, ``buffer_bytes`` (memory of one run of one image), ``loaded_bytes`` and ``ran_bytes``, by which the
        process grew when the file was loaded and after its first run (None where the system doesn't tell), ``memory_ratio`` =
        (ran_bytes - buffer_bytes) / file_bytes.

    Raises:
        RuntimeError: the process fails.
    """
    found = [_child(path, isa, threads) for _ in range(repeats)]
    size = Path(path).stat().st_size
    buffers = int(found[0]["buffers"])
    memory = found[0]["memory"] is not None
    loaded, ran = (int(median(f["memory"][key] for f in found)) if memory else None for key in ("loaded", "ran"))
    return {
        "import_seconds": median(f["import"] for f in found),
        "load_seconds": median(f["load"] for f in found),
        "file_bytes": size,
        "buffer_bytes": buffers,
        "loaded_bytes": loaded,
        "ran_bytes": ran,
        "memory_ratio": None if ran is None else max(ran - buffers, 0) / size,
    }


def _child(path: str | os.PathLike[str], isa: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-c", _CHILD, os.fspath(path), isa, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"a fresh process can't load {os.fspath(path)}: {last}")
    return json.loads(done.stdout)
