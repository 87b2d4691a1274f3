"""Token classification: texts whose words have a tag each, such as named entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs
from edgetune.core.ledger import Baseline, Quality
from edgetune.data.rows import IGNORED_LABEL, Encode, Rows
from edgetune.lean.head import cross_entropy
from edgetune.program.carried import TaggedWords
from edgetune.tasks.entities import OUTSIDE, entity_f1_pct
from edgetune.tasks.task import Batch, Parts, Task


@dataclass(frozen=True)
class TokenClassification(Task):
    """Cross entropy of logits `(batch, tokens, tags)` with labels `(batch, tokens)`, and F1 of whole entities.

    A word's first token has its tag; the other tokens, special ones and padding have -100.
    """

    name: ClassVar[str] = "token-classification"
    rows: ClassVar[str] = "texts with tagged words"

    def check(self, name: str, train: Rows, held_out: Sequence[Rows]) -> None:
        """Raise unless some training word is in an entity."""
        if all(self.labels[tag] == OUTSIDE for row in train.labels or () for tag in row):
            raise EdgetuneError(
                f"{name}: no training word is in an entity",
                got=f"only the tag {OUTSIDE}",
                action="give the column of the tags, or rows with entities",
                exit_code=Exit.DATA,
            )

    def collate(self, inputs: Inputs, labels: list[Any] | None) -> tuple[Inputs, Tensor]:
        """The tags of the tokens that begin a word, int64 `(batch, tokens)`."""
        if not isinstance(inputs, dict) or "words" not in inputs or labels is None:
            raise EdgetuneError(
                "token classification needs to know which token begins which word",
                action="use a transformers tokenizer, or let the encoder give `words`: the word's place, or -1",
            )
        tensors = dict(inputs)
        words = tensors.pop("words")
        tags = torch.full_like(words, IGNORED_LABEL)
        for row, of_words in enumerate(labels):
            begins = words[row] >= 0
            tags[row, begins] = torch.tensor(of_words, dtype=tags.dtype)[words[row][begins]]
        return tensors, tags

    def loss(self, logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Mean cross entropy over all words; with `class_weights`, `(tags,)`, the weighted mean."""
        if class_weights is None:
            return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL)
        flat = logits.flatten(0, 1), labels.flatten()
        return functional.cross_entropy(*flat, class_weights.to(logits), ignore_index=IGNORED_LABEL)

    def class_weights(self, train: Rows) -> Tensor:
        """Inverse to the share of the tag among the training words; a tag without words weighs as if it had one."""
        tags = torch.tensor([tag for row in train.labels or () for tag in row])
        counts = torch.bincount(tags, minlength=len(self.labels)).clamp(min=1).float()
        return len(tags) / (len(self.labels) * counts)

    def quality(self, batches: Iterable[Batch], rows: Rows) -> Quality:
        """F1 of whole entities in per cent; a truncated word counts as outside of any."""
        predicted: dict[int, list[str]] = {}
        for batch in batches:
            assert isinstance(batch.inputs, dict)  # `collate` has seen it
            tags = batch.logits.argmax(-1).tolist()
            for place, index in enumerate(batch.indices):
                words = batch.inputs["words"][place].tolist()
                predicted[index] = self.tags_of_words(tags[place], words, len(rows.inputs[index]))
        true = [[self.labels[tag] for tag in row] for row in rows.labels or ()]
        value = entity_f1_pct(true, [predicted[index] for index in range(len(rows))])
        return Quality(metric="entity_f1_pct", value=value, rows=len(rows))

    def tags_of_words(self, tags: Sequence[int], words: Sequence[int], count: int) -> list[str]:
        """The tag of each of `count` words, from one for each token; `words`: the word that a token begins, or -1."""
        of_words = [OUTSIDE] * count
        for tag, word in zip(tags, words, strict=True):
            if word >= 0:
                of_words[word] = self.labels[tag]
        return of_words

    def baselines(self, parts: Parts, encode: Encode | None = None) -> tuple[Baseline, ...]:
        """Each word's most frequent tag in the training rows; `O` for an unknown word."""
        seen: dict[str, Counter[int]] = {}
        for words, row in zip(parts.train.inputs, parts.train.labels or (), strict=True):
            for word, tag in zip(words, row, strict=True):
                seen.setdefault(word, Counter())[tag] += 1
        commonest = {word: self.labels[counts.most_common(1)[0][0]] for word, counts in seen.items()}
        predicted = [[commonest.get(word, OUTSIDE) for word in words] for words in parts.test.inputs]
        true = [[self.labels[tag] for tag in row] for row in parts.test.labels or ()]
        return (Baseline(name="each word's commonest tag", value=entity_f1_pct(true, predicted)),)

    def postprocessing(self) -> TaggedWords:
        """Entities of the text's words."""
        return TaggedWords()
