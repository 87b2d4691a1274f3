"""The class that an output predicts, and whether a model and its program agree on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_TIE = 1e-5  # of the largest value: two classes that are closer than this are the same prediction

Row = tuple[Tensor, ...]


def class_dim(shape: Sequence[int], inputs: Row) -> int | None:
    """The dimension of the classes; `None`: each value is a separate prediction.

    (rows, classes), (rows, tokens, classes), but (rows, classes, height, width) and more. Three dimensions of which
    the last, but not the second, is as long as that of an input with three are (rows, classes, length).
    """
    first = inputs[0].shape if inputs else ()
    if len(shape) == 0 or (len(shape) == 1 and len(first) > 1 and shape[0] == first[0]):
        dim = None
    elif len(shape) >= 4 or (len(shape) == len(first) == 3 and shape[2] == first[2] and shape[1] != first[1]):
        dim = 1
    else:
        dim = len(shape) - 1
    return None if dim is None or shape[dim] == 1 else dim


def predictions_of(
    expected: dict[str, Tensor], got: dict[str, Tensor], row: Row, same_within: float | None = None
) -> tuple[int, int]:
    """How many predictions are the same, and how many there are; see `verify.compare`.

    `same_within`: each value is a number, and the same as one that is no further away.
    """
    name = "logits" if "logits" in expected else next(iter(expected))
    model, program = expected[name], got[name]
    if not model.numel():
        return 0, 0
    if not model.is_floating_point():
        return int((model == program).sum()), model.numel()
    model, program = model.double(), program.double()
    if same_within is not None:
        return int(((model - program).abs() <= same_within).sum()), model.numel()
    tie = _TIE * float(model.abs().max())
    dim = class_dim(model.shape, row)
    if dim is None:
        same = ((model > 0) == (program > 0)) | (model.abs() <= tie)
    else:
        chosen = model.gather(dim, program.argmax(dim, keepdim=True)).squeeze(dim)
        same = chosen >= model.amax(dim) - tie
    return int(same.sum()), same.numel()
