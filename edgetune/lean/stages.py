"""The repeated blocks of a model, and its stages: the modules that run one after the other."""

from __future__ import annotations

from torch import nn

from edgetune.core.wrapped import Wrapped
from edgetune.lean.reads_in_source import outer_names


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the repeated blocks, in the model's order; empty when there are none.

    The children of the longest ModuleList or Sequential with children of one class give the class of a block; every
    outermost module of that class is a block. Sequentials of Sequentials (stages) count as one list.
    """
    longest: list[str] = []
    for name, module in model.named_modules():
        children = _flat_children(name, module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else {}
        if len({type(child) for child in children.values()}) != 1 or not any(True for _ in module.parameters()):
            continue
        longest = list(children) if len(children) > max(1, len(longest)) else longest
    if not longest:
        return []
    kind = type(model.get_submodule(longest[0]))
    if kind.__module__.startswith("torch.nn"):  # linears in a list: other linears are not their kind of block
        return longest
    names = [name for name, module in model.named_modules() if type(module) is kind]
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def _flat_children(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Children by full name; if all are Sequentials or ModuleLists themselves, theirs instead."""
    children = {f"{name}.{key}".lstrip("."): child for key, child in module.named_children()}
    if children and all(isinstance(child, (nn.ModuleList, nn.Sequential)) for child in children.values()):
        inner = [_flat_children(key, child) for key, child in children.items()]
        # the commonest class only: stages often begin with one block of another class
        flat = {k: m for children_of in inner for k, m in children_of.items()}
        kinds = [type(m) for m in flat.values()]
        common = max(set(kinds), key=lambda kind: (kinds.count(kind), -kinds.index(kind))) if kinds else None
        return {k: m for k, m in flat.items() if type(m) is common}
    return children


def names_before(model: nn.Module, block: str) -> set[str]:
    """Names of the modules that stand before a block in the model's order, those around it left out."""
    names = [name for name, _ in model.named_modules()]
    return set(names[: names.index(block)]) - set(outer_names(block))


def stages_of(model: nn.Module) -> list[nn.Module]:
    """The modules that run one after the other: the blocks, and the outermost modules around them.

    If there are no blocks: the outermost modules that do not train only in part. A module without parameters is a
    stage only before the last block, where nothing but noise could come from it; after it, dropout serves the head.
    """
    blocks = set(blocks_of(model))
    ancestors = {outer for name in blocks for outer in outer_names(name)[1:]}
    stages: list[nn.Module] = []
    remaining = len(blocks)

    def walk(name: str, module: nn.Module) -> None:
        nonlocal remaining
        remaining -= name in blocks
        if name in blocks or (name and not _opens_up(name, module, ancestors)):
            if remaining or name in blocks or any(True for _ in module.parameters()):
                stages.append(module)
            return
        for key, child in module.named_children():
            walk(f"{name}.{key}".lstrip("."), child)

    walk("", model)
    return stages


def _opens_up(name: str, module: nn.Module, ancestors: set[str]) -> bool:
    if isinstance(module, Wrapped):  # its base runs with what trains beside it
        return False
    if name in ancestors or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return any(True for _ in module.children())
    return not ancestors and len({p.requires_grad for p in module.parameters()}) > 1
