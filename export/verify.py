"""Proof that a program computes what its model does: run in a child process, compared row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.export.run import run_in_child
from edgetune.ledger import Parity
from edgetune.technique import EdgetuneError, Exit

_EAGER_ROWS = 32  # rows that the model computes at once; the program takes one


@dataclass(frozen=True)
class Bounds:
    """What the program may differ by."""

    min_same_prediction_pct: float = 99.0
    max_abs_difference: float | None = None


def compare(
    path: Path, model: nn.Module, rows: Sequence[tuple[Tensor, ...]], mask: int | None = None
) -> tuple[Parity, tuple[Tensor, ...]]:
    """Run the program and the model, in eager mode, on each row. Also returns the outputs of the first row.

    A prediction is the class with the largest logit; where the logits have a sequence dimension, every position is
    one, but those that the input number `mask` (an attention mask) hides: what stands there means nothing.
    Raises `EdgetuneError` (exit code 5) where the program does not run or a logit of it is not finite although the
    model's is.
    """
    results = run_in_child(path, rows)
    same = compared = 0
    largest = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), _EAGER_ROWS):
            some = slice(start, start + _EAGER_ROWS)
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
    return Parity(rows=len(rows), same_prediction_pct=pct, max_abs_difference=largest), results[0]


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
