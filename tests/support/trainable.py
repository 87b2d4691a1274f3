"""A net whose training rests on all that a checkpoint must hold, and rows that it can learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.ledger import Quality
from edgetune.train.settings import Train

UPDATES = 12


class Net(nn.Module):
    """Embedding, a frozen layer with a low-rank side path, batch norm (buffers) and dropout (random numbers)."""

    def __init__(self, frozen: bool = True, dropout: float = 0.3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.base = nn.Linear(8, 8)
        self.down = nn.Parameter(torch.randn(2, 8))
        self.up = nn.Parameter(torch.zeros(8, 2))
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)
        self.base.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        x = self.base(x) + x @ self.down.T @ self.up.T
        return self.head(self.dropout(torch.relu(self.norm(x))))


class Words:
    """Rows of tokens whose class is each token modulo three; `lengths` for batches of like length."""

    def __init__(self, rows: int = 50, lengths: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.randint(3, (rows,), generator=generator)
        self.tokens = 3 * torch.randint(6, (rows, 6), generator=generator) + self.labels[:, None]
        self.lengths: Sequence[int] | None = [1 + i % 6 for i in range(rows)] if lengths else None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(list(indices))
        width = max(self.lengths[i] for i in indices) if self.lengths else 6
        return self.tokens[rows, :width], self.labels[rows]


def net(**settings: Any) -> Net:
    torch.manual_seed(3)
    return Net(**settings)


def quality(model: nn.Module) -> Quality:
    words = Words()
    with torch.no_grad():
        hits = model(words.tokens).argmax(1).eq(words.labels).float().mean()
    return Quality(metric="accuracy_pct", value=100 * float(hits), rows=len(words))


def settings(**changes: Any) -> Train:
    values = {"updates": UPDATES, "batch_size": 7, "accumulate": 2, "learning_rate": 0.02, "checkpoint_every": 3}
    return Train(**{**values, **changes})


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key].flatten().view(torch.uint8), theirs[key].flatten().view(torch.uint8)) for key in ours
    )
