"""Prints the tables that tests hand over with `record_property("table", text)`, from workers too."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            for key, text in getattr(report, "user_properties", ()):
                if key == "table" and report.when == "call":
                    terminalreporter.write_line("")
                    for line in str(text).splitlines():
                        terminalreporter.write_line(line)
