"""What the HTML pages share: one style, plots as inline SVG in the text's own colour, templates. Needs ``lowbit[train]``.

A page holds everything inline: no script, no font, no picture is loaded from elsewhere. Plots read on light and dark
grounds.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import jinja2
import matplotlib
from matplotlib.figure import Figure

BLUE: Final = "#3b7dd8"
ORANGE: Final = "#e07b39"
GREEN: Final = "#2f9e73"
GRAY: Final = "#8a939e"
INK: Final = "#010203"
"""Becomes the text's colour."""

_STYLE: Any = {  # matplotlib types its keys as one huge Literal
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made within have the pages' style."""
    with matplotlib.rc_context(_STYLE):
        yield


def svg(figure: Figure, title: str, titles: Mapping[str, str] = MappingProxyType({})) -> str:
    """The figure as an element of a page, in the colour of the text around it; ``title`` must differ within the page.

    ``titles``: id of an artist (``set_gid``) -> what shows where the pointer rests on it.
    """
    stream = io.StringIO()
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with matplotlib.rc_context():
        matplotlib.rcParams["svg.hashsalt"] = title  # ids must differ between the figures of a page
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for gid, words in titles.items():
        text = text.replace(f'<g id="{gid}">', f'<g class="point"><title>{html.escape(words)}</title>', 1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def render(template: str, **values: Any) -> str:
    """A template of this package, filled in; ``page.css`` is included by it. What UTF-8 lacks (names of files may) becomes "?"."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values).encode(errors="replace").decode()
