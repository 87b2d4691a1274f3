"""Repairs: rewrite what a model computes so that the backend takes it.

A repair of an operator is a function over tensors, `Decomposition`, that returns `NotImplemented` to keep the operator.
A repair of the graph is a pass over the captured program. Each has its own file and a test against eager mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.export import ExportedProgram

from edgetune.capture.repairs import (
    activations,
    adaptive,
    attention,
    bags,
    complexes,
    constants,
    decomposed,
    depthwise,
    expand,
    folding,
    gelu,
    grouped,
    identities,
    indexing,
    mean,
    norms,
    packed,
    padding,
    pooling,
    power,
    products,
    rescaled,
    scalars,
    softmax,
    upsample,
    volumes,
    widened,
)

Decomposition = Callable[..., Any]

# Operators that XNNPACK leaves to portable kernels or computes inaccurately.
XNNPACK: dict[Any, Decomposition] = {
    **activations.REPAIRS,
    **expand.REPAIRS,
    **gelu.REPAIRS,
    **indexing.REPAIRS,
    **mean.REPAIRS,
    **norms.REPAIRS,
    **padding.REPAIRS,
    **pooling.REPAIRS,
    **power.REPAIRS,
    **softmax.REPAIRS,
    **upsample.REPAIRS,
    **widened.REPAIRS,
}


_ON_KERNELS = ("xnnpack", "portable")  # other targets have more operators of their own

# Operators without a kernel.
KERNELS: dict[Any, Decomposition] = {
    **activations.WITHOUT_KERNEL,
    **adaptive.REPAIRS,
    **bags.REPAIRS,
    **decomposed.REPAIRS,
    **folding.REPAIRS,
    **padding.WITHOUT_KERNEL,
    **volumes.REPAIRS,
}


def decompositions(target: str | None) -> dict[Any, Decomposition]:
    """The operators to rewrite for this target; `None`: only those for every target."""
    plain = KERNELS if target in _ON_KERNELS else {}
    return {**attention.REPAIRS, **plain, **(XNNPACK if target == "xnnpack" else {})}


def before(program: ExportedProgram) -> None:
    """Repair what is recognizable only before operators are decomposed."""
    grouped.share_keys(program)
    bags.of_one_length(program)
    complexes.write_as_pairs(program)


def repair_graph(program: ExportedProgram, target: str | None) -> None:
    """Repair the captured program in place."""
    identities.drop(program)
    if target == "xnnpack":
        scalars.as_floats(program)
        norms.unchain(program)
        depthwise.split(program)
    if target in _ON_KERNELS:
        widened.widen(program, target)
    if target in ("xnnpack", "vulkan"):  # Vulkan's passes fail on a mask that is computed from constants
        constants.fold(program)
    if target == "xnnpack":
        products.batch(program)
        rescaled.separate_moves(program)
        packed.part(program)
    constants.own_memory(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
