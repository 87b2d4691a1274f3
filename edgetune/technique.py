"""The one abstraction: a technique is its settings plus `apply` and `finalize`. And the one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Union

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from edgetune.other_names import nearest

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

Inputs = Union[Tensor, "tuple[Tensor, ...]", "dict[str, Tensor]"]


class Exit(IntEnum):
    """Exit codes of the command line, and what an `EdgetuneError` asks for."""

    DONE = 0
    USAGE = 2
    DATA = 3
    BUDGET = 4
    EXPORT = 5
    INTERRUPTED = 130


class EdgetuneError(ValueError):
    """An error message with its location, the value, the allowed values and one next action.

    Inner code states the problem, and outer code adds the location:

    >>> error = EdgetuneError("unknown scheme", got="last2", allowed=["last-2", "bias"], action="pick a scheme")
    >>> print(error.within("recipe.yaml, step 1, sparse-update"))
    recipe.yaml, step 1, sparse-update: unknown scheme: got 'last2'; allowed: last-2, bias; did you mean 'last-2'?
      next: pick a scheme
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: object = None,
        allowed: Iterable[str] = (),
        action: str = "",
        near: str | None = None,
        exit_code: Exit = Exit.USAGE,
    ) -> None:
        """`near`: what was probably meant; by default the allowed name that is spelt most like `got`."""
        self.what, self.where, self.got, self.action, self.near = what, where, got, action, near
        self.allowed, self.exit_code = tuple(allowed), exit_code
        super().__init__(what)

    def within(self, where: str) -> EdgetuneError:
        """The same error with `where` in front of its location."""
        self.where = f"{where}, {self.where}" if self.where else where
        return self

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        details = []
        if self.got is not None:
            details.append(f"got {_in_a_line(self.got)}")
        if self.allowed:
            details.append("allowed: " + shortened(self.allowed))
        near = self.near
        if near is None:
            near = nearest(str(self.got), self.allowed) if isinstance(self.got, (str, int)) else ""
        if near:
            details.append(f"did you mean {near!r}?")
        if details:
            text += ": " + "; ".join(details)
        return f"{text}\n  next: {self.action}" if self.action else text


def _in_a_line(value: object, most: int = 200) -> str:
    """How an error shows a value: a whole model that was given for a number is cut."""
    text = " ".join(repr(value).split()) if not isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."


def shortened(names: Iterable[str], most: int = 12) -> str:
    """The names joined by commas, cut after `most` with the number left out."""
    listed = list(names)
    rest = f" ... and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


@dataclass(frozen=True)
class Sample:
    """Data for techniques: example inputs, and calibration batches, which `batches` returns anew at each call.

    `inputs` is a tensor, a tuple of positional tensors or a dict of keyword tensors, batch first.
    `labelled` returns training batches `(inputs, labels)`, the one that needs the most memory first. `loss` maps
    `(logits, labels)` to a scalar. Both are for techniques that need gradients.
    """

    inputs: Inputs
    batches: Callable[[], Iterator[Inputs]]
    labelled: Callable[[], Iterator[tuple[Inputs, Tensor]]] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(cls, inputs: Inputs) -> Sample:
        """A sample whose only calibration batch is the example itself."""
        return cls(inputs=inputs, batches=lambda: iter([inputs]))

    def labels(self) -> tuple[Callable[[], Iterator[tuple[Inputs, Tensor]]], Callable[[Tensor, Tensor], Tensor]]:
        """Return `labelled` and `loss`. Raises `EdgetuneError` if they are missing."""
        if self.labelled is None or self.loss is None:
            raise EdgetuneError(
                "batches with labels and a loss are needed",
                action="pass et.Sample(inputs, batches, labelled=..., loss=...)",
            )
        return self.labelled, self.loss


class _Explaining(ModelMetaclass):
    """Makes settings, and says what is wrong with them as an `EdgetuneError`, where pydantic has one of its own."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        if args:
            first = next(iter(cls.model_fields), "setting")  # type: ignore[attr-defined]
            action = f"write {cls.__name__}({first}=...)"
            raise EdgetuneError("settings must be given by name", where=cls.__name__, got=args[0], action=action)
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            invalid = error
        from edgetune.document import dotted, raise_all
        from edgetune.validated import problems_of

        problems = problems_of(cls, invalid)  # type: ignore[arg-type]
        raise_all(cls.__name__, [p.at(", ".join(filter(None, (cls.__name__, dotted(p.path))))) for p in problems])
        raise invalid


class Settings(BaseModel, metaclass=_Explaining):
    """Base of all settings: immutable, no unknown fields, and errors in plain words.

    A field is described by the string under it, which the JSON Schema and `docs/recipes.md` show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class Technique(Settings):
    """Settings of a technique. Subclasses define `name`, `after` and `apply`; most need nothing else.

    `after` names the techniques that may precede this one in a recipe; it is checked before any work.
    `plain`: this technique needs plain layers, so all applied techniques are finalized first.
    `replaces`: if this technique is already applied, it is finalized before it is applied again.
    `exact`: `apply` does not change the outputs of the model.
    `leaves`: what the technique adds, which is `adapter` (tensors in addition to frozen layers) or `packed` (layers
    in another storage format).
    """

    name: ClassVar[str]
    after: ClassVar[frozenset[str]] = frozenset()
    plain: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    leaves: ClassVar[frozenset[str]] = frozenset()

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Change `model` in place, and return it or the module that replaces it."""
        raise NotImplementedError

    def finalize(self, model: nn.Module) -> nn.Module:
        """After training, merge, freeze or pack, so that only plain layers remain. By default this does nothing."""
        return model

    @property
    def opens(self) -> bool:
        """Whether `finalize` has something to do."""
        return type(self).finalize is not Technique.finalize

    @property
    def width_multiple(self) -> int:
        """The number that must divide the input width of every layer that this technique changes."""
        return 1

    def fitted(self, later: Sequence[Technique]) -> Technique:
        """This technique with defaults adapted to the techniques that follow; settings that were given do not
        change."""
        return self

    def save(self, model: nn.Module, folder: Path) -> None:
        """Before finalizing, save separate results such as an adapter in `folder`. By default this does nothing."""

    def needs_sample(self, sample: Sample | None) -> Sample:
        """Return the sample. Raises `EdgetuneError` if there is none."""
        if sample is None:
            raise EdgetuneError(
                f"{self.name} needs example inputs",
                action="pass sample=et.Sample.of(example_inputs) to et.apply",
            )
        return sample


def fitted(steps: Sequence[Any]) -> list[Any]:
    """The steps, each technique with the defaults that suit those after it."""
    techniques = [(n, step) for n, step in enumerate(steps) if isinstance(step, Technique)]
    return [
        step.fitted([other for at, other in techniques if at > n]) if isinstance(step, Technique) else step
        for n, step in enumerate(steps)
    ]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on inputs of any of the three forms."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, what is called `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise EdgetuneError(
            "the output of the model has no logits",
            got=type(output).__name__,
            action='return a tensor, a tuple that begins with one, a mapping with "logits", or an object with .logits',
        )
    return found


def tensors_of(inputs: Inputs) -> tuple[Tensor, ...]:
    """The tensors of the inputs, in order."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, dict) else tuple(inputs)


def rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows `start:stop` of every tensor, in the same form."""
    if isinstance(inputs, Tensor):
        return inputs[start:stop]
    if isinstance(inputs, dict):
        return {name: value[start:stop] for name, value in inputs.items()}
    return tuple(value[start:stop] for value in inputs)


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs on `device`, in the same form."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: value.to(device) for name, value in inputs.items()}
    return tuple(value.to(device) for value in inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
