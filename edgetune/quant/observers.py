"""Ranges of 8-bit activations from their histograms: percentile, least squared error, least divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from edgetune.quant.integers import Integers

Observer = Literal["minmax", "percentile", "mse", "entropy"]
OBSERVERS: tuple[Observer, ...] = ("minmax", "percentile", "mse", "entropy")
_LEVELS = 256
_INSIDE = 0.9999  # of the values, of `percentile`
_LEAST_SHARE = 1e-9  # of the values, in place of none: the divergence from a level without a value is infinite
_EPS = 2**-12  # the least scale


def observer_for(observer: Observer) -> Any:
    """A constructor of torchao's observers that finds the range of `observer`."""
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver

    if observer == "minmax":
        return MinMaxObserver.with_args(eps=_EPS)
    return _of_histogram(HistogramObserver).with_args(eps=_EPS, rule=observer)


def _of_histogram(base: Any) -> Any:
    class FromHistogram(base):  # type: ignore[misc]
        """torchao's histogram of all calibration batches, with a range by `rule`; the stock one's is `mse`."""

        def __init__(self, rule: Observer = "mse", **settings: Any) -> None:
            super().__init__(**settings)
            self.rule = rule

        def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
            if self.rule in _RANGES:
                return _RANGES[self.rule](self.histogram, self.min_val, self.max_val)
            return super()._non_linear_param_search()  # type: ignore[no-any-return]

    return FromHistogram


def percentile_range(histogram: Tensor, least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The range without the outermost 0.01 % of the values at either end (Wu et al., 2020, arXiv:2004.09602)."""
    edges = _edges(histogram, least, largest)
    below = histogram.double().cumsum(0) / histogram.double().sum()
    first = int((below < 1 - _INSIDE).sum())
    last = int((below < _INSIDE).sum())
    return edges[first], edges[min(last, len(histogram) - 1) + 1]


def entropy_range(histogram: Tensor, least: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Clip at the magnitude for which the rounded values diverge least from the values (Kullback-Leibler).

    TensorRT's calibration (Migacz, "8-bit inference with TensorRT", GTC 2017) for a grid of 256 levels that need not
    be symmetric. The bin of zero is left out: a grid represents zero exactly, and half of all values after a relu
    would otherwise count as rounding.
    """
    edges = _edges(histogram, least, largest)
    counts = histogram.double().clone()
    middles = (edges[:-1] + edges[1:]) / 2
    counts[(edges[:-1] <= 0) & (edges[1:] > 0)] = 0
    reach = middles.abs()
    best, span = float("inf"), (0, len(counts))
    for limit in torch.linspace(float(reach.max()) / 16, float(reach.max()), _LEVELS):
        inside = (reach <= limit).nonzero()
        if len(inside) < _LEVELS // 2:
            continue
        first, end = int(inside[0]), int(inside[-1]) + 1
        divergence = _divergence(counts, first, end)
        if divergence < best:
            best, span = divergence, (first, end)
    return edges[span[0]], edges[span[1]]


def _divergence(counts: Tensor, first: int, end: int) -> float:
    """Of the values clipped to the bins `first` to `end` from these bins rounded to the levels of the grid."""
    kept = counts[first:end]
    clipped = kept.clone()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[end:].sum()
    level = torch.arange(len(kept)) * _LEVELS // len(kept)
    sums, filled = (torch.zeros(_LEVELS, dtype=kept.dtype).index_add(0, level, x) for x in (kept, kept.gt(0).double()))
    rounded = torch.where(kept > 0, (sums / filled.clamp_min(1))[level], 0)
    shares, expected = (x / x.sum() for x in (clipped, rounded))
    return float(torch.special.xlogy(shares, shares / expected.clamp_min(_LEAST_SHARE)).sum())


def _edges(histogram: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """The edges of the bins: one more than there are bins."""
    return least + (largest - least) * torch.linspace(0, 1, len(histogram) + 1)


_RANGES: dict[Observer, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "minmax": lambda _, least, largest: (least, largest),
    "percentile": percentile_range,
    "entropy": entropy_range,
}


def set_rule(prepared: fx.GraphModule, rule: Observer) -> None:
    """Let every observer that keeps a histogram use another rule."""
    for module in prepared.modules():
        if hasattr(module, "rule"):
            module.rule = rule  # type: ignore[assignment]


class Unobserved(fx.Interpreter):
    """Runs a graph with observers as the float model, without observing."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the observer gets."""
        return args[0]


def output_error(prepared: fx.GraphModule, converted: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """The squared error of the quantized outputs over the squared outputs of the float model, on these batches."""
    error = total = 0.0
    for tensors in batches:
        expected, outputs = (_floats(run.run(*tensors)) for run in (Unobserved(prepared), Integers(converted)))
        error += sum(float((a - b).double().square().sum()) for a, b in zip(outputs, expected, strict=True))
        total += sum(float(tensor.double().square().sum()) for tensor in expected)
    return error / total if total else error


def _floats(outputs: Any) -> list[Tensor]:
    several = (outputs,) if isinstance(outputs, Tensor) else torch.utils._pytree.tree_leaves(outputs)
    return [tensor for tensor in several if isinstance(tensor, Tensor) and tensor.is_floating_point()]
