"""The outline of a run, before it starts: its steps, and what their order implies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel

from edgetune.core.order import plan_steps
from edgetune.recipe.recipe import Recipe
from edgetune.recipe.sections import CHECK_ROWS


@dataclass(frozen=True)
class OutlineLine:
    """One action of a run. `step`: the number in the recipe, from one; `None` if implied by the order."""

    step: int | None
    name: str
    detail: str


def outline(recipe: Recipe) -> tuple[OutlineLine, ...]:
    """Everything that a run of the recipe does, in order."""
    lines: list[OutlineLine] = []
    plan = plan_steps([step.settings for step in recipe.steps])
    for move in plan:
        step = recipe.steps[move.index]
        if move.implied:
            lines.append(OutlineLine(None, "finalize", f"{joined(move.finalizes)}; {move.reason}"))
        else:
            lines.append(
                OutlineLine(move.index + 1, step.name, joined(move.finalizes) or describe_settings(step.settings))
            )
    if plan and plan[-1].open:
        lines.append(OutlineLine(None, "finalize", joined(reversed(plan[-1].open))))
    if recipe.export:
        lines.append(OutlineLine(None, "export", recipe.export.target))
        most = recipe.export.rows_to_check(CHECK_ROWS)
        rows = f"{most} held-out rows" if recipe.export.check_rows else f"up to {most} held-out rows"
        lines.append(OutlineLine(None, "verify", f"{rows}, program compared with eager model"))
    if recipe.profile:
        host = ["this host, measured"] if recipe.profile.measure and recipe.export else []
        lines.append(OutlineLine(None, "profile", joined([*host, *recipe.profile.devices])))
    lines += [OutlineLine(None, "budget", describe_settings(budget)) for budget in recipe.budget]
    return tuple(lines)


def describe_settings(settings: BaseModel) -> str:
    """The first setting, and those that differ from the default: `rank 4, targets *.query *.value`."""
    plain = settings.model_dump(mode="json")
    fields = type(settings).model_fields
    first = next(iter(fields), None)
    shown = [n for n in plain if n == first or getattr(settings, n) != fields[n].default]
    return joined(f"{name} {_value(plain[name])}" for name in shown if plain[name] is not None)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_value(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(_value(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def joined(words: Iterable[str]) -> str:
    """Separated by commas."""
    return ", ".join(words)
