"""The method `guard` of a text-generation program: the classifier of texts on its model, over the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgetune.adapt.guarded import GuardedModel
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType
from edgetune.export.lower import Lowered
from edgetune.export.methods import MethodModule, MethodRequest, make_request, prove_method
from edgetune.export.pipeline import call_of
from edgetune.export.program_inputs import specs_of
from edgetune.export.targets.target import Target
from edgetune.program.carried import Carried, ClassScores, TextPreprocessing
from edgetune.program.manifest import GuardSpec, TokenizerSpec

NAME = "guard"
TOKENS = 128  # of a text, where the metadata does not say


@dataclass(frozen=True)
class GuardMethod:
    """The guard as a method of a program, and what an app needs to use it."""

    request: MethodRequest
    carried: Carried

    def prove(self, partial: Path, lowered: Lowered, target: Target) -> GuardSpec:
        """The manifest's section, after the method ran and was compared with the guard in eager mode."""
        parity, outputs = prove_method(partial, self.request, target, None, None)
        specs = specs_of(outputs[0], self.request.outputs)
        call = call_of(NAME, lowered, self.request.inputs.specs, specs, parity, label="a text for the guard")
        return GuardSpec(call=call, carried=self.carried)


def guard_method(
    guarded: GuardedModel, texts: Sequence[Sequence[int]], tokenizer: Any, spec: TokenizerSpec, carried: Carried | None
) -> GuardMethod:
    """The guard for texts of one length, compared on the tokens of `texts`.

    `carried.preprocessing`, if it is given, says how a text becomes its inputs.
    """
    given = carried.preprocessing if carried is not None else None
    if not isinstance(given, TextPreprocessing):
        pad = getattr(tokenizer, "pad_token_id", None)
        cut = getattr(tokenizer, "truncation_side", "right")
        given = TextPreprocessing(max_length=TOKENS, cut=cut, pad_id=0 if pad is None else pad)
    preprocessing = given.model_copy(update={"tokenizer": spec.file, "sha256": spec.sha256, "tokenizer_json": ""})
    rows = [_pad(ids, preprocessing) for ids in texts]
    request = make_request(MethodModule(NAME, guarded, None, rows[0]), rows[0], rows, None)
    labels = {"labels": guarded.classes, "postprocessing": ClassScores(), "preprocessing": preprocessing}
    return GuardMethod(request, (carried or Carried()).model_copy(update=labels))


def check_guard(dtype: FloatType, adapters: object) -> None:
    """Raise for what a program with a guard cannot have."""
    if dtype != "fp32" or adapters is not None:
        raise EdgetuneError(
            "a program with a guard computes in fp32, and its base has no adapters",
            got=f"dtype {dtype}" if dtype != "fp32" else "adapters",
            action="leave it out, or export guarded.base: the program then has no guard",
            exit_code=Exit.EXPORT,
        )


def _pad(ids: Sequence[int], preprocessing: TextPreprocessing) -> dict[str, Tensor]:
    length = preprocessing.max_length
    kept = list(ids[-length:] if preprocessing.cut == "left" else ids[:length])
    empty = length - len(kept)
    return {
        "input_ids": torch.tensor([kept + [preprocessing.pad_id] * empty]),
        "attention_mask": torch.tensor([[1] * len(kept) + [0] * empty]),
    }
