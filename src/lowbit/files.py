"""Writing a file so that it is there whole or as it was before."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` under a temporary name beside `path`, then rename.

    Raises:
        OSError: the directory is missing or read-only, or the disk is full; `filename` is `path`, and nothing is left behind.
    """
    target = Path(path)
    try:
        _write(target, data)
    except OSError as error:
        error.filename, error.filename2 = str(target), None  # not the temporary name
        raise


def _write(target: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
