"""Compare a text-generation program with its model: the model scores the program's greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.parity import OutputParity, Parity
from edgetune.quant.blocks import unpack_by_rows
from edgetune.runtime.allowed import FLOAT, allowed_difference
from edgetune.runtime.language import greedy_in_child
from edgetune.runtime.ties import measure_ties

_ROUNDED = 0.25  # of the largest logit: through the cache, a rounding error affects each later token
_BATCH = 16  # prompts in one child process, which holds the logits of all its answers


def compare(
    path: Path,
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    max_tokens: int,
    prefill_tokens: int,
    allowed: float,
    given: tuple[Tensor, ...] = (),
    data: Path | None = None,
) -> tuple[Parity, tuple[int, float] | None]:
    """Generate `tokens` greedy tokens for each prompt, and let the eager model choose a token at each position.

    The eager model runs without a cache. A prompt that leaves no room for `tokens` is truncated. Also returns the
    position of the first token, from 0, that the eager model would not have chosen, and how far its logit is below
    the largest one; of the first prompt with such a token. None: all tokens are equal. `given` and `data`: an adapter
    as inputs of the program, and its data file.
    """
    cut = [list(ids)[: max(1, max_tokens - tokens)] for ids in prompts]
    wanted = min(tokens, max_tokens)
    tried: list[tuple[Tensor, Tensor]] = []  # prompts and answers
    counted = same = 0
    first: tuple[int, float] | None = None
    largest = difference = 0.0
    for start in range(0, len(cut), _BATCH):
        batch = cut[start : start + _BATCH]
        answers = greedy_in_child(path, batch, wanted, prefill_tokens, given=given, data=data)
        for prompt, (got, logits) in zip(batch, answers, strict=True):
            expected = eager_logits(model, prompt, got)
            tried = [*tried, (torch.tensor(prompt), torch.tensor(got))][:_BATCH]
            if not bool(torch.isfinite(logits).all()):
                message = "the program returns logits that are not finite"
                raise EdgetuneError(message, where=str(path), exit_code=Exit.EXPORT)
            equal = expected.argmax(-1) == torch.tensor(got)
            if first is None and not bool(equal.all()):
                index = int((~equal).nonzero()[0])
                row = expected[index]
                first = index, float(row.max() - row[got[index]])
            counted, same = counted + len(got), same + int(equal.sum())
            largest = max(largest, float(expected.abs().max()))
            difference = max(difference, float((expected - logits).abs().max()))
    ties = measure_ties(model, tried, lambda row: {"logits": eager_logits(model, *(ids.tolist() for ids in row))})
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
        max_relative_allowed=allowed,
        ties=ties,
    )
    return parity, first


def allowed_difference_of(model: nn.Module, dtype: torch.dtype, cache_dtype: str) -> float:
    """How far a logit may differ from the model's, as a share of the largest one."""
    rounded = cache_dtype != "fp32" or allowed_difference(model, dtype) > FLOAT
    return _ROUNDED if rounded else FLOAT


def eager_logits(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The model's logits `(len(answer), vocabulary)` for each token of the answer."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with torch.inference_mode(), unpack_by_rows(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return logits


def check(parity: Parity, first: tuple[int, float] | None, min_same_prediction_pct: float) -> None:
    """Raise if fewer tokens are equal, or a logit differs more, than the bounds allow."""
    if first is not None and parity.same_prediction_pct < min_same_prediction_pct:
        raise EdgetuneError(
            f"the program chooses the model's token at {parity.same_prediction_pct:.2f} % of {parity.rows} positions, "
            f"below {min_same_prediction_pct:g} %: first at {first[0]}, where the model's logits are "
            f"{first[1]:.3g} apart (largest difference of a logit {parity.max_abs_difference:.3g})",
            action="compare more tokens, or lower the bound: min_same_prediction_pct=...",
            exit_code=Exit.EXPORT,
        )
    relative, allowed = parity.max_relative_difference, parity.max_relative_allowed
    if relative is not None and allowed is not None and relative > allowed:
        raise EdgetuneError(
            f"a logit of the program differs from the model's by {parity.max_abs_difference:.3g}, which is "
            f"{relative:.2g} of the largest; allowed is {allowed:g}",
            action="export its logits for a window of tokens, et.export(model, example_inputs, path): if these "
            "differ too, the error names the module",
            exit_code=Exit.EXPORT,
        )
