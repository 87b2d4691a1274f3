"""Follow the output channels of layers to the layers that read them, through all that is computed in between.

Channels are numbered, and the recorded operators that only move values are run on the numbers: that gives the number
behind each input of a layer, through heads that share keys and values, fused projections and reshapes alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgetune.capture.recorded import Recording, clamp_bounds, operator_name, shape_of
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, device_of, first_rows, tensors_in, to_device
from edgetune.core.modes import preserve_buffers, preserve_state
from edgetune.core.plain import is_stock
from edgetune.core.probe import relative_difference, rounding_tolerance

MOVES = frozenset({
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "flatten", "unflatten", "unsqueeze", "squeeze",
    "expand", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "movedim", "swapaxes",
    "repeat", "repeat_interleave",
})  # fmt: skip  # run on the numbers as they are
KEEPS = frozenset({"to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "lift_fresh_copy"})
_HOMOGENEOUS = frozenset({"relu", "leaky_relu"})  # f(s x) = s f(x) for s > 0
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_POOLS = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_max_pool2d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "pad", "constant_pad_nd",
    "upsample_nearest2d", "upsample_bilinear2d",
})  # fmt: skip  # each channel by itself, and f(s x) = s f(x) for s > 0
_LARGEST_CHANGE = 1e-4  # of the outputs in fp32, over their largest value


@dataclass(frozen=True)
class ChannelProducer:
    """A layer whose output channels can be scaled: the rows of its weight and bias.

    `offset`: the layer multiplies by the weight plus this, 1 in Gemma's norms.
    """

    layer: str
    bias: bool
    offset: float = 0.0


@dataclass(frozen=True)
class ChannelGroup:
    """A producer, and the layers that read its channels: `readers[layer][i]` is the channel behind input i.

    `free`: which channels these layers alone read, `(channels,)`. `heads`: the channels that attention averages over
    tokens together. `ceiling`: where the producer's outputs are cut off, 6 before ReLU6.
    """

    producer: ChannelProducer
    readers: dict[str, Tensor]
    free: Tensor
    heads: tuple[tuple[int, ...], ...] = ()
    ceiling: float = math.inf

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weights scales would change."""
        return (self.producer.layer, *self.readers)


def find_groups(
    model: nn.Module, recording: Recording, *, mixes: bool = False, convolutions: bool = False
) -> list[ChannelGroup]:
    """The groups of a recording, in its order. An input of a layer belongs to one group at most.

    Norms and linears that linears read. `mixes`: only what keeps linear combinations of the channels of a head, not
    just their scales. `convolutions`: instead convolutions and linears, with their batch norms, that others read.
    """
    groups: list[ChannelGroup] = []
    claimed: set[str] = set()
    for node in recording.graph.nodes:
        find_producer = _image_producer_of if convolutions else _producer_of
        producer = find_producer(model, recording, node)
        if producer is None or (mixes and operator_name(node) != "linear"):
            continue
        followed = _Follower(model, recording, mixes, convolutions).follow(node)
        readers = {name: channels for name, channels in followed.reads.items() if name not in claimed}
        for name in followed.reads.keys() - readers.keys():
            followed.lost[followed.reads[name]] = True
        read = torch.zeros_like(followed.lost)
        for channels in readers.values():
            read[channels] = True
        free = read & ~followed.lost
        readers = {name: channels for name, channels in readers.items() if bool(free[channels].any())}
        if readers:
            claimed.update(readers)
            groups.append(ChannelGroup(producer, readers, free, tuple(sorted(followed.heads)), followed.ceiling))
    return groups


