"""Several saved adapters of one base as one: an adapter in peft's format, or merged into the base's weights.

A task vector is what an adapter adds to the weights (Ilharco et al., 2022, arXiv:2212.04089). The weighted ones are
summed, or first thinned (DARE, Yu et al., 2023, arXiv:2311.03099), or thinned and reconciled in sign (TIES, Yadav et
al., 2023, arXiv:2306.01708), by peft's functions. peft's own `add_weighted_adapter` is for LoRAs alone, and wrong for
those with `use_rslora`: its result takes their scale once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from edgetune.adapt.deltas import read_deltas
from edgetune.adapt.factorize import ADAPTABLE, Pair, factorize, relative_error, to_matrix, to_weight
from edgetune.adapt.files import PREFIX, write_adapter
from edgetune.adapt.inject import exact_targets, refuse_adapters
from edgetune.adapt.layer_kinds import kind_of
from edgetune.adapt.low_rank import ENDINGS, beyond_low_rank, factors_of, read_files
from edgetune.core.carriers import is_wrapped, plain_tensors
from edgetune.core.errors import EdgetuneError
from edgetune.core.holders import unwrap_model
from edgetune.core.layers import is_transposed, refuse_shared
from edgetune.core.merging import write_tensors
from edgetune.core.plain import refuse_computed
from edgetune.core.registry import require

Method = Literal["linear", "cat", "svd", "ties", "dare", "dare-ties"]
METHODS: tuple[Method, ...] = get_args(Method)
THINNED = ("ties", "dare", "dare-ties")


@dataclass(frozen=True)
class Combined:
    """Adapters combined into one, or into the weights of their base."""

    folder: Path | None
    """Of the adapter; `None`: the weights of the base were changed."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank of each adapted layer."""
    error: float = 0.0
    """Distance of what the adapter adds from what the method gives, relative to the latter, by the Frobenius norm."""


@dataclass(frozen=True)
class _Saved:
    """A saved adapter: the layers that it adapts, the factors of a plain LoRA, and what is added to other tensors."""

    folder: Path
    base: str | None
    layers: frozenset[str]
    factors: Mapping[str, Pair]
    deltas: Mapping[str, Tensor]

    @property
    def names(self) -> set[str]:
        """The tensors of the base to which it adds something."""
        return {f"{name}.weight" for name in self.factors} | set(self.deltas)

    def delta(self, key: str, layer: nn.Module) -> Tensor | None:
        """What it adds to a tensor, in its layout; `None`: nothing."""
        if key in self.deltas:
            return self.deltas[key]
        pair = self.factors.get(key.removesuffix(".weight"))
        return None if pair is None else to_weight(layer, pair[1] @ pair[0])


