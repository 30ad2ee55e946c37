"""The entry point of the console script ``lowbit``: says which extra is missing before anything else is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lowbit.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.stderr.write("error: the command line needs an extra that is not installed: pip install 'lowbit[cli]'\n")
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
