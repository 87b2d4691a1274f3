"""The accountant: what training a scheme takes, told from one look at the model, without training the scheme.

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
from edgetune.core.layers import parameter_layers
from edgetune.core.numbers import MIB
from edgetune.quant.size import stored_bytes
from edgetune.sparse.auto.timing import QUARTER, TRIED, Times, measured
from edgetune.sparse.auto.trace import Loss, Save, StorageName, Trace, trace_live, trace_saves
from edgetune.sparse.scheme import Part, Scheme, Slice, Under, trains
from edgetune.sparse.sliced import SLICEABLE, channels_of


@dataclass(frozen=True)
class Updating:
    """How the optimizer takes its step, as far as memory goes; the names are those of `train`."""

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
    saved_bytes: int  # by autograd, for backward
    transient_bytes: int  # what comes on top for a moment at the peak of a step

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
        told = ", ".join(f"{name} {value / MIB:.1f}" for name, value in parts.items())
        return f"{self.scheme}: {self.total_bytes / MIB:.1f} MiB ({told}); at the peak {self.peak_bytes / MIB:.1f}"


@dataclass(frozen=True)
class Layer:
    """What one layer with parameters of its own takes."""

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
    saves: Mapping[str, tuple[Save, ...]]  # for "frozen", "bias", "full", and "alone": full where no gradient passes

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
    def able(self) -> tuple[Part, ...]:
        """The parts that can be timed."""
        if self.shared or not self.trainable:
            return ("frozen",)
        known = [part for part in TRIED if self.channels or not isinstance(part, Slice)]
        return tuple(part for part in known if part == "frozen" or self.sizes(part))

    @property
    def clocks(self) -> range:
        """From entering it to leaving it."""
        return range(self.start, self.end)

    def copied_bytes(self, part: Part) -> int:
        """What a slice takes beside the weight it is part of: its values and the numbers of its channels."""
        if not isinstance(part, Slice):
            return 0
        return self.sliced(part) * self.element_bytes + 8 * round(self.share(part) * self.channels[part.of][0])

    def state_bytes(self, part: Part, updating: Updating) -> int:
        """Of the optimizer."""
        return sum(updating.state_bytes(size) for size in self.sizes(part))

    def share(self, part: Part) -> float:
        """How much of the product that gives a weight's gradient has to be computed."""
        if isinstance(part, Slice):
            channels, step = self.channels[part.of]
            return self._groups(part) * step / channels
        return float(part == "full")

    def kept(self, part: Part, passed: bool = True) -> list[Save]:
        """What is saved in this layer when `part` of it trains, and a gradient passes it or starts here."""
        if not isinstance(part, Slice):
            if passed:
                return list(self.saves[part])
            return list(self.saves["alone"]) if part == "full" else []
        passing = list(self.saves["bias"])
        known = {save.storage for save in passing}
        share = 1.0 if part.of in self.whole_input else self.share(part)
        mine = []
        for save in self.saves["full"]:
            if save.storage not in known and share == 1.0:
                mine.append(save)
            elif save.storage not in known:  # a copy of some channels, which nobody else saves
                mine.append(save._replace(storage=(*save.storage, self.name), nbytes=round(save.used * share)))
        return passing + mine if passed else mine


