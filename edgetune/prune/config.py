"""The configs of transformers after a cut: `from_pretrained` builds a model as deep and as wide, if it can."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from edgetune.core.quiet import silence_libraries
from edgetune.prune.attention import HEAD_COUNTS
from edgetune.prune.changes import Changes
from edgetune.prune.groups import Cut

Kept = Mapping[str, tuple[int, Sequence[int]]]  # of each list: how many blocks it had, and the positions that stay

_COUNT = re.compile(r"(^|_)(n_)?(layers?|depth|blocks)$")  # names of a number of blocks, such as `encoder_layers`
_MOST_COUNTS = 5  # names with the same number in one config; their subsets are tried


def follow_depth(model: nn.Module, kept: Kept, changes: Changes) -> None:
    """Write how many blocks there are, and the blocks' own entries of lists, into the configs of the model.

    Of encoder and decoder with as many blocks, either number may be meant: the config with which the class builds the
    model's own tensors is taken. Where none does, all names follow, with a warning.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        below = {n: each for n, each in kept.items() if n.startswith(f"{name}.") or not name}
        if not below or id(config) in seen or not hasattr(type(module), "from_pretrained"):
            continue
        configs = [each for each in _configs(config) if id(each) not in seen]  # a stack of T5 has its own copy
        outermost, seen = not seen, seen | {id(each) for each in configs}
        numbers = [(each, attribute) for each in configs for attribute in _counts(each, below)]
        chosen = next((each for each in _subsets(numbers) if _builds(module, configs, each, below)), None)
        if chosen is None and outermost:
            warnings.warn(
                f"the config of {type(module).__name__} cannot say which blocks are left, so from_pretrained does not "
                "load the shorter model; et.save_pretrained and et.load_pretrained do, and a finished run",
                stacklevel=2,
            )
        _write(configs, numbers if chosen is None else chosen, below, changes)


def _configs(config: Any) -> list[Any]:
    """A config and those inside it, as of the towers of a CLIP."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(each for one in inner for each in _configs(one))]


def _counts(config: Any, kept: Kept) -> list[str]:
    """Names in the config of a number of blocks, as it was before."""
    before = {count for count, _ in kept.values()}
    named = {name: value for name, value in vars(config).items() if isinstance(value, int) and value in before}
    return [name for name in named if _COUNT.search(name)]


def _subsets(numbers: list[tuple[Any, str]]) -> list[list[tuple[Any, str]]]:
    """All of them first, then fewer and fewer, down to none."""
    sizes = range(len(numbers), -1, -1) if len(numbers) <= _MOST_COUNTS else [len(numbers)]
    return [list(each) for size in sizes for each in combinations(numbers, size)]


def _write(configs: list[Any], numbers: list[tuple[Any, str]], kept: Kept, changes: Changes) -> None:
    stay = dict(kept.values())
    for config, name in numbers:
        changes.set(config, name, len(stay[getattr(config, name)]))
    counts = [count for count, _ in kept.values()]
    for config in configs:
        entries_of = stay if any(config is each for each, _ in numbers) else {}
        for name, value in list(vars(config).items()):
            if not isinstance(value, (list, tuple)) or len(value) < 2:
                continue
            if list(value) == counts:  # the depths of stages
                changes.set(config, name, type(value)(len(positions) for _, positions in kept.values()))
            elif len(value) in entries_of:
                changes.set(config, name, type(value)(value[position] for position in entries_of[len(value)]))
        if entries_of:
            _write_stages(config, len(next(iter(entries_of.values()))), changes)


def _write_stages(config: Any, depth: int, changes: Changes) -> None:
    """The names of the blocks as outputs of a backbone, of which one that is gone becomes the last."""
    stages = getattr(config, "stage_names", None)
    if not isinstance(stages, list) or len(stages) <= depth + 1:
        return
    changes.set(config, "stage_names", stages[: depth + 1])
    for name, last in (("_out_features", stages[depth]), ("_out_indices", depth)):
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            allowed = stages[: depth + 1] if isinstance(last, str) else range(depth + 1)
            changes.set(config, name, [each for each in value if each in allowed] or [last])


def _builds(module: Any, configs: list[Any], numbers: list[tuple[Any, str]], kept: Kept) -> bool:
    """Whether the class makes the module's own tensors from the config with these numbers."""
    changes = Changes()
    _write(configs, numbers, kept, changes)
    try:
        return builds_itself(module)
    finally:
        changes.undo()


