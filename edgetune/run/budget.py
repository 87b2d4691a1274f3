"""Check a run's results against the recipe's budgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import Ledger, Verdict
from edgetune.profile.device import load

if TYPE_CHECKING:
    from edgetune.recipe.sections import Budget


def check_budgets(
    budgets: Sequence[Budget], ledger: Ledger, least_training_mib: Sequence[float]
) -> tuple[Verdict, ...]:
    """One verdict for each limit. `least_training_mib`: the memory of each training with batches of one row."""
    return tuple(verdict for budget in budgets for verdict in _check_budget(budget, ledger, least_training_mib))


def _check_budget(budget: Budget, ledger: Ledger, least_training_mib: Sequence[float]) -> Iterator[Verdict]:
    """The lowest value is for this recipe: another one, say with a higher pruning ratio, may reach less."""
    predicted = next((p for p in ledger.predicted if p.device == load(budget.device).id), None)
    call = f"predicted for {predicted.call}" if predicted and predicted.call else "predicted"
    trainings = [t.peak_memory_mib for t in ledger.trainings if t.peak_memory_mib is not None]
    program = ledger.program
    results = {
        "latency_ms": (
            predicted.latency_ms if predicted else None,
            f"{call}; the lowest reachable value is the low end of its interval",
        ),
        "peak_memory_mib": (predicted.peak_memory_mib if predicted else None, "predicted"),
        "size_mib": (program.size_mib if program else None, ""),
        "train_memory_mib": (
            max(trainings, default=None),
            "weights, gradients, optimizer state, tensors saved for backward, and the teacher; the lowest reachable "
            "value is with batches of one row",
        ),
    }
    least = {
        "latency_ms": predicted.latency_low_ms if predicted else None,
        "train_memory_mib": max(least_training_mib, default=None),
    }
    for quantity, (value, note) in results.items():
        limit = getattr(budget, quantity)
        if limit is None:
            continue
        if value is None:
            raise EdgetuneError(
                f"the budget limits {quantity}, but nothing in the recipe provides it",
                got=budget.device,
                action="add export, add the device to profile.devices, or add a train step for train_memory_mib",
            )
        yield Verdict(
            device=budget.device,
            quantity=quantity,  # type: ignore[arg-type]
            limit=limit,
            value=value,
            least=least.get(quantity) or value,
            holds=value <= limit,
            note=note,
        )
