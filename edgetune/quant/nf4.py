"""NF4: frozen linears stored in 4 bits by bitsandbytes, as a base to train adapters on (QLoRA).

Dettmers et al., 2023, arXiv:2305.14314: blocks of weights on the 16 quantiles of a normal distribution, one scale each;
or on the 16 values of a 4-bit float.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from edgetune.core import trainable
from edgetune.core.carriers import is_wrapped
from edgetune.core.errors import EdgetuneError, truncate_list
from edgetune.core.layers import matches, refuse_shared, replace, select
from edgetune.core.merging import merge
from edgetune.core.packed_layers import MergeParity, OriginalWeight, is_nf4, original_weight
from edgetune.core.plain import refuse_computed
from edgetune.core.registry import require
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.frozen import remove_hooks
from edgetune.lean.reads import FirstForward, readers_of, refuse_readers, watch_first_forward

HEADS = ("lm_head", "*.lm_head", "classifier", "classifier.*", "*.classifier", "score", "fc", "head", "head.*")
_PACKABLE = (torch.float32, torch.bfloat16, torch.float16)


class NF4(Technique):
    """Store linear layers in 4 bits. They are frozen, compute in their original type, and pass gradients on.

    A layer with n weights takes n/2 + 4n/block_size bytes, or slightly more than n/2 + n/block_size with
    `double_quant`.

    Adapters are trained on the rounded weights, so that merged onto these (`merge_base="dequantized"`) the model
    computes what was trained. `merge_base="fp"` adds them to the original weights instead, which are nearer the
    pretrained model and not what was trained: the report of `finalize` says how far either is from it. The original
    weights wait in files of the temporary folder (`TMPDIR`), in their own type.
    """

    name: ClassVar[str] = "nf4"
    takes: ClassVar[Trait] = Trait.LEAN
    leaves: ClassVar[Trait] = Trait.PACKED

    targets: tuple[str, ...] = ("*",)
    """Patterns of the linear layers to store in 4 bits."""
    skip: tuple[str, ...] | None = None
    """Patterns of layers to exclude; `null`: layers with the usual names of a classifier or language-model head."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Number of weights that share a scale; it must divide every input width."""
    double_quant: bool = True
    """Store the scales in 8 bits too, in blocks of 256."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values: quantiles of a normal distribution, or those of a 4-bit float."""
    merge_base: Literal["dequantized", "fp"] = "dequantized"
    """What adapters are merged onto: the rounded weights that they were trained on, or the original ones."""
    keep_original: bool = False
    """Keep the original weights until an adapter starts from them (`lora` with `init: loftq`, which sets this)."""

    def adapt_to(self, later: Sequence[Technique]) -> Technique:
        """With the original weights, for a technique that reads them."""
        reads = any(technique.reads_unpacked for technique in later)
        return self.model_copy(update={"keep_original": True}) if reads else self

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Replace the linear layers in place."""
        bnb = import_bitsandbytes()
        if trainable.is_chosen(model) or any(is_wrapped(module) for module in model.modules()):
            raise EdgetuneError("nf4 needs plain layers", action="put nf4 before sparse-update and lora")
        linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        heads = [p for p in HEADS if any(matches(n, [p]) for n in linears)]
        skip = self.skip if self.skip is not None else heads
        self._refuse_other_kinds(model, {name for name in linears if not matches(name, skip)})
        chosen = select(model, self.targets, skip, nn.Linear)
        readers, watched = readers_of(model, chosen, sample)
        refuse_readers(model, readers)
        refuse_shared(model, chosen)
        for name, layer in chosen.items():
            refuse_computed(name, layer)
            if type(layer) is not nn.Linear:
                raise EdgetuneError(f"{name} is a {type(layer).__name__}, not a plain linear", action="add it to skip")
            if layer.weight.dtype not in _PACKABLE:  # bitsandbytes computes wrongly in others without an error
                raise EdgetuneError(
                    f"{name} cannot be packed in 4 bits", got=str(layer.weight.dtype), allowed=map(str, _PACKABLE),
                    action="convert the model first, as in model.float()",
                )  # fmt: skip
            self._check_width(name, layer.in_features)
        trainable.remember(model, self.name)
        linear: Any
        for name, linear in chosen.items():
            packed: Any = pack_linear(bnb, linear, self.block_size, self.double_quant, self.quant_type)
            if self.merge_base == "fp":
                packed.original_weight = OriginalWeight(linear.weight.detach())
            elif self.keep_original:
                packed.unpacked_weight = OriginalWeight(linear.weight.detach())
            replace(model, name, packed)
        if not watched:
            watch_first_forward(model, chosen)
        return model

    def _refuse_other_kinds(self, model: nn.Module, linears: set[str]) -> None:
        """Raise if a pattern matches only products that are no `nn.Linear`, as all of GPT-2's."""
        others = {name: type(module).__name__ for name, module in model.named_modules() if _is_other_product(module)}
        for pattern in self.targets:
            meant = [name for name in others if matches(name, [pattern])]
            if meant and not any(matches(name, [pattern]) for name in linears):
                heads = " but a head" if self.skip is None else " that skip leaves"
                raise EdgetuneError(
                    f"only nn.Linear is stored in 4 bits, and targets match none{heads}; "
                    f"{truncate_list(meant, 3)}: {', '.join(sorted({others[name] for name in meant}))}",
                    got=pattern,
                    action="leave nf4 out, or build the model with nn.Linear",
                )

    def _check_width(self, name: str, width: int) -> None:
        # bitsandbytes' kernel for CPUs with AVX-512 reads the wrong scales if a block continues in the next row
        if width % self.block_size:
            divisors = [size for size in (32, 64, 128, 256) if width % size == 0]
            raise EdgetuneError(
                f"block_size {self.block_size} does not divide the input width {width} of {name}",
                action=f"set block_size={divisors[-1]}, or add it to skip" if divisors else f'add "{name}" to skip',
            )

    def finalize(self, model: nn.Module) -> nn.Module:
        """Turn the remaining 4-bit layers into plain linear layers with the rounded weights."""
        model = merge(model, is_nf4)
        remove_hooks(model, FirstForward)
        trainable.recall(model, self.name)
        return model

    def note(self, model: nn.Module) -> str:
        """After `finalize`: how far the merged layers are from the trained ones."""
        parities = [p for m in model.modules() if isinstance(p := getattr(m, "merge_parity", None), MergeParity)]
        if not parities:
            return ""
        rounded, original = (max(values) for values in zip(*parities, strict=True))
        text = f"merged onto the dequantized weights, a layer's outputs are within {rounded:.1e} of the trained ones"
        return f"{text}; onto the original ones, as here, {original:.1e}" if self.merge_base == "fp" else text


