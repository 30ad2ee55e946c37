"""The front of a table: score against time and against bytes, and which points another one beats.

``results/TABLE/front.json`` holds what was measured, so that pages are drawn without measuring again (``measure_front`` makes it,
which needs ``lowbit[bench]``; nothing here does)::

    format, table, metric, split, date, code, machine, versions, isa, threads, repeats, input (shape), trusted, warnings,
    left_out (a sentence for each point that could not be measured), points

A point: ``cell, runtime`` ("lowbit", "ort-fp32", "ort-int8"), ``seed`` (whose network was timed), ``hash`` (of that seed's result,
which makes the point old where the table's recipe has changed), ``seconds`` (``median, p10, p90, samples`` of one call of one
input), ``bytes`` (on disk), ``note`` and ``values``: seed -> score of that very runtime; null for our engine, whose integers the
proof holds to the training graph, so that its score is the table's. ``proof`` has that proof in numbers.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from pydantic import BaseModel, ConfigDict, ValidationError

import lowbit.page as page
from lowbit.files import write_atomic
from lowbit.train.labels import Label, Line, place
from lowbit.train.recipe import explain_validation
from lowbit.train.rundir import RunError, read_json
from lowbit.train.statistics import summary
from lowbit.train.units import unit

__all__ = ["FORMAT", "RUNTIMES", "beaten_by", "figure", "front_rows", "png", "read_front", "resolve", "svgs"]

FORMAT: Final = 1
RUNTIMES: Final = {"lowbit": "lowbit", "ort-fp32": "ONNX Runtime fp32", "ort-int8": "ONNX Runtime int8"}
_SHORT: Final = {"lowbit": "", "ort-fp32": " (ORT fp32)", "ort-int8": " (ORT int8)"}
_COLORS: Final = {"lowbit": page.BLUE, "ort-fp32": page.ORANGE, "ort-int8": "#8a63d2"}
_MARKERS: Final = {"lowbit": "o", "ort-fp32": "s", "ort-int8": "D"}
COSTS: Final = {"seconds": ("time", "ms"), "bytes": ("size", "kB")}
"""What a point costs: name for people, and unit."""
SAME: Final = 0.02
"""Times and sizes that differ by no more than this share count as equal: the clock is no better, and a file holds names."""
_SCALE: Final = {"seconds": 1e3, "bytes": 1e-3}


def beaten_by(scores: Sequence[float], costs: Sequence[float], same: float = 0.0) -> list[int | None]:
    """For each point the one that beats it; None for those on the front.

    i beats j where it is no worse in both, and better in one: ``scores[i] >= scores[j]`` and ``costs[i] <= costs[j]``, not both equal.
    Points that are equal in both stand on the front together. Of several the one with the highest score is named, then the
    cheapest, then the first; it stands on the front itself.

    Args:
        scores: larger is better.
        costs: smaller is better.
        same: costs that differ by no more than this share count as equal: what noise decides is no advantage.
    """

    def beats(i: int, j: int) -> bool:
        no_worse = scores[i] >= scores[j] and costs[i] <= costs[j] * (1 + same)
        return no_worse and (scores[i] > scores[j] or costs[i] * (1 + same) < costs[j])

    count = range(len(scores))
    better = [[i for i in count if beats(i, j)] for j in count]
    best = [min(them, key=lambda i: (-scores[i], costs[i], i)) if them else None for them in better]

    def on_front(i: int) -> int:
        # each step has a higher score, or the same and a lower cost: it ends
        while (above := best[i]) is not None:
            i = above
        return i

    return [None if i is None else on_front(i) for i in best]


class _Part(BaseModel):
    """A part of front.json as it is read; what a later version adds is no fault."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Seconds(_Part):
    median: float
    p10: float
    p90: float


class _Proof(_Part):
    integers: int
    integers_differ: int


class _Point(_Part):
    cell: str
    runtime: Literal["lowbit", "ort-fp32", "ort-int8"]
    seed: int
    hash: str
    seconds: _Seconds
    bytes: int
    note: str
    values: dict[str, float] | None
    proof: _Proof | None


class _Machine(_Part):
    processor: str


