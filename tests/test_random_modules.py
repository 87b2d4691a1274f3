"""Random small modules: each is exported with equal outputs, or refused with a message that names the operator.

What is drawn stands in random_modules.py. Every export runs in a forked process: a crash there is a failed test, as a
wrong number is.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from random_modules import ROWS, Drawn, Plan, inputs_of, plans
from torch import Tensor, nn

from edgetune.export import export
from edgetune.export.lower import Positional, lower
from edgetune.export.run import loaded_runtime
from edgetune.export.targets import find
from edgetune.quiet import quiet
from edgetune.technique import EdgetuneError

SECONDS = 240  # for one export, on a machine that does other things as well


def exported(plan: Plan) -> str:
    """`et.export` as users call it. Returns `equal`, `refused: ...`, or what is wrong."""
    model, inputs = Drawn(plan).eval(), inputs_of(plan)
    with tempfile.TemporaryDirectory() as folder:
        try:
            artifact = export(model, inputs, Path(folder) / "model.pte", one_row=True, min_same_prediction_pct=0.0)
        except EdgetuneError as error:
            return f"refused: {error}"
    assert artifact.manifest.parity is not None
    return judged(model, inputs, artifact.manifest.parity.max_abs_difference)


def lowered(plan: Plan) -> str:
    """The same without the second process and the files of `et.export`, which take most of its time."""
    model, inputs = Drawn(plan).eval(), inputs_of(plan)
    rows = [(inputs[row : row + 1],) for row in range(ROWS)]
    try:
        data = lower(Positional(model, inputs).eval(), rows[0], find("xnnpack")).data
    except EdgetuneError as error:
        return f"refused: {error}"
    program = loaded_runtime(None)._load_for_executorch_from_buffer(data)
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


def apart(function: Callable[[Plan], str], plan: Plan) -> str:
    """What the function says in a process of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child starts none
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(sender, function, plan))
        child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else f"no answer in {SECONDS} s"
    except EOFError:
        child.join()
        return f"the process ended with code {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _send(sender: Any, function: Callable[[Plan], str], plan: Plan) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        sender.send(function(plan))
    except BaseException as error:
        sender.send(f"raised {type(error).__name__}: {error}")
    sys.stdout.flush()


def check(function: Callable[[Plan], str], plan: Plan) -> None:
    """The property."""
    found = apart(function, plan)
    if found.startswith("refused"):
        assert re.search(r"\baten[.:]|operator \S|torch\.\w", found), f"names no operator: {found}\n{plan}"
    else:
        assert found == "equal", f"{found}\n{plan}"


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    """Imported and used before the processes fork: once, not once for each example."""
    with quiet():
        import executorch.exir
    assert executorch.exir
    lower(Positional(nn.Linear(2, 2), torch.ones(1, 2)).eval(), (torch.ones(1, 2),), find("xnnpack"))


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
    died = apart(lambda plan: str(os.kill(os.getpid(), signal.SIGKILL)), Plan((1,), False, ()))
    assert died == f"the process ended with code -{int(signal.SIGKILL)}"
