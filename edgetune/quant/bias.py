"""Bias correction: what rounding shifts in the mean of a layer's outputs goes into its bias.

Nagel et al., 2019, arXiv:1906.04721, section 4.2 and appendix D (empirical bias correction).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgetune.quant.integers import LAYERS, Integers, is_operator
from edgetune.quant.observers import Unobserved

_LINEAR = torch.ops.aten.linear.default


def correct_biases(prepared: fx.GraphModule, converted: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]]) -> int:
    """Give each quantized layer of `converted` a bias for which its mean outputs are those of the float `prepared`.

    Layer after layer, each on what the corrected ones before it compute, and a mean over all batches. Returns the
    number of layers.
    """
    biases = _own_biases(converted)
    rows_before = 0
    for tensors in batches:
        means = _Means(prepared, frozenset(biases))
        means.run(*tensors)
        rows = len(tensors[0])
        _Correcting(converted, biases, means.means, rows / (rows_before + rows)).run(*tensors)
        rows_before += rows
    return len(biases)


def _own_biases(converted: fx.GraphModule) -> dict[str, nn.Parameter]:
    """A bias for each quantized layer, by its node: a copy of the one it has, which others may share, or zeros."""
    biases: dict[str, nn.Parameter] = {}
    for node in list(converted.graph.nodes):
        if node.target not in LAYERS or not all(is_operator(x, "dequantize") for x in node.args[:2]):
            continue
        has = node.args[2] if len(node.args) > 2 else None
        if has is not None and has.op != "get_attr":
            continue  # computed as the model runs
        channels = node.meta["val"].shape[_channel_dim(node)]
        value = torch.zeros(channels) if has is None else getattr_of(converted, has.target).detach().clone()
        name = f"corrected_bias_{len(biases)}"
        biases[node.name] = nn.Parameter(value, requires_grad=False)
        converted.register_parameter(name, biases[node.name])
        with converted.graph.inserting_before(node):
            node.args = (*node.args[:2], converted.graph.get_attr(name), *node.args[3:])
    converted.graph.eliminate_dead_code()
    converted.recompile()
    return biases


def getattr_of(module: nn.Module, target: Any) -> Tensor:
    """The tensor that a graph calls `target`."""
    parent, _, own = str(target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), own)
    return tensor


def _channel_dim(node: fx.Node) -> int:
    return -1 if node.target is _LINEAR else 1


def _channel_means(node: fx.Node, value: Tensor) -> Tensor:
    return value.movedim(_channel_dim(node), 0).flatten(1).mean(1)


class _Means(Unobserved):
    """Notes the mean output of the named layers, channel by channel."""

    def __init__(self, prepared: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(prepared)
        self.names = names
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.means[n.name] = _channel_means(n, value)
        return value


class _Correcting(Integers):
    """Moves each bias by `share` of what the mean output lacks, before it goes on with the layer's outputs."""

    def __init__(
        self, converted: fx.GraphModule, biases: dict[str, nn.Parameter], means: dict[str, Tensor], share: float
    ) -> None:
        super().__init__(converted)
        self.biases, self.means, self.share = biases, means, share

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        bias = self.biases.get(n.name)
        if bias is None:
            return value
        bias.add_(self.means[n.name] - _channel_means(n, value), alpha=self.share)
        return super().run_node(n)
