"""Simple baselines on the same split, computed for every run. A fine-tuned model that does not beat them is useless."""

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
from edgetune.data.pixels import grey_pixels
from edgetune.data.rows import IGNORED_LABEL, Rows
from edgetune.tasks.task import Parts

_PIXEL_TRAIN_ROWS = 3000  # more rows take much longer and gain little
_PIXEL_SIDE = 28
_STRENGTHS = (0.1, 3.0, 10.0)  # inverse of the regularization


def majority_baseline(parts: Parts, classes: Sequence[str]) -> Baseline:
    """Always the most frequent class; accuracy in per cent."""
    [(commonest, _)] = Counter(_labels(parts.train)).most_common(1)
    right = sum(label == commonest for label in _labels(parts.test))
    return Baseline(name=f"always {classes[commonest]}", value=100 * right / len(parts.test))


def tfidf_classes(parts: Parts) -> Baseline:
    """TF-IDF with logistic regression; accuracy in per cent."""
    labels = [_labels(rows) for rows in parts]
    return Baseline(name="TF-IDF + logistic regression", value=_logistic(_tfidf(parts), labels))


def mean_baseline(parts: Parts) -> Baseline:
    """Always the mean of the training values; root mean squared error."""
    mean = float(np.mean(parts.train.labels or ()))
    return Baseline(name=f"always the mean, {mean:.3g}", value=_rmse(mean, parts.test))


def tfidf_ridge(parts: Parts) -> Baseline:
    """TF-IDF with ridge regression; root mean squared error. The strength is selected on validation."""
    linear_model = require("sklearn.linear_model", "the baseline")
    train, validation, test = _tfidf(parts)
    models = [linear_model.Ridge(alpha=1 / strength).fit(train, parts.train.labels) for strength in _STRENGTHS]
    best = min(models, key=lambda model: _rmse(model.predict(validation), parts.validation))
    return Baseline(name="TF-IDF + ridge regression", value=_rmse(best.predict(test), parts.test))


def _rmse(predicted: Any, rows: Rows) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(predicted) - np.asarray(rows.labels)))))


def _tfidf(parts: Parts) -> list[Any]:
    """TF-IDF of the words and word pairs of each part, learned from the training texts."""
    text = require("sklearn.feature_extraction.text", "the TF-IDF baseline")
    words = any(character.isalnum() for row in parts.train.inputs for character in row)
    pattern = r"(?u)\b\w+\b" if words else r"(?u)\S+"
    vectorizer = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=pattern)
    fitted = vectorizer.fit_transform(parts.train.inputs)
    return [fitted, *(vectorizer.transform(rows.inputs) for rows in (parts.validation, parts.test))]


def pixel_classes(parts: Parts) -> Baseline:
    """Logistic regression on grey pixels; accuracy in per cent."""
    train = parts.train.subset(range(min(len(parts.train), _PIXEL_TRAIN_ROWS)))
    three = parts._replace(train=train)
    score = _logistic([_flat(rows.inputs) for rows in three], [_labels(rows) for rows in three])
    return Baseline(name=f"logistic regression on the pixels of {len(train):,} rows", value=score)


def _flat(inputs: Sequence[Any]) -> NDArray[np.float32]:
    """Grey pixels between 0 and 1, shape `(rows, 28 * 28)`."""
    flat: NDArray[np.float32] = grey_pixels(inputs, _PIXEL_SIDE).reshape(len(inputs), -1) / np.float32(255)
    return flat


def _logistic(parts: Sequence[Any], labels: Sequence[Sequence[int]]) -> float:
    """Accuracy in per cent on the last of three parts: training, validation (which selects the strength), test."""
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


def token_frequencies(train: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> Baseline:
    """The perplexity of single tokens by their frequency; tokens marked -100 do not count."""
    counts = Counter(token for row in train for token in row if token != IGNORED_LABEL)
    total = sum(counts.values())
    # the first token of a row is given, not predicted, as it is for the model
    judged = [token for row in test for token in row[1:] if token != IGNORED_LABEL]
    kinds = len(counts) + len(set(judged) - set(counts))
    nats = -sum(math.log((counts[token] + 1) / (total + kinds)) for token in judged)
    return Baseline(name="token frequencies", value=math.exp(nats / len(judged)))


def _labels(rows: Rows) -> list[int]:
    return list(rows.labels or ())
