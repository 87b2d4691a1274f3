"""Fold layers that are separate only for training: parallel branches, and batch norms into the layer before.

Architectures such as MobileOne, RepVGG, RepViT and FastViT have a method that fuses a block's branches. timm and others
call it `fuse()`, which returns the new block, or `reparameterize()` or `switch_to_deploy()`, which change the block in
place. It is called by name, so that no library of models is imported here.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.overrides import TorchFunctionMode

from edgetune.core.errors import truncate_list
from edgetune.core.inputs import Inputs, call, tensors_in

_IN_PLACE = ("reparameterize", "switch_to_deploy")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    nn.functional.linear,
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was folded, and the change of the outputs for the example, relative to an output's largest value."""

    branches: tuple[str, ...] = ()  # modules that fused their own branches
    norms: tuple[str, ...] = ()  # batch norms folded into the layer before them
    refused: tuple[str, ...] = ()  # what was not folded, and why
    difference: float = 0.0

    def __str__(self) -> str:
        done = [f"{len(self.branches)} blocks fused"] if self.branches else []
        done += [f"{len(self.norms)} batch norms folded"] if self.norms else []
        text = f"{', '.join(done)}; logits differ by {self.difference:.1e}" if done else "nothing folded"
        return "\n".join([text, *(f"kept: {reason}" for reason in self.refused)])


def reparameterize(
    model: nn.Module, example_inputs: Inputs, *, max_difference: float = 1e-4
) -> tuple[nn.Module, Report]:
    """Fuse branches, then fold batch norms, in a copy of `model`, which must be in eval mode.

    A step that changes a logit of the example by more than `max_difference` of the largest logit is undone, and
    reported. If nothing can be folded, `model` itself is returned.
    """
    if model.training or not (_fusible(model) or _has_norms(model)):
        return model, Report()
    with torch.no_grad():
        wanted = [tensor.clone() for tensor in tensors_in(call(model, example_inputs))]
        kept, branches, refused = _step(model, example_inputs, wanted, max_difference, _fuse_branches)
        norms: tuple[str, ...] = ()
        if _has_norms(kept):
            kept, norms, more = _step(
                kept, example_inputs, wanted, max_difference, lambda copied: _fold_norms(copied, example_inputs)
            )
            refused += more
        difference = _difference(kept, example_inputs, wanted) if branches or norms else 0.0
    return kept, Report(branches, norms, refused, difference)


def _step(
    model: nn.Module,
    inputs: Inputs,
    wanted: list[Tensor],
    most: float,
    change: Callable[[nn.Module], tuple[list[str], list[str]]],
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Apply `change` to a copy. Returns the copy if it still computes the same, else the model."""
    changed = copy.deepcopy(model)
    done, refused = change(changed)
    if not done:
        return model, (), tuple(refused)
    difference = _difference(changed, inputs, wanted)
    if difference <= most:
        return changed, tuple(done), tuple(refused)
    return model, (), (*refused, f"{truncate_list(done, 4)}: the logits would differ by {difference:.1e}")


def _difference(model: nn.Module, inputs: Inputs, wanted: list[Tensor]) -> float:
    """Largest difference of an output, relative to its largest value; infinite if not comparable."""
    try:
        got = list(tensors_in(call(model, inputs)))
    except Exception:  # a fused block that no longer fits its neighbours raises anything
        return float("inf")
    if len(got) != len(wanted):
        return float("inf")
    return max((_relative_difference(*pair) for pair in zip(got, wanted, strict=True)), default=0.0)


def _relative_difference(got: Tensor, wanted: Tensor) -> float:
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)) if wanted.numel() else 0.0


def _fusible(model: nn.Module) -> bool:
    return any(_method(module) for module in model.modules())


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, _NORMS) for module in model.modules())


def _method(module: nn.Module) -> str:
    """The method by which this module fuses itself; empty if there is none."""
    for name in ("fuse", *_IN_PLACE):
        method = getattr(type(module), name, None)
        if callable(method) and _takes_nothing(method):
            return name
    return ""


def _takes_nothing(method: Any) -> bool:
    try:
        parameters = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    flexible = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in flexible for p in parameters)


def _fuse_branches(model: nn.Module) -> tuple[list[str], list[str]]:
    """Fuse the branches of every block, from the outside in, since an outer block may fuse inner ones."""
    done: list[str] = []
    refused: list[str] = []

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            method, path = _method(child), f"{prefix}{name}"
            if method:
                before = copy.deepcopy(child)
                try:
                    fused = getattr(child, method)()
                except Exception as error:  # code of others: anything
                    refused.append(f"{path}: {method}() raised {type(error).__name__}: {error}")
                    fused = before
                else:
                    done.append(path)
                child = fused if isinstance(fused, nn.Module) else child
                setattr(parent, name, child)
            walk(child, f"{path}.")

    walk(model, "")
    return done, refused


def _fold_norms(model: nn.Module, inputs: Inputs) -> tuple[list[str], list[str]]:
    """Fold each batch norm that reads the output of a convolution or linear layer which nothing else reads."""
    # a weight that is computed when it is read has no stable identity
    plain = (m for m in model.modules() if isinstance(m, (*_CONVS, nn.Linear)) and "weight" in m._parameters)
    layers = {id(m.weight): m for m in plain}
    norms = {id(m.running_mean): (name, m) for name, m in model.named_modules() if isinstance(m, _NORMS)}
    seen = _Calls()
    with seen:
        call(model, inputs)
    done, refused = [], []
    for weight, mean, produced in seen.pairs:
        layer, (name, norm) = layers.get(weight), norms.get(mean, ("", None))
        alone = seen.readers[produced] == seen.readers[weight] == seen.readers[mean] == 1
        if layer is None or norm is None or not name or not alone or norm.running_mean is None:
            continue
        if getattr(layer, "transposed", False) and getattr(layer, "groups", 1) > 1:
            refused.append(f"{name}: behind a transposed convolution in groups")
            continue
        _fold(layer, norm)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _rest(norm))
        done.append(name)
    return done, refused


class _Calls(TorchFunctionMode):
    """Which layer's output each batch norm reads, and how often tensors are read, by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[int, int, int]] = []  # of weight, running mean and the tensor between them
        self.readers: Counter[int] = Counter()
        self._made: dict[int, tuple[Tensor, int]] = {}  # holds the tensors, so that no identity is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if next(tensors_in(result), None) is not None:  # else it read a shape or a type
            self.readers.update(id(tensor) for tensor in tensors_in([*args, *kwargs.values()]))
        if func in _LAYERS and len(args) > 1:
            self._made[id(result)] = (result, id(args[1]))
            self.readers[id(result)] = 0  # a tensor that is gone may have had the same identity
        elif func is nn.functional.batch_norm and id(args[0]) in self._made:
            self.pairs.append((self._made[id(args[0])][1], id(args[1]), id(args[0])))
        return result


def _fold(layer: nn.Module, norm: Any) -> None:
    """Put the scale and shift of `norm` into `layer`."""
    target: Any = layer
    moments = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    if isinstance(layer, nn.Linear):
        target.weight, target.bias = fuse_linear_bn_weights(target.weight, target.bias, *moments)
    else:
        transposed = bool(target.transposed)
        target.weight, target.bias = fuse_conv_bn_weights(target.weight, target.bias, *moments, transpose=transposed)


def _rest(norm: nn.Module) -> nn.Module:
    """The rest of a batch norm: timm's have a dropout and an activation."""
    after = [child for _, child in norm.named_children()]
    return nn.Sequential(*after) if after else nn.Identity()