def _producer_of(model: nn.Module, recording: Recording, node: fx.Node) -> ChannelProducer | None:
    """The producer that a node computes: a linear, a norm with a weight, or a product with a weight per channel."""
    kind, args = operator_name(node), node.args
    if kind == "linear":
        return _plain_producer(recording, args[1], args[2] if len(args) > 2 else None, _is_linear(model))
    if kind in ("layer_norm", "rms_norm") and len(args) > 2 and len(args[1]) == 1:  # type: ignore[arg-type]
        return _plain_producer(recording, args[2], args[3] if kind == "layer_norm" and len(args) > 3 else None)
    if kind == "mul":
        for factor, value in (args[:2], args[1::-1]):
            weight, offset = split_offset(factor)
            layer = recording.layer(weight)
            if layer is not None and isinstance(value, fx.Node) and shape_of(weight) == shape_of(value)[-1:]:
                return ChannelProducer(layer, bias=False, offset=offset)
    return None


def _image_producer_of(model: nn.Module, recording: Recording, node: fx.Node) -> ChannelProducer | None:
    """The producer that a node computes: a convolution, a linear, or the batch norm after one."""
    kind, args = operator_name(node), node.args
    if kind in CONVOLUTIONS or kind == "linear":
        return _plain_producer(recording, args[1], args[2] if len(args) > 2 else None)
    if normalized_layer(model, recording, node) is not None:
        return _plain_producer(recording, args[1], args[2])
    return None


def normalized_layer(model: nn.Module, recording: Recording, node: fx.Node) -> str | None:
    """The layer whose outputs a batch norm with fixed statistics scales, if it alone reads them; else `None`."""
    source = node.args[0] if operator_name(node) == "batch_norm" else None
    if not isinstance(source, fx.Node) or len(source.users) != 1 or node.args[5] is not False:
        return None
    norm, kind = recording.layer(node.args[1]), operator_name(source)
    if norm is None or not isinstance(model.get_submodule(norm), nn.modules.batchnorm._BatchNorm):
        return None
    channels_second = kind in CONVOLUTIONS or (kind == "linear" and len(shape_of(source)) == 2)
    return recording.layer(source.args[1]) if channels_second else None


def split_offset(factor: Any) -> tuple[Any, float]:
    """A factor as the node of a parameter and the number that is added to it, such as 1 + weight in Gemma's norms."""
    offset = 0.0
    while isinstance(factor, fx.Node) and factor.op == "call_function":
        kind = operator_name(factor)
        number = next((a for a in factor.args if isinstance(a, (int, float))), None)
        if kind == "add" and number is not None and not factor.kwargs and offset == 0.0:
            offset = float(number)
        elif kind not in KEEPS:
            return None, 0.0
        if len(factor.users) != 1:
            return None, 0.0
        factor = next(iter(factor.all_input_nodes), None)
    return factor, offset


def _plain_producer(
    recording: Recording, weight: object, bias: object, accept: Callable[[str], bool] = lambda _: True
) -> ChannelProducer | None:
    layer = recording.layer(weight)
    if layer is None or not accept(layer) or (bias is not None and recording.parameter(bias) != f"{layer}.bias"):
        return None
    return ChannelProducer(layer, bias is not None)


def _is_linear(model: nn.Module) -> Callable[[str], bool]:
    return lambda name: isinstance(layer := model.get_submodule(name), nn.Linear) and is_stock(layer)


