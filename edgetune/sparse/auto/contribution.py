"""Estimate what training each layer contributes, by Fisher information.

It replaces the short trainings of Lin et al., On-device training under 256KB memory, 2022, arXiv:2206.15472,
section 3.2. Values add up in the search, an approximation that they make too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.inputs import Inputs, call, device_of, logits_of, rows_of, tensors_of, to_device
from edgetune.core.layers import parameter_layers, parameter_owners
from edgetune.core.modes import preserve_state, preserve_trainability
from edgetune.core.technique import Settings
from edgetune.data.dataset import cache_folder
from edgetune.sparse.auto.trace import Loss
from edgetune.sparse.scheme import Part, Slice, part_from_json, part_to_json, trains
from edgetune.sparse.sliced import SLICEABLE, channels_of, strongest_channels

_VERSION = 2  # of what is computed; another number leaves old caches alone

By = Literal["magnitude", "gradient", "fisher"]
Labelled = tuple[Inputs, Tensor]


class Analysis(Settings):
    """Settings of a contribution analysis."""

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)  # of the input channels, beside the whole layer
    by: By = "fisher"  # how the channels of a slice are chosen
    rows_at_once: int = Field(default=4, ge=1)  # whose gradients are squared together


@dataclass(frozen=True)
class Contributions:
    """The contribution of each part of each layer; more of a layer never contributes less."""

    values: Mapping[str, Mapping[Part, float]]
    cached: bool = False

    def __str__(self) -> str:
        best = sorted(self.values, key=lambda name: -max(self.values[name].values(), default=0.0))
        lines = [f"contributions by fisher, of {len(self.values)} layers the best:"]
        for name in best[:12]:
            parts = ", ".join(f"{part} {value:.3g}" for part, value in self.values[name].items())
            lines.append(f"  {name}: {parts}")
        return "\n".join(lines)

    def dumps(self) -> str:
        """As JSON."""
        values = {n: [[part_to_json(part), value] for part, value in own.items()] for n, own in self.values.items()}
        return json.dumps(values)

    @classmethod
    def loads(cls, text: str) -> Contributions:
        """What `dumps` wrote, marked as cached."""
        values = {n: {part_from_json(part): value for part, value in own} for n, own in json.loads(text).items()}
        return cls(values, cached=True)


def analyze_contributions(
    model: nn.Module,
    labelled: Iterable[Labelled],
    loss: Loss,
    analysis: Analysis | None = None,
    *,
    head: Sequence[str] = (),
    cache: bool = True,
) -> Contributions:
    """The contribution of training each layer of `model`, which is left as it was.

    Args:
        model: not under a sparse update.
        labelled: training batches with their labels; a few.
        loss: `(logits, labels)` -> mean loss.
        analysis: settings.
        head: layers that train in any case, as a new head must; they are no candidates.
        cache: keep the result under the cache folder, by the hash of weights, data and settings.
    """
    analysis = analysis or Analysis()
    batches = list(labelled)
    if not batches:
        raise EdgetuneError("contribution analysis needs batches with labels", exit_code=Exit.DATA)
    path = cache_folder() / "contributions" / f"{_digest(model, batches, analysis, head)}.json"
    if cache and path.is_file():
        return Contributions.loads(path.read_text(encoding="utf-8"))
    contributed = Contributions(score_by_fisher(model, candidates(model, head), batches, loss, analysis))
    if cache:
        write_atomically(path, contributed.dumps())
    return contributed


def candidates(model: nn.Module, head: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Layers that could train alone: with floating-point parameters that no other layer shares, called themselves."""
    layers = parameter_layers(model)
    owners = parameter_owners(layers)
    return {
        name: layer
        for name, layer in layers.items()
        if name not in head
        and all(p.is_floating_point() and len(owners[id(p)]) == 1 for p in layer._parameters.values() if p is not None)
    }


def _parts(layer: nn.Module, analysis: Analysis) -> list[Part]:
    """What may train in a layer, the smallest part first."""
    own = [key for key, value in layer._parameters.items() if value is not None]
    parts: list[Part] = ["bias"] if any(trains("bias", key) for key in own) else []
    if isinstance(layer, SLICEABLE) and layer.weight.numel() > max(layer.weight.shape):
        parts += [Slice(ratio=ratio, by=analysis.by) for ratio in sorted(analysis.ratios)]
    return [*parts, "full"] if any(not trains("bias", key) for key in own) else parts


# By Fisher information


def each_gradient(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Labelled],
    loss: Loss,
    rows_at_once: int,
    use: Callable[[str, str, Tensor], None],
) -> int:
    """Call `use(layer, parameter, gradient)` for every few rows, as soon as the gradient exists; then it is dropped.

    In eval mode, so that no dropout and no batch statistics blur it. Returns how often each parameter had its turn.
    Memory: one gradient at a time, and what backward of `rows_at_once` rows saves.
    """
    turns, device = 0, device_of(model)
    with _only_trains(model, layers), preserve_state(model), _hand_over_gradients(layers, use):
        for inputs, labels in batches:
            for start in range(0, len(labels), rows_at_once):
                stop = min(start + rows_at_once, len(labels))
                part, wanted = to_device(rows_of(inputs, start, stop), device), labels[start:stop].to(device)
                if (wanted == -100).all():
                    continue
                with torch.enable_grad():
                    loss(logits_of(call(model, part)), wanted).backward()  # type: ignore[no-untyped-call]
                turns += 1
    return turns


