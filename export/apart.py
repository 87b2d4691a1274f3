"""Weights apart from the program: in a `.ptd` that the runtime is given beside the `.pte`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import fx

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import quiet

_FILE = "weights"


def move_out(edge: Any) -> None:
    """Let what the delegates of a lowered program keep under a name lie in the `.ptd`.

    executorch's own way marks the constants before the lowering, and misses those that XNNPACK's passes make new: a
    convolution's weights with its batch norm folded.
    """
    store = edge._named_data_store
    store.external_data = {_FILE: {**store.external_data.get(_FILE, {}), **store.pte_data}}
    store.pte_data = {}


def tag(node: fx.Node) -> str | None:
    """For `ExecutorchBackendConfig.external_constants`: parameters and buffers go out.

    What a pass has computed stays: its name is counted up anew in each method, and two methods would share it.
    """
    return _FILE if node.name.startswith(("p_", "b_")) else None


def weights_of(built: Any, target: str) -> bytes:
    """The `.ptd` of a built program. Raises `EdgetuneError` (exit code 5) where nothing lies apart."""
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


def sizes_in(file: Path) -> dict[str, int]:
    """Bytes of each tensor in a `.ptd`, by name."""
    with quiet():  # its reader warns of its own imports
        from executorch.exir._serialize._cord import Cord
        from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

        held = FlatTensorSerializer().deserialize(Cord(file.read_bytes()))
    return {name: len(held.buffers[entry.buffer_index]) for name, entry in held.named_data.items()}
