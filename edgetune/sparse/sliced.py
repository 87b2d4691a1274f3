"""A layer of which only some channels train: backward computes their gradient alone and saves only what it needs."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from edgetune.core.errors import EdgetuneError
from edgetune.core.plain import computed_tensor, describe_computation, describe_parametrization, is_stock, probe_tensors
from edgetune.core.wrapped import Wrapped
from edgetune.lean import onednn
from edgetune.lean.frozen_ops import convolution_input_gradient, pad_input
from edgetune.lean.operators import last_activation
from edgetune.lean.products import restore_columns, save_columns

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SLICEABLE = (nn.Linear, *CONVOLUTIONS)


class Sliced(Wrapped):
    """A linear or convolution whose weight trains at `indices` along `dim`; the rest of it is frozen.

    `dim` 1 slices the input channels: backward saves those alone, and their gradient is one smaller product.
    `dim` 0 slices the output channels: the product is smaller too, and every input channel is saved.
    A convolution in groups is sliced by whole groups along `dim` 0, which saves the inputs of those groups alone.

    `slice` is what trains, of the shape of the weight with `len(indices)` channels along `dim`. It is written into the
    base's weight at every call. The state dict holds both; one without `slice` takes it from the weight.
    """

    repeats: ClassVar[tuple[str, ...]] = ("slice",)
    base: nn.Module
    indices: Tensor
    slice: nn.Parameter

    def __init__(self, base: nn.Module, indices: Tensor, dim: int) -> None:
        super().__init__(base)
        self.dim = dim
        self.register_buffer("indices", indices)
        weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.slice = nn.Parameter(weight.detach().index_select(dim, indices))
        weight.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_slice_of_weight)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Tensor:
        """The base's weight with the slice written into it."""
        self._write()
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, which trains or not by itself."""
        return self.base.bias  # type: ignore[return-value]

    def plain_tensors(self) -> dict[str, Tensor]:
        """The base's, with the slice in its place in the weight."""
        tensors = super().plain_tensors()
        return {**tensors, "weight": tensors["weight"].index_copy(self.dim, self.indices, self.slice)}

    def forward(self, *args: Any) -> Tensor:
        """What the base computes with the slice in its weight."""
        self._write()
        if not (torch.is_grad_enabled() and self.slice.requires_grad):
            return self.base(*args)  # type: ignore[no-any-return]
        with _InPlaceOf(self):
            return self.base(*args)  # type: ignore[no-any-return]

    def _write(self) -> None:
        # .data: a graph that holds the weight for the gradient of its input does not take this for a change
        self.base.weight.data.index_copy_(self.dim, self.indices, self.slice.detach())  # type: ignore[union-attr, operator]

    def extra_repr(self) -> str:
        """How much of which channels trains."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return f"{len(self.indices)} of {weight.shape[self.dim]} {('output', 'input')[self.dim]} channels train"


def _slice_of_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    assert isinstance(module, Sliced)
    for key in (f"{prefix}weight", f"{prefix}base.weight"):
        if key in state and f"{prefix}slice" not in state:
            indices = state.get(f"{prefix}indices", module.indices)
            state[f"{prefix}slice"] = state[key].index_select(module.dim, indices.to(state[key].device))
            state.setdefault(f"{prefix}indices", indices)


def channels_of(layer: nn.Module, of: str) -> tuple[int, int]:
    """`(dim, step)` for slicing a layer's inputs or outputs: the weight's dimension, and how many go together."""
    groups: int = getattr(layer, "groups", 1)
    if groups > 1:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return 0, weight.shape[0] // groups
    return (1 if of == "inputs" else 0), 1


def strongest_channels(layer: nn.Module, ratio: float, of: str, scores: Tensor | None = None) -> tuple[Tensor, int]:
    """Indices of the channels with the largest scores, ascending, and the weight's dimension they are of.

    `scores` has the weight's shape, none negative; by default the weight's magnitude. At least one channel, or one
    whole group, is chosen.
    """
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr, operator, assignment]
    dim, step = channels_of(layer, of)
    values = weight.abs() if scores is None else scores
    values = values.sum([d for d in range(values.dim()) if d != dim]).view(-1, step).sum(1)
    count = max(1, round(ratio * len(values)))
    chosen = values.topk(count).indices.sort().values
    return (chosen[:, None] * step + torch.arange(step, device=chosen.device)).flatten(), dim


_PRODUCTS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)


class _InPlaceOf(TorchFunctionMode):
    """Puts the sliced product in the place of the one that a base calls with its weight, whatever it pads before."""

    def __init__(self, layer: Sliced) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and (args[1] if len(args) > 1 else kwargs.get("weight")) is self.layer.base.weight:
            return self._linear(*args, **kwargs) if func is functional.linear else self._convolution(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = self.layer
        x, part, weight, bias = _as_autocast(input, layer.slice, weight, bias)
        if layer.dim == 0:
            return _SlicedLinear.apply(x, part, weight, bias, layer.indices, 0, "", x)  # type: ignore[no-untyped-call, no-any-return]
        kind, saved = save_columns(last_activation(), x, layer.indices)
        return _SlicedLinear.apply(x, part, weight, bias, layer.indices, 1, kind, *saved)  # type: ignore[no-untyped-call, no-any-return]

    def _convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        layer = self.layer
        input = onednn.channels_last(input, weight)
        input, stride, padding, dilation = pad_input(input, weight, stride, padding, dilation)
        x, part, weight, bias = _as_autocast(input, layer.slice, weight, bias)
        batched = x.dim() == weight.dim()
        settings = (stride, padding, dilation, False, [0] * len(stride), groups)
        y: Tensor = _SlicedConvolution.apply(  # type: ignore[no-untyped-call]
            x if batched else x.unsqueeze(0), part, weight, bias, layer.indices, layer.dim, settings
        )
        return y if batched else y.squeeze(0)


def _as_autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """All in autocast's dtype where it is on: an autograd function is not cast by itself."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


