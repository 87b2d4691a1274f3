"""A backend as a value: how to lower to it, which models it takes, and whether this machine runs its programs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch.export import ExportedProgram

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.export.targets.forms import FORMS, Form, form_of
from edgetune.runtime.clock.runs import load_runtime

WHEEL = "wheel"  # a backend that every executorch wheel runs
EXTRA = 'pip install "edgetune[export]"'


@dataclass(frozen=True)
class LoweringPlan:
    """How executorch's compiler lowers one program. `passes` run after edgetune's own."""

    program: ExportedProgram
    partitioners: tuple[Any, ...]
    passes: tuple[Any, ...] = ()
    config: Any = None  # an EdgeCompileConfig; None: edgetune's
    context: AbstractContextManager[Any] = field(default_factory=nullcontext)  # entered while it is lowered


def _plan(program: ExportedProgram, target: Target) -> LoweringPlan:
    return LoweringPlan(program, tuple(target.partitioners()))


@dataclass(frozen=True)
class Target:
    """How to lower to one backend. Functions take the target itself, so that `replace` can change `chip`."""

    name: str
    serves: str  # the hardware, in words
    partitioner: str  # `module:Class`, empty for plain kernels
    takes: tuple[Form, ...]  # models in other forms are rejected before they are lowered
    runtime: str = ""  # WHEEL, the backend's name if a computer's runtime may have it, or empty: never runs here
    install: str = EXTRA  # what to do if something is missing
    needs: tuple[str, ...] = ()  # modules that must be importable before the partitioner is imported
    chip: str = ""  # which chip the program is compiled for, if that matters
    chips: tuple[tuple[str, str], ...] = ()  # start of a device's `soc` -> chip
    missing: Callable[[], str] = str  # what else this machine lacks: an SDK, a GPU
    build: Callable[[Any, Target], Any] = lambda kind, target: kind()  # partitioner class -> partitioner
    plan: Callable[[ExportedProgram, Target], LoweringPlan] = _plan

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run the programs: its runtime has the backend, and nothing is missing."""
        if self.runtime in ("", WHEEL):
            return self.runtime == WHEEL
        return not self.lacks() and self.runtime in _backends()

    def lacks(self) -> str:
        """What this machine lacks to lower to this target, in words; empty if nothing."""
        lacking = self.missing()  # first: importing some backends starts a download or fails slowly
        if lacking or not self.partitioner:
            return lacking
        module, _, name = self.partitioner.partition(":")
        try:
            with silence_libraries():
                for needed in self.needs:
                    importlib.import_module(needed)
                getattr(importlib.import_module(module), name)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a broken install raises any of them
            return str(error) or type(error).__name__
        return ""

    def partitioners(self) -> list[Any]:
        """The partitioner of this backend; none for plain kernels. Raises `EdgetuneError` if something is missing."""
        lacking = self.lacks()
        if lacking:
            raise EdgetuneError(
                f"target {self.name} cannot be lowered on this machine ({lacking})",
                action=self.install,
                exit_code=Exit.EXPORT,
            )
        if not self.partitioner:
            return []
        module, _, name = self.partitioner.partition(":")
        with silence_libraries():
            return [self.build(getattr(importlib.import_module(module), name), self)]

    def check(self, program: ExportedProgram) -> None:
        """Raise `EdgetuneError` (exit code 5) for a program in a form that the backend does not take."""
        form = form_of(program)
        if form in self.takes:
            return
        remedies = [FORMS[taken].how_to for taken in self.takes if FORMS[taken].how_to]
        raise EdgetuneError(
            f"target {self.name} does not take a model in {FORMS[form].description}",
            got=form,
            allowed=self.takes,
            action=f"{remedies[0]}, or choose another target" if remedies else "choose another target",
            exit_code=Exit.EXPORT,
        )

    def for_soc(self, soc: str) -> Target:
        """This target for the chip with the descriptor's `soc`; the target itself if it has no chips."""
        chips = [chip for begins, chip in self.chips if soc.startswith(begins)]
        if self.chips and not chips:
            raise EdgetuneError(
                f"target {self.name} does not know this chip",
                got=soc,
                allowed=[begins for begins, _ in self.chips],
                exit_code=Exit.EXPORT,
            )
        return replace(self, chip=chips[0]) if chips else self


def _backends() -> tuple[str, ...]:
    """The backends that this machine's executorch runtime was built with."""
    with silence_libraries():
        return tuple(load_runtime(None)._get_registered_backend_names())
