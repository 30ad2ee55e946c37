"""What `lowbit.train.sensitivity` measured as tables: for the terminal, Markdown, a page, and the report of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit import page
from lowbit.train.rundir import read_json, write_text
from lowbit.train.sensitivity import RESULT
from lowbit.train.units import show, unit

__all__ = ["columns", "facts", "heat_rows", "heat_table", "markdown", "ranked_rows", "read", "section", "write"]

_DARKEST = {"accuracy": 0.1, "psnr": 1.0}
"""Loss of the darkest shade: 10 points, or 1 dB."""


def read(run_dir: Path) -> dict[str, Any] | None:
    """What was measured of a run; None where nothing was.

    Raises:
        RunError: the file is damaged.
    """
    tree = read_json(run_dir / RESULT, "measure again with lowbit sensitivity --overwrite")
    return tree if tree and tree.get("reference") else None


def _scale(tree: Mapping[str, Any]) -> tuple[str, float]:
    """What losses are counted in, and the factor to it."""
    name, factor, _ = unit(tree["metric"])
    return ("points" if name == "%" else name), factor


def _measured(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {key: at for key, at in row["bits"].items() if "loss" in at}


def columns(tree: Mapping[str, Any]) -> list[str]:
    """The pairs of bits, fewest first. The first layer's inputs are pixels: its pairs stand in the columns of the same weights."""
    keys = {key for row in tree["layers"] for key in _measured(row)}
    common = [key for key in keys if sum(key in _measured(row) for row in tree["layers"]) > 1] or list(keys)
    return sorted(common, key=lambda key: tuple(map(int, key.split("/"))))


