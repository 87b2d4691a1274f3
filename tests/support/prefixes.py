"""Models, rows and comparisons that the tests of the cached prefix share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.inputs import call, logits_of
from edgetune.data.dataset import Split
from edgetune.data.rows import Rows
from edgetune.sparse.update import SparseUpdate
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification
from edgetune.train.plan import epoch_order
from edgetune.train.prefix.cache import PrefixCache
from edgetune.train.prefix.rows import bytes_of
from support.law_models import Mlp
from support.laws import bert, cnn, llama, mlp

torch.set_num_threads(1)

ROWS = 14


def words(inputs: Sequence[Any], pad_to: int | None = None) -> dict[str, Tensor]:
    """Lists of token ids, padded on the right to the longest, rounded up to 4."""
    width = pad_to or -(-max(len(row) for row in inputs) // 4) * 4
    ids, mask = torch.zeros(len(inputs), width, dtype=torch.int64), torch.zeros(len(inputs), width, dtype=torch.int64)
    for n, row in enumerate(inputs):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(causal: bool = False, changed: int | None = None) -> Split:
    """Rows of 2 to 15 tokens. `changed`: the row of which one token is another."""
    rows = [[3 + (7 * n + 5 * k) % 44 for k in range(2 + n)] for n in range(ROWS)]
    if changed is not None:
        rows[changed][0] += 1
    if causal:
        return Split(CausalLM(), Rows(rows), words)
    return Split(TextClassification(("a", "b", "c")), Rows(rows, [n % 3 for n in range(ROWS)]), words)


class Arrays:
    """Rows of one shape without lengths. `noise`: added anew at each call, as augmentation would."""

    lengths = None

    def __init__(self, *shape: int, noise: float = 0.0) -> None:
        self.inputs = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(9))
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(list(indices))
        values = self.inputs[rows]
        return values + self.noise * torch.rand_like(values) if self.noise else values, rows % 3


def sparse(model: nn.Module, scheme: Any = "last-1") -> nn.Module:
    return SparseUpdate(scheme=scheme).apply(model)


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """Plain `requires_grad_(False)`."""
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def gradients(model: nn.Module, split: Any, indices: Sequence[int], kind: Any, cache: PrefixCache | None) -> Any:
    """Loss and gradients of one batch in training mode, with the same random numbers each time."""
    inputs, labels = split.batch(indices)
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(11)
    if cache is None:
        logits = logits_of(call(model, inputs))
    else:
        with cache.rows(indices):
            logits = logits_of(call(model, inputs))
    loss = kind.loss(logits, labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: Any, b: Any, tolerance: float) -> None:
    assert a[1].keys() == b[1].keys()
    assert abs(a[0] - b[0]) <= tolerance * abs(a[0])
    largest = max(value.abs().max() for value in a[1].values())
    for name, value in a[1].items():  # before a batch norm a bias has no gradient but rounding
        assert (value - b[1][name]).abs().max() <= tolerance * max(value.abs().max(), 0.1 * largest), name


def fit(model: nn.Module, split: Any, cache: PrefixCache | None, seed: int = 0, epochs: int = 2) -> list[float]:
    """A short training like edgetune's own; its losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    torch.manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        for indices in epoch_order(len(split), 4, split.lengths, seed, epoch):
            inputs, labels = split.batch(indices)
            optimizer.zero_grad()
            if cache is None:
                logits = logits_of(call(model, inputs))
            else:
                with cache.rows(indices):
                    logits = logits_of(call(model, inputs))
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


class Counting:
    """How often the forward of these modules runs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.count = 0
        for name in names:
            model.get_submodule(name).register_forward_hook(self._one)

    def _one(self, *_: object) -> None:
        self.count += 1


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "bert-last-1": (lambda: sparse(bert(3)), texts(), TextClassification()),
    "bert-last-2": (lambda: sparse(bert(3), "last-2"), texts(), TextClassification()),
    "llama": (lambda: sparse(llama()), texts(causal=True), CausalLM()),
    "cnn": (lambda: sparse(cnn(), "last-2"), Arrays(3, 16, 16), ImageClassification()),
    "mlp-plain": (lambda: freeze(mlp(), "stem", "blocks.0"), Arrays(32), ImageClassification()),
    "sliced": (
        lambda: sparse(bert(3), {"bert.encoder.layer.2.*.dense": 0.25, "classifier": "full"}), texts(),
        TextClassification(),
    ),
    "sparse-lora": (
        lambda: apply(
            bert(3),
            [SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=["*.layer.1.*.query"], also_train=["classifier"])],
        ),
        texts(),
        TextClassification(),
    ),
}  # fmt: skip


def bits(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(bytes_of(value.detach()))
    return digest.hexdigest()


def trained_bits(folder: Path, seed: int = 0, epochs: int = 2, **settings: Any) -> str:
    model = sparse(bert(3))
    with PrefixCache.open(model, texts(), folder=folder, chunk_rows=4, **settings) as cache:
        fit(model, texts(), cache, seed, epochs)
    return bits(model)


class Skip(Mlp):
    """The first block's output reaches the head, past the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.blocks[0](self.stem(x))
        for block in self.blocks[1:]:
            x = block(x)
        return self.classifier(x + 0.0 * kept)


class Centred(Mlp):
    """Rows meet: each block is given the batch without its mean."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x - x.mean(0))
        return self.classifier(x)


class Writing(Mlp):
    """Writes into what its stem gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += 1
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


class Pair(nn.Module):
    """Blocks that hand on a tuple: the rows, a table that is not of the rows, and nothing."""

    class Block(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.layer, self.first = nn.Linear(8, 8), first

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, None]:
            return functional.gelu(self.layer(x)) + bias, None

    class Table(nn.Module):
        """Parameter-free, with an output that has no rows: it runs as ever."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.linspace(0, 1, x.shape[-1])

    def __init__(self) -> None:
        super().__init__()
        self.table = Pair.Table()
        self.blocks = nn.ModuleList([Pair.Block(n == 0) for n in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(x)
        for block in self.blocks:
            x, _ = block(x, bias)
        return self.head(x)


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind()
