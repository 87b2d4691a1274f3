"""The widths that each layer of a model may get, with what each costs and loses; and allocations compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs
from edgetune.quant.allocation import (
    BYTES,
    WIDTHS,
    Allocation,
    LayerBits,
    MeasuredAllocation,
    Menu,
    Width,
    allocate_at_random,
    allocate_uniformly,
    average_bits,
    choose_widths,
)
from edgetune.quant.blocks import quantize_weight
from edgetune.quant.hessians import calibrate
from edgetune.quant.layers import EIGHT_BITS, LayerChoice, four_bits
from edgetune.quant.round_layers import round_layers
from edgetune.quant.rounding import Grid, absmax_codes, mse_codes
from edgetune.quant.sensitivity import fisher_information, mean_kl, reference_logits
from edgetune.quant.size import stored_bytes, tensor_bytes

_RANDOM_SEED = 0
_LINEAR_GRIDS = {"int8": EIGHT_BITS, "int4": four_bits(32), "int4-channel": four_bits(None)}
_TABLE_GRIDS = {"int8": Grid(8), "int4": Grid(4, 32), "int4-channel": Grid(4)}


def build_menu(
    layers: LayerChoice,
    score: Literal["fisher", "output"],
    batches: list[Inputs],
    seed: int,
    table_width: Width | None,
    times: Mapping[Width, Mapping[str, float]],
) -> Menu:
    """The possible widths of each layer, with their losses. `table_width`: of all tables; `None`: chosen too.

    `times`: of `uniform_times`; empty without a device.
    """
    widths = {name: possible_widths(layers, name) for name in layers.layers}
    if table_width is not None:
        widths |= {name: [table_width] for name in layers.tables}
    losses = (
        fisher_losses(layers, widths, batches, seed) if score == "fisher" else output_losses(layers, widths, batches)
    )
    return {
        name: sorted(
            (choice_of(layers, name, w, losses[name, w], _layer_ms(times.get(w, {}), name)) for w in of),
            key=lambda choice: choice.size_bytes,
        )
        for name, of in widths.items()
    }


def possible_widths(layers: LayerChoice, name: str) -> list[Width]:
    """What a layer may get: what its width fits; no floating point for a weight that others share."""
    grids = {width: grid_of(layers, name, width) for width in WIDTHS}
    in_float = not layers.is_shared(name)
    return [w for w, grid in grids.items() if (in_float if grid is None else layers.fits(name, grid, pad=False))]


@torch.no_grad()
def fisher_losses(
    layers: LayerChoice, widths: dict[str, list[Width]], batches: list[Inputs], seed: int
) -> dict[tuple[str, Width], float]:
    """Half the squared error weighed by Fisher information: a prediction of the KL divergence in nats."""
    fisher = fisher_information(layers.model, layers.layers, batches, seed)
    losses: dict[tuple[str, Width], float] = {}
    for name, of in widths.items():
        information = fisher.pop(name)
        for width in of:
            losses[name, width] = float((information * rounding_error(layers, name, width).square()).sum()) / 2
    return losses


def output_losses(
    layers: LayerChoice, widths: dict[str, list[Width]], batches: list[Inputs]
) -> dict[tuple[str, Width], float]:
    """The squared error of each layer's outputs relative to them; of tables and idle layers, of their weights."""
    losses: dict[tuple[str, Width], float] = {}

    @torch.no_grad()
    def add(name: str, hessian: Tensor | None) -> None:
        def power(weight: Tensor) -> float:
            return float((weight * (weight if hessian is None else weight @ hessian)).sum())

        whole = power(layers.layers[name].weight.float()) or 1.0
        for width in widths[name]:
            losses[name, width] = power(rounding_error(layers, name, width)) / whole

    for name in (*layers.tables, *calibrate(layers.model, layers.linears, batches, add)):
        add(name, None)
    return losses


def grid_of(layers: LayerChoice, name: str, width: Width) -> Grid | None:
    """The grid of a layer in this width; `None`: floating point."""
    return (_TABLE_GRIDS if name in layers.tables else _LINEAR_GRIDS).get(width)


def rounding_error(layers: LayerChoice, name: str, width: Width) -> Tensor:
    """What rounding to nearest adds to the weight of a layer, as it would be stored in this width."""
    grid, weight = grid_of(layers, name, width), layers.layers[name].weight.detach()
    if grid is None:
        return torch.zeros_like(weight, dtype=torch.float32)
    rule = mse_codes if grid.bits == 4 and name in layers.linears else absmax_codes
    rounded = quantize_weight(weight, grid, rule, rounds_activations=False)
    return rounded.dequantize().float() - weight.float()  # type: ignore[operator]


