"""An interrupted calibration goes on where it stopped, and only if everything it depends on is the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.core.technique import Sample
from edgetune.quant.int4 import Int4
from support import laws

GPTQ = Int4(algorithm="gptq", skip=["stem"])
LAYERS = [*(f"blocks.{n}.{layer}" for n in range(3) for layer in ("up", "down")), "classifier"]


class Interrupted(Exception):
    pass


class Stopping:
    """Notes how far the work is, and interrupts it after some blocks."""

    def __init__(self, blocks: int | None = None) -> None:
        self.blocks, self.calls = blocks, list[tuple[int, int, str]]()

    def __call__(self, stage: str, done: int, of: int, detail: str) -> None:
        assert stage == "quantize"
        self.calls.append((done, of, detail))
        if len(self.calls) == self.blocks:
            raise Interrupted


def sample(progress: Stopping, folder: Path | None, seed: int = 0) -> Sample:
    rows = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(seed))
    return Sample(rows[0], lambda: iter(rows), progress=progress, folder=folder)


def codes_of(model: nn.Module) -> Iterator[Tensor]:
    for layer in model.modules():
        weight: Any = getattr(layer, "weight", None)
        if hasattr(weight, "qdata"):
            yield from (weight.qdata, weight.scale)


def test_it_goes_on_after_the_blocks_that_are_stored(tmp_path: Path) -> None:
    model, whole = laws.mlp(), Stopping()
    expected = apply(copy.deepcopy(model), GPTQ, sample(whole, None))
    assert whole.calls == [(2, 7, LAYERS[1]), (4, 7, LAYERS[3]), (6, 7, LAYERS[5]), (7, 7, LAYERS[6])]
    interrupted = copy.deepcopy(model)
    with pytest.raises(Interrupted):
        apply(interrupted, GPTQ, sample(Stopping(2), tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(interrupted.parameters(), model.parameters(), strict=True))
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["00002.pt", "00004.pt"]
    rest = Stopping()
    resumed = apply(copy.deepcopy(model), GPTQ, sample(rest, tmp_path))
    assert rest.calls == whole.calls[2:]
    assert all(torch.equal(a, b) for a, b in zip(codes_of(resumed), codes_of(expected), strict=True))
    assert not any(tmp_path.iterdir())


def test_it_begins_again_where_anything_differs(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        apply(laws.mlp(), GPTQ, sample(Stopping(2), tmp_path))
    moved = laws.mlp()
    with torch.no_grad():
        moved.blocks[2].down.bias[0] += 1e-3  # type: ignore[index, union-attr]
    coarser = Int4(algorithm="gptq", skip=["stem"], group_size="channel")
    for model, technique, seed in [(moved, GPTQ, 0), (laws.mlp(), coarser, 0), (laws.mlp(), GPTQ, 1)]:
        progress = Stopping()
        apply(model, technique, sample(progress, tmp_path, seed))
        assert len(progress.calls) == 4


def test_a_disk_without_room_is_an_error_and_the_model_is_as_before(tmp_path: Path) -> None:
    model = laws.mlp()
    taken = tmp_path / "file"
    taken.touch()
    with pytest.raises(EdgetuneError, match="cannot store the rounded layers"):
        apply(model, GPTQ, sample(Stopping(), taken))
    assert not any(codes_of(model))
