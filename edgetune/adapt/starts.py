"""Where a LoRA starts: in the directions of its layer's inputs (EVA), of the weight on them (CorDA), or at what 4 bits
lost (LoftQ).

Paischer et al., 2024, arXiv:2410.07170; Yang et al., 2024, arXiv:2406.05223; Li et al., 2023, arXiv:2310.08659.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.adapt.inject import ADAPTER
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs
from edgetune.core.packed_layers import nf4_weight, subtract_start, unpacked_weight
from edgetune.core.peft_layers import base_of
from edgetune.core.registry import require
from edgetune.quant.hessians import calibrate

Measured = Literal["eva", "corda"]


@torch.no_grad()
def start_from_inputs(init: Measured, model: nn.Module, layers: Mapping[str, Any], batches: Sequence[Inputs]) -> None:
    """Start LoRAs, fresh from peft, from the inputs of their layers on calibration batches. The outputs stay."""
    find = _directions if init == "eva" else _principal_part
    factors: dict[str, tuple[Tensor, Tensor | None]] = {}
    left = calibrate(
        model, dict(layers), batches, lambda name, squares: factors.update({name: find(layers[name], squares)})
    )
    if left:
        action = "leave them out with skip, or give batches that use them"
        raise EdgetuneError(f"no calibration batch reaches {truncate_list(left, 4)}", got=init, action=action)
    for name, (a, b) in factors.items():
        _put(layers[name], a, b)
        if b is not None:
            base_of(layers[name]).get_parameter("weight").data.sub_(b @ a)


def _directions(layer: Any, squares: Tensor) -> tuple[Tensor, None]:
    """A of EVA: the directions in which the inputs vary most, of `squares`, the sum of x x'. B stays 0."""
    vectors = torch.linalg.eigh(squares.double()).eigenvectors  # `(in, in)`, the largest last
    return vectors[:, -_rank(layer) :].flip(1).T, None


def _principal_part(layer: Any, squares: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of CorDA, whose product is the principal part of the weight on these inputs, by peft's decomposition.

    `W C = U S V'`, so `W = U S (V' C^-1)`: with white inputs the directions of PiSSA.
    """
    plain, rank = base_of(layer), _rank(layer)
    if not bool(squares.any()):  # peft would look for a damping for ever
        message = "a layer's inputs are all 0 on the calibration batches, so no part of its weight is the principal one"
        raise EdgetuneError(message, got=tuple(plain.get_parameter("weight").shape), action="leave it out with skip")
    plain.covariance_matrix = squares / squares.diagonal().mean()  # type: ignore[assignment]
    try:
        eigens = require("peft.tuners.lora.corda", "init: corda").collect_eigens_for_layer(plain, None)
    finally:
        del plain.covariance_matrix
    roots = eigens.S_WC[:rank].sqrt()
    return roots[:, None] * eigens.V_WC[:, :rank].T.to(roots), eigens.U_WC[:, :rank].to(roots) * roots


@torch.no_grad()
def start_from_rounding(layers: Mapping[str, Any]) -> None:
    """Start LoRAs at the nearest product to what their 4-bit bases lost (LoftQ, algorithm 1, one step).

    The base stays as it is packed. What is merged onto the original weight later is less by the same product.
    """
    kept = {name: weight for name, layer in layers.items() if (weight := unpacked_weight(base_of(layer))) is not None}
    if missing := [name for name in layers if name not in kept]:
        raise EdgetuneError(
            f"{missing[0]}: init loftq reads the weight before packing, which was not kept", got="loftq",
            action="give et.apply nf4 and lora together, or set keep_original in nf4",
        )  # fmt: skip
    for name, layer in layers.items():
        packed, rank = base_of(layer), _rank(layer)
        u, s, v = torch.linalg.svd(kept[name].float() - nf4_weight(packed).float(), full_matrices=False)
        roots = s[:rank].sqrt()
        a, b = roots[:, None] * v[:rank], u[:, :rank] * roots
        _put(layer, a, b)
        subtract_start(packed, b @ a)


def _rank(layer: Any) -> int:
    rank: int = layer.lora_A[ADAPTER].out_features
    return rank


def _put(layer: Any, a: Tensor, b: Tensor | None) -> None:
    """Let the adapter start at `b @ a`, or at `a` and 0."""
    layer.lora_A[ADAPTER].weight.data.copy_(a)
    if b is not None:
        layer.lora_B[ADAPTER].weight.data.copy_(b / layer.scaling[ADAPTER])
