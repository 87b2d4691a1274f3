"""Simple methods on the same split, computed anew each time. A fine-tuned model that does not beat them is no use."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.core.ledger import Baseline
from edgetune.core.registry import require
from edgetune.data.dataset import IGNORED_LABEL, Dataset, Encode, Rows, Split
from edgetune.data.vision import grey_pixels

_PIXEL_TRAIN_ROWS = 3000  # more rows take much longer and gain little
_PIXEL_SIDE = 28
_STRENGTHS = (0.1, 3.0, 10.0)  # inverse of the regularization


def baselines(dataset: Dataset, encode: Encode | None = None) -> tuple[Baseline, ...]:
    """What simple methods reach on `dataset.test` after learning from `dataset.train`.

    Texts: always the commonest class; TF-IDF with logistic regression. Images: always the commonest class; logistic
    regression on grey pixels. Both in per cent of right answers. Causal language model: the perplexity of single
    token frequencies, which needs `encode` for the tokens; none without.
    """
    if dataset.task == "causal-lm":
        return (_unigram(dataset, encode),) if encode is not None else ()
    simple = _majority(dataset)
    learned = _tfidf(dataset) if dataset.task == "text-classification" else _pixel_regression(dataset)
    return simple, learned


def _majority(dataset: Dataset) -> Baseline:
    [(commonest, _)] = Counter(_labels(dataset.train)).most_common(1)
    right = sum(label == commonest for label in _labels(dataset.test))
    return Baseline(name=f"always {dataset.classes[commonest]}", value=100 * right / len(dataset.test))


def _tfidf(dataset: Dataset) -> Baseline:
    text = require("sklearn.feature_extraction.text", "the TF-IDF baseline")
    words = any(character.isalnum() for row in dataset.train.inputs for character in row)
    pattern = r"(?u)\b\w+\b" if words else r"(?u)\S+"
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern)
    parts = [vectorizer.fit_transform(dataset.train.inputs)]
    parts += [vectorizer.transform(rows.inputs) for rows in (dataset.validation, dataset.test)]
    labels = [_labels(rows) for rows in (dataset.train, dataset.validation, dataset.test)]
    return Baseline(name="TF-IDF + logistic regression", value=_logistic(parts, labels))


def _pixel_regression(dataset: Dataset) -> Baseline:
    train = dataset.train.subset(range(min(len(dataset.train), _PIXEL_TRAIN_ROWS)))
    three = (train, dataset.validation, dataset.test)
    score = _logistic([_flat(rows.inputs) for rows in three], [_labels(rows) for rows in three])
    return Baseline(name=f"logistic regression on the pixels of {len(train):,} rows", value=score)


def _flat(inputs: Sequence[Any]) -> NDArray[np.float32]:
    """Grey pixels between 0 and 1, shape `(rows, 28 * 28)`."""
    flat: NDArray[np.float32] = grey_pixels(inputs, _PIXEL_SIDE).reshape(len(inputs), -1) / np.float32(255)
    return flat


def _logistic(parts: Sequence[Any], labels: Sequence[Sequence[int]]) -> float:
    """Accuracy in per cent on the last of three parts: training, validation (which chooses the strength), test."""
    linear_model = require("sklearn.linear_model", "the baseline")
    best, chosen = -1.0, None
    for strength in _STRENGTHS:
        # SAGA reaches on the tweets in one second what L-BFGS reaches in twenty
        model = linear_model.LogisticRegression(C=strength, solver="saga", tol=1e-2, max_iter=50, random_state=0)
        with warnings.catch_warnings():
            # a baseline stopped before the last digit settles is still a baseline
            warnings.filterwarnings("ignore", message="The max_iter was reached")
            model.fit(parts[0], labels[0])
        score = float(model.score(parts[1], labels[1]))
        if score > best:
            best, chosen = score, model
    assert chosen is not None
    return 100 * float(chosen.score(parts[2], labels[2]))


def _unigram(dataset: Dataset, encode: Encode) -> Baseline:
    train, test = _learned(dataset.train, encode), _learned(dataset.test, encode)
    counts = Counter(token for row in train for token in row if token != IGNORED_LABEL)
    total = sum(counts.values())
    # the first token of a row is given, not predicted, as it is for the model
    judged = [token for row in test for token in row[1:] if token != IGNORED_LABEL]
    kinds = len(counts) + len(set(judged) - set(counts))
    nats = -sum(math.log((counts[token] + 1) / (total + kinds)) for token in judged)
    return Baseline(name="token frequencies", value=math.exp(nats / len(judged)))


def _learned(rows: Rows, encode: Encode) -> list[list[int]]:
    """The labels of each row: its tokens, and -100 for those that take no part in the loss."""
    return [row for _, labels in Split("causal-lm", rows, encode).batches(512) for row in labels.tolist()]


def _labels(rows: Rows) -> list[int]:
    return list(rows.labels or ())
