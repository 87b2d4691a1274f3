"""Choose the linears and embedding tables that get integer weights, and give them these weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.experts import is_fused
from edgetune.core.freed import release_freed_memory
from edgetune.core.layers import matches, select
from edgetune.core.numbers import format_percent
from edgetune.core.plain import computed_tensor, refuse_computed
from edgetune.core.technique import Sample
from edgetune.lean.reads import readers_of, refuse_readers
from edgetune.quant.blocks import quantize_weight
from edgetune.quant.experts import describe_split, split_wanted_experts
from edgetune.quant.padded import PaddedLinear, can_pad, pad_inputs, unpad_inputs
from edgetune.quant.rounding import LEAST_GROUP, Grid, Rule, absmax_codes
from edgetune.quant.size import parameter_count, weight_bits
from edgetune.quant.split import SmallPart, SplitLinear, drop_outlier_columns
from edgetune.quant.tables import looks_up

EIGHT_BITS = Grid(8, scale_dtype=torch.float32)  # of a linear: XNNPACK stores the scales of 8 bits in fp32
TableBits = Literal["int8", "int4", "none"]
Layer = nn.Linear | nn.Embedding


def four_bits(group_size: int | None) -> Grid:
    """The grid of a linear in 4 bits: XNNPACK stores its scales in bf16."""
    return Grid(4, group_size, scale_dtype=torch.bfloat16)


def table_grid(embeddings: TableBits, group_size: int | None) -> Grid | None:
    """The grid of tables: in 4 bits with groups, in 8 with a scale for each row. The scales have the weight's type."""
    return {"int4": Grid(4, group_size), "int8": Grid(8), "none": None}[embeddings]


def width_multiple(grid: Grid) -> int:
    """What must divide the input width of a layer in this grid."""
    return 1 if grid.bits == 8 else grid.group_size or LEAST_GROUP


