"""Choose the linears and embedding tables that compute rounded while they train, adapters and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgetune.core.carriers import is_wrapped, plain_layer
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import matches, no_match_error
from edgetune.core.packed_layers import is_nf4
from edgetune.core.plain import refuse_computed
from edgetune.core.technique import Sample
from edgetune.lean.reads import readers_of, refuse_readers, watch_first_forward
from edgetune.quant.fake import dense_weight, outer_layers, refuse_unroundable
from edgetune.quant.layers import refuse_infinite, refuse_max_norm
from edgetune.quant.size import weight_bits
from edgetune.quant.tables import looks_up


@dataclass(frozen=True)
class RoundableLayers:
    """Layers by name, all of them checked; a wrapped layer has the name of the plain one."""

    linears: dict[str, dict[str, nn.Module]]  # by the setting whose patterns match; a later setting takes precedence
    tables: dict[str, nn.Module]


def choose_roundable(
    model: nn.Module,
    sample: Sample | None,
    patterns: Mapping[str, tuple[str, ...]],
    skip: tuple[str, ...],
    tables: bool,
) -> RoundableLayers:
    """The linears that each setting's patterns match, and with `tables` all embeddings, without those of `skip`.

    A table that is read in another way than by looking rows up is left out, as when it is quantized. Raises
    `EdgetuneError` for a pattern without a match, integer or infinite weights, a linear whose weight is read elsewhere
    or computed, and adapters that cannot be rounded with their weight.
    """
    layers = outer_layers(model)
    linears = {name: layer for name, layer in layers.items() if _is_linear(layer) and width_of(layer) > 1}
    embeddings = {name: layer for name, layer in layers.items() if isinstance(plain_layer(layer), nn.Embedding)}
    _refuse_unmatched({**patterns, "skip": skip}, linears, embeddings)
    setting_of = {name: setting for setting, own in patterns.items() for name in linears if matches(name, own)}
    setting_of = {name: setting for name, setting in setting_of.items() if not matches(name, skip)}
    if not setting_of:
        raise EdgetuneError("there is no linear layer to round", got=list(linears), action="shorten skip")
    wanted = {name: table for name, table in embeddings.items() if tables and not matches(name, skip)}
    chosen = {name: linears[name] for name in setting_of} | wanted
    for name, layer in chosen.items():
        _check_layer(name, layer)
    readers, watched = readers_of(model, chosen, sample)
    refuse_readers(model, {name: outer for name, outer in readers.items() if name in setting_of})
    if not watched:
        watch_first_forward(model, setting_of)
    by_setting = {
        setting: {name: linears[name] for name, own in setting_of.items() if own == setting} for setting in patterns
    }
    lookups = {n: t for n, t in wanted.items() if n not in readers and (is_wrapped(t) or looks_up(t))}  # type: ignore[arg-type]
    return RoundableLayers(by_setting, lookups)


def width_of(layer: nn.Module) -> int:
    """How many inputs share an output of a linear, or the length of a table's rows."""
    plain: Any = plain_layer(layer)
    return int(plain.embedding_dim if isinstance(plain, nn.Embedding) else plain.in_features)


def _is_linear(layer: nn.Module) -> bool:
    plain = plain_layer(layer)
    return isinstance(plain, nn.Linear) or is_nf4(plain)


def _refuse_unmatched(
    patterns: Mapping[str, tuple[str, ...]], linears: Mapping[str, nn.Module], tables: Mapping[str, nn.Module]
) -> None:
    for setting, own in patterns.items():
        names = [*linears, *tables] if setting == "skip" else list(linears)
        for pattern in own:
            if not any(matches(name, [pattern]) for name in names):
                raise no_match_error(f"{setting}: the pattern matches no layer", pattern, names)


def _check_layer(name: str, layer: Any) -> None:
    refuse_unroundable(name, layer)
    plain: Any = plain_layer(layer)
    if weight_bits(plain.weight) is not None:
        raise EdgetuneError(
            "the weights are integers already", where=name, got=type(plain.weight).__name__,
            action="train the model in floating point, before it is quantized",
        )  # fmt: skip
    if isinstance(plain, nn.Embedding):
        refuse_max_norm(name, plain)
    elif not is_wrapped(layer):
        refuse_computed(name, layer)
    refuse_infinite(name, dense_weight(layer))