@dataclass(frozen=True)
class Profile:
    """What the accountant knows of a model and a batch. Holds no tensor."""

    layers: tuple[Layer, ...]  # in the order in which they run
    between: tuple[Save, ...]  # saved outside of all layers
    live: tuple[int, ...]  # bytes at each clock of a forward of which nothing is saved
    times: Times
    weights_bytes: int

    @classmethod
    def of(cls, model: nn.Module, batch: tuple[Inputs, Tensor], loss: Loss, under: Under) -> Profile:
        """Look at `model` by some forwards of `batch`, and time some steps that train a part of every layer.

        `under` puts the model under a scheme: see `SparseUpdate.under`. The model is left as it was.
        """
        layers = parameter_layers(model)
        shared, able = _shared(layers), {name: _floating(layer) for name, layer in layers.items()}

        def look(parts: Mapping[str, Part], alone: bool = False) -> Trace:
            with under(parts):
                return trace_saves(model, batch, loss, alone)

        everything: dict[str, Part] = {name: "full" if able[name] else "frozen" for name in layers}
        full = look(everything)
        order = sorted(layers, key=lambda name: (_of_called(full.entered, name), list(layers).index(name)))
        first = next((name for name in order if able[name] and name not in shared), None)
        if first is None:
            raise EdgetuneError("no layer of this model can train", action="leave some layers out of nf4")
        frozen = look({first: "full"})
        biases = {n: "bias" for n in layers if able[n] and n not in shared and _has_bias(layers[n])}
        bias = look({**biases, first: "full"}) if set(biases) - {first} else frozen  # type: ignore[dict-item]
        traces = {"frozen": frozen, "bias": bias, "full": full, "alone": look(everything, alone=True)}
        owned = {part: _by_owner(trace.saves) for part, trace in traces.items()}
        owned["frozen"][first] = owned["bias"][first] = ()  # it was what trained; no gradient passes the first layer
        with under({first: "full"}):
            live = trace_live(model, batch, loss)
        found = tuple(
            _layer(name, layers[name], full, {part: owned[part].get(name, ()) for part in owned}, name in shared)
            for name in order
        )
        return cls(
            layers=found,
            between=owned["frozen"].get(None, ()),
            live=tuple(live),
            times=measured(
                model,
                batch,
                loss,
                under,
                order,
                {layer.name: layer.able for layer in found},
                {layer.name: layer.clocks for layer in found},
            ),
            weights_bytes=stored_bytes(model),
        )

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)

    def kept(self, parts: Mapping[str, Part]) -> list[Save]:
        """Every storage that a scheme saves, once."""
        training = [layer for layer in self.layers if parts.get(layer.name, "frozen") != "frozen"]
        training = [layer for layer in training if layer.sizes(parts[layer.name])]
        if not training:
            return []
        first = min(training, key=lambda layer: layer.start)
        saves = [save for save in self.between if save.clock > first.start]
        for layer in self.layers:
            saves += layer.kept(parts.get(layer.name, "frozen"), passed=layer.start > first.start)
        last: dict[StorageName, Save] = {}
        for save in sorted(saves, key=lambda save: save.clock):
            last[save.storage] = save
        # what an operator that is passed saves whole serves a slice too
        passing = {save.storage for save in self.passing(first.start)}
        return [save for name, save in last.items() if not (name[-1] in parts and name[:-1] in passing)]

    def passing(self, start: int) -> list[Save]:
        """What is saved only because a gradient that starts here passes."""
        saves = [save for save in self.between if save.clock > start]
        return saves + [s for layer in self.layers if layer.start > start for s in layer.kept("frozen")]

    def account(self, scheme: Scheme | Mapping[str, Part], updating: Updating | None = None) -> Account:
        """The memory of training `scheme`, predicted."""
        updating = updating or Updating()
        parts = {c.layer: c.part for c in scheme.choices} if isinstance(scheme, Scheme) else dict(scheme)
        training = list(self._unshared(parts))
        sizes = [size * layer.element_bytes for layer in training for size in layer.sizes(parts[layer.name])]
        largest = max(sizes, default=0)
        held = largest if updating.in_backward else sum(sizes)
        kept = self.kept(parts)
        saved_bytes = sum(save.nbytes for save in kept)
        peak = max(self._peak(kept, parts, largest, updating), held + 2 * largest)
        return Account(
            scheme=scheme.name if isinstance(scheme, Scheme) else "written",
            weights_bytes=self.weights_bytes + sum(layer.copied_bytes(parts[layer.name]) for layer in training),
            gradients_bytes=held,
            optimizer_bytes=sum(layer.state_bytes(parts[layer.name], updating) for layer in training),
            saved_bytes=saved_bytes,
            transient_bytes=peak - saved_bytes - held,
        )

    def _unshared(self, parts: Mapping[str, Part]) -> Iterable[Layer]:
        """The layers that train, a tied one once."""
        seen: set[tuple[int, ...]] = set()
        for layer in self.layers:
            if parts.get(layer.name, "frozen") == "frozen":
                continue
            sizes = tuple(sorted(layer.parameters.values()))
            if not layer.shared or sizes not in seen:
                yield layer
            if layer.shared:
                seen.add(sizes)

    def _peak(self, kept: list[Save], parts: Mapping[str, Part], largest: int, updating: Updating) -> int:
        """Bytes beside weights and optimizer state at the fullest moment of forward and backward.

        At a clock of backward there is what forward had saved until then, the gradients of later layers, and gradients
        of the activations, taken to be as large as what forward holds at that clock when nothing is saved. At the loss,
        the last clock, what is saved is among what forward holds; in the first layer no gradient of an input is made.
        """
        last = len(self.live) - 1
        keeps, arrives = [0] * (last + 2), [0] * (last + 2)
        for save in kept:
            keeps[save.clock + (save.clock == last)] += save.nbytes
        training = list(self._unshared(parts))
        for layer in training:
            arrives[layer.start] += sum(layer.sizes(parts[layer.name])) * layer.element_bytes
        most, before, after = max(self.live), 0, sum(arrives)
        first = min(training, key=lambda layer: layer.start, default=None)
        for clock in range(first.start if first else last + 1, last + 1):
            before += keeps[clock]
            if first and clock >= first.end:
                most = max(most, before + (largest if updating.in_backward else after) + self.live[clock])
            after -= arrives[clock]
        return max(most, sum(keeps))

    def step_ms(self, scheme: Scheme | Mapping[str, Part]) -> float:
        """Time of a step: forward, the gradient through what comes after the first layer, the weights', AdamW's."""
        parts = {c.layer: c.part for c in scheme.choices} if isinstance(scheme, Scheme) else dict(scheme)
        training = [layer for layer in self.layers if layer.sizes(parts.get(layer.name, "frozen"))]
        if not training:
            return sum(self.times.frozen)
        first = min(layer.start for layer in training)
        return self.times.base(first) + sum(self.part_ms(layer, parts[layer.name]) for layer in training)

    def part_ms(self, layer: Layer, part: Part) -> float:
        """What training this part of a layer adds to the time of a step."""
        quarter = layer.share(QUARTER) if layer.channels else 1.0
        return self.times.part(layer.name, part, layer.share(part), quarter, layer.sizes(part))


