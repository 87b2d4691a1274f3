"""A backend as a value: how to reach it, what it takes, and whether this machine can run what comes out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch.export import ExportedProgram

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import quiet
from edgetune.export.targets.forms import FORMS, Form, form_of

WHEEL = "wheel"  # every executorch wheel runs it
EXTRA = 'pip install "edgetune[export]"'


@dataclass(frozen=True)
class Way:
    """One program's way through executorch's compiler. `passes` come after the house's own."""

    program: ExportedProgram
    partitioners: tuple[Any, ...]
    passes: tuple[Any, ...] = ()
    config: Any = None  # an EdgeCompileConfig; None: the house's
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)


def _plain(kind: Any, target: Target) -> Any:
    return kind()


def _nothing() -> str:
    return ""


def _straight(program: ExportedProgram, target: Target) -> Way:
    return Way(program, tuple(target.partitioners()))


@dataclass(frozen=True)
class Target:
    """How to reach one backend. Functions take the target itself, so that `chip` can be changed by `replace`."""

    name: str
    serves: str  # the hardware, in words
    partitioner: str  # `module:Class`, empty for plain kernels
    takes: tuple[Form, ...]  # models in other forms are refused before they are lowered
    runtime: str = ""  # WHEEL, the backend's name where a runtime could run it on a computer, or empty: never
    install: str = EXTRA  # what to do where something is missing
    needs: tuple[str, ...] = ()  # modules that must import before the partitioner does
    chip: str = ""  # which of the hardware the program is compiled for, where that matters
    chips: tuple[tuple[str, str], ...] = ()  # a device's `soc` begins with the first: the chip is the second
    missing: Callable[[], str] = _nothing  # what else is not on this machine: an SDK, a GPU
    build: Callable[[Any, Target], Any] = _plain  # from the class to the partitioner
    way: Callable[[ExportedProgram, Target], Way] = _straight

    @property
    def runs_here(self) -> bool:
        """Whether this machine can run the programs: its runtime has the backend, and nothing is missing."""
        if self.runtime in ("", WHEEL):
            return self.runtime == WHEEL
        return not self.lacks() and self.runtime in _backends()

    def lacks(self) -> str:
        """What this machine lacks to lower to this target, in words; empty where it lacks nothing."""
        lacking = self.missing()  # first: importing some backends downloads or fails at length
        if lacking or not self.partitioner:
            return lacking
        module, _, name = self.partitioner.partition(":")
        try:
            with quiet():
                for needed in self.needs:
                    importlib.import_module(needed)
                getattr(importlib.import_module(module), name)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a broken install raises any of them
            return str(error) or type(error).__name__
        return ""

    def partitioners(self) -> list[Any]:
        """The partitioner of this backend, ready to use, or the error that says what to install."""
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
        with quiet():
            return [self.build(getattr(importlib.import_module(module), name), self)]

    def check(self, program: ExportedProgram) -> None:
        """Raise `EdgetuneError` (exit code 5) for a program in a form that the backend does not take."""
        form = form_of(program)
        if form in self.takes:
            return
        ways = [FORMS[taken].way for taken in self.takes if FORMS[taken].way]
        raise EdgetuneError(
            f"target {self.name} does not take a model in {FORMS[form].told}",
            got=form,
            allowed=self.takes,
            action=f"{ways[0]}, or choose another target" if ways else "choose another target",
            exit_code=Exit.EXPORT,
        )

    def for_soc(self, soc: str) -> Target:
        """This target for the chip of a device, given the descriptor's `soc`; itself where that does not matter."""
        found = [chip for begins, chip in self.chips if soc.startswith(begins)]
        if self.chips and not found:
            raise EdgetuneError(
                f"target {self.name} does not know this chip",
                got=soc,
                allowed=[begins for begins, _ in self.chips],
                exit_code=Exit.EXPORT,
            )
        return replace(self, chip=found[0]) if found else self


def _backends() -> tuple[str, ...]:
    """The backends that this machine's executorch runtime was built with."""
    with quiet():
        from executorch.extension.pybindings import _portable_lib
    found: tuple[str, ...] = tuple(_portable_lib._get_registered_backend_names())
    return found
