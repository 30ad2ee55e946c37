"""A table's results as one: means over seeds, paired differences, published numbers; JSON, Markdown, one HTML page."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import lowbit.page as page
from lowbit.train.cells import Places, check_one_data_set, read_results, show, unit
from lowbit.train.front import footnote, front_rows, png, read_front, resolve, svgs
from lowbit.train.recipe import Recipe, flatten
from lowbit.train.rundir import RunError, sessions, write_json, write_text
from lowbit.train.statistics import paired, summary
from lowbit.train.table import Cell, Table

__all__ = ["aggregate", "command", "difference_rows", "markdown", "render", "table_rows", "write"]

FORMAT: Final = 1
COLORS: Final = ("#3b7dd8", "#e07b39", "#2f9e73", "#c0507f", "#8a63d2", "#a58a1d", "#2aa1b3", "#7a8490")
"""Of curves: middle tones, which read on light and dark grounds."""


def aggregate(table: Table, places: Places, seeds: int | None = None) -> dict[str, Any]:
    """What there is of a table.

    Only results made with the table's present recipes count. Where every one of them has a test result, that is shown,
    else the result on the held-out images.

    Returns:
        ``format, table, title, description, path, set, seeds`` (as asked for), ``metric, unit, split, cells, comparisons, published,
        machines, versions, code, dates, seconds, front`` (what ``front.resolve`` gives; None where none was measured). Values are in
        the metric's own unit (accuracy: 0 to 1), published ones in the
        paper's (percent). A cell: ``label, n, missing`` (seeds), ``values`` (seed -> value), ``mean, sd, published, runs, top5,
        published_top5, epochs, parameters, warnings, curves`` and the means of ``seconds, gap, flips_start, images_per_second``. A
        comparison: ``one, other, resolved`` and the fields of ``Difference``.

    Raises:
        RunError: a damaged result, or results of different metrics, or of different data behind the same keys.
    """
    cells = table.cells(seeds)
    results = read_results(cells, places)
    check_one_data_set(results.values(), places)
    metrics = sorted({result["metric"] for result in results.values()})
    if len(metrics) > 1:
        raise RunError(f"{table.path}: the cells were measured in {' and '.join(metrics)}, which can't share a table")
    metric = metrics[0] if metrics else "accuracy"
    split = "test" if all(result["results"]["test"] is not None for result in results.values()) else "validation"
    values: dict[str, dict[int, float]] = {label: {} for label in table.labels}
    for (label, _), result in results.items():
        if result["results"][split] is not None:
            values[label][result["seed"]] = float(result["results"][split][metric])
    rows = [_row(table, label, cells, results, values[label], split) for label in table.labels]
    comparisons = []
    for one, other in table.comparisons:
        difference = paired(values[one], values[other])
        if difference is not None:
            comparisons.append({"one": one, "other": other, **asdict(difference), "resolved": difference.resolved})
    published = table.config.published
    hashes = {(label, result["seed"]): str(result["hash"]) for (label, _), result in results.items()}
    measured_front = read_front(places.front)
    trained = [each for result in results.values() for each in sessions(result)]
    return {
        "format": FORMAT,
        "table": table.name,
        "title": table.config.title or table.name,
        "description": " ".join(table.config.description.split()),
        "path": table.path.as_posix(),
        "set": list(table.overrides),
        "seeds": seeds,
        "metric": metric,
        "unit": unit(metric)[0],
        "split": split,
        "cells": rows,
        "comparisons": comparisons,
        "published": None if published is None else {"source": published.source},
        "machines": _distinct(map(_machine, trained)),
        "versions": _distinct(map(_versions, trained)),
        "code": _distinct(map(_code, trained)),
        "dates": sorted({str(result["date"])[:10] for result in results.values()}),
        "seconds": sum(result["seconds"] for result in results.values()),
        "front": None if measured_front is None else resolve(measured_front, rows, hashes, split),
    }


def _distinct(texts: Any) -> list[str]:
    return list(dict.fromkeys(texts))


def _machine(session: Mapping[str, Any]) -> str:
    machine = session["machine"]
    if machine["gpu"]:
        return str(machine["gpu"])
    return f"{machine['processor']}, {machine['threads']} thread{'s'[: machine['threads'] > 1]} a cell"


def _versions(session: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in session["versions"].items())


def _code(session: Mapping[str, Any]) -> str:
    code = session["code"]
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    return f"lowbit {code['lowbit']}{commit}{' with uncommitted changes' if code['dirty'] else ''}"


def _row(
    table: Table,
    label: str,
    cells: Sequence[Cell],
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    values: Mapping[int, float],
    split: str,
) -> dict[str, Any]:
    own = [results[cell.key] for cell in cells if cell.label == label and cell.key in results]
    missing = [cell.recipe.seed for cell in cells if cell.label == label and cell.recipe.seed not in values]
    found = summary(list(values.values())) if values else None

    def mean(name: str) -> float | None:
        numbers = [r["results"][name] for r in own if r["results"].get(name) is not None]
        return summary(numbers).mean if numbers else None

    recipe = next(cell.recipe for cell in cells if cell.label == label)
    published = table.config.published
    if published is not None and not published.on(recipe.data.name):
        published = None
    top5 = [r["results"][split]["top5"] for r in own if (r["results"][split] or {}).get("top5") is not None]
    return {
        "label": label,
        "n": len(values),
        "missing": missing,
        "values": {str(seed): values[seed] for seed in sorted(values)},
        "mean": found.mean if found else None,
        "sd": found.sd if found else None,
        "published": published.values.get(label) if published else None,
        "runs": published.runs.get(label) if published else None,
        "top5": summary(top5).mean if top5 else None,
        "published_top5": published.top5.get(label) if published else None,
        "epochs": recipe.train.epochs,
        "seconds": summary([r["seconds"] for r in own]).mean if own else None,
        "parameters": own[0]["parameters"] if own else None,
        "gap": mean("gap"),
        "flips_start": mean("flips_start"),
        "images_per_second": mean("images_per_second"),
        "warnings": _distinct(text for r in own for text in r["warnings"]),
        "curves": [r["curve"] for r in own],
    }


# ------------------------------------------------------------------------------------------------ words and numbers


def _mean(row: Mapping[str, Any], metric: str) -> str:
    """mean +- standard deviation, in the unit, without its name."""
    if row["mean"] is None:
        return ""
    _, factor, digits = unit(metric)
    text = f"{factor * row['mean']:.{digits}f}"
    return text if row["sd"] is None else f"{text} +- {factor * row['sd']:.{digits}f}"


def _signed(value: float, metric: str) -> str:
    _, factor, digits = unit(metric)
    return f"{factor * value:+.{digits}f}"


def _published(tree: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(heading, text for each cell) of the columns with a paper's numbers; none where no cell has one."""
    found = []
    columns = (("published", "published"), ("authors' later runs", "runs"), ("published top-5", "published_top5"))
    for name, key in columns:
        numbers = [row[key] for row in tree["cells"]]
        if key == "published_top5" and any(number is not None for number in numbers):
            means = [row["top5"] for row in tree["cells"]]
            found.append(("top-5 (%)", ["" if mean is None else f"{100 * mean:.2f}" for mean in means]))
        if any(number is not None for number in numbers):
            digits = max(len(f"{n:g}".partition(".")[2]) for n in numbers if n is not None)
            found.append((name, ["" if n is None else f"{n:.{digits}f}" for n in numbers]))
    return found


