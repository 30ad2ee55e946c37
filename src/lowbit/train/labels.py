"""Names beside the points of a plot, so that none lies on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

__all__ = ["Label", "Line", "place"]

Line = tuple[tuple[float, float], tuple[float, float]]

_NEAR: Final = 9.0
"""Points (1/72 inch) from a marker's centre to a label that needs no line."""
_STEP: Final = 7.0
_RINGS: Final = 40
_RINGS_CLEAR: Final = 5
"""So far a label goes to avoid a line."""
_ANGLES: Final = tuple(math.radians(a) for a in (0, 180, 315, 45, 225, 135, 270, 90, 340, 20, 200, 160))
_MARKER: Final = 4.5
"""Half the side of the square that a marker covers."""


@dataclass(frozen=True)
class Label:
    """What to write at a point, in data coordinates; ``style`` goes to ``Axes.text``."""

    text: str
    x: float
    y: float
    style: dict[str, Any]


def place(axes: Axes, labels: Sequence[Label], lines: Sequence[Line] = ()) -> list[Bbox]:
    """Write each label as near to its point as there is room, the first ones nearest, with a thin line where that is not near.

    The limits, scales and the figure's size must be final. A label lies within the axes, on no other label and on no
    marker, and on no line where there is such a place near by; where a plot is so full that there is none, it lies where it is
    nearest.

    Args:
        axes: where the points are.
        labels: in the order in which they choose.
        lines: upright or level ones, in data coordinates.

    Returns:
        The labels' boxes, in pixels.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    unit = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    half = _MARKER * unit
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in points]
    ends = [(axes.transData.transform(start), axes.transData.transform(end)) for start, end in lines]
    drawn = [
        Bbox.from_extents(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
        for a, b in ends
    ]
    boxes: list[Bbox] = []
    for label, (x, y) in zip(labels, points, strict=True):
        written = axes.text(label.x, label.y, label.text, va="center", **label.style)
        size = written.get_window_extent(renderer)
        wide, high = size.width + 2 * unit, size.height + unit
        where = _free(x, y, wide, high, unit, inside, [*taken, *drawn, *boxes], _RINGS_CLEAR)
        where = where or _free(x, y, wide, high, unit, inside, [*taken, *boxes], _RINGS)
        box, radius = where or (Bbox.from_bounds(x + _NEAR * unit, y - high / 2, wide, high), _NEAR)
        boxes.append(box)
        written.set_horizontalalignment("center")
        centre = axes.transData.inverted().transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        written.set_position((centre[0], centre[1]))
        if radius > 2 * _NEAR:
            end = axes.transData.inverted().transform((min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)))
            axes.plot(
                [label.x, end[0]], [label.y, end[1]], color=written.get_color(), linewidth=0.6, alpha=0.5, zorder=1
            )
    return boxes


def _free(
    x: float, y: float, width: float, height: float, unit: float, inside: Bbox, taken: Sequence[Bbox], rings: int
) -> tuple[Bbox, float] | None:
    """The nearest box of this size around a point that hits nothing, and its distance in points; None if all of them do."""
    for ring in range(rings):
        radius = _NEAR + _STEP * ring
        for angle in _ANGLES:
            dx, dy = math.cos(angle), math.sin(angle)
            # the side that looks at the point touches the ring
            cx = x + dx * radius * unit + dx * width / 2
            cy = y + dy * radius * unit + dy * height / 2
            box = Bbox.from_extents(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                return box, radius
    return None
