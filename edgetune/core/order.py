"""The order of steps, derived in one place from what each step takes and leaves.

The check of a recipe, its dry run, the rehearsal, the run, training programs and `et.apply` all follow `plan_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgetune.core.errors import EdgetuneError
from edgetune.core.places import raise_all
from edgetune.core.technique import StepSettings
from edgetune.core.traits import OPEN, Trait

Kind = StepSettings | type[StepSettings]  # traits are those of the class


@dataclass(frozen=True)
class PlannedStep:
    """One action: the step at `index` of the list, or if `implied`, finalizing before that step."""

    index: int
    implied: bool
    finalizes: tuple[str, ...]  # the techniques that this finalizes, the latest first; empty: it is no finalizing
    reason: str = ""  # why it is implied
    open: tuple[str, ...] = ()  # the techniques that are open afterwards


def plan_steps(
    steps: Sequence[Kind], opened: Sequence[Kind] = (), place: Callable[[int], str] | None = None
) -> tuple[PlannedStep, ...]:
    """Every step in order, with the finalizing that each implies. What is open at the end stays open.

    Args:
        steps: settings, or classes of settings.
        opened: what is open on the model already.
        place: returns the location of a step, for errors; by default its name.

    Raises:
        EdgetuneError: every step in a wrong position; several as `places.Errors`.
    """
    plan: list[PlannedStep] = []
    errors: list[EdgetuneError] = []
    active = [step for step in opened if step.needs_finalize()]
    lasting = [step for step in opened if step.leaves & ~OPEN]  # their traits stay through any finalizing
    for index, step in enumerate(steps):
        if step.closes:
            plan.append(PlannedStep(index, False, _names(reversed(active))))
            if not active:
                errors.append(_nothing_to_finalize_error(step, index, place))
            active = []
            continue
        blocking = next((other for other in lasting if other.leaves & ~OPEN & ~step.takes), None)
        takes_open = step.takes & OPEN
        excess = [other for other in active if not takes_open or other.leaves & OPEN & ~takes_open]
        stacked = [other for other in excess if step.needs_finalize() and not _is_replaced_by(step, other)]
        if blocking or stacked:
            errors.append(_wrong_order_error(step, index, blocking, stacked, place))
        elif excess:
            again = any(other.name == step.name for other in excess)
            reason = f"{step.name} {'is already applied' if again else 'needs plain layers'}"
            plan.append(PlannedStep(index, True, _names(reversed(active)), reason))
            active = []
        if step.needs_finalize():
            active.append(step)
        lasting += [step] if step.leaves & ~OPEN else []
        plan.append(PlannedStep(index, False, (), open=_names(active)))
    raise_all("the order of steps", errors)
    return tuple(plan)


def _names(steps: Iterable[Kind]) -> tuple[str, ...]:
    return tuple(step.name for step in steps)


def _is_replaced_by(step: Kind, other: Kind) -> bool:
    """Whether the step replaces an open one: a choice of what trains can be replaced, trained adapters cannot."""
    return bool(other.leaves & step.leaves & ~Trait.ADAPTED)


def _wrong_order_error(
    step: Kind, index: int, blocking: Kind | None, stacked: Sequence[Kind], place: Callable[[int], str] | None
) -> EdgetuneError:
    where = place(index) if place else step.name
    other = blocking or stacked[0]
    if blocking is not None and blocking.name == step.name:
        return EdgetuneError("occurs twice", where=where, action="keep one of the two")
    leaves = (other.leaves & ~step.takes).in_words
    if blocking is not None and step.leaves & ~OPEN & ~blocking.takes:  # the other way round neither
        action = f"keep one of {other.name} and {step.name}"
        return EdgetuneError(f"cannot follow {other.name}, which leaves {leaves}", where=where, action=action)
    ways = [] if other.name == step.name else [f"put {step.name} before {other.name}"]
    action = ", or ".join(ways if blocking else [*ways, "finalize between the two"])
    return EdgetuneError(f"cannot follow {other.name}, which leaves {leaves}", where=where, action=action)


def _nothing_to_finalize_error(step: Kind, index: int, place: Callable[[int], str] | None) -> EdgetuneError:
    where = place(index) if place else step.name
    return EdgetuneError("there is nothing to finalize here", where=where, action="remove the step")
