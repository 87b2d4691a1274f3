"""The run in words: a headline, remarks about problems, and details."""

from __future__ import annotations

from collections.abc import Iterator

from edgetune.core.ledger import Ledger, Predicted, Quality, Row, Verdict
from edgetune.core.numbers import (
    finite_or_none,
    format_number,
    format_quality,
    format_score,
    metric_noun,
    metric_unit,
    pluralize,
)
from edgetune.report.device_tables import QUANTITIES, budget_met, ran_on
from edgetune.report.tables import gain, last_quality

LOST_POINTS = 2.0  # a step that costs more accuracy is named at the top
RAISED_PCT = 5.0  # or that raises a lower-is-better metric by more
WIDE_POINTS = 10.0  # an interval that is wider says that the test set is small
UNCHANGED = ("train", "load", "eval")  # steps that compress nothing


def headline(ledger: Ledger) -> str:
    """Size and quality before and after, and how fast the result is: one sentence."""
    if not ledger.rows:
        return f"{ledger.model}: no step was finished."
    first, last = ledger.rows[0], ledger.rows[-1]
    size_mib = ledger.program.size_mib if ledger.program else last.size_mib
    result = last_quality(ledger)
    parts = [f"{_state(first.size_mib, first.quality)} before"]
    if ledger.program or len(ledger.rows) > 1:
        parts.append(f"{_state(size_mib, result, short=first.quality is not None)} after")
    text = ", ".join(parts)
    if len(parts) == 1:
        text = f"{_state(first.size_mib, first.quality)} as loaded"
    return f"{text}; {_speed(ledger)}." if _speed(ledger) else f"{text}."


def _state(size_mib: float, result: Quality | None, *, short: bool = False) -> str:
    size = f"{format_number(size_mib)} MiB"
    if result is None or finite_or_none(result.value) is None:
        return f"{size} ({format_quality(result)})" if result else size
    if not metric_unit(result):
        article = "an" if result.metric == "rmse" else "a"
        return f"{size} and {article} {metric_noun(result)} of {format_score(result.value)}"
    return f"{size} and {result.value:.1f} %{'' if short else f' {metric_noun(result)}'}"


def _speed(ledger: Ledger) -> str:
    """The latency on the device of the budget, or else on the first device with a figure."""
    line = main_prediction(ledger)
    if line is not None:
        text = f"{format_number(line.latency_ms)} ms predicted on the CPU of {_device(line)}"
    elif ledger.measured:
        timed = ledger.measured[0]
        text = f"{format_number(timed.latency_ms)} ms measured on {timed.device} ({ran_on(ledger, timed)})"
    else:
        return "" if ledger.program else "no program was exported"
    call = (line or ledger.measured[0]).call
    return f"{text} for {call}" if call else text


def main_prediction(ledger: Ledger) -> Predicted | None:
    """The prediction for a device in the budget, or else the first."""
    wanted = {verdict.device for verdict in ledger.verdicts}
    return next((line for line in ledger.predicted if line.device in wanted), next(iter(ledger.predicted), None))


def _device(line: Predicted) -> str:
    return f"the {line.name}" if line.name and not line.name.startswith("this ") else line.name or line.device


def remarks(ledger: Ledger) -> tuple[str, ...]:
    """Problems that a reader must not miss, such as a missed budget."""
    sentences = [] if ledger.finished else ["This run is not finished. The figures cover the steps so far."]
    broken = [line for line in ledger.verdicts if not line.holds]
    sentences += [_missed(line) for line in broken]
    sentences += [*_slower_than_float(ledger), *_against_baselines(ledger), *_losses(ledger), *_small_test_set(ledger)]
    return tuple(sentences)


def _missed(line: Verdict) -> str:
    name, of = QUANTITIES[line.quantity]
    return (
        f"The budget for {line.device} is not met: {name} is {format_number(line.value)} {of}, the limit is "
        f"{format_number(line.limit)} {of}. The lowest value that this recipe can reach is "
        f"{format_number(line.least)} {of}."
    )


def _slower_than_float(ledger: Ledger) -> Iterator[str]:
    """Devices on which the quantized program takes longer than the model did in floating point."""
    before = {line.where: line.latency_ms for line in ledger.unquantized}
    slower = [line for line in ledger.predicted if line.latency_ms > before.get(line.where, line.latency_ms)]
    if not slower:
        return
    times = "; ".join(
        f"{format_number(line.latency_ms)} ms against {format_number(before[line.where])} ms on {line.where}"
        for line in slower
    )
    dynamic = "" if any(row.step == "int8_dynamic" for row in ledger.rows) else "take int8_dynamic, "
    yield (
        f"The quantized program is predicted to be slower than the model in floating point: {times}. Leave the "
        f"quantization out, {dynamic}or let edgetune export --fastest-form choose."
    )


