"""One thread for PyTorch; the build of the engine under test; and prints the tables that tests hand over with
`record_property("table", text)`, from workers too."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# The number of threads is part of what a sum of floats is, and tests compare runs of this process with those of others that
# are started with one. Set before torch is imported, and handed down.
os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores Ctrl-C, what nohup starts the end of the terminal, and so does all that they
# start: tests that interrupt would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# `make test-asan` tests a build with sanitizers in place of the installed one. Processes that tests start import this module.
if ENGINE := os.environ.get("LOWBIT_TEST_ENGINE"):
    _spec = importlib.util.spec_from_file_location("lowbit._engine", ENGINE)
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["lowbit._engine"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["lowbit._engine"])


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What ``lowbit.train`` logs, whatever peers and command lines of tests before did to the root logger."""
    messages: list[str] = []
    handler, log = logging.Handler(logging.WARNING), logging.getLogger("lowbit.train")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "table" and report.when == "call":
                    terminalreporter.write_line("")
                    for line in str(text).splitlines():
                        terminalreporter.write_line(line)
