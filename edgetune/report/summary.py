"""The tables that a terminal shows, in order."""

from __future__ import annotations

from edgetune.core.ledger import Ledger
from edgetune.report.answer_tables import brief_table
from edgetune.report.device_tables import budget_met, measured_table, predicted_table, verdict_table
from edgetune.report.tables import Table, program_table, quality_table, step_table


def summary_tables(ledger: Ledger) -> tuple[Table, ...]:
    """The tables of the terminal, shorter than those of the page; empty ones are left out."""
    candidates = (
        None if budget_met(ledger) else verdict_table(ledger),
        step_table(ledger) if ledger.rows else None,
        quality_table(ledger),
        brief_table(ledger.answers) if ledger.answers else None,
        program_table(ledger, brief=True),
        measured_table(ledger),
        predicted_table(ledger, brief=True),
    )
    return tuple(table for table in candidates if table is not None)
