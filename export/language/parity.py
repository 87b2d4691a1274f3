"""Proof that a program says what its model does: greedy tokens of the one, read again by the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import OutputParity, Parity
from edgetune.runtime.allowed import FLOAT, allowed_difference
from edgetune.runtime.language import greedy_in_child

_QUANTIZED = 0.25  # of the largest logit: through the cache, what rounding moved is read again at each later token
_AT_ONCE = 16  # prompts in one child: all the logits of their answers are kept until it ends


def compare(
    path: Path, model: nn.Module, prompts: Sequence[Sequence[int]], tokens: int, max_tokens: int, prefill_tokens: int
) -> tuple[Parity, tuple[int, float] | None]:
    """Let the program answer each prompt with `tokens` greedy tokens, and the eager model choose at each place.

    The eager model attends as transformers does, without a cache. A prompt is cut where it leaves no room for
    `tokens`. Also returns the place of the first token, from 0, that the eager model would not have chosen, and by how
    much its own choice is ahead there; of the first prompt with one. None: all are the same.
    """
    cut = [list(ids)[: max(1, max_tokens - tokens)] for ids in prompts]
    wanted = min(tokens, max_tokens)
    counted = same = 0
    first: tuple[int, float] | None = None
    largest = difference = 0.0
    for start in range(0, len(cut), _AT_ONCE):
        some = cut[start : start + _AT_ONCE]
        for prompt, (got, logits) in zip(some, greedy_in_child(path, some, wanted, prefill_tokens), strict=True):
            expected = eager_logits(model, prompt, got)
            if not bool(torch.isfinite(logits).all()):
                what = "the program returns logits that are not finite"
                raise EdgetuneError(what, where=str(path), exit_code=Exit.EXPORT)
            equal = expected.argmax(-1) == torch.tensor(got)
            if first is None and not bool(equal.all()):
                place = int((~equal).nonzero()[0])
                row = expected[place]
                first = place, float(row.max() - row[got[place]])
            counted, same = counted + len(got), same + int(equal.sum())
            largest = max(largest, float(expected.abs().max()))
            difference = max(difference, float((expected - logits).abs().max()))
    relative = difference / (largest or 1.0)
    logits_parity = OutputParity(
        name="logits", largest=largest, max_abs_difference=difference, max_relative_difference=relative
    )
    parity = Parity(
        rows=counted,
        same_prediction_pct=100.0 * same / counted,
        max_abs_difference=difference,
        counted="greedy token",
        outputs=(logits_parity,),
        max_relative_allowed=_QUANTIZED if (allowed := allowed_difference(model)) > FLOAT else allowed,
    )
    return parity, first


def eager_logits(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The model's logits `(len(answer), vocabulary)` at the place of each token of the answer."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits


def check(parity: Parity, first: tuple[int, float] | None, min_same_prediction_pct: float) -> None:
    """Raise where fewer tokens are the same than the bound allows, or a logit is further off than it may be."""
    if first is not None and parity.same_prediction_pct < min_same_prediction_pct:
        raise EdgetuneError(
            f"the program chooses the model's token at {parity.same_prediction_pct:.2f} % of {parity.rows} places, "
            f"below {min_same_prediction_pct:g} %: first at {first[0]}, where the model's logits are "
            f"{first[1]:.3g} apart (largest difference of a logit {parity.max_abs_difference:.3g})",
            action="compare on more tokens, or allow it: min_same_prediction_pct=...",
            exit_code=Exit.EXPORT,
        )
    relative, allowed = parity.max_relative_difference, parity.max_relative_allowed
    if relative is not None and allowed is not None and relative > allowed:
        raise EdgetuneError(
            f"a logit of the program differs from the model's by {parity.max_abs_difference:.3g}, which is "
            f"{relative:.2g} of the largest; allowed is {allowed:g}",
            action="export its logits for a window of tokens, et.export(model, example_inputs, path): where that "
            "differs too, the error names the module",
            exit_code=Exit.EXPORT,
        )
