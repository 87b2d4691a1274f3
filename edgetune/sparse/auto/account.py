"""Predict the memory and step time of training a scheme, from a few forwards and without training it.

A gradient that starts at a layer passes everything after it, and each operator it passes saves what it needs; a layer
whose weight trains saves its input as well. Both are observed in the model as `SparseUpdate` leaves it: a few forwards
(nothing trains but the first layer; biases; everything) say which storage is saved when, and for which layer. What a
scheme saves is then the union of storages: those saved after its first layer, and those saved for its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.layers import parameter_layers, parameter_owners
from edgetune.core.numbers import MIB
from edgetune.quant.size import stored_bytes
from edgetune.sparse.auto.timing import QUARTER, TIMED_PARTS, Times, time_steps
from edgetune.sparse.auto.trace import Loss, Save, StorageName, Trace, trace_live, trace_saves
from edgetune.sparse.scheme import Part, Scheme, Slice, Under, trains
from edgetune.sparse.sliced import SLICEABLE, channels_of


@dataclass(frozen=True)
class OptimizerSpec:
    """The settings of `train` that determine the optimizer's memory."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9  # sgd
    in_backward: bool = False  # each parameter is updated as soon as its gradient is there
    state_bits: Literal[32, 8] = 32

    def state_bytes(self, values: int) -> int:
        """Of the optimizer, for one parameter of so many values."""
        tensors = 2 if self.optimizer == "adamw" else int(self.momentum > 0)
        counter = 4 if self.optimizer == "adamw" else 0
        if self.state_bits == 8 and values >= 4096 and values % 256 == 0:  # as torchao's: a byte, scales, a table
            return tensors * (values + 4 * (values // 256) + 4 * 256) + counter
        return tensors * values * 4 + counter


@dataclass(frozen=True)
class Account:
    """The memory of one training, in bytes."""

    scheme: str
    weights_bytes: int  # as stored; a slice is there beside its weight
    gradients_bytes: int  # all at once, or with `in_backward` the largest
    optimizer_bytes: int
    saved_bytes: int  # by autograd
    transient_bytes: int  # on top, at the peak of a step

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer state and saved activations: what the ledger calls train_memory_mib."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.saved_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors at once in a step; less than the total where gradients come as activations go."""
        return self.total_bytes + self.transient_bytes

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_bytes, "gradients": self.gradients_bytes, "optimizer": self.optimizer_bytes,
            "saved for backward": self.saved_bytes,
        }  # fmt: skip
        parts_mib = ", ".join(f"{name} {value / MIB:.1f}" for name, value in parts.items())
        return f"{self.scheme}: {self.total_bytes / MIB:.1f} MiB ({parts_mib}); at the peak {self.peak_bytes / MIB:.1f}"


@dataclass(frozen=True)
class LayerCost:
    """The training costs of one layer that owns parameters."""

    name: str
    start: int  # clock at which it is first entered
    end: int
    parameters: Mapping[str, int]  # values of each
    element_bytes: int
    shared: bool  # a parameter of it also hangs in another layer
    trainable: bool  # its parameters are floating point
    channels: Mapping[str, tuple[int, int]]  # slices "inputs", "outputs": channels, and how many go together
    whole_input: frozenset[str]  # slices that save all of the input
    macs: int
    saves: Mapping[str, tuple[Save, ...]]  # for "frozen", "bias", "full", and "first": full where no gradient passes

    def sizes(self, part: Part) -> list[int]:
        """Values of each tensor that trains."""
        sizes = [size for key, size in self.parameters.items() if trains(part, key)]
        return [*sizes, self.sliced(part)] if isinstance(part, Slice) else sizes

    def sliced(self, part: Slice) -> int:
        """Values of a slice."""
        channels, step = self.channels[part.of]
        return self.parameters["weight"] // channels * step * self._groups(part)

    def _groups(self, part: Slice) -> int:
        channels, step = self.channels[part.of]
        return max(1, round(part.ratio * channels / step))

    @property
    def trainable_parts(self) -> tuple[Part, ...]:
        """The parts that can be timed."""
        if self.shared or not self.trainable:
            return ("frozen",)
        possible = [part for part in TIMED_PARTS if self.channels or not isinstance(part, Slice)]
        return tuple(part for part in possible if part == "frozen" or self.sizes(part))

    @property
    def clocks(self) -> range:
        """From entering it to leaving it."""
        return range(self.start, self.end)

    def copied_bytes(self, part: Part) -> int:
        """Bytes of a slice besides its weight: its values and its channel indices."""
        if not isinstance(part, Slice):
            return 0
        return self.sliced(part) * self.element_bytes + 8 * round(self.share(part) * self.channels[part.of][0])

    def state_bytes(self, part: Part, optimizer: OptimizerSpec) -> int:
        """Of the optimizer."""
        return sum(optimizer.state_bytes(size) for size in self.sizes(part))

    def share(self, part: Part) -> float:
        """How much of the product that gives a weight's gradient has to be computed."""
        if isinstance(part, Slice):
            channels, step = self.channels[part.of]
            return self._groups(part) * step / channels
        return float(part == "full")

    def saved(self, part: Part, gradient_passes: bool = True) -> list[Save]:
        """What this layer saves when `part` of it trains and a gradient passes it (else: starts here)."""
        if not isinstance(part, Slice):
            if gradient_passes:
                return list(self.saves[part])
            return list(self.saves["first"]) if part == "full" else []
        saved_if_gradient_passes = list(self.saves["bias"])
        stored = {save.storage for save in saved_if_gradient_passes}
        share = 1.0 if part.of in self.whole_input else self.share(part)
        mine = []
        for save in self.saves["full"]:
            if save.storage not in stored and share == 1.0:
                mine.append(save)
            elif save.storage not in stored:  # a copy of some channels, which no other layer saves
                mine.append(save._replace(storage=(*save.storage, self.name), nbytes=round(save.used * share)))
        return saved_if_gradient_passes + mine if gradient_passes else mine


@dataclass(frozen=True)
class CostModel:
    """The training costs of a model on a batch. Holds no tensor."""

    layers: tuple[LayerCost, ...]  # in the order in which they run
    between: tuple[Save, ...]  # saved outside of all layers
    live: tuple[int, ...]  # bytes at each clock of a forward of which nothing is saved
    times: Times
    weights_bytes: int

    @classmethod
    def of(cls, model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss, under: Under) -> CostModel:
        """Trace some forwards of `batch`, and time some steps that train a part of every layer.

        `under` puts the model under a scheme: see `SparseUpdate.under`. The model is left as it was.
        """
        layers = parameter_layers(model)
        shared, can_train = _shared(layers), {name: _is_floating(layer) for name, layer in layers.items()}

        def look(parts: Mapping[str, Part], detach_inputs: bool = False) -> Trace:
            with under(parts):
                return trace_saves(model, batch, loss, detach_inputs)

        everything: dict[str, Part] = {name: "full" if can_train[name] else "frozen" for name in layers}
        full = look(everything)
        order = sorted(layers, key=lambda name: (_clock_of(full.entered, name), list(layers).index(name)))
        first = next((name for name in order if can_train[name] and name not in shared), None)
        if first is None:
            raise EdgetuneError("no layer of this model can train", action="leave some layers out of nf4")
        frozen = look({first: "full"})
        biases = {n: "bias" for n in layers if can_train[n] and n not in shared and _has_bias(layers[n])}
        bias = look({**biases, first: "full"}) if set(biases) - {first} else frozen  # type: ignore[dict-item]
        traces = {"frozen": frozen, "bias": bias, "full": full, "first": look(everything, detach_inputs=True)}
        owned = {part: _by_owner(trace.saves) for part, trace in traces.items()}
        owned["frozen"][first] = owned["bias"][first] = ()  # it was what trained; no gradient passes the first layer
        with under({first: "full"}):
            live = trace_live(model, batch, loss)
        layer_costs = tuple(
            _layer(name, layers[name], full, {part: owned[part].get(name, ()) for part in owned}, name in shared)
            for name in order
        )
        return cls(
            layers=layer_costs,
            between=owned["frozen"].get(None, ()),
            live=tuple(live),
            times=time_steps(
                model,
                batch,
                loss,
                under,
                order,
                {layer.name: layer.trainable_parts for layer in layer_costs},
                {layer.name: layer.clocks for layer in layer_costs},
            ),
            weights_bytes=stored_bytes(model),
        )

    def layer(self, name: str) -> LayerCost:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)

    def saved(self, parts: Mapping[str, Part]) -> list[Save]:
        """Every storage that a scheme saves, once."""
        training = [layer for layer in self.layers if parts.get(layer.name, "frozen") != "frozen"]
        training = [layer for layer in training if layer.sizes(parts[layer.name])]
        if not training:
            return []
        first = min(training, key=lambda layer: layer.start)
        saves = [save for save in self.between if save.clock > first.start]
        for layer in self.layers:
            saves += layer.saved(parts.get(layer.name, "frozen"), gradient_passes=layer.start > first.start)
        last: dict[StorageName, Save] = {}
        for save in sorted(saves, key=lambda save: save.clock):
            last[save.storage] = save
        # what an operator saves whole for a passing gradient serves a slice too
        passing = {save.storage for save in self.saved_if_gradient_passes(first.start)}
        return [save for name, save in last.items() if not (name[-1] in parts and name[:-1] in passing)]

    def saved_if_gradient_passes(self, start: int) -> list[Save]:
        """What is saved only because a gradient that starts here passes."""
        saves = [save for save in self.between if save.clock > start]
        return saves + [s for layer in self.layers if layer.start > start for s in layer.saved("frozen")]

    def account(self, scheme: Scheme | Mapping[str, Part], optimizer: OptimizerSpec | None = None) -> Account:
        """The memory of training `scheme`, predicted."""
        optimizer = optimizer or OptimizerSpec()
        parts = {c.layer: c.part for c in scheme.choices} if isinstance(scheme, Scheme) else dict(scheme)
        training = list(self._training_layers(parts))
        sizes = [size * layer.element_bytes for layer in training for size in layer.sizes(parts[layer.name])]
        largest = max(sizes, default=0)
        held = largest if optimizer.in_backward else sum(sizes)
        saves = self.saved(parts)
        saved_bytes = sum(save.nbytes for save in saves)
        peak = max(self._peak(saves, parts, largest, optimizer), held + 2 * largest)
        return Account(
            scheme=scheme.name if isinstance(scheme, Scheme) else "written",
            weights_bytes=self.weights_bytes + sum(layer.copied_bytes(parts[layer.name]) for layer in training),
            gradients_bytes=held,
            optimizer_bytes=sum(layer.state_bytes(parts[layer.name], optimizer) for layer in training),
            saved_bytes=saved_bytes,
            transient_bytes=peak - saved_bytes - held,
        )

    def _training_layers(self, parts: Mapping[str, Part]) -> Iterable[LayerCost]:
        """The layers that train, each tied group once."""
        seen: set[tuple[int, ...]] = set()
        for layer in self.layers:
            if parts.get(layer.name, "frozen") == "frozen":
                continue
            sizes = tuple(sorted(layer.parameters.values()))
            if not layer.shared or sizes not in seen:
                yield layer
            if layer.shared:
                seen.add(sizes)

    def _peak(self, saves: list[Save], parts: Mapping[str, Part], largest: int, optimizer: OptimizerSpec) -> int:
        """Bytes beside weights and optimizer state at the fullest moment of forward and backward.

        At a clock of backward there is what forward had saved until then, the gradients of later layers, and gradients
        of the activations, taken to be as large as what forward holds at that clock when nothing is saved. At the loss,
        the last clock, what is saved is among what forward holds; in the first layer no gradient of an input is made.
        """
        last = len(self.live) - 1
        saved_at, arrives = [0] * (last + 2), [0] * (last + 2)
        for save in saves:
            saved_at[save.clock + (save.clock == last)] += save.nbytes
        training = list(self._training_layers(parts))
        for layer in training:
            arrives[layer.start] += sum(layer.sizes(parts[layer.name])) * layer.element_bytes
        most, before, after = max(self.live), 0, sum(arrives)
        first = min(training, key=lambda layer: layer.start, default=None)
        for clock in range(first.start if first else last + 1, last + 1):
            before += saved_at[clock]
            if first and clock >= first.end:
                most = max(most, before + (largest if optimizer.in_backward else after) + self.live[clock])
            after -= arrives[clock]
        return max(most, sum(saved_at))

    def step_ms(self, scheme: Scheme | Mapping[str, Part]) -> float:
        """Time of a step: forward, the gradient through what comes after the first layer, the weights', AdamW's."""
        parts = {c.layer: c.part for c in scheme.choices} if isinstance(scheme, Scheme) else dict(scheme)
        training = [layer for layer in self.layers if layer.sizes(parts.get(layer.name, "frozen"))]
        if not training:
            return sum(self.times.frozen)
        first = min(layer.start for layer in training)
        return self.times.base(first) + sum(self.part_ms(layer, parts[layer.name]) for layer in training)

    def part_ms(self, layer: LayerCost, part: Part) -> float:
        """The time that training this part of a layer adds to a step."""
        quarter = layer.share(QUARTER) if layer.channels else 1.0
        return self.times.part(layer.name, part, layer.share(part), quarter, layer.sizes(part))