@dataclass(frozen=True)
class LayerChoice:
    """The layers of one model that a technique gives integer weights, and their grids. All of them were checked."""

    technique: str  # its name, for messages
    model: nn.Module
    layers: dict[str, Layer]
    grids: dict[str, Grid]  # of each layer

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Those of the layers that are linears."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Linear)}

    @property
    def tables(self) -> dict[str, nn.Embedding]:
        """Those that are embedding tables."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Embedding)}

    @property
    def narrow(self) -> dict[str, nn.Linear]:
        """The linears that get 4 bits."""
        return {name: layer for name, layer in self.linears.items() if self.grids[name].bits == 4}

    def with_grids(self, grids: Mapping[str, Grid]) -> LayerChoice:
        """These layers alone, with these grids; the others stay in floating point."""
        return replace(self, layers={name: self.layers[name] for name in grids}, grids=dict(grids))

    def copy(self) -> LayerChoice:
        """The same layers of a copy of the model."""
        model = deepcopy(self.model)
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in self.layers}
        return replace(self, model=model, layers=layers)

    def with_outliers(self, grid: Grid) -> LayerChoice:
        """These layers, and in this grid the part for outlying inputs of each that is split."""
        split = {name: layer for name, layer in self.layers.items() if isinstance(layer, SplitLinear)}
        parts = {f"{name}.outlier": layer.outlier for name, layer in split.items() if layer.outlier is not None}
        return replace(self, layers=self.layers | parts, grids=self.grids | dict.fromkeys(parts, grid))

    def fits(self, name: str, grid: Grid, pad: bool) -> bool:
        """Whether the width of a layer fits a grid, or can be padded to fit."""
        layer = self.layers[name]
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.embedding_dim
        if grid.bits == 8:
            return width > 1 or isinstance(layer, nn.Embedding)  # torchao rounds no tokens of a single value
        return width % width_multiple(grid) == 0 or (pad and can_pad(layer))

    def is_shared(self, name: str) -> bool:
        """Whether another module of the model has the weight of this layer."""
        return _are_shared(self.model, [self.layers[name]])

    def fit_widths(self, pad: bool, stacklevel: int = 4) -> LayerChoice:
        """8 bits with one scale for each output, or row, for the layers that do not fit; a warning names them."""
        unfit = [name for name, grid in self.grids.items() if not self.fits(name, grid, pad)]
        single = [name for name in unfit if not self.fits(name, EIGHT_BITS, pad)]
        wide = [name for name in unfit if name not in single]
        multiple = math.lcm(*(width_multiple(self.grids[name]) for name in wide))
        padding = ", or set pad: true" if any(can_pad(self.layers[name]) for name in wide) else ""
        for names, reason in (
            (single, "a linear with a single input stays in floating point. To silence this: "),
            (
                wide,
                f"the width of these layers is not a multiple of {multiple}, so they get 8 bits instead of 4. "
                f"To change this: prune with round_to={multiple}{padding}; or ",
            ),
        ):
            if names:
                message = f"{self.technique}: {truncate_list(names)}: {reason}skip: {names}"
                warnings.warn(message, stacklevel=stacklevel)  # the caller of `et.apply`
        tables = self.tables
        grids = self.grids | {name: Grid(8) if name in tables else EIGHT_BITS for name in wide}
        return self.with_grids({name: grid for name, grid in grids.items() if name not in single})

    @contextmanager
    def replace_weights(self, may_fail: bool = False) -> Iterator[None]:
        """The body gives the layers integer weights. With `may_fail` they get their own back if it raises.

        Afterwards the model no longer trains, and its config says that weights which were shared are not.
        """
        shared = _are_shared(self.model, list(self.layers.values()))
        before = self._weights() if may_fail else []  # else each is freed at once
        try:
            yield
        except BaseException:
            _restore(before)
            raise
        config = getattr(self.model, "config", None)
        if shared and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]  # so that nothing ties them again
        for table in self.tables.values():
            table.padding_idx = None  # type: ignore[assignment]
        self.model.requires_grad_(False)
        before.clear()
        release_freed_memory()  # the weights in floating point

    @contextmanager
    def restore_weights(self) -> Iterator[None]:
        """The body may give the layers integer weights; afterwards they have their own."""
        before = self._weights()
        try:
            yield
        finally:
            _restore(before)

    def prepare(self) -> None:
        """Pad the inputs of linears whose width does not fit, and write zeros for those that a weight does not see.

        Before anything rounds or watches them.
        """
        for name, layer in self.linears.items():
            drop_outlier_columns(layer)
            if layer.in_features % width_multiple(self.grids[name]):
                pad_inputs(layer, width_multiple(self.grids[name]))

    def quantize(self, name: str, rule: Rule = absmax_codes) -> None:
        """Round the weight of one layer to its grid."""
        layer = self.layers[name]
        is_linear = isinstance(layer, nn.Linear)
        layer.weight = quantize_weight(layer.weight, self.grids[name], rule, rounds_activations=is_linear)

    def _weights(self) -> list[tuple[Layer, Tensor]]:
        return [(layer, layer.weight) for layer in self.layers.values()]


def _restore(before: list[tuple[Layer, Tensor]]) -> None:
    for layer, weight in before:
        layer.weight = weight  # type: ignore[assignment]
        if isinstance(layer, PaddedLinear):
            unpad_inputs(layer)


def choose_layers(
    technique: str,
    model: nn.Module,
    sample: Sample | None,
    *,
    linears: Sequence[tuple[tuple[str, ...], Grid]],
    skip: tuple[str, ...],
    tables: Grid | None,
    stacklevel: int = 4,
) -> LayerChoice:
    """The linears that patterns match, each in the grid of the last that does, and all tables, without those of `skip`.

    Fused experts that are among them become linears first, in place, with the same outputs. Warns of what stays in
    floating point. Raises `EdgetuneError` for a pattern without a match, a linear whose weight is read elsewhere or
    computed, a table with `max_norm`, and weights that are not finite.
    """
    _refuse_quantized(model)
    _refuse_without_linears(technique, model)
    skip = split_wanted_experts(model, tuple(pattern for patterns, _ in linears for pattern in patterns), skip)
    skip_linears, skip_tables = _split_skips(model, skip)
    grids: dict[str, Grid] = {}
    for patterns, grid in linears:
        matched = select(model, patterns, skip_linears, nn.Linear, _is_choosable)
        if grid.bits == 8:
            grids |= dict.fromkeys(matched, grid)
        else:
            grids |= {name: grid for name, layer in matched.items() if not isinstance(layer, SmallPart)}
            grids |= dict.fromkeys(_offsets_of(matched), EIGHT_BITS)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in grids}
    chosen_tables, in_float = _choose_tables(model, skip_tables) if tables else ({}, [])
    readers, _ = readers_of(model, [*layers, *chosen_tables], sample)
    in_float += [name for name in readers if chosen_tables.pop(name, None)]
    refuse_readers(model, _without_encoder_layers(model, {n: r for n, r in readers.items() if n in layers}))
    for name, layer in layers.items():
        if not isinstance(layer, SplitLinear):  # which knows what its weight is a part of
            refuse_computed(name, layer)
    for name, table in chosen_tables.items():
        refuse_max_norm(name, table)
    layers |= chosen_tables
    for name, layer in layers.items():
        refuse_infinite(name, layer.weight)
    for message in (_describe_kept_tables(in_float), _describe_bare_weights(model)):
        if message:
            warnings.warn(f"{technique}: {message}", stacklevel=stacklevel)  # the caller of `et.apply`
    return LayerChoice(technique, model, layers, grids | (dict.fromkeys(chosen_tables, tables) if tables else {}))


def _offsets_of(layers: Mapping[str, Any]) -> list[str]:
    """The offsets among them of split linears among them; those of a single group stay in floating point."""
    parts = {name: name.removesuffix(".offset") for name, layer in layers.items() if layer.in_features > 1}
    return [name for name, whole in parts.items() if whole != name and isinstance(layers.get(whole), SplitLinear)]


def _split_skips(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The skip patterns for linears and for embeddings; `select` raises for one that matches neither."""
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for_tables = [p for p in skip if any(matches(n, [p]) for n in tables)]
    for_linears = [p for p in skip if p not in for_tables or any(matches(n, [p]) for n in linears)]
    return for_linears, for_tables