def _verdict(difference: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        return "one seed: not resolved"
    return "resolved" if difference["resolved"] else "not resolved"


def _interval(difference: Mapping[str, Any], metric: str) -> str:
    if difference["low"] is None:
        return ""
    return f"{_signed(difference['low'], metric)} to {_signed(difference['high'], metric)}"


def _heading(tree: Mapping[str, Any]) -> str:
    name = f"{tree['split']} {tree['metric']}"
    return f"{name} ({tree['unit']})" if tree["unit"] else name


def command(tree: Mapping[str, Any]) -> str:
    """What makes the table."""
    seeds = "" if tree["seeds"] is None else f" --seeds {tree['seeds']}"
    changes = "".join(f" --set {shlex.quote(text)}" for text in tree["set"])
    return f"lowbit compare {tree['path']}{seeds}{changes}{'' if tree['split'] == 'test' else ' --no-test'}"


def table_rows(tree: Mapping[str, Any]) -> list[list[str]]:
    """The results as rows of text, the headings first."""
    columns = _published(tree)
    rows = [["cell", _heading(tree), "seeds", *(name for name, _ in columns), "epochs", "minutes"]]
    for i, row in enumerate(tree["cells"]):
        minutes = "" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        numbers = [texts[i] for _, texts in columns]
        rows.append([row["label"], _mean(row, tree["metric"]), str(row["n"]), *numbers, str(row["epochs"]), minutes])
    return rows


def difference_rows(tree: Mapping[str, Any]) -> list[list[str]]:
    """The paired differences as rows of text, the headings first; empty where there are none."""
    if not tree["comparisons"]:
        return []
    metric = tree["metric"]
    points = {"%": "points", "dB": "dB"}.get(tree["unit"], metric)
    rows = [["difference", f"mean ({points})", "95 % interval", "seeds", ""]]
    for d in tree["comparisons"]:
        mean, interval = _signed(d["mean"], metric), _interval(d, metric)
        rows.append([f"{d['one']} less {d['other']}", mean, interval, str(d["n"]), _verdict(d)])
    return rows


def markdown(tree: Mapping[str, Any]) -> str:
    """The table for documents: means +- sample standard deviations, the differences below."""
    parts = [f"### {tree['title']}"]
    if tree["description"]:
        parts.append(tree["description"])
    parts += [f"```\n{command(tree)}\n```", _markdown_table(table_rows(tree))]
    if _published(tree):
        parts.append(f"Published: {tree['published']['source']}.")
    if tree["comparisons"]:
        parts.append(_markdown_table(difference_rows(tree)))
    parts.append(_footnote(tree))
    front = tree["front"]
    if front is not None and front["points"]:
        rows = front_rows(front, tree["metric"])
        parts += [
            "#### Front",
            f"![{_front_title(tree)}]({tree['table']}-front.png)",
            _markdown_table(rows),
            footnote(front),
        ]
    return "\n\n".join(parts) + "\n"


def _front_title(tree: Mapping[str, Any]) -> str:
    return f"{tree['split']} {tree['metric']} against time and size".capitalize()


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join("| " + " | ".join(field.replace("|", "\\|") for field in line) + " |" for line in lines)


def _footnote(tree: Mapping[str, Any]) -> str:
    said = "Mean +- sample standard deviation over seeds."
    if tree["comparisons"]:
        said += (
            " Differences are paired by seed, with Student's t interval for each alone, not corrected for their number."
        )
    made = "; ".join([*tree["machines"], *tree["versions"], *tree["code"]])
    dates = " to ".join(dict.fromkeys([tree["dates"][0], tree["dates"][-1]])) if tree["dates"] else ""
    return said + (f" {made}. {dates}." if made else "")


# ------------------------------------------------------------------------------------------------ plots


def _rows_figure(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 1.0 + 0.3 * max(count, 2)), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", visible=False)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _plot_cells(tree: Mapping[str, Any]) -> Figure:
    rows = [row for row in tree["cells"] if row["mean"] is not None]
    _, factor, _ = unit(tree["metric"])
    figure, axes = _rows_figure(len(rows))
    for i, row in enumerate(rows):
        values = [factor * v for v in row["values"].values()]
        mean, sd = factor * row["mean"], factor * (row["sd"] or 0.0)
        axes.errorbar(mean, i, xerr=sd or None, fmt="|", color=page.BLUE, markersize=11, markeredgewidth=2, capsize=3)
        axes.plot(values, [i + 0.3] * len(values), "o", color=page.GREEN, markersize=3.5, markeredgewidth=0)
        if row["published"] is not None:
            axes.plot(row["published"], i, "D", color=page.ORANGE, markersize=6, fillstyle="none", markeredgewidth=1.6)
    _name_rows(axes, [row["label"] for row in rows])
    axes.set_xlabel(_heading(tree))
    return figure


def _plot_differences(tree: Mapping[str, Any]) -> Figure:
    _, factor, _ = unit(tree["metric"])
    differences = tree["comparisons"]
    figure, axes = _rows_figure(len(differences))
    axes.axvline(0, color=page.INK, linewidth=0.9, alpha=0.6)
    for i, d in enumerate(differences):
        color = page.BLUE if d["resolved"] else page.GRAY
        if d["low"] is not None:
            axes.plot([factor * d["low"], factor * d["high"]], [i, i], color=color, linewidth=2)
        axes.plot(factor * d["mean"], i, "o", color=color, markersize=6)
    _name_rows(axes, [f"{d['one']} - {d['other']}" for d in differences])
    axes.set_xlabel({"%": "difference (points)", "dB": "difference (dB)"}.get(tree["unit"], "difference"))
    return figure


def _plot_curves(tree: Mapping[str, Any], column: str) -> Figure | None:
    """Mean over the seeds that have the epoch; None where nothing has such a column."""
    rows = [row for row in tree["cells"] if any(column in curve for curve in row["curves"])]
    if not rows:
        return None
    _, factor, _ = unit(tree["metric"])
    figure = Figure(figsize=(5.6, 3.4 + 0.2 * math.ceil(len(rows) / 4)), layout="constrained")
    axes = figure.subplots()
    lowest = []
    for i, row in enumerate(rows):
        points: dict[int, list[float]] = {}
        for curve in row["curves"]:
            for epoch, value in zip(curve.get(f"{column}_epochs", ()), curve.get(column, ()), strict=True):
                points.setdefault(epoch, []).append(factor * value)
        epochs = sorted(points)
        means = [summary(points[epoch]).mean for epoch in epochs]
        lowest += means[len(means) // 4 :]
        style = ("-", "--", ":", "-.")[i // len(COLORS) % 4]
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, means, style, marker=marker, color=COLORS[i % len(COLORS)], linewidth=1.5, label=row["label"])
    axes.set_ylim(bottom=min(lowest) - 0.03 * (max(lowest) - min(lowest)) if max(lowest) > min(lowest) else None)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{tree['metric']} ({tree['unit']})" if tree["unit"] else tree["metric"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _plot_seconds(tree: Mapping[str, Any]) -> Figure:
    rows = [row for row in tree["cells"] if row["seconds"] is not None]
    longest = max(row["seconds"] for row in rows)
    name, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120 else ("seconds", 1)
    figure, axes = _rows_figure(len(rows))
    axes.barh(range(len(rows)), [row["seconds"] / seconds for row in rows], height=0.6, color=page.BLUE, alpha=0.75)
    _name_rows(axes, [row["label"] for row in rows])
    axes.set_xlabel(f"{name} a run")
    return figure


def _plots(tree: Mapping[str, Any]) -> list[dict[str, str]]:
    if not any(row["mean"] is not None for row in tree["cells"]):
        return []
    bars = "Bars: mean and standard deviation; dots: single seeds"
    published = any(row["published"] is not None for row in tree["cells"])
    found: list[tuple[str, Figure | None, str]] = []
    with page.style():
        note = f"{bars}; diamonds: published." if published else f"{bars}."
        found.append((f"{tree['split']} {tree['metric']}".capitalize(), _plot_cells(tree), note))
        if tree["comparisons"]:
            note = "Paired by seed, with 95 % intervals; gray where the interval contains 0 or there is one seed."
            found.append(("Differences", _plot_differences(tree), note))
        for column, title, note in (
            (f"val_{tree['metric']}", "On the held-out images", "Hard weights, calibrated; mean over seeds."),
            (
                f"train_{tree['metric']}",
                "On the training images",
                "As trained, augmentation included; mean over seeds.",
            ),
        ):
            found.append((title, _plot_curves(tree, column), note))
        found.append(
            ("Time", _plot_seconds(tree), "Wall time of a run on one of the machine's slots, mean over seeds.")
        )
        return [
            {"title": title, "svg": page.svg(figure, title), "note": note} for title, figure, note in found if figure
        ]


# ------------------------------------------------------------------------------------------------ files


def _settings(table: Table) -> tuple[list[str], list[tuple[str, list[str]]], Recipe]:
    """Keys in which the cells differ, their values for each label, and the first cell's recipe."""
    recipes = {cell.label: cell.recipe for cell in table.cells(1)}
    flat = {label: {k: v for k, v in flatten(recipe.plain()) if k != "name"} for label, recipe in recipes.items()}
    keys = list(dict.fromkeys(key for each in flat.values() for key in each))
    missing = object()
    keys = [key for key in keys if len({repr(each.get(key, missing)) for each in flat.values()}) > 1]
    rows = [(label, ["" if (v := each.get(k)) is None else str(v) for k in keys]) for label, each in flat.items()]
    return keys, rows, next(iter(recipes.values()))


def render(table: Table, tree: Mapping[str, Any]) -> str:
    """The HTML page of what ``aggregate`` gave; it loads nothing from elsewhere."""
    metric = tree["metric"]
    columns = _published(tree)
    keys, settings, recipe = _settings(table)
    done = sum(row["n"] for row in tree["cells"])
    best = max((row for row in tree["cells"] if row["n"]), key=lambda row: row["mean"], default=None)
    wanted = sum(row["n"] + len(row["missing"]) for row in tree["cells"])
    cards = [(f"{done} of {wanted}", "runs", f"{len(tree['cells'])} cells")]
    if best is not None:
        cards.append((show(best["mean"], metric), f"best {tree['split']} {metric}", f"{best['label']}, mean"))
    if tree["comparisons"]:
        resolved = sum(d["resolved"] for d in tree["comparisons"])
        cards.append((f"{resolved} of {len(tree['comparisons'])}", "differences resolved", "95 % interval without 0"))
    if tree["seconds"]:
        hours = tree["seconds"] / 3600
        cards.append((f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min", "of training", "all runs together"))
    rows = [
        {
            **row,
            "shown": _mean(row, metric),
            "single": [show(v, metric).removesuffix(tree["unit"]).strip() for v in row["values"].values()],
            "numbers": [texts[i] for _, texts in columns],
        }
        for i, row in enumerate(tree["cells"])
    ]
    differences = [
        {**d, "shown": _signed(d["mean"], metric), "interval": _interval(d, metric), "verdict": _verdict(d)}
        for d in tree["comparisons"]
    ]
    return page.render(
        "compare.html.j2",
        tree=tree,
        heading=_heading(tree),
        columns=[name for name, _ in columns],
        rows=rows,
        differences=differences,
        cards=cards,
        plots=_plots(tree),
        front=_front(tree),
        command=command(tree),
        footnote=_footnote(tree),
        keys=keys,
        settings=settings,
        recipe=recipe.to_yaml(),
    )


def _front(tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows of the front; None where there is nothing."""
    front = tree["front"]
    if front is None:
        return None
    rows = front_rows(front, tree["metric"])
    plots = svgs(front, tree["metric"]) if front["points"] else []
    return {"plots": plots, "head": rows[0], "rows": rows[1:], "note": footnote(front), "warnings": front["warnings"]}


def write(table: Table, tree: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``<table>.json``, ``.md`` and ``.html`` into a folder, and ``<table>-front.png`` where a front was measured; their paths.

    Raises:
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table.name}.{ending}" for ending in ("json", "md", "html")]
    write_json(paths[0], {k: v for k, v in tree.items() if k != "cells"} | {"cells": _without_curves(tree["cells"])})
    write_text(paths[1], markdown(tree))
    write_text(paths[2], render(table, tree))
    if tree["front"] is not None and tree["front"]["points"]:
        paths.append(folder / f"{table.name}-front.png")
        png(tree["front"], tree["metric"], paths[-1])
    return paths


def _without_curves(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "curves"} for row in rows]