def combine_adapters(
    model: nn.Module,
    folders: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    method: Method = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combined:
    """Combine saved adapters of the plain base `model` into one LoRA in `out`, or without `out` into its weights.

    `svd`, `ties`, `dare` and `dare-ties` take adapters of every family that merges: what each adds to the weights is
    combined, and a LoRA is the nearest product of `rank` to that. `cat` joins the factors of plain LoRAs: their exact
    weighted sum, whose rank is the sum of theirs. `linear` adds up the factors themselves, which keeps the rank and is
    rough, since it also multiplies the A of one by the B of another. Layers that were trained whole are combined too,
    without loss.

    Args:
        model: the base, plain or 4-bit. With `out` it stays as it is.
        folders: adapters in peft's format, from `et.save_adapter` or peft.
        out: folder of the new adapter, which peft loads as well.
        method: how they are combined.
        weights: one factor for each adapter, which may be negative; by default 1 each.
        rank: of the new LoRA; by default the lowest with an error within 1 % in every layer.
        density: share of the values that `ties` (the largest in each tensor) or `dare` (at random) keep.
        seed: of what `dare` drops.

    Raises:
        EdgetuneError: adapters of different bases or that do not fit, and settings that do not fit the method.
    """
    model = unwrap_model(model)
    factors = _check(folders, method, weights, rank, density, out)
    refuse_adapters(model)
    adapters = [_read(Path(folder), model) for folder in folders]
    _refuse_different_bases(adapters)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deltas = _combine(model, adapters, partial(_reduce, method, factors, density))
        if out is None:
            _merge(model, deltas)
            return Combined(None)
        return _save(model, adapters, deltas, partial(_factors, method, factors, rank), Path(out))


def _check(
    folders: Sequence[str | Path], method: str, weights: Sequence[float] | None, rank: int | None,
    density: float | None, out: str | Path | None,
) -> list[float]:  # fmt: skip
    """The weight of each adapter. Raises for settings that do not fit together."""
    if isinstance(folders, (str, Path)) or not folders:
        raise EdgetuneError("folders: a list of adapters is needed", got=folders, action='write ["runs/en"]')
    if method not in METHODS:
        raise EdgetuneError("unknown method to combine adapters", got=method, allowed=METHODS)
    chosen = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(chosen) != len(folders):
        action = "give one weight for each adapter, or leave weights out for 1 each"
        raise EdgetuneError(f"weights: there are {len(folders)} adapters", got=weights, action=action)
    if not all(map(math.isfinite, chosen)) or not any(chosen):
        raise EdgetuneError(
            "weights: must be finite, and not all 0", got=weights, action="give weights such as [1, 0.5]"
        )
    if method == "linear" and out is None:
        message = "linear adds up the factors of LoRAs, and without out there is none"
        raise EdgetuneError(message, got=method, action="use method='svd', which without out is the exact sum")
    if (density is None) == (method in THINNED) or (density is not None and not 0 < density <= 1):
        needed = "is above 0 and at most 1, such as 0.2" if method in THINNED else f"is for {', '.join(THINNED)}"
        raise EdgetuneError(f"density: the share of values to keep {needed}", got=density, action="change density")
    if rank is not None and (method in ("linear", "cat") or out is None or rank < 1):
        given = "without out there is no LoRA" if out is None else f"{method} has the ranks of its adapters"
        problem = "must be at least 1" if rank < 1 else given
        raise EdgetuneError(f"rank: {problem}", got=rank, action="leave rank out, or use method='svd' with out")
    return chosen


def _read(folder: Path, model: nn.Module) -> _Saved:
    try:
        config, state = read_files(folder)
        bad = next((key for key, value in state.items() if not bool(torch.isfinite(value).all())), None)
        if bad is not None:
            action = "take a checkpoint from before the training diverged"
            raise EdgetuneError(f"{bad} has values that are NaN or infinite", action=action)
        own = {key: value.cpu() for key, value in model.state_dict().items()}
        pairs = {key: value for key, value in state.items() if key not in own}
        plain = all(key.endswith(ENDINGS) and value.dim() == 2 for key, value in pairs.items())
        base = config.get("base_model_name_or_path")
        if not plain or beyond_low_rank(config) is not None:
            deltas = read_deltas(folder, model)
            return _Saved(folder, base, frozenset(deltas.layers), {}, {k: v.cpu() for k, v in deltas.tensors.items()})
        factors = factors_of(pairs, config, model)
        whole = {key: _subtract(key, value, own[key]) for key, value in state.items() if key in own}
        return _Saved(folder, base, frozenset(factors), factors, whole)
    except EdgetuneError as error:
        raise error.within(f"adapter {folder}") from error.__cause__


def _subtract(key: str, trained: Tensor, own: Tensor) -> Tensor:
    """What training added to a tensor of the base."""
    if trained.shape != own.shape:
        got = [tuple(trained.shape), tuple(own.shape)]
        raise EdgetuneError(f"{key} has another shape in the base", got=got, action="give the base of the adapter")
    return trained - own


def _refuse_different_bases(adapters: Sequence[_Saved]) -> None:
    bases = {adapter.base: adapter.folder for adapter in adapters if adapter.base}
    if len(bases) > 1:
        raise EdgetuneError(
            "the adapters are of different bases", got={str(folder): base for base, folder in bases.items()},
            action="combine adapters of one base; if they are, make base_model_name_or_path equal in their configs",
        )  # fmt: skip


def _combine(model: nn.Module, adapters: Sequence[_Saved], reduce: Any) -> dict[str, Tensor]:
    """By name, what is added to each tensor of the base."""
    names: list[str] = sorted(set().union(*(adapter.names for adapter in adapters)))
    combined = {}
    for key in names:
        layer = model.get_submodule(key.rpartition(".")[0])
        combined[key] = reduce([adapter.delta(key, layer) for adapter in adapters])
    if not any(bool(delta.any()) for delta in combined.values()):
        raise EdgetuneError("nothing is left of the adapters", action="change weights, or raise density")
    return combined


def _reduce(method: Method, weights: Sequence[float], density: float | None, deltas: Sequence[Tensor | None]) -> Tensor:
    """One task vector of several, of which `None` is one of zeros: it takes no part in a vote or a mean."""
    weighted = [w * delta for w, delta in zip(weights, deltas, strict=True) if delta is not None]
    merge = require("peft.utils.merge_utils", "combining adapters")
    ones = torch.ones(len(weighted))
    if density is None or (method == "dare" and density == 1):
        combined = merge.task_arithmetic(weighted, ones)
    elif density == 1:
        kept = torch.stack(weighted)
        combined = merge.disjoint_merge(kept, merge.calculate_majority_sign_mask(kept))
    else:
        combined = {"ties": merge.ties, "dare": merge.dare_linear, "dare-ties": merge.dare_ties}[method](
            weighted, ones, density
        )
    return combined  # type: ignore[no-any-return]


def _merge(model: nn.Module, deltas: Mapping[str, Tensor]) -> None:
    """Add to the weights of the base, in place."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, delta in deltas.items():
        name, _, tensor = key.rpartition(".")
        layers.setdefault(name, {})[tensor] = delta
    modules = {name: model.get_submodule(name) for name in layers}
    for name, layer in modules.items():
        refuse_computed(name, layer)
        stored = [type(p.data).__name__ for p in layer.parameters() if type(p.data) is not Tensor]
        if is_wrapped(layer) or stored:
            raise EdgetuneError(
                f"{name} stores its weight in few bits, and would have to be rounded anew", got=type(layer).__name__,
                action="give out=..., for an adapter beside this base; or merge into the base as it was before",
            )  # fmt: skip
    refuse_shared(model, modules)
    for name, added in layers.items():
        plain = plain_tensors(modules[name]) if hasattr(modules[name], "weight") else {}
        own = {**modules[name].state_dict(), **plain}
        write_tensors(
            modules[name],
            {key: own[key] + delta.to(own[key].device) if key in own else delta for key, delta in added.items()},
        )


def _save(
    model: nn.Module, adapters: Sequence[_Saved], deltas: Mapping[str, Tensor], factorize_all: Any, out: Path
) -> Combined:
    """Write the LoRA that is nearest to what is added, with the layers that are trained whole."""
    layers = {name: model.get_submodule(name) for name in dict.fromkeys(key.rpartition(".")[0] for key in deltas)}
    adapted = set().union(*(adapter.layers for adapter in adapters))
    targets = {name: layer for name, layer in layers.items() if name in adapted and kind_of(layer) != "norm"}
    for name, layer in targets.items():
        if f"{name}.bias" in deltas or kind_of(layer) not in ADAPTABLE:
            problem = (
                "changes its bias" if f"{name}.bias" in deltas else f"changes a {type(layer).__name__} of this kind"
            )
            action = "leave out the folder, to merge the adapters into the weights of the base"
            raise EdgetuneError(f"{name}: an adapter {problem}, which a LoRA cannot", got=kind_of(layer), action=action)
    matrices = {name: to_matrix(layer, deltas[f"{name}.weight"]) for name, layer in targets.items()}
    pairs: dict[str, Pair] = factorize_all(adapters, targets, matrices)
    tensors = {}
    for name in layers.keys() - targets.keys():
        for key, value in layers[name].state_dict().items():
            tensors[f"{PREFIX}{name}.{key}"] = (value.cpu() + deltas.get(f"{name}.{key}", 0)).to(value.dtype)
    for name, (a, b) in pairs.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in _name_as_saved(targets[name], a, b).items()}
    ranks = {name: a.shape[0] for name, (a, _) in pairs.items()}
    write_adapter(model, _config(model, targets, ranks, sorted(layers.keys() - targets.keys())), tensors, out)
    return Combined(out, ranks, relative_error(matrices, pairs))


def _factors(
    method: Method, weights: Sequence[float], rank: int | None, adapters: Sequence[_Saved],
    layers: Mapping[str, nn.Module], matrices: Mapping[str, Tensor],
) -> dict[str, Pair]:  # fmt: skip
    """A and B of each layer."""
    if method not in ("linear", "cat"):
        return factorize(layers, matrices, rank)
    other = next((adapter for adapter in adapters if adapter.layers - adapter.factors.keys()), None)
    if other is not None:
        message = f"{method} works on the factors of plain LoRAs on linear layers, and this adapter is none"
        raise EdgetuneError(message, where=f"adapter {other.folder}", action="use method='svd'")
    pairs = {}
    for name, matrix in matrices.items():
        own = [(w, *one.factors[name]) for w, one in zip(weights, adapters, strict=True) if name in one.factors]
        ranks = [a.shape[0] for _, a, _ in own]
        if method == "linear" and len(set(ranks)) > 1:
            raise EdgetuneError(f"{name}: linear adds up factors of one rank", got=ranks, action="use method='svd'")
        if method == "cat" and sum(ranks) > min(matrix.shape):
            message = f"{name}: the ranks add up to more than the layer's width {min(matrix.shape)}"
            raise EdgetuneError(message, got=ranks, action="use method='svd'")
        pairs[name] = _concatenate(own) if method == "cat" else _add_up(own)
    return pairs


def _concatenate(weighted: Sequence[tuple[float, Tensor, Tensor]]) -> Pair:
    """`[A1; A2]` and `[w1 B1, w2 B2]`, whose product is the weighted sum of the products."""
    return torch.cat([a for _, a, _ in weighted]), torch.cat([w * b for w, _, b in weighted], 1)


def _add_up(weighted: Sequence[tuple[float, Tensor, Tensor]]) -> Pair:
    """The factors of one adapter, each with the root of its weight, added up; as peft, the sign goes into A."""
    roots = [math.sqrt(abs(w)) for w, _, _ in weighted]
    a = torch.stack([math.copysign(root, w) * a for root, (w, a, _) in zip(roots, weighted, strict=True)]).sum(0)
    return a, torch.stack([root * b for root, (_, _, b) in zip(roots, weighted, strict=True)]).sum(0)


def _name_as_saved(layer: Any, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A and B by peft's names and in its shapes for this kind of layer."""
    if kind_of(layer) == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    if kind_of(layer) not in ("linear", "Conv1D"):
        a, b = a.view(-1, *layer.weight.shape[1:]), b.view(*b.shape, *[1] * (layer.weight.dim() - 2))
    return {"lora_A.weight": a, "lora_B.weight": b}


def _config(model: nn.Module, targets: Mapping[str, nn.Module], ranks: Mapping[str, int], whole: list[str]) -> Any:
    """peft's config of the LoRA, whose scale is 1 in every layer."""
    rank = max(ranks.values(), default=1)
    others = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    every = [name for name, _ in model.named_modules() if name]
    return require("peft", "combining adapters").LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=dict(others),
        target_modules=exact_targets(every, list(targets)), modules_to_save=whole or None, inference_mode=True,
        fan_in_fan_out=bool(targets) and all(map(is_transposed, targets.values())),
    )  # fmt: skip
