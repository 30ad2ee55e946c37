"""What was measured, for a terminal and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from lowbit.files import write_atomic
from lowbit.machine import processor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNSURE: Final = "~"
"""Stands behind a number that is not to be trusted: a warning says why."""

_SHORT: Final = {
    "ort-fp32": "ORT fp32",
    "ort-int8": "ORT int8",
    "openvino-fp32": "OV fp32",
    "openvino-int8": "OV int8",
    "torch": "torch",
    "lce": "Larq CE",
}
"""Headings of narrow columns."""


def digits(value: float) -> str:
    """Three digits that count."""
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def threads_text(count: int) -> str:
    """1 thread, 2 threads."""
    return f"{count} thread{'s'[: count > 1]}"


def whole_table(result: Mapping[str, Any]) -> Table:
    """`bench_file`'s whole network, for a terminal."""
    title = f"{result['file']}: {threads_text(result['threads'])}, batch {result['batch']}"
    return _network_table(title, result["whole"], result["isa"], result["batch"], result["versions"])


def _network_table(title: str, whole: Mapping[str, Any], isa: str, batch: int, packages: Mapping[str, str]) -> Table:
    from rich import box
    from rich.table import Table

    from lowbit.bench.peers import PEERS

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in ("ms per image", "p10", "p90", "images/s", "lowbit is faster", "p10 .. p90"):
        table.add_column(heading, justify="right")
    table.add_column("how", overflow="fold")

    def row(name: str, timing: Mapping[str, float], *more: str) -> None:
        cells = [digits(1e3 * timing[key] / batch) for key in ("median", "p10", "p90")]
        table.add_row(name, *cells, f"{batch / timing['median']:,.0f}", *more)

    row("lowbit", whole["ours"], "", "", isa)
    for name, peer in whole["peers"].items():
        mark = UNSURE if peer["noisy"] or not whole["trusted"] else ""
        what = f"{PEERS[name].title}, {packages.get(PEERS[name].packages[0], '')}"
        ratio = _judged(whole, name, f"[bold]{peer['ratio']:.2f}x[/]{mark}")
        row(what, peer["theirs"], ratio, f"{peer['p10']:.2f} .. {peer['p90']:.2f}", peer["note"])
    return table


def networks_tables(rows: Sequence[Mapping[str, Any]], packages: Mapping[str, str]) -> Iterable[Table]:
    """Whole networks of ``python -m lowbit.bench``, one table each."""
    for row in rows:
        title = f"{row['network']}: {threads_text(row['threads'])}, batch 1, {row['macs'] / 1e6:,.0f} MMAC"
        yield _network_table(title, row, row["isa"], 1, packages)


def _ratio(row: Mapping[str, Any], name: str) -> str:
    peer = row["peers"].get(name)
    if peer is None:
        return ""
    return _judged(row, name, f"{peer['ratio']:.1f}x{UNSURE if peer['noisy'] or not row['trusted'] else ''}")


def _share(row: Mapping[str, Any]) -> str:
    share = row["peak_share"]
    return "" if share is None else _judged(row, "peak", f"{share:.0%}{'' if row['trusted'] else UNSURE}")


def _judged(row: Mapping[str, Any], name: str, text: str) -> str:
    """In green where the row's goal is reached, in red where it is missed."""
    found = outcome(row, name)
    return text if found is None else f"[{'green' if found else 'red'}]{text}[/]"


def outcome(row: Mapping[str, Any], name: str) -> bool | None:
    """Whether a row reaches its goal beside a peer, or that of its share of the ``peak``; None where it has none, or where the numbers
    are not to be trusted."""
    least, peer = row.get("goals", {}).get(name), row["peers"].get(name)
    if least is None or not row["trusted"] or (peer and peer["noisy"]):
        return None
    value = row["peak_share"] if name == "peak" else peer["ratio"] if peer else None
    return None if value is None else bool(value >= least)


