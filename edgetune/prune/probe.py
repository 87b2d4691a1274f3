"""Check by autograd which outputs of one layer reach which inputs of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgetune.core.inputs import Inputs, call
from edgetune.prune.layers import channel_dimension


def units_agree(
    model: nn.Module, inputs: Inputs, writer: str, reader: str, of_output: Sequence[int], of_input: Sequence[int]
) -> bool:
    """Whether an input of `reader` that belongs to unit u depends on no output of `writer` but those of unit u.

    `of_output` and `of_input` give each position's unit. Two backward passes for each bit of a unit's number: of the
    inputs whose unit has that bit, and of the others. Needs a model whose parameters ask for gradients.
    """
    written, read = _between(model, inputs, writer, reader)
    if written is None or read is None:
        return False
    outputs = torch.tensor(of_output, device=read.device)
    units = torch.tensor(of_input, device=read.device)
    dimension = channel_dimension(model.get_submodule(reader))
    noise = torch.randn(read.shape, generator=torch.Generator().manual_seed(0)).to(read)
    reached = False
    for bit in range(max(1, int(units.max()).bit_length())):
        for value in (0, 1):
            chosen = ((units >> bit) & 1 == value).view(-1, *(1 for _ in range(-1 - dimension)))
            (gradient,) = torch.autograd.grad(read, written, noise * chosen, retain_graph=True, allow_unused=True)
            if gradient is None:
                return False
            own = channel_dimension(model.get_submodule(writer))
            touched = gradient.movedim(own, 0).flatten(1).ne(0).any(1)
            if bool((touched & ((outputs >> bit) & 1 != value)).any()):
                return False
            reached |= bool(touched.any())
    return reached


def _between(model: nn.Module, inputs: Inputs, writer: str, reader: str) -> tuple[Tensor | None, Tensor | None]:
    """One layer's output and the other's input in a forward pass, in one graph; `None` unless each is called once."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    output_hook = model.get_submodule(writer).register_forward_hook(lambda _, __, output: written.append(output))
    input_hook = model.get_submodule(reader).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with output_hook, input_hook, torch.enable_grad():
        call(model, inputs)
    once = len(written) == len(read) == 1 and read[0].requires_grad and written[0].requires_grad
    return (written[0], read[0]) if once else (None, None)
