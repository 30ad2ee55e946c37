"""A run directory -> one self-contained HTML page, and the same facts in a few lines. Needs ``lowbit[train]``.

Parts that a run does not have yet are named with the command that makes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lowbit import page
from lowbit.files import write_atomic
from lowbit.inspect import Contents, inspect
from lowbit.packfile import FileError
from lowbit.page import BLUE, GRAY, ORANGE
from lowbit.predict import ImageError
from lowbit.train import sensitivity_page
from lowbit.train.rundir import read_json, read_metrics, read_run
from lowbit.train.units import result_line

_BENCH_FORMAT: Final = 2
"""Of bench.json: `lowbit.bench.FORMAT`, which can't be imported without the extra ``bench``."""

PEERS: Final = {
    "ort-fp32": ("ONNX Runtime float32", "onnxruntime"),
    "ort-int8": ("ONNX Runtime int8", "onnxruntime"),
    "openvino-fp32": ("OpenVINO float32", "openvino"),
    "openvino-int8": ("OpenVINO int8", "openvino"),
    "torch": ("PyTorch float32", "torch"),
}
"""Title and package of each peer that ``lowbit bench`` knows."""

Missing = tuple[str, str]
Fact = tuple[str, str]


@dataclass(frozen=True)
class _Run:
    """What a run directory holds; None for what is not there yet."""

    place: Path
    run: dict[str, Any]
    rows: list[dict[str, float | None]]
    recipe: str
    contents: Contents | None
    proof: dict[str, Any] | None
    bench: dict[str, Any] | None
    pictures: tuple[str, dict[str, Any]] | None = None  # of super-resolution: which, and their PSNR and SSIM
    missing: list[Missing] = field(default_factory=list)

    @staticmethod
    def read(run_dir: str | os.PathLike[str]) -> _Run:
        place = Path(run_dir)
        run = read_run(place)
        missing: list[Missing] = []
        if run["status"] != "finished":
            done = f"{run['status']} after {run['epochs_done']} of {run['epochs']} epochs"
            missing.append((f"the end of the training ({done})", f"lowbit train {place} --resume"))
        model = place / "model.lowbit"
        contents = inspect(model) if model.is_file() else None
        proof = _read_json(place / "proof.json")
        if contents is None or proof is None:
            missing.append(("the exported file and its proof", f"lowbit export {place}"))
        bench = _read_json(place / "bench.json")
        if bench is not None and bench.get("format") != _BENCH_FORMAT:  # an older lowbit's
            bench = None
        if bench is None:
            missing.append(("the speed", f"lowbit bench {model} --json {place / 'bench.json'}"))
        recipe = place / "recipe.yaml"
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else ""
        pictures = None
        if run["metric"] == "psnr":
            pictures = _measured_pictures(place, run)
            if contents is not None and (pictures is None or not pictures[0].startswith("Test")):
                missing.append(("PSNR and SSIM of test pictures", f"lowbit evaluate {model} --split test"))
        return _Run(place, run, read_metrics(place), text, contents, proof, bench, pictures, missing)

    @property
    def confusion(self) -> tuple[list[list[int]], str] | None:
        """The confusion matrix, and what it is of."""
        if self.proof and self.proof.get("confusion"):
            return self.proof["confusion"], f"{self.proof['decisions']:,} images, answered by the engine"
        results = self.run["results"] or {}
        for part, name in (("test", "test"), ("validation", "held-out")):
            found = results.get(part)
            if found and found.get("confusion"):
                return found["confusion"], f"{found['images']:,} {name} images, answered by the training graph"
        return None


