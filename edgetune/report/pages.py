"""Self-contained HTML pages from the templates in this package. Every value is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from edgetune.core.files import write_atomically
from edgetune.core.registry import require
from edgetune.report.drawing import Figure
from edgetune.report.glossary import meaning
from edgetune.report.tables import Table


@dataclass(frozen=True)
class Tile:
    """One number with its name above and an explanation below."""

    name: str
    value: str
    under: str
    tone: str = ""
    words: bool = False  # the value is in words: set smaller


@dataclass(frozen=True)
class Section:
    """A heading with plots, tables and a text in a fixed width; one without any is left out."""

    title: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    code: str = ""


@cache
def _environment() -> Environment:
    pages = Environment(
        loader=PackageLoader("edgetune.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.filters["meaning"] = meaning
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return pages


def render(template: str, **values: Any) -> str:
    """The page of that template with these values."""
    return _environment().get_template(template).render(**values)


def write_report(path: Path, figures: Sequence[Figure], **values: Any) -> None:
    """Write `report.html` with these figures, whole or not at all. Raises `EdgetuneError` if plotly is missing."""
    optional: dict[str, Any] = dict.fromkeys(("remarks", "sentences", "first", "tiles", "details", "terms"), ())
    plotly = require("plotly.offline", "the HTML report").get_plotlyjs().replace("</script", "<\\/script")
    specs = {figure.key: {"spec": figure.spec, "wide": figure.wide} for figure in figures}
    text = render("report.html", figures=specs, plotly=Markup(plotly), **{**optional, **values})
    write_atomically(path, text)
