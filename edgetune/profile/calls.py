"""What each kind of call of a program costs: a language program says a token or reads a piece of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.ledger import Measured, Predicted
from edgetune.profile import host
from edgetune.profile.cost import predict
from edgetune.profile.device import Device, load
from edgetune.profile.measure import measure, measured_of
from edgetune.profile.operators import Operator

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact
    from edgetune.export.language.artifact import LanguageArtifact, LanguageManifest

_ATTENTION = "custom_sdpa"  # executorch's own kernel: blocked products on all threads, no plain loops


def measured_calls(
    artifact: Artifact | LanguageArtifact, *, threads: int | None = None, seconds: float = 2.0
) -> tuple[Measured, ...]:
    """Each kind of call timed on this host for about `seconds`; of a language program the token comes first.

    `threads`: by default all cores of the process.
    """
    from edgetune.export.language.artifact import LanguageArtifact

    if not isinstance(artifact, LanguageArtifact):
        return (measure(artifact, threads=threads, seconds=seconds),)
    from edgetune.export.language.run import time_calls_in_child

    known = artifact.manifest
    threads = threads if threads is not None else host.cores()
    prefill, decode = time_calls_in_child(
        artifact.path,
        cache_tokens=known.max_tokens,
        prefill_tokens=known.prefill_tokens,
        threads=threads,
        seconds=seconds,
        warm_up_seconds=min(seconds, 1.0),
    )
    return measured_of(decode, threads, _token(known)), measured_of(prefill, threads, _piece(known))


def predicted_calls(artifact: Artifact | LanguageArtifact, device: str | Device) -> tuple[Predicted, ...]:
    """What each kind of call costs on a device, in the same order. Memory is that of the call which needs most."""
    described = device if isinstance(device, Device) else load(device)
    known = artifact.manifest
    found = [
        predict(
            operators,
            described,
            plan_bytes=known.plan_bytes,
            program_bytes=getattr(known, "total_bytes", known.size_bytes),
            delegate_calls=known.delegates,
        ).model_copy(update={"call": call})
        for call, operators in _operators(artifact)
    ]
    peak_mib = max(prediction.peak_memory_mib for prediction in found)
    return tuple(prediction.model_copy(update={"peak_memory_mib": peak_mib}) for prediction in found)


def _operators(artifact: Artifact | LanguageArtifact) -> tuple[tuple[str, tuple[Operator, ...]], ...]:
    """The kinds of call and their operators."""
    from edgetune.export.language.artifact import LanguageArtifact

    if not isinstance(artifact, LanguageArtifact):
        return (("", artifact.manifest.operators),)
    known = artifact.manifest
    return (
        (_token(known), tuple(map(_attending, known.decode_operators))),
        (_piece(known), tuple(map(_attending, known.operators))),
    )


def _attending(operator: Operator) -> Operator:
    """Attention is no backend's, but as fast as a backend's product: what the predictor tells apart."""
    if _ATTENTION not in operator.operator:
        return operator
    return operator.model_copy(update={"delegated": True, "kind": "matmul"})


def _token(known: LanguageManifest) -> str:
    return f"a token after {known.prefill_tokens}"


def _piece(known: LanguageManifest) -> str:
    return f"{known.prefill_tokens} tokens of a prompt"
