"""Which layers train: a scheme by name or written out, resolved against a model into one value to print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import matches, no_match_error, parameter_layers
from edgetune.core.technique import Sample, Settings
from edgetune.lean.stages import blocks_of
from edgetune.sparse.order import running_order
from edgetune.sparse.sliced import SLICEABLE, channels_of, refuse_slice

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Slice(Settings):
    """Train some channels of a linear layer or a convolution, and its bias: those that rank highest by `by`.

    `inputs` saves least for backward. A convolution in groups is sliced by whole groups.
    """

    ratio: Ratio
    """Share of the channels to train."""
    by: Literal["magnitude", "gradient", "fisher"] = "magnitude"
    """How the channels are ranked; `gradient` and `fisher` use labelled batches."""
    of: Literal["inputs", "outputs"] = "inputs"
    """Whether to select input or output channels; `inputs` saves less for backward."""

    def __str__(self) -> str:
        """As a table shows it: `1/4`, or `0.3 outputs by fisher`."""
        part = round(1 / self.ratio)
        words = [f"1/{part}" if math.isclose(1 / part, self.ratio) else f"{self.ratio:g}"]
        words += [self.of] if self.of != "inputs" else []
        return " ".join(words + ([f"by {self.by}"] if self.by != "magnitude" else []))


Part = Literal["full", "bias", "frozen"] | Slice
WrittenPart = Literal["full", "bias", "frozen"] | Ratio | Slice  # a bare number is a slice of that ratio
Under = Callable[[Mapping[str, Part]], AbstractContextManager[None]]  # inside, these parts of a model train alone


def part_to_json(part: WrittenPart) -> object:
    """The part as a JSON value."""
    return part.model_dump() if isinstance(part, Slice) else part


def part_from_json(value: Any) -> Part:
    """The part that `part_to_json` wrote."""
    return Slice.model_validate(value) if isinstance(value, dict) else value


NAMED = ("last-<k>", "bias", "bert-pockengine", "auto")  # the last with a budget only, see auto/choose.py


@dataclass(frozen=True)
class Choice:
    """What trains in one layer."""

    layer: str  # dotted name; "" is the model itself, for parameters it owns directly
    part: Part
    parameters: int  # how many values the layer has
    training: int  # how many of them train


@dataclass(frozen=True)
class Scheme:
    """What trains in every layer that has parameters of its own, in the model's order."""

    name: str
    choices: tuple[Choice, ...]

    def part(self, layer: str) -> Part:
        """What trains in the layer of this name."""
        return next(c.part for c in self.choices if c.layer == layer)

    def __str__(self) -> str:
        trained, values = sum(c.training for c in self.choices), sum(c.parameters for c in self.choices)
        lines = [f"scheme {self.name}: {trained:,} of {values:,} parameters train"]
        for choice in self.choices:
            if choice.training:
                lines.append(f"  {choice.part!s:<6} {choice.layer or '(the model itself)'}: {choice.training:,}")
        return "\n".join(lines)

    def to_mapping(self) -> dict[str, WrittenPart]:
        """The scheme as a mapping for a recipe, which resolves to the same parts again."""
        parts: dict[str, WrittenPart] = {"*": "frozen"}
        for choice in self.choices:
            inside = any(_within(choice.layer, outer) for outer in parts)
            if choice.training or inside:
                part = choice.part
                plain = isinstance(part, Slice) and part == Slice(ratio=part.ratio)
                parts[choice.layer] = part.ratio if plain else part  # type: ignore[union-attr]
        return parts


def is_bias(name: str) -> bool:
    """Whether a parameter's own name is that of a bias: `bias`, `in_proj_bias`, `q_bias`."""
    return name == "bias" or name.endswith("_bias")


