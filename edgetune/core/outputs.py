"""A model's output as named tensors, as a program returns it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit

_ACTION = (
    "return tensors alone: one, or a tuple or mapping of them; or export a method that does: "
    'et.export_methods({"forward": (model.method, inputs)}, path)'
)


def named_outputs(output: Any, only: str = "output") -> dict[str, Tensor]:
    """Every tensor of an output by its name; `only` is the name if the output is a single tensor.

    Keys of a mapping and fields of a class are names, positions of a tuple are `output_0`, `output_1`; nested values
    are
    `state.0`. `None` is left out. Raises `EdgetuneError` (exit code 5) for anything that is not a tensor.

    >>> import torch
    >>> list(named_outputs((torch.zeros(1), {"state": [torch.zeros(2), None]})))
    ['output_0', 'output_1.state.0']
    """
    if isinstance(output, Tensor):
        return {only: output}
    outputs: dict[str, Tensor] = {}
    for name, value in _leaves(output, ""):
        if not isinstance(value, Tensor):
            place = f"output {name}" if name else "the output"
            raise EdgetuneError(
                f"{place} is not a tensor, and a program only returns tensors",
                got=type(value).__name__,
                action=_ACTION,
                exit_code=Exit.EXPORT,
            )
        outputs[name] = value
    if not outputs:
        raise EdgetuneError("the model returns no tensor", got=output, action=_ACTION, exit_code=Exit.EXPORT)
    return outputs


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value except None, by its path through mappings, tuples and objects with tensor fields."""
    parts = _parts(value, path)
    if value is not None and parts is None:
        yield path, value
    for name, part in parts or ():
        yield from _leaves(part, f"{path}.{name}" if path else name)


def _parts(value: Any, path: str) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(str(name), part) for name, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(i) if path else f"output_{i}", part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(getattr(value, "logits", None), Tensor):
        return list(vars(value).items())
    return None
