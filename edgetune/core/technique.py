"""A technique is its settings plus `apply` and `finalize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.progress import Progress, ignore
from edgetune.core.traits import Trait
from edgetune.core.widths import BitWidths

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


Needs = Literal["nothing", "inputs", "batches", "labels"]


@dataclass(frozen=True)
class Sample:
    """Data for techniques: example inputs, and calibration batches, of which `batches` returns a new iterator.

    `inputs` is a tensor, a tuple of positional tensors or a dict of keyword tensors, batch first.
    `labelled` returns training batches `(inputs, labels)`, the one that needs the most memory first. `loss` maps
    `(logits, labels)` to a scalar. Both are for techniques that need gradients. `layers_ms` maps a model and a device
    to the predicted milliseconds of each module of its program, and of all else under "".

    Long work reports to `progress`, as `(stage, done, of, detail)`. In `folder` it stores what is done, and goes on
    from there if it was interrupted; it removes that at the end.
    """

    inputs: Inputs
    batches: Callable[[], Iterator[Inputs]]
    labelled: Callable[[], Iterator[tuple[Inputs, Tensor]]] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    progress: Progress = ignore
    folder: Path | None = None
    layers_ms: Callable[[nn.Module, str], Mapping[str, float]] | None = None

    @classmethod
    def of(cls, inputs: Inputs) -> Sample:
        """A sample whose only calibration batch is the example itself."""
        return cls(inputs=inputs, batches=lambda: iter([inputs]))

    def first_batches(self, count: int) -> list[Inputs]:
        """At most this many calibration batches, the first ones."""
        return list(islice(self.batches(), count))

    def labels(self) -> tuple[Callable[[], Iterator[tuple[Inputs, Tensor]]], Callable[[Tensor, Tensor], Tensor]]:
        """Return `labelled` and `loss`. Raises `EdgetuneError` if they are missing."""
        if self.labelled is None or self.loss is None:
            raise EdgetuneError(
                "batches with labels and a loss are needed",
                action="pass et.Sample(inputs, batches, labelled=..., loss=...)",
            )
        return self.labelled, self.loss

    def require_layers_ms(self) -> Callable[[nn.Module, str], Mapping[str, float]]:
        """Return `layers_ms`. Raises `EdgetuneError` if it is missing."""
        if self.layers_ms is None:
            raise EdgetuneError(
                "the times of layers on a device are needed",
                action="pass et.Sample(inputs, batches, layers_ms=...), or run a recipe, which predicts them",
            )
        return self.layers_ms


class _Explaining(ModelMetaclass):
    """Raises an `EdgetuneError` for wrong settings, instead of pydantic's `ValidationError`."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        if args:
            first = next(iter(cls.model_fields), "setting")  # type: ignore[attr-defined]
            action = f"write {cls.__name__}({first}=...)"
            raise EdgetuneError("settings must be given by name", where=cls.__name__, got=args[0], action=action)
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            invalid = error
        from edgetune.core.places import format_path, raise_all
        from edgetune.core.validated import explain_errors

        problems = explain_errors(cls, invalid)  # type: ignore[arg-type]
        raise_all(cls.__name__, [p.at(", ".join(filter(None, (cls.__name__, format_path(p.path))))) for p in problems])
        raise invalid


class Settings(BaseModel, metaclass=_Explaining):
    """Base of all settings: immutable, no unknown fields, and errors in plain words.

    A field is described by the string under it, which the JSON Schema and `docs/recipes.md` show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class StepSettings(Settings):
    """Base of a recipe's steps: techniques, `train`, `eval`, `finalize`. `core.order` reads the traits.

    `takes`: what the model may be before the step. Open techniques that are not taken are finalized first; permanent
    traits, such as integer weights, are an error.
    `leaves`: what the model is afterwards, in addition.
    `closes`: the step finalizes whatever is open.
    """

    name: ClassVar[str]
    takes: ClassVar[Trait] = ~Trait.PLAIN
    leaves: ClassVar[Trait] = Trait.PLAIN
    closes: ClassVar[bool] = False

    @classmethod
    def needs_finalize(cls) -> bool:
        """Whether `finalize` has something to do."""
        return False


class Technique(StepSettings):
    """Settings of a technique. Subclasses define `name`, `takes`, `leaves` and `apply`; most need nothing else.

    No technique names another one. `exact`: `apply` does not change the outputs of the model. `continues`: a model
    that it leaves can continue a text token by token, as a text-generation program does. `guards`: it takes a language
    model, and returns a classifier of texts with the language model inside.
    """

    takes: ClassVar[Trait] = Trait.PLAIN
    exact: ClassVar[bool] = False
    continues: ClassVar[bool] = True
    guards: ClassVar[bool] = False

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Change `model` in place, and return it or the module that replaces it."""
        raise NotImplementedError

    def finalize(self, model: nn.Module) -> nn.Module:
        """After training, merge, freeze or pack, so that only plain layers remain. By default this does nothing."""
        return model

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term of the training loss while the technique is open, a scalar with a gradient; by default none."""
        return None

    @classmethod
    def needs_finalize(cls) -> bool:
        """Whether `finalize` has something to do."""
        return cls.finalize is not Technique.finalize

    @property
    def needs(self) -> Needs:
        """What `apply` needs from the sample with these settings: nothing, example inputs, batches, or labels too."""
        return "nothing"

    @property
    def width_multiple(self) -> int:
        """The number that must divide the input width of every layer that this technique changes."""
        return 1

    @property
    def rounding(self) -> Mapping[str, object]:
        """How this technique rounds weights, as settings of one that trains for it beforehand; by default it does
        not."""
        return {}

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """This technique with defaults adapted to the techniques that follow; settings that were given do not
        change."""
        return self

    def for_rehearsal(self) -> Technique:
        """These settings with less work for the same structure, to try a recipe's steps before the training."""
        return self

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Give a plain model the structure that this technique leaves, without its work, and return it.

        `state`: the tensors that the model will load, by name. By default the structure does not change.
        """
        return model

    @property
    def batches_wanted(self) -> int | None:
        """How many calibration batches `apply` may look at; `None`: as many as there usually are."""
        return getattr(self, "calibration_batches", None)

    def note(self, model: nn.Module) -> str:
        """What `apply` chose and left, or what `finalize` changed, in a sentence for the ledger; by default nothing."""
        return ""

    def bit_widths(self, model: nn.Module) -> BitWidths | None:
        """The precisions that `apply` gave the layers, for the report; by default none."""
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save separate results in `folder`, such as an adapter before finalizing. By default this does nothing."""

    def require_sample(self, sample: Sample | None) -> Sample:
        """The sample, checked for what this technique needs. Raises `EdgetuneError` if that is missing."""
        if sample is None:
            raise EdgetuneError(
                f"{self.name} needs example inputs",
                action="pass sample=et.Sample.of(example_inputs) to et.apply",
            )
        if self.needs == "labels":
            sample.labels()
        return sample


def adapt_defaults(steps: Sequence[Any]) -> list[Any]:
    """The steps, with each technique's defaults adapted to those after it."""

    def later(index: int) -> list[Technique]:
        return [step for step in steps[index + 1 :] if isinstance(step, Technique)]

    return [step.adapt_to(later(n)) if isinstance(step, Technique) else step for n, step in enumerate(steps)]
