"""Select layers by shell patterns on their dotted names. A pattern that matches nothing raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.other_names import nearest


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted name matches one of the patterns; `*.query` also matches `query` itself.

    >>> matches("encoder.layer.0.query", ["*.query"]), matches("query", ["*.query"]), matches("key", ["*.query"])
    (True, True, False)
    """
    return any(fnmatchcase(name, p) or fnmatchcase("." + name, p) for p in patterns)


def select(
    model: nn.Module,
    include: Iterable[str],
    skip: Iterable[str] = (),
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module,
    accept: Callable[[nn.Module], bool] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, nn.Module]:
    """Layers of `kind` whose name matches `include` and not `skip`, in the model's order; and such of `others`.

    Raises `EdgetuneError` for each pattern of either list that matches no layer of that kind.
    """
    if isinstance(include, str) or isinstance(skip, str):
        raise EdgetuneError("patterns must be a list", got=include, action=f"write [{include!r}]")
    include, skip = list(include), list(skip)
    if not include:
        raise EdgetuneError("targets: no pattern given", action="name at least one layer or pattern")
    layers = {n: m for n, m in model.named_modules() if n and isinstance(m, kind) and (accept is None or accept(m))}
    layers |= others or {}
    for setting, patterns in (("targets", include), ("skip", skip)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in layers):
                raise no_match_error(f"{setting}: the pattern matches no layer", pattern, layers)
    chosen = {n: m for n, m in layers.items() if matches(n, include) and not matches(n, skip)}
    if not chosen:
        raise EdgetuneError("targets: every matching layer is also skipped", got=include, action="shorten skip")
    return chosen


def parameter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with parameters of their own, by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())}


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is the linear layer of transformers whose weight is `(in, out)`, as in GPT-2."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def parameter_owners(layers: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """By the `id` of each parameter, the names of the layers that it is one of."""
    owners: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def no_match_error(problem: str, pattern: str, names: Iterable[str]) -> EdgetuneError:
    """The error for a pattern that matches no name, with the patterns that would."""
    names = list(names)
    endings = _endings(names)
    near = nearest(pattern, endings) or nearest(pattern, names)
    action = "print the names with [name for name, _ in model.named_modules()]"
    return EdgetuneError(problem, got=pattern, allowed=endings, near=near, action=action)


def _endings(names: Iterable[str]) -> list[str]:
    """The shortest patterns for these layers: `*.query` for the query of every block.

    >>> _endings(["blocks.0.query", "blocks.1.query", "blocks.1.norm", "0", "head.1"])
    ['*.query', '*.norm', '0', 'head.1']
    """
    parts = [(name, name.rpartition(".")[2]) for name in names]
    return list(dict.fromkeys(name if last == name or last.isdecimal() else f"*.{last}" for name, last in parts))


def refuse_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise for a layer whose weight is tied to another layer: a merge would change both."""
    owners = parameter_owners(dict(model.named_modules()))
    for name, layer in chosen.items():
        for parameter in layer.parameters(recurse=False):
            others = {*owners.get(id(parameter), ())} - {name}
            if others:
                raise EdgetuneError(
                    f"{name} shares its weight with {', '.join(sorted(others))}; a change to one would change both",
                    got=name,
                    action=f'add "{name}" to skip, or untie it: layer.weight = nn.Parameter(layer.weight.clone())',
                )


def unwrapped_name(name: str) -> str:
    """The name that a tensor or module had before a module around it took it as its `base`.

    >>> unwrapped_name("encoder.0.query.base.weight")
    'encoder.0.query.weight'
    """
    return ".".join(part for part in name.split(".") if part != "base")


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in place of the layer `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
