"""What techniques that split linears refuse, and what they leave whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.layers import parameter_owners
from edgetune.core.plain import refuse_computed
from edgetune.quant.layers import refuse_infinite
from edgetune.quant.size import weight_bits
from edgetune.quant.split import SmallPart

SHARED = "other layers share the weights of these layers"


def is_whole(layer: nn.Module) -> bool:
    """Whether it is no part of a split linear."""
    return not isinstance(layer, SmallPart)


def refuse_unsplittable(technique: str, name: str, layer: nn.Linear) -> None:
    """Raise for a linear that is quantized, computes its weight, or has one that is not finite."""
    if weight_bits(layer.weight) is not None:
        raise EdgetuneError(f"{name} is quantized already", action=f"put {technique} before quantization")
    refuse_computed(name, layer)
    refuse_infinite(name, layer.weight)


def shared_weights(model: nn.Module, layers: Mapping[str, nn.Linear]) -> list[str]:
    """Those of the layers whose weight is another's too."""
    owners = parameter_owners(dict(model.named_modules()))
    return [name for name, layer in layers.items() if len(owners.get(id(layer.weight), ())) > 1]


def warn_of_whole(technique: str, reasons: Iterable[tuple[Sequence[str], str]]) -> None:
    """Name the layers that stay whole, for each reason."""
    for names, reason in reasons:
        if names:
            warnings.warn(
                f"{technique}: {truncate_list(names)}: {reason}, so they stay whole. To silence this: skip: {names}",
                stacklevel=4,  # the caller of `et.apply`
            )
