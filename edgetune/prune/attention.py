"""The attentions of a model: which layers write the values and read the heads, and how modules call their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from edgetune.prune.layers import is_linear

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
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "heads", "n_head")

Units = tuple[tuple[int, ...], ...]  # positions on an axis, by unit


@dataclass(frozen=True)
class Attention:
    """One attention of a group: the layers that write its values and read its heads, and the numbers of heads.

    A unit is one key-value head and the query heads that read it; where all queries read one, a query head.
    `value_rows`: the outputs of `value` that a unit reads.
    """

    name: str
    value: str
    output: str
    heads: int
    kv_heads: int
    units: int
    value_rows: Units

    @property
    def head_dim(self) -> int:
        """Channels of a head's values."""
        return len(self.value_rows[0])

    @property
    def queries_per_unit(self) -> int:
        """Query heads of a unit; they are kept or dropped together."""
        return self.heads // self.units

    def kv_heads_after(self, units: int) -> int:
        """Key-value heads that are left with so many units."""
        return units if self.kv_heads == self.units else self.kv_heads


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
