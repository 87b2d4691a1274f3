"""An inspection as one page: plain HTML and CSS bars, nothing fetched, in the look of the report."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.core.files import write_whole
from edgetune.core.numbers import size

if TYPE_CHECKING:
    from edgetune.program.inspection import Beside, Constant, Inspection, Method

_MOST = 40  # bars of one figure; the rest is one bar more
_BARS = """
.bars { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr max-content; gap: 0.25rem 0.75rem;
  align-items: center; font-size: 0.9rem; font-variant-numeric: tabular-nums; margin: 0.75rem 0 1.5rem; }
.bars .name { overflow-wrap: anywhere; max-width: 26rem; }
.bars .name small { display: block; color: var(--soft); font-size: 0.85em; }
.bars .bar { background: var(--blue); height: 0.9rem; border-radius: 0.2rem; min-width: 2px; }
.bars .rest { background: var(--soft); }
.stack { display: flex; height: 1.6rem; border-radius: 0.35rem; overflow: hidden; margin: 1rem 0 0.5rem; }
.stack i { display: block; min-width: 1px; border-right: 1px solid var(--paper); }
.key { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; font-size: 0.9rem; }
.key b { display: inline-block; width: 0.75rem; height: 0.75rem; border-radius: 0.15rem; margin-right: 0.4rem; }
"""
_COLORS = ("#3b82d9", "#d9770f", "#159a86", "#8f6bd1", "#c2410c", "#8a8f98", "#b8a13a")
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="kind">An ExecuTorch program, read from its file</p>
{tiles}
</header>
<main>
{main}
</main>
<footer>SHA-256 {sha256}, schema version {schema}</footer>
</body>
</html>
"""


def write_page(found: Inspection, path: Path) -> None:
    """Write the page of an inspection to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page(found))


def page(found: Inspection) -> str:
    """The page as text. Everything that comes from the file is escaped."""
    sections = [_parts(found), *(_method(method) for method in found.methods), _constants(found.constants)]
    sections.append(_beside(found.beside))
    return _PAGE.format(
        title=_text(Path(found.path).name),
        style=_style() + _BARS,
        tiles=_tiles(found),
        main="\n".join(section for section in sections if section),
        sha256=found.sha256,
        schema=found.schema_version,
    )


def _style() -> str:
    """The report's own."""
    text = resources.files("edgetune.report").joinpath("page.html").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", text, re.S)
    return found[1] if found else ""


def _text(value: object) -> str:
    return html.escape(str(value))


def _tiles(found: Inspection) -> str:
    delegates = [delegate for method in found.methods for delegate in method.delegates]
    kernels = sum(operator.count for method in found.methods for operator in method.operators)
    backends = ", ".join(sorted({delegate.backend for delegate in delegates})) or "no backend"
    arena = max((sum(method.arenas_bytes) for method in found.methods), default=0)
    tiles = [
        ("File", size(found.size_bytes), f"{len(found.methods)} method{'s' if len(found.methods) != 1 else ''}"),
        ("Delegated parts", str(len(delegates)), backends),
        ("Kernel calls outside", str(kernels), "run on portable kernels"),
        ("Planned memory", size(arena), "of the method that needs most"),
    ]
    if found.beside is not None and not found.beside.problem:
        checked = "ok" if found.beside.checksum_ok else "wrong"
        tiles.append(("Checksum", checked, "against model.json"))
    return (
        '<dl class="tiles">'
        + "".join(
            f'<div class="tile{_verdict(name, value)}"><dt>{name}</dt><dd class="big">{_text(value)}</dd>'
            f'<dd class="under">{_text(under)}</dd></div>'
            for name, value, under in tiles
        )
        + "</dl>"
    )


def _verdict(name: str, value: str) -> str:
    return "" if name != "Checksum" else " good" if value == "ok" else " bad"