def _layer(name: str, layer: nn.Module, trace: Trace, saves: dict[str, tuple[Save, ...]], shared: bool) -> LayerCost:
    start, end = _clock_of(trace.entered, name), _clock_of(trace.left, name)
    own = {key: value for key, value in layer._parameters.items() if value is not None}
    sliceable = isinstance(layer, SLICEABLE) and name in trace.entered and own["weight"].is_floating_point()
    channels, whole = {}, set()
    for of in ("inputs", "outputs") if sliceable else ():
        dim, step = channels_of(layer, of)
        channels[of] = (own["weight"].shape[dim], step)
        if dim == 0 and getattr(layer, "groups", 1) == 1:
            whole.add(of)
    weight = own.get("weight")
    macs = trace.outputs.get(name, 0) * weight[0].numel() if sliceable and weight is not None else 0
    return LayerCost(
        name=name,
        start=start,
        end=end,
        parameters={key: value.numel() for key, value in own.items()},
        element_bytes=next(iter(own.values())).element_size(),
        shared=shared,
        trainable=_is_floating(layer),
        channels=channels,
        whole_input=frozenset(whole),
        macs=macs,
        saves=saves,
    )


def _clock_of(clocks: Mapping[str, int], name: str) -> int:
    """The clock of a layer, or of the layer around it that reads its weight instead of calling it."""
    while name not in clocks and name:
        name = name.rpartition(".")[0]
    return clocks.get(name, 0)


def _by_owner(saves: Iterable[Save]) -> dict[str | None, tuple[Save, ...]]:
    by_owner: dict[str | None, list[Save]] = {}
    for save in saves:
        by_owner.setdefault(save.owner, []).append(save)
    return {owner: tuple(own) for owner, own in by_owner.items()}


def _is_floating(layer: nn.Module) -> bool:
    return all(p.is_floating_point() for p in layer._parameters.values() if p is not None)


def _has_bias(layer: nn.Module) -> bool:
    return any(trains("bias", key) for key, value in layer._parameters.items() if value is not None)


def _shared(layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers with a parameter that another layer has too."""
    return {name for names in parameter_owners(layers).values() if len(names) > 1 for name in names}