def heat_rows(tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer: ``name, trained, weights, kB, us`` and ``cells``, for each column ``text`` (loss +- standard error) and
    ``shade`` (0 to 1), or None where it was not measured."""
    _, factor = _scale(tree)
    rows = []
    for row in tree["layers"]:
        found = _measured(row)
        cells: list[dict[str, Any] | None] = []
        for column in columns(tree):
            key = column if column in found else f"{column.partition('/')[0]}/8"
            at = found.get(key)
            note = "" if key == column else f" ({key})"
            cells.append(
                None
                if at is None
                else {
                    "text": f"{factor * at['loss']:.2f} ± {factor * at['standard_error']:.2f}{note}",
                    "shade": min(max(at["loss"] / _DARKEST[tree["metric"]], 0.0), 1.0) ** 0.6,
                }
            )
        rows.append(
            {
                "name": row["name"],
                "trained": row["trained"],
                "weights": f"{row['weights']:,}",
                "kB": f"{row['bytes'] / 1000:.1f}",
                "us": "" if row["seconds"] is None else f"{1e6 * row['seconds']:.2f}",
                "cells": cells,
            }
        )
    return rows


def heat_table(tree: Mapping[str, Any]) -> list[list[str]]:
    """`heat_rows` as texts, under a row of headings; with the bits that were proposed, where some were."""
    what, _ = _scale(tree)
    picked = (tree.get("proposal") or {}).get("bits", {})
    rows = [["layer", "as trained", *(f"{c}, {what}" for c in columns(tree)), *(["proposed"] if picked else [])]]
    for row in heat_rows(tree):
        cells = ["" if cell is None else cell["text"] for cell in row["cells"]]
        rows.append([row["name"], row["trained"], *cells, *([picked.get(row["name"], "")] if picked else [])])
    return rows


def ranked_rows(tree: Mapping[str, Any]) -> list[list[str]]:
    """Every layer at every pair, the cheapest first, under a row of headings: sorted by the loss for each byte that is saved; what
    saves nothing comes last."""
    what, factor = _scale(tree)
    timed = all(row["seconds"] is not None for row in tree["layers"])
    found = []
    for row in tree["layers"]:
        for key, at in _measured(row).items():
            saved = row["bytes"] - at["bytes"]
            time = row["seconds"] - at["seconds"] if timed and at["seconds"] is not None else None
            by_byte = factor * at["loss"] / (saved / 1000) if saved > 0 else None
            by_time = factor * at["loss"] / (1e6 * time) if time is not None and time > 0 else None
            found.append((by_byte is None, by_byte or 0.0, row, key, at, saved, time, by_byte, by_time))
    found.sort(key=lambda each: each[:2])
    headings = ["layer", "bits", f"loss ({what})", "saved kB", f"{what} per kB"]
    rows = [headings + (["saved us", f"{what} per us"] if timed else [])]
    for *_, row, key, at, saved, time, by_byte, by_time in found:
        texts = [
            row["name"],
            f"{row['trained']} to {key}",
            f"{factor * at['loss']:.2f} ± {factor * at['standard_error']:.2f}",
            f"{saved / 1000:.2f}",
            "" if by_byte is None else f"{by_byte:.3f}",
        ]
        if timed:
            texts += ["" if time is None else f"{1e6 * time:.2f}", "" if by_time is None else f"{by_time:.3f}"]
        rows.append(texts)
    return rows


def facts(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it was measured on, and the proposal."""
    what, factor = _scale(tree)
    metric, reference, trained = tree["metric"], tree["reference"], tree["trained"]
    error = f" ± {factor * reference['standard_error']:.2f}"
    pictures = "pictures" if tree["task"] == "superres" else "images"
    seen = ", which the network was trained on" if tree["data"]["trained_on"] else ""
    rows = [
        (
            metric if metric == "accuracy" else metric.upper(),
            f"{show(reference['value'], metric)}{error}, as trained {show(trained['value'], metric)}",
        ),
        ("measured on", f"{tree['data']['images']:,} held-out {pictures}{seen}"),
        ("fine-tuning", f"{tree['settings']['steps']} steps each"),
    ]
    whole = tree["network"]["trained"]
    time = "" if whole["seconds"] is None else f", {1e3 * whole['seconds']:.3g} ms"
    rows.append(("the network", f"{whole['bytes']:,} bytes{time}"))
    proposal = tree.get("proposal")
    if proposal:
        time = "" if proposal["seconds"] is None else f", {1e3 * proposal['seconds']:.3g} ms"
        rows += [
            ("proposed", f"{proposal['bytes']:,} bytes{time}: {proposal['recipe']}"),
            ("its loss, the layers' added up", f"{factor * proposal['predicted']:.2f} {what}"),
            (
                "its loss, measured before training",
                f"{factor * proposal['loss']:.2f} ± {factor * proposal['standard_error']:.2f} {what}",
            ),
        ]
    return rows


_NOTE = (
    "Loss: of one layer at these bits (weights/inputs), everything else as it was trained, against the network that was fine-tuned as "
    "long without a change; ± is the standard error of the difference, image by image. Below zero is noise. Bytes and times of a layer "
    "are those in a network whose layers all have these bits."
)


def markdown(tree: Mapping[str, Any]) -> str:
    """The tables as Markdown."""

    def table(rows: Sequence[Sequence[str]]) -> list[str]:
        head, *body = ["| " + " | ".join(row) + " |" for row in rows]
        return [head, "|" + "---|" * len(rows[0]), *body]

    lines = [f"# Sensitivity of {tree['run']}", ""]
    lines += [f"- {name}: {text}" for name, text in facts(tree)]
    lines += [
        "",
        _NOTE,
        "",
        *table(heat_table(tree)),
        "",
        "## By loss for each byte saved",
        "",
        *table(ranked_rows(tree)),
        "",
    ]
    return "\n".join(lines)


def section(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates show."""
    what, _ = _scale(tree)
    return {
        "facts": facts(tree),
        "columns": columns(tree),
        "rows": heat_rows(tree),
        "picked": (tree.get("proposal") or {}).get("bits", {}),
        "ranked": ranked_rows(tree),
        "what": what,
        "note": _NOTE,
    }


def write(run_dir: str | Path, tree: Mapping[str, Any]) -> list[Path]:
    """Write ``sensitivity.md`` and ``sensitivity.html`` into the run directory; their paths.

    Raises:
        OSError: it can't be written.
    """
    paths = [Path(run_dir) / f"sensitivity.{ending}" for ending in ("md", "html")]
    write_text(paths[0], markdown(tree))
    write_text(paths[1], page.render("sensitivity.html.j2", run=tree["run"], sensitivity=section(tree)))
    return paths
