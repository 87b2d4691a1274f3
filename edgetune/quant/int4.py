"""4-bit weights in groups with 8-bit dynamic activations (8da4w), and 8-bit embeddings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from edgetune.quiet import quiet
from edgetune.registry import require
from edgetune.targets import matches, select
from edgetune.technique import EdgetuneError, Sample, Technique


class Int4(Technique):
    """Linear weights to 4 bits, symmetric, one scale for each `group_size` inputs of each output.

    Activations are quantized to 8 bits per token while the model runs, in eager mode as in the exported program,
    so both compute the same. Embedding tables become 8 bits with one scale per row; `padding_idx` is dropped from
    them, which changes no output, only a gradient that a quantized table does not have.

    `int8_linears` are kept at 8 bits, one scale for each output: a head over a large vocabulary suffers from 4.
    A head that shares its weight with the embedding is untied: both are quantized from the shared float weight,
    the head to its bits and the table to 8, and `config.tie_word_embeddings` becomes False.
    Raises `EdgetuneError` for a width that `group_size` does not divide. Method: torchao,
    `Int8DynamicActivationIntxWeightConfig`; the format that ExecuTorch stores in 4 bits.
    """

    name: ClassVar[str] = "int4"
    after: ClassVar[frozenset[str]] = frozenset({"lora", "sparse-update", "nf4", "prune"})
    plain: ClassVar[bool] = True

    group_size: int = Field(default=32, ge=32, multiple_of=32)  # XNNPACK's kernels take multiples of 32
    targets: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    int8_linears: tuple[str, ...] = ()
    embeddings: Literal["int8", "none"] = "int8"
    activation_bits: Literal[8] = 8

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The model keeps its classes and runs in eager mode; its weights can no longer train."""
        with quiet():
            require("torchao", "int4")
        skip_linears, skip_tables = self._skips(model)
        linears = select(model, self.targets, skip_linears, nn.Linear, _is_float)
        wide = select(model, self.int8_linears, skip_linears, nn.Linear, _is_float) if self.int8_linears else {}
        linears |= wide
        tables = self._tables(model, skip_tables)
        for name, layer in linears.items():
            _check_called(name, layer)
            if name not in wide:
                self._check_width(name, layer)
        for name, table in tables.items():
            _check_table(name, table)
        _untie(model, linears, tables)
        four_bits, eight_bits, table_config = _configs(self.group_size)
        for table in tables.values():
            table.padding_idx = None  # type: ignore[assignment]
            _quantize(table, table_config)
        for name, layer in linears.items():
            _quantize(layer, eight_bits if name in wide else four_bits)
        return model.requires_grad_(False)

    def _skips(self, model: nn.Module) -> tuple[list[str], list[str]]:
        """The skip patterns that name linears and those that name embeddings; one that names neither goes to
        the linears, where `select` raises.
        """
        tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for_tables = [p for p in self.skip if any(matches(n, [p]) for n in tables)]
        for_linears = [p for p in self.skip if p not in for_tables or any(matches(n, [p]) for n in linears)]
        return for_linears, for_tables

    def _tables(self, model: nn.Module, skip: list[str]) -> dict[str, nn.Embedding]:
        if self.embeddings == "none":
            return {}
        found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_float(m)}
        return {n: m for n, m in found.items() if not matches(n, skip)}

    def _check_width(self, name: str, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Linear)
        width = layer.in_features
        if width % self.group_size:
            raise EdgetuneError(
                f"int4: the input width of a layer is no multiple of group_size {self.group_size}",
                where=name,
                got=width,
                action=f"prune with round_to={self.group_size}, or leave the layer out with skip: [{name!r}]",
            )


def _is_float(layer: nn.Module) -> bool:
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _check_called(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise EdgetuneError(
            "int4: nn.MultiheadAttention reads the weight of this layer directly and cannot use a quantized one",
            where=name,
            action=f"leave it out with skip: [{name!r}]",
        )


def _check_table(name: str, table: nn.Embedding) -> None:
    if table.max_norm is not None:
        raise EdgetuneError(
            "int4: an embedding with max_norm rewrites its rows as it runs and cannot be quantized",
            where=name,
            got=table.max_norm,
            action=f"set max_norm=None, or skip: [{name!r}]",
        )


def _untie(model: nn.Module, linears: dict[str, nn.Module], tables: dict[str, nn.Embedding]) -> None:
    """Say in the config that shared weights are no longer shared, so that nothing ties them again."""
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


def _configs(group_size: int) -> tuple[Any, Any, Any]:
    """For linears in 4 and in 8 bits, and for tables."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerAxis, PerGroup

    def linears(weight_dtype: torch.dtype, granularity: Any, scale_dtype: torch.dtype) -> Any:
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=weight_dtype,
            weight_granularity=granularity,
            weight_mapping_type=MappingType.SYMMETRIC,
            weight_scale_dtype=scale_dtype,  # as XNNPACK keeps them: eager mode computes with the same scales
        )

    return (
        linears(torch.int4, PerGroup(group_size), torch.bfloat16),  # type: ignore[attr-defined]
        linears(torch.int8, PerAxis(0), torch.float32),
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
    )


def _quantize(layer: nn.Module, config: Any) -> None:
    """Quantize this one layer's weight. Each layer reads the float weight it holds, so tied ones stay right."""
    from torchao.quantization import quantize_

    with quiet():
        quantize_(layer, config, filter_fn=lambda module, _: module is layer)