def _against_baselines(ledger: Ledger) -> Iterator[str]:
    result = last_quality(ledger)
    measured = [line for line in ledger.baselines if finite_or_none(line.value) is not None]
    if result is None or finite_or_none(result.value) is None or not measured:
        return
    best = (max if result.higher_is_better else min)(measured, key=lambda line: line.value)
    lead = result.value - best.value if result.higher_is_better else best.value - result.value
    interval = result.interval_pct
    of = " %" if metric_unit(result) else ""
    compared = f'"{best.name}" reaches {format_score(best.value)}{of}, this run {format_score(result.value)}{of}'
    if lead < 0:
        yield f"The result is below a simple baseline: {compared}."
    elif lead == 0:
        yield f"The result is no better than a simple baseline: {compared}."
    elif interval is not None and best.value > interval[0]:
        yield f"The result is not clearly better than a simple baseline on so few test rows: {compared}."


def _losses(ledger: Ledger) -> Iterator[str]:
    """Steps other than training that cost quality, and the final quality."""
    for before, row in zip(ledger.rows, ledger.rows[1:], strict=False):
        difference = gain(row.quality, before.quality)
        if difference is None or row.step in UNCHANGED:
            continue
        assert row.quality is not None  # `gain` has compared both
        assert before.quality is not None
        end, of = last_quality(ledger), " %" if metric_unit(row.quality) else ""
        later = (
            f"; the run ends at {format_score(end.value)}{of}" if end is not None and row is not ledger.rows[-1] else ""
        )
        name = f"Step {row.index}, {row.step},"
        if row.quality.higher_is_better and -difference > LOST_POINTS:
            lost = f"{name} lost {format_score(-difference)} points of {metric_noun(row.quality)}"
            yield f"{lost} ({format_score(before.quality.value)} to {format_score(row.quality.value)} %){later}."
        elif not row.quality.higher_is_better and 100 * difference > RAISED_PCT * before.quality.value:
            raised = f"{name} raised the {metric_noun(row.quality)} by {100 * difference / before.quality.value:.0f} %"
            yield f"{raised} ({format_score(before.quality.value)} to {format_score(row.quality.value)}){later}."


def _small_test_set(ledger: Ledger) -> Iterator[str]:
    result = last_quality(ledger)
    interval = result.interval_pct if result is not None else None
    if result is None or interval is None or interval[1] - interval[0] <= WIDE_POINTS:
        return
    yield (
        f"The test set has only {pluralize(result.rows, 'row')}, so the accuracy of "
        f"{format_score(result.value)} % is uncertain: "
        f"its 95 % interval is {interval[0]:.1f} to {interval[1]:.1f} %."
    )


def details(ledger: Ledger) -> tuple[str, ...]:
    """Model, data and quality; measurements; the budget; notes about data and model."""
    lines = [_about(ledger)] if ledger.rows else []
    for line in ledger.measured:
        lines.append(
            f"Measured on {line.where} ({ran_on(ledger, line)}): {format_number(line.latency_ms)} ms per run, "
            f"{format_number(line.peak_memory_mib)} MiB of memory."
        )
    return (*lines, *budget(ledger), *notes(ledger))


def budget(ledger: Ledger) -> tuple[str, ...]:
    """Each device's budget with its values, if all of it is met; a missed one is among the remarks."""
    if not budget_met(ledger):
        return ()
    sentences = []
    for device in dict.fromkeys(line.device for line in ledger.verdicts):
        values = [_within(line) for line in ledger.verdicts if line.device == device]
        sentences.append(f"The budget for {device} is met: {', '.join(values)}.")
    return tuple(sentences)


def _within(line: Verdict) -> str:
    name, of = QUANTITIES[line.quantity]
    return f"{name} {format_number(line.value)} of {format_number(line.limit)} {of}"


def notes(ledger: Ledger) -> tuple[str, ...]:
    """Notes about data and model, as sentences."""
    return tuple(as_sentence(note) for note in ledger.notes)


def _about(ledger: Ledger) -> str:
    first: Row = ledger.rows[0]
    size_mib = ledger.program.size_mib if ledger.program else ledger.rows[-1].size_mib
    text = f"{ledger.model} on {ledger.data}"
    shrunk = smaller(first.size_mib, size_mib)
    text += f"{shrunk} than as loaded" if shrunk else ""
    result = last_quality(ledger)
    text += f"; {format_quality(result)}"
    if result is None:
        return f"{text}."
    text += f" on {pluralize(result.rows, 'test row')}"
    interval = result.interval_pct
    text += f" (95 % interval: {interval[0]:.1f} to {interval[1]:.1f} %)" if interval else ""
    baselines = ", ".join(f"{line.name} {format_score(line.value)}" for line in ledger.baselines)
    return f"{text}. Baselines: {baselines}." if baselines else f"{text}."


def smaller(before_mib: float, after_mib: float) -> str:
    """How many times smaller, if it is smaller."""
    if (
        finite_or_none(before_mib) is None
        or finite_or_none(after_mib) is None
        or after_mib <= 0
        or before_mib <= after_mib
    ):
        return ""
    return f", {before_mib / after_mib:.1f} times smaller"


def as_sentence(note: str) -> str:
    """A note that begins in lower case and ends without a stop, as a sentence.

    >>> as_sentence("random weights"), as_sentence("hf:tiny is new")
    ('Random weights.', 'hf:tiny is new.')
    """
    text = note.strip()
    first = text.partition(" ")[0].rstrip(",:")
    if first.isalpha() and first.islower():
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."
