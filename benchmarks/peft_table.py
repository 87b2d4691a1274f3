"""Every weight family of peft on every kind of layer: does `et.finalize` give the plain model that computes the same?
And the families that are techniques, with the facts about them and the size of their file.

python benchmarks/peft_table.py --write docs/peft.md --families docs/families.md
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edgetune as et
from edgetune.adapt.families import FAMILIES as FACTS
from edgetune.adapt.families import LEFT_OUT, Family
from edgetune.adapt.files import WEIGHTS
from edgetune.core.peft_layers import is_peft
from edgetune.core.probe import relative_difference
from edgetune.core.registry import PEFT_FAMILIES
from support.family_cases import small
from support.laws import ATTENTION, bert

BOUND = 1e-5


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(torch.tanh(self.one(x))))


class Transposed(nn.Module):
    """The linear layers of GPT-2, whose weight is `(in, out)`."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.one, self.two = Conv1D(32, 32), Conv1D(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Convolutions(nn.Module):
    def __init__(self, kernel: int, dims: int = 2, **settings: Any) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        settings = {"padding": kernel // 2, **settings}
        self.one, self.two = kind(8, 8, kernel, **settings), kind(8, 8, kernel, stride=2, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Embedding(20, 32, padding_idx=0), nn.Embedding(20, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.one(ids) * self.two(ids)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "nn.Linear": (Linears, lambda: torch.randn(4, 5, 32)),
    "Conv1D": (Transposed, lambda: torch.randn(4, 5, 32)),
    "nn.Conv1d": (lambda: Convolutions(3, dims=1), lambda: torch.randn(2, 8, 12)),
    "nn.Conv2d 1x1": (lambda: Convolutions(1), lambda: torch.randn(2, 8, 9, 9)),
    "nn.Conv2d 3x3": (lambda: Convolutions(3), lambda: torch.randn(2, 8, 9, 9)),
    "dilated, by reflection": (
        lambda: Convolutions(3, padding=2, dilation=2, padding_mode="reflect"), lambda: torch.randn(2, 8, 9, 9),
    ),
    "nn.Conv2d depthwise": (lambda: Convolutions(3, groups=8), lambda: torch.randn(2, 8, 9, 9)),
    "nn.Conv3d": (lambda: Convolutions(3, dims=3), lambda: torch.randn(2, 8, 7, 7, 7)),
    "nn.Embedding": (Tables, lambda: torch.randint(20, (4, 5))),
}  # fmt: skip

# Settings that fit layers of these widths; the rest are peft's own defaults.
FAMILIES: dict[str, dict[str, Any]] = {
    "ADALORA": {"target_r": 2, "init_r": 4, "total_step": 10},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 32},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["two"]},
    "LILY": {"r": 4},
    "LN_TUNING": {},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "LORA lora_bias": {"r": 4, "lora_bias": True},
    "LORA pissa": {"r": 4, "init_lora_weights": "pissa"},
    "LORA use_dora": {"r": 4, "use_dora": True},
    "LORA use_rslora": {"r": 4, "use_rslora": True},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 4},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 32},
}


@dataclass(frozen=True)
class Cell:
    """What became of one family on one kind of layer."""

    difference: float | None = None  # of the finalized model, over the largest value
    refused: str = ""  # by edgetune, in words
    unavailable: str = ""  # peft has no such layer, or its layer does not run

    def __str__(self) -> str:
        if self.difference is not None:
            return "exact" if self.difference <= BOUND else f"WRONG by {self.difference:.0e}"
        return "refused" if self.refused else "-"


def measure(family: str, kind: str) -> Cell:
    """Put the adapter on, move its weights, and compare the finalized model with the adapted one."""
    make, data = KINDS[kind]
    torch.manual_seed(0)
    plain, x = make().eval(), data()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = _adapted(plain, family)
            _move(model)
            expected = model(x)
    except Exception as error:  # peft refuses in many ways; one layer of its own wants more than its input
        if family != "POLY" or not isinstance(error, ValueError) or kind != "nn.Linear":
            return Cell(unavailable=f"{type(error).__name__}: {error}")
        expected = torch.zeros(())
    if not any(is_peft(module) for module in model.modules()):
        return Cell(unavailable="peft adapted nothing")
    try:
        merged = et.finalize(model)
    except et.EdgetuneError as error:
        return Cell(refused=str(error))
    assert {type(m) for m in merged.modules()} == {type(m) for m in plain.modules()}
    with torch.no_grad():
        return Cell(difference=relative_difference(expected, merged(x)))