def goals_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many goals are reached, and each that is missed."""
    found = [(row, name, outcome(row, name)) for row in rows for name in row["goals"]]
    counts = {state: sum(result is state for _, _, result in found) for state in (True, False, None)}
    lines = [
        f"goals: {counts[True]} reached, {counts[False]} missed, {counts[None]} not measured or not to be told now"
    ]
    for row, name, result in found:
        if result is False:
            what = (
                f"{row['goals'][name]:.0%} of the peak" if name == "peak" else f"{row['goals'][name]:g}x {_SHORT[name]}"
            )
            lines.append(f"missed: {row.get('layer') or row['network']}, at least {what}")
    return lines


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    found = {name for row in rows for name in row["peers"]}
    return [name for name in _SHORT if name in found]


def layers_table(result: Mapping[str, Any]) -> Table:
    """`bench_file`'s layers, for a terminal."""
    from rich import box
    from rich.table import Table

    rows, batch = result["layers"], result["batch"]
    names = _names(rows)
    title = (
        f"steps on {result['isa']}, microseconds per image of a batch of {batch}; times faster than each peer's layer"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("step", overflow="fold", min_width=12)
    table.add_column("kernel", overflow="fold")
    for heading in ("MMAC", "µs", "share", "GMAC/s", "of peak", *(_SHORT[name] for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        per_image = row["seconds"] / batch
        table.add_row(
            row["name"],
            row["kernel"] if row["isa"] == result["isa"] else f"{row['kernel']} {row['isa']}",
            f"{row['macs'] / 1e6:.2f}" if row["macs"] else "",
            digits(1e6 * per_image),
            f"{row['share']:.0%}",
            f"{row['macs'] / per_image / 1e9:,.0f}" if row["macs"] and per_image else "",
            _share(row),
            *(_ratio(row, name) for name in names),
        )
    return table


def single_layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Layers of ``python -m lowbit.bench``: ours, and how many times faster than each peer."""
    from rich import box
    from rich.table import Table

    first, names = rows[0], _names(rows)
    title = f"{processor()}, {threads_text(first['threads'])}, {first['isa']}; times faster than each peer"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=30)
    table.add_column("kernel", overflow="fold")
    for heading in ("µs", "GMAC/s", "of peak", *(_SHORT[name] for name in names)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["layer"],
            row["kernel"],
            digits(1e6 * row["ours"]["median"]),
            f"{row['gmacs_per_second']:,.0f}",
            _share(row),
            *(_ratio(row, name) for name in names),
        )
    return table


def peak_line(peak: Mapping[str, Any] | None) -> str:
    """This core's measured peak, in a sentence."""
    if peak is None:
        return "peak: not measured (nothing here is held against it, or this row of kernels has none)"
    largest = peak["largest"]
    return (
        f"this core's peak, measured in the same run: {largest['bits'] / 1e9:,.0f} GMAC/s in bits, "
        f"{largest['integers'] / 1e9:,.0f} in integers"
    )


def startup_line(startup: Mapping[str, Any]) -> str:
    """Import, load and memory, in a sentence."""
    text = (
        f"import {1e3 * startup['import_seconds']:.0f} ms (without torch), load {1e3 * startup['load_seconds']:.1f} ms, "
        f"file {startup['file_bytes'] / 1e6:.2f} MB"
    )
    if startup["ran_bytes"] is None:
        return text
    ratio = ""
    if startup["file_bytes"] >= _LARGE:
        ratio = f": {startup['memory_ratio']:.1f}x the file and buffers"
    return (
        f"{text}, memory {startup['loaded_bytes'] / 1e6:+.1f} MB by loading, {startup['ran_bytes'] / 1e6:+.1f} MB after a run "
        f"(of it buffers {startup['buffer_bytes'] / 1e6:.1f}){ratio}"
    )


def verdict(what: str, good: bool | None) -> str:
    """A goal, and whether it is reached; None where the numbers are not to be trusted."""
    if good is None:
        return f"{what}: [yellow]not to be told on this machine now[/]"
    return f"{what}: {'[green]reached[/]' if good else '[red]missed[/]'}"


_MOST: Final = 10
_LARGE: Final = 1_000_000  # bytes: below, the memory that any file takes says nothing of this one


_WIDTH: Final = 150


def wide_console() -> Console:
    """A terminal as it is; a file or a pipe gets lines wide enough for the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """The first few; the numbers' file has all of them."""
    from rich.markup import escape

    for text in warnings[:_MOST]:
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
    if len(warnings) > _MOST:
        console.print(f"[yellow]and {len(warnings) - _MOST} more like these[/]")


def write_result(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write plain JSON, whole or not at all. Raises OSError."""
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
