"""`apply` and `finalize` techniques on a model, outside of any recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.holders import refuse_distributed, refuse_sharded, rewrap_model, unwrap_model
from edgetune.core.layers import replace
from edgetune.core.merging import merge_foreign_layers
from edgetune.core.order import plan_steps
from edgetune.core.registry import TECHNIQUES
from edgetune.core.technique import Sample, Technique, adapt_defaults
from edgetune.core.traits import OPEN

_OPEN = "edgetune_techniques"  # the attribute of a model that lists what is open on it, in order


def active_techniques(model: nn.Module) -> tuple[Technique, ...]:
    """The techniques applied to `model` and not finalized yet, in order, and those whose traits stay for good."""
    return tuple(getattr(model, _OPEN, ()))


def add_active_technique(model: nn.Module, technique: Technique) -> None:
    """Record that a technique is applied to `model`, so that `finalize` finalizes it."""
    setattr(model, _OPEN, [*active_techniques(model), technique])


def apply(model: nn.Module, techniques: Technique | Sequence[Technique], sample: Sample | None = None) -> nn.Module:
    """Apply techniques in order, in place. Returns the model, or the module that replaces it.

    Args:
        model: any `nn.Module`.
        techniques: one technique, or several in order. A technique that needs plain layers, or that is already
            applied, first finalizes the applied ones. Defaults that are not set are adapted to the techniques that
            follow.
        sample: example inputs and calibration batches, for techniques that need data.

    Raises:
        EdgetuneError: an invalid order, targets that match nothing, or a missing sample.
    """
    check_model(model, "apply")
    if sample is not None and not isinstance(sample, Sample):
        action = "write sample=et.Sample.of(inputs)"
        raise EdgetuneError("sample is not a Sample", where="et.apply", got=type(sample).__name__, action=action)
    outer, model = model, unwrap_model(model)
    refuse_distributed(outer)
    steps = adapt_defaults(_as_list(techniques))
    for technique in steps:
        if technique.needs != "nothing":
            technique.require_sample(sample)
    for move in plan_steps(steps, active_techniques(model)):
        technique = steps[move.index]
        if move.implied:
            model = finalize(model)
            continue
        before = active_techniques(model)
        try:
            model = technique.apply(model, sample)
        except EdgetuneError as error:
            error.within(technique.name)
            raise
        setattr(model, _OPEN, [*before, technique])  # on the module that `apply` returned, which may be another
    return rewrap_model(outer, model)


def _as_list(techniques: object) -> list[Technique]:
    if isinstance(techniques, Technique):
        return [techniques]
    several = isinstance(techniques, Iterable) and not isinstance(techniques, (str, Mapping))
    listed: list[Technique] = []
    for other in techniques if several else [techniques]:  # type: ignore[attr-defined]
        if not isinstance(other, Technique):
            raise EdgetuneError("not a technique", where="et.apply", got=other, action=_suggest_technique(other))
        listed.append(other)
    return listed


def _suggest_technique(other: object) -> str:
    if isinstance(other, type) and issubclass(other, Technique):
        required = [name for name, field in other.model_fields.items() if field.is_required()]
        return f"make an object of the class: et.{other.__name__}({', '.join(f'{name}=...' for name in required)})"
    name = next(iter(other), None) if isinstance(other, Mapping) else getattr(other, "name", other)
    if name == "train":
        return "train in your own loop between et.apply and et.finalize, or with a step of a recipe"
    if isinstance(name, str) and name in TECHNIQUES:
        return f"write et.{TECHNIQUES[name].rpartition(':')[2]}(...), with its settings by name"
    return "write [et.LoRA(rank=8, targets=[...])], one object for each technique"


def check_model(model: object, verb: str) -> None:
    """Raise if the first argument of `et.<verb>` is not a module."""
    if not isinstance(model, nn.Module):
        action = f"give et.{verb} an nn.Module first"
        raise EdgetuneError("not a model", where=f"et.{verb}", got=model, action=action)


def penalty(model: nn.Module) -> Tensor | None:
    """What the active techniques of `model` add to the training loss; `None`: nothing."""
    terms = [technique.penalty(model) for technique in active_techniques(unwrap_model(model))]
    added = [term for term in terms if term is not None]
    return torch.stack(added).sum() if added else None


def finalize(model: nn.Module) -> nn.Module:
    """Finalize all applied techniques in reverse order, so that only plain layers remain. Returns the model.

    This includes techniques on a model inside this one (your own wrapper module, DistributedDataParallel, a
    compiled model), peft's tuner layers of any family, and 4-bit linear layers from other libraries.
    DistributedDataParallel and `PeftModel` are removed: the model inside is returned.

    Raises `EdgetuneError` for an adapter that no plain layer can represent, or that does not change layers (prompt
    tuning).
    """
    check_model(model, "finalize")
    refuse_sharded(model)
    model = rewrap_model(model, _finalize_own(unwrap_model(model)))
    inner = {name: module for name, module in model.named_modules() if name and active_techniques(module)}
    for name, module in reversed(inner.items()):  # the innermost first
        replace(model, name, _finalize_own(module))
    return merge_foreign_layers(model)


def _finalize_own(model: nn.Module) -> nn.Module:
    """Finalize the techniques of this module, not of those inside it."""
    techniques = list(active_techniques(model))
    lasting = [technique for technique in techniques if technique.leaves & ~OPEN]
    while techniques:
        technique = techniques.pop()
        try:
            model = technique.finalize(model)
        except EdgetuneError as error:
            error.within(f"{technique.name}, finalize")
            raise
        setattr(model, _OPEN, list(techniques))
    if lasting:  # so that what such a model does not take is still refused
        setattr(model, _OPEN, lasting)
    elif hasattr(model, _OPEN):
        delattr(model, _OPEN)
    return model
