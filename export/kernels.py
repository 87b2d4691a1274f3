"""Check that the runtime has a kernel for every undelegated operator of a lowered program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from edgetune.capture import operators
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.quiet import silence_libraries
from edgetune.export.targets.target import Target
from edgetune.runtime import remedies
from edgetune.runtime.clock.runs import load_runtime

_CACHE_KERNELS = "llama::"  # attention and cache, in a library that only text-generation programs load


@cache
def registered_kernels() -> frozenset[str]:
    """Names such as `aten::add.out` of the kernels in this machine's runtime."""
    with silence_libraries():
        return frozenset(load_runtime(None)._get_operator_names())


def check(lowered: Mapping[str, ExportedProgram], captured: Mapping[str, ExportedProgram], target: Target) -> None:
    """Raise `EdgetuneError` (exit code 5) for undelegated operators without a kernel, naming their modules.

    Every app has the same portable kernels; for a target that this machine cannot run, only these are checked.
    """
    places: Counter[str] = Counter()
    actions: dict[str, None] = {}
    for method, program in lowered.items():
        modules = operators.modules(captured[method])
        for node in _nodes(program):
            missing = _missing_kernel(node, target)
            if missing:
                number = operators.number_of(node)
                module = modules.get(number, "") if number is not None else ""
                within = f" of method {method}" if len(lowered) > 1 else ""
                places[f"{missing} in {module or 'the model itself'}{within}"] += 1
                operator = "complex" if missing.endswith("numbers") else str(node.target)
                actions[remedies.remedy(operator)] = None
    if not places:
        return
    lines = [f"{place} (x{count})" if count > 1 else place for place, count in places.most_common()]
    raise EdgetuneError(
        f"the model cannot be lowered for {target.name}: the runtime has no kernel for {truncate_list(lines, 6)}",
        action="; ".join(filter(None, actions)) or "write it with other operators, or do not export its module",
        exit_code=Exit.EXPORT,
    )


def _nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """The operators outside of delegates, including those in branches and loops."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_function" and isinstance(node.target, OpOverload):
                yield node


def _missing_kernel(node: fx.Node, target: Target) -> str:
    """The operator if it has no kernel, with the unsupported kind of input if that is why; else empty."""
    name = str(node.target.name())  # type: ignore[union-attr]
    if (not target.runs_here and not name.startswith("aten::")) or name.startswith(_CACHE_KERNELS):
        return ""
    if name not in registered_kernels():
        return name
    values = [source.meta.get("val") for source in node.all_input_nodes] + [node.meta.get("val")]
    if name == "aten::convolution.out" and any(isinstance(v, Tensor) and v.dim() > 4 for v in values):
        return f"{name} in three dimensions"
    complex_numbers = any(isinstance(value, Tensor) and value.dtype.is_complex for value in values)
    return f"{name} of complex numbers" if complex_numbers and name not in _COMPLEX else ""


# Kernels tested with complex numbers; others, such as addition, compute them wrongly.
_COMPLEX = frozenset(f"aten::{name}.out" for name in ("_fft_r2c", "_fft_c2r", "view_as_real_copy", "mul"))
