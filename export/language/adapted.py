"""A decoder with its cache and with low-rank side paths."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgetune.core.floats import KeyValueType
from edgetune.export.language.cached import CachedDecoder
from edgetune.export.side_paths import SidePaths


class AdaptedDecoder(CachedDecoder):
    """A decoder whose adapter is its last inputs, or its own parameters; the model has the side paths attached."""

    def __init__(
        self, model: nn.Module, max_tokens: int, cache_dtype: KeyValueType, paths: SidePaths, stored: Sequence[Tensor]
    ) -> None:
        super().__init__(model, max_tokens, cache_dtype)
        self.paths = paths
        self.stored = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in stored)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Logits as of `CachedDecoder`, for tokens, position and, where they are inputs, the adapter's matrices."""
        tokens, position, *given = tensors
        with self.paths.holding(given or list(self.stored)):
            return super().forward(tokens, position)
