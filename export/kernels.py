"""The kernels that the runtime has, and the operators of a lowered program that need another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from edgetune.capture import operators
from edgetune.core.errors import EdgetuneError, Exit, shortened
from edgetune.core.quiet import quiet
from edgetune.export.targets import Target
from edgetune.runtime import remedies

_OF_LANGUAGE = "llama::"  # attention and cache, in a library of their own that language programs load


@cache
def registered() -> frozenset[str]:
    """`aten::add.out` and its kin: what the runtime of this machine runs outside of a backend.

    Asked in this process: beside executorch's compiler the runtime's library is loaded in milliseconds.
    """
    with quiet():
        import executorch.kernels.quantized  # noqa: F401  registers embedding_byte and its kin
        from executorch.extension.pybindings import _portable_lib
    return frozenset(_portable_lib._get_operator_names())


def check(lowered: Mapping[str, ExportedProgram], captured: Mapping[str, ExportedProgram], target: Target) -> None:
    """Raise `EdgetuneError` (exit code 5) for operators that no backend took and no kernel computes.

    They are named with their modules, of each method: what loads is known before anything is run. The same portable
    kernels are in every app; of a target that this machine cannot run, only they are looked at.
    """
    places: Counter[str] = Counter()
    known: dict[str, None] = {}
    for method, program in lowered.items():
        modules = operators.modules(captured[method])
        for node in _nodes(program):
            lacking = _lacking(node, target)
            if lacking:
                number = operators.number_of(node)
                module = modules.get(number, "") if number is not None else ""
                within = f" of method {method}" if len(lowered) > 1 else ""
                places[f"{lacking} in {module or 'the model itself'}{within}"] += 1
                operator = "complex" if lacking.endswith("numbers") else str(node.target)
                known[remedies.remedy(operator)] = None
    if not places:
        return
    told = [f"{place} (x{count})" if count > 1 else place for place, count in places.most_common()]
    raise EdgetuneError(
        f"the model cannot be lowered for {target.name}: the runtime has no kernel for {shortened(told, 6)}",
        action="; ".join(filter(None, known))
        or "write it with other operators, or leave its module out of what is exported",
        exit_code=Exit.EXPORT,
    )


def _nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """The operators outside of delegates, those of branches and loops too."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_function" and isinstance(node.target, OpOverload):
                yield node


def _lacking(node: fx.Node, target: Target) -> str:
    """The operator where it has no kernel, with the kind of number where that is why; else empty."""
    name = str(node.target.name())  # type: ignore[union-attr]
    if (not target.runs_here and not name.startswith("aten::")) or name.startswith(_OF_LANGUAGE):
        return ""
    if name not in registered():
        return name
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta.get("val")]
    if name == "aten::convolution.out" and any(isinstance(v, Tensor) and v.dim() > 4 for v in values):
        return f"{name} in three dimensions"
    complex_numbers = any(isinstance(value, Tensor) and value.dtype.is_complex for value in values)
    return f"{name} of complex numbers" if complex_numbers and name not in _COMPLEX else ""


# Those of the kernels that were seen to compute with complex numbers; an addition, for one, was seen not to.
_COMPLEX = frozenset(f"aten::{name}.out" for name in ("_fft_r2c", "_fft_c2r", "view_as_real_copy", "mul"))