class _SlicedLinear(torch.autograd.Function):
    """`x` is `(..., in)`. Saves `(..., k)` of it for `dim` 1 (see `save_columns`), all of it for `dim` 0."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, part: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, dim: int, kind: str,
        *saved: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, indices, *saved)
        ctx.dim, ctx.kind = dim, kind
        return onednn.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, indices, *saved = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        for_input = onednn.input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None
        for_part = None
        if ctx.needs_input_grad[1]:
            mine = rows if ctx.dim == 1 else rows.index_select(1, indices)
            needed = restore_columns(ctx.kind, saved, indices, gradient.dtype)
            for_part = onednn.weight_gradient(mine, needed)
        return for_input, for_part, None, for_bias, *[None] * (3 + len(saved))


class _SlicedConvolution(torch.autograd.Function):
    """`x` is `(batch, in, ...)`. Saves the input channels that the slice's gradient reads."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, part: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, dim: int,
        settings: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        groups = settings[-1]
        if dim == 1:
            needed = onednn.select_channels(x, indices)
        elif groups > 1:
            needed = onednn.select_channels(x, _inputs_of_groups(indices, weight.shape[0] // groups, weight.shape[1]))
        else:
            needed = x
        ctx.save_for_backward(needed, part, weight if ctx.needs_input_grad[0] else None, indices)
        ctx.dim, ctx.settings, ctx.shape = dim, settings, x.shape
        ctx.sliced_groups = part.shape[0] // (weight.shape[0] // groups) if groups > 1 else 1
        return torch.convolution(x, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed, part, weight, indices = ctx.saved_tensors
        for_input = for_part = for_bias = None
        if ctx.needs_input_grad[0]:
            for_input = convolution_input_gradient(gradient, weight, ctx.shape, ctx.settings)
        if ctx.needs_input_grad[1]:
            mine = gradient if ctx.dim == 1 else onednn.select_channels(gradient, indices)
            settings = (*ctx.settings[:-1], ctx.sliced_groups)
            back = torch.ops.aten.convolution_backward
            for_part = back(mine, needed, part, None, *settings, [False, True, False])[1]
        if ctx.needs_input_grad[3]:
            for_bias = gradient.sum([d for d in range(gradient.dim()) if d != 1])
        return for_input, for_part, None, for_bias, None, None, None


def _inputs_of_groups(outputs: Tensor, outputs_each: int, inputs_each: int) -> Tensor:
    """The input channels of the groups that these output channels, whole groups of them, belong to."""
    groups = outputs[::outputs_each] // outputs_each
    return (groups[:, None] * inputs_each + torch.arange(inputs_each, device=groups.device)).flatten()


def refuse_slice(name: str, layer: nn.Module) -> None:
    """Raise unless the layer is one of which a slice can train: one with a weight of its own."""
    if isinstance(layer, ParametrizationList):
        owner, _, key = name.rpartition(".parametrizations.")
        _refuse(owner, layer, describe_parametrization(key, layer))
    if not isinstance(layer, SLICEABLE):
        raise EdgetuneError(
            f"{name}: only linears and convolutions can train in part",
            got=type(layer).__name__,
            action='write "full", "bias" or "frozen" for it',
        )
    if computed_tensor(layer):
        _refuse(name, layer, describe_computation(layer))


def refuse_unfollowed(name: str, layer: nn.Module) -> None:
    """Raise where a slice of a layer with a forward of its own gives another output or gradient than the layer.

    Padding of its own is followed, as is all that ends in the product with the very weight; a standardized weight is
    not. Tried on a copy, with random input.
    """
    refuse_slice(name, layer)
    if is_stock(layer):
        return
    if layer.weight.is_meta:  # type: ignore[union-attr, operator]
        _refuse(name, layer, "it has its own forward, and there are no values yet to try it with")
    with torch.random.fork_rng(devices=[]):
        for training in (False, True):
            reason = _not_followed(layer, training)
            if reason:
                _refuse(name, layer, reason)


def _refuse(name: str, layer: nn.Module, reason: str) -> NoReturn:
    raise EdgetuneError(
        f"{name} cannot train in part: {reason}",
        got=type(layer).__name__,
        action=f'write "full", "bias" or "frozen" for "{name}"',
    )


def _not_followed(layer: nn.Module, training: bool) -> str:
    """Why a slice of the layer is not the same as the layer, in this mode; "" if it is."""
    plain = copy.deepcopy(layer).train(training).requires_grad_(True)
    for hooks in (plain._forward_hooks, plain._forward_pre_hooks):
        hooks.clear()
    error: Exception | None = None
    for x in probe_tensors(plain):
        try:
            expected, gradient = _tried(plain, x, plain.weight)  # type: ignore[arg-type]
        except Exception as refused:  # whatever a forward raises that wants something else
            error = refused
            continue
        if gradient is None:
            return "no gradient reaches its weight"
        sliced = Sliced(plain, *strongest_channels(plain, 0.5, "inputs"))
        try:
            output, part = _tried(sliced, x, sliced.slice)
        except Exception as refused:  # as a forward may raise that takes named arguments, or looks at its own class
            return f"its own forward fails once a slice of its weight trains ({type(refused).__name__}: {refused})"
        tolerance = max(1e-4, 8 * torch.finfo(gradient.dtype).eps)
        if not _close(output, expected, tolerance):
            return "its own forward gives something else once a slice of its weight trains"
        if part is None or not _close(part, gradient.index_select(sliced.dim, sliced.indices), tolerance):
            return "its own forward does not multiply by the plain weight"
        return ""
    return f"its own forward does not take the inputs of its class ({type(error).__name__}: {error})"


def _tried(layer: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output for `x`, and the gradient of a weighted sum of it."""
    torch.manual_seed(0)
    with torch.enable_grad():
        output: Tensor = layer(x)
        loss = (output * torch.linspace(-1, 1, output.numel(), device=x.device).view(output.shape)).sum()
        gradient = torch.autograd.grad(loss, [weight], allow_unused=True)[0] if loss.requires_grad else None
    return output.detach(), gradient


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())
