"""What a search found: its front as a table and a picture, every trial as JSON, and a table of recipes for ``lowbit compare``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from matplotlib.figure import Figure

import lowbit.page as page
from lowbit.files import write_atomic
from lowbit.train.front import SAME, beaten_by, digits, log_axis, png_bytes
from lowbit.train.labels import Label, Line, place
from lowbit.train.rundir import now, write_json, write_text
from lowbit.train.search import Found, Search
from lowbit.train.space import Params, Space
from lowbit.train.table import load_table
from lowbit.train.units import unit

__all__ = ["front_rows", "table_text", "write"]

FORMAT: Final = 1


def front_rows(search: Search) -> list[list[str]]:
    """The front as rows of text, fastest first, the headings in front."""
    name, factor, digits_shown = unit(search.metric)
    head = f"held-out {search.metric} ({name})" if name else f"held-out {search.metric}"
    rows = [["trial", head, "ms", "kB", "minutes", *search.space.dimensions]]
    for found in search.front:
        score = f"{factor * found.score:.{digits_shown}f}"
        size = f"{found.file_bytes / 1e3:.1f}"
        params = [_shown(value) for value in found.params.values()]
        rows.append([str(found.number), score, digits(1e3 * found.seconds), size, f"{found.trained / 60:.1f}", *params])
    return rows


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(search: Search, table: Path | None = None) -> list[Path]:
    """Write ``trials.json``, ``front.md``, ``front.png`` and ``tables/NAME-front.yaml`` into the search's folder; their paths.

    Args:
        search: any time.
        table: another place for the table of recipes.

    Raises:
        OSError: it can't be written.
    """
    folder, space = search.folder, search.space
    paths = [folder / "trials.json"]
    write_json(paths[0], _trials(search))
    if not search.front:
        return paths
    paths += [folder / "front.md", folder / "front.png", table or folder / "tables" / f"{space.table}.yaml"]
    write_text(paths[1], _markdown(search))
    with page.style():
        write_atomic(paths[2], png_bytes(_figure(search)))
    paths[3].parent.mkdir(parents=True, exist_ok=True)
    write_text(paths[3], table_text(search))
    load_table(paths[3])  # every cell of it can be built
    return paths


def _trials(search: Search) -> dict[str, Any]:
    rows = [
        {
            "trial": t.number,
            "state": t.state.name,
            "params": dict(t.params),
            "score": t.values[0] if t.values else None,
            **{
                key: t.user_attrs.get(key) for key in ("ms", "file_bytes", "trained", "rungs", "why", "same_as", "hash")
            },
        }
        for t in search.trials
    ]
    return {
        "format": FORMAT,
        "space": search.space.name,
        "fingerprint": search.space.fingerprint,
        "metric": search.metric,
        "date": now(),
        "front": [found.number for found in search.front],
        "trials": rows,
    }


def counts(search: Search) -> str:
    """How many trials ended how, in words."""
    states = [t.state.name for t in search.trials if "same_as" not in t.user_attrs]
    named = (("COMPLETE", "trained"), ("PRUNED", "stopped or too slow"), ("FAIL", "failed or put back"))
    said = ", ".join(f"{states.count(state)} {words}" for state, words in named)
    same = len(search.trials) - len(states)
    return said + (f", {same} proposed again" if same else "")


def _markdown(search: Search) -> str:
    space = search.space
    rows = front_rows(search)
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])
    note = (
        f"{len(search.trials)} trials: {counts(search)}. One seed each, scored on the held-out images that chose them: these numbers "
        f"are too good, and nothing is claimed from them. `lowbit compare tables/{space.table}.yaml` measures the table of these "
        "points over seeds."
    )
    return f"### {space.config.title or space.name}: front of a search\n\n{table}\n\n{note}\n"


def _figure(search: Search) -> Figure:
    _, factor, _ = unit(search.metric)
    found = search.found
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    axes = figure.subplots()
    costs, scores = [1e3 * f.seconds for f in found], [factor * f.score for f in found]
    best = [other is None for other in beaten_by(scores, costs, SAME)]
    styles: tuple[tuple[bool, dict[str, Any]], ...] = ((False, {"fillstyle": "none", "alpha": 0.6}), (True, {}))
    for on_front, style in styles:
        chosen = [i for i, b in enumerate(best) if b is on_front]
        axes.plot([costs[i] for i in chosen], [scores[i] for i in chosen], "o", color=page.BLUE, markersize=6, **style)
    stairs = sorted((costs[i], scores[i]) for i, b in enumerate(best) if b)
    axes.step([x for x, _ in stairs], [y for _, y in stairs], where="post", color=page.BLUE, alpha=0.35)
    log_axis(axes, costs)
    room = 0.12 * (max(scores) - min(scores)) or 0.5
    axes.set_ylim(min(scores) - room, max(scores) + room)
    axes.set_xlabel("ms for one input, one thread, logarithmic")
    name = unit(search.metric)[0]
    axes.set_ylabel(f"held-out {search.metric} ({name})" if name else f"held-out {search.metric}")
    labels = [Label(str(f.number), costs[i], scores[i], {"fontsize": 9}) for i, f in enumerate(found) if best[i]]
    lines: list[Line] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(stairs):
        lines += [((x0, y0), (x1, y0)), ((x1, y0), (x1, y1))]
    place(axes, labels, lines)
    return figure


# ------------------------------------------------------------------------------------------------ the table


class _Cells:
    """The front's points as cells of a table, the runs that they start from among them, each once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.cells: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, str] = {}
        self._labels: dict[str, str] = {}

    def add(self, found: Found, note: str) -> None:
        space, params = self.space, found.params
        label = f"trial{found.number}"
        config = self._config(space.changes(params), space.needs(params), params)
        self.cells[label] = config
        self.notes[label] = note

    def _config(self, changes: Mapping[str, Any], needs: Mapping[str, str], params: Params) -> dict[str, Any]:
        config: dict[str, Any] = {"set": {k: v for k, v in changes.items() if k not in self.space.config.table.set}}
        for key, run in needs.items():
            label = self._run(run, params)
            if key == "train.distill.teacher":
                config["teacher"] = label
            else:
                config["after"] = label
                if key != "train.start_from":
                    config["start"] = key
        return config

    def _run(self, run: str, params: Params) -> str:
        space = self.space
        config = self._config(space.changes_of_run(run, params), space.config.runs[run].needs, params)
        identity = repr(sorted(config.items(), key=str))
        if identity not in self._labels:
            same = sum(label == run or label.startswith(f"{run}-") for label in self.cells)
            label = run if not same else f"{run}-{same + 1}"
            self._labels[identity] = label
            self.cells[label] = config
        return self._labels[identity]


