"""How far a model moves when activations that it rounds by their own range move by the noise of float sums.

A backend adds up in another order than eager mode, so what a layer rounds differs in its last digits. Where a value
lies between two codes, it is then rounded the other way, by a whole step, and later layers round what follows from
that. No program can be closer to eager mode than eager mode is to itself under such noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.parity import RoundingTies
from edgetune.runtime.allowed import rounds_activations
from edgetune.runtime.predictions import Row, predictions_of

NOISE = 2.0**-20  # of each value, relative: the error of a sum of some hundred products in float32
_CODES = 255


def measure_ties(
    model: nn.Module, rows: Sequence[Row], run: Callable[[Row], dict[str, Tensor]], same_within: float | None = None
) -> RoundingTies | None:
    """Run the model on each row as it is, and with noise on what its layers round; `None` if they round nothing.

    `run` gives the outputs for the tensors of a row, by their names. `same_within`: see `predictions_of`.
    """
    layers = [m for m in model.modules() if any(map(rounds_activations, m.parameters(recurse=False)))]
    if not layers or not rows:
        return None
    worst, same, predictions = 0.0, 0, 0
    counts = [0, 0]
    draw = torch.Generator().manual_seed(0)
    for row in rows:
        expected = run(row)
        with _noise_on(layers, draw, counts):
            moved = run(row)
        for name, tensor in expected.items():
            if tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.double().abs().max()) or 1.0
                worst = max(worst, float((tensor.double() - moved[name].double()).abs().max()) / largest)
        equal, compared = predictions_of(expected, moved, row, same_within)
        same, predictions = same + equal, predictions + compared
    return RoundingTies(
        noise=NOISE, activations=counts[0], changed=counts[1], max_relative_difference=worst,
        same_prediction_pct=100.0 * same / max(predictions, 1), predictions=predictions,
    )  # fmt: skip


@contextmanager
def _noise_on(layers: Sequence[nn.Module], draw: torch.Generator, counts: list[int]) -> Iterator[None]:
    """Inside, the inputs of the layers are noisy. Counts the values, and those that change their code by it."""

    def move(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args:  # its input has a name: such a layer is left out
            return None
        values, *rest = args
        noise = torch.randn(values.shape, generator=draw, dtype=torch.float32).to(values)
        moved = values * (1 + NOISE * noise)
        counts[0] += values.numel()
        counts[1] += int((_codes(values) != _codes(moved)).sum())
        return (moved, *rest)

    handles = [layer.register_forward_pre_hook(move) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _codes(values: Tensor) -> Tensor:
    """8-bit codes of each row `(..., width)`, by its own range, with zero in it."""
    values = values.float()
    low, high = values.amin(-1, keepdim=True).clamp_max(0), values.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / _CODES).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(values / scale)
