"""Repairs: what a model computes, written so that the backend takes it.

A repair of one operator is a plain function over tensors: `Decomposition`, used where that operator is met. It
returns `NotImplemented` for what should stay as it is. A repair of the graph is a pass over the captured program.
Each stands in a file of its own with a test against eager.
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
)

Decomposition = Callable[..., Any]

# What XNNPACK leaves to portable kernels, or computes only roughly, in operators that it takes and computes exactly.
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
}


_ON_KERNELS = ("xnnpack", "portable")  # what these do not take runs on kernels; others have more operators themselves

# What has no kernel, in operators that have one.
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
    """The operators to write otherwise for this target; `None`: only what every target wants."""
    plain = KERNELS if target in _ON_KERNELS else {}
    return {**attention.REPAIRS, **plain, **(XNNPACK if target == "xnnpack" else {})}


def before(program: ExportedProgram) -> None:
    """Change what is seen only before operators are written otherwise."""
    grouped.share_keys(program)
    bags.of_one_length(program)
    complexes.as_pairs(program)


def repair_graph(program: ExportedProgram, target: str | None) -> None:
    """Change the captured program in place where it computes what need not be, or in a form that costs a delegate."""
    identities.drop(program)
    if target == "xnnpack":
        scalars.as_floats(program)
        norms.unchain(program)
    if target in ("xnnpack", "vulkan"):  # Vulkan's passes fail on a mask that is computed from constants
        constants.fold(program)
    if target == "xnnpack":
        products.batch(program)
        rescaled.apart(program)
        packed.part(program)
    constants.own_memory(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
