"""Laws of tasks, each crossed with the table of them; entities counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.core.ledger import METRICS
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import IGNORED_LABEL, Rows
from edgetune.models.labels import output_names
from edgetune.models.loaded import ModelSettings
from edgetune.models.text import hugging_face
from edgetune.tasks.entities import entities, entity_f1_pct
from edgetune.tasks.quality import quality
from edgetune.tasks.task import Batch, Task
from edgetune.tasks.token_classification import TokenClassification
from edgetune.train.distill import soft_loss
from edgetune.train.loop import count_labels
from support.checkpoints import save_bert

TAGS = ("O", "B-place", "I-place")
NUMBERS = [1.0, 2.5, -3.0, 8.0, 0.5, 4.0, 9.5, -1.0]
PLACES = [(0, 1, 2), (1, 0, 0), (0, 0, 0), (1, 2, 2), (0, 1, 0), (1, 1, 0), (0, 1, 2), (1, 2, 0)]


def words(inputs: Any, pad_to: int | None = None) -> Any:
    """Three tokens for each row, the numbers of its words; five places, of which two are padding."""
    if hasattr(inputs, "dtype"):
        return torch.from_numpy(np.asarray(inputs)).float()
    split = [row.split() if isinstance(row, str) else row for row in inputs]
    ids = torch.tensor([[len(word) for word in row] + [0, 0] for row in split])
    tensors = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if not isinstance(inputs[0], str):
        tensors["words"] = torch.tensor([[0, 1, 2, -1, -1]] * len(split))
    return tensors


def dataset(name: str) -> Dataset:
    """Eight rows for any task of the table."""
    kind: type[Task] = registry.load(registry.TASKS[name])
    texts: Any = [f"{'a' * (1 + n % 4)} {'b' * (1 + n % 3)} {'c' * (1 + n % 2)}" for n in range(8)]
    if name == "image-classification":
        texts = np.random.default_rng(0).integers(0, 256, (8, 6, 6), dtype=np.uint8)
    if name == "token-classification":
        texts = [tuple(text.split()) for text in texts]
    labels = {"causal-lm": None, "regression": NUMBERS, "token-classification": PLACES}.get(name, [0, 1, 2, 0] * 2)
    names = {"causal-lm": (), "regression": (), "token-classification": TAGS}.get(name, ("x", "y", "z"))
    rows = Rows(texts, labels)
    task = kind(names)
    task.check("tiny", rows, (rows, rows))
    return Dataset("tiny", task.fit(rows), rows, rows, rows)


def split_of(data: Dataset) -> Split:
    return Split(data.task, data.test, words)


def perfect(labels: Tensor, classes: int) -> Tensor:
    """Logits that are right about every label that counts."""
    if labels.is_floating_point():
        return labels[:, None].clone()
    return 50.0 * torch.nn.functional.one_hot(labels.clamp(min=0), classes).float()


def outputs(data: Dataset) -> int:
    return 8 if data.task.name == "causal-lm" else data.task.outputs


each = pytest.mark.parametrize("name", registry.TASKS)


@each
def test_the_loss_is_finite_has_a_gradient_and_is_least_where_all_is_right(name: str) -> None:
    data = dataset(name)
    _, labels = split_of(data).batch(range(8))
    right = perfect(labels, outputs(data))
    guess = torch.randn(right.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = data.task.loss(guess, labels)
    loss.backward()
    assert loss.dim() == 0
    assert guess.grad is not None
    assert bool(guess.grad.isfinite().all())
    assert float(guess.grad.abs().max()) > 0
    assert 0 <= float(data.task.loss(right, labels)) < 1e-6 < loss.item()
    # two halves weigh as their labels do: so an update may be cut into batches of any size
    halves = [(guess.detach()[half], labels[half]) for half in (slice(3), slice(3, 8))]
    together = sum(count_labels(some) * data.task.loss(of, some).item() for of, some in halves) / count_labels(labels)
    assert together == pytest.approx(loss.item(), rel=1e-5)


@each
def test_quality_of_right_answers_is_the_best_there_is_and_above_the_baselines(name: str) -> None:
    data = dataset(name)
    split = split_of(data)
    halves = [range(5, 8), range(5)]  # in any order

    def batches(noise: float) -> Any:
        for indices in halves:
            inputs = split.encode_rows(indices)
            _, labels = split.task.collate(inputs, split.rows.labels_at(indices))
            logits = perfect(labels, outputs(data))
            yield Batch(indices, inputs, logits + noise * torch.randn(logits.shape), labels)

    best, worse = data.task.quality(batches(0), data.test), data.task.quality(batches(1e3), data.test)
    rising = METRICS[best.metric].higher_is_better
    assert best.value == pytest.approx({"perplexity": 1.0, "rmse": 0.0}.get(best.metric, 100.0), abs=1e-6)
    assert best.rows == 8
    assert (worse.value < best.value) == rising
    for baseline in data.task.baselines(data.parts, words):
        assert (baseline.value < best.value) == rising or baseline.value == best.value


@each
def test_names_of_labels_go_with_them_into_another_order(name: str) -> None:
    data = dataset(name)
    turned = data.with_classes({label: label for label in reversed(data.classes)})
    assert turned.classes == tuple(reversed(data.classes))
    if not data.classes:
        assert turned is data
        return

    def by_name(of: Dataset) -> list[Any]:
        named = ([*label] if isinstance(label, tuple) else [label] for label in of.test.labels or ())
        return [[of.classes[number] for number in numbers] for numbers in named]

    assert by_name(turned) == by_name(data)
    assert turned.fingerprint != data.fingerprint


@each
def test_class_weights_are_for_classes(name: str) -> None:
    data = dataset(name)
    if not data.classes:
        with pytest.raises(EdgetuneError, match=f"class_weights needs classes, and {name} has none"):
            data.task.class_weights(data.train)
        return
    _, labels = split_of(data).batch(range(8))
    weights = data.task.class_weights(data.train)
    assert weights.shape == (len(data.classes),)
    logits = torch.zeros(*labels.shape, len(data.classes), requires_grad=True)
    data.task.loss(logits, labels, weights).backward()
    assert logits.grad is not None
    pulls = logits.grad.flatten(0, -2).sum(0)
    torch.testing.assert_close(pulls, torch.zeros_like(pulls), msg="every class pulls alike")


@each
def test_a_teacher_that_says_the_same_teaches_nothing(name: str) -> None:
    data = dataset(name)
    _, labels = split_of(data).batch(range(8))
    logits = perfect(labels, outputs(data))
    assert soft_loss(logits, logits.clone(), labels, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert soft_loss(logits, -logits, labels, 2.0).item() > 0.1


# Entities


def test_entities_are_counted_as_seqeval_does() -> None:
    """The numbers of seqeval 1.2.2 for the same tags, in its default mode."""
    true = [["O", "O", "B-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_f1_pct(true, [["O", "O", "B-MISC", "I-MISC", "I-MISC"], ["B-PER", "I-PER", "O"]]) == 50.0
    assert entity_f1_pct(true, true) == 100.0
    assert entity_f1_pct([["O", "O"]], [["O", "O"]]) == 0.0
    # one of two found, and one that is none: precision 1/2, recall 1/2
    assert entity_f1_pct([["B-A", "O", "B-A"]], [["B-A", "B-B", "O"]]) == 50.0
    # three predicted of which one is right, one true: 2 * 1 / (3 + 1)
    assert entity_f1_pct([["B-A", "I-A", "O", "O"]], [["B-A", "I-A", "B-A", "B-B"]]) == 50.0
    # an I- that stands alone begins an entity; a change of kind ends one
    assert [tuple(one) for one in entities(["I-A", "I-A", "I-B", "O", "B-B", "B-B"])] == [
        ("A", 0, 2), ("B", 2, 3), ("B", 4, 5), ("B", 5, 6),
    ]  # fmt: skip


def test_only_the_first_token_of_a_word_has_its_tag(tmp_path: Path) -> None:
    save_bert(tmp_path, "Model", hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    rows = Rows([("goodness", "a", "badly")], [(1, 0, 2)])
    data = Dataset("tiny", TokenClassification(TAGS), rows, rows, rows)
    loaded = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=12), data)
    split = Split(data.task, rows, loaded.encode)
    inputs, labels = split.batch([0], pad_to=12)
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "attention_mask"}
    begins = loaded.encode([rows.inputs[0]], 12)["words"][0]  # type: ignore[call-overload, index]
    assert labels[0][begins >= 0].tolist() == [1, 0, 2]
    assert set(labels[0][begins < 0].tolist()) == {IGNORED_LABEL}
    assert output_names(loaded.model.config) == TAGS
    # what is cut off counts as missed: of the second entity, nothing is seen
    short = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8), data)
    long = Rows([(*("a",) * 20, "bad")], [(1, *(0,) * 19, 1)])

    class Right(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            tags = torch.zeros_like(input_ids)
            tags[:, 1] = 1
            return perfect(tags, 3)

    assert quality(Right(), Split(data.task, long, short.encode)).value == pytest.approx(100 * 2 / 3)


# From the table to the answer


def test_a_trained_head_for_numbers_is_not_taken_over(tmp_path: Path) -> None:
    save_bert(tmp_path, num_labels=1, problem_type="regression")
    data = dataset("regression")
    with pytest.raises(EdgetuneError, match="numbers of another scale, so it cannot be kept"):
        hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8, head="keep"), data)
    loaded = hugging_face(str(tmp_path), ModelSettings(source="x", max_length=8), data)
    assert any("new weights instead of those of the checkpoint: classifier" in note for note in loaded.notes)
