"""Rotate the channels between layers, so that no channel is much larger than the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from edgetune.capture.recorded import record
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.channels import ChannelGroup, check_outputs, find_groups, refuse_infinite, refuse_unplain, weight_of
from edgetune.quant.hadamard import random_rotation
from edgetune.quant.rotated_gain import add_gain, rebuild_gains, remove_gain
from edgetune.quant.stream import Stream, find_stream

_ROWS = 8192  # of a weight at a time, in fp64


class Rotate(Technique):
    """Rotate the hidden states of a language model, so that quantization loses less; the outputs of the model stay.

    A random Hadamard matrix is multiplied into the weights that write the residual stream and its transpose into those
    that read it, after the weights of the RMS norms between were multiplied into the readers (QuaRot, arXiv:2404.00456;
    SpinQuant, arXiv:2405.16406, R1). Put it before a step of quantization, and compare with the model without it: it
    helps where outliers of activations are what rounding spoils, but weights that are rounded in small groups can lose
    by it.

    Nothing is added to the model, unless its head shares its weight with the embedding: then that weight cannot take
    over the weight of the last norm. `tied` says whether the head gets a weight of its own, which stores a second
    table, or the norm a small linear for it, `NAME.gain`.

    Raises `EdgetuneError` for a model in which something else reads the stream, such as the LayerNorm of BERT, ViT and
    GPT-2, which subtracts a mean.
    """

    name: ClassVar[str] = "rotate"
    exact: ClassVar[bool] = True
    takes: ClassVar[Trait] = Trait.PLAIN

    heads: bool = True
    """Rotate the values of each attention head too, where only the output projection reads them (SpinQuant's R2)."""
    tied: Literal["keep", "untie"] = "untie"
    """What becomes of a head that shares its weight with the embedding. `untie`: it gets its own weight, so the model
    grows by a table, and `config.tie_word_embeddings` becomes False. `keep`: it still shares it, and a linear of
    hidden x hidden weights follows the last norm, which `from_pretrained` of transformers does not restore."""
    seed: int = 0
    """The seed of the random signs."""

    @property
    def needs(self) -> Needs:
        """Example inputs to follow the stream."""
        return "inputs"

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Rotate in place. Raises `EdgetuneError`, and leaves the weights as they were, if that changes the outputs."""
        sample = self.require_sample(sample)
        refuse_unplain(model, self.name)
        recording = record(model, sample.inputs)
        stream = find_stream(model, recording)
        groups = [g for g in find_groups(model, recording, mixes=True) if _is_rotatable(g)] if self.heads else []
        layers = [*stream.layers, *(name for group in groups for name in group.layers)]
        refuse_infinite(model, layers)
        tied, rotation = _find_tied(model, stream), random_rotation(stream.width, self.seed)
        kept = {stream.readers[name] for name in tied} if self.tied == "keep" else set()
        with _restore_norms(model, stream), check_outputs(model, sample.inputs, layers), torch.no_grad():
            if self.tied == "untie":
                _untie(model, tied)
            _fold_norms(model, stream, kept, rotation)
            _rotate_stream(model, stream, rotation)
            for number, group in enumerate(groups):
                _rotate_heads(model, group, self.seed + number + 1)
        config = getattr(model, "config", None)
        if self.tied == "untie" and tied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]  # so that nothing ties them again
        return model

    def rebuild(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """The linear after the last norm."""
        return rebuild_gains(model, state)


def _find_tied(model: nn.Module, stream: Stream) -> list[str]:
    """The readers that share their weight with an embedding."""
    tables = {id(weight_of(model, name)) for name in stream.embeddings}
    return [name for name in stream.readers if id(weight_of(model, name)) in tables]


def _untie(model: nn.Module, tied: Sequence[str]) -> None:
    """Give these layers a weight of their own."""
    for name in tied:
        weight = weight_of(model, name)
        own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        model.get_submodule(name).weight = own


@contextmanager
def _restore_norms(model: nn.Module, stream: Stream) -> Iterator[None]:
    """Take the linears away from the norms if the body raises."""
    try:
        yield
    except BaseException:
        for norm in stream.norms:
            remove_gain(model.get_submodule(norm))
        raise


def _fold_norms(model: nn.Module, stream: Stream, kept: Collection[str | None], rotation: Tensor) -> None:
    """Multiply the weight of each norm into the columns of its readers; those of `kept` apply it themselves."""
    for name, norm in stream.readers.items():
        if norm is not None and norm not in kept:
            gain = weight_of(model, norm).double() + stream.norms[norm]
            _multiply_columns(weight_of(model, name), gain.diag())
    for norm, offset in stream.norms.items():
        if norm in kept:
            add_gain(model.get_submodule(norm), offset, rotation)
        else:
            weight_of(model, norm).fill_(1.0 - offset)


def _rotate_stream(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    weights = [weight_of(model, name) for name in (*stream.embeddings, *stream.readers)]
    for weight in {id(weight): weight for weight in weights}.values():  # one that is shared once
        _multiply_columns(weight, rotation)
    for name in stream.writers:
        _multiply_rows(model.get_submodule(name), rotation, range(stream.width))


def _rotate_heads(model: nn.Module, group: ChannelGroup, seed: int) -> None:
    """Rotate the values of each head, and back in the columns of what reads them."""
    for head in group.heads:
        rotation = random_rotation(len(head), seed)
        _multiply_rows(model.get_submodule(group.producer.layer), rotation, head)
        for name, channels in group.readers.items():
            for columns, read in _split_heads(channels, len(head)):
                if read == head:
                    _multiply_columns(weight_of(model, name)[:, columns], rotation)


def _is_rotatable(group: ChannelGroup) -> bool:
    """Whether the channels are heads of one width, which these linears alone read, head by head."""
    channels = [channel for head in group.heads for channel in head]
    if not channels or len(set(channels)) < len(channels) or len(set(map(len, group.heads))) > 1:
        return False
    width = len(group.heads[0])
    read = {head for each in group.readers.values() for _, head in _split_heads(each, width)}
    return read == set(group.heads) and bool(group.free[channels].all())


def _split_heads(channels: Tensor, width: int) -> list[tuple[slice, tuple[int, ...]]]:
    """The columns of a linear head by head, and the channels behind them."""
    starts = range(0, len(channels), width)
    return [(slice(start, start + width), tuple(channels[start : start + width].tolist())) for start in starts]


def _multiply_columns(weight: Tensor, matrix: Tensor) -> None:
    for rows in torch.split(weight, _ROWS):
        rows.copy_(rows.double() @ matrix.to(rows.device))


def _multiply_rows(layer: nn.Module, matrix: Tensor, rows: Sequence[int]) -> None:
    """Of the weight and the bias, by the transpose."""
    for tensor in (layer.weight, layer.bias):
        if isinstance(tensor, Tensor):
            own = torch.as_tensor(list(rows), device=tensor.device)
            tensor[own] = (matrix.t().to(tensor.device) @ tensor[own].double()).to(tensor.dtype)