def _parts(found: Inspection) -> str:
    """The whole file as one bar."""
    pieces, keys = [], []
    for index, part in enumerate(found.parts):
        color = _COLORS[index % len(_COLORS)]
        share = 100 * part.size_bytes / max(found.size_bytes, 1)
        pieces.append(f'<i style="width:{share:.3f}%;background:{color}" title="{_text(part.name)}"></i>')
        keys.append(f'<span><b style="background:{color}"></b>{_text(part.name)} {size(part.size_bytes)}</span>')
    stack, key = "".join(pieces), "".join(keys)
    return f'<h2>What the file is made of</h2><div class="stack">{stack}</div><div class="key">{key}</div>'


def _method(method: Method) -> str:
    slots = [("input", i, slot) for i, slot in enumerate(method.inputs)]
    slots += [("output", i, slot) for i, slot in enumerate(method.outputs)]
    rows = [(f"{what} {number}", str(slot)) for what, number, slot in slots]
    rows.append(("memory plan", " + ".join(size(arena) for arena in method.arenas_bytes) or "none"))
    text = f"<h2>Method {_text(method.name)}</h2>{_table(rows)}"
    if method.delegates:
        counts = Counter(delegate.backend for delegate in method.delegates)
        told = ", ".join(f"{count} for {backend}" for backend, count in counts.most_common())
        bars = [(f"{d.backend} {i}", "", d.size_bytes, size(d.size_bytes)) for i, d in enumerate(method.delegates)]
        bars.sort(key=lambda bar: -bar[2])
        text += f"<h3>Delegates: {_text(told)}</h3>{_drawn(bars, size)}"
    if method.operators:
        bars = [(operator.name, "", operator.count, str(operator.count)) for operator in method.operators]
        text += f"<h3>Kernel calls outside the delegates</h3>{_drawn(bars, str)}"
    return text


def _constants(constants: Sequence[Constant]) -> str:
    if not constants:
        return ""
    bars = [
        (
            c.name if c.dtype else c.name[:16],
            f"{c.dtype} {list(c.shape)}" if c.dtype else c.kind,
            c.size_bytes,
            size(c.size_bytes),
        )
        for c in constants
    ]
    return f"<h2>Constants by size</h2>{_drawn(bars, size)}"


def _drawn(bars: Sequence[tuple[str, str, int, str]], told: object) -> str:
    """Bars of name, remark, value and the value in words, longest first; what is too many is summed up."""
    shown, rest = list(bars[:_MOST]), bars[_MOST:]
    longest = max((value for _, _, value, _ in shown), default=0) or 1
    lines = []
    for name, remark, value, words in shown:
        small = f"<small>{_text(remark)}</small>" if remark else ""
        width = 100 * value / longest
        lines.append(
            f'<div class="name">{_text(name)}{small}</div><div class="bar" style="width:{width:.2f}%"></div>'
            f"<div>{_text(words)}</div>"
        )
    if rest:
        total = sum(value for _, _, value, _ in rest)
        words = told(total) if callable(told) else str(total)
        lines.append(f'<div class="name">{len(rest)} more</div><div></div><div>{_text(words)}</div>')
    return f'<div class="bars">{"".join(lines)}</div>'


def _beside(beside: Beside | None) -> str:
    if beside is None:
        return "<h2>model.json</h2><p>The program has no model.json, so versions, parity and checksum are unknown.</p>"
    if beside.problem:
        return f'<h2>model.json</h2><p class="bad">It cannot be read: {_text(beside.problem)}</p>'
    share = "" if beside.delegated_macs_pct is None else f"{beside.delegated_macs_pct:.1f} % of multiply-accumulates"
    rows = [
        ("checksum", "ok" if beside.checksum_ok else "wrong: it describes another program"),
        ("target", beside.target),
        ("device", beside.device),
        ("delegated", share),
        ("parity", beside.parity),
        ("note", beside.note),
        *beside.versions.items(),
    ]
    return f"<h2>From model.json</h2>{_table([(name, value) for name, value in rows if value])}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'
