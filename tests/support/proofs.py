"""Programs whose outputs are held to those of their models, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call
from edgetune.core.outputs import named_outputs
from edgetune.core.quiet import silence_libraries
from edgetune.program.artifact import Artifact


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Any, *arguments: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build(*arguments).eval()


def held(model: nn.Module, inputs: Inputs, artifact: Artifact, tolerance: float = 1e-5) -> dict[str, Tensor]:
    """The program's outputs by name, once they are equal to the model's."""
    with silence_libraries(), torch.no_grad():
        expected = named_outputs(call(model, inputs), "logits")
    got = dict(zip([spec.name for spec in artifact.manifest.main.outputs], artifact.run(inputs), strict=True))
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.allclose(got[name].double(), tensor.double(), atol=tolerance), name
    return got


def one_logit() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.gru(x, h)
        return self.head(y), h
