"""`lowbit`, stopped at one moment of its life: writes a marker there and waits to be killed. For test_kill.py alone.

    python kill_runner.py MOMENT MARKER <arguments of lowbit>

MOMENT is ``step:N`` (the N-th training step), ``write:NAME:N`` (half of the N-th time that a file NAME is written: it lies
there in part, under its temporary name), ``renamed:NAME:N`` (just after), or ``never``.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path


def stop_at(moment: str, marker: Path) -> None:
    kind, *rest = moment.split(":")

    def stop() -> None:
        marker.touch()
        time.sleep(600)
        raise SystemExit("nobody killed the process")

    if kind == "step":
        from lowbit.train.module import TrainingModule

        step, steps = TrainingModule.training_step, itertools.count(1)

        def training_step(self, batch, batch_idx):
            if next(steps) == int(rest[0]):
                stop()
            return step(self, batch, batch_idx)

        TrainingModule.training_step = training_step
    elif kind in ("write", "renamed"):
        name, count, seen = rest[0], int(rest[1]), itertools.count(1)
        fsync, replace = os.fsync, Path.replace

        def slow_fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if kind == "write" and path.name.startswith(f".{name}.") and next(seen) == count:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                stop()
            fsync(descriptor)

        def slow_replace(self: Path, target: Path) -> Path:
            done = replace(self, target)
            if kind == "renamed" and Path(target).name == name and next(seen) == count:
                stop()
            return done

        os.fsync, Path.replace = slow_fsync, slow_replace
    elif kind != "never":
        raise SystemExit(f"no moment {moment!r}")


if __name__ == "__main__":
    stop_at(sys.argv[1], Path(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    from lowbit.__main__ import main

    main()
