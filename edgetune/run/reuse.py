"""Reuse an earlier run after its recipe has changed: everything before the first changed step.

Each step has a digest of its settings and of all steps before it, so two runs whose digests are equal up to a step
had the same model there. A run's folder stores them in `digest.txt`: first the recipe's own, then one for the model and
the data as loaded, then one for each step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.core.errors import EdgetuneError
from edgetune.core.own_code import contents_digest
from edgetune.train.resume import CHANGES_NO_RESULT

if TYPE_CHECKING:
    from edgetune.recipe.recipe import Recipe

FILE = "digest.txt"
EXPORT = "export"  # a pseudo-step: everything after the last one
_CHANGES_NO_RESULT = {"train": CHANGES_NO_RESULT}


def step_digests(recipe: Recipe) -> tuple[str, ...]:
    """The digest of the model and the data as loaded, then of each step."""
    plain = recipe.resolve()
    own = [contents_digest(recipe.model.source), contents_digest(recipe.data.source)]
    chain = [_sha256([plain["seed"], plain["model"], plain["data"], *own])]
    for step in plain["steps"]:
        ((name, settings),) = step.items()
        relevant = {key: value for key, value in settings.items() if key not in _CHANGES_NO_RESULT.get(name, ())}
        chain.append(_sha256([chain[-1], name, relevant]))
    return tuple(chain)


def finalized_digest(digest: str) -> str:
    """The digest of a model with this digest after finalizing."""
    return _sha256([digest, "finalize"])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_text(recipe: Recipe) -> str:
    """The contents of `digest.txt` for this recipe."""
    return "\n".join([recipe.digest, *step_digests(recipe)]) + "\n"


def is_run_of(recipe: Recipe, folder: Path) -> bool:
    """Whether the run in the folder is of exactly this recipe, and of the user's code in its present state."""
    return (folder / FILE).read_text(encoding="utf-8") == digest_text(recipe)


def unchanged_steps(recipe: Recipe, folder: Path) -> int | None:
    """How many steps, from the first, are the same in `folder`; `None` if its model or data differ."""
    earlier = (folder / FILE).read_text(encoding="utf-8").split()[1:]
    pairs = zip(earlier, step_digests(recipe), strict=False)
    equal = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(earlier), len(recipe.steps) + 1))
    return equal - 1 if equal else None


def step_number(recipe: Recipe, given: str | int, export: bool = False) -> int:
    """The step, from one, that a number or a name refers to; with `export`, "export" follows the last step."""
    names = [step.name for step in recipe.steps]
    text = str(given)
    if export and text == EXPORT:
        return len(names) + 1
    if text.isdecimal() and 1 <= int(text) <= len(names):
        return int(text)
    places = [number for number, name in enumerate(names, 1) if name == text]
    if len(places) == 1:
        return places[0]
    numbered = [f"{number} {name}" for number, name in enumerate(names, 1)]
    if places:
        raise EdgetuneError("several steps have this name", got=text, allowed=numbered, action="give its number")
    allowed = [*numbered, EXPORT] if export else numbered
    raise EdgetuneError("the recipe has no such step", got=given, allowed=allowed, action="give its number")


def reusable_digests(chain: Sequence[str], steps: int) -> frozenset[str]:
    """The digests of all ledger rows of the first `steps` steps."""
    reached = chain[: steps + 1]
    return frozenset([*reached, *(finalized_digest(digest) for digest in reached)])