def _adapted(plain: nn.Module, family: str) -> nn.Module:
    import peft

    name = family.partition(" ")[0]
    targets = ["norm"] if name == "LN_TUNING" else ["one", "two"]
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]]
    return peft.get_peft_model(copy.deepcopy(plain), config(target_modules=targets, **FAMILIES[family])).eval()


@torch.no_grad()
def _move(model: nn.Module) -> None:
    """As if it had trained: what does not move shows nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def table() -> str:
    """All cells, a family a row."""
    lines = [
        "# Adapters of peft, merged by `et.finalize`",
        "",
        "Made by `make tables`. Each adapter's weights are moved at random; *exact*: the finalized model equals the",
        f"adapted one within {BOUND:g} of its largest output value; *refused*: with a message, because no plain layer",
        "computes what the adapter does; -: peft has no such layer. Prompts and prefixes change no layer and are",
        "refused.",
        "",
        "| family | " + " | ".join(KINDS) + " |",
        "|" + "---|" * (len(KINDS) + 1),
    ]
    for family in FAMILIES:
        lines.append(f"| {family} | " + " | ".join(str(measure(family, kind)) for kind in KINDS) + " |")
    return "\n".join(lines) + "\n"


FAMILIES_INTRODUCTION = """# Adapter families

Made by `make tables`. Beside `lora`, these families of peft are techniques: a step of a recipe, and a class of
`edgetune` with the same settings. Their names are peft's, except `targets`, `skip`, `also_train`, `depth` and `rank`,
which all adapters share. [Recipes](recipes.md) lists the settings of each, and
[the benchmark](bench-adapters.md) compares some with LoRA and full fine-tuning.

```python
model = et.apply(model, [et.LoHa(rank=8, targets=["*.query", "*.value"], depth="last-4")])
```

*starts exact*: the fresh adapter leaves the model's outputs. *4-bit*: works on the base of `nf4`. *needs*: what must
divide what. *to LoRA*: peft's `convert_to_lora` approximates it by a LoRA. *file*: KiB of `adapter_model.safetensors`
for a BERT of two layers, 32 wide, adapted in query and value, with the settings of the tests.

Each merges into plain layers without loss, except Lily, whose routing depends on the input. Other kinds of layers, and
4-bit bases where there is no *yes*, are refused before any work.

| step | class | what it trains | layers | starts exact | 4-bit | needs | to LoRA | file |
|---|---|---|---|---|---|---|---|---|"""


def families_page(sizes: bool = True) -> str:
    """The families that are techniques, one a row; without the sizes of their files unless `sizes`."""
    lines = [FAMILIES_INTRODUCTION]
    for name, family in FACTS.items():
        cells = (
            f"`{name}`", f"`{PEFT_FAMILIES[name]}`", family.summary.rstrip("."), ", ".join(family.adapts),
            _yes(family.exact), _yes(family.four_bit), _needs(family), _yes(family.to_lora),
            f"{file_kib(name):.1f}" if sizes else "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    reasons = [
        f"- `{name}`: {reason}. `et.finalize` merges it where plain layers can compute the same."
        for name, reason in LEFT_OUT.items()
    ]
    lines += ["", "Not among them:", "", *reasons]
    return "\n".join(lines) + "\n"


def _yes(fact: bool) -> str:
    return "yes" if fact else ""


def _needs(family: Family) -> str:
    words = {"in": "the input width", "out": "the output width", "rank": "the rank"}
    needs = [
        f"{name} divides {' and '.join(words[s] for s in sides.split())}" for name, sides in family.divides.items()
    ]
    return "; ".join([*needs, *(["draws noise in training"] if family.random else [])])


def file_kib(name: str) -> float:
    """The size of the file of a fresh adapter on a tiny BERT."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = ("*.LayerNorm",) if name == "ln_tuning" else ATTENTION
        more = {"feedforward": ()} if name == "ia3" else {}
        et.save_adapter(et.apply(bert(), small(name, targets, **more)), folder)
        return (Path(folder) / WEIGHTS).stat().st_size / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--families", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for make_page, path in ((table, arguments.write), (families_page, arguments.families)):
        if path:
            path.write_text(make_page(), encoding="utf-8")
