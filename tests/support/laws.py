"""The list that every law in test_laws.py is crossed with, and the tiny models it stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.carriers import plain_tensors
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.technique import Sample, Technique
from edgetune.core.traits import Trait
from edgetune.lean.technique import Lean
from edgetune.prune.depth import Depth
from edgetune.prune.structured import Prune
from edgetune.quant.bits import Bits
from edgetune.quant.equalize import Equalize
from edgetune.quant.int4 import Int4
from edgetune.quant.int8 import Int8
from edgetune.quant.int8_dynamic import Int8Dynamic
from edgetune.quant.nf4 import NF4
from edgetune.quant.offsets import Offsets
from edgetune.quant.outliers import Outliers
from edgetune.quant.palettize import Palettize
from edgetune.quant.qat import QAT
from edgetune.quant.quik import Quik
from edgetune.quant.rotate import Rotate
from edgetune.quant.share import Share
from edgetune.quant.smooth import Smooth
from edgetune.quant.ternary import Ternary
from edgetune.sparse.scheme import Slice
from edgetune.sparse.update import SparseUpdate
from support.gain import Gain
from support.law_models import Cnn, Mlp
from support.sizes import (
    bytes_of,
    channel_size,
    int4_int8_size,
    int4_size,
    int8_size,
    nf4_size,
    pruned_bert_size,
    shared_size,
    without_second_block,
)


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return Mlp().eval()


def cnn() -> nn.Module:
    torch.manual_seed(2)
    model = Cnn()
    for module in model.modules():  # statistics and scales as after some training, so that freezing them matters
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def bert(layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=50,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=48, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tied_llama() -> nn.Module:
    """With norms as after some training."""
    model: Any = llama(tied=True)
    nn.init.uniform_(model.model.norm.weight, 0.5, 1.5)
    return model  # type: ignore[no-any-return]


def dense(layer: nn.Module) -> Tensor:
    """The plain weight that a layer computes with, whatever it is wrapped in."""
    return plain_tensors(layer)["weight"]


def vectors() -> Inputs:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(5))


def pictures() -> Inputs:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(6))


def tokens() -> Inputs:
    ids = torch.randint(3, 48, (4, 10), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(output: object) -> Tensor:
    """A loss with a gradient for every logit."""
    return (logits_of(output) - 0.5).square().sum()


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """In eval mode and without a graph."""
    mode = model.training
    with torch.no_grad():
        found = logits_of(call(model.eval(), inputs))
    model.train(mode)
    return found


def fit(model: nn.Module, inputs: Inputs, steps: int = 3) -> None:
    """A few updates in training mode, so that there is something to merge."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(call(model, inputs)).backward()
        optimizer.step()
    model.eval()


@dataclass(frozen=True)
class Case:
    """Techniques on a tiny model, and what the laws expect of them."""

    name: str
    techniques: tuple[Technique, ...]
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    tolerance: float = 2e-5  # of outputs that should be equal
    error: float = 0.0  # lossy: most relative error of the outputs that apply may bring
    size: Callable[[nn.Module], int] | None = None  # lossy: exact bytes after apply, from the plain model
    keeps_less: bool = False  # bytes kept for backward fall
    same_weights: bool = True  # exact: whether the plain weights stay, and so do their gradients
    trains: bool = True  # whether it can train after apply
    before: str = ""  # name of the module that is to compute what the plain model does, if that is not the whole
    pickles: bool = True  # whether an open model can be pickled
    merges: bool = True  # whether finalize leaves the plain model's modules, without hooks
    keeps_weights: bool = True  # whether the open model's state has the plain model's keys
    same_keys: bool = True  # whether the finalized model has the plain model's state-dict keys
    same_shapes: bool = True  # whether it can load the plain model's state
    unmatched: Technique | None = None  # the same technique with a target that matches nothing
    exports: bool = False  # whether the law of export is tried: one case for each technique, since it takes seconds

    @property
    def exact(self) -> bool:
        return all(technique.exact or technique.guards for technique in self.techniques)

    @property
    def leaves(self) -> Trait:
        return reduce(or_, (technique.leaves for technique in self.techniques))

    def applied(self) -> nn.Module:
        return apply(self.model(), self.techniques, Sample.of(self.inputs()))

    def as_before(self, model: nn.Module) -> nn.Module:
        """What is to compute as the plain model does: all of an applied one, or the base under a guard."""
        return model.get_submodule("base") if any(technique.guards for technique in self.techniques) else model


ATTENTION = ("*.query", "*.value")
LINEARS = ("*.query", "*.key", "*.value", "*.dense")
BLOCKS = ("blocks.*.up", "blocks.*.down")
NOTHING = ("*.nothing",)
ROUNDED = 1e-2  # of outputs without the rounding of activations, which finalize leaves to the kernel