def trains(part: Part, parameter_name: str) -> bool:
    """Whether a parameter of this own name trains as a whole in a layer with this part."""
    return part == "full" or (part != "frozen" and is_bias(parameter_name))


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer is a normalization, by its class name: BatchNorm2d, LayerNorm, LlamaRMSNorm."""
    return "norm" in type(layer).__name__.lower() and not any(True for _ in layer.children())


def resolve(
    model: nn.Module,
    scheme: str | Mapping[str, WrittenPart],
    head: Part,
    norms: bool,
    sample: Sample | None = None,
) -> Scheme:
    """The scheme for this model. `head` is everything after the last block; a written mapping is laid over it.

    If the model has no list of equal blocks, a named scheme treats each layer with a weight as a block, in the order in
    which they run on the sample, and the last one as the head.
    A slice that covers a whole block means its linears and convolutions; the norms among them train whole.
    """
    layers = parameter_layers(model)
    blocks = blocks_of(model)
    if not blocks and isinstance(scheme, str):
        layers = {name: layers[name] for name in running_order(model, layers, sample)}
        blocks = [name for name, layer in layers.items() if not is_norm(layer)][:-1]
    order = list(layers)
    parts: dict[str, Part] = dict.fromkeys(order, "frozen")
    if isinstance(scheme, str):
        parts |= _resolve_named(scheme, layers, blocks)
    if blocks:
        last = max(i for i, name in enumerate(order) if _within(name, blocks[-1]))
        for name in order[last + 1 :]:
            parts[name] = head
    if not isinstance(scheme, str):
        _lay_over(parts, scheme, layers, blocks)
    if not norms:
        parts |= dict.fromkeys((name for name in order if is_norm(layers[name])), "frozen")
    _refuse_tied(model, parts)
    resolved = Scheme(
        name=scheme if isinstance(scheme, str) else "written",
        choices=tuple(_choice(name, layers[name], part) for name, part in parts.items()),
    )
    if not any(choice.training for choice in resolved.choices):
        raise EdgetuneError("the scheme trains nothing", got=scheme, action='choose more layers, or head="full"')
    return resolved


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _resolve_named(scheme: str, layers: Mapping[str, nn.Module], blocks: list[str]) -> dict[str, Part]:
    """The parts that a named scheme trains, without the head."""
    last, order = re.fullmatch(r"last-(\d+)", scheme), list(layers)
    if scheme not in NAMED[1:-1] and not last:
        raise EdgetuneError("unknown scheme", got=scheme, allowed=["last-1", "last-2", "last-4", *NAMED[1:]])
    if not blocks:
        raise EdgetuneError(
            f"{scheme}: the model has only one layer", got=order, action=f'write {{"{order[-1]}": "full"}}'
        )
    if scheme == "bias":
        return dict.fromkeys(order, "bias")
    if not last:
        return _pockengine(layers, blocks)
    count = int(last[1])
    if count > len(blocks):
        raise EdgetuneError(f"the model has {len(blocks)} blocks", got=scheme, action=f"use last-{len(blocks)} at most")
    return dict.fromkeys(_last_blocks(order, blocks, count), "full")


def _last_blocks(order: list[str], blocks: list[str], count: int) -> list[str]:
    """The layers from the first of the last `count` blocks to the end, and what is between them."""
    if count == 0:
        return []
    start = min(i for i, name in enumerate(order) if _within(name, blocks[-count]))
    stop = max(i for i, name in enumerate(order) if _within(name, blocks[-1]))
    return order[start : stop + 1]


def _pockengine(layers: Mapping[str, nn.Module], blocks: list[str]) -> dict[str, Part]:
    """Biases of the last half of the blocks; in the last third the attention's weights and the first FFN's.

    Zhu et al., PockEngine, 2023, arXiv:2310.17752, section 4: for BERT's 12 blocks 6 and 4. The first linears of an
    FFN are those outside the attention that make wider.
    """
    order = list(layers)
    parts: dict[str, Part] = dict.fromkeys(_last_blocks(order, blocks, math.ceil(len(blocks) / 2)), "bias")
    for name in _last_blocks(order, blocks, math.ceil(len(blocks) / 3)):
        layer = layers[name]
        if not isinstance(layer, nn.Linear):
            continue
        if re.search(r"(^|\.)(self_)?att(ention|n)(\.|$)", name) or layer.out_features > layer.in_features:
            parts[name] = "full"
    if "full" not in parts.values():
        raise EdgetuneError("bert-pockengine: this model has no linears in its blocks", action="use last-<k> or auto")
    return parts


def _lay_over(
    parts: dict[str, Part], written: Mapping[str, WrittenPart], layers: Mapping[str, nn.Module], blocks: list[str]
) -> None:
    """Apply the patterns in order; each covers the layers it names and all inside them."""
    order = list(parts)
    named: set[str] = set()
    for pattern, part in written.items():
        matched = [name for name in order if any(matches(outer, [pattern]) for outer in _itself_and_outer(name))]
        if not matched:
            raise no_match_error("scheme: the pattern matches no layer with parameters", pattern, order)
        part = Slice(ratio=part) if isinstance(part, float) else part
        for name in matched:
            as_written = name == pattern or not isinstance(part, Slice) or isinstance(layers[name], SLICEABLE)
            parts[name] = part if as_written else _part_beside_slices(name, layers[name])
        named |= set(matched)
    if not blocks and order[-1] not in named:
        raise EdgetuneError(
            "scheme: without a list of equal blocks the head is unknown",
            got=list(written),
            action=f'set the last layer explicitly, as in {{"{order[-1]}": "full"}}',
        )


def _part_beside_slices(name: str, layer: nn.Module) -> Part:
    """The part of a layer that cannot be sliced, under a pattern with a slice: a norm trains whole."""
    if not is_norm(layer):
        refuse_slice(name, layer)
    return "full"


def _itself_and_outer(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def _choice(name: str, layer: nn.Module, part: Part) -> Choice:
    own = {key: value for key, value in layer._parameters.items() if value is not None}
    training = [key for key in own if trains(part, key)]
    if isinstance(part, Slice):
        refuse_slice(name, layer)
        training.append("weight")
    for key in training:
        if not own[key].is_floating_point():
            raise EdgetuneError(
                f"{name}.{key} is stored in {own[key].dtype} and cannot train",
                got=str(part),
                action='put the layer into the skip of nf4, or write "bias" or "frozen" for it',
            )
    counts = {key: own[key].numel() for key in training}
    if isinstance(part, Slice):
        dim, step = channels_of(layer, part.of)
        channels = own["weight"].shape[dim]
        counts["weight"] = counts["weight"] // channels * step * max(1, round(part.ratio * channels / step))
    return Choice(name, part, sum(value.numel() for value in own.values()), sum(counts.values()))


def _refuse_tied(model: nn.Module, parts: dict[str, Part]) -> None:
    """Raise if two layers share a parameter and the scheme treats them differently."""
    seen: dict[int, tuple[str, bool]] = {}
    for layer, part in parts.items():
        for key, value in model.get_submodule(layer)._parameters.items():
            if not isinstance(value, Tensor):
                continue
            mine = trains(part, key) or (isinstance(part, Slice) and key == "weight")
            other, training = seen.setdefault(id(value), (layer, mine))
            if training != mine or (other != layer and Slice in (type(part), type(parts[other]))):
                trained, frozen = (other, layer) if training else (layer, other)
                raise EdgetuneError(
                    f"{trained} shares its weight with {frozen}, which the scheme freezes: backward would run that far",
                    got=trained,
                    action=f'set head="frozen", or write the scheme out with "{trained}": "frozen"',
                )
