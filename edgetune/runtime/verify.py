"""Verify a program against its model: run it in a child process, and compare every value of every output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.modes import preserve_buffers
from edgetune.core.outputs import named_outputs
from edgetune.core.parity import OutputParity, Parity
from edgetune.core.quiet import silence_libraries
from edgetune.runtime.predictions import predictions_of
from edgetune.runtime.run import run_in_child

_AT_ONCE = 32  # rows that the model computes together
_ALL_ZERO = 1e-3  # in place of the largest value of an output that is zero everywhere

Row = tuple[Tensor, ...]
Locate = Callable[[Row], str]
"""Locates the cause of a difference for one set of inputs; called only if the verification fails."""


@dataclass(frozen=True)
class Bounds:
    """How far the program may differ from the model.

    `max_relative_difference`: of a value, over the largest value of its output; `None`: `allowed_difference` of the
    model. `max_abs_difference` is checked in addition.
    """

    min_same_prediction_pct: float = 99.0
    max_abs_difference: float | None = None
    max_relative_difference: float | None = None


@dataclass
class _Output:
    """Largest value and difference of one output so far."""

    exact: bool
    largest: float = 0.0
    difference: float = 0.0

    def add(self, expected: Tensor, got: Tensor) -> float:
        """Add the values of one run; returns their largest difference."""
        if not expected.numel():
            return 0.0
        wide = torch.float64 if expected.is_floating_point() or expected.dtype == torch.bool else torch.int64
        self.largest = max(self.largest, float(expected.to(wide).abs().max()))
        difference = float((expected.to(wide) - got.to(wide)).abs().max())
        self.difference = max(self.difference, difference)
        return difference

    def parity(self, name: str) -> OutputParity:
        return OutputParity(
            name=name,
            largest=self.largest,
            max_abs_difference=self.difference,
            max_relative_difference=self.difference / (self.largest or _ALL_ZERO),
            exact=self.exact,
        )


@dataclass
class OutputComparison:
    """A program and a model on the same inputs."""

    results: list[Row]  # the program's outputs for each row
    outputs: dict[str, _Output] = field(default_factory=dict)
    same: int = 0  # predictions
    predictions: int = 0
    tried: list[str] = field(default_factory=list)
    worst: Row = ()  # the inputs with the largest difference of a value
    _worst_difference: float = -1.0

    def add(self, expected: dict[str, Tensor], got: dict[str, Tensor], row: Row) -> None:
        """Add the values of one run."""
        for name, tensor in expected.items():
            output = self.outputs.setdefault(name, _Output(exact=not tensor.is_floating_point()))
            difference = output.add(tensor, got[name]) / (output.largest or _ALL_ZERO)
            if difference > self._worst_difference:
                self.worst, self._worst_difference = row, difference

    def parities(self) -> tuple[OutputParity, ...]:
        """One entry per output."""
        return tuple(output.parity(name) for name, output in self.outputs.items())

    def parity(self, rows: int, allowed: float, counted: str = "held-out row") -> Parity:
        """Summarize it for a manifest."""
        outputs = self.parities()
        return Parity(
            rows=rows,
            same_prediction_pct=100.0 * self.same / max(self.predictions, 1),
            max_abs_difference=max(output.max_abs_difference for output in outputs),
            counted=counted,  # type: ignore[arg-type]
            outputs=outputs,
            max_relative_allowed=allowed,
            tried=tuple(self.tried),
        )


def compare(
    path: Path,
    model: nn.Module,
    rows: Sequence[Row],
    *,
    method: str = "forward",
    mask: int | None = None,
    data: Path | None = None,
    tries: Sequence[tuple[str, Row]] = (),
    locate: Locate | None = None,
    same_within: float | None = None,
) -> OutputComparison:
    """Run one method of the program, and the model in eager mode, on each row.

    All values of all outputs are compared. A prediction is the class with the largest value in the output `logits`, or
    in the first output, along `class_dim`; for a single logit, its sign; `same_within`: see `predictions_of`. Of
    outputs with a value per token, those that the input with index `mask` (an attention mask) hides are ignored.
    `tries`: further inputs, by a description; their values count, but not their predictions. Copies of the first row in
    another memory order are tried as well. `data` is the program's data file. Raises `EdgetuneError` (exit code 5) if
    the program does not run, if its outputs differ from the model's in number, shape or type, or if a value is not
    finite; it names the cause if `locate` finds it.
    """
    tries = [*tries, *_reorder_memory(rows[0])]
    results = run_in_child(path, [*rows, *(row for _, row in tries)], method=method, data=data)
    compared = OutputComparison(results[: len(rows)])
    # a state is updated row by row, as in the program
    with silence_libraries(), preserve_buffers(model), torch.no_grad():
        for place, (row, expected) in enumerate(zip(rows, _eager_rows(model, rows), strict=True)):
            got = _pair_outputs(path, expected, results[place], row, locate)
            expected, got = _drop_hidden_tokens(expected, got, row, mask)
            _check_finite(path, expected, got, row, locate)
            compared.add(expected, got, row)
            same, predictions = predictions_of(expected, got, row, same_within)
            compared.same, compared.predictions = compared.same + same, compared.predictions + predictions
        for (name, row), outputs in zip(tries, results[len(rows) :], strict=True):
            row = tuple(tensor.contiguous() for tensor in row)
            expected = _eager_or_nothing(model, row)
            if not expected:
                continue
            expected, got = _drop_hidden_tokens(
                expected, _pair_outputs(path, expected, outputs, row, locate), row, mask
            )
            if all(bool(torch.isfinite(tensor).all()) for tensor in expected.values()):
                _check_finite(path, expected, got, row, locate)
                compared.add(expected, got, row)
                compared.tried.append(name)
    return compared


def _eager_rows(model: nn.Module, rows: Sequence[Row]) -> Iterator[dict[str, Tensor]]:
    """The model's outputs for each row; rows of one shape are batched if that changes nothing.

    A quantized model unpacks its weights at each call: a thousand rows one by one would take minutes.
    """
    start = 0
    for _, group in groupby(rows, key=lambda row: [tensor.shape for tensor in row]):
        stop = start + len(list(group))
        at_once = stop - start > _AT_ONCE and _rows_are_independent(model, rows[start : start + 2])
        for first in range(start, stop, _AT_ONCE if at_once else 1):
            some = rows[first : min(first + _AT_ONCE, stop)] if at_once else [rows[first]]
            if len(some) == 1:
                yield eager_outputs(model, some[0])
                continue
            whole = eager_outputs(model, tuple(map(torch.cat, zip(*some, strict=True))))
            yield from ({name: t[i : i + 1] for name, t in whole.items()} for i in range(len(some)))
        start = stop


def _rows_are_independent(model: nn.Module, two: Sequence[Row]) -> bool:
    """Whether two rows in one batch give the same as each alone, in any order."""
    if not all(tensor.dim() and tensor.shape[0] == 1 for row in two for tensor in row):
        return False
    with preserve_buffers(model):
        together = _eager_or_nothing(model, tuple(map(torch.cat, zip(*two, strict=True))))
        for place in (0, 1, 0):
            for name, tensor in eager_outputs(model, two[place]).items():
                whole = together.get(name)
                if whole is None or whole.dim() == 0 or whole.shape[0] != 2 or whole[:1].shape != tensor.shape:
                    return False
                part, largest = whole[place : place + 1].double(), float(tensor.double().abs().max())
                if not float((part - tensor.double()).abs().max()) <= 1e-4 * largest:
                    return False
    return True


def eager_outputs(model: nn.Module, row: Row) -> dict[str, Tensor]:
    """The model's outputs by name, for a copy of the inputs, which some models overwrite."""
    row = tuple(tensor.clone() for tensor in row)
    named = getattr(model, "named_outputs", None)
    return named(row) if named is not None else named_outputs(model(*row), "logits")


