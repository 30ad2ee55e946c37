"""One thread for PyTorch; and prints the tables that tests hand over with `record_property("table", text)`, from workers too."""

from __future__ import annotations

import os
import signal
from typing import Any

# The number of threads is part of what a sum of floats is, and tests compare runs of this process with those of others that
# are started with one. Set before torch is imported, and handed down.
os.environ["OMP_NUM_THREADS"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so does all that it starts: tests that interrupt would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "table" and report.when == "call":
                    terminalreporter.write_line("")
                    for line in str(text).splitlines():
                        terminalreporter.write_line(line)
