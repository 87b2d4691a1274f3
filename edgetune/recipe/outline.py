"""What a run will do, told before it is done: the steps, and what their order implies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel

from edgetune.core.apply import closes
from edgetune.core.technique import Technique
from edgetune.recipe.recipe import Recipe
from edgetune.recipe.sections import CHECK_ROWS


@dataclass(frozen=True)
class Planned:
    """One thing that a run will do. `step` is the recipe's step, from one; `None`: implied by the order."""

    step: int | None
    name: str
    detail: str


def outline(recipe: Recipe) -> tuple[Planned, ...]:
    """Everything a run of the recipe does, in order."""
    planned: list[Planned] = []
    opened: list[str] = []
    for index, step in enumerate(recipe.steps):
        if closes(step.settings, opened):
            why = f"{step.name} is already applied" if step.name in opened else f"{step.name} needs plain layers"
            planned.append(Planned(None, "finalize", f"{joined(reversed(opened))}; {why}"))
            opened = []
        detail = joined(reversed(opened)) if step.name == "finalize" else in_words(step.settings)
        planned.append(Planned(index + 1, step.name, detail))
        if step.name == "finalize":
            opened = []
        elif isinstance(step.settings, Technique) and step.settings.opens:
            opened.append(step.name)
    if opened:
        planned.append(Planned(None, "finalize", joined(reversed(opened))))
    if recipe.export:
        planned.append(Planned(None, "export", recipe.export.target))
        most = recipe.export.rows_to_check(CHECK_ROWS)
        rows = f"{most} held-out rows" if recipe.export.check_rows else f"up to {most} held-out rows"
        planned.append(Planned(None, "verify", f"{rows}, program compared with eager model"))
    if recipe.profile:
        host = ["this host, measured"] if recipe.profile.measure and recipe.export else []
        planned.append(Planned(None, "profile", joined([*host, *recipe.profile.devices])))
    planned += [Planned(None, "budget", in_words(budget)) for budget in recipe.budget]
    return tuple(planned)


def in_words(settings: BaseModel) -> str:
    """The first setting, and those that are not the defaults: `rank 4, targets *.query *.value`."""
    plain = settings.model_dump(mode="json")
    fields = type(settings).model_fields
    first = next(iter(fields), None)
    told = [n for n in plain if n == first or getattr(settings, n) != fields[n].default]
    return joined(f"{name} {_value(plain[name])}" for name in told if plain[name] is not None)


def _value(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_value(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(_value(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def joined(words: Iterable[str]) -> str:
    """Separated by commas."""
    return ", ".join(words)
