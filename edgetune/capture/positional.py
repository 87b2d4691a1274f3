"""The model as a program sees it: in eval mode on the CPU, positional tensors in, every tensor that it returns out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call, device_of
from edgetune.core.modes import preserve_state
from edgetune.core.outputs import named_outputs


class Positional(nn.Module):
    """The model as a program sees it: positional tensors in, every tensor that it returns out.

    The child has a name because XNNPACK's batch-norm fusion fails on parameters whose names begin with a digit.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(inputs) if isinstance(inputs, dict) else ()

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outputs for one tensor per input; a single output is not in a tuple."""
        outputs = tuple(self.named_outputs(tensors).values())
        return outputs[0] if len(outputs) == 1 else outputs

    def named_outputs(self, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The outputs by the names that a manifest gives them."""
        inputs: Inputs = dict(zip(self.names, tensors)) if self.names else tensors  # noqa: B905
        return named_outputs(call(self.model, inputs), "logits")


@contextmanager
def as_program(model: nn.Module, inputs: Inputs) -> Iterator[Positional]:
    """The model in eval mode, on the CPU and without a key-value cache; put back as it was afterwards."""
    with as_plain(model) as here:
        yield Positional(here, inputs).eval()


@contextmanager
def as_plain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, or a copy on the CPU, in eval mode and without a key-value cache; put back as it was afterwards."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    caching = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    with preserve_state(model):
        try:
            for config, _ in caching:
                config.use_cache = False
            yield model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
        finally:
            for config, before in caching:
                config.use_cache = before
