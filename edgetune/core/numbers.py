"""Format numbers for people. A missing or non-finite number becomes a word or a dash, never `nan`."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from edgetune.core.ledger import METRICS, Quality

MIB = 2**20  # bytes
DASH = "-"  # not measured
STEPS_OF_1000 = ("", " k", " M", " G", " T", " P")


def finite_or_none(value: float | None) -> float | None:
    """The value if it is a finite number, else `None`."""
    return value if value is not None and math.isfinite(value) else None


def format_number(value: float | None, digits: int = 3) -> str:
    """`digits` significant figures, without exponents down to a thousandth.

    >>> [format_number(v) for v in (0.0, 0.004217, 1.0, 86.64, 1234.4, None, float("nan"))]
    ['0', '0.00422', '1.00', '86.6', '1,234', '-', 'not finite']
    """
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    leading = int(f"{value:.{digits - 1}e}".partition("e")[2]) + 1
    return f"{value:,.{max(digits - leading, 0)}f}"


def format_count(value: int | None) -> str:
    """A count, with k, M, G.

    >>> [format_count(v) for v in (0, 512, 999_999, 22_713_601, 1_361_000_000, None)]
    ['0', '512', '1.00 M', '22.7 M', '1.36 G', '-']
    """
    if value is None:
        return DASH
    if abs(value) < 1000:
        return str(value)
    scaled, step = float(value), 0
    while abs(scaled) >= 999.5 and step < len(STEPS_OF_1000) - 1:
        scaled, step = scaled / 1000, step + 1
    return format_number(scaled) + STEPS_OF_1000[step]


def format_percent(value: float | None) -> str:
    """A percentage with one decimal; 100.0 only for all, 0.0 only for none.

    >>> [format_percent(v) for v in (100.0, 99.98, 0.01, 0.0, 42.25)]
    ['100.0', '> 99.9', '< 0.1', '0.0', '42.2']
    """
    if value is None or not math.isfinite(value):
        return format_number(value)
    if 99.95 <= value < 100:
        return "> 99.9"
    if 0 < value < 0.05:
        return "< 0.1"
    return f"{value:.1f}"


def format_score(value: float | None) -> str:
    """A quality, with two decimals."""
    return f"{value:,.2f}" if finite_or_none(value) is not None else format_number(value)


def format_change(value: float | None) -> str:
    """A difference of two qualities, with its sign.

    >>> [format_change(v) for v in (1.204, -0.3, -0.001, None)]
    ['+1.20', '-0.30', '0.00', '-']
    """
    if value is None or not math.isfinite(value):
        return DASH
    rounded = round(value, 2)
    return f"{rounded:+.2f}" if rounded else "0.00"


def format_quality(value: Quality | None) -> str:
    """A quality with its unit, for running text."""
    if value is None:
        return "quality not measured"
    if finite_or_none(value.value) is None:
        return f"{metric_noun(value)} not finite"
    return (
        f"{format_score(value.value)} % {metric_noun(value)}"
        if metric_unit(value)
        else f"{metric_noun(value)} {format_score(value.value)}"
    )


def format_quality_with_interval(value: Quality) -> str:
    """A quality with its 95 % interval, if it has one.

    >>> format_quality_with_interval(Quality(metric="accuracy_pct", value=90.0, rows=20))
    '90.00 % accuracy on 20 rows (95 % interval: 69.9 to 97.2 %)'
    """
    interval = value.interval_pct
    text = f"{format_quality(value)} on {pluralize(value.rows, 'row')}"
    return text if interval is None else f"{text} (95 % interval: {interval[0]:.1f} to {interval[1]:.1f} %)"


def format_seconds(value: float) -> str:
    """A duration in seconds, to the hundredth below 1.

    >>> [format_seconds(v) for v in (0.019, 9.5, 94.32, 1234.5)]
    ['0.02', '9.50', '94.3', '1,234']
    """
    return f"{value:.2f}" if 0 <= value < 1 else format_number(value)


def metric_noun(value: Quality) -> str:
    """The name of the metric."""
    return METRICS[value.metric].noun


def metric_unit(value: Quality) -> str:
    """The unit of the metric; perplexity has none."""
    return METRICS[value.metric].unit


def capitalize_first(text: str) -> str:
    """The text with a capital first letter.

    >>> capitalize_first("entity F1"), capitalize_first("")
    ('Entity F1', '')
    """
    return text[:1].upper() + text[1:]


def pluralize(many: int, thing: str) -> str:
    """A number and its noun.

    >>> pluralize(1, "row"), pluralize(1500, "row")
    ('1 row', '1,500 rows')
    """
    return f"{many:,} {thing}" if many == 1 else f"{many:,} {thing}s"


def format_size(size_bytes: int) -> str:
    """A size in bytes, in the unit that suits it.

    >>> format_size(512), format_size(20480), format_size(5 * 2**20)
    ('512 B', '20.0 KiB', '5.00 MiB')
    """
    if size_bytes < 2**10:
        return f"{size_bytes} B"
    return f"{size_bytes / 2**10:.1f} KiB" if size_bytes < MIB else f"{size_bytes / MIB:.2f} MiB"


def align_columns(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Rows of a table as lines; columns whose indices are in `right` are right-aligned.

    >>> align_columns([("a", "1", "x"), ("bc", "10", "")], {1})
    ['a    1  x', 'bc  10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
