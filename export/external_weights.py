"""External weights: stored in a `.ptd` file next to the `.pte`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import fx

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.tensor_data import read_tensor_data

_FILE = "weights"


def externalize_weights(edge: Any) -> None:
    """Move the named data of all delegates of a lowered program into the `.ptd`.

    executorch itself tags constants before the lowering, and misses those that XNNPACK's passes create, such as a
    convolution's weights with its batch norm folded in.
    """
    store = edge._named_data_store
    store.external_data = {_FILE: {**store.external_data.get(_FILE, {}), **store.pte_data}}
    store.pte_data = {}


def tag_external(node: fx.Node) -> str | None:
    """For `ExecutorchBackendConfig.external_constants`: parameters and buffers are external.

    Constants that a pass computed stay inside: their names are numbered per method, so two methods would collide.
    """
    return _FILE if node.name.startswith(("p_", "b_")) else None


def read_weights(built: Any, target: str) -> bytes:
    """The `.ptd` of a built program. Raises `EdgetuneError` (exit code 5) if no weight is external."""
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        built.write_tensor_data_to_file(folder)
        file = Path(folder) / f"{_FILE}.ptd"
        if file.is_file():
            return file.read_bytes()
    raise EdgetuneError(
        f"no weight of this program can be stored separately: target {target} keeps them in its delegates",
        action="leave out external_data, or lower with target='xnnpack'",
        exit_code=Exit.EXPORT,
    )


def read_sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor in a `.ptd`, by name."""
    return {name: len(weight.data) for name, weight in read_tensor_data(file).items()}
