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

__all__ = ["Label", "place"]

_NEAR: Final = 9.0
"""Points (1/72 inch) from a marker's centre to a label that needs no line."""
_STEP: Final = 7.0
_RINGS: Final = 40
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


def place(axes: Axes, labels: Sequence[Label], keep_clear: Sequence[tuple[float, float]] = ()) -> list[Bbox]:
    """Write each label as near to its point as there is room, the first ones nearest, with a thin line where that is not near.

    The limits, scales and the figure's size must be final. A label lies within the axes, on no other label and on no
    marker; where a plot is so full that there is no such place, it lies where it is nearest.

    Args:
        axes: where the points are.
        labels: in the order in which they choose.
        keep_clear: more points, whose markers are not covered.

    Returns:
        The labels' boxes, in pixels.
    """
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    unit = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    others = [axes.transData.transform(point) for point in keep_clear]
    half = _MARKER * unit
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in [*points, *others]]
    boxes: list[Bbox] = []
    for label, (x, y) in zip(labels, points, strict=True):
        written = axes.text(label.x, label.y, label.text, va="center", **label.style)
        size = written.get_window_extent(renderer)
        box, radius = _first_free(x, y, size.width + 2 * unit, size.height + unit, unit, inside, [*taken, *boxes])
        boxes.append(box)
        written.set_ha("center")
        centre = axes.transData.inverted().transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        written.set_position((centre[0], centre[1]))
        if radius > 2 * _NEAR:
            end = axes.transData.inverted().transform((min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)))
            axes.plot([label.x, end[0]], [label.y, end[1]], color=written.get_color(), linewidth=0.6, alpha=0.5, zorder=1)
    return boxes


def _first_free(
    x: float, y: float, width: float, height: float, unit: float, inside: Bbox, taken: Sequence[Bbox]
) -> tuple[Bbox, float]:
    """The nearest box of this size around a point that hits nothing, and its distance in points."""
    nearest: Bbox | None = None
    for ring in range(_RINGS):
        radius = _NEAR + _STEP * ring
        for angle in _ANGLES:
            dx, dy = math.cos(angle), math.sin(angle)
            # the side that looks at the point touches the ring
            cx = x + dx * radius * unit + dx * width / 2
            cy = y + dy * radius * unit + dy * height / 2
            box = Bbox.from_extents(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            if box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1:
                continue
            nearest = nearest or box
            if not any(box.overlaps(other) for other in taken):
                return box, radius
    fallback = nearest or Bbox.from_bounds(x + _NEAR * unit, y - height / 2, width, height)
    return fallback, _NEAR
