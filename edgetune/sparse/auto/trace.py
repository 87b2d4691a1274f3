"""Trace what one forward saves for backward, when and in which layer, and what it holds at each moment."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.core.inputs import Inputs, call, logits_of, tensors_in
from edgetune.core.layers import parameter_layers
from edgetune.core.modes import preserve_state
from edgetune.core.wrapped import Wrapped
from edgetune.lean.onednn import is_channels_last

Loss = Callable[[Tensor, Tensor], Tensor]
StorageName = tuple[Any, ...]  # the same in every forward of one model: how the storage was first seen


class Save(NamedTuple):
    """One storage that autograd saves for backward."""

    clock: int  # modules entered and left so far
    owner: str | None  # the innermost layer with parameters of its own that was running
    storage: StorageName
    nbytes: int  # of the whole storage, as long as any of it is saved
    used: int  # bytes of the tensor that is wanted, which may be a part of the storage


class Trace(NamedTuple):
    """What one training forward and its loss save; nothing of it is held."""

    saves: tuple[Save, ...]
    entered: dict[str, int]  # layer with parameters of its own -> clock at its first call, in order
    left: dict[str, int]  # clock at its last return
    outputs: dict[str, int]  # values in what it returns, all calls together
    clock: int  # at the end


class Clock:
    """Hooks on all modules: counts entering and leaving, and keeps the stack of layers with parameters of their own."""

    def __init__(self, model: nn.Module) -> None:
        self.now, self.calls = 0, 0
        self.owners = {layer: name for name, layer in parameter_layers(model).items()}
        self.stack: list[tuple[int, str | None]] = []
        self.entered: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.outputs: dict[str, int] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Clock]:
        """Register the hooks for the duration of the block."""
        with ExitStack() as hooks:
            for module in _unwrapped(model):
                hooks.enter_context(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(self.leave))
            yield self

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tick."""
        self.now += 1
        self.calls += 1
        owner = self.owners.get(module)
        self.stack.append((self.calls, owner))
        if owner is not None:
            self.entered.setdefault(owner, self.now)
        self.see("in", self.calls, (args, kwargs))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Tick."""
        number, owner = self.stack.pop()
        self.see("out", number, output)
        self.now += 1
        if owner is not None:
            self.left[owner] = self.now
            self.outputs[owner] = self.outputs.get(owner, 0) + sum(t.numel() for t in tensors_in(output))

    @property
    def owner(self) -> str | None:
        """The innermost layer with parameters of its own that is running."""
        return next((owner for _, owner in reversed(self.stack) if owner is not None), None)

    def see(self, kind: str, call_number: int, value: object) -> None:
        """Called with the inputs and outputs of every module."""


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The modules, with a wrapped layer as one: the clock is the same whether or not a slice of it trains."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside:
            yield module
        if isinstance(module, Wrapped):
            inside.add(module.base)


def _weak_reference(storage: torch.UntypedStorage) -> StorageWeakRef:
    """While the reference exists, no other storage gets the same key, although the memory is freed."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


_RECENT = 32  # saved tensors that are held: an operator may look at what the one before it saved


