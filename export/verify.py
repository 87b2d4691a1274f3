"""Proof that a program computes what its model does: run in a child process, compared row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.export.run import run_in_child
from edgetune.ledger import Parity
from edgetune.technique import EdgetuneError, Exit

_EAGER_ROWS = 32  # rows that the model computes at once; the program takes one

Row = tuple[Tensor, ...]


@dataclass(frozen=True)
class Bounds:
    """What the program may differ by."""

    min_same_prediction_pct: float = 99.0
    max_abs_difference: float | None = None


def compare(
    path: Path, model: nn.Module, rows: Sequence[Row], mask: int | None = None, data: Path | None = None
) -> tuple[Parity, list[Row]]:
    """Run the program and the model, in eager mode, on each row. Also returns the program's outputs of each.

    A prediction is the class with the largest logit; where the logits have a sequence dimension, every position is
    one, but those that the input number `mask` (an attention mask) hides: what stands there means nothing. `data` is
    the program's data file. Rows may differ in their sizes where the program's may.
    Raises `EdgetuneError` (exit code 5) where the program does not run or a logit of it is not finite although the
    model's is.
    """
    results = run_in_child(path, rows, data=data)
    same = compared = 0
    largest = 0.0
    with torch.inference_mode():
        for some in _alike(rows):
            inputs = [torch.cat(tensors) for tensors in zip(*rows[some], strict=True)]
            expected, got = model(*inputs), torch.cat([outputs[0] for outputs in results[some]])
            _check_form(path, expected, got)
            if mask is not None and inputs[mask].shape == expected.shape[:-1]:
                shown = inputs[mask] != 0
                expected, got = expected[shown], got[shown]
            agree = expected.argmax(-1) == got.argmax(-1)
            same, compared = same + int(agree.sum()), compared + agree.numel()
            largest = max(largest, float((expected - got).abs().max()))
    pct = 100.0 * same / max(compared, 1)
    return Parity(rows=len(rows), same_prediction_pct=pct, max_abs_difference=largest), results


def _alike(rows: Sequence[Row]) -> Iterator[slice]:
    """Neighbours of the same sizes, so many that the model can compute them at once."""
    start = 0
    for _, group in groupby(rows, key=lambda row: [tensor.shape for tensor in row]):
        stop = start + len(list(group))
        for first in range(start, stop, _EAGER_ROWS):
            yield slice(first, min(first + _EAGER_ROWS, stop))
        start = stop


def _check_form(path: Path, expected: Tensor, got: Tensor) -> None:
    if got.shape != expected.shape:
        raise EdgetuneError(
            "the program's output has another shape than the model's",
            where=str(path),
            got=tuple(got.shape),
            allowed=[str(tuple(expected.shape))],
            action="report this with the model: the lowering changed what it computes",
            exit_code=Exit.EXPORT,
        )
    if not bool(torch.isfinite(got).all()):
        also = "" if bool(torch.isfinite(expected).all()) else "; the model's own logits are not finite either"
        raise EdgetuneError(
            f"the program returns logits that are not finite{also}",
            where=str(path),
            action="check the model's logits in eager mode, then lower it with target='portable' to find the operator",
            exit_code=Exit.EXPORT,
        )


def check(parity: Parity, bounds: Bounds) -> None:
    """Raise where the program is further from the model than the bounds allow."""
    if parity.same_prediction_pct < bounds.min_same_prediction_pct:
        raise EdgetuneError(
            f"the program predicts the same as the model on {parity.same_prediction_pct:.2f} % of {parity.rows} rows, "
            f"below {bounds.min_same_prediction_pct:g} % (largest difference {parity.max_abs_difference:.3g})",
            action="compare on more rows, or lower with target='portable' to see whether the backend is at fault",
            exit_code=Exit.EXPORT,
        )
    if bounds.max_abs_difference is not None and parity.max_abs_difference > bounds.max_abs_difference:
        raise EdgetuneError(
            f"a logit of the program differs by {parity.max_abs_difference:.3g}, more than "
            f"{bounds.max_abs_difference:g}",
            action="allow more with max_abs_difference, or look at the largest layers' quantization",
            exit_code=Exit.EXPORT,
        )


def compare_outputs(
    path: Path, method: str, model: nn.Module, rows: Sequence[Row], data: Path | None = None
) -> tuple[float, float, list[Row]]:
    """Run one method of the program and the model, in eager mode, on each row; compare every output.

    Returns the largest difference of a value, the largest relative difference of an output (the length of the
    difference over the length of the output), and the program's outputs. Raises as `compare` does.
    """
    results = run_in_child(path, rows, method=method, data=data)
    largest = relative = 0.0
    with torch.inference_mode():
        for row, outputs in zip(rows, results, strict=True):
            for expected, got in zip(model(*row), outputs, strict=True):
                _check_form(path, expected, got)
                difference = (expected - got).double() if expected.is_floating_point() else (expected != got).double()
                largest = max(largest, float(difference.abs().max()))
                relative = max(relative, float(difference.norm() / expected.double().norm().clamp(min=1e-12)))
    return largest, relative, results


def check_outputs(method: str, relative: float, most: float) -> None:
    """Raise where an output of a method is further from eager's than allowed."""
    if relative > most:
        raise EdgetuneError(
            f"an output of {method} differs by {relative:.3g} of its length, more than {most:g}",
            action="allow more with max_relative_difference, or lower with target='portable' to see whether the "
            "backend is at fault",
            exit_code=Exit.EXPORT,
        )
