"""Wrappers on the stages of a model: they find its frozen prefix, run it alone, or replay values in its place."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, device_of, tensors_in, to_device
from edgetune.core.modes import preserve_state
from edgetune.lean.stages import stages_of
from edgetune.train.plan import TrainingRows
from edgetune.train.prefix.rows import Form, Widths, form_of, forms_in, name_arguments, template_of, widths_of


class PrefixEnd(Exception):
    """Ends a forward pass where the prefix ends."""


class Player(Protocol):
    """Decides what each call of a stage does."""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with the model's inputs."""
        ...

    def stage(self, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called for a stage; `plain` is its own forward."""
        ...


class Stages:
    """Intercepts the calls of a model's stages. If no player is set, every stage runs unchanged."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.stages = stages_of(model)
        self.player: Player | None = None
        self.handle = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self.replaced = [_Forward(self, stage) for stage in self.stages]
        for forward in self.replaced:
            forward.put_on()

    def keep(self, names: set[str]) -> None:
        """Remove the wrappers from all stages but these."""
        for forward in [f for f in self.replaced if f.name not in names]:
            forward.take_off()
            self.replaced.remove(forward)

    def close(self) -> None:
        """Restore the model."""
        self.handle.remove()
        for forward in self.replaced:
            forward.take_off()
        self.replaced = []

    @contextmanager
    def play(self, player: Player | None) -> Iterator[None]:
        """Inside, `player` handles the calls."""
        before, self.player = self.player, player
        try:
            yield
        finally:
            self.player = before

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.player is not None:
            self.player.begin(args, kwargs)


class _Forward:
    """Replaces the forward of one stage. A copy or a pickle of the stage has its plain forward again."""

    def __init__(self, stages: Stages, module: nn.Module) -> None:
        self.stages, self.module, self.name = stages, module, stages.names[module]
        self.plain, self.own = module.forward, "forward" in module.__dict__
        self.play: Any = self._play
        if "torch._dynamo" in sys.modules:  # someone may compile: what is played cannot be traced
            self.play = torch.compiler.disable(self._play)  # type: ignore[no-untyped-call]

    def put_on(self) -> None:
        self.module.__dict__["forward"] = self

    def take_off(self) -> None:
        if self.own:
            self.module.__dict__["forward"] = self.plain
        else:
            self.module.__dict__.pop("forward", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.stages.player is None:
            return self.plain(*args, **kwargs)
        return self.play(self.stages.player, args, kwargs)

    def _play(self, player: Player, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return player.stage(self.name, self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain_forward(memo[id(self.module)])

    def __reduce__(self) -> Any:
        return _plain_forward, (self.module,)


def _plain_forward(module: nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)


@dataclass(frozen=True)
class StageCall:
    """One call of a stage in the prefix. `template`: its output, with forms in place of tensors."""

    stage: str
    template: Any

    @property
    def has_rows(self) -> bool:
        """Whether its output has a value for each row; other calls are not skipped."""
        return any(form.has_rows for form in forms_in(self.template))


@dataclass(frozen=True)
class Prefix:
    """The calls before the first stage that trains, up to the one whose output is cached."""

    calls: tuple[StageCall, ...]
    first_trained: str  # the stage after it
    inputs: tuple[tuple[str | int, Form], ...]  # of the model: name or place, and form
    widths: Widths

    @property
    def boundary(self) -> StageCall:
        """The last call, whose output is the input of the rest of the model."""
        return self.calls[-1]

    @property
    def stages(self) -> list[str]:
        """The stages by name, each once."""
        return list(dict.fromkeys(made.stage for made in self.calls))

    @property
    def skipped(self) -> tuple[str, ...]:
        """The stages that need not run."""
        return tuple(dict.fromkeys(made.stage for made in self.calls if made.has_rows))


class _Watcher:
    """Lets the frozen stages run, records their outputs, and stops at the first one that trains."""

    def __init__(self, trains: Callable[[str], bool]) -> None:
        self.trains = trains
        self.inputs: dict[str | int, Tensor] = {}
        self.outputs: list[tuple[str, Any]] = []
        self.first_trained = ""

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = {name: value for name, value in name_arguments(args, kwargs).items() if isinstance(value, Tensor)}

    def stage(self, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.trains(name) or any(t.requires_grad for t in tensors_in((args, kwargs), caches=True)):
            self.first_trained = name
            raise PrefixEnd
        output = plain(*args, **kwargs)
        self.outputs.append((name, output))
        return output


def find_prefix(stages: Stages, split: TrainingRows) -> Prefix:
    """The calls before the first stage that trains, found by running a short row, two of it, and a long row."""
    rows = range(len(split))
    lengths = split.lengths
    short = 0 if lengths is None else min(rows, key=lambda row: lengths[row])
    long = 0 if lengths is None else max(rows, key=lambda row: lengths[row])
    one, two, longer = (_watch(stages, split, probe) for probe in ([short], [short, short], [long]))
    names = [name for name, _ in one.outputs]
    if not names:
        raise EdgetuneError(
            "cache_prefix: nothing is frozen before the first stage that trains",
            got=one.first_trained or "no stage at all",
            action="train only the last blocks (sparse-update: {scheme: last-2}), or leave cache_prefix out",
        )
    if any([name for name, _ in other.outputs] != names for other in (two, longer)):
        raise EdgetuneError("cache_prefix: the stages run in another order for other rows", got=names)
    one_inputs, long_inputs = list(one.inputs.values()), list(longer.inputs.values())
    widths = widths_of(one_inputs, long_inputs)
    inputs = tuple(
        (name, form_of(f"input {name}", one.inputs[name], two.inputs[name], longer.inputs[name], widths))
        for name in one.inputs
    )
    calls = [
        StageCall(name, template_of(f"the output of {name}", a, b, c, widths))
        for (name, a), (_, b), (_, c) in zip(one.outputs, two.outputs, longer.outputs, strict=True)
    ]
    while calls and not calls[-1].has_rows:
        calls.pop()
    if not calls or not all(form.has_rows for form in forms_in(calls[-1].template)):
        raise EdgetuneError(
            "cache_prefix: the last frozen stage gives tensors that are not one for each row",
            got=names[-1],
            action="leave cache_prefix out for this model",
        )
    return Prefix(tuple(calls), one.first_trained or "what follows the stages", inputs, widths)


def _watch(stages: Stages, split: TrainingRows, rows: Sequence[int]) -> _Watcher:
    modules = dict(stages.model.named_modules())
    watcher = _Watcher(lambda name: any(p.requires_grad for p in modules[name].parameters()))
    inputs, _ = split.batch(rows)
    with stages.play(watcher), torch.enable_grad():
        try:
            call(stages.model, to_device(inputs, device_of(stages.model)))
        except PrefixEnd:
            pass
        else:
            if not any(parameter.requires_grad for parameter in stages.model.parameters()):
                raise EdgetuneError("cache_prefix: nothing trains, so there is no prefix to store")
    return watcher


@contextmanager
def training_modes(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Yield the modes in which the model trains: its own in training mode, else all on; restores its state."""
    modes = {module: module.training for module in model.modules()}
    with preserve_state(model, training=True):
        if model.training and modes[model]:
            for module, mode in modes.items():
                module.training = mode
        yield {module: module.training for module in modes}


@contextmanager
def set_modes(modes: dict[nn.Module, bool]) -> Iterator[None]:
    """Inside, each module has the given mode; restored afterwards."""
    before = {module: module.training for module in modes}
    for module, mode in modes.items():
        module.training = mode
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class Filler:
    """Runs the prefix, records the output of its last call, and stops there."""

    def __init__(self, prefix: Prefix) -> None:
        self.prefix, self.place = prefix, 0
        self.tensors: list[Tensor] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start at the first call."""
        self.args, self.kwargs, self.place = args, kwargs, 0

    def stage(self, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the stage; after the last one, stop."""
        check_order(self.prefix, self.place, name)
        output = plain(*args, **kwargs)
        self.place += 1
        if self.place == len(self.prefix.calls):
            self.tensors = list(tensors_in(output))
            raise PrefixEnd
        return output


def check_order(prefix: Prefix, place: int, name: str) -> None:
    """Raise unless this stage ran at this position when the cache was opened."""
    expected = prefix.calls[place].stage
    if name != expected:
        raise EdgetuneError(
            f"cache_prefix: {name} ran where {expected} ran when the cache was opened",
            action="leave cache_prefix out for a model whose stages do not always run in the same order",
        )


def find_random_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Modules in training mode, inside these stages, that look random or mix rows."""
    random_modules = []
    for stage in names:
        for name, module in model.get_submodule(stage).named_modules():
            kind = type(module).__name__.lower()
            chance = getattr(module, "p", getattr(module, "drop_prob", None))
            noisy = "drop" in kind and chance != 0
            if module.training and (noisy or getattr(module, "running_mean", None) is not None):
                random_modules.append(f"{stage}.{name}".strip("."))
    return random_modules