def _layer(name: str, layer: nn.Module, trace: Trace, saves: dict[str, tuple[Save, ...]], shared: bool) -> Layer:
    start, end = _of_called(trace.entered, name), _of_called(trace.left, name)
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
    return Layer(
        name=name,
        start=start,
        end=end,
        parameters={key: value.numel() for key, value in own.items()},
        element_bytes=next(iter(own.values())).element_size(),
        shared=shared,
        trainable=_floating(layer),
        channels=channels,
        whole_input=frozenset(whole),
        macs=macs,
        saves=saves,
    )


def _of_called(clocks: Mapping[str, int], name: str) -> int:
    """The clock of a layer, or of the layer around it that reads its weight instead of calling it."""
    while name not in clocks and name:
        name = name.rpartition(".")[0]
    return clocks.get(name, 0)


def _by_owner(saves: Iterable[Save]) -> dict[str | None, tuple[Save, ...]]:
    found: dict[str | None, list[Save]] = {}
    for save in saves:
        found.setdefault(save.owner, []).append(save)
    return {owner: tuple(own) for owner, own in found.items()}


def _floating(layer: nn.Module) -> bool:
    return all(p.is_floating_point() for p in layer._parameters.values() if p is not None)


def _has_bias(layer: nn.Module) -> bool:
    return any(trains("bias", key) for key, value in layer._parameters.items() if value is not None)


def _shared(layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers with a parameter that another layer has too."""
    names_of: dict[int, list[str]] = {}
    for name, layer in layers.items():
        for parameter in layer._parameters.values():
            if parameter is not None:
                names_of.setdefault(id(parameter), []).append(name)
    return {name for names in names_of.values() if len(names) > 1 for name in names}