@contextmanager
def _only_trains(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Only these layers' parameters take part inside."""
    chosen = {id(p) for layer in layers.values() for p in layer._parameters.values() if p is not None}
    with preserve_trainability(model):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in chosen)
        yield


@contextmanager
def _hand_over_gradients(layers: Mapping[str, nn.Module], use: Callable[[str, str, Tensor], None]) -> Iterator[None]:
    """Pass each gradient to `use` during backward, then drop it."""

    def hook(name: str, key: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            use(name, key, parameter.grad)
            parameter.grad = None

        return take

    with ExitStack() as hooks:
        for name, layer in layers.items():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    hooks.enter_context(parameter.register_post_accumulate_grad_hook(hook(name, key)))  # type: ignore[no-untyped-call]
        yield


def weight_scores(
    model: nn.Module, names: Iterable[str], batches: Iterable[Labelled], loss: Loss, by: By, rows_at_once: int = 4
) -> dict[str, Tensor]:
    """Scores of the shape of each layer's weight, to choose a slice's channels by."""
    layers = {name: model.get_submodule(name) for name in names}
    totals: dict[str, Tensor] = {}

    def add(name: str, key: str, gradient: Tensor) -> None:
        if key == "weight":
            term = gradient.square() if by == "fisher" else gradient
            totals[name] = totals[name].add_(term) if name in totals else term.clone()

    turns = each_gradient(model, layers, batches, loss, rows_at_once, add)
    return {name: (total / turns).abs() for name, total in totals.items()}


def score_by_fisher(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Labelled], loss: Loss, analysis: Analysis
) -> dict[str, dict[Part, float]]:
    """Contributions by empirical Fisher information, the mean squared gradient of a few rows at a time.

    Adam moves every value by about the learning rate, so the loss falls at first by the learning rate times the sum
    of the gradient's absolute values. Of a channel with n values and Fisher information F that is about sqrt(n F),
    and that is what a channel is worth; a layer is worth the sum over the channels that train. Unlike F itself this
    is neither ruled by a few large gradients nor by the layer's size alone.
    """
    sums: dict[tuple[str, str, int], Tensor] = {}

    def add(name: str, key: str, gradient: Tensor) -> None:
        squares = gradient.float().square()
        for dim in range(min(2, squares.dim())):
            sums_of_dim = squares.sum([d for d in range(squares.dim()) if d != dim]) if squares.dim() > 1 else squares
            at = (name, key, dim)
            sums[at] = sums[at] + sums_of_dim if at in sums else sums_of_dim

    turns = each_gradient(model, layers, batches, loss, analysis.rows_at_once, add)
    if not turns:
        raise EdgetuneError("no label of these batches counts", exit_code=Exit.DATA)
    values: dict[str, dict[Part, float]] = {}
    for name, layer in layers.items():
        worth = {at[1:]: _worth(layer._parameters[at[1]], at[2], sums[at] / turns) for at in sums if at[0] == name}
        values[name] = {part: _worth_of(layer, part, worth) for part in _parts(layer, analysis)}
    return values


def _worth(parameter: Tensor | None, dim: int, fisher: Tensor) -> Tensor:
    """What each channel of a parameter is worth."""
    assert parameter is not None
    return (fisher * (parameter.numel() / parameter.shape[dim])).sqrt()


def _worth_of(layer: nn.Module, part: Part, worth: Mapping[tuple[str, int], Tensor]) -> float:
    """The sum over what trains. Of a table with rows seldom used, its columns say too much: the less counts."""
    keys = {key for key, _ in worth if trains("bias" if isinstance(part, Slice) else part, key)}
    total = sum(min(float(worth[key, d].sum()) for d in (0, 1) if (key, d) in worth) for key in keys)
    if not isinstance(part, Slice):
        return total
    dim, _ = channels_of(layer, part.of)
    channels = worth.get(("weight", dim))
    if channels is None:
        return total
    if part.by == "fisher":
        # scores of the weight's shape, as `strongest_channels` takes them: all of a channel's in its first value
        shape = [1] * layer.weight.dim()  # type: ignore[union-attr, operator]
        shape[dim] = len(channels)
        indices, _ = strongest_channels(layer, part.ratio, part.of, channels.square().view(shape))
    else:
        indices, _ = strongest_channels(layer, part.ratio, part.of)
    return total + float(channels[indices].sum())


def _digest(model: nn.Module, batches: Sequence[Labelled], analysis: Analysis, head: Sequence[str]) -> str:
    """SHA-256 of everything that the result depends on."""
    digest = hashlib.sha256(repr((_VERSION, analysis.model_dump(), sorted(head), torch.__version__)).encode())
    tensors = [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    for number, (inputs, labels) in enumerate(batches):
        tensors += [(f"{number}", tensor) for tensor in (*tensors_of(inputs), labels)]
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(str(type(model)).encode())
    return digest.hexdigest()
