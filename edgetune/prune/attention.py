"""Attention as its layers and numbers: which linears write queries, keys and values, and how many heads they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from edgetune.technique import EdgetuneError

# Names of the three projections, as transformers, timm and diffusers have them; a fused one is stored q, k, v.
SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
FUSED = ("qkv",)
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "heads")
HEAD_SIZES = ("attention_head_size", "head_dim", "dim_per_head", "attn_head_size")


@dataclass(frozen=True)
class Attention:
    """One attention: layer names, and heads of `head_dim` channels. `query == value` in a fused linear."""

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def fused(self) -> bool:
        """Whether one linear writes queries, keys and values, in this order."""
        return self.query == self.value

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write queries, keys and values."""
        return (self.query,) if self.fused else (self.query, self.key, self.value)

    @property
    def queries_per_unit(self) -> int:
        """Query heads that read one key-value head; they are kept or dropped together."""
        return self.heads // self.kv_heads


def projections(module: nn.Module) -> tuple[str, str, str] | None:
    """The child names of queries, keys and values, if `module` is an attention of plain linears."""
    linears = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for names in SEPARATE:
        if linears.issuperset(names):
            return names
    for fused in FUSED:
        if fused in linears:
            return fused, fused, fused
    return None


def attention_names(model: nn.Module) -> list[str]:
    """The dotted names of all attentions, those with raw parameters (`nn.MultiheadAttention`) included."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) or projections(m) is not None]


def block_of(model: nn.Module, name: str) -> str:
    """The repeated block an attention stands in, `encoder.layer.3`; without one, its parent."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        parent = ".".join(parts[: end - 1])
        if parts[end - 1].isdigit() and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[:end])
    return ".".join(parts[:-1])


def describe(model: nn.Module, name: str, reader: Callable[[str], list[str]]) -> Attention:
    """The attention called `name`; `reader` gives the linears that read what a layer writes.

    Raises `EdgetuneError` when its heads cannot be told from its attributes, or its output projection from the graph.
    """
    module = model.get_submodule(name)
    found = projections(module)
    if found is None:
        raise EdgetuneError(
            f"{name} keeps queries, keys and values in one raw parameter, which cannot be cut by heads",
            got=type(module).__name__,
            action=f'leave it out (skip: ["{name}"]), or prune what: ["ffn"] only',
        )
    query, key, value = (f"{name}.{child}" if name else child for child in found)
    parts = 3 if query == value else 1
    wide, narrow = _width(model, query) // parts, _width(model, value) // parts
    head_dim = head_size(model, name)
    if wide % head_dim or narrow % head_dim or wide % narrow or _width(model, key) // parts != narrow:
        raise EdgetuneError(f"{name}: its widths are no whole heads", got=(wide, narrow, head_dim), action="skip it")
    outputs = [layer for layer in reader(value) if model.get_parameter(f"{layer}.weight").shape[1] == wide]
    if len(outputs) != 1:
        raise EdgetuneError(f"{name}: no single output projection reads its heads", got=outputs, action="skip it")
    return Attention(name, query, key, value, outputs[0], wide // head_dim, narrow // head_dim, head_dim)


def _width(model: nn.Module, layer: str) -> int:
    return model.get_parameter(f"{layer}.weight").shape[0]


def head_size(model: nn.Module, name: str) -> int:
    """Channels of one head of the attention called `name`, from its own attributes."""
    module = model.get_submodule(name)
    for attribute in HEAD_SIZES:
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    query, key, _ = projections(module) or ("", "", "")
    wide = _width(module, query) // (3 if query == key else 1)
    for attribute in HEAD_COUNTS:
        heads = getattr(module, attribute, None)
        if isinstance(heads, int) and heads > 0:
            return wide // heads
    raise EdgetuneError(
        f"{name}: an attention that does not say how many heads it has",
        allowed=(*HEAD_COUNTS, *HEAD_SIZES),
        action="set one of these attributes on the module, or skip it",
    )
