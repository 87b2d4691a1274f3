"""Structured pruning: FFN units, attention heads and channels taken out, so that plain smaller layers are left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.layers import matches, no_match_error
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.prune.attention import attention_names, display_name
from edgetune.prune.cut import cut
from edgetune.prune.gates import gate_scores
from edgetune.prune.groups import Cut, Group, Grouping, Kind, find_groups
from edgetune.prune.importance import (
    activation_scores,
    input_means,
    magnitude_scores,
    norm_scores,
    observe_moments,
    unseen,
)
from edgetune.prune.repair import corrections, refit
from edgetune.prune.structure import cut_next, remember_config

_GROUPING = "edgetune_grouping"  # the attribute of a model that says what could not be cut
Importance = Literal["activation", "magnitude", "taylor", "fisher", "wanda", "flap", "random"]
_MOST_MISSED = 0.05  # of all units, that rounding up to one multiple may keep beyond what was asked


class Prune(Technique):
    """Remove a share of the units of every FFN, the heads of every attention or the channels of every convolution,
    in place.

    The same share is removed from each layer, the least important units first. The remaining number of FFN units or
    channels is rounded to the nearest multiple of `round_to`, never to zero; heads are rounded to a whole number.
    Query heads that share a key-value head (GQA) are kept or removed together, so the number of heads stays a
    multiple of the key-value heads. The pruned model computes exactly what the model computes with the removed units
    set to zero (with importance "activation" or "flap", and a linear layer with bias that reads them: to their mean);
    this is checked on the example inputs. Layers whose units cannot be cut stay as they are, and the run's history
    names them. The result is deterministic, given the weights and the sample.
    """

    name: ClassVar[str] = "prune"

    ratio: float = Field(default=0.3, ge=0, lt=1)
    """Share of the units, heads or channels to remove."""
    ffn_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the units of an FFN to remove; `null`: `ratio`."""
    head_ratio: float | None = Field(default=None, ge=0, lt=1)
    """Share of the heads of an attention to remove; `null`: `ratio`."""
    what: frozenset[Kind] | None = None
    """What to remove; `null`: FFN units and heads if the model has attention, else channels."""
    round_to: int = Field(default=8, ge=1)
    """Remaining widths are multiples of this. If it is not set, they are also multiples of what later steps need,
    such as the group size of `int4`."""
    importance: Importance = "activation"
    """How units are ranked, the least first to go. `activation`: by what dropping a unit changes in the layers that
    read it, on batches of training data; `wanda` and `flap`: by its mean square or variance there times the weights
    that read it; `taylor` and `fisher`: by the derivative of the training loss; `magnitude`: by weights alone;
    `random`."""
    repair: bool = True
    """Refit the layers that read what goes by least squares on the batches, before any training. Not for convolutions
    larger than one pixel, nor for importance `magnitude` and `random`, which do without batches."""
    ranking: Literal["layer", "isomorphic", "global"] = "layer"
    """Which units are compared: those of one layer, of layers of the same shape, or of all, so that some layers lose
    more than others. At least `round_to` units stay in each."""
    skip: tuple[str, ...] = ()
    """Patterns of layers that are not pruned."""

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """With widths that later techniques can use, such as whole groups for 4-bit weights."""
        if "round_to" in self.model_fields_set:
            return self
        return self.model_copy(update={"round_to": math.lcm(self.round_to, *(each.width_multiple for each in later))})

    @property
    def needs(self) -> Needs:
        """Example inputs to follow the layers; batches or labels to rank by."""
        if self.importance in ("taylor", "fisher"):
            return "labels"
        return "batches" if self._measures else "inputs"

    @property
    def _measures(self) -> bool:
        """Whether the batches are looked at."""
        return self.importance not in ("magnitude", "random")

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Prune in place. Raises `EdgetuneError`, and leaves the model unchanged, if it cannot be pruned as
        requested."""
        sample = self.require_sample(sample)
        remember_config(model)
        cuts, fill, grouping = self._decide(model, sample)
        repairs = corrections(model, cuts, sample.batches()) if self.repair and self._measures else {}
        left = cut(model, cuts, sample.inputs, fill)
        kept = {member.layer for one in cuts if one.group.name in left for member in one.group.members}
        refit(model, {name: change for name, change in repairs.items() if name not in kept})
        setattr(model, _GROUPING, replace(grouping, groups=(), blocked=grouping.blocked | left))
        return model

    def note(self, model: nn.Module) -> str:
        """The layers that were left as they are, and why."""
        grouping = grouping_of(model)
        by_reason: dict[str, list[str]] = {}
        for name, reason in grouping.blocked.items():
            by_reason.setdefault(reason, []).append(display_name(name))
        notes = [f"{truncate_list(names, 2)} ({reason})" for reason, names in by_reason.items()]
        if grouping.unasked:
            notes.append(f"{truncate_list(grouping.unasked, 2)} (convolutions: what has no channels)")
        return f"left as they are: {truncate_list(notes, 4)}" if notes else ""

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The widths that the stored model has on record."""
        return cut_next(model)

    def plan(self, model: nn.Module, sample: Sample | None = None) -> tuple[Cut, ...]:
        """What `apply` would remove, as a printable value. The model does not change."""
        return self._decide(model, self.require_sample(sample))[0]

    def _decide(self, model: nn.Module, sample: Sample) -> tuple[tuple[Cut, ...], dict[str, Tensor], Grouping]:
        self._check(model)
        kinds = self._kinds(model)
        grouping = find_groups(model, sample.inputs, kinds, self.skip, every=self.what is not None)
        groups = list(grouping.groups)
        scores, fill = self._scores(model, groups, sample)
        _refuse_infinite(scores)
        counts = self._counts(groups, scores)
        cuts = [_drop_lowest(g, scores[g.name], counts[g.name]) for g in groups if counts[g.name] < g.units]
        self._refuse_unchanged(kinds, groups, cuts)
        self._refuse_unreached(kinds, groups)
        return tuple(cuts), fill, grouping

    def _scores(
        self, model: nn.Module, groups: list[Group], sample: Sample
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The scores `(units,)` of each group, and the means that the biases of readers take over."""
        if self.importance in ("taylor", "fisher"):
            batches, loss = sample.labels()
            return gate_scores(model, groups, batches(), loss, self.importance), {}  # type: ignore[arg-type]
        if self.importance == "random":
            return {group.name: torch.rand(group.units) for group in groups}, {}
        if self.importance == "magnitude":
            return {group.name: magnitude_scores(model, group) for group in groups}, {}
        moments = observe_moments(model, groups, sample.batches())
        silent = unseen(groups, moments)
        scores = {g.name: magnitude_scores(model, g) for g in groups if g.name in silent}
        for group in (g for g in groups if g.name not in silent):
            if self.importance == "activation":
                scores[group.name] = activation_scores(model, group, moments)
            else:
                scores[group.name] = norm_scores(model, group, moments, centred=self.importance == "flap")
        if self.importance == "wanda":
            return scores, {}
        return scores, input_means(model, [g for g in groups if g.name not in silent], moments)

    def _counts(self, groups: list[Group], scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many units stay in each group."""
        if self.ranking == "layer":
            return {group.name: self._units_to_keep(group) for group in groups}
        counts: dict[str, int] = {}
        for together in _compared(groups, self.ranking):
            ratio = self._ratio(together[0].kind)
            pooled = torch.cat([scores[group.name].double().cpu() for group in together])
            order = torch.argsort(pooled, descending=True, stable=True)
            stays = torch.zeros(len(pooled), dtype=torch.bool)
            stays[order[: round(len(pooled) * (1 - ratio))]] = True
            for group, own in zip(together, torch.split(stays, [g.units for g in together]), strict=True):
                counts[group.name] = self._rounded(group, float(own.sum()))
        return counts

    def _check(self, model: nn.Module) -> None:
        wrapped = next((name for name, module in model.named_modules() if is_wrapped(module)), None)
        if wrapped is not None:
            raise EdgetuneError(
                f"prune needs plain layers, and {wrapped} has an adapter or slices", action="et.finalize(model) first"
            )
        names = [name for name, _ in model.named_modules() if name]
        for pattern in self.skip:
            if not any(matches(name, [pattern]) for name in names):
                raise no_match_error("skip: the pattern matches no layer", pattern, names)

    def _kinds(self, model: nn.Module) -> frozenset[Kind]:
        has_attention = bool(attention_names(model))
        kinds = self.what
        if kinds is None:
            kinds = frozenset({"ffn", "heads"} if has_attention else {"channels"})
        kinds = frozenset(kind for kind in kinds if self._ratio(kind) > 0)
        if not kinds:
            raise EdgetuneError("nothing to prune: every ratio is zero", got=self.ratio, action="give a ratio above 0")
        return kinds

    def _ratio(self, kind: Kind) -> float:
        own = {"ffn": self.ffn_ratio, "heads": self.head_ratio, "channels": None}[kind]
        return self.ratio if own is None else own

    def _multiple(self, group: Group) -> int:
        """What the number of units that stay is a multiple of, so that `round_to` divides the width they are written
        in."""
        if group.kind == "heads":
            return 1
        per_unit = len(group.along("out")[0].of_unit[0])
        return self.round_to // math.gcd(self.round_to, per_unit)

    def _units_to_keep(self, group: Group) -> int:
        """Units that stay where each group loses the same share."""
        return self._rounded(group, group.units * (1 - self._ratio(group.kind)))

    def _rounded(self, group: Group, wanted: float) -> int:
        """Units that stay, rounded to the nearest multiple (halves up) and at least one multiple."""
        step = self._multiple(group)
        return min(group.units, max(step, int(wanted / step + 0.5) * step))

    def _refuse_unchanged(self, kinds: frozenset[Kind], groups: list[Group], cuts: list[Cut]) -> None:
        """Raise for a kind that was asked for, and of which rounding leaves everything; else if it leaves all."""
        for kind in sorted({group.kind for group in groups} & kinds):
            asked = self.what is not None or (kind == "heads" and self.head_ratio is not None)
            if not any(one.group.kind == kind or not asked for one in cuts):
                widths = sorted({group.units for group in groups if group.kind == kind})
                raise EdgetuneError(
                    f"rounding leaves every width of {kind} as it is",
                    got=f"ratio {self._ratio(kind)}, round_to {self.round_to}, widths {widths}",
                    action=f"raise the ratio, lower round_to, or leave {kind} out of what",
                )

    def _refuse_unreached(self, kinds: frozenset[Kind], groups: list[Group]) -> None:
        """Raise where a share leaves next to nothing of most widths, so that far less would go than was asked."""
        for kind in sorted(kinds):
            own, ratio = [group for group in groups if group.kind == kind], self._ratio(kind)
            units, kept = sum(group.units for group in own), sum(map(self._units_to_keep, own))
            steps = {group.name: self._multiple(group) for group in own}
            emptied = [g for g in own if g.units * (1 - ratio) < steps[g.name] / 2 and g.units > steps[g.name]]
            missed = sum(self._units_to_keep(group) - group.units * (1 - ratio) for group in emptied)
            if missed > _MOST_MISSED * units:
                widths = ", ".join(
                    f"{self._units_to_keep(g)} of {g.units} in {display_name(g.name)}" for g in emptied[:3]
                )
                least = "at least one head" if kind == "heads" else f"round_to={self.round_to}"
                reached = math.floor(100 * (1 - kept / units)) / 100
                raise EdgetuneError(
                    f"{kind}: the ratio cannot be reached: {least} keeps {widths}",
                    got=ratio,
                    action=f"use at most {reached:g}" + ("" if kind == "heads" else ", or lower round_to"),
                )


def _refuse_infinite(scores: Mapping[str, Tensor]) -> None:
    """Raise for units that cannot be ranked."""
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise EdgetuneError(
                "the units cannot be ranked: a weight, or what the layer computes on the sample, is NaN or infinite",
                where=display_name(name),
                action="look at the weights and the sample, or leave the layer out: skip",
            )


def _compared(groups: Sequence[Group], ranking: str) -> list[list[Group]]:
    """The groups whose units are ranked together."""
    sets: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        shape = (group.units, *((m.axis, m.width) for m in group.members)) if ranking == "isomorphic" else ()
        sets.setdefault((group.kind, *shape), []).append(group)
    return list(sets.values())


def grouping_of(model: nn.Module) -> Grouping:
    """What the last `prune` of a model left, and why; its groups are not kept."""
    grouping: Grouping = getattr(model, _GROUPING, Grouping((), {}, ()))
    return grouping


def _drop_lowest(group: Group, scores: Tensor, count: int) -> Cut:
    order = torch.argsort(scores.cpu(), descending=True, stable=True)
    return Cut(group, tuple(sorted(order[count:].tolist())))
