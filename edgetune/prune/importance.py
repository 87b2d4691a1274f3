"""Score the units of a group; those with the highest scores stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, token_mask
from edgetune.core.modes import preserve_state
from edgetune.prune.attention import Attention
from edgetune.prune.groups import Group, Member
from edgetune.prune.layers import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED, is_linear, weight_of, width_of


@torch.no_grad()
def magnitude_scores(model: nn.Module, group: Group) -> Tensor:
    """Scores `(units,)` from the weights alone: what a unit can write times what is read of it.

    Heads: the Frobenius norm of output x value projection, the map that the head applies. Linears: the product of the
    norms of the rows that write the unit (gate and up of a gated FFN) and of the column that reads it. Convolutions:
    the root mean square that the batch norms give the channel, times the norm of the weights that read it.
    """
    if group.attentions:
        return torch.stack([_head_scores(model, group, each).square() for each in group.attentions]).sum(0).sqrt()
    read = sum(_norms(model, member, 1).square() for member in group.along("in"))
    score = torch.as_tensor(read).sqrt()
    writers = [(m, model.get_submodule(m.layer)) for m in group.along("out")]
    norms = [m for m, layer in writers if isinstance(layer, BATCH_NORMS) and layer.affine]
    if norms:
        return score * torch.as_tensor(sum(_norms(model, member, 0).square() for member in norms)).sqrt()
    for member, _ in writers:
        score = score * _norms(model, member, 0)
    return score


def _norms(model: nn.Module, member: Member, dim: int) -> Tensor:
    """Norm of each unit's slice of a weight `(out, in, ...)` along `dim`; with the bias where the layer writes."""
    layer = model.get_submodule(member.layer)
    weight = weight_of(layer).double().movedim(dim, 0)
    power = weight.reshape(len(weight), -1).square().sum(1)
    if dim == 0 and isinstance(layer.bias, Tensor):
        power = power + layer.bias.double().square()
    return power[torch.tensor(member.of_unit, device=power.device)].sum(1).sqrt()


def _head_scores(model: nn.Module, group: Group, attention: Attention) -> Tensor:
    value, output = model.get_submodule(attention.value), model.get_submodule(attention.output)
    written = weight_of(value).double()
    if isinstance(value.bias, Tensor):
        written = torch.cat([written, value.bias.double()[:, None]], dim=1)
    written = written[torch.tensor(attention.value_rows, device=written.device)]
    (columns,) = (member.of_unit for member in group.along("in") if member.layer == attention.output)
    read = weight_of(output).double()[:, torch.tensor(columns, device=written.device)]
    read = read.reshape(len(read), attention.units, attention.queries_per_unit, attention.head_dim)
    # ||R W||^2 = tr(R'R WW'), which needs only head_dim x head_dim matrices
    gram = torch.einsum("ourd,oure->ude", read, read)
    return (gram * (written @ written.transpose(1, 2))).sum((1, 2)).clamp(min=0).sqrt()


@dataclass
class Moments:
    """Sums over the rows a layer read: of x `(units, d)` and of x x' `(units, d, d)`."""

    rows: int
    first: Tensor
    second: Tensor

    def add(self, other: Moments) -> Moments:
        """Moments over the rows of both."""
        return Moments(self.rows + other.rows, self.first + other.first, self.second + other.second)

    @property
    def mean(self) -> Tensor:
        """E[x], `(units, d)`."""
        return self.first / self.rows


Key = tuple[str, str]  # a group's name and a layer that reads its units


def observe_moments(model: nn.Module, groups: Sequence[Group], batches: Iterable[Inputs]) -> dict[Key, Moments]:
    """Moments of the inputs of every reading layer of the groups on the batches, without padded tokens."""
    moments: dict[Key, Moments] = {}
    mask: list[Tensor | None] = [None]
    with ExitStack() as hooks, preserve_state(model), torch.no_grad():
        for key, member in [((group.name, m.layer), m) for group in groups for m in group.along("in")]:
            index = torch.tensor(positions_read(model.get_submodule(member.layer), member))

            def look(layer: nn.Module, args: tuple[Tensor, ...], key: Key = key, index: Tensor = index) -> None:
                rows = rows_read(layer, args[0], mask[0])[:, index.to(args[0].device)].float()
                new = Moments(len(rows), rows.double().sum(0), torch.einsum("nud,nue->ude", rows, rows).double())
                moments[key] = moments[key].add(new) if key in moments else new

            hooks.enter_context(model.get_submodule(member.layer).register_forward_pre_hook(look))
        count = 0
        for inputs in batches:
            mask[0] = token_mask(inputs)
            call(model, inputs)
            count += 1
    if not count:
        raise EdgetuneError(
            "there are no calibration batches for measuring activations", action="pass a Sample with batches"
        )
    return moments