def builds_itself(module: Any) -> bool:
    """Whether the class makes tensors of the module's own names and shapes from its config, as it is stored."""
    return _mismatches(module) == set()


def _mismatches(module: Any) -> set[str] | None:
    """Tensors of other shapes, or of one alone, that the class makes from the config; `None`: it makes no model."""
    try:
        with silence_libraries(), torch.device("meta"):
            config = type(module.config).from_dict(copy.deepcopy(module.config.to_dict()))
            built = type(module)(config)
    except Exception:
        return None  # a class that cannot be built apart from its weights, or refuses these numbers
    own, made = _shapes(module), _shapes(built)
    return {name for name in own.keys() | made.keys() if own.get(name) != made.get(name)}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


FFN_WIDTHS = (  # as config classes call it
    "intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim",
    "decoder_ffn_dim",
)  # fmt: skip
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
Width = tuple[str, int, int]  # what a config calls it, before, after


def follow_widths(model: nn.Module, cuts: Sequence[Cut], changes: Changes) -> None:
    """Write the new widths into the config of a model of transformers, as far as its class builds the model from it.

    A config without `head_dim` takes hidden size / heads for it: there it is tried whether the class reads one. What
    cannot be said stays as it was: then `et.load_pretrained` loads the model, and `from_pretrained` does not.
    """
    if not hasattr(type(model), "from_pretrained") or not hasattr(model, "config"):
        return
    heads = [width for one in cuts for width in _head_widths(one)]
    sizes = {each.head_dim for one in cuts for each in one.group.attentions}
    ffn = [(name, one.group.units, len(one.keep)) for one in cuts if one.group.kind == "ffn" for name in FFN_WIDTHS]
    explicit = [("head_dim", 0, size) for size in sizes] if len(sizes) == 1 else []
    remaining, best = _mismatches(model), list[Width]()
    for widths in (ffn, heads, [*heads, *explicit], [*ffn, *heads], [*ffn, *heads, *explicit]):
        tried = Changes()
        _write_widths(model, widths, tried)
        mismatches = _mismatches(model)
        tried.undo()
        if mismatches is not None and (remaining is None or mismatches < remaining):
            remaining, best = mismatches, widths
    _write_widths(model, best, changes)


def _head_widths(one: Cut) -> list[Width]:
    kept, widths = len(one.keep), list[Width]()
    for attention in one.group.attentions:
        widths += [(name, attention.heads, kept * attention.queries_per_unit) for name in HEAD_COUNTS]
        widths += [(name, attention.kv_heads, attention.kv_heads_after(kept)) for name in _KV_COUNTS]
    return widths


def _write_widths(model: nn.Module, widths: Sequence[Width], changes: Changes) -> None:
    """Write each width that is the same wherever it stood, into the configs that had the number before."""
    after: dict[tuple[str, int], set[int]] = {}
    for name, old, new in widths:
        after.setdefault((name, old), set()).add(new)
    configs = {id(each): each for m in model.modules() if (c := getattr(m, "config", None)) for each in _configs(c)}
    for config in configs.values():
        for (name, old), news in after.items():
            value = getattr(config, name, None)
            unset = name == "n_inner" and hasattr(config, name) and value is None  # four times the model's width
            if len(news) == 1 and (unset or value == old or (old == 0 and value is None)):
                changes.add(config, name, next(iter(news)))
