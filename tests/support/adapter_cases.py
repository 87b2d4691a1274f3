"""Cases for the laws from LoRA and from the adapters of edgetune's own."""

from __future__ import annotations

from edgetune.adapt.adaption_prompt import AdaptionPrompt
from edgetune.adapt.bottleneck import Bottleneck
from edgetune.adapt.glora import GLoRA
from edgetune.adapt.lock import Lock
from edgetune.adapt.lora import LoRA
from edgetune.adapt.lora_guard import LoRAGuard
from edgetune.adapt.perft import PERFT
from edgetune.adapt.poly import Poly
from edgetune.adapt.prompt import Prompt
from edgetune.adapt.sherl import SHERL
from edgetune.lean.technique import Lean
from edgetune.quant.nf4 import NF4
from edgetune.quant.qat import QAT
from edgetune.sparse.update import SparseUpdate
from support.laws import ATTENTION, BLOCKS, NOTHING, ROUNDED, Case, bert, cnn, llama, mlp, pictures, tokens, vectors
from support.mixtures import ids, mixture
from support.towers import clip, pairs

ADAPTER_CASES = [
    Case(
        "lora-mlp", (LoRA(rank=2, targets=BLOCKS, also_train=("classifier",)),), mlp, vectors,
        unmatched=LoRA(targets=NOTHING),
    ),
    Case("lora-rslora-cnn", (LoRA(rank=2, targets=("*.pointwise",), rslora=True),), cnn, pictures),
    Case("lora-dora-bert", (LoRA(rank=2, targets=ATTENTION, dora=True, dropout=0.1),), bert, tokens),
    Case(
        "lora-pissa-bert", (LoRA(rank=2, targets=ATTENTION, init="pissa", depth=0.5),), bert, tokens,
        same_weights=False,
    ),
    Case("lora-olora-mlp", (LoRA(rank=2, targets=BLOCKS, init="olora"),), mlp, vectors, same_weights=False),
    Case(
        "lora-frozen-a-mlp", (LoRA(rank=2, targets=BLOCKS, init="orthogonal", frozen_a=True, depth="last-2"),), mlp,
        vectors, keeps_less=True,
    ),
    Case("lora-eva-bert", (LoRA(rank=2, targets=ATTENTION, init="eva"),), bert, tokens),
    Case(
        "lora-corda-llama", (LoRA(rank=2, targets=("*.q_proj", "*.up_proj"), init="corda", frozen_a=True),), llama,
        tokens, same_weights=False,
    ),
    Case(
        "nf4-lora-loftq-mlp", (NF4(block_size=32), LoRA(rank=4, alpha=8, targets=BLOCKS, init="loftq")), mlp, vectors,
        error=0.15,
    ),
    Case("lora-llama", (LoRA(rank=2, targets=("*.q_proj", "*.v_proj")),), llama, tokens),
    Case(
        "lora-mixture", (LoRA(rank=2, targets=("*_proj",), depth="last-1"),), mixture, ids, exports=True,
        unmatched=LoRA(targets=("*.experts.nothing",)),
    ),
    Case(
        "sparse-lora-bert", (SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=("bert.encoder.layer.0.*.query",))),
        bert, tokens, keeps_less=True,
    ),
    Case(
        "bottleneck-mlp", (Bottleneck(targets=("*.down",), width=4),), mlp, vectors, merges=False, same_keys=False,
        exports=True, unmatched=Bottleneck(targets=NOTHING),
    ),
    Case(
        "sparse-bottleneck-parallel-mlp",
        (
            SparseUpdate(scheme={"*": "frozen", "classifier": "full"}),
            Bottleneck(targets=("blocks.0", "blocks.1"), form="parallel", width=4, activation="gelu", scale=0.5),
        ),
        mlp, vectors, merges=False, same_keys=False,
    ),
    Case(
        "bottleneck-bert", (Bottleneck(targets=("*.output.dense",), width=4, activation="silu"),), bert, tokens,
        merges=False, same_keys=False,
    ),
    Case(
        "perft-routed", (PERFT(rank=2, adapters=3, scale=2.0),), mixture, ids, merges=False, same_keys=False,
        exports=True, unmatched=PERFT(targets=NOTHING),
    ),
    Case(
        "perft-embedded", (PERFT(form="embedded", rank=2, activation="silu"),), lambda: mixture("Olmoe"), ids,
        merges=False, same_keys=False, exports=True,
    ),
    Case("glora-mlp", (GLoRA(rank=4, targets=BLOCKS),), mlp, vectors, exports=True, unmatched=GLoRA(targets=NOTHING)),
    Case(
        "glora-paths-bert",
        (
            GLoRA(
                targets=ATTENTION,
                paths={"*": {"A": "vector", "C": "vector", "rank": 2}, "*.1.*.value": {"B": "none", "E": "scalar"}},
            ),
        ),
        bert, tokens,
    ),
    Case(
        "lean-sparse-glora-llama",  # whose projections have no bias until they are merged
        (Lean(), SparseUpdate(scheme={"*": "frozen", "lm_head": "full"}), GLoRA(rank=2, targets=("*.q_proj",))),
        llama, tokens, same_keys=False,
    ),
    Case("glora-qat-mlp", (GLoRA(rank=2, targets=BLOCKS, paths={"*": {}}), QAT()), mlp, vectors, ROUNDED, error=0.2),
    Case(
        "poly-bert",
        (Poly(tasks=("a", "b"), task="b", skills=3, rank=2, targets=ATTENTION, also_train=("classifier",)),),
        bert, tokens,
        exports=True, unmatched=Poly(tasks=("a",), targets=NOTHING),
    ),
    Case(
        "sparse-mhr-llama",
        (
            SparseUpdate(scheme={"*": "frozen", "lm_head": "full"}),
            Poly(tasks=("a", "b", "c"), task="a", heads=4, rank=2, targets=("*.q_proj", "*.v_proj")),
        ),
        llama, tokens,
    ),
    Case("sherl-mlp", (SHERL(width=4),), mlp, vectors, merges=False, same_keys=False, keeps_less=True, exports=True),
    Case(
        "sparse-sherl-bert", (SparseUpdate(scheme={"*": "frozen", "classifier": "full"}), SHERL(width=4)), bert, tokens,
        merges=False, same_keys=False, keeps_less=True,
    ),
    Case("sherl-llama", (SHERL(width=4),), llama, tokens, merges=False, same_keys=False, keeps_less=True),
    Case(
        "adaption-prompt-llama", (AdaptionPrompt(tokens=3, depth="last-1"),), llama, tokens, merges=False,
        same_keys=False, keeps_less=True, exports=True,
    ),
    Case(
        "nf4-sparse-adaption-prompt-llama",
        (
            NF4(block_size=32), SparseUpdate(scheme={"*": "frozen", "lm_head": "full"}), AdaptionPrompt(tokens=2),
        ),
        llama, tokens, error=0.3, merges=False, same_keys=False,
    ),
    Case("prompt-llama", (Prompt(tokens=3),), llama, tokens, error=3.0, merges=False, same_keys=False, exports=True),
    Case(
        "sparse-p-tuning-bert",
        (
            SparseUpdate(scheme={"*": "frozen", "classifier": "full"}),
            Prompt(kind="p-tuning", tokens=2, encoder_width=8),
        ),
        bert, tokens, error=3.0, merges=False, same_keys=False,
    ),
    Case(
        "guard-llama", (LoRAGuard(rank=2, targets=("*_proj",)),), llama, tokens, merges=False, same_keys=False,
        exports=True, unmatched=LoRAGuard(targets=NOTHING),
    ),
    Case(
        "nf4-lean-guard-llama", (NF4(block_size=32), Lean(), LoRAGuard(rank=2, targets=("*.q_proj",))), llama, tokens,
        error=0.3, merges=False, same_keys=False,
    ),
    Case("lock-clip", (Lock(),), clip, pairs, keeps_less=True),
    Case("lock-text-clip", (Lock(tower="text", projection="trained"),), clip, pairs, keeps_less=True),
    Case(
        "lock-lora-clip", (Lock(), LoRA(rank=2, targets=("text_model.*_proj",), also_train=("text_projection",))),
        clip, pairs, keeps_less=True,
    ),
    Case(
        "prefix-llama", (Prompt(kind="prefix", tokens=3),), llama, tokens, error=3.0, merges=False, same_keys=False,
        exports=True,
    ),
]  # fmt: skip