def tie_heads(layers: LayerChoice, menu: Menu) -> Menu:
    """The menu with 8 bits for each table and the head that is tied to it: one copy of the values serves both."""
    tied = dict(menu)
    for head, table in tied_heads(layers).items():
        wide = {name: [c for c in menu[name] if c.width == "int8"] for name in (head, table)}
        if all(wide.values()):
            (own,) = wide[head]
            tied |= wide | {head: [choice_of(layers, head, "int8", own.loss, own.ms, is_repeated=True)]}
    return tied


def tied_heads(layers: LayerChoice) -> dict[str, str]:
    """The linears that have the weight of an embedding table, and this table."""
    tables = {id(table.weight): name for name, table in layers.tables.items()}
    return {name: tables[id(m.weight)] for name, m in layers.linears.items() if id(m.weight) in tables}


def choice_of(
    layers: LayerChoice, name: str, width: Width, loss: float, ms: float = 0.0, is_repeated: bool = False
) -> LayerBits:
    """A width of a layer with the bytes that its weight then takes; the scales alone if a table has its values."""
    weight, grid = layers.layers[name].weight, grid_of(layers, name, width)
    rows, columns = weight.shape
    size = weight.nbytes
    if grid is not None:
        scale_bytes = (grid.scale_dtype or weight.dtype).itemsize
        values = 0 if is_repeated else -(-rows * columns * grid.bits // 8)
        size = values + rows * (columns // grid.inputs_per_scale(columns)) * scale_bytes
    weights = 0 if is_repeated else weight.numel()
    return LayerBits(name, name in layers.tables, width, weights, size, loss, ms)


def other_bytes(layers: LayerChoice) -> int:
    """What a model stores in addition to the weights of these layers."""
    weights = {id(layer.weight): layer.weight for layer in layers.layers.values()}
    return stored_bytes(layers.model) - sum(tensor_bytes(weight) for weight in weights.values())


def uniform_times(
    layers: LayerChoice, device: str, layers_ms: Callable[[nn.Module, str], Mapping[str, float]]
) -> dict[Width, dict[str, float]]:
    """For each width the predicted times of the program whose layers all have it, or the next that fits."""
    times: dict[Width, dict[str, float]] = {}
    for width in WIDTHS:
        of = {name: possible_widths(layers, name) for name in layers.layers}
        wider = {n: [w for w in own if WIDTHS.index(w) >= WIDTHS.index(width)] or own[-1:] for n, own in of.items()}
        rounded = layers.copy().with_grids(
            {n: grid for n, own in wider.items() if (grid := grid_of(layers, n, own[0]))}
        )
        with rounded.replace_weights():
            round_layers(rounded, "absmax", None, 0)
        times[width] = dict(layers_ms(rounded.model.eval(), device))
    return times


def other_ms(layers: LayerChoice, times: Mapping[Width, Mapping[str, float]]) -> float:
    """What a program takes in addition to these layers, at most."""
    own = [sum(_layer_ms(of, name) for name in layers.layers) for of in times.values()]
    return max((sum(of.values()) - ms for of, ms in zip(times.values(), own, strict=True)), default=0.0)


def _layer_ms(times: Mapping[str, float], name: str) -> float:
    return sum(ms for module, ms in times.items() if module == name or module.startswith(name + "."))


def uniform_choices(layers: LayerChoice, menu: Menu) -> dict[str, tuple[LayerBits, ...]]:
    """All layers in 8 bits, and all in 4, as far as their menu has that; else in the next wider width."""
    return {
        "all in 8 bits": choose_widths(tie_heads(layers, menu), "int8", "int8"),
        "all in 4 bits": choose_widths(menu, "int4", "int4"),
    }


def compare(
    layers: LayerChoice,
    menu: Menu,
    allocation: Allocation,
    others: Mapping[str, tuple[LayerBits, ...]],
    calibration: list[Inputs],
    held_out: list[Inputs],
) -> Allocation:
    """Measure the allocation, a uniform and a random one of at most its size, and others, all rounded to nearest."""
    limits = {BYTES: sum(choice.size_bytes for choice in allocation.choices)}
    each = {
        "this": allocation.choices,
        "uniform": allocate_uniformly(menu, limits),
        "random": allocate_at_random(menu, limits, _RANDOM_SEED),
        **others,
    }
    reference = reference_logits(layers.model, held_out or calibration)
    compared = []
    for name, choices in each.items():
        grids = {c.layer: grid for c in choices if (grid := grid_of(layers, c.layer, c.width))}
        rounded = layers.with_grids(grids)
        with rounded.restore_weights():
            round_layers(rounded, "mse", None, 0)
            kl = mean_kl(layers.model, reference)
        size_bytes = replace(allocation, choices=choices).size_bytes
        compared.append(MeasuredAllocation(name, average_bits(choices), kl, size_bytes))
    return replace(allocation, compared=tuple(compared), held_out=bool(held_out))
