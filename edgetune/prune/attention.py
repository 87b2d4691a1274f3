"""Find the attentions of a model: the linears that write queries, keys and values, and their numbers of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from edgetune.core.errors import EdgetuneError
from edgetune.prune.layers import is_linear, width_of

# Names of the three projections, as transformers, timm and diffusers have them.
SEPARATE = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)
FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "heads")
HEAD_SIZES = ("attention_head_size", "head_dim", "dim_per_head", "attn_head_size", "head_size", "key_value_proj_dim")

Units = tuple[tuple[int, ...], ...]  # positions on an axis, by unit
UnitsAgree = Callable[[str, str, Units, Units], bool]  # writer, reader, and the positions of each


@dataclass(frozen=True)
class Attention:
    """One attention: layer names, and heads of `head_dim` channels.

    A unit is one key-value head and the query heads that read it. `fused_rows` are the outputs of a unit in the one
    linear that writes queries, keys and values, in this order; `None` where three linears do.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    fused_rows: Units | None = None

    @property
    def fused(self) -> bool:
        """Whether one linear writes queries, keys and values."""
        return self.fused_rows is not None

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write queries, keys and values."""
        return (self.query,) if self.fused else (self.query, self.key, self.value)

    @property
    def queries_per_unit(self) -> int:
        """Query heads that read one key-value head; they are kept or dropped together."""
        return self.heads // self.kv_heads


def find_projections(module: nn.Module) -> tuple[str, str, str] | None:
    """The child names of queries, keys and values, if `module` is an attention of plain linears."""
    linears = {name for name, child in module.named_children() if is_linear(child)}
    for names in SEPARATE:
        if linears.issuperset(names):
            return names
    for fused in FUSED:
        if fused in linears:
            return fused, fused, fused
    return None


def attention_names(model: nn.Module) -> list[str]:
    """The dotted names of all attentions, those with raw parameters (`nn.MultiheadAttention`) included."""
    return [
        n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) or find_projections(m) is not None
    ]


def display_name(name: str) -> str:
    """A module's dotted name for messages; the whole model has none."""
    return name or "(the whole model)"


def skip_action(name: str) -> str:
    """The action that leaves an attention out; the whole model cannot be named in `skip`."""
    only = 'prune what: ["ffn"] only'
    return f'leave it out: skip: ["{name}"], or {only}' if name else only


def block_of(model: nn.Module, name: str) -> str:
    """The outermost repeated block around an attention, such as `encoder.layer.3`; if there is none, its parent.

    Outermost, since in T5 the parts of a block are numbered too: `block.0.layer.1` is its FFN.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        parent = ".".join(parts[: end - 1])
        if parts[end - 1].isdigit() and isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential)):
            return ".".join(parts[:end])
    return ".".join(parts[:-1])


def describe(model: nn.Module, name: str, readers: Callable[[str], list[str]], agree: UnitsAgree) -> Attention:
    """The attention called `name`; `readers` gives the linears that read what a layer writes.

    `agree` says whether a writer's and a reader's positions belong to the same units, as the order of heads in a fused
    linear is not in its name. Raises `EdgetuneError` if the attributes do not give the heads, or the graph does not
    give the output projection.
    """
    children = find_projections(model.get_submodule(name))
    if children is None:
        raise EdgetuneError(
            f"{display_name(name)} keeps queries, keys and values in one raw parameter, which cannot be cut by heads",
            got=type(model.get_submodule(name)).__name__,
            action=skip_action(name),
        )
    query, key, value = (f"{name}.{child}" if name else child for child in children)
    head_dim = find_head_size(model, name)
    if query == value:
        return _describe_fused(model, name, query, readers, agree, head_dim)
    wide, narrow = _width(model, query), _width(model, value)
    if wide % head_dim or narrow % head_dim or wide % narrow or _width(model, key) != narrow:
        raise _refusal(name, "its widths are no whole heads", (wide, narrow, head_dim))
    outputs = [layer for layer in readers(value) if width_of(model.get_submodule(layer), "in") == wide]
    if len(outputs) != 1:
        raise _refusal(name, "no single output projection reads its heads", outputs)
    return Attention(name, query, key, value, outputs[0], wide // head_dim, narrow // head_dim, head_dim)


def _describe_fused(
    model: nn.Module, name: str, layer: str, readers: Callable[[str], list[str]], agree: UnitsAgree, head_dim: int
) -> Attention:
    """Two orders are tried: all queries, then all keys, then all values; or unit after unit."""
    outputs = readers(layer)
    if len(outputs) != 1:
        raise _refusal(name, "no single output projection reads its heads", outputs)
    rows, wide = _width(model, layer), width_of(model.get_submodule(outputs[0]), "in")
    heads = wide // head_dim
    units = (rows // head_dim - heads) // 2
    if wide % head_dim or rows % head_dim or units < 1 or heads % units or rows != (heads + 2 * units) * head_dim:
        raise _refusal(name, "its widths are no whole heads", (rows, wide, head_dim))
    queries = heads // units * head_dim
    read = spans(units, queries)
    for of_unit in (
        spans(units, (queries, 0), (head_dim, wide), (head_dim, wide + units * head_dim)),
        spans(units, queries + 2 * head_dim),
    ):
        if agree(layer, outputs[0], of_unit, read):
            return Attention(name, layer, layer, layer, outputs[0], heads, units, head_dim, of_unit)
    raise _refusal(name, f"the order of the heads in the outputs of {layer} is unknown or mixed", (rows, wide))


def _refusal(name: str, reason: str, got: object) -> EdgetuneError:
    return EdgetuneError(
        f"the heads of {display_name(name)} cannot be pruned: {reason}", got=got, action=skip_action(name)
    )


def spans(units: int, *parts: int | tuple[int, int]) -> Units:
    """Positions of each unit that has a span in every part: of so many positions, and where the part begins."""
    pairs = [part if isinstance(part, tuple) else (part, 0) for part in parts]
    return tuple(tuple(start + u * width + i for width, start in pairs for i in range(width)) for u in range(units))


def _width(model: nn.Module, layer: str) -> int:
    return width_of(model.get_submodule(layer), "out")


def find_head_size(model: nn.Module, name: str) -> int:
    """Channels of one head of the attention called `name`, from its own attributes."""
    module = model.get_submodule(name)
    for attribute in HEAD_SIZES:
        size = getattr(module, attribute, None)
        if isinstance(size, int) and size > 0:
            return size
    query, key, _ = find_projections(module) or ("", "", "")
    wide = _width(module, query) // (3 if query == key else 1)
    for attribute in HEAD_COUNTS:
        heads = getattr(module, attribute, None)
        if isinstance(heads, int) and heads > 0:
            return wide // heads
    raise EdgetuneError(
        f"the attention {display_name(name)} does not say how many heads it has",
        got=type(module).__name__,
        allowed=(*HEAD_COUNTS, *HEAD_SIZES),
        action=f"set one of them, as in {type(module).__name__}.{HEAD_COUNTS[1]} = 8, or {skip_action(name)}",
    )
