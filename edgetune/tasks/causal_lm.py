"""Causal language modeling: every token of a text is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Baseline, Quality
from edgetune.data.rows import IGNORED_LABEL, Encode, Rows
from edgetune.lean.head import cross_entropy
from edgetune.tasks.baselines import token_frequencies
from edgetune.tasks.task import Batch, Parts, Task


@dataclass(frozen=True)
class CausalLM(Task):
    """Cross entropy and perplexity of logits `(batch, tokens, vocabulary)` with labels `(batch, tokens)`.

    The label of a position is the next token, as its logits predict it; -100 where none is to be learned.
    """

    name: ClassVar[str] = "causal-lm"
    kind: ClassVar[Literal["text", "image", "language"]] = "language"
    rows: ClassVar[str] = "texts without classes"
    models: ClassVar[str] = "smollm2 or hf:PATH"

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """The next tokens, int64 `(batch, tokens)`. Labels are shifted, not logits, so a frozen head saves none."""
        tensors, learned = learned_tokens(inputs)
        return tensors, functional.pad(learned[:, 1:], (0, 1), value=IGNORED_LABEL)

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean cross entropy over all tokens."""
        return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """The perplexity of all tokens together."""
        total, count = 0.0, 0
        for batch in batches:  # in fp32, which a mean over many tokens needs; the last position predicts nothing
            logits, labels = batch.logits[:, :-1].flatten(0, 1).float(), batch.labels[:, :-1].flatten()
            total += functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum").item()
            count += int((labels != IGNORED_LABEL).sum())
        if not count:
            raise EdgetuneError("there are no tokens to measure quality on", got=f"{len(rows)} rows")
        # above e^700 a float ends; such a model is broken and the number says so
        return Quality(metric="perplexity", value=math.exp(min(total / count, 700.0)), rows=len(rows))

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """The perplexity of single token frequencies; none if `encode` is not given."""
        if encode is None:
            return ()
        train, test = (tokens_of(rows, encode) for rows in (parts.train, parts.test))
        return (token_frequencies(train, test),)


def learned_tokens(inputs: Inputs) -> tuple[dict[str, Tensor], Tensor]:
    """A language model's inputs, and its tokens `(batch, tokens)` with -100 for those not in the loss."""
    if not isinstance(inputs, dict) or not {"input_ids", "attention_mask"} <= set(inputs):
        raise EdgetuneError("a causal language model needs input_ids and attention_mask from its encoder")
    tensors = dict(inputs)
    labels = tensors.pop("labels", tensors["input_ids"])
    return tensors, labels.masked_fill(tensors["attention_mask"] == 0, IGNORED_LABEL)


def tokens_of(rows: Rows, encode: Encode) -> list[list[int]]:
    """The tokens of each row, with -100 for those not in the loss."""
    starts = range(0, len(rows), 512)
    taken = (rows.take(range(start, min(start + 512, len(rows)))) for start in starts)
    return [row for inputs in taken for row in learned_tokens(encode(inputs))[1].tolist()]
