"""The layers that an interrupted calibration has rounded, on disk, so that it goes on with the next one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import replace_files
from edgetune.core.inputs import Inputs, tensors_in
from edgetune.quant.blocks import pack_codes
from edgetune.quant.rounding import Codes, Grid


class Unfinished:
    """A folder inside another, named for the settings, the batches and the weights; `None`: nothing is stored."""

    def __init__(self, folder: Path | None, settings: str, model: nn.Module, batches: Iterable[Inputs]) -> None:
        self.folder = None if folder is None else folder / f"quantized-{_fingerprint(settings, model, batches)}"

    def restore(self, layers: Mapping[str, nn.Linear], grids: Mapping[str, Grid]) -> set[str]:
        """Give those of the layers that are stored their rounded weights. Returns their names."""
        restored: set[str] = set()
        for file in [] if self.folder is None else sorted(self.folder.glob("[0-9]*.pt")):
            for name, codes in torch.load(file, weights_only=True).items():
                layer = layers[name]
                rounded = Codes(*(tensor.to(layer.weight.device) for tensor in codes))
                layer.weight = pack_codes(rounded, grids[name], layer.weight.dtype, rounds_activations=True)
                restored.add(name)
        return restored

    def store(self, layers: Mapping[str, nn.Linear], done: int) -> None:
        """Write layers that have been rounded, `done` with those before."""
        if self.folder is None:
            return
        weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
        try:
            with replace_files(self.folder / f"{done:05d}.pt") as (temporary,):
                torch.save({name: (weight.qdata, weight.scale) for name, weight in weights.items()}, temporary)
        except (OSError, RuntimeError) as error:  # torch raises the second on a full disk
            raise EdgetuneError(
                f"cannot store the rounded layers ({error})",
                where=str(self.folder),
                action="free some disk space, and run it again: it goes on with the layers that are not stored",
            ) from error

    def remove(self) -> None:
        """Nothing is to be continued any more."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _fingerprint(settings: str, model: nn.Module, batches: Iterable[Inputs]) -> str:
    """Of all that the rounded weights depend on."""
    digest = hashlib.blake2b(settings.encode(), digest_size=8)
    state = model.state_dict()
    for key in state:
        digest.update(key.encode())
    tensors = [*state.values(), *(tensor for batch in batches for tensor in tensors_in(batch))]
    for part in (part for tensor in tensors for part in _parts(tensor)):
        digest.update(str((part.dtype, tuple(part.shape))).encode())
        if part.numel():  # by bytes, since numpy has no bfloat16
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(tensor: Any) -> list[torch.Tensor]:
    """A tensor; of one that is quantized its codes and scales."""
    names = getattr(tensor, "tensor_data_names", None)
    return [tensor] if names is None else [getattr(tensor, name) for name in names]
