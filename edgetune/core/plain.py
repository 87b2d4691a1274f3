"""Check that a layer computes what its class does: the functional of its class with its own weight and bias.

Weight norm, spectral norm and parametrizations compute the weight at each call; standardized and scaled layers change
it
in their own forward. A technique that reads `layer.weight` would be wrong on those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError
from edgetune.core.modes import preserve_state
from edgetune.core.probe import probe_inputs, relative_difference


def refuse_computed(name: str, layer: nn.Module) -> None:
    """Raise unless the layer equals the functional of its class with its own weight and bias.

    Checks linears, convolutions, embeddings and transformers' Conv1D; layers of other classes pass. A layer with its
    own
    forward is called on random input in both modes, without its hooks, and is restored afterwards. On the meta device
    there are no values to compare: the forward must be that of its class.
    """
    reason = describe_computation(layer)
    if reason:
        raise EdgetuneError(
            f"{name} computes more than its class does: {reason}", got=type(layer).__name__, action=_action(name, layer)
        )


def _action(name: str, layer: nn.Module) -> str:
    skip = f'add "{name}" to skip'
    if parametrize.is_parametrized(layer):
        return f'{skip}, or make it plain first: torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
    remedy = "torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove"
    return f"{skip}, or make it plain first: {remedy}" if computed_tensor(layer) else skip


def computed_tensor(layer: nn.Module) -> str:
    """`weight` or `bias` if the layer computes it at each call, so that it is not a parameter; else ""."""
    for key in ("weight", "bias"):
        if getattr(layer, key, None) is not layer._parameters.get(key):
            return key
    return ""


def describe_computation(layer: nn.Module) -> str:
    """What the layer computes beyond its class; "" for a plain layer or a class that is not checked."""
    kind = kind_of(layer)
    if kind is None or is_wrapped(layer):
        return ""
    for key in ("weight", "bias"):
        if parametrize.is_parametrized(layer, key):
            return describe_parametrization(key, layer.parametrizations[key])  # type: ignore[union-attr, index, arg-type]
    key = computed_tensor(layer)
    if key:
        return f"its {key} is not a parameter but computed at each call, as by weight_norm or prune"
    weight = layer._parameters["weight"]
    if weight is not None and nn.parameter.is_lazy(weight):
        return "it has no weight before its first forward; run the model once"
    if is_stock(layer):
        return ""
    if weight is None or weight.is_meta:
        return "it has its own forward, and there are no values yet to compare its output with"
    if not weight.is_floating_point():
        return f"it has its own forward, over a weight stored in {weight.dtype}"
    if getattr(layer, "max_norm", None) is not None:
        return "it has its own forward, in which max_norm rewrites its rows"
    for training in (False, True):
        difference = _describe_difference(layer, kind, training)
        if difference:
            return difference
    return ""


def describe_parametrization(key: str, steps: parametrize.ParametrizationList) -> str:
    """What computes the weight or bias, in words."""
    return f"its {key} is parametrized by {', '.join(type(step).__name__.strip('_') for step in steps)}"


def kind_of(layer: nn.Module) -> str | None:
    """The class of torch (or transformers' Conv1D) that the layer belongs to; None for any other."""
    return next((kind for kind in _FUNCTIONALS if _is_a(layer, kind)), None)


def _is_a(layer: nn.Module, kind: str) -> bool:
    own = getattr(nn, kind, None)
    return isinstance(layer, own) if own is not None else any(c.__name__ == kind for c in type(layer).__mro__)


def is_stock(layer: nn.Module) -> bool:
    """Whether its forward is that of its class in torch (or of transformers' Conv1D)."""
    kind = kind_of(layer)
    if kind is None or "forward" in layer.__dict__ or type(layer).__call__ is not nn.Module.__call__:
        return False
    own = getattr(nn, kind, None)
    if own is None:
        return type(layer).__name__ == kind and type(layer).__module__.startswith("transformers.")
    inner = getattr(own, "_conv_forward", None)
    return type(layer).forward is own.forward and getattr(type(layer), "_conv_forward", None) is inner


def _describe_difference(layer: nn.Module, kind: str, training: bool) -> str:
    refused: Exception | None = None
    with preserve_layer(layer, training), torch.no_grad():
        for x in probe_tensors(layer):
            try:
                output = layer.forward(x)
                expected = _FUNCTIONALS[kind](layer, x)
            except Exception as error:  # whatever a forward raises that wants something else
                refused = error
                continue
            return _compare(output, expected, training)
    return f"its own forward does not take the inputs of its class ({type(refused).__name__}: {refused})"


@contextmanager
def preserve_layer(layer: nn.Module, training: bool) -> Iterator[None]:
    """Call one layer in this mode, and restore everything that its forward changes on it."""
    attributes, buffers = dict(layer.__dict__), dict(layer._buffers)
    values = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    try:
        with preserve_state(layer, training):
            yield
    finally:
        layer.__dict__.clear()
        layer.__dict__.update(attributes)
        layer._buffers.update(buffers)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if not torch.equal(parameter, values[name]):
                    parameter.copy_(values[name])


def _compare(output: object, expected: Tensor, training: bool) -> str:
    mode = " in training mode" if training else ""
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return f"its own forward returns another shape{mode}"
    if output.dtype != expected.dtype:
        return f"its own forward gives {output.dtype}{mode}"
    off = relative_difference(expected, output)
    if off <= max(1e-5, 4 * torch.finfo(expected.dtype).eps):
        return ""
    return f"its own forward differs by {off:.2g} of the largest value{mode}"


def probe_tensors(layer: nn.Module) -> list[Tensor]:
    """Random inputs that fit the layer, with more and with fewer dimensions."""
    inputs = probe_inputs(layer)
    return [] if inputs is None else [inputs[0], inputs[0][0]]


def _convolution(kind: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda layer, x: kind._conv_forward(layer, x, layer.weight, layer.bias)


# What each class computes; those of torch read stride, padding and so on off the layer themselves.
_FUNCTIONALS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Linear": nn.Linear.forward,
    "Conv1d": _convolution(nn.Conv1d),
    "Conv2d": _convolution(nn.Conv2d),
    "Conv3d": _convolution(nn.Conv3d),
    "ConvTranspose1d": nn.ConvTranspose1d.forward,
    "ConvTranspose2d": nn.ConvTranspose2d.forward,
    "ConvTranspose3d": nn.ConvTranspose3d.forward,
    "Embedding": nn.Embedding.forward,
    "Conv1D": lambda layer, x: x @ layer.weight + layer.bias,  # transformers', weight (in, out)
}
