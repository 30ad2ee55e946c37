"""Memory: every buffer of the engine lies against pages that nobody may touch, and no result depends on what it held.

A read or write beyond the slack that kernels.h promises ends the process, so each campaign runs in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SEED = int(os.environ.get("LOWBIT_TEST_SEED", "20261"))
GRAPHS = int(os.environ.get("LOWBIT_TEST_GUARDED", "200"))
SLACK = 256  # kSlack of kernels.h
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

START = """
import faulthandler, os, sys
sys.path.insert(0, os.environ["TESTS"])
import conftest
from lowbit import _engine
faulthandler.enable()
"""

# Numbers of the caller end (or begin) where a page does: they have no slack.
CAMPAIGN = """
import ctypes, mmap
import numpy as np
import graphs
from lowbit.runtime import isas, load

libc = ctypes.CDLL(None, use_errno=True)

def guarded(size, side):
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, inside + mmap.PAGESIZE)
    whole = np.frombuffer(pages, np.uint8)
    first = 0 if side == "behind" else mmap.PAGESIZE
    shut = ctypes.c_void_p(whole.ctypes.data + (inside if side == "behind" else 0))
    if libc.mprotect(shut, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = inside - size if side == "behind" else first
    return whole[start : start + size]

seed, count, side = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
_engine._debug_guard_pages(side)
rows = [isa for isa, available in isas().items() if available]
asks = [*graphs.EXPECTED.values()]
for s in range(seed, seed + count):
    ask = asks[s % len(asks)] if s % 2 else None
    graph = graphs.draw(s, ask)
    x = graphs.inputs(graph, s, batch=3)
    expected = np.ascontiguousarray(graph.run(x))
    given, got = guarded(x.nbytes, side), guarded(expected.nbytes, side)
    given[:] = x.reshape(-1).view(np.uint8)
    for isa in rows:
        print(f"draw({s}, {ask}) on {isa}", flush=True)
        for threads in (1, 2)[: 1 + (s % 4 == 0 and os.cpu_count() > 1)]:
            engine = load(graph, threads=threads, isa=isa)
            engine._native._debug_always_share()
            got[:] = 0
            engine._native.run(given, len(x), got, False)
            if got.tobytes() != expected.tobytes():
                sys.exit("a result depends on what memory held before")
print("done", count, *rows)
"""


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TESTS": str(Path(__file__).parent)}
    command = [sys.executable, "-c", START + code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=600)


@pytest.mark.parametrize("side", ["behind", "before"])
def test_no_kernel_leaves_its_buffers(side: str) -> None:
    done = python(CAMPAIGN, str(SEED), str(GRAPHS), side)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: exit {done.returncode}\n{done.stderr[-3000:]}"
    assert lines[-1].split()[:2] == ["done", str(GRAPHS)]


# a guarded side, a byte counted from there, and whether a process that touches it lives on
TOUCHES = {
    "the last of the slack": ("behind", SLACK - 1, True),
    "the first behind the slack": ("behind", SLACK, False),
    "the first": ("before", 0, True),
    "the last before the buffer": ("before", -1, False),
}


@pytest.mark.parametrize("what", TOUCHES)
@pytest.mark.parametrize("size", [100, 5000])
def test_a_byte_too_far_ends_the_process(what: str, size: int) -> None:
    side, at, lives = TOUCHES[what]
    at += size if side == "behind" else 0
    done = python(f"_engine._debug_guard_pages({side!r}); _engine._debug_touch({size}, {at})")
    assert (done.returncode == 0) is lives, done.stderr


@pytest.mark.skipif(not SANITIZED, reason="not a build with sanitizers: `make test-asan`")
def test_the_sanitizers_see_a_byte_too_far() -> None:
    assert python(f"_engine._debug_touch(100, {100 + SLACK - 1})").returncode == 0
    done = python(f"_engine._debug_touch(100, {100 + SLACK})")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    done = python(f"_engine._debug_touch(100, {-(2**63)})")
    assert done.returncode != 0
    assert "runtime error: pointer index expression" in done.stderr