class _Front(_Part):
    metric: str
    split: str
    date: str
    code: dict[str, Any]
    machine: _Machine
    versions: dict[str, Any]
    isa: str
    threads: int
    repeats: int
    input: list[int]
    trusted: bool
    warnings: list[str]
    left_out: list[str]
    points: list[_Point]


def read_front(path: Path) -> dict[str, Any] | None:
    """A table's front.json; None where there is none.

    Raises:
        RunError: it is damaged.
    """
    again = "delete it and measure again (lowbit compare --front)"
    tree = read_json(path, again, FORMAT)
    if tree is not None:
        try:
            _Front.model_validate(tree)
        except ValidationError as error:
            raise RunError(f"{path}: is damaged ({explain_validation(error, _Front)}); {again}") from None
    return tree


def resolve(
    measured: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], hashes: Mapping[tuple[str, int], str], split: str
) -> dict[str, Any]:
    """What was measured beside what the table has now.

    Args:
        measured: what ``read_front`` gave.
        rows: the table's cells as ``aggregate`` has them: ``label, mean, sd, n``.
        hashes: (label, seed) -> hash of the results that count now.
        split: what the table's scores are of.

    Returns:
        ``points`` with ``name, cell, runtime, mean, sd, n, seconds, bytes, note, proof`` and for each cost ``time_beaten_by`` and
        ``size_beaten_by``, the name of a point or None; ``stale`` and ``unmeasured``, labels of cells; and ``date, code, machine,
        versions, isa, threads, repeats, input, trusted, warnings, left_out`` of the measurement.
    """
    by_label = {row["label"]: row for row in rows}
    points, stale = [], []
    left_out = list(measured["left_out"])
    for point in measured["points"]:
        row = by_label.get(point["cell"])
        if row is None or hashes.get((point["cell"], point["seed"])) != point["hash"]:
            if point["cell"] not in stale:
                stale.append(point["cell"])
            continue
        name = point["cell"] + _SHORT[point["runtime"]]
        if point["values"] is None:
            mean, sd, n = row["mean"], row["sd"], row["n"]
        elif measured["split"] != split:
            left_out.append(
                f"{name}: its score is of the {measured['split']} images, the table's of the {split} images"
            )
            continue
        else:
            found = summary(list(point["values"].values()))
            mean, sd, n = found.mean, found.sd, found.n
        if mean is None:
            continue
        kept = {key: point[key] for key in ("cell", "runtime", "seed", "seconds", "bytes", "note", "proof")}
        points.append({"name": name, **kept, "mean": mean, "sd": sd, "n": n})
    scores = [point["mean"] for point in points]
    for key, (title, _) in COSTS.items():
        for point, other in zip(points, beaten_by(scores, [_cost(p, key) for p in points], SAME), strict=True):
            point[f"{title}_beaten_by"] = None if other is None else points[other]["name"]
    there = {point["cell"] for point in points} | set(stale)
    told = ("date", "code", "machine", "versions", "isa", "threads", "repeats", "input", "trusted", "warnings")
    return {
        "points": points,
        "split": split,
        "stale": stale,
        "unmeasured": [row["label"] for row in rows if row["mean"] is not None and row["label"] not in there],
        **{key: measured[key] for key in told},
        "left_out": left_out,
    }


def _cost(point: Mapping[str, Any], key: str) -> float:
    return float(point[key]["median"] if key == "seconds" else point[key])


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}" if value > 0 else "0"


def _score(point: Mapping[str, Any], metric: str) -> str:
    _, factor, digits = unit(metric)
    text = f"{factor * point['mean']:.{digits}f}"
    return text if point["sd"] is None else f"{text} +- {factor * point['sd']:.{digits}f}"


def _heading(found: Mapping[str, Any], metric: str) -> str:
    name = unit(metric)[0]
    words = f"{found['split']} {'PSNR' if metric == 'psnr' else metric}"
    return f"{words} ({name})" if name else words


def what(shape: Sequence[int]) -> str:
    """One input in words: a call's time is of this."""
    return f"{shape[0]}x{shape[1]}" if len(shape) == 3 else "x".join(map(str, shape))