def positions_read(layer: nn.Module, member: Member) -> list[list[int]]:
    """The positions of each unit in the inputs of a layer that reads them; its weight has those of one group alone."""
    groups = groups_read(layer)
    wide = width_of(layer, "in")
    return [[group * wide + p for group in range(groups) for p in unit] for unit in member.of_unit]


def groups_read(layer: nn.Module) -> int:
    """Groups of inputs that a weight has in one column; a transposed convolution's has a column for each."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) and not isinstance(layer, TRANSPOSED) else 1


def rows_read(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows `(n, in)` that a layer reads, without padded tokens."""
    if isinstance(layer, CONVOLUTIONS):
        return x.transpose(0, 1).flatten(1).t()
    if mask is not None and x.shape[:2] == mask.shape and x.dim() == 3:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def can_fold_mean(layer: nn.Module) -> bool:
    """Whether the mean of a dropped input can go into the layer's bias. Not for convolutions, which pad with zeros."""
    return is_linear(layer) and layer.bias is not None


@torch.no_grad()
def activation_scores(model: nn.Module, group: Group, moments: Mapping[Key, Moments]) -> Tensor:
    """Scores `(units,)`: the mean square of what dropping a unit changes in the layers that read it.

    E ||W_u x_u||^2 = tr(W_u E[x_u x_u'] W_u'); around the mean where `means` folds that into the bias.
    """
    score = torch.zeros(group.units, dtype=torch.float64)
    for member in group.along("in"):
        layer, seen = model.get_submodule(member.layer), moments[group.name, member.layer]
        weight = weight_of(layer).double()
        groups = groups_read(layer)
        second = seen.second / seen.rows
        if can_fold_mean(layer):
            second = second - seen.mean[:, :, None] * seen.mean[:, None, :]
        wide = len(member.of_unit[0])
        for place, own in enumerate(weight.chunk(groups)):  # each group of a convolution reads its own channels
            own = own.movedim(1, -1).reshape(-1, weight.shape[1])[:, torch.tensor(member.of_unit)]
            span = slice(place * wide, place * wide + wide)
            score += (torch.einsum("oud,oue->ude", own, own) * second[:, span, span]).sum((1, 2)).cpu()
    return score


@torch.no_grad()
def norm_scores(model: nn.Module, group: Group, moments: Mapping[Key, Moments], centred: bool) -> Tensor:
    """Scores `(units,)`: of each input a unit is read from, the mean square times that of its weights, summed.

    Wanda: Sun et al., 2023, arXiv:2306.11695, its square. `centred`: the variance instead, as in FLAP, An et al., 2023,
    arXiv:2312.11983, equation 6.
    """
    score = torch.zeros(group.units, dtype=torch.float64)
    for member in group.along("in"):
        layer, seen = model.get_submodule(member.layer), moments[group.name, member.layer]
        power = torch.diagonal(seen.second, dim1=1, dim2=2) / seen.rows
        power = power - seen.mean.square() if centred else power
        groups = groups_read(layer)
        weights = [own.double().movedim(1, 0).flatten(1).square().sum(1) for own in weight_of(layer).chunk(groups)]
        read = torch.cat([own[torch.tensor(member.of_unit)] for own in weights], 1)
        score += (power * read).sum(1).cpu()
    return score


def unseen(groups: Sequence[Group], moments: Mapping[Key, Moments]) -> set[str]:
    """The groups that a layer reads without being called, or without rows, so that nothing was measured there."""
    measured = {key for key, seen in moments.items() if seen.rows}
    return {g.name for g in groups for member in g.along("in") if (g.name, member.layer) not in measured}


def input_means(model: nn.Module, groups: Sequence[Group], moments: Mapping[Key, Moments]) -> dict[str, Tensor]:
    """Mean of the dropped inputs, `(in,)` for each layer that can fold it into its bias."""
    held: dict[str, Tensor] = {}
    for group in groups:
        for member in group.along("in"):
            layer = model.get_submodule(member.layer)
            if can_fold_mean(layer):
                seen = moments[group.name, member.layer]
                values = held.setdefault(member.layer, torch.zeros(width_of(layer, "in"), device=seen.first.device))
                values[torch.tensor(member.of_unit)] = seen.mean.to(values.dtype)
    return held
