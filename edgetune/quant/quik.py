"""QUIK: most of a linear in 4 bits, its outlying inputs in 8, and down-projections whole in 8.

Ashkboos et al., 2023, arXiv:2310.09259. There activations have 4 bits as well, for which XNNPACK has no kernels: here
they have 8, and the outlying inputs are selected rather than permuted to the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from edgetune.core.layers import parameter_owners, select
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.experts import split_as_stored
from edgetune.quant.layers import EIGHT_BITS, TableBits, choose_layers, four_bits, table_grid
from edgetune.quant.outliers import can_split, split_outliers
from edgetune.quant.padded import rebuild_layers
from edgetune.quant.round_layers import Algorithm, round_layers
from edgetune.quant.rounding import LEAST_GROUP
from edgetune.quant.split import join_linear, rebuild_split


class Quik(Technique):
    """`outliers` and `int4` in one: linears in 4 bits with one scale per output, and their outlying inputs in 8 bits.

    The inputs of the largest range on calibration batches go through a small linear of their own, in 8 bits. Linears
    with more than twice as many inputs as outputs, such as the down-projection of an FFN, get 8 bits as a whole, as do
    those that share their weight and those that `int8_linears` matches. Embedding tables: as in `int4`.
    """

    name: ClassVar[str] = "quik"
    leaves: ClassVar[Trait] = Trait.INTEGER

    share: float = Field(default=0.01, gt=0, le=0.5)
    """Share of the inputs of a layer that get 8 bits, at least two."""
    algorithm: Algorithm = "gptq"
    """How weights in 4 bits are rounded."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows for ranges and for `gptq`."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to quantize."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    int8_linears: tuple[str, ...] = ()
    """Patterns of more linear layers to quantize to 8 bits as a whole."""
    embeddings: TableBits = "int8"
    """Precision of embedding tables; `none`: floating point."""

    @property
    def width_multiple(self) -> int:
        """XNNPACK's least."""
        return LEAST_GROUP

    @property
    def needs(self) -> Needs:
        """Batches to measure ranges on."""
        return "batches"

    def for_rehearsal(self) -> Technique:
        """The same structure, from one batch, rounded to nearest."""
        return self.model_copy(update={"calibration_batches": 1, "algorithm": "absmax"})

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Split and quantize in place. The weights can no longer be trained."""
        with silence_libraries():
            require("torchao", self.name)
        sample = self.require_sample(sample)
        batches = sample.first_batches(self.calibration_batches)
        layers = choose_layers(
            self.name, model, sample, linears=[(self.targets, four_bits(None))], skip=self.skip,
            tables=table_grid(self.embeddings, LEAST_GROUP),
        )  # fmt: skip
        whole = layers.linears.keys() & self._whole(model)
        splittable = {name: layer for name, layer in layers.linears.items() if name not in whole}
        split = split_outliers(model, splittable, self.share, batches) if splittable else []
        layers = layers.with_grids(layers.grids | dict.fromkeys(whole, EIGHT_BITS)).with_outliers(EIGHT_BITS)
        layers = layers.fit_widths(pad=False)
        try:
            with layers.replace_weights(may_fail=True):
                round_layers(layers, self.algorithm, sample, self.calibration_batches)
        except BaseException:
            for name in split:
                join_linear(layers.linears[name])
            raise
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Split linears, and quantized tables without their `padding_idx`."""
        return rebuild_layers(rebuild_split(split_as_stored(model, state), state), state)

    def _whole(self, model: nn.Module) -> set[str]:
        """The linears that get 8 bits and are not split."""
        named = dict(model.named_modules())
        owners = parameter_owners(named)
        linears = {name: layer for name, layer in named.items() if isinstance(layer, nn.Linear)}
        narrowing = {name for name, layer in linears.items() if layer.in_features > 2 * layer.out_features}
        narrow = {name for name, layer in linears.items() if not can_split(layer)}
        shared = {name for name, layer in linears.items() if len(owners.get(id(layer.weight), ())) > 1}
        written = select(model, self.int8_linears, (), nn.Linear) if self.int8_linears else {}
        return narrowing | narrow | shared | written.keys()