def _choose_tables(model: nn.Module, skip: list[str]) -> tuple[dict[str, nn.Embedding], list[str]]:
    """The tables to quantize, and the names of those that cannot be."""
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_float(m)}
    wanted = {n: m for n, m in tables.items() if not matches(n, skip)}
    fit = {n: m for n, m in wanted.items() if m.max_norm is not None or looks_up(m)}
    return fit, [n for n in wanted if n not in fit]


def _refuse_quantized(model: nn.Module) -> None:
    """Raise for a model whose linears are all in integers already."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantized = [name for name, layer in linears.items() if weight_bits(layer.weight) is not None]
    if quantized and len(quantized) == len(linears):
        raise EdgetuneError(
            "the model is quantized already",
            got=f"{truncate_list(quantized)} in integers",
            action="quantize the model in floating point",
        )


def _refuse_without_linears(technique: str, model: nn.Module) -> None:
    """Raise for a model that has none, such as one of convolutions alone."""
    modules = list(model.modules())
    if not any(isinstance(module, nn.Linear) or is_fused(module) for module in modules):
        raise EdgetuneError(
            f"{type(model).__name__} has no linear layers, and {technique} quantizes only these and embedding tables",
            got=sorted({type(module).__name__ for module in modules if module._parameters}),
            action="use int8, which quantizes convolutions and other layers too",
        )


def _is_float(layer: nn.Module) -> bool:
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _is_choosable(layer: nn.Module) -> bool:
    """One in floating point, or one that computes its weight, which is refused by name."""
    return _is_float(layer) or bool(computed_tensor(layer))


def _without_encoder_layers(model: nn.Module, readers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Drop torch's encoder layer, which leaves its fast path if a weight is quantized, and then calls its linears."""
    others = {
        name: [r for r in outer if not isinstance(model.get_submodule(r), nn.TransformerEncoderLayer)]
        for name, outer in readers.items()
    }
    return {name: outer for name, outer in others.items() if outer}


def refuse_max_norm(name: str, table: nn.Embedding) -> None:
    """Raise for a table that changes as it is read."""
    if table.max_norm is not None:
        raise EdgetuneError(
            "an embedding with max_norm rewrites its rows as it runs and cannot be quantized",
            where=name,
            got=table.max_norm,
            action=f"set max_norm=None, or skip: [{name!r}]",
        )


def refuse_infinite(name: str, weight: Tensor) -> None:
    """Raise for a weight that no scale fits."""
    weight = weight.detach()
    if weight.is_meta or weight.numel() == 0:
        return
    least, largest = weight.aminmax()
    if not bool(torch.isfinite(least) & torch.isfinite(largest)):
        raise EdgetuneError(
            "a weight is NaN or infinite, and no scale fits it",
            where=name,
            got=f"values from {float(least):g} to {float(largest):g}",
            action=f"train again with a lower learning rate, or skip: [{name!r}]",
        )


def _describe_kept_tables(names: list[str]) -> str:
    return (
        f"{truncate_list(names)}: an embedding whose weight is read in another way than by looking rows up; "
        f"it stays in floating point. To silence this: skip: {names}"
        if names
        else ""
    )


def _describe_bare_weights(model: nn.Module) -> str:
    """A message about matrices outside linear layers, such as fused experts or torch's attention; empty if none."""
    layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    total = sum(parameter.numel() for parameter in model.parameters())
    names = [
        f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if not isinstance(module, layers) and parameter.dim() > 1 and len(parameter) > 1
        if parameter.numel() > total / 100  # smaller ones are not worth a warning
    ]
    return (
        f"{truncate_list(names)}: these weights do not belong to linear layers and stay in floating point"
        if names
        else ""
    )


def describe_float_parts(model: nn.Module) -> str:
    """For people: what splitting experts costs, and the convolutions that stay in floating point; empty if neither."""
    kinds = nn.modules.conv._ConvNd
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    notes = [describe_split(model)]
    if convolutions:
        weights = sum(parameter.numel() for module in convolutions.values() for parameter in module.parameters())
        share = format_percent(100 * weights / parameter_count(model))
        noun = "convolution stays" if len(convolutions) == 1 else "convolutions stay"
        names = truncate_list(convolutions, 6)
        notes.append(f"{len(convolutions)} {noun} in floating point, {share} % of the parameters: {names}")
    return "; ".join(filter(None, notes))


def _are_shared(model: nn.Module, layers: list[Layer]) -> bool:
    """Whether the weight of one of these layers is a parameter of several modules."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return any(len(holders[id(layer.weight)]) > 1 for layer in layers)
