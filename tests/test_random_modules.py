"""Random small modules: each is exported with equal outputs, or refused with a message that names the operator.

What is drawn stands in random_modules.py. Every export runs in a forked process: a crash there is a failed test, as a
wrong number is.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

from edgetune.capture.positional import Positional
from edgetune.core.errors import EdgetuneError
from edgetune.export import export
from edgetune.export.lower import lower
from edgetune.export.targets import find
from edgetune.runtime.clock.runs import load_runtime
from support.forked import ask_fork
from support.random_modules import ROWS, Drawn, Plan, inputs_of, plans
from support.random_techniques import SEED, TECHNIQUES, drawn_plans, kind_of, tried, warm_up


def exported(plan: Plan) -> str:
    """`et.export` as users call it. Returns `equal`, `refused: ...`, or what is wrong."""
    model, inputs = Drawn(plan).eval(), inputs_of(plan)
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = export(model, inputs, Path(folder) / "model.pte", one_row=True, min_same_prediction_pct=0.0)
        except EdgetuneError as error:
            return f"refused: {error}"
    assert artifact.manifest.main.parity is not None
    return judged(model, inputs, artifact.manifest.main.parity.max_abs_difference)


def lowered(plan: Plan) -> str:
    """The same without the second process and the files of `et.export`, which take most of its time."""
    model, inputs = Drawn(plan).eval(), inputs_of(plan)
    rows = [(inputs[row : row + 1],) for row in range(ROWS)]
    try:
        data = lower(Positional(model, inputs).eval(), rows[0], find("xnnpack")).data
    except EdgetuneError as error:
        return f"refused: {error}"
    program = load_runtime(None)._load_for_executorch_from_buffer(data)
    got = torch.cat([program.forward(row)[0].clone() for row in rows])
    with torch.no_grad():
        return judged(model, inputs, float((got - model(inputs)).abs().max()))


@torch.no_grad()
def judged(model: nn.Module, inputs: Tensor, difference: float) -> str:
    """`equal` where the difference is within 1e-4, or within ten times what single precision costs eager mode."""
    single = model(inputs)
    exact = model.double()(inputs.double() if inputs.is_floating_point() else inputs)
    model.float()
    largest, rounding = float(single.abs().max()), float((single - exact).abs().max())
    return "equal" if difference <= max(1e-4 * largest, 10 * rounding) else f"off by {difference} of {largest}"


def check(function: Callable[[Plan], str], plan: Plan) -> None:
    """The property."""
    found = ask_fork(lambda: function(plan))
    if found.startswith("refused"):
        assert re.search(r"\baten[.:]|operator \S|torch\.\w", found), f"names no operator: {found}\n{plan}"
    else:
        assert found == "equal", f"{found}\n{plan}"


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported and used before the processes fork: once, not once for each example."""
    warm_up()


EXAMPLES = settings(
    deadline=None, derandomize=True, database=None, print_blob=False, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@settings(EXAMPLES, max_examples=10)
@given(plans())
def test_random_modules_are_lowered_equal_or_refused(plan: Plan) -> None:
    check(lowered, plan)


@pytest.mark.slow
@settings(EXAMPLES, max_examples=200)
@given(plans())
def test_two_hundred_random_modules(plan: Plan) -> None:
    check(exported, plan)


def test_a_crash_is_seen() -> None:
    """What the tests above stand on."""
    died = ask_fork(lambda: str(os.kill(os.getpid(), signal.SIGKILL)))
    assert died == f"the process ended with code -{int(signal.SIGKILL)}"


@pytest.mark.parametrize("count", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_random_modules_keep_what_techniques_trained(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of `python tests/support/random_techniques.py --modules 400`: each module with one technique in turn."""
    pairs = list(zip(drawn_plans(count, SEED), itertools.cycle(TECHNIQUES), strict=False))
    outcomes = [(kind_of(result), technique, result, plan) for plan, technique, result in tried(pairs, 1)]
    with capsys.disabled():
        print(f"\n{count} random modules, seed {SEED}: {dict(Counter(kind for kind, *_ in outcomes))}")
    assert not [entry for entry in outcomes if entry[0] not in ("right", "refused")]
    assert sum(entry[0] == "right" for entry in outcomes) >= count // 3