def _is_other_product(module: nn.Module) -> bool:
    """Whether it is a layer such as transformers' Conv1D: a class outside torch with one matrix as its weight."""
    weight = module._parameters.get("weight")
    if isinstance(module, (nn.Linear, nn.Embedding)) or weight is None or is_wrapped(module):
        return False
    return weight.dim() == 2 and not type(module).__module__.startswith("torch.")


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its advice to install compiled kernels from a hub."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return require("bitsandbytes", "nf4")
    finally:
        logger.setLevel(level)


def pack_linear(bnb: Any, layer: Any, block_size: int, double_quant: bool, quant_type: str = "nf4") -> nn.Module:
    """The linear with its weight `(out, in)` in 4 bits; the bias is the same parameter as before.

    It computes in the type that the weight had, and notes it as `plain_dtype`: bitsandbytes would convert a bias
    to the type it computes in, and an unpacked layer must fit the layers around it.
    """
    dtype: torch.dtype = layer.weight.dtype
    new: Any = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta", quant_type=quant_type
    )
    new.plain_dtype = dtype
    new.weight = _pack_weight(bnb, layer.weight.detach(), block_size, double_quant, quant_type)
    new.bias = layer.bias
    # In eval mode on a CPU with AVX512-BF16 the forward would rearrange the weight for good: scales rounded to bf16,
    # no gradient any more, and a failure where the rows are no multiple of 32.
    new.support_avx512bf16_for_cpu = False
    new.register_load_state_dict_pre_hook(_load_packed)
    new.register_forward_pre_hook(_refuse_without_scales)
    return new.train(layer.training)  # type: ignore[no-any-return]


def _refuse_without_scales(layer: Any, _: object) -> None:
    # bitsandbytes takes the layer's own note of its scales where a copy of the weight lost them
    noted = getattr(layer.weight, "quant_state", None) is not None or layer.quant_state is not None
    if not noted or type(layer.weight).__name__ == "DTensor":
        raise EdgetuneError(
            "a 4-bit layer has lost its scales, as it does where FSDP shards its weight",
            got=type(layer.weight).__name__,
            action="train a 4-bit model with DistributedDataParallel, or leave nf4 out",
        )


def _pack_weight(bnb: Any, weight: torch.Tensor, block_size: int, double_quant: bool, quant_type: str) -> Any:
    settings = {"blocksize": block_size, "compress_statistics": double_quant, "quant_type": quant_type}
    # Without its `module`, since a deep copy would keep holding the layer that it was copied from.
    return bnb.nn.Params4bit(weight.to(torch.float32).clone(), requires_grad=False, **settings).to(weight.device)


def _load_packed(layer: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let a packed layer load its own kind of state, scales included, and the plain layer's, by packing it."""
    weight = state.get(prefix + "weight")
    if weight is None or getattr(layer.weight, "quant_state", None) is None:
        return
    bnb, current = import_bitsandbytes(), layer.weight.quant_state
    extra = {key: state.pop(key) for key in list(state) if key.startswith(prefix + "weight.")}
    if extra:
        stored = {key.removeprefix(prefix + "weight."): value for key, value in extra.items()}
        layer.weight.quant_state = bnb.functional.QuantState.from_dict(stored, device=layer.weight.device)
    elif weight.is_floating_point():
        settings = (current.blocksize, current.nested, current.quant_type)
        fresh = _pack_weight(bnb, weight.to(layer.weight.device), *settings)
        if original_weight(layer) is not None:
            layer.original_weight = OriginalWeight(weight.to(layer.plain_dtype))
        state[prefix + "weight"], layer.weight.quant_state = fresh.data, fresh.quant_state