CASES = [
    Case(
        "sparse-last-1-mlp", (SparseUpdate(scheme="last-1"),), mlp, vectors, keeps_less=True,
        unmatched=SparseUpdate(scheme={"nothing": "full"}),
    ),
    Case("sparse-last-2-cnn", (SparseUpdate(scheme="last-2", norms=False),), cnn, pictures, keeps_less=True),
    Case("sparse-last-1-bert", (SparseUpdate(scheme="last-1"),), bert, tokens, keeps_less=True),
    Case("sparse-last-1-llama", (SparseUpdate(scheme="last-1"),), llama, tokens, keeps_less=True),
    Case("sparse-bias-mlp", (SparseUpdate(scheme="bias"),), mlp, vectors, keeps_less=True),
    Case("sparse-bias-cnn", (SparseUpdate(scheme="bias"),), cnn, pictures, keeps_less=True),
    Case("sparse-bias-bert", (SparseUpdate(scheme="bias"),), bert, tokens, keeps_less=True),
    Case(
        "sparse-written-cnn", (SparseUpdate(scheme={"stem": "full", "blocks.1.*": "bias"}),), cnn, pictures,
        keeps_less=True,
    ),
    Case(
        "sparse-sliced-mlp",
        (SparseUpdate(scheme={"blocks.1.*": 0.25, "blocks.2.up": Slice(ratio=0.5, of="outputs")}),),
        mlp, vectors, keeps_less=True, exports=True, unmatched=SparseUpdate(scheme={"nothing": 0.5}),
    ),
    Case(
        "sparse-sliced-cnn",
        (SparseUpdate(scheme={"blocks.1": 0.25, "blocks.2.pointwise": Slice(ratio=0.5, of="outputs")}),),
        cnn, pictures, keeps_less=True,
    ),
    Case("sparse-sliced-bert", (SparseUpdate(scheme={"*.layer.1": 0.25}),), bert, tokens, keeps_less=True),
    Case("sparse-pockengine-bert", (SparseUpdate(scheme="bert-pockengine"),), bert, tokens, keeps_less=True),
    Case("lean-mlp", (Lean(),), mlp, vectors, keeps_less=True),
    Case("lean-cnn", (Lean(),), cnn, pictures, keeps_less=True, exports=True),
    Case("lean-bert", (Lean(),), bert, tokens, keeps_less=True),
    Case("lean-llama", (Lean(),), llama, tokens, keeps_less=True),
    Case("lean-lora-bert", (Lean(), LoRA(rank=2, targets=LINEARS)), bert, tokens, keeps_less=True),
    Case("lora-lean-llama", (LoRA(rank=2, targets=("*_proj",)), Lean()), llama, tokens, keeps_less=True),
    Case(
        "lean-sparse-bert", (Lean(activations="8bit"), SparseUpdate(scheme="last-1")), bert, tokens, keeps_less=True,
    ),
    Case("nf4-lean-lora-mlp", (NF4(block_size=32), Lean(), LoRA(rank=2, targets=BLOCKS)), mlp, vectors, error=0.3,
         keeps_less=True),
    Case(
        "nf4-mlp", (NF4(block_size=32, double_quant=False),), mlp, vectors, error=0.2,
        size=nf4_size(False, "classifier"), unmatched=NF4(targets=NOTHING),
    ),
    Case(
        "prune-cnn", (Prune(round_to=4),), cnn, pictures, error=0.7, size=lambda plain: bytes_of(Cnn(12)),
        same_shapes=False, exports=True, unmatched=Prune(skip=NOTHING),
    ),
    Case(
        "depth-mlp", (Depth(blocks=2),), mlp, vectors, error=0.5, size=without_second_block, same_keys=False,
        same_shapes=False, exports=True, unmatched=Depth(blocks=1, lists=NOTHING),
    ),
    Case("depth-bert", (Depth(blocks=1),), bert, tokens, error=1.0, same_keys=False, same_shapes=False),
    Case("prune-bert", (Prune(),), bert, tokens, error=0.05, size=pruned_bert_size, same_shapes=False),
    Case(
        "int4-mlp", (Int4(),), mlp, vectors, error=0.2, size=int4_size, trains=False, exports=True,
        unmatched=Int4(targets=NOTHING),
    ),
    Case(
        "int4-int8-mlp", (Int4(int8_linears=("*.up", "classifier"), targets=("*.down",)),), mlp, vectors, error=0.05,
        trains=False, exports=True, size=int4_int8_size,
    ),
    Case("int4-bert", (Int4(),), bert, tokens, error=0.4, size=int4_size, trains=False),
    Case("int4-absmax-mlp", (Int4(algorithm="absmax"),), mlp, vectors, error=0.2, size=int4_size, trains=False),
    Case("int4-awq-mlp", (Int4(algorithm="awq"),), mlp, vectors, error=0.2, size=int4_size, trains=False),
    Case("int4-awq-llama", (Int4(algorithm="awq", int8_linears=("lm_head",)),), llama, tokens, error=0.5, trains=False),
    Case(
        "int4-channel-mlp", (Int4(algorithm="gptq", group_size="channel"),), mlp, vectors, error=0.2,
        size=channel_size(4, 2), trains=False, exports=True,
    ),
    Case(
        "int4-padded-mlp", (Int4(pad=True, group_size=64),), mlp, vectors, error=0.2, trains=False, same_keys=False,
        same_shapes=False, exports=True,
    ),
    Case(
        "bits-mlp", (Bits(average_bits=6),), mlp, vectors, error=0.1, trains=False, exports=True,
        unmatched=Bits(average_bits=6, targets=NOTHING),
    ),
    Case(
        "quik-mlp", (Quik(),), mlp, vectors, error=0.3, trains=False, same_keys=False, exports=True,
        unmatched=Quik(targets=NOTHING),
    ),
    Case(
        "outliers-mlp", (Outliers(share=0.1),), mlp, vectors, trains=False, same_keys=False, exports=True,
        unmatched=Outliers(targets=NOTHING),
    ),
    Case(
        "offsets-mlp", (Offsets(group_size=4),), mlp, vectors, trains=False, same_keys=False, same_shapes=False,
        exports=True, unmatched=Offsets(targets=NOTHING),
    ),
    Case(
        "outliers-offsets-int4-mlp", (Outliers(share=0.1), Offsets(), Int4(algorithm="gptq")), mlp, vectors, error=0.2,
        trains=False, same_keys=False, exports=True,
    ),
    Case(
        "int8-dynamic-mlp", (Int8Dynamic(),), mlp, vectors, error=0.02, size=channel_size(8, 4), trains=False,
        exports=True, unmatched=Int8Dynamic(targets=NOTHING),
    ),
    Case("int8-dynamic-bert", (Int8Dynamic(),), bert, tokens, error=0.03, size=channel_size(8, 4), trains=False),
    Case("qat-mlp", (QAT(),), mlp, vectors, ROUNDED, error=0.2, exports=True, unmatched=QAT(targets=NOTHING)),
    Case("qat-distilled-bert", (QAT(group_size="channel", distill=0.5),), bert, tokens, ROUNDED, error=0.4),
    Case(
        "lean-sparse-lora-qat-mlp",
        (
            Lean(), SparseUpdate(scheme="last-1"),
            LoRA(rank=2, targets=("blocks.0.*",)), QAT(distill=1.0, algorithm="mse"),
        ),
        mlp, vectors, ROUNDED, error=0.2,
    ),
    Case(
        "ternary-mlp", (Ternary(skip=("classifier",), blend_batches=2),), mlp, vectors, ROUNDED, error=1.0,
        exports=True, unmatched=Ternary(targets=NOTHING),
    ),
    Case(
        "share-mlp", (Share(targets=BLOCKS),), mlp, vectors, error=0.8, size=shared_size(BLOCKS, 0.5),
        keeps_weights=False, same_shapes=False, exports=True, unmatched=Share(targets=NOTHING),
    ),
    Case(
        "share-bert", (Share(ratio=0.3, block_size=32, targets=LINEARS),), bert, tokens, error=0.8,
        keeps_weights=False, same_shapes=False,
    ),
    Case(
        "int8-cnn", (Int8(),), cnn, pictures, error=0.02, size=int8_size, trains=False, same_keys=False, exports=True,
    ),
    Case(
        "palettize-mlp", (Palettize(),), mlp, vectors, error=0.2, trains=False, unmatched=Palettize(targets=NOTHING),
    ),
    Case("equalize-cnn", (Equalize(),), cnn, pictures, exports=True, same_weights=False),
    Case("smooth-mlp", (Smooth(),), mlp, vectors, exports=True, same_weights=False),
    Case("smooth-auto-bert", (Smooth(alpha="auto"),), bert, tokens, same_weights=False),
    Case(
        "smooth-lora-llama", (Smooth(), LoRA(rank=2, targets=("*.q_proj", "*.v_proj"))), llama, tokens,
        same_weights=False,
    ),
    Case("rotate-llama", (Rotate(),), llama, tokens, exports=True, same_weights=False),
    Case(
        "rotate-tied-llama", (Rotate(tied="keep"),), tied_llama, tokens, exports=True, same_weights=False,
        merges=False, same_keys=False,
    ),
    Case(
        "rotate-smooth-llama", (Rotate(), Smooth(alpha="auto", bits=8, group_size="channel")), llama, tokens,
        same_weights=False,
    ),
    Case("gain-mlp", (Gain(targets=("*.up",)),), mlp, vectors, unmatched=Gain(targets=("nothing",))),
    Case(
        "nf4-sparse-gain-mlp",
        (
            NF4(block_size=32, skip=("blocks.2.*", "classifier")), SparseUpdate(scheme="last-1"),
            Gain(targets=("blocks.0.down",)),
        ),
        mlp, vectors, error=0.2,
    ),
    Case("nf4-double-llama", (NF4(block_size=32),), llama, tokens, error=0.2, size=nf4_size(True, "lm_head")),
    Case(
        "nf4-lora-bert", (NF4(block_size=32), LoRA(rank=2, targets=ATTENTION, also_train=("classifier",))),
        bert, tokens, error=0.3,
    ),
    Case(
        "nf4-sparse-lora-mlp",
        (
            NF4(block_size=32, skip=("blocks.2.*", "classifier")), SparseUpdate(scheme="last-1"),
            LoRA(rank=2, targets=("blocks.1.up",)),
        ),
        mlp, vectors, error=0.2, keeps_less=True, exports=True,
    ),
]  # fmt: skip
