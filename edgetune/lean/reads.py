"""Weights that are read outside their layer's own forward: what wraps or replaces such a layer would never run there.

timm's BEiT and SwinV2 call `F.linear(x, self.qkv.weight, bias)`, own code ties a head by `h @ self.wte.weight.T`,
`nn.MultiheadAttention` hands `out_proj.weight` on. One forward is watched: each operator that is given a weight, and
the modules whose forward runs at that moment. Without inputs the source code of the modules around a layer is read for
reads that are certain (`edgetune.lean.reads_in_source`), and the model's first forward is watched.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.core.carriers import is_wrapped, plain_layer
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.inputs import Inputs, call, device_of, tensors_in, to_device
from edgetune.core.modes import preserve_state
from edgetune.core.technique import Sample
from edgetune.lean.frozen import Hook, hook_of, never_compile, remove_hooks
from edgetune.lean.reads_in_source import outer_names, read_in_source

# operators that need no values; reads of an alias are seen where they happen
_LOOKS_ONLY = ("new_", "sym_", "is_", "_has_", "size", "stride", "numel", "dim", "detach", "alias")


@dataclass
class Reads:
    """For each layer whose weight is read elsewhere, its readers' names; and the layers that never ran.

    `complete`: whether the model ran in evaluation mode to the end.
    """

    elsewhere: dict[str, list[str]]
    idle: list[str]
    complete: bool = True


def refuse_read_elsewhere(model: nn.Module, chosen: Iterable[str], sample: Sample | None = None) -> None:
    """Raise for a layer of `chosen` whose weight is read elsewhere: what wraps or replaces it would not run there.

    Without a sample, or where the model cannot run on it, the model's next forward is watched; that raises for those
    of the layers that are wrapped by then.
    """
    names = list(chosen)
    readers, complete = readers_of(model, names, sample)
    refuse_readers(model, readers)
    if names and not complete:
        watch_first_forward(model, names)


def readers_of(
    model: nn.Module, chosen: Iterable[str], sample: Sample | None = None
) -> tuple[dict[str, list[str]], bool]:
    """For each layer name the modules that read its weight elsewhere, and whether a whole forward was watched.

    The source code gives reads that are certain; with a sample the model also runs once in each mode.
    """
    names = list(chosen)
    readers = read_in_source(model, names)
    if sample is None or not names:
        return readers, False
    reads = weights_read_elsewhere(model, sample.inputs, names)
    return readers | reads.elsewhere, reads.complete


def refuse_readers(model: nn.Module, readers: dict[str, list[str]]) -> None:
    """Raise for the first layer that has readers."""
    for name, (reader, *others) in readers.items():
        kind = type(model.get_submodule(reader)).__name__
        place = f"{reader} ({kind})" if reader else kind
        also = f", as {len(others)} more do" if others else ""
        rest = [other for other in readers if other != name]
        raise EdgetuneError(
            f"{name} is not called where its weight is used: {place} reads its weight directly{also}, and would miss "
            "what changes the layer",
            action=f'add "{name}" to skip' + (f", and {truncate_list(rest, 3)}" if rest else ""),
        )


def weights_read_elsewhere(model: nn.Module, inputs: Inputs, names: Iterable[str] | None = None) -> Reads:
    """Run the model in evaluation and in training mode, and report on the layers called `names` (all by default).

    A model that cannot run on these inputs in one of the modes is watched as far as it gets.
    """
    watch, complete = _ReadRecorder(model, names), True
    for training in (False, True):  # torch's attention has a fast path in evaluation
        with preserve_state(model, training), torch.no_grad(), _suspend_first_forward(model), watch:
            try:
                call(model, to_device(inputs, device_of(model)))
            except Exception:  # inputs that forward does not take: the first real forward is watched instead
                complete &= training
    return watch.reads(complete)


class _ReadRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which weights the operators are given, and whose forward is running."""

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        layers = dict(model.named_modules(remove_duplicate=False))
        self.names = {id(module): name for name, module in reversed(layers.items())}
        chosen = [name for name in (layers if names is None else names) if name in layers]
        self.owners: dict[int, set[int]] = {}  # by weight: the layers in whose forward it may be read
        self.chosen: dict[int, list[str]] = {}
        self.layers = {name: layers[name] for name in chosen}
        for name in chosen:
            weight = plain_layer(layers[name])._parameters.get("weight")
            if weight is not None:
                self.chosen.setdefault(storage_id(weight), []).append(name)
        for name, module in layers.items():
            for parameter in module._parameters.values():
                if parameter is not None and storage_id(parameter) in self.chosen:
                    around = (layers[outer] for outer in outer_names(name) if is_wrapped(layers[outer]))
                    self.owners.setdefault(storage_id(parameter), set()).update(map(id, (module, *around)))
        self.running: list[nn.Module] = []
        self.thread = threading.get_ident()
        self.ran: set[int] = set()
        self.readers: dict[str, list[str]] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> _ReadRecorder:
        # global hooks: hooks on the module would keep a torch encoder layer off its fast path
        self.handles = [
            hooks_of_all.register_module_forward_pre_hook(self._begin),
            hooks_of_all.register_module_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()
        self.running.clear()

    def _begin(self, module: nn.Module, args: object) -> None:
        if id(module) in self.names:
            self.running.append(module)
            self.ran.add(id(module))

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if module in self.running:
            while self.running.pop() is not module:
                pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._schema.name.partition("::")[2]
        if not (operator.startswith(_LOOKS_ONLY) or operator.endswith("_like")):
            self._note(operator, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, operator: str, args: Any, kwargs: Any) -> None:
        tensors = list(tensors_in((args, kwargs)))
        if operator in ("copy_", "index_copy_", "fill_", "zero_"):  # written, not read
            tensors = list(tensors_in((args[1:], kwargs)))
        for tensor in tensors:
            storage = storage_id(tensor)
            owners = self.owners.get(storage)
            if owners is None or any(id(module) in owners for module in self.running):
                continue
            reader = self.names[id(self.running[-1])] if self.running else ""
            for name in self.chosen[storage]:
                readers = self.readers.setdefault(name, [])
                if reader not in readers:
                    readers.append(reader)

    def reads(self, complete: bool = True) -> Reads:
        """What was recorded so far."""
        idle = [name for name, layer in self.layers.items() if id(layer) not in self.ran]
        return Reads(dict(self.readers), idle, complete)


def storage_id(tensor: Tensor) -> int:
    """An identifier of a tensor's memory, which its views and its `.data` share."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return id(tensor)


class FirstForward(Hook):
    """Watches the model's first forward and takes itself off; raises where it reads a weight of `names` elsewhere.

    Idle while a compiler or an exporter traces. A forward that fails leaves it on.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.suspended = False
        self.watch: _ReadRecorder | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to watch, unless the forward is traced or watched already."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or self.suspended or self.watch is not None:
            return
        self.watch = _ReadRecorder(module, [name for name in self.names if _is_wrapped(module, name)])
        self.watch.__enter__()
        self.watch._begin(module, args)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Check what was recorded; `output` is None if the forward failed."""
        if torch.compiler.is_compiling() or self.watch is None or self.watch.thread != threading.get_ident():
            return
        watch, self.watch = self.watch, None
        watch.__exit__(None, None, None)
        if output is not None:
            remove_hooks(module, FirstForward)
            refuse_readers(module, watch.reads().elsewhere)


never_compile(FirstForward.after)


def watch_first_forward(model: nn.Module, names: Iterable[str]) -> None:
    """Watch the model's next forward, for techniques that had no inputs to try beforehand."""
    earlier = hook_of(model, FirstForward)
    if earlier is None:
        FirstForward(names).put_on(model)
    else:
        earlier.names += [name for name in names if name not in earlier.names]


def _is_wrapped(model: nn.Module, name: str) -> bool:
    """Whether a wrapped layer has this name."""
    try:
        return is_wrapped(model.get_submodule(name))
    except AttributeError:
        return False


@contextmanager
def _suspend_first_forward(model: nn.Module) -> Iterator[None]:
    """Keep the hook idle for a forward that is watched already."""
    hook = hook_of(model, FirstForward)
    if hook is not None:
        hook.suspended = True
    try:
        yield
    finally:
        if hook is not None:
            hook.suspended = False