def _eager_or_nothing(model: nn.Module, row: Row) -> dict[str, Tensor]:
    """The same, or nothing if the model does not accept these inputs."""
    try:
        return eager_outputs(model, row)
    except Exception:  # a model's own code: anything
        return {}


def _reorder_memory(row: Row) -> list[tuple[str, Row]]:
    """Copies of a row with the same values in other memory orders."""
    copies = [("inputs out of memory order", tuple(map(_out_of_order, row)))]
    if any(tensor.dim() == 4 for tensor in row):
        last = torch.channels_last
        copies.append(
            ("channels-last inputs", tuple(t.contiguous(memory_format=last) if t.dim() == 4 else t for t in row))
        )
    return copies


def _out_of_order(tensor: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    dims = list(range(tensor.dim()))[::-1]
    return tensor.permute(dims).contiguous().permute(dims)


def _pair_outputs(
    path: Path, expected: dict[str, Tensor], outputs: Row, row: Row, locate: Locate | None
) -> dict[str, Tensor]:
    """The program's outputs by the model's names. Raises if their number, a shape or a type differs."""
    wanted = [f"{name}: {_form(tensor)}" for name, tensor in expected.items()]
    if [_form(tensor) for tensor in outputs] != [_form(tensor) for tensor in expected.values()]:
        raise _parity_error(
            "the program's outputs have other shapes or types than the model's",
            locate and (lambda: locate(row)),
            where=str(path),
            got=[_form(tensor) for tensor in outputs],
            allowed=wanted,
        )
    return dict(zip(expected, outputs, strict=True))


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _drop_hidden_tokens(
    expected: dict[str, Tensor], got: dict[str, Tensor], row: Row, mask: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both without the tokens that the mask hides, in outputs with a value per token."""
    if mask is None or mask >= len(row):
        return expected, got
    seen = row[mask] != 0
    tokens = [name for name, tensor in expected.items() if tensor.dim() > 2 and tensor.shape[:2] == seen.shape]
    return tuple({n: t[seen] if n in tokens else t for n, t in each.items()} for each in (expected, got))  # type: ignore[return-value]


def _check_finite(
    path: Path, expected: dict[str, Tensor], got: dict[str, Tensor], row: Row, locate: Locate | None
) -> None:
    for name, tensor in got.items():
        if bool(torch.isfinite(tensor).all()):
            continue
        if not bool(torch.isfinite(expected[name]).all()):
            raise EdgetuneError(
                f"output {name} has values that are not finite, in eager mode and in the program",
                where=str(path),
                action="look for a division by zero or a mask of -inf that reaches the output, or give other inputs",
                exit_code=Exit.EXPORT,
            )
        raise _parity_error(
            f"output {name} of the program has values that are not finite; those of the model are",
            locate and (lambda: locate(row)),
            where=str(path),
        )


def check(parity: Parity, bounds: Bounds, place: Callable[[], str] | None = None) -> None:
    """Raise if the program differs from the model by more than the bounds; `place` locates the cause."""
    allowed = bounds.max_relative_difference
    check_values(parity.outputs, parity.max_relative_allowed if allowed is None else allowed, place)
    if parity.same_prediction_pct < bounds.min_same_prediction_pct:
        raise _parity_error(
            f"the program predicts the same as the model on {parity.same_prediction_pct:.2f} % of {parity.number}, "
            f"below {bounds.min_same_prediction_pct:g} % (largest difference {parity.max_abs_difference:.3g})",
            place,
            setting="min_same_prediction_pct",
        )
    if bounds.max_abs_difference is not None and parity.max_abs_difference > bounds.max_abs_difference:
        raise _parity_error(
            f"a value of the program differs by {parity.max_abs_difference:.3g}, more than "
            f"{bounds.max_abs_difference:g}",
            place,
            setting="max_abs_difference",
        )


def check_values(
    outputs: Sequence[OutputParity],
    allowed: float | None,
    place: Callable[[], str] | None = None,
    *,
    program: str = "the program",
) -> None:
    """Raise if a value differs from the model's by more than `allowed`, relative to its output's largest value."""
    for output in outputs:
        if output.exact and output.max_abs_difference > 0:
            raise _parity_error(f"output {output.name} of {program} has other integers than that of the model", place)
    worst = max(outputs, key=lambda output: output.max_relative_difference, default=None)
    if worst is None or allowed is None or worst.max_relative_difference <= allowed:
        return
    raise _parity_error(
        f"output {worst.name} of {program} differs from the model's by {worst.max_abs_difference:.3g}, which is "
        f"{worst.max_relative_difference:.2g} of its largest value ({worst.largest:.3g}); allowed is {allowed:g}",
        place,
        setting="max_relative_difference",
    )


def _parity_error(
    message: str,
    place: Callable[[], str] | None,
    *,
    where: str = "",
    got: object = None,
    allowed: Sequence[str] = (),
    setting: str = "",
) -> EdgetuneError:
    """The error for a program that differs from its model, with the module where that begins."""
    begins = place() if place is not None else ""
    rewrite = "write that module in other operators" if begins else "look for the first layer whose values differ"
    return EdgetuneError(
        f"{message}; {begins}" if begins else message,
        where=where,
        got=got,
        allowed=allowed,
        action=rewrite + (f", or allow the difference: {setting}=..." if setting else ""),
        exit_code=Exit.EXPORT,
    )
