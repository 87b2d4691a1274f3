"""8-bit weights with one scale per output and 8-bit dynamic activations (8da8w), and embeddings of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.layers import EIGHT_BITS, TableBits, choose_layers, describe_float_parts, table_grid
from edgetune.quant.padded import rebuild_layers
from edgetune.quant.round_layers import round_layers

_TABLE_GROUP = 32


class Int8Dynamic(Technique):
    """Quantize linear weights to 8 bits, symmetric, with one scale per output, and activations as the model runs.

    No calibration is needed: activations get a scale for each token, both in eager mode and in the exported program.
    It loses less quality than `int4` and takes twice the size. Embedding tables get 8 bits with one scale per row or,
    with `embeddings="int4"`, 4 bits with one scale for each 32 values of a row (8 bits, with a warning, where 32 does
    not divide the width). A table that is read in another way stays in floating point; a warning names it unless `skip`
    does. A head that shares its weight with the table is untied. Fused experts of a mixture become one linear for each
    expert, which computes every token.
    """

    name: ClassVar[str] = "int8_dynamic"
    takes: ClassVar[Trait] = Trait.SPLIT
    leaves: ClassVar[Trait] = Trait.INTEGER

    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to quantize."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    embeddings: TableBits = "int8"
    """Precision of embedding tables; `none`: floating point."""

    @property
    def rounding(self) -> Mapping[str, object]:
        """All of its linears in 8 bits."""
        settings = {"targets": (), "int8_linears": self.targets, "skip": self.skip, "embeddings": self.embeddings}
        return {**settings, "group_size": _TABLE_GROUP}

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The modules keep their classes and run in eager mode, but the weights can no longer be
        trained."""
        with silence_libraries():
            require("torchao", self.name)
        layers = choose_layers(
            self.name, model, sample, linears=[(self.targets, EIGHT_BITS)], skip=self.skip,
            tables=table_grid(self.embeddings, _TABLE_GROUP),
        ).fit_widths(pad=False)  # fmt: skip
        with layers.replace_weights():
            round_layers(layers, "absmax", None, 0)
        return model

    def note(self, model: nn.Module) -> str:
        """What splitting experts costs, and the convolutions that stay in floating point."""
        return describe_float_parts(model)

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split experts, and quantized tables without their `padding_idx`."""
        return rebuild_layers(model, state)
