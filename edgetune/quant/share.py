"""Linears that read their weights from one pool of parameters, smaller than they are, through a random mapping.

Randomized parameter sharing: ROAST (Desai et al., 2022, arXiv:2207.10702) maps blocks of weights with random signs; the
stable variant STABLE-RPS (Desai and Shrivastava, 2023, arXiv:2310.11611) lays the blocks of all layers end to end and
folds them over the pool, so that cells are shared evenly, and divides each cell's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import refuse_shared, replace, select
from edgetune.core.merging import merge
from edgetune.core.numbers import format_count
from edgetune.core.plain import refuse_computed
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.frozen import remove_hooks
from edgetune.lean.reads import FirstForward, readers_of, refuse_readers, watch_first_forward
from edgetune.quant.channels import refuse_infinite, refuse_unplain
from edgetune.quant.shared_linear import SharedLinear, shared_layers


class Share(Technique):
    """Let linears read their weights from one shared pool of parameters while they train.

    The pool has `ratio` times as many parameters as the layers have weights. Blocks of weights share a block of the
    pool at random, with random signs, each layer at its own scale (ROAST, arXiv:2207.10702; folded over the pool as in
    STABLE-RPS, arXiv:2310.11611, so that `ratio: 1` changes nothing). The pool starts as the means of the pretrained
    weights that share it, which is nearest to them in units of each layer's scale; this loses much, and training must
    follow. What it saves is training: parameters, gradients, optimizer state and checkpoints. `finalize` writes the
    weights out in full, so the model after it and its program are as large as without `share`.
    """

    name: ClassVar[str] = "share"
    takes: ClassVar[Trait] = Trait.PLAIN
    leaves: ClassVar[Trait] = Trait.SHARED

    ratio: float = Field(default=0.5, gt=0, le=1)
    """Parameters of the pool over the weights of the layers."""
    block_size: int = Field(default=64, ge=1)
    """Number of consecutive weights that share together; it must divide the number of weights of each layer."""
    scale_gradients: bool = True
    """Divide each gradient by what the sharing of its parameter multiplies it with, so that `sgd` stays stable."""
    seed: int = 0
    """Seed of the random mapping and signs."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers that share."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to exclude from `targets`."""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Wrap the layers in place; their own weights are freed."""
        refuse_unplain(model, self.name)
        layers: dict[str, Any] = select(model, self.targets, self.skip, nn.Linear)
        readers, watched = readers_of(model, layers, sample)
        refuse_readers(model, readers)
        refuse_shared(model, layers)
        for name, layer in layers.items():
            refuse_computed(name, layer)
        refuse_infinite(model, layers)
        self._check(layers)
        shared = self._share(layers)
        for name, layer in shared.items():
            replace(model, name, layer)
        if not watched:
            watch_first_forward(model, layers)
        return model

    def finalize(self, model: nn.Module) -> nn.Module:
        """Plain layers with the weights that they read."""
        for layer in shared_layers(model).values():
            layer.base.weight = nn.Parameter(layer.weight.detach())
        model = merge(model, lambda layer: isinstance(layer, SharedLinear))
        remove_hooks(model, FirstForward)
        return model

    def note(self, model: nn.Module) -> str:
        """How many weights share how many parameters, and what that does not save."""
        layers = shared_layers(model)
        if not layers:
            return "the shared weights are written out in full: the program is as large as without share"
        weights = sum(layer.weights for layer in layers.values())
        pool = next(iter(layers.values())).pool
        return (
            f"{format_count(weights)} weights of {len(layers)} linears read {format_count(pool.numel())} shared "
            "parameters; training and its checkpoints are smaller, the program is not"
        )

    def _check(self, layers: Mapping[str, Any]) -> None:
        """Raise for layers that cannot share one pool."""
        first = next(iter(layers))
        for name, layer in layers.items():
            weights = layer.weight.numel()
            if weights % self.block_size:
                raise EdgetuneError(
                    f"block_size {self.block_size} does not divide the {weights:,} weights of {name}",
                    action=f'add "{name}" to skip, or set block_size to {math.gcd(self.block_size, weights)}',
                )
            if not layer.weight.requires_grad:
                raise EdgetuneError(
                    f"{name} is frozen, and all that read the pool train", action=f'add "{name}" to skip'
                )
            own, other = (f"{each.weight.dtype} on {each.weight.device}" for each in (layer, layers[first]))
            if own != other:
                raise EdgetuneError(
                    f"{name} has another type or device than {first}",
                    got=own,
                    allowed=[other],
                    action=f'add "{name}" to skip',
                )

    @torch.no_grad()
    def _share(self, layers: Mapping[str, Any]) -> dict[str, SharedLinear]:
        """The layers that take the place of these, on a pool of the means of their weights."""
        weights: list[Tensor] = [layer.weight.detach() for layer in layers.values()]
        norms = [float(torch.linalg.vector_norm(weight.float()) / math.sqrt(weight.numel())) for weight in weights]
        total = sum(weight.numel() for weight in weights)
        overall = math.sqrt(sum(norm**2 * w.numel() for norm, w in zip(norms, weights, strict=True)) / total)
        scales = [norm / overall if norm else 1.0 for norm in norms]

        counts = [weight.numel() // self.block_size for weight in weights]
        cells = max(1, math.ceil(self.ratio * sum(counts)))
        generator = torch.Generator().manual_seed(self.seed)
        places = fold(sum(counts), cells, generator).to(weights[0].device)
        signs = torch.randint(2, places.shape, generator=generator).to(places.device) * 2.0 - 1
        each = torch.tensor(scales, device=places.device).repeat_interleave(torch.tensor(counts, device=places.device))
        sharing = torch.bincount(places, minlength=cells).float()
        # (sum of the scales of a cell's weights)^2 / their number: a step then moves them as far, on average, as
        # without sharing; of several forms that the authors' code of STABLE-RPS has, its default
        divisors = torch.zeros(cells, device=places.device).index_add_(0, places, each).square_() / sharing

        pool = torch.zeros(cells, self.block_size, device=places.device)
        split = [torch.split(tensor, counts) for tensor in (places, signs, each)]
        for weight, own, sign, scale in zip(weights, *split, strict=True):
            pool.index_add_(0, own, weight.float().view(-1, self.block_size) * (sign / scale)[:, None])
        parameter = nn.Parameter((pool / sharing[:, None]).to(weights[0].dtype))
        shared: dict[str, SharedLinear] = {}
        for (name, layer), own, sign, scale in zip(layers.items(), *split, strict=True):
            factors = sign * scale
            gradient = factors / divisors[own] if self.scale_gradients else factors
            shared[name] = SharedLinear(layer, parameter, own.int(), factors, gradient, owns=not shared)
        return shared


def fold(blocks: int, cells: int, generator: torch.Generator) -> Tensor:
    """The cell of each block: every `cells` blocks in a row go to all cells once, in random order (RANDOMFOLD)."""
    folds = [torch.randperm(cells, generator=generator) for _ in range(-(-blocks // cells))]
    return torch.cat(folds)[:blocks]