class _Saves(Clock):
    """Notes what autograd saves and lets it go, so that a forward takes no more memory than without a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        own = (*model.parameters(), *model.buffers())
        self.own = {t.untyped_storage()._cdata for t in own}
        self.seen: dict[int, tuple[StorageWeakRef, StorageName]] = {}  # the references keep addresses from being reused
        self.saved: list[tuple[int, str | None, int, int, int]] = []
        self.recent: deque[Tensor] = deque(maxlen=_RECENT)

    def see(self, kind: str, call_number: int, value: object) -> None:
        for slot, tensor in enumerate(tensors_in(value)):
            self.name(tensor.untyped_storage(), (kind, call_number, slot))

    def name(self, storage: torch.UntypedStorage, name: StorageName) -> int:
        key: int = storage._cdata
        if key not in self.seen or self.seen[key][1][0] == "saved":
            self.seen[key] = (_weak_reference(storage), name)
        return key

    def pack(self, tensor: Tensor) -> weakref.ref[Tensor]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            key: int = storage._cdata
            if key not in self.seen:
                # what no module takes or returns is identified by when it was saved, its size and a number
                self.seen[key] = (_weak_reference(storage), ("saved", self.now, storage.nbytes()))
            self.saved.append((self.now, self.owner, key, storage.nbytes(), tensor.nbytes))
        same = tensor.detach()
        self.recent.append(same)
        return weakref.ref(same)

    def saves(self) -> tuple[Save, ...]:
        names: dict[int, StorageName] = {}
        counts: dict[StorageName, int] = {}
        for _, _, key, _, _ in self.saved:
            name = self.seen[key][1]
            if key not in names:
                counts[name] = counts.get(name, 0) + 1
                names[key] = (*name, counts[name])
        return tuple(Save(clock, owner, names[key], size, used) for clock, owner, key, size, used in self.saved)


def trace_saves(model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss, detach_inputs: bool = False) -> Trace:
    """What a training forward of `model`, as it stands, saves. The model and the random state are left as they were.

    `detach_inputs`: each layer gets inputs that need no gradient, so that it saves only what its own parameters need.
    """
    inputs, labels = batch
    clock = _Saves(model)
    saving = saved_tensors_hooks(clock.pack, _unpack)
    with ExitStack() as hooks, preserve_state(model, training=True), torch.enable_grad(), clock.on(model), saving:
        for layer in clock.owners if detach_inputs else ():
            if not any(inner in clock.owners for inner in layer.modules() if inner is not layer):
                hooks.enter_context(layer.register_forward_pre_hook(_detach, with_kwargs=True))
        loss(logits_of(call(model, inputs)), labels)
    return Trace(clock.saves(), clock.entered, clock.left, clock.outputs, clock.now)


def _detach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        tuple(value.detach() if isinstance(value, Tensor) else value for value in args),
        {name: value.detach() if isinstance(value, Tensor) else value for name, value in kwargs.items()},
    )


def _unpack(held: weakref.ref[Tensor]) -> Tensor:
    tensor = held()
    if tensor is None:
        raise RuntimeError("nothing was saved for this backward")
    return tensor


def _placeholder(form: tuple[torch.Size, torch.dtype]) -> Tensor:
    """Something of this form without memory, for an operator that looks at what the one before it saved."""
    return torch.empty((), dtype=form[1]).expand(form[0])


# oneDNN reorders the input, and the output back: one of the two copies exists at a time, invisible to PyTorch;
# with channels last there is nothing to reorder
_REORDERING = frozenset({torch.ops.aten.convolution.default})


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators make, for as long as they live."""

    def __init__(self, counted: set[int], clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted, self.clock, self.bytes = counted, clock, 0
        self.most: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._add(tensor.untyped_storage())
        reorders = func in _REORDERING and not is_channels_last(args[0])
        inside = max(args[0].nbytes, result.nbytes) if reorders else 0
        self.most[self.clock.now] = max(self.most.get(self.clock.now, 0), self.bytes + inside)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.counted:
            self.counted.add(key)
            self.bytes += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.counted.discard(key)
        self.bytes -= size


def trace_live(model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss) -> list[int]:
    """Most bytes held at once at each clock of a training forward of which nothing is saved for backward.

    Weights, buffers and inputs are not counted.
    """
    clock = Clock(model)
    inputs, labels = batch
    own = (*model.parameters(), *model.buffers(), *tensors_in(batch))
    live = _Live({t.untyped_storage()._cdata for t in own}, clock)
    hooks = saved_tensors_hooks(lambda tensor: (tensor.shape, tensor.dtype), _placeholder)
    with preserve_state(model, training=True), torch.enable_grad(), clock.on(model), hooks, live:
        loss(logits_of(call(model, inputs)), labels)
    return [live.most.get(n, 0) for n in range(clock.now + 1)]
