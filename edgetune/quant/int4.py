"""4-bit weights in groups with 8-bit dynamic activations (8da4w), and embeddings of 8 or 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.freed import release_freed_memory
from edgetune.core.layers import matches, select
from edgetune.core.plain import computed_tensor, refuse_computed
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.reads import readers_of, refuse_readers
from edgetune.quant.blocks import quantize_layer
from edgetune.quant.size import weight_bits
from edgetune.quant.tables import looks_up


class Int4(Technique):
    """Quantize linear weights to 4 bits, symmetric, with one scale for each `group_size` inputs of an output.

    Activations are quantized dynamically to 8 bits per token, both in eager mode and in the exported program, so
    that both compute the same. Embedding tables get 8 bits with one scale per row or, with `embeddings="int4"`, 4
    bits with one scale for each `group_size` values of a row. Their `padding_idx` is dropped, which only affects
    gradients. A table that is read in another way than by looking up rows, such as Whisper's positions, stays in
    floating point; a warning names it unless `skip` does.

    `int8_linears` get 8 bits with one scale per output, for example for a head over a large vocabulary. A head that
    shares its weight with the embedding is untied: the head and the table are each quantized from the shared float
    weight, and `config.tie_word_embeddings` becomes False. Raises `EdgetuneError` for a width that `group_size` does
    not divide. It uses torchao's `Int8DynamicActivationIntxWeightConfig`, which ExecuTorch stores in 4 bits.
    """

    name: ClassVar[str] = "int4"
    leaves: ClassVar[Trait] = Trait.INTEGER

    group_size: int = Field(default=32, ge=32, multiple_of=32)  # XNNPACK's kernels take multiples of 32
    """Number of weights that share a scale: a multiple of 32 that divides every input width."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to quantize."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    int8_linears: tuple[str, ...] = ()
    """Patterns of linear layers to quantize to 8 bits instead of 4."""
    embeddings: Literal["int8", "int4", "none"] = "int8"
    """Precision of embedding tables; `none`: floating point."""
    activation_bits: Literal[8] = 8
    """Bits of the activations, which are quantized dynamically."""

    @property
    def width_multiple(self) -> int:
        """One group."""
        return self.group_size

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The modules keep their classes and run in eager mode, but the weights can no longer be
        trained."""
        with silence_libraries():
            require("torchao", "int4")
        skip_linears, skip_tables = self._split_skips(model)
        linears = select(model, self.targets, skip_linears, nn.Linear, _is_choosable)
        wide = select(model, self.int8_linears, skip_linears, nn.Linear, _is_choosable) if self.int8_linears else {}
        linears |= wide
        tables, left = self._choose_tables(model, skip_tables)
        readers, _ = readers_of(model, [*linears, *tables], sample)
        left += [name for name in readers if tables.pop(name, None)]
        refuse_readers(model, _without_encoder_layers(model, {n: r for n, r in readers.items() if n in linears}))
        for name, layer in linears.items():
            refuse_computed(name, layer)
            if name not in wide:
                self._check_width(name, layer.in_features, "the input width of a layer")  # type: ignore[arg-type]
        for name, table in tables.items():
            _check_table(name, table)
            if self.embeddings == "int4":
                self._check_width(name, table.embedding_dim, "the width of an embedding")
        for message in (_describe_kept_tables(left), _describe_bare_weights(model)):
            if message:
                warnings.warn(message, stacklevel=3)  # the caller of `et.apply`
        _untie(model, linears, tables)
        table_config = _table_config(4 if self.embeddings == "int4" else 8, self.group_size)
        for table in tables.values():
            table.padding_idx = None  # type: ignore[assignment]
            quantize_layer(table, table_config)
        four_bits, eight_bits = _linear_configs(self.group_size)
        for name, layer in linears.items():
            quantize_layer(layer, eight_bits if name in wide else four_bits)
        release_freed_memory()  # the weights in floating point
        return model.requires_grad_(False)

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Quantized tables without their `padding_idx`."""
        for name, table in model.named_modules():
            if isinstance(table, nn.Embedding) and weight_bits(state[f"{name}.weight"]) is not None:
                table.padding_idx = None  # type: ignore[assignment]
        return model

    def _split_skips(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The skip patterns for linears and for embeddings; `select` raises for one that matches neither."""
        tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for_tables = [p for p in self.skip if any(matches(n, [p]) for n in tables)]
        for_linears = [p for p in self.skip if p not in for_tables or any(matches(n, [p]) for n in linears)]
        return for_linears, for_tables

    def _choose_tables(self, model: nn.Module, skip: list[str]) -> tuple[dict[str, nn.Embedding], list[str]]:
        """The tables to quantize, and the names of those that cannot be."""
        if self.embeddings == "none":
            return {}, []
        tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_float(m)}
        wanted = {n: m for n, m in tables.items() if not matches(n, skip)}
        # one with max_norm is refused below; calling it, as looks_up may, would rewrite a row
        fit = {n: m for n, m in wanted.items() if m.max_norm is not None or looks_up(m)}
        return fit, [n for n in wanted if n not in fit]

    def _check_width(self, name: str, width: int, width_name: str) -> None:
        if width % self.group_size:
            raise EdgetuneError(
                f"int4: {width_name} is not a multiple of group_size {self.group_size}",
                where=name,
                got=width,
                action=f"prune with round_to={self.group_size}, or leave the layer out with skip: [{name!r}]",
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


def _check_table(name: str, table: nn.Embedding) -> None:
    if table.max_norm is not None:
        raise EdgetuneError(
            "int4: an embedding with max_norm rewrites its rows as it runs and cannot be quantized",
            where=name,
            got=table.max_norm,
            action=f"set max_norm=None, or skip: [{name!r}]",
        )


def _describe_kept_tables(names: list[str]) -> str:
    return (
        f"int4: {truncate_list(names)}: an embedding whose weight is read in another way than by looking rows up; "
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
        f"int4: {truncate_list(names)}: these weights do not belong to linear layers and stay in floating point"
        if names
        else ""
    )


def _untie(model: nn.Module, linears: dict[str, nn.Module], tables: dict[str, nn.Embedding]) -> None:
    """Record in the config that shared weights are no longer shared, so that nothing ties them again."""
    chosen = [*linears.values(), *tables.values()]
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))
    if not any(len(holders[id(layer.weight)]) > 1 for layer in chosen):
        return
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def _linear_configs(group_size: int) -> tuple[Any, Any]:
    """The torchao configs of linears in 4 and in 8 bits."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, MappingType
    from torchao.quantization.granularity import PerAxis, PerGroup

    def linears(weight_dtype: torch.dtype, granularity: Any, scale_dtype: torch.dtype) -> Any:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=weight_dtype,
            weight_granularity=granularity,
            weight_mapping_type=MappingType.SYMMETRIC,
            weight_scale_dtype=scale_dtype,  # as XNNPACK stores them: eager mode computes with the same scales
        )

    return (
        linears(torch.int4, PerGroup(group_size), torch.bfloat16),  # type: ignore[attr-defined]
        linears(torch.int8, PerAxis(0), torch.float32),
    )


def _table_config(bits: Literal[4, 8], group_size: int) -> Any:
    """The torchao config of tables; `group_size` is for 4 bits only. The scales keep the type of the weight."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    if bits == 8:
        return IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group_size))  # type: ignore[attr-defined]