def front_rows(found: Mapping[str, Any], metric: str) -> list[list[str]]:
    """The points as rows of text, fastest first, the headings in front; "front" or what beats a point in each of the last two."""
    rows = [["point", _heading(found, metric), "seeds", "ms", "p10 .. p90", "kB", "against time", "against size"]]
    for point in sorted(found["points"], key=lambda p: (_cost(p, "seconds"), -p["mean"])):
        s = point["seconds"]
        beaten = [point[f"{title}_beaten_by"] for title, _ in COSTS.values()]
        rows.append(
            [
                point["name"],
                _score(point, metric),
                str(point["n"]),
                digits(1e3 * s["median"]),
                f"{digits(1e3 * s['p10'])} .. {digits(1e3 * s['p90'])}",
                digits(point["bytes"] / 1e3),
                *("front" if other is None else f"by {other}" for other in beaten),
            ]
        )
    return rows


def footnote(found: Mapping[str, Any]) -> str:
    """What was measured, where and when, in a few sentences."""
    on = f"{found['machine']['processor']}, {found['isa']}, {found['threads']} thread{'s'[: found['threads'] > 1]}"
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("lowbit", "onnxruntime", "numpy"))
    said = (
        f"Times are medians of one call for one input ({what(found['input'])}), {found['repeats']} samples of each network in "
        f"turn in one run, pinned ({on}; {versions}; {found['date'][:10]}). A point is beaten (by which, is said) where another one "
        f"is no worse in both and better in one; times and sizes within {SAME:.0%} count as equal, and scores are means, whose deviations "
        "over seeds are given. kB (1,000 bytes) are of the file: .lowbit, or .onnx."
    )
    parts = [said]
    proofs = [point["proof"] for point in found["points"] if point["proof"]]
    if proofs:
        differ, compared = (sum(proof[key] for proof in proofs) for key in ("integers_differ", "integers"))
        parts.append(
            f"{len(proofs)} files proved: {differ:,} of {compared:,} integers differ between interpreter and engine."
        )
    doubts = [*([] if found["trusted"] else ["The machine was not quiet: times are to be doubted."])]
    if found["stale"]:
        doubts.append(
            f"Measured with another recipe than the table has now, and left out: {', '.join(found['stale'])}."
        )
    if found["unmeasured"]:
        doubts.append(f"Not measured: {', '.join(found['unmeasured'])}; lowbit compare --front measures all.")
    return " ".join([*parts, *doubts, *(f"Left out: {text}." for text in found["left_out"])])


# ------------------------------------------------------------------------------------------------ pictures


def _panel(axes: Axes, found: Mapping[str, Any], metric: str, key: str, ids: bool) -> tuple[list[Label], list[Line]]:
    """Everything of a panel but the labels, which look for room when all that takes some is there; and the lines."""
    points = found["points"]
    title, unit_name = COSTS[key]
    _, factor, _ = unit(metric)
    costs = [_SCALE[key] * _cost(p, key) for p in points]
    scores = [factor * p["mean"] for p in points]
    best = [p[f"{title}_beaten_by"] is None for p in points]
    for i, point in enumerate(points):
        color = _COLORS[point["runtime"]]
        spread: dict[str, Any] = {}
        if key == "seconds":
            s = point["seconds"]
            spread["xerr"] = [[1e3 * (s["median"] - s["p10"])], [1e3 * (s["p90"] - s["median"])]]
        drawn = axes.errorbar(
            costs[i],
            scores[i],
            yerr=factor * point["sd"] if point["sd"] else None,
            fmt=_MARKERS[point["runtime"]],
            color=color,
            markersize=7 if best[i] else 5.5,
            markerfacecolor=color if best[i] else "none",
            alpha=1.0 if best[i] else 0.65,
            elinewidth=0.9,
            capsize=2,
            zorder=3,
            **spread,
        )
        if ids:
            drawn.lines[0].set_gid(f"point-{i}")
    stairs = sorted((costs[i], scores[i]) for i in range(len(points)) if best[i])
    axes.step(
        [x for x, _ in stairs],
        [y for _, y in stairs],
        where="post",
        color=page.BLUE,
        alpha=0.35,
        linewidth=1.4,
        zorder=2,
    )
    log_axis(axes, costs)
    spreads = [factor * (p["sd"] or 0.0) for p in points]
    bottom = min(y - s for y, s in zip(scores, spreads, strict=True))
    top = max(y + s for y, s in zip(scores, spreads, strict=True))
    room = 0.12 * (top - bottom) or 0.5
    axes.set_ylim(bottom - room, top + room)
    words = (
        f"ms for one input of {what(found['input'])}, logarithmic"
        if key == "seconds"
        else f"{unit_name} on disk, logarithmic"
    )
    axes.set_xlabel(words)
    axes.set_ylabel(_heading(found, metric))
    order = sorted(range(len(points)), key=lambda i: (not best[i], costs[i]))
    labels = [
        Label(
            points[i]["cell"].replace("$", r"\$"),
            costs[i],
            scores[i],
            {"fontsize": 9 if best[i] else 8, "alpha": 1.0 if best[i] else 0.7},
        )
        for i in order
    ]
    bars: list[Line] = [((x, y - d), (x, y + d)) for x, y, d in zip(costs, scores, spreads, strict=True) if d]
    if key == "seconds":
        bars += [
            ((1e3 * p["seconds"]["p10"], y), (1e3 * p["seconds"]["p90"], y))
            for p, y in zip(points, scores, strict=True)
        ]
    for (x0, y0), (x1, y1) in itertools.pairwise(stairs):
        bars += [((x0, y0), (x1, y0)), ((x1, y0), (x1, y1))]
    return labels, bars