@dataclass
class _Follower:
    """Follows the channels of one node. After `follow`, `reads` holds the channels behind the inputs of linears."""

    model: nn.Module
    recording: Recording
    mixes: bool
    convolutions: bool = False
    reads: dict[str, Tensor] = field(default_factory=dict)
    heads: set[tuple[int, ...]] = field(default_factory=set)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # read by something else as well
    ceiling: float = math.inf

    def follow(self, start: fx.Node) -> _Follower:
        """Run the numbers of the channels of `start`, the last dimension or an image's second, through readers."""
        shape = shape_of(start)
        numbers = _spread(torch.arange(shape[1]), shape) if _is_image(start) else torch.arange(shape[-1]).expand(shape)
        self.lost = torch.zeros(int(numbers.amax()) + 1, dtype=torch.bool)
        values: dict[fx.Node, Any] = {start: numbers.contiguous()}
        waiting = sorted(start.users)
        while waiting:
            node = waiting.pop(0)
            if node in values:
                continue
            numbers = self._run(node, values)
            inputs = [values[n] for n in node.all_input_nodes if n in values]
            if numbers is None:
                self._lose(inputs)
                continue
            if not isinstance(numbers, list) or numbers:  # not of a layer, whose outputs are other channels
                values[node] = numbers
                waiting = sorted({*waiting, *node.users})
        return self

    def _lose(self, inputs: Any) -> None:
        for numbers in tensors_in(inputs):
            self.lost[numbers.flatten()] = True

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The numbers of what a node computes; an empty list where they end in a layer; `None`: in something else."""
        kind = operator_name(node)
        numbered = [position for position, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg in values]
        if kind == "cat":
            return self._concatenate(node, values)
        if kind == "scaled_dot_product_attention" and 2 in numbered:  # queries and keys of one projection end here
            self._lose([values[node.args[n]] for n in numbered if n != 2])  # type: ignore[index]
            numbered = [2]
        if len(numbered) != 1 or any(n in values for n in node.kwargs.values() if isinstance(n, fx.Node)):
            return None
        position = numbered[0]
        first: Any = values[node.args[position]]  # type: ignore[index]
        if isinstance(first, Tensor):
            first = first.contiguous()  # a view of the values may be none of numbers that lie differently
        if kind == "getitem" or kind in MOVES:
            arguments = [first if n == position else arg for n, arg in enumerate(node.args)]
            if any(isinstance(arg, fx.Node) for arg in arguments):
                return None
            return node.target(*arguments, **node.kwargs)  # type: ignore[operator]
        if kind == "type_as" and position == 1:  # it only asks for the type
            return []
        if kind in KEEPS or (kind == "dropout" and node.args[2] is False):
            return first if node.meta["val"].is_floating_point() else None
        if kind in ("scaled_dot_product_attention", "matmul", "bmm"):
            return self._average(node, kind, position, first)
        if kind == "linear" and position == 0:
            return self._read(node, first)
        if self.mixes:
            return None
        if kind in _HOMOGENEOUS:
            return first
        if self.convolutions and position == 0 and first.dim() > 1:
            if kind in CONVOLUTIONS:
                return self._read(node, first.movedim(1, -1))
            if kind in _POOLS:
                return _pool(node, first)
            if (bounds := clamp_bounds(node)) is not None:
                return self._clamp(node, first, *bounds)
        if kind == "mul" or (kind == "div" and position == 0 and not node.kwargs):
            return first.expand(shape_of(node)).contiguous()
        return None

    def _average(self, node: fx.Node, kind: str, position: int, numbers: Tensor) -> Tensor | None:
        """Attention: each value becomes a sum over the tokens, the last dimension but one."""
        shape = shape_of(node)
        if position != (2 if kind.startswith("scaled") else 1) or numbers.dim() < 2 or not _is_constant(numbers, -2):
            return None
        self.heads.update(map(tuple, numbers[..., 0, :].flatten(0, -2).tolist()))
        if node.kwargs.get("enable_gqa"):
            numbers = numbers.repeat_interleave(shape[-3] // numbers.shape[-3], -3)
        return numbers[..., :1, :].expand(shape).contiguous()

    def _concatenate(self, node: fx.Node, values: dict[fx.Node, Any]) -> Tensor | None:
        """A cache that is empty before it is appended to."""
        parts: Any = node.args[0]
        own = [part for part in parts if part in values]
        others = [part for part in parts if part not in values and shape_of(part).numel()]
        return values[own[0]] if len(own) == 1 and not others else None

    def _clamp(self, node: fx.Node, numbers: Tensor, low: float, high: float) -> Tensor | None:
        """ReLU6 and its like, of the producer's own outputs: below the ceiling it is ReLU."""
        source: Any = node.args[0]
        if low != 0 or not (_is_image(source) or operator_name(source) == "linear"):
            return None
        self.ceiling = min(self.ceiling, high)
        return numbers

    def _read(self, node: fx.Node, numbers: Tensor) -> list[Tensor] | None:
        layer = self.recording.layer(node.args[1])
        rows = numbers.reshape(-1, numbers.shape[-1])
        accepted = self.convolutions or (layer is not None and _is_linear(self.model)(layer))
        if layer is None or not accepted or not _is_constant(rows, 0):
            return None
        self.reads[layer] = rows[0]
        return []


