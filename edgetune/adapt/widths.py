"""How wide the tensors are that modules take and return: as linears state it, or as the others run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgetune.core.carriers import plain_layer
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.technique import Sample


def read_widths(
    model: nn.Module, modules: Mapping[str, nn.Module], sample: Sample | None = None
) -> dict[str, tuple[int, int]]:
    """The last dimension of what each module takes first and of what it returns.

    Raises `EdgetuneError` for modules that are no linears: without a sample, and where one of the two is no tensor; and
    for convolutions and tables, whose width is another dimension.
    """
    for name, module in modules.items():
        odd = next((inner for inner in module.modules() if isinstance(inner, (_ConvNd, nn.Embedding))), None)
        if odd is not None:
            message = f"{name}: an adapter is for modules over (..., width)"
            raise EdgetuneError(message, got=type(odd).__name__, action=f'add "{name}" to skip')
    linears: dict[str, Any] = {name: plain_layer(module) for name, module in modules.items()}
    widths = {
        name: (layer.in_features, layer.out_features)
        for name, layer in linears.items()
        if hasattr(layer, "in_features") and hasattr(layer, "out_features")
    }
    others = {name: module for name, module in modules.items() if name not in widths}
    if not others:
        return widths
    if sample is None:
        raise EdgetuneError(
            "example inputs are needed to read the widths of modules that are no linears",
            got=list(others),
            action="pass sample=et.Sample.of(example_inputs) to et.apply, or target linears",
        )
    with ExitStack() as hooks, preserve_state(model), preserve_buffers(model), torch.no_grad():
        for name, module in others.items():
            hooks.enter_context(module.register_forward_hook(_recorder(name, widths), with_kwargs=True))
        call(model, sample.inputs)
    unread = [name for name in others if name not in widths]
    if unread:
        raise EdgetuneError(
            "these modules never run, or do not take and return a tensor (..., width)",
            got=unread,
            action="target the linear inside, such as *.output.dense, or add them to skip",
        )
    return widths


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module was given first, by place or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _recorder(name: str, widths: dict[str, tuple[int, int]]) -> Any:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = first_input(args, kwargs)
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.dim() and x.is_floating_point():
            widths[name] = x.shape[-1], output.shape[-1]

    return record
