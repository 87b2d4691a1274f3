"""What torch wraps around a whole model: `torch.compile`, DataParallel, DistributedDataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgetune.core.errors import EdgetuneError

COMPILED, PARALLEL = "_orig_mod", "module"  # under which names they hold it


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model itself, without torch's wrappers."""
    while (name := _inner_name(model)) is not None:
        model = getattr(model, name)
    return model


def rewrap_model(outer: nn.Module, model: nn.Module) -> nn.Module:
    """`outer` with `model` in place of the model that it wrapped; `model` itself if `outer` is not a wrapper.

    Also `model` itself if `outer` was built for the old parameters, as DistributedDataParallel is.
    """
    if unwrap_model(outer) is outer or is_distributed(outer):
        return model
    holder: Any = outer
    while _inner_name(getattr(holder, _inner_name(holder) or "")) is not None:
        holder = getattr(holder, _inner_name(holder) or "")
    setattr(holder, _inner_name(holder) or "", model)
    return outer


def refuse_sharded(model: nn.Module) -> None:
    """Raise if no process holds whole weights (FSDP2)."""
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise EdgetuneError(
            "the model's weights are sharded over processes",
            got=type(model).__name__,
            action="gather them (torch.distributed.checkpoint.state_dict.get_model_state_dict, full_state_dict=True), "
            "and load them into the same model, with the same techniques applied, in one process",
        )


def refuse_distributed(model: nn.Module) -> None:
    """Raise for a model that is already distributed: its new parameters would differ between processes."""
    refuse_sharded(model)
    if is_distributed(model):
        raise EdgetuneError(
            f"{type(model).__name__} only knows the parameters that the model had when it was wrapped",
            got=type(model).__name__,
            action="apply techniques first: model = et.apply(model, ...), then wrap it",
        )


def is_distributed(model: nn.Module) -> bool:
    """Whether the model, or a wrapper around it, synchronizes gradients between processes."""
    names = {c.__name__ for module in (model, unwrap_model(model)) for c in type(module).__mro__}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})


def _inner_name(model: nn.Module) -> str | None:
    kinds = {(c.__module__.split(".")[0], c.__name__) for c in type(model).__mro__}
    if ("torch", "OptimizedModule") in kinds:
        return COMPILED
    parallel = {("torch", name) for name in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")}
    return PARALLEL if kinds & parallel else None


def plain_name(name: str) -> str:
    """A dotted name or key as it was before `torch.compile`.

    >>> plain_name("blocks.0._orig_mod.up.weight")
    'blocks.0.up.weight'
    """
    return ".".join(part for part in name.split(".") if part != COMPILED)
