"""Fetching a published data set's files into the user's cache: checked first, then given their names."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from lowbit.train.data.images import DataError

__all__ = ["cache_folder", "fetch"]


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/lowbit/<name>``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lowbit" / name


def fetch(
    name: str, mirrors: Sequence[str], folder: Path, problem: Callable[[Path], str | None], otherwise: str
) -> Path:
    """Fetch ``mirror + name`` from the first mirror that has it whole.

    Args:
        name: the file's name, on the mirrors and in ``folder``.
        mirrors: URLs, each with a slash at the end.
        folder: where to put it; made if it is not there.
        problem: what is wrong with a fetched file, or None; it is kept only then.
        otherwise: what the user can do instead, for the message.

    Returns:
        The file.

    Raises:
        DataError: no mirror has it, or the folder can't be written.
    """
    problems = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for mirror in mirrors:
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            part = Path(temporary)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    try:
                        with urllib.request.urlopen(mirror + name, timeout=30) as response:
                            shutil.copyfileobj(response, stream, 1 << 20)
                    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                        problems.append(f"{mirror}: {error}")
                        continue
                found = problem(part)
                if found is None:
                    part.chmod(0o644)
                    return part.replace(folder / name)
                problems.append(f"{mirror}: {found}")
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: can't keep {name} here ({error}); set XDG_CACHE_HOME or data.root") from None
    tried = "; ".join(problems) or "no mirror is known"
    raise DataError(f"{folder / name}: not here and not to be fetched ({tried}). {otherwise}")
