"""Bits given to the layers that need them: for each layer 4 or 8 bits or floating point, within a size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.files import write_atomically
from edgetune.core.inputs import Inputs
from edgetune.core.layers import matches, no_match_error
from edgetune.core.numbers import MIB
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.core.widths import BitWidths
from edgetune.quant.allocation import BYTES, MS, Allocation, LayerBits, Menu, Width, allocate, average_bits
from edgetune.quant.layers import EIGHT_BITS, LayerChoice, choose_layers
from edgetune.quant.menu import (
    build_menu,
    choice_of,
    compare,
    grid_of,
    other_bytes,
    other_ms,
    tie_heads,
    tied_heads,
    uniform_choices,
    uniform_times,
)
from edgetune.quant.padded import rebuild_layers
from edgetune.quant.round_layers import Algorithm, round_layers
from edgetune.quant.rounding import LEAST_GROUP, Grid
from edgetune.quant.sensitivity import reached_layers

_ALLOCATION = "edgetune_allocation"  # the attribute of a model that says which bits its layers got
_HELD_OUT = 4  # batches after the calibration's, on which allocations are compared
_LOSSES = {
    "fisher": "half the squared rounding error weighed by Fisher information, which predicts the KL divergence in nats",
    "output": "the squared error of the layer's outputs, relative to them",
}
_TABLE_WIDTHS: Mapping[str, Width] = {"int8": "int8", "int4": "int4", "none": "float"}


class Bits(Technique):
    """Quantize each linear and embedding table to 4 or 8 bits, or leave it in floating point, as much as it matters.

    The choice is the one of the least predicted loss within `size_mib`, of the whole model as stored, or
    `average_bits`, of a weight in these layers with its scales, and `latency_ms`, predicted for `device` from the
    programs with one width everywhere. The loss of a choice is its squared error weighed by Fisher information from
    labels that are drawn from the model's own predictions (`score: fisher`), or the relative error of the layer's
    outputs (`score: output`). Then weights are rounded as in `int4`.

    What is reported beside it: the KL divergence from the floating-point model on held-out batches, weights rounded
    to nearest, of this allocation, of the best uniform one within the same size, of a random one of that size, and
    of all layers in 8 bits and in 4.
    `allocation` instead says what each layer gets, by patterns of which the last that matches counts; layers without
    one stay in floating point. A run writes what was chosen to `allocation.yaml` in this form.
    """

    name: ClassVar[str] = "bits"
    takes: ClassVar[Trait] = Trait.SPLIT
    leaves: ClassVar[Trait] = Trait.INTEGER

    average_bits: float | None = Field(default=None, gt=4, le=32)
    """Maximum average of the stored bits of a weight, scales included, in the layers that it chooses for."""
    size_mib: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Maximum size of the whole model as stored, in MiB."""
    latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Maximum predicted time of the program on `device`, in ms; alone, or with one of the limits above."""
    device: str | None = None
    """The device that `latency_ms` is for, as in `profile.devices`."""
    allocation: dict[str, Width] | None = None
    """What layers get, by patterns: `int4` (groups of 32), `int4-channel`, `int8` or `float`."""
    score: Literal["fisher", "output"] = "fisher"
    """What counts as the loss of a choice: Fisher information, or the error of the layer's outputs."""
    algorithm: Algorithm = "gptq"
    """How weights in 4 bits are rounded."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows to calibrate on."""
    seed: int = 0
    """Seed of the labels that are drawn."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to choose for."""
    skip: tuple[str, ...] = ()
    """Patterns of linear layers and embedding tables to keep in floating point."""
    embeddings: Literal["auto", "int8", "int4", "none"] = "auto"
    """Precision of embedding tables; `auto`: chosen like that of linears."""

    @model_validator(mode="after")
    def _one_limit(self) -> Bits:
        given = sum(limit is not None for limit in (self.average_bits, self.size_mib, self.allocation))
        if given > 1 or (not given and self.latency_ms is None) or (self.allocation is not None and self.latency_ms):
            raise ValueError("give one of average_bits, size_mib and allocation, or latency_ms")
        if (self.latency_ms is None) != (self.device is None):
            raise ValueError("latency_ms and device go together")
        if self.allocation == {}:
            raise ValueError('allocation: empty; write patterns, such as {"*": "int4"}')
        return self

    @property
    def width_multiple(self) -> int:
        """One group."""
        return LEAST_GROUP

    @property
    def needs(self) -> Needs:
        """Batches, unless all is written."""
        return "nothing" if self.allocation and self.algorithm != "gptq" else "batches"

    @property
    def batches_wanted(self) -> int:
        """Those that it calibrates on, and held-out ones."""
        return self.calibration_batches + _HELD_OUT

    def for_rehearsal(self) -> Technique:
        """Fewer batches, rounded to nearest, without predicting times."""
        update: dict[str, Any] = {"calibration_batches": 1, "algorithm": "absmax", "latency_ms": None, "device": None}
        if self.size_mib is None and self.allocation is None:
            update["average_bits"] = self.average_bits or 8.5
        return self.model_copy(update=update)

    def resolve(self, model: nn.Module, sample: Sample | None = None) -> Allocation:
        """What each layer would get, as a printable value. The model does not change."""
        return self._resolve(model, sample)[1]

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Quantize in place. The modules keep their classes and run in eager mode, but the weights can no longer be
        trained."""
        layers, allocation = self._resolve(model, sample)
        widths = allocation.widths()
        chosen = layers.with_grids({n: grid for n, w in widths.items() if (grid := grid_of(layers, n, w))})
        with chosen.replace_weights(may_fail=self.algorithm == "gptq"):
            round_layers(chosen, self.algorithm, sample, self.calibration_batches)
        setattr(model, _ALLOCATION, allocation)
        return model

    def note(self, model: nn.Module) -> str:
        """The bits that the layers got, and what they are compared with."""
        allocation: Allocation = getattr(model, _ALLOCATION)
        return allocation.summary()

    def bit_widths(self, model: nn.Module) -> BitWidths:
        """The widths of all layers, and what they are compared with."""
        allocation: Allocation = getattr(model, _ALLOCATION)
        return allocation.to_bit_widths("" if self.allocation else _LOSSES[self.score])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the allocation as `folder/allocation.yaml`, in the format of a recipe."""
        import yaml

        allocation: Allocation = getattr(model, _ALLOCATION)
        comment = "".join(f"# {line}\n" for line in str(allocation).splitlines())
        text = yaml.safe_dump({"allocation": allocation.to_mapping()}, sort_keys=False)
        write_atomically(folder / "allocation.yaml", comment + text)

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Quantized tables without their `padding_idx`."""
        return rebuild_layers(model, state)

    def _resolve(self, model: nn.Module, sample: Sample | None) -> tuple[LayerChoice, Allocation]:
        with silence_libraries():
            require("torchao", self.name)
        if self.needs == "batches":
            sample = self.require_sample(sample)
        layers = choose_layers(
            self.name, model, sample, linears=[(self.targets, EIGHT_BITS)], skip=self.skip,
            tables=None if self.embeddings == "none" else Grid(8), stacklevel=5,
        )  # fmt: skip
        if self.allocation is not None:
            return layers, self._written(layers, self.allocation)
        assert sample is not None
        batches = sample.first_batches(self.batches_wanted)
        calibration = batches[: self.calibration_batches]
        table_width = None if self.embeddings == "auto" else _TABLE_WIDTHS[self.embeddings]
        times = {} if self.device is None else uniform_times(layers, self.device, sample.require_layers_ms())
        menu = build_menu(layers, self.score, calibration, self.seed, table_width, times)
        uniform = uniform_choices(layers, menu)
        rest = Allocation((), other_bytes(layers), other_ms=other_ms(layers, times))
        beside = {BYTES: rest.size_bytes, MS: rest.latency_ms}
        menu, choices = self._choose_for_all_outputs(layers, menu, beside, calibration)
        allocation = replace(rest, choices=choices)
        return layers, compare(layers, menu, allocation, uniform, calibration, batches[len(calibration) :])

    def _choose_for_all_outputs(
        self, layers: LayerChoice, menu: Menu, beside: Mapping[str, float], batches: list[Inputs]
    ) -> tuple[Menu, tuple[LayerBits, ...]]:
        """As `_choose`, with 8 bits where the limit allows for layers that run and on which no logits depend."""
        idle = {n: layers.layers[n] for n, choices in menu.items() if not any(choice.loss for choice in choices)}
        reached = reached_layers(layers.model, idle, batches) if idle else set()
        wide = {name: [choice for choice in menu[name] if choice.width == "int8"] or menu[name] for name in reached}
        try:
            best, bits = self._choose(layers, {**menu, **wide}, beside), "8 bits"
        except EdgetuneError:
            best, bits = self._choose(layers, menu, beside), "the fewest bits"
        for names, reason in (
            ([name for name in idle if name not in reached], "no calibration batch reaches these layers, so they get "
             "the fewest bits"),
            ([name for name in idle if name in reached], "the logits do not depend on these layers on the calibration "
             f"batches, or rounding does not change them, so they get {bits}"),
        ):  # fmt: skip
            if names:
                message = f"{self.name}: {truncate_list(names)}: {reason}"
                warnings.warn(message, stacklevel=5)  # the caller of `et.apply`
        return best

    def _choose(
        self, layers: LayerChoice, menu: Menu, beside: Mapping[str, float]
    ) -> tuple[Menu, tuple[LayerBits, ...]]:
        """The best choices, with tied heads stored once or apart, and the menu that they are from."""
        answers: list[tuple[Menu, tuple[LayerBits, ...]]] = []
        tied = tie_heads(layers, menu)
        for each in [menu] if tied == menu else [tied, menu]:
            try:
                answers.append((each, allocate(each, self._limits(each, int(beside[BYTES])), beside)))
            except EdgetuneError as error:
                if each is menu and not answers:
                    raise (self._average_error(menu) or error) from None
        return min(answers, key=lambda answer: sum(choice.loss for choice in answer[1]))

    def _written(self, layers: LayerChoice, patterns: Mapping[str, Width]) -> Allocation:
        widths: dict[str, Width] = dict.fromkeys(layers.layers, "float")
        for pattern, width in patterns.items():
            names = [name for name in layers.layers if matches(name, [pattern])]
            if not names:
                raise no_match_error("allocation: the pattern matches no layer", pattern, layers.layers)
            widths |= dict.fromkeys(names, width)
        grids = {name: grid for name, width in widths.items() if (grid := grid_of(layers, name, width))}
        unfit = {name for name, grid in grids.items() if not layers.fits(name, grid, pad=False)}
        layers.with_grids(grids).fit_widths(pad=False, stacklevel=6)
        widths |= dict.fromkeys(unfit, "int8")
        heads = {head for head, table in tied_heads(layers).items() if widths[head] == widths[table] == "int8"}
        choices = (choice_of(layers, n, w, 0.0, is_repeated=n in heads) for n, w in widths.items())
        return Allocation(tuple(choices), other_bytes(layers))

    def _average_error(self, menu: Menu) -> EdgetuneError | None:
        """That no allocation has so few bits, in the unit of the setting; `None` if it is not the only limit."""
        if self.average_bits is None or self.latency_ms is not None:
            return None
        free = [choices for choices in menu.values() if self.embeddings == "auto" or not choices[0].is_table]
        least = average_bits([min(choices, key=lambda choice: choice.size_bytes) for choices in free])
        return EdgetuneError(
            "no allocation of bits stays within the limit",
            where="average_bits",
            got=self.average_bits,
            allowed=[f"from {math.ceil(least * 100) / 100}"],
            action="raise the limit, or skip layers whose width is not a multiple of 32, which get 8 bits at least",
            exit_code=Exit.BUDGET,
        )

    def _limits(self, menu: Menu, other_bytes: int) -> dict[str, float]:
        """Of the whole model."""
        limits: dict[str, float] = {}
        if self.size_mib is not None:
            limits[BYTES] = self.size_mib * MIB
        if self.average_bits is not None:
            free = [choices for choices in menu.values() if self.embeddings == "auto" or not choices[0].is_table]
            fixed = [choices[0] for choices in menu.values() if self.embeddings != "auto" and choices[0].is_table]
            weights = sum(choices[0].weights for choices in free)
            limits[BYTES] = other_bytes + self.average_bits / 8 * weights + sum(choice.size_bytes for choice in fixed)
        if self.latency_ms is not None:
            limits[MS] = self.latency_ms
        return limits
