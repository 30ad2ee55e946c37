"""Writing a file so that it is there whole or as it was before."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["check_file", "check_folder", "remove_leftovers", "write_atomic"]

SUFFIX = ".tmp"
"""End of the temporary files' names: ``.NAME.RANDOM.tmp``."""


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` under a temporary name beside `path`, then rename.

    The data is on the disk before it takes the name, and the name is on the disk at the end: neither a kill nor a power cut
    leaves half a file. What a killed writer of the same file left behind is removed.

    Raises:
        OSError: the directory is missing or read-only, or the disk is full; `filename` is `path`, and nothing is left behind.
    """
    target = Path(path)
    try:
        remove_leftovers(target.parent, target.name)
        _write(target, data)
    except OSError as error:
        error.filename, error.filename2 = str(target), None  # not the temporary name
        raise


def _write(target: Path, data: bytes | memoryview) -> None:
    descriptor, temporary = _temporary(target)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)  # before the lock goes
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _temporary(target: Path) -> tuple[int, Path]:
    """A new file that is locked while its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=SUFFIX)
        with suppress(OSError):  # a file system without locks: leftovers stay there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # somebody tidied up between the two calls


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems can't
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(path: str | os.PathLike[str], made: bool = False) -> None:
    """Refuse, before the work whose result goes there, a file that `write_atomic` couldn't write. Makes nothing.

    Args:
        path: the file.
        made: its folder will be made.

    Raises:
        OSError: a folder has the name, or there is no folder for it or no permission; `filename` is what is in the way.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not made and not target.parent.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target))
    check_folder(target.parent)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that can't be written to, or made, before the work whose results go there. Makes nothing.

    Raises:
        OSError: no permission, or a file has its name or that of a folder above it; `filename` is what is in the way.
    """
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove temporary files of writers that were killed; those of living ones are locked and stay.

    Args:
        folder: where to look.
        name: the file that was to be written; None for all.
    """
    pattern = f".{'*' if name is None else glob.escape(name)}.*{SUFFIX}"
    for path in Path(folder).glob(pattern):
        with suppress(OSError):  # locked, gone, or not ours to remove
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
