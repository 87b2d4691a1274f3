"""Parts of all plots: the figure value, layout, axes and horizontal bars. Text and grid get the page's colours."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Any

from edgetune.core.registry import require

# Legible on white and on near-black; description apart by most colour-blind people, and by pattern as well.
BLUE, ORANGE, TEAL, GREY = "#3b82d9", "#d9770f", "#159a86", "#8a8f98"
BAR_PX = 34  # height of a horizontal bar with its gap


@dataclass(frozen=True)
class Figure:
    """A plot: `spec` is plotly's JSON value, `description` gives its content in words."""

    key: str
    title: str
    description: str
    spec: dict[str, Any]
    wide: bool = False
    note: str = ""  # needed to read it


def label(text: str, most: int = 28) -> str:
    """A name as plotly text: HTML is escaped, and a long name is truncated."""
    return html.escape(text if len(text) <= most else text[: most - 1] + "…", quote=False)


def build_spec(traces: Sequence[dict[str, Any]], layout: dict[str, Any]) -> dict[str, Any]:
    """Build plotly's JSON from traces and layout; plotly refuses unknown attributes."""
    graph = require("plotly.graph_objects", "the HTML report")
    base = {
        "template": graph.layout.Template(),
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
    figure = graph.Figure(data=list(traces), layout={**base, **layout})
    spec: dict[str, Any] = figure.to_plotly_json()
    spec["layout"].pop("template", None)
    return spec


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title and automatic margin."""
    return {"title": {"text": title, "standoff": 10}, "automargin": True, "zeroline": False, **more}


def horizontal(
    names: Sequence[str], values: Sequence[float | None], color: str, texts: Sequence[str], *, hatched: bool = False
) -> dict[str, Any]:
    """Horizontal bars, first on top, each with its number."""
    marker: dict[str, Any] = {"color": color, "line": {"color": color, "width": 1.5}}
    if hatched:
        marker["pattern"] = {"shape": "/", "fillmode": "replace", "fgcolor": color, "size": 7, "solidity": 0.35}
    return {
        "type": "bar",
        "orientation": "h",
        "x": list(values),
        "y": number_duplicates([label(name) for name in names]),
        "text": list(texts),
        "textposition": "outside",
        "cliponaxis": False,
        "marker": marker,
        "hovertext": list(texts),
        "hovertemplate": "<b>%{y}</b><br>%{hovertext}<extra></extra>",
    }


def number_duplicates(names: Sequence[str]) -> list[str]:
    """Number repeated names: plotly draws bars of one name over each other.

    >>> number_duplicates(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def category_axis(**more: Any) -> dict[str, Any]:
    """Names down the side, first on top."""
    return {"automargin": True, "autorange": "reversed", "type": "category", "showgrid": False, "ticks": "", **more}


def room_for_text(values: Sequence[float | None]) -> float:
    """The end of an axis that leaves room for the number beside the longest bar."""
    return 1.22 * max((value for value in values if value is not None), default=0.0) or 1.0


def height_of(bars: int) -> int:
    """Pixels for this many horizontal bars, axis included."""
    return bars * BAR_PX + 90


def log_range(values: Sequence[float]) -> list[float]:
    """The range of a logarithmic axis with some room at both ends, as plotly takes it: exponents of ten."""
    low, high = log10(min(values)), log10(max(values))
    room = max(0.05 * (high - low), 0.1)
    return [low - room, high + room]