def table_text(search: Search) -> str:
    """A table of recipes: the front's points, fastest first, and the runs they start from."""
    space = search.space
    cells = _Cells(space)
    for found in search.front:
        score = f"{unit(search.metric)[1] * found.score:.2f} {unit(search.metric)[0]}".strip()
        cells.add(found, f"{digits(1e3 * found.seconds)} ms, {score} held out, one seed: {_params(found.params)}")
    head = {
        "name": space.table,
        "title": f"{space.config.title or space.name}: the front of a search",
        "description": (
            f"The points that `lowbit search` found on the front ({len(search.trials)} trials), to be measured over seeds; what they start "
            "from stands beside them."
        ),
        "recipe": dict(space.base),
        "set": {**space.config.set, **space.config.table.set},
    }
    for label, beside in space.config.table.cells.items():
        cells.cells[label] = beside.model_dump(mode="json", exclude_defaults=True)
    lines = [_dump(head).rstrip(), "cells:"]
    for label, config in cells.cells.items():
        if label in cells.notes:
            lines.append(f"  # {cells.notes[label]}")
        lines.append(_indented(_dump({label: config})))
    lines.append(_dump({"compare": [], "seeds": space.config.table.seeds}).rstrip())
    return "\n".join(lines) + "\n"


def _params(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in params.items())


def _dump(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, default_flow_style=None, allow_unicode=True, width=140)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def progress_line(front: Sequence[Found], metric: str) -> str:
    """The front in one line."""
    _, factor, shown = unit(metric)
    points = [f"{factor * f.score:.{shown}f} at {digits(1e3 * f.seconds)} ms" for f in front]
    return f"front: {'; '.join(points)}" if points else "front: nothing yet"
