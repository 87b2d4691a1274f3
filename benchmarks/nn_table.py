"""Every module of torch.nn and function of torch.nn.functional through an export: right by values, or why not.

    python benchmarks/nn_table.py [--only LSTM,pdist] [--target xnnpack] [--write docs/nn.md]

Each case of nn_cases.py and nn_functions.py is lowered, run and compared in a process of its own, so that a crash is a
row too. A row is
`right` with the largest relative difference, `refused` with the reason, `wrong`, or `crashed`. The exit code is 1 where
one is wrong or crashed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.quiet import silence_libraries
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.runtime.clock.runs import load_runtime
from support.forked import ask_fork
from support.nn_cases import MODULES, Case
from support.nn_functions import FUNCTIONS

CASES = {**{f"nn.{name}": case for name, case in MODULES.items()}, **{f"F.{n}": case for n, case in FUNCTIONS.items()}}
MOST = 1e-4  # of an output's largest value


@dataclass(frozen=True)
class Row:
    """What came of one case."""

    state: str  # right, refused, wrong or crashed
    difference: float = 0.0
    reason: str = ""
    operators: tuple[str, ...] = ()  # that no backend took


class Layer(nn.Module):
    """A module, or a function as one."""

    def __init__(self, tried: Any) -> None:
        super().__init__()
        self.is_module = isinstance(tried, nn.Module)
        self.layer = tried if self.is_module else Function(tried)

    def forward(self, *inputs: Tensor) -> Any:
        return self.layer(*inputs)


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class Outputs(nn.Module):
    """All tensors that a model returns, however they are nested, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.model(*inputs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def tried(case: Case, target: str = "xnnpack") -> Row:
    """Lower, run and compare."""
    torch.manual_seed(0)
    with torch.no_grad():
        made, inputs = case()
        model = Outputs(Layer(made)).eval()
        torch.manual_seed(0)
        try:
            expected = model(*inputs)
        except NotImplementedError:
            return Row("refused", reason="torch itself does not compute it on this processor")
        try:
            lowered = lower(model, inputs, find(target))
        except EdgetuneError as error:
            return Row("refused", reason=str(error).replace("\n  next: ", "; next: "))
        program = load_runtime(None)._load_for_executorch_from_buffer(lowered.data)
        got = [output.clone() for output in program.forward(inputs)]
    left = tuple(dict.fromkeys(operator.operator for operator in lowered.undelegated))
    if [tuple(t.shape) for t in got] != [tuple(t.shape) for t in expected]:
        return Row("wrong", reason=f"shapes {[tuple(t.shape) for t in got]}", operators=left)
    worst = max(difference(*pair) for pair in zip(expected, got, strict=True))
    return Row("right" if worst <= MOST else "wrong", worst, operators=left)


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, by the largest value; infinite where one of the two alone is finite."""
    expected, got = expected.double(), got.double()
    finite = torch.isfinite(expected)
    if not torch.equal(expected[~finite], got[~finite]) and not bool(expected[~finite].isnan().all()):
        return float("inf")
    if expected[finite].numel() == 0:
        return 0.0
    worst = (expected[finite] - got[finite]).abs().max() / expected[finite].abs().max().clamp(min=1e-6)
    return float("inf") if worst.isnan() else float(worst)


def tried_apart(case: Case, target: str = "xnnpack") -> Row:
    """The same in a forked process."""
    answer = ask_fork(lambda: tried(case, target))
    return answer if isinstance(answer, Row) else Row("crashed", reason=answer)


_TOLD = """# torch.nn and torch.nn.functional through an export

Made by `make tables` (`python benchmarks/nn_table.py --write docs/nn.md`): every module and function is exported for
XNNPACK on its own, with small inputs, run and compared with eager mode: {counts}.
The outcome is the largest difference, divided by the largest value of the output. Operators in the last column ran on
portable kernels.

| | outcome | not taken by XNNPACK |
|---|---|---|
"""


def written(rows: dict[str, Row]) -> str:
    """The table in Markdown."""
    counts = Counter(row.state for row in rows.values())
    told = ", ".join(f"{counts[state]} {state}" for state in ("right", "refused", "wrong", "crashed"))
    lines = []
    for name, row in rows.items():
        outcome = f"{row.difference:.1e}" if row.state == "right" else f"{row.state}: {row.reason}".replace("|", "/")
        left = ", ".join(f"`{one.removesuffix('.out')}`" for one in row.operators)
        lines.append(f"| {name} | {outcome} | {left} |")
    return _TOLD.format(counts=told) + "\n".join(lines) + "\n"


def load_libraries() -> None:
    """What every case needs, once: the cases are forks of this process. Nothing is run, which would start threads."""
    torch.set_num_threads(1)
    with silence_libraries():
        import torchao.quantization

        load_runtime(None)
        lower(Outputs(nn.Linear(2, 2)).eval(), (torch.ones(1, 2),), find("xnnpack"))
    assert torchao.quantization


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", default="", help="names, or beginnings of names, with commas")
    asked.add_argument("--target", default="xnnpack")
    asked.add_argument("--write", type=Path, help="a Markdown file for the table")
    asked.add_argument("--json", type=Path)
    asked.add_argument("--jobs", type=int, default=1)
    given = asked.parse_args()
    wanted = [name for name in given.only.split(",") if name]
    cases = {n: c for n, c in CASES.items() if not wanted or any(n.partition(".")[2].startswith(w) for w in wanted)}
    load_libraries()
    rows: dict[str, Row] = {}
    with ThreadPoolExecutor(given.jobs) as pool:
        for name, row in zip(cases, pool.map(lambda c: tried_apart(c, given.target), cases.values()), strict=True):
            rows[name] = row
            print(
                f"{row.state:8} {name}: {row.reason or f'{row.difference:.1e}'} {' '.join(row.operators)}", flush=True
            )
    counts = Counter(row.state for row in rows.values())
    print(", ".join(f"{counts[state]} {state}" for state in ("right", "refused", "wrong", "crashed")))
    if given.json:
        given.json.write_text(json.dumps({name: vars(row) for name, row in rows.items()}))
    if given.write:
        given.write.write_text(written(rows), encoding="utf-8")
    return int(bool(counts["wrong"] or counts["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
