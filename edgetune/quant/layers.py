"""Choose the linears and embedding tables that get integer weights, and give them these weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.freed import release_freed_memory
from edgetune.core.layers import matches, select
from edgetune.core.plain import computed_tensor, refuse_computed
from edgetune.core.technique import Sample
from edgetune.lean.reads import readers_of, refuse_readers
from edgetune.quant.blocks import quantize_weight
from edgetune.quant.rounding import Grid
from edgetune.quant.size import weight_bits
from edgetune.quant.tables import looks_up

EIGHT_BITS = Grid(8, scale_dtype=torch.float32)  # of a linear: XNNPACK stores the scales of 8 bits in fp32
TableBits = Literal["int8", "int4", "none"]


@dataclass(frozen=True)
class LayerChoice:
    """The layers of one model that a technique gives integer weights. All of them were checked."""

    technique: str  # its name, for messages
    model: nn.Module
    linears: dict[str, nn.Linear]
    wide: frozenset[str]  # those of the linears that get 8 bits
    tables: dict[str, nn.Embedding]

    @property
    def narrow(self) -> dict[str, nn.Linear]:
        """The linears that get 4 bits."""
        return {name: layer for name, layer in self.linears.items() if name not in self.wide}

    def check_widths(self, divisor: int, reason: str, *, tables: bool) -> None:
        """Raise for a linear in 4 bits or, with `tables`, a table whose width `divisor` does not divide."""
        widths = [(n, m.in_features, "the input width of a layer") for n, m in self.narrow.items()]
        widths += [(n, m.embedding_dim, "the width of an embedding") for n, m in self.tables.items() if tables]
        for name, width, kind in widths:
            if width % divisor:
                raise EdgetuneError(
                    f"{kind} is not a multiple of {reason} {divisor}",
                    where=name,
                    got=width,
                    action=f"prune with round_to={divisor}, or leave the layer out with skip: [{name!r}]",
                )

    @contextmanager
    def replace_weights(self, may_fail: bool = False) -> Iterator[None]:
        """The body gives the layers integer weights. With `may_fail` they get their own back if it raises.

        Afterwards the model no longer trains, and its config says that weights which were shared are not.
        """
        layers: list[nn.Linear | nn.Embedding] = [*self.linears.values(), *self.tables.values()]
        shared = _are_shared(self.model, layers)
        before = [(layer, layer.weight) for layer in layers] if may_fail else []  # else each is freed at once
        try:
            yield
        except BaseException:
            for layer, weight in before:
                layer.weight = weight
            raise
        config = getattr(self.model, "config", None)
        if shared and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]  # so that nothing ties them again
        for table in self.tables.values():
            table.padding_idx = None  # type: ignore[assignment]
        self.model.requires_grad_(False)
        before.clear()
        release_freed_memory()  # the weights in floating point

    def quantize_tables(self, grid: Grid) -> None:
        """Round every table to nearest. The scales have the type of the weight."""
        for table in self.tables.values():
            table.weight = quantize_weight(table.weight, grid, rounds_activations=False)

    def quantize_wide(self) -> None:
        """Round the linears in 8 bits to nearest, with one scale for each output."""
        for name in self.wide:
            layer = self.linears[name]
            layer.weight = quantize_weight(layer.weight, EIGHT_BITS, rounds_activations=True)


def choose_layers(
    technique: str,
    model: nn.Module,
    sample: Sample | None,
    *,
    targets: tuple[str, ...] | None,
    wide: tuple[str, ...] | None,
    skip: tuple[str, ...],
    embeddings: TableBits,
) -> LayerChoice:
    """The linears of `targets` and, in 8 bits, of `wide`, and all tables, without those of `skip`.

    Warns of what stays in floating point. Raises `EdgetuneError` for a pattern without a match, a linear whose weight
    is read elsewhere or computed, a table with `max_norm`, and weights that are not finite.
    """
    skip_linears, skip_tables = _split_skips(model, skip)
    in_4_bits, in_8_bits = (
        {} if patterns is None else select(model, patterns, skip_linears, nn.Linear, _is_choosable)
        for patterns in (targets, wide)
    )
    linears: dict[str, Any] = in_4_bits | in_8_bits
    tables, in_float = _choose_tables(model, skip_tables, embeddings)
    readers, _ = readers_of(model, [*linears, *tables], sample)
    in_float += [name for name in readers if tables.pop(name, None)]
    refuse_readers(model, _without_encoder_layers(model, {n: r for n, r in readers.items() if n in linears}))
    for name, layer in (*linears.items(), *tables.items()):
        if name in linears:
            refuse_computed(name, layer)
        else:
            _refuse_max_norm(name, layer)
        _refuse_infinite(name, layer)
    for message in (_describe_kept_tables(in_float), _describe_bare_weights(model)):
        if message:
            warnings.warn(f"{technique}: {message}", stacklevel=4)  # the caller of `et.apply`
    return LayerChoice(technique, model, linears, frozenset(in_8_bits), tables)


def table_grid(embeddings: TableBits, group_size: int | None) -> Grid:
    """The grid of tables: in 4 bits with groups, in 8 with a scale for each row. The scales have the weight's type."""
    return Grid(4, group_size) if embeddings == "int4" else Grid(8)


def drop_padding_indices(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a plain model the structure of a quantized one: quantized tables have no `padding_idx`."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and weight_bits(state[f"{name}.weight"]) is not None:
            table.padding_idx = None  # type: ignore[assignment]
    return model


def _split_skips(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The skip patterns for linears and for embeddings; `select` raises for one that matches neither."""
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for_tables = [p for p in skip if any(matches(n, [p]) for n in tables)]
    for_linears = [p for p in skip if p not in for_tables or any(matches(n, [p]) for n in linears)]
    return for_linears, for_tables


def _choose_tables(
    model: nn.Module, skip: list[str], embeddings: TableBits
) -> tuple[dict[str, nn.Embedding], list[str]]:
    """The tables to quantize, and the names of those that cannot be."""
    if embeddings == "none":
        return {}, []
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_float(m)}
    wanted = {n: m for n, m in tables.items() if not matches(n, skip)}
    fit = {n: m for n, m in wanted.items() if m.max_norm is not None or looks_up(m)}
    return fit, [n for n in wanted if n not in fit]


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


def _refuse_max_norm(name: str, table: nn.Embedding) -> None:
    if table.max_norm is not None:
        raise EdgetuneError(
            "an embedding with max_norm rewrites its rows as it runs and cannot be quantized",
            where=name,
            got=table.max_norm,
            action=f"set max_norm=None, or skip: [{name!r}]",
        )


def _refuse_infinite(name: str, layer: nn.Linear | nn.Embedding) -> None:
    weight = layer.weight.detach()
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


def _are_shared(model: nn.Module, layers: list[nn.Linear | nn.Embedding]) -> bool:
    """Whether the weight of one of these layers is a parameter of several modules."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    return any(len(holders[id(layer.weight)]) > 1 for layer in layers)