def log_axis(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis of costs, with plain numbers and room for labels."""
    axes.set_xscale("log")
    around = max((max(costs) / min(costs)) ** 0.12, 1.25)
    axes.set_xlim(min(costs) / around, max(costs) * around**1.6)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=30))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(target: Figure, found: Mapping[str, Any]) -> None:
    for runtime in dict.fromkeys(p["runtime"] for p in found["points"]):
        target.axes[0].plot(
            [],
            [],
            _MARKERS[runtime],
            color=_COLORS[runtime],
            label=RUNTIMES[runtime].replace("lowbit", "lowbit's engine"),
        )
    target.axes[0].plot([], [], color=page.BLUE, alpha=0.35, label="front")
    target.legend(loc="outside upper center", ncols=5, fontsize=9)


def figure(found: Mapping[str, Any], metric: str, keys: Sequence[str] = tuple(COSTS), ids: bool = False) -> Figure:
    """Score against each cost, side by side; filled markers stand on the front.

    Made within ``page.style()``. ``ids``: markers have the ids ``point-0`` ... , for ``page.svg``'s titles.
    """
    drawn = Figure(figsize=(8.4 * len(keys), 6.0), layout="constrained")
    panels = drawn.subplots(1, len(keys), squeeze=False)[0]
    _legend(drawn, found)
    labels = [_panel(axes, found, metric, key, ids) for axes, key in zip(panels, keys, strict=True)]
    for axes, own in zip(panels, labels, strict=True):
        place(axes, *own)
    return drawn


def png(found: Mapping[str, Any], metric: str, path: Path) -> None:
    """The static picture, on white.

    Raises:
        OSError: it can't be written.
    """
    with page.style():
        write_atomic(path, png_bytes(figure(found, metric)))


def png_bytes(drawn: Figure) -> bytes:
    """A figure as PNG, on white; made within ``page.style()``."""
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def svgs(found: Mapping[str, Any], metric: str) -> list[dict[str, str]]:
    """``title, svg`` for the page: points tell their numbers when the pointer rests on them."""
    rows = {point["name"]: point for point in found["points"]}
    titles = {f"point-{i}": hover(point, metric) for i, point in enumerate(rows.values())}
    made = []
    with page.style():
        for key, (title, _) in COSTS.items():
            name = f"{metric.upper() if metric == 'psnr' else metric.capitalize()} against {title}"
            made.append({"title": name, "svg": page.svg(figure(found, metric, [key], ids=True), name, titles)})
    return made


def hover(point: Mapping[str, Any], metric: str) -> str:
    """A point in a few lines."""
    lines = [
        f"{point['cell']}, {RUNTIMES[point['runtime']]}",
        f"{_score(point, metric)} {unit(metric)[0]}, {point['n']} seed{'s'[: point['n'] != 1]}".replace("+-", "±"),
        f"{digits(1e3 * point['seconds']['median'])} ms, {digits(point['bytes'] / 1e3)} kB",
    ]
    for title, _ in COSTS.values():
        other = point[f"{title}_beaten_by"]
        lines.append(f"against {title}: {'on the front' if other is None else f'beaten by {other}'}")
    return "\n".join(lines)