def _measured_pictures(place: Path, run: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The last evaluation on test pictures, on the engine where there is one, else what training ended with; and which it is."""
    for name in ("evaluation-test-engine.json", "evaluation-test.json"):
        found = _read_json(place / name)
        if found is not None:
            return f"Test pictures, computed by {found['computed_by']}", found
    results = run["results"] or {}
    for part, title in (("test", "Test"), ("validation", "Held-out")):
        if results.get(part):
            return f"{title} pictures, computed by the training graph", results[part]
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path, "delete it and make it again")


# --------------------------------------------------------------------------------------------- facts


def summary(run_dir: str | os.PathLike[str]) -> list[Fact]:
    """The final facts of a run, (name, value), in the order in which they matter.

    Raises:
        RunError: not a run directory. FileError: a damaged file.
    """
    found = _Run.read(run_dir)
    facts = _facts(found)
    page = found.place / "report.html"
    if page.is_file():
        facts.append(("report", str(page)))
    return facts + [(f"missing: {what}", command) for what, command in found.missing]


def _facts(found: _Run) -> list[Fact]:
    return [*_accuracy_facts(found), *_proof_facts(found), *_size_facts(found), *_speed_facts(found)]


def _accuracy_facts(found: _Run) -> list[Fact]:
    proof, results = found.proof, found.run["results"] or {}
    metric = found.run["metric"]
    if proof and proof.get("pictures"):
        count = f"{len(proof['pictures'])} pictures"
        facts = [
            (f"PSNR, {title}", f"{fmean(p[f'psnr_{key}'] for p in proof['pictures']):.3f} dB, {count}")
            for key, title in (("training", "training graph"), ("engine", "engine"), ("bicubic", "bicubic"))
        ]
        return [*facts, ("training graph and engine apart, at most", f"{proof['psnr_apart']:.4f} dB")]
    if proof and proof["accuracy_engine"] is not None:
        images = f"{proof['decisions']:,} images"
        return [
            ("accuracy, training graph", f"{proof['accuracy_training']:.2%} of {images}"),
            ("accuracy, engine", f"{proof['accuracy_engine']:.2%} of {images}"),
        ]
    return [
        (f"{metric if metric == 'accuracy' else metric.upper()}, {part}", result_line(results[part], metric))
        for part in ("validation", "test")
        if results.get(part)
    ]


def _proof_facts(found: _Run) -> list[Fact]:
    proof = found.proof
    if proof is None:
        return []
    facts = [
        (
            "integers that differ, interpreter and engine",
            f"{proof['integers_differ']:,} of {proof['integers']:,}, on {proof['inputs']:,} "
            f"{'crops' if proof.get('pictures') else 'images'}",
        ),
        (
            "root flips against the training graph",
            f"{proof['root_flips']:,} of {proof['root_activations']:,} activations",
        ),
    ]
    if not proof.get("pictures"):
        facts.append(("decisions that changed", f"{proof['decisions_changed']:,} of {proof['decisions']:,}"))
    return facts + [("the proof fails", failure) for failure in proof["failures"]]


def _size_facts(found: _Run) -> list[Fact]:
    if found.contents is None or found.proof is None:
        return []
    size, whole = found.contents.file_bytes, found.proof["float_bytes"]
    facts = [("file", f"{size:,} bytes, {whole / size:.1f}x smaller than the float32 parameters ({whole:,} bytes)")]
    ratio = found.contents.low_bit_ratio
    if ratio is not None:
        facts.append(("low-bit layers with their scales", f"{ratio:.1f}x smaller than in float32"))
    return facts


def _an_input(found: _Run) -> str:
    """What one time is the time of: pictures of super-resolution have any size."""
    size: Sequence[int] = (found.bench or {}).get("input", ()) if found.run["metric"] == "psnr" else ()
    return f"luma of {size[1]} x {size[0]} pixels" if len(size) == 3 else "an image"


def _speed_facts(found: _Run) -> list[Fact]:
    if found.bench is None:
        return []
    whole, batch, threads = found.bench["whole"], found.bench["batch"], found.bench["threads"]
    on = f"{threads} thread{'s'[: threads > 1]}, {found.bench['isa']}"
    facts = [(f"time for {_an_input(found)}", f"{1e3 * whole['ours']['median'] / batch:.3f} ms on {on}")]
    for name, peer in whole["peers"].items():
        theirs = 1e3 * peer["theirs"]["median"] / batch
        doubt = "" if whole["trusted"] and not peer["noisy"] else " (a noisy measurement)"
        facts.append(
            (f"the same in {PEERS[name][0]}", f"{theirs:.3f} ms: lowbit is {peer['ratio']:.1f}x faster{doubt}")
        )
    start = found.bench["startup"]
    facts.append(("time to load the file", f"{1e3 * start['load_seconds']:.1f} ms"))
    return facts


# --------------------------------------------------------------------------------------------- plots


def _column(rows: Sequence[dict[str, float | None]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
    return [x or 0.0 for x, _ in points], [y or 0.0 for _, y in points]


def _line(axes: Axes, rows: Sequence[dict[str, float | None]], key: str, color: str, label: str | None = None) -> bool:
    x, y = _column(rows, key)
    if x:
        marker = {"marker": "o", "markersize": 3.5} if len(x) <= 40 else {}
        axes.plot(x, y, color=color, label=label, **marker)  # type: ignore[arg-type]
    return bool(x)


def _axes(y_label: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.6, 3.1 if panels == 1 else 3.6), layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_ylabel(y_label)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _plots(found: _Run) -> list[dict[str, str]]:
    rows, metric = found.rows, found.run["metric"]
    if not rows:
        return []
    plots = []

    def keep(figure: Figure, title: str, note: str) -> None:
        plots.append({"title": title, "svg": page.svg(figure, title), "note": note})

    with page.style():
        pictures = metric == "psnr"
        loss = "error of luma" if pictures else "cross-entropy (nats)"
        score, title = ("PSNR (dB)", "PSNR") if pictures else (f"{metric} (%)", metric.capitalize())
        for key, label, heading in (("loss", loss, "Loss"), (metric, score, title)):
            figure, (axes,) = _axes(label)
            _line(axes, rows, f"train_{key}", BLUE, "training, soft weights")
            _line(axes, rows, f"val_{key}", ORANGE, "held out, hard weights")
            if key != "loss" and not pictures:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
            measured = (found.run["results"] or {}).get("validation")
            if key != "loss" and pictures and measured:
                axes.axhline(measured["psnr_bicubic"], color=GRAY, linestyle="--", label="held out, bicubic")
            axes.legend()
            held_out = any(row.get(f"val_{key}") is not None for row in rows)
            note = (
                "Training: patches, the hardest of each draw. Held out: the centre of each picture." if pictures else ""
            )
            keep(figure, heading, note if held_out else "Nothing was held out: the run trained on all images.")
        if any(row.get("temperature") is not None for row in rows):
            figure, (upper, lower) = _axes("gap", panels=2)
            for axes, key, color in ((upper, "gap", BLUE), (lower, "temperature", ORANGE)):
                if _line(axes, [row for row in rows if (row.get(key) or 0) > 0], key, color):
                    axes.set_yscale("log")
            lower.set_ylabel("temperature T")
            note = (
                "Gap: mean distance between the soft weights that are trained and the hard ones that are kept; "
                "it should end below 0.01. T is SLB's inverse temperature."
            )
            keep(figure, "SLB gap and temperature", note)
        if any(row.get("flips_start") is not None for row in rows):
            figure, (axes,) = _axes("weights (%)")
            _line(axes, rows, "flips_start", BLUE, "since the start")
            _line(axes, rows, "flips_epoch", ORANGE, "in this epoch")
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
            axes.set_ylim(bottom=0)
            axes.legend()
            keep(figure, "Flipped weights", "Share of the low-bit weights whose code changed.")
        if any(row.get("aux_loss") is not None for row in rows):
            figure, (upper, lower) = _axes("noisy loss", panels=2)
            _line(upper, rows, "aux_loss", BLUE)
            _line(lower, rows, "noisy_gradient_ratio", ORANGE)
            lower.set_ylabel("gradient ratio")
            note = (
                "LNS: the method's own part of the loss, and the norm of its gradient over that of the task's, with respect to "
                "the latent weights."
            )
            keep(figure, "Noisy supervision", note)
    return plots


def _peak_plot(bench: dict[str, Any] | None) -> str | None:
    """The layers' speeds as bars, beside what this core does at most; None where no layer or no peak was measured."""
    rows = [row for row in (bench or {}).get("layers", ()) if row["macs"] and row["seconds"]]
    if bench is None or not rows or bench["peak"] is None:
        return None
    peak = bench["peak"]["largest"]
    kinds = {
        "bit_conv": ("1-bit kernels", BLUE),
        "byte_gemm": ("integer kernels", ORANGE),
        "int_gemm": ("integer kernels", ORANGE),
    }
    per_core = bench["batch"] / bench["threads"] / 1e9
    title = "Layers against this core's peak"
    with page.style():
        figure = Figure(figsize=(8.4, 1.3 + 0.24 * len(rows)), layout="constrained")
        axes = figure.subplots()
        seen = set()
        for i, row in enumerate(rows):
            label, color = kinds.get(row["kernel"].partition("+")[0], ("float and other kernels", GRAY))
            speed = row["macs"] / row["seconds"] * per_core
            axes.barh(i, speed, height=0.7, color=color, label=None if label in seen else label)
            seen.add(label)
        for key, name, color in (("bits", "1-bit", BLUE), ("integers", "integer", ORANGE)):
            axes.axvline(
                peak[key] / 1e9, color=color, linestyle="--", label=f"{name} peak, {peak[key] / 1e9:,.0f} GMAC/s"
            )
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xscale("log")
        axes.set_xlim(left=1)
        axes.set_xlabel("GMAC/s of a core, logarithmic")
        figure.legend(loc="outside upper center", ncols=3)
        return page.svg(figure, title)


# --------------------------------------------------------------------------------------------- the page


def write_report(
    run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> tuple[Path, list[Missing]]:
    """Write a run as one HTML page.

    Args:
        run_dir: a run directory, finished or not.
        output: the page; by default ``report.html`` in the run directory.

    Returns:
        The page's path, and what the run lacks with the command that makes it.

    Raises:
        RunError: not a run directory. FileError: a damaged model.lowbit, or the page can't be written.
    """
    found = _Run.read(run_dir)
    path = Path(output) if output is not None else found.place / "report.html"
    text = _render(found)
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise FileError(f"{path}: can't be written: {error.strerror or error}") from None
    return path, found.missing


def _render(found: _Run) -> str:
    run = found.run
    confusion = found.confusion
    measured = sensitivity_page.read(found.place)
    description = re.search(r"^description: *(.*(?:\n +.*)*)$", found.recipe, flags=re.MULTILINE)
    crops = _crops(found)
    return page.render(
        "report.html.j2",
        crops=crops,
        papers=_papers(found),
        ours="float" if found.contents is None or found.contents.low_bit_ratio is None else "low-bit",
        run=run,
        description=" ".join(description[1].strip("'\"").split()) if description else "",
        headline=_headline(found),
        facts=_facts(found),
        missing=found.missing,
        plots=_plots(found),
        confusion=None if confusion is None else _confusion_rows(*confusion, run["input"]["classes"]),
        pictures=_picture_rows(found),
        contents=found.contents,
        float_bytes=found.proof["float_bytes"] if found.proof else None,
        bench=found.bench,
        peers=PEERS,
        an_input=_an_input(found),
        peak_plot=_peak_plot(found.bench),
        recipe=found.recipe,
        sensitivity=None if measured is None else sensitivity_page.section(measured),
    )


def _headline(found: _Run) -> list[tuple[str, str, str]]:
    """A few large numbers: (number, what it is, a second line)."""
    cards = []
    proof, results = found.proof, found.run["results"] or {}
    if found.run["metric"] == "psnr":
        cards += _psnr_cards(found)
    elif proof and proof["accuracy_engine"] is not None:
        second = f"{proof['accuracy_training']:.2%} in the training graph"
        cards.append((f"{proof['accuracy_engine']:.2%}", "accuracy on the engine", second))
    elif results.get("validation"):
        measured = results["validation"]
        cards.append((f"{measured[found.run['metric']]:.2%}", "accuracy, training graph", "on the held-out images"))
    if proof:
        compared = f"of {proof['integers'] / 1e6:,.0f} million, interpreter and engine"
        cards.append((f"{proof['integers_differ']:,}", "integers that differ", compared))
    if found.contents is not None and proof:
        size = found.contents.file_bytes
        cards.append((f"{size / 1000:,.1f} kB", "file", f"{proof['float_bytes'] / size:.1f}x smaller than float32"))
    if found.bench is not None:
        whole, batch = found.bench["whole"], found.bench["batch"]
        name, peer = next(iter(whole["peers"].items()), ("", None))
        faster = f"{peer['ratio']:.1f}x faster than {PEERS[name][0]}" if peer else ""
        if peer and (peer["noisy"] or not whole["trusted"]):
            faster += ", a noisy measurement"
        cards.append((f"{1e3 * whole['ours']['median'] / batch:.3f} ms", f"for {_an_input(found)}", faster))
    return cards


def _psnr_cards(found: _Run) -> list[tuple[str, str, str]]:
    proof, results = found.proof, found.run["results"] or {}
    if proof and proof.get("pictures"):
        ours, bicubic = (fmean(p[f"psnr_{key}"] for p in proof["pictures"]) for key in ("engine", "bicubic"))
        second = f"{ours - bicubic:+.2f} dB over bicubic, {len(proof['pictures'])} pictures"
        return [(f"{ours:.2f} dB", "PSNR on the engine", second)]
    if results.get("validation"):
        measured = results["validation"]
        second = f"{measured['gain']:+.2f} dB over bicubic, on the held-out pictures"
        return [(f"{measured['psnr']:.2f} dB", "PSNR, training graph", second)]
    return []


def _picture_rows(found: _Run) -> tuple[str, list[dict[str, Any]]] | None:
    """What the pictures of the last evaluation are, and a row for each, their mean last."""
    if found.pictures is None:
        return None
    title, measured = found.pictures
    mean = {"name": f"mean of {measured['images']}", "width": 0, "height": 0, **measured}
    return title, [*measured["pictures"], mean]


def _papers(found: _Run) -> list[dict[str, Any]]:
    """The evaluations on standard sets, which papers report on; on the engine where there are both."""
    kept: dict[str, dict[str, Any]] = {}
    for path in sorted(found.place.glob("evaluation-*.json")):  # NAME-engine.json before NAME.json
        tree = _read_json(path)
        if tree is not None and "published" in tree:
            kept.setdefault(tree["published"]["set"], tree)
    return list(kept.values())


def _crops(found: _Run) -> list[tuple[str, list[str], tuple[int, int]]]:
    """Crops of the test pictures, or the held-out ones: bicubic, the file's, the original. None where the pictures are not here."""
    if found.run["metric"] != "psnr" or found.contents is None:
        return []
    from lowbit import sidebyside
    from lowbit.train.data import DataError
    from lowbit.train.data.superres import Pictures
    from lowbit.train.recipe import load_recipe
    from lowbit.train.trainer import load_data
    from lowbit.upscale import Upscaler

    try:
        data = load_data(load_recipe(found.place / "recipe.yaml"))
        if not isinstance(data, Pictures):
            return []
        shown = sidebyside.beside_originals(
            data.test or data.val, Upscaler(found.place / "model.lowbit"), 1 if data.test else data.shrink
        )
    except (DataError, ImageError) as error:
        found.missing.append((f"crops of pictures ({error})", "lowbit report, where the recipe's pictures are"))
        return []
    return shown


def _confusion_rows(table: list[list[int]], what: str, classes: list[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for name, counts in zip(classes, table, strict=True):
        total = max(sum(counts), 1)
        cells = [(count, round(count / total, 3)) for count in counts]
        rows.append({"name": name, "cells": cells, "recall": counts[len(rows)] / total})
    return {"what": what, "classes": classes, "rows": rows}
