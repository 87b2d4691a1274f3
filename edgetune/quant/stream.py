"""The residual stream of a recorded model: the layers that write it, that read it, and the norms between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgetune.capture.recorded import Recording, operator_name, shape_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.plain import is_stock
from edgetune.quant.channels import KEEPS, MOVES, split_offset


@dataclass
class Stream:
    """The layers around the residual stream of one model, by name."""

    width: int
    embeddings: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)  # linears whose outputs are added to the stream
    readers: dict[str, str | None] = field(default_factory=dict)  # linears, and the norm whose weight they read through
    norms: dict[str, float] = field(default_factory=dict)  # and what is added to their weight: 1 in Gemma's

    @property
    def layers(self) -> list[str]:
        """The layers whose weights a rotation of the stream changes."""
        return [*self.embeddings, *self.writers, *self.readers, *self.norms]


def find_stream(model: nn.Module, recording: Recording) -> Stream:
    """The stream that begins at the model's first embedding.

    Raises `EdgetuneError`, naming the operator, where an operator on the stream does not commute with rotations.
    """
    return _StreamFinder(model, recording).find()


class _StreamFinder:
    """Spreads from the embedding to every value that must be rotated with it, both to what it is computed from and to
    what reads it."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model, self.recording = model, recording
        self.rotated: set[fx.Node] = set()
        self.gains: dict[fx.Node, str | None] = {}  # the norm whose weight is in a value
        self.squared: set[fx.Node] = set()

    def find(self) -> Stream:
        """Follow the stream to its ends."""
        first = next((n for n in self.recording.graph.nodes if operator_name(n) == "embedding"), None)
        if first is None:
            raise self.refusal("it looks up no embeddings, where the residual stream of a language model begins")
        self.stream = Stream(shape_of(first)[-1])
        self.waiting = [first]
        while self.waiting:
            node = self.waiting.pop()
            if node in self.rotated:
                continue
            self.rotated.add(node)
            if shape_of(node)[-1:] != (self.stream.width,):
                raise self.refuse(node)
            self.waiting += self.sources(node)
            self.waiting += [user for user in node.users if self.passes_on(user, node)]
        self.collect_gains()
        return self.stream

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The values that must be rotated so that this one is."""
        kind, args = operator_name(node), node.args
        if kind == "embedding":
            self.stream.embeddings.add(self.layer(node, args[0], nn.Embedding))
            return []
        if kind == "linear":
            self.stream.writers.add(self.layer(node, args[1], nn.Linear))
            return []
        if kind in ("add", "sub") and all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in args[:2]):
            return list(node.all_input_nodes)
        if kind in ("mul", "div"):
            return [self.split_product(node)[0]]
        if kind in KEEPS or kind == "rms_norm" or (kind == "dropout" and args[2] is False) or self.moves_tokens(node):
            return [args[0]]  # type: ignore[list-item]
        raise self.refuse(node)

    def passes_on(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether what reads a rotated value is then rotated itself."""
        kind = operator_name(user)
        if kind == "linear" and user.args[0] is node:
            self.stream.readers[self.layer(user, user.args[1], nn.Linear)] = None
            return False
        if kind == "type_as" and user.args[0] is not node:
            return False
        if kind == "pow" and user.args[1] == 2 and all(_is_mean_of_channels(mean) for mean in user.users):
            self.squared.add(node)  # a rotation keeps the sum of squares
            return False
        return True

    def split_product(self, node: fx.Node) -> tuple[fx.Node, Any]:
        """A product as the value with the stream's channels, and a factor that is one number for each token or the
        weight of a norm."""
        kind, args = operator_name(node), node.args
        for value, factor in (args[:2], args[1::-1]) if kind == "mul" else (args[:2],):
            if not isinstance(value, fx.Node) or shape_of(value) != shape_of(node) or value is factor:
                continue
            if not isinstance(factor, fx.Node) or shape_of(factor)[-1:] in ((), (1,)):
                return value, None
            weight, _ = split_offset(factor)
            if kind == "mul" and weight in self.recording.names and shape_of(weight) == (self.stream.width,):
                return value, factor
        raise self.refuse(node)

    def collect_gains(self) -> None:
        """Which norm's weight is in each value, in the order of the graph: its readers take it over."""
        for node in self.recording.graph.nodes:
            if node not in self.rotated:
                continue
            kind, factor = operator_name(node), None
            before = {self.gains[n] for n in node.all_input_nodes if n in self.gains and n in self.rotated} - {None}
            if kind == "mul":
                factor = self.split_product(node)[1]
            elif kind == "rms_norm":
                factor = node.args[2] if len(node.args) > 2 else None
            fresh = kind in ("embedding", "linear")  # the stream itself, whatever they read
            if before and not fresh and (factor is not None or kind in ("add", "sub", "rms_norm")):
                raise self.refuse(node)  # the weight of a norm would have to stay in the stream
            if fresh:
                self.gains[node] = None
            else:
                self.gains[node] = self.norm_of(factor) if factor is not None else next(iter(before), None)
            if node in self.squared and self.gains[node] is not None:
                raise self.refuse(node)
            for user in node.users:
                if operator_name(user) == "linear" and user.args[0] is node:
                    self.stream.readers[self.layer(user, user.args[1], nn.Linear)] = self.gains[node]

    def norm_of(self, factor: fx.Node) -> str:
        """The norm whose weight a factor is; nothing but the stream reads it."""
        weight, offset = split_offset(factor)
        names = self.recording.names.get(weight, ())
        readers = self.recording.readers(weight) if names else []
        read_elsewhere = len(readers) > 1 and not all(user in self.rotated for user in readers)
        if len(names) != 1 or not names[0].endswith(".weight") or read_elsewhere:
            raise self.refuse(factor)
        layer = names[0].rpartition(".")[0]
        self.stream.norms[layer] = offset
        return layer

    def layer(self, node: fx.Node, weight: Any, kind: type[nn.Linear] | type[nn.Embedding]) -> str:
        """The one layer of this class whose weight an operator reads; an embedding may be tied to a head."""
        names = [name for name in self.recording.names.get(weight, ()) if name.endswith(".weight")]
        layers = [layer for name in names if isinstance(self.model.get_submodule(layer := name[:-7]), kind)]
        readers = self.recording.readers(weight) if layers else []
        reads = [user for user in readers if operator_name(user) == operator_name(node)]
        if len(layers) != 1 or len(reads) != 1 or len(readers) > len(names):
            raise self.refuse(node)
        module = self.model.get_submodule(layers[0])
        if (kind is nn.Linear and not is_stock(module)) or getattr(module, "max_norm", None) is not None:
            raise self.refuse(node)
        return layers[0]

    def moves_tokens(self, node: fx.Node) -> bool:
        """Whether an operator takes or reorders tokens and leaves the channels of each as they are."""
        source = node.args[0] if node.args else None
        if operator_name(node) not in MOVES or node.all_input_nodes != [source]:
            return False
        channels = torch.arange(self.stream.width)
        numbers = channels.expand(shape_of(source)).contiguous()  # type: ignore[arg-type]
        moved: Any = node.target(numbers, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        return isinstance(moved, Tensor) and moved.shape[-1:] == channels.shape and bool((moved == channels).all())

    def refuse(self, node: fx.Node) -> EdgetuneError:
        """The error for an operator on the stream that a rotation does not pass."""
        kind = operator_name(node)
        if kind == "layer_norm":
            return self.refusal("its LayerNorm subtracts the mean of the channels, which a rotation changes")
        if kind == "output":
            return self.refusal("it returns its hidden states, which a rotation changes")
        names = [name for source in node.all_input_nodes for name in self.recording.names.get(source, ())]
        place = f" with {names[0]}" if names else ""
        return self.refusal(f"a rotation does not pass the operator {kind}{place} on its residual stream")

    def refusal(self, reason: str) -> EdgetuneError:
        """The error for a model that cannot be rotated."""
        return EdgetuneError(
            f"{type(self.model).__name__} cannot be rotated: {reason}",
            action="use smooth instead, or leave rotate out",
        )


def _is_mean_of_channels(node: fx.Node) -> bool:
    return operator_name(node) == "mean" and len(node.args) > 1 and list(node.args[1]) == [-1]  # type: ignore[arg-type]
