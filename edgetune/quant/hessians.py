"""What the inputs of linears look like on calibration batches: the sum of x x' over all tokens, layer by layer.

A model with repeated blocks is run up to the end of one block at a time, so that only one block's sums are held and
each block is calibrated on what the quantized blocks before it compute. Blocks that are done return their stored
outputs; all code between them is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from edgetune.core.inputs import Inputs, tensors_in, token_mask
from edgetune.lean.reads import storage_id
from edgetune.quant.calibration import (
    evaluation,
    refuse_infinite_inputs,
    run_on,
    select_tokens,
    usable_batches,
    watch_inputs,
)


def calibrate(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Inputs],
    quantize: Callable[[str, Tensor], None],
    finish: Callable[[list[str]], None] = lambda _: None,
) -> list[str]:
    """Call `quantize(name, hessian)` once for each of the linears, with the sum of x x' `(in, in)` of its inputs.

    Padded tokens do not count. `quantize` may replace the weight of its layer: later layers then see what that
    computes. `finish` gets the names of all layers of a block once they are quantized. Returns the names of the layers
    that no batch reaches. Raises `EdgetuneError` where the model cannot run on the batches, these have no rows, or
    inputs are not finite.
    """
    batches = usable_batches(model, batches)
    remaining = dict(linears)
    with evaluation(model), torch.no_grad():
        plan = _plan_stages(model, remaining, batches[0])
        with _Replay(plan) as replay:
            for stage in range(len(plan.blocks) + 1):
                last = stage == len(plan.blocks)
                names = [name for name in remaining if last or plan.stages.get(name) == stage]
                if not names:
                    continue
                sums: dict[str, Tensor] = {}
                for number, batch in enumerate(batches):
                    with _sum_inputs({name: remaining[name] for name in names}, sums, token_mask(batch)):
                        replay.run(model, batch, number, stage)
                refuse_infinite_inputs(name for name, total in sums.items() if not bool(torch.isfinite(total).all()))
                reached = list(sums)
                for name in reached:
                    quantize(name, sums.pop(name))
                    del remaining[name]
                finish(reached)
    return list(remaining)


@dataclass(frozen=True)
class _Plan:
    """The blocks in the order in which they run, and the number of the block before whose end each linear runs."""

    blocks: list[nn.Module] = field(default_factory=list)
    stages: dict[str, int] = field(default_factory=dict)
    passed_on: list[bool] = field(default_factory=list)  # of each block: only the next block reads its output


class _Stop(BaseException):
    """Ends a run of the model: what comes later is not needed yet. No `Exception`, so that no model catches it."""


def _plan_stages(model: nn.Module, linears: Mapping[str, nn.Linear], batch: Inputs) -> _Plan:
    """Watch a batch pass.

    Everything is one stage unless there are blocks that run one after the other, once each, and share no layer.
    """
    watch, stages, shared = _BlockWatch(), dict[str, int](), False

    def note(name: str, *_: Any) -> None:
        nonlocal shared
        shared |= stages.setdefault(name, len(watch.ended)) != len(watch.ended)

    with ExitStack() as hooks:
        for block in _repeated_blocks(model, set(linears.values())):
            hooks.enter_context(block.register_forward_pre_hook(watch.begin))
            hooks.enter_context(block.register_forward_hook(watch.end))
        for name, layer in linears.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        with watch:
            run_on(model, batch)
    blocks = watch.ended
    if shared or watch.begun != blocks or len(set(blocks)) < len(blocks):
        return _Plan()
    return _Plan(blocks, stages, [number not in watch.read_elsewhere for number in range(len(blocks))])


class _BlockWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the order of blocks, and whose output is read by other operators than the next block's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.begun: list[nn.Module] = []
        self.ended: list[nn.Module] = []
        self.read_elsewhere: set[int] = set()
        self.writers: dict[int, list[int]] = {}  # by storage, the numbers of the blocks that returned it
        self.outputs: list[Any] = []  # held, so that no storage gets another's identity

    def begin(self, block: nn.Module, _: object) -> None:
        """A block begins."""
        self.begun.append(block)

    def end(self, block: nn.Module, _: object, output: Any) -> None:
        """A block returns `output`."""
        for tensor in tensors_in(output):
            self.writers.setdefault(storage_id(tensor), []).append(len(self.ended))
        self.outputs.append(output)
        self.ended.append(block)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        runs = len(self.ended) if len(self.begun) > len(self.ended) else -1
        for tensor in tensors_in([args, kwargs]):
            written = self.writers.get(storage_id(tensor), ())
            self.read_elsewhere.update(number for number in written if number + 1 != runs)
        return func(*args, **kwargs)


def _repeated_blocks(model: nn.Module, linears: set[nn.Linear]) -> list[nn.Module]:
    """The items that hold such linears, of every outermost list or chain of several modules of one class."""
    blocks: list[nn.Module] = []
    inner: set[str] = set()
    for name, module in model.named_modules():
        outer = name.rpartition(".")[0]
        if outer in inner or name in inner:
            inner.add(name)
            continue
        children = list(module.children())
        repeats = len(children) > 1 and len({type(child) for child in children}) == 1
        if repeats and isinstance(module, (nn.ModuleList, nn.Sequential)):
            blocks += [child for child in children if not linears.isdisjoint(child.modules())]
            inner.add(name)
    return blocks


class _Replay:
    """Runs a model up to a block, whose predecessors return what they computed before."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.stored: dict[tuple[int, int], Any] = {}  # by block and batch
        self.stage = self.batch = 0

    def __enter__(self) -> _Replay:
        self.before = [(block, block.__dict__.get("forward")) for block in self.plan.blocks]
        for number, block in enumerate(self.plan.blocks):
            block.forward = partial(self._forward, number, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for block, forward in self.before:
            del block.forward
            if forward is not None:
                block.forward = forward

    def run(self, model: nn.Module, inputs: Inputs, batch: int, stage: int) -> None:
        """Run until the block of this number has ended; beyond the last block, to the end of the model."""
        self.stage, self.batch = stage, batch
        with suppress(_Stop):
            run_on(model, inputs)
        if stage > 1 and self.plan.passed_on[stage - 2]:
            self.stored.pop((stage - 2, batch), None)

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if number < self.stage - 1:
            stored = self.stored.get((number, self.batch))
            if stored is None and self.plan.passed_on[number]:  # nobody reads it any more: the latest stands for it
                stored = self.stored.get((self.stage - 2, self.batch))
            if stored is not None:
                return _copy(stored)
        output = forward(*args, **kwargs)
        if number == self.stage:
            raise _Stop
        if number == self.stage - 1:
            self.stored[number, self.batch] = _copy(output)
        return output


def _copy(output: Any) -> Any:
    """A model may write into what a block returns."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)


@contextmanager
def _sum_inputs(linears: Mapping[str, nn.Linear], sums: dict[str, Tensor], mask: Tensor | None) -> Iterator[None]:
    """Add to `sums` the x x' of the inputs of these layers in the body."""
    latest: list[tuple[Tensor, int, Tensor]] = []  # an input and its product: several layers often read the same

    def add(name: str, x: Tensor) -> None:
        if not latest or latest[0][0] is not x or latest[0][1] != x._version:
            tokens = select_tokens(x, mask)
            latest[:] = [(x, x._version, tokens.t() @ tokens)]
        product = latest[0][2]
        if name in sums:
            sums[name] += product
        elif x.numel():
            sums[name] = product.clone()

    with watch_inputs(linears, add):
        yield
