"""A descriptor as a tree of fields, with one of them changed."""

from __future__ import annotations

import copy
from typing import Any


def put(tree: Any, path: str, value: Any) -> Any:
    """A copy with the value at the dotted path replaced, or removed for `...`."""
    changed = copy.deepcopy(tree)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = changed
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return changed
