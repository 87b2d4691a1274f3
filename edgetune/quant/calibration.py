"""Run a model on calibration batches, and measure the inputs of its linears there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgetune.capture.fast_path import slow_path
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, device_of, tensors_in, to_device, token_mask
from edgetune.core.modes import preserve_buffers, preserve_state

_TOKENS = 256


class InputSizes(NamedTuple):
    """How large each input of a linear is over all tokens."""

    largest: Tensor  # `(in,)`, the largest absolute value
    mean_square: Tensor  # `(in,)`
    tokens: Tensor  # `(tokens, in)`, some of the inputs, evenly spaced


def measure_inputs(
    model: nn.Module, linears: Mapping[str, nn.Module], batches: Sequence[Inputs]
) -> dict[str, InputSizes]:
    """The sizes of the inputs of the linears that a batch reaches. Padded tokens do not count.

    Raises `EdgetuneError` for batches without rows or on which the model does not run, and for inputs that are not
    finite.
    """
    batches = usable_batches(model, batches)
    kept = -(-_TOKENS // len(batches))  # of a batch
    tokens: dict[str, list[Tensor]] = {}
    largest: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(mask: Tensor | None, name: str, inputs: Tensor) -> None:
        x = select_tokens(inputs, mask)
        if len(x):
            most = x.abs().amax(0)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
            squares[name] = squares.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)
            tokens.setdefault(name, []).append(x[:: -(-len(x) // kept)].clone())

    with evaluation(model), torch.no_grad():
        for batch in batches:
            with watch_inputs(linears, partial(add, token_mask(batch))):
                run_on(model, batch)
    refuse_infinite_inputs(name for name, total in squares.items() if not bool(torch.isfinite(total).all()))
    return {
        name: InputSizes(largest[name], squares[name] / counts[name], torch.cat(tokens[name]))
        for name in linears
        if name in largest
    }


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and calls all its layers; afterwards it is as before."""
    with preserve_state(model), preserve_buffers(model), slow_path(model):
        yield


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, each call of a layer is one of `watch` with its name and input."""

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        watch(name, args[0] if args else kwargs["input"])

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        yield


def usable_batches(model: nn.Module, batches: Iterable[Inputs]) -> list[Inputs]:
    """The batches that have rows, on the model's device."""
    device = device_of(model)
    usable = [to_device(batch, device) for batch in batches if any(t.numel() for t in tensors_in(batch))]
    if not usable:
        raise EdgetuneError(
            "there are no calibration batches, or they have no rows",
            action="pass et.Sample(inputs, batches) with rows",
        )
    return usable


def run_on(model: nn.Module, batch: Inputs) -> Any:
    """What the model returns. Raises `EdgetuneError` where it fails."""
    try:
        return call(model, batch)
    except EdgetuneError:
        raise
    except Exception as error:  # whatever a forward raises
        raise EdgetuneError(
            f"the model does not run on its calibration batches ({type(error).__name__}: {error})",
            action="pass et.Sample(inputs, batches) with batches that the model takes",
        ) from error


def refuse_infinite_inputs(layers: Iterable[str]) -> None:
    """Raise if there are layers whose inputs are not finite."""
    names = list(layers)
    if names:
        raise EdgetuneError(
            f"the inputs of these layers are not finite on the calibration batches: {truncate_list(names)}",
            action="look for NaN or infinity in the sample and the weights",
        )


def select_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs of a layer as `(tokens, in)` in fp32, without padding."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        x = x[mask]
    elif mask is not None and x.dim() == 2 and len(x) == mask.numel():
        x = x[mask.flatten()]
    return x.reshape(-1, x.shape[-1]).float()
