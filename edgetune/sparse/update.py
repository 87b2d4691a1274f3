"""Sparse backpropagation: only some layers train, and backward stops at the last layer that needs one.

The idea of updating few layers, biases first, to save activation memory is that of TinyTL (Cai et al., 2020,
arXiv:2007.11622) and of sparse update (Lin et al., 2022, arXiv:2206.15472).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from edgetune.core import trainable
from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.layers import parameter_layers, replace
from edgetune.core.merging import merge
from edgetune.core.peft_layers import is_peft
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.frozen import SAVING_INPUT, FrozenLayer, FrozenStage, remove_hooks
from edgetune.lean.operators import Activations, put_on_operators, take_off_operators
from edgetune.lean.reads import FirstForward, refuse_read_elsewhere
from edgetune.lean.stages import stages_of
from edgetune.sparse.scheme import Part, Scheme, Slice, Under, WrittenPart, part_to_json, resolve, trains
from edgetune.sparse.sliced import Sliced, refuse_unfollowed, strongest_channels

_SCHEME = "edgetune_scheme"  # the attribute of a model that says what trains, while sparse-update is open
_SCORED_BATCHES = 4  # that slices by gradient or Fisher information look at


class SparseUpdate(Technique):
    """Train only the layers of `scheme`. The frozen layers before them run without a graph and without dropout.

    `scheme`: `last-2` (or another number) trains the last blocks and everything between them, `bias` all biases,
    `bert-pockengine` the biases of the last half of the blocks and the weights of the last third. It can also be a
    mapping of patterns, `{"encoder.layer.5": "full", "*.query": "bias", "*.intermediate.dense": 0.25}`: a later
    pattern takes precedence, a pattern includes all layers inside those it matches, and layers without a pattern are
    frozen. A number is the share of a weight's input channels that train, those of largest magnitude; see `Slice`
    for other selections. `auto` selects the most useful layers within `budget_mib` of training memory and, if given,
    within `step_ms`; it needs labelled batches. With `activations="8bit"` gradients are approximate, with bounds
    stated in `edgetune/lean`.
    """

    name: ClassVar[str] = "sparse-update"
    takes: ClassVar[Trait] = Trait.PACKED | Trait.LEAN
    leaves: ClassVar[Trait] = Trait.FROZEN
    exact: ClassVar[bool] = True

    scheme: str | dict[str, WrittenPart] = "last-2"
    """What to train: `last-2` (or another number of last blocks), `bias`, `bert-pockengine`, `auto` (with
    `budget_mib`), or a mapping from layer patterns to `full`, `bias`, `frozen`, a share of the channels, or a slice."""
    head: Literal["full", "bias", "frozen"] = "full"
    """What to train of the layers after the last block."""
    norms: bool = True
    """Also train the normalization layers within the scheme."""
    activations: Activations = "exact"
    """Precision of the values saved for backward; `8bit` needs less memory and makes gradients approximate."""
    budget_mib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Maximum training memory for the scheme `auto`, in MiB."""
    step_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Maximum time of an update on this machine for the scheme `auto`, in ms; `null`: no limit."""

    @field_validator("scheme")
    @classmethod
    def _not_empty(cls, scheme: str | dict[str, WrittenPart]) -> str | dict[str, WrittenPart]:
        if not scheme:
            raise ValueError('an empty scheme; write "last-2", "bias" or patterns')
        return scheme

    @model_validator(mode="after")
    def _budget_of_auto(self) -> SparseUpdate:
        if (self.scheme == "auto") != (self.budget_mib is not None):
            raise ValueError('scheme "auto" and budget_mib go together')
        if self.step_ms is not None and self.scheme != "auto":
            raise ValueError('step_ms is a limit for scheme "auto"')
        return self

    @property
    def needs(self) -> Needs:
        """Labels, for what is chosen by gradients."""
        parts = self.scheme.values() if isinstance(self.scheme, dict) else ()
        by_gradient = any(isinstance(part, Slice) and part.by != "magnitude" for part in parts)
        return "labels" if by_gradient or self.scheme == "auto" else "nothing"

    def resolve(self, model: nn.Module, sample: Sample | None = None) -> Scheme:
        """What this would train in `model`, as a printable value. It changes nothing. `auto` needs the sample."""
        if self.budget_mib is None:
            return resolve(model, self.scheme, self.head, self.norms, sample)
        from edgetune.sparse.auto.choose import choose

        sample = self.require_sample(sample)
        return choose(
            model, sample, self.budget_mib, self.step_ms, under=self.under(model), head=self.head, norms=self.norms
        ).scheme

    def under(self, model: nn.Module) -> Under:
        """Inside `under(parts)` the model trains these parts alone, by these settings; then it is as it was."""

        @contextmanager
        def training(parts: Mapping[str, Part]) -> Iterator[None]:
            written = {name: parts.get(name, "frozen") for name in parameter_layers(model)}
            update = {"scheme": written, "head": "frozen", "norms": True, "budget_mib": None, "step_ms": None}
            technique = self.model_copy(update=update)
            technique.apply(model)
            try:
                yield
            finally:
                technique.finalize(model)

        return training

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Set what trains, in place, and add hooks to the frozen stages and layers."""
        if any(is_peft(module) for module in model.modules()):
            raise EdgetuneError("sparse-update would freeze the adapters", action="put sparse-update before lora")
        scheme = self.resolve(model, sample)
        slices = {c.layer: c.part for c in scheme.choices if isinstance(c.part, Slice)}
        for name in slices:
            refuse_unfollowed(name, model.get_submodule(name))
        refuse_read_elsewhere(model, slices, sample)
        scores = self._scores(model, slices, sample)
        chosen = {
            name: strongest_channels(model.get_submodule(name), part.ratio, part.of, scores.get(name))
            for name, part in slices.items()
        }
        trainable.remember(model, self.name, chooses=True)
        setattr(model, _SCHEME, scheme)
        for choice in scheme.choices:
            layer = model.get_submodule(choice.layer)
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    parameter.requires_grad_(trains(choice.part, key))
            if choice.part in ("bias", "frozen") and isinstance(layer, SAVING_INPUT):
                FrozenLayer().put_on(layer)
        for name, (indices, dim) in chosen.items():
            replace(model, name, Sliced(model.get_submodule(name), indices, dim))
        for stage in stages_of(model):
            FrozenStage().put_on(stage)
        put_on_operators(model, self.activations)
        return model

    def _scores(self, model: nn.Module, slices: dict[str, Slice], sample: Sample | None) -> dict[str, Tensor]:
        """Of the slices that are chosen by gradients: what each value of the weight counts."""
        scores: dict[str, Tensor] = {}
        for by in sorted({part.by for part in slices.values()} - {"magnitude"}):
            from edgetune.sparse.auto.contribution import weight_scores

            names = [name for name, part in slices.items() if part.by == by]
            labelled, loss = self.require_sample(sample).labels()
            scores |= weight_scores(model, names, itertools.islice(labelled(), _SCORED_BATCHES), loss, by)
        return scores

    def finalize(self, model: nn.Module) -> nn.Module:
        """Remove the hooks and merge the slices. What was trainable before `apply` is trainable again."""
        if hasattr(model, _SCHEME):
            delattr(model, _SCHEME)
        remove_hooks(model, (FrozenLayer, FrozenStage, FirstForward))
        take_off_operators(model)
        model = merge(model, lambda layer: isinstance(layer, Sliced))
        trainable.recall(model, self.name)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the choice of `auto` in `folder/scheme.yaml`, in the format of a recipe."""
        import yaml

        scheme: Scheme = getattr(model, _SCHEME)
        if self.scheme != "auto":
            return
        written = {name: part_to_json(part) for name, part in scheme.to_mapping().items()}
        comment = "".join(f"# {line}\n" for line in str(scheme).splitlines())
        write_atomically(folder / "scheme.yaml", comment + yaml.safe_dump({"scheme": written}, sort_keys=False))