def _is_image(node: fx.Node) -> bool:
    """Whether its channels are the second dimension."""
    return operator_name(node) in CONVOLUTIONS or operator_name(node) == "batch_norm"


def _spread(channels: Tensor, shape: torch.Size) -> Tensor:
    """Numbers of channels, the second dimension, in a shape."""
    return channels.view(-1, *[1] * (len(shape) - 2)).expand(shape)


def _pool(node: fx.Node, numbers: Tensor) -> Tensor | None:
    """What mixes the places of an image but not its channels."""
    kind, shape = operator_name(node), shape_of(node)
    if kind == "mean" and any(dim % numbers.dim() < 2 for dim in node.args[1]):  # type: ignore[union-attr, operator]
        return None
    if kind in ("pad", "constant_pad_nd") and isinstance(node.args[-1], int | float) and node.args[-1]:
        return None
    places = numbers.movedim(1, -1).flatten(0, -2)
    if len(shape) < 2 or shape[1] != numbers.shape[1] or not _is_constant(places, 0):
        return None
    return _spread(places[0], shape).contiguous()


def _is_constant(numbers: Tensor, dim: int) -> bool:
    return bool((numbers == numbers.narrow(dim, 0, 1)).all())


def refuse_unplain(model: nn.Module, technique: str) -> None:
    """Raise for adapters, and for weights that are stored in integers: scales cannot move into these."""
    for name, module in model.named_modules():
        if is_wrapped(module):
            action = "et.finalize(model) first"
            raise EdgetuneError(f"{technique} needs plain layers, and {name} has an adapter or slices", action=action)
        for key, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise EdgetuneError(
                    f"{technique} needs weights in floating point",
                    where=f"{name}.{key}".lstrip("."),
                    got=f"{type(parameter).__name__} of {parameter.dtype}",
                    action=f"put {technique} before quantization",
                )


def weight_of(model: nn.Module, layer: str) -> Tensor:
    """The weight of a layer."""
    weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
    return weight


def refuse_infinite(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise for the first of these layers whose weight is NaN or infinite."""
    for name in dict.fromkeys(layers):
        if not bool(torch.isfinite(weight_of(model, name)).all()):
            raise EdgetuneError(
                "a weight is NaN or infinite", where=name, action="train again with a lower learning rate"
            )


@contextmanager
def check_outputs(model: nn.Module, inputs: Inputs, layers: Iterable[str]) -> Iterator[None]:
    """The body rewrites parameters of `layers` and must keep the outputs on the first rows; else they come back.

    Raises `EdgetuneError` if the outputs change by more than rounding does.
    """
    inputs = first_rows(inputs)
    before = _outputs(model, inputs)
    modules = [model.get_submodule(name) for name in dict.fromkeys(layers)]
    kept = [(m, key, p, p.detach().clone()) for m in modules for key, p in m._parameters.items() if p is not None]
    try:
        yield
        change = max(map(relative_difference, before, _outputs(model, inputs)))
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        if change > max(_LARGEST_CHANGE, rounding_tolerance(dtype)):
            raise EdgetuneError(
                f"the outputs of {type(model).__name__} on the sample change by {change:.2g} of their largest value, "
                "so its weights are as before",
                action="leave this step out",
            )
    except BaseException:
        with torch.no_grad():
            for module, key, parameter, values in kept:
                module._parameters[key] = parameter
                parameter.copy_(values)
        raise


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with preserve_state(model), preserve_buffers(model), torch.no_grad():
        outputs = [t for t in tensors_in(call(model, to_device(inputs, device_of(model)))) if t.is_floating_point()]
    if not all(bool(torch.isfinite(t).all()) for t in outputs):
        raise EdgetuneError(
            "the outputs of the model are not finite on the sample",
            action="look for NaN or infinity in the sample and the weights",
        )
    return outputs
