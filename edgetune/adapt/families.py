"""peft's families of adapters as techniques: one line of facts for each, and the class made from it and peft's config.

The names of peft's settings stay, except those that all adapters of edgetune share: `targets`, `skip`, `also_train`,
`depth`, `rank`. `docs/families.md` shows the facts beside what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, create_model, model_validator
from torch import nn

from edgetune.adapt.adapter import Adapter
from edgetune.adapt.inject import exact_targets, select_targets
from edgetune.adapt.layer_kinds import Kind, widths_of
from edgetune.adapt.peft_settings import settings_of
from edgetune.core.errors import EdgetuneError
from edgetune.core.layers import is_transposed, matches, no_match_error
from edgetune.core.packed_layers import is_nf4
from edgetune.core.peft_layers import FAILURES
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import PEFT_FAMILIES, TECHNIQUES, load, require

LINEAR: tuple[Kind, ...] = ("linear",)
LINEARS: tuple[Kind, ...] = ("linear", "Conv1D")
PLAIN_2D: tuple[Kind, ...] = ("linear", "conv2d 1x1", "conv2d")
LYCORIS: tuple[Kind, ...] = ("linear", "conv1d", "conv2d 1x1", "conv2d", "grouped conv")


@dataclass(frozen=True)
class Family:
    """What is true of one family in peft."""

    summary: str  # what it trains, and the source
    adapts: tuple[Kind, ...]  # kinds of layers on which it is right
    exact: bool = True  # the fresh adapter leaves the outputs
    four_bit: bool = False  # works on a 4-bit base
    merges: bool = True  # plain layers compute the same
    random: bool = False  # draws noise in training, without any dropout
    to_lora: bool = False  # peft can convert it to a LoRA
    bounded: bool = True  # a rank above the width of a layer makes no sense
    starts: tuple[str, ...] = ("init_weights",)  # settings that, unless they are peft's default, start it otherwise
    divides: Mapping[str, str] = field(default_factory=dict)  # a setting that must divide "in", "out", "rank"
    names: Mapping[str, str] = field(default_factory=dict)  # edgetune's names for peft's settings, beside rank
    left_out: tuple[str, ...] = ()  # settings of peft's that would do nothing here, or break it
    fixed: Mapping[str, object] = field(default_factory=dict)  # settings of peft's that edgetune sets
    described: Mapping[str, str] = field(default_factory=dict)  # texts of settings that peft leaves without
    rows: str = ""  # the setting that lists rows of an embedding's table


_ASA = (
    "use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta",
    "asa_uncertainty_beta", "asa_schedule_exponent",
)  # fmt: skip

FAMILIES = {
    "adamss": Family(
        "Train small updates in subspaces of each weight (AdaMSS); peft's adaptive choice of subspaces is left out.",
        LINEAR, left_out=_ASA, bounded=False,
    ),
    "beft": Family("Train only an addition to each bias (BEFT, 2025, arXiv:2509.15974).", LINEAR, four_bit=True),
    "boft": Family(
        "Rotate weights by butterfly-factorized orthogonal matrices (BOFT; Liu et al., 2023, arXiv:2311.06243).",
        PLAIN_2D, four_bit=True, divides={"boft_block_size": "in", "boft_block_num": "in"},
        left_out=("boft_n_butterfly_factor",),  # without its CUDA extension peft sets it to 1
    ),
    "c3a": Family(
        "Add block-circular convolutions (C3A; Chen et al., 2024, arXiv:2407.19342).", LINEAR, exact=False,
        four_bit=True, to_lora=True, divides={"block_size": "in out"},
        described={"init_weights": "How the kernels start; `true`: at zero."},
    ),
    "deft": Family("Take a low-rank part out of each weight and inject another (DEFT).", LINEARS, starts=("para",)),
    "delora": Family(
        "Low-rank adapters whose strength is decoupled from their angle (DeLoRA; Bini et al., 2025, arXiv:2503.18225).",
        LINEAR, to_lora=True,
    ),
    "fourierft": Family(
        "Train some frequencies of each weight's update (FourierFT; Gao et al., 2024, arXiv:2405.03003).", LINEARS,
        exact=False, four_bit=True, to_lora=True,
    ),
    "frod": Family(
        "Train sparse coefficients in one basis that layers share (FRoD).", LINEARS,
        left_out=("progressbar", "runtime_offload_base_weight"), fixed={"progressbar": False},
    ),
    "gralora": Family(
        "LoRA on a grid of sub-blocks of each weight (GraLoRA; Jung et al., 2025, arXiv:2505.20355).", LINEARS,
        four_bit=True, to_lora=True, divides={"gralora_k": "in out"},
    ),
    "hira": Family(
        "Multiply weights by a low-rank matrix, element by element (HiRA).",
        ("linear", "Conv1D", "conv1d", "conv2d 1x1", "conv2d", "conv3d", "embedding"), to_lora=True,
    ),
    "hra": Family(
        "Rotate weights by a chain of Householder reflections (HRA; Yuan et al., 2024, arXiv:2405.17484).", PLAIN_2D,
        left_out=("apply_GS",), divides={"2": "rank"},
    ),
    "ia3": Family(
        "Scale activations by trained vectors (IA3; Liu et al., 2022, arXiv:2205.05638).",
        ("linear", "Conv1D", "conv2d 1x1", "conv2d", "conv3d", "grouped conv"), four_bit=True,
        left_out=("feedforward_modules",),
    ),
    "lily": Family(
        "Low-rank adapters that share their factors across layers by a router (Lily; 2024, arXiv:2407.09946).", LINEAR,
        four_bit=True, merges=False,
    ),
    "ln_tuning": Family("Train the normalization layers (Zhao et al., 2023, arXiv:2312.11420).", ("norm",)),
    "loha": Family(
        "Low-rank Hadamard products (LoHa; Hyeon-Woo et al., 2021, arXiv:2108.06098).", LYCORIS, to_lora=True,
    ),
    "lokr": Family("Low-rank Kronecker products (LoKr; Yeh et al., 2023, arXiv:2309.14859).", LYCORIS, to_lora=True),
    "miss": Family(
        "Shard-shared low-rank updates (MiSS; Kang and Yin, 2024, arXiv:2409.15371).", LINEAR, four_bit=True,
        to_lora=True, described={"init_weights": "The variant: MiSS itself, Bat, or one with small shards."},
    ),
    "oft": Family(
        "Rotate weights by block-diagonal orthogonal matrices (OFT; Qiu et al., 2023, arXiv:2306.07280).",
        ("linear", "conv2d 1x1", "embedding"), four_bit=True, left_out=("r",), divides={"oft_block_size": "in"},
    ),
    "osf": Family(
        "Train the low singular directions of each weight, and keep the high ones (OSF).", LINEAR,
        left_out=("target_svd_config", "init_weights"),
    ),
    "peanut": Family(
        "Low-rank updates computed from the weight by a small network (PEANuT; 2024, arXiv:2410.01870).", LINEAR,
        names={"depth": "network_depth"},
    ),
    "peft-glora": Family(
        "Scale and shift weight and bias by trained terms (GLoRA; Chavan et al., 2023, arXiv:2306.07967).", LINEAR
    ),
    "psoft": Family("Orthogonal fine-tuning within the principal subspace of each weight (PSOFT).", LINEAR,
                    to_lora=True),
    "pvera": Family(
        "VeRA with a distribution in place of each vector (PVeRA; 2025, arXiv:2512.07703).", LINEARS,
        four_bit=True, random=True, bounded=False, left_out=("sample_at_inference",),
    ),
    "randlora": Family(
        "Full-rank updates from fixed random bases (RandLoRA; Albert et al., 2025, arXiv:2502.00987).", LINEARS,
        four_bit=True, to_lora=True,
    ),
    "road": Family(
        "Rotate pairs of outputs (RoAd; Liao and Monz, 2024, arXiv:2409.00119).", LINEAR, four_bit=True,
        divides={"group_size": "out"},
    ),
    "shira": Family(
        "Train some entries of each weight (SHiRA; Bhardwaj et al., 2024, arXiv:2406.13175).", LINEAR,
        to_lora=True, bounded=False,
    ),
    "supertuning": Family("Train some entries of each weight, chosen by size (2026, arXiv:2607.09287).", LINEAR),
    "tinylora": Family(
        "A few trained numbers in the singular directions of each weight (TinyLoRA; 2026, arXiv:2602.04118).",
        ("linear", "Conv1D", "embedding"), to_lora=True,
    ),
    "trainable_tokens": Family(
        "Train the vectors of some tokens, such as new ones.", ("embedding",), rows="token_indices",
        described={"token_indices": "Numbers of the tokens, which are rows of the table."},
    ),
    "unilora": Family(
        "One trained vector, from which all low-rank factors are taken (Uni-LoRA; 2025, arXiv:2506.00799).", LINEARS,
        exact=False, to_lora=True,
    ),
    "vblora": Family(
        "Low-rank factors mixed from one bank of vectors (VB-LoRA; Li et al., 2024, arXiv:2405.15179).", LINEARS,
        four_bit=True, exact=False, to_lora=True, divides={"vector_length": "in out"},
    ),
    "vera": Family(
        "Trained scales between two random matrices that layers share (VeRA; Kopiczko et al., 2023, arXiv:2310.11454).",
        LINEARS, four_bit=True, to_lora=True, bounded=False,
    ),
    "waveft": Family("Train some wavelet coefficients of each weight's update (WaveFT).", LINEARS, four_bit=True,
                     to_lora=True),
}  # fmt: skip

LEFT_OUT = {
    "adalora": "ranks are allocated by a call after each optimizer step, which a loop of one's own would not make",
}


class FamilyAdapter(Adapter):
    """Base of the classes that `__getattr__` makes."""

    family: ClassVar[Family]
    peft_name: ClassVar[str]  # its name in peft's `PeftType`
    peft_fields: ClassVar[Mapping[str, str]]  # peft's names of the settings, by edgetune's

    @property
    def starts_exact(self) -> bool:
        """Whether the fresh adapter leaves the outputs: with peft's default start."""
        fields = type(self).model_fields
        starts = [name for name in self.family.starts if name in fields]
        return self.exact and all(getattr(self, name) == fields[name].default for name in starts)

    @model_validator(mode="after")
    def _accepted_by_peft(self) -> FamilyAdapter:
        try:
            self._config(target_modules=["any"])
        except FAILURES as error:
            raise ValueError(f"peft refuses these settings: {error}") from error
        return self

    def _config(self, **more: Any) -> Any:
        config = require("peft", self.name).mapping.PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_name]
        settings = {theirs: getattr(self, ours) for ours, theirs in self.peft_fields.items()}
        with silence_libraries():
            return config(**settings, **self.family.fixed, **more)

    def config(self, model: nn.Module, chosen: dict[str, nn.Module], targets: list[str] | str) -> Any:
        """peft's config for these layers. Raises for a width or a base that the family cannot adapt."""
        for name, layer in chosen.items():
            self._refuse(name, layer)
        every = [name for name, _ in model.named_modules() if name]
        more: dict[str, Any] = {}
        if self.name == "ia3":
            more["feedforward_modules"] = exact_targets(every, self._feed_forward(chosen))
        if self.name == "lily":
            targets = _endings(every, chosen)
        config = self._config(target_modules=targets, **more)
        if hasattr(config, "fan_in_fan_out"):
            config.fan_in_fan_out = all(is_transposed(layer) for layer in chosen.values())
        return config

    def _refuse(self, name: str, layer: nn.Module) -> None:
        """Raise for a layer that these settings do not fit."""
        if is_nf4(layer) and not self.family.four_bit:
            able = [other for other, family in FAMILIES.items() if family.four_bit]
            raise EdgetuneError(
                f"{name} has a 4-bit weight, which peft's {self.name} cannot adapt", got=self.name,
                allowed=["lora", *able], near="", action=f'remove nf4, or put "{name}" in its skip',
            )  # fmt: skip
        width_in, width_out = widths_of(layer)
        self._refuse_rows(name, width_in)
        rank = getattr(self, "rank", None)
        if self.family.bounded and rank and rank > min(width_in, width_out) > 0:
            raise EdgetuneError(
                f"{name} is {width_in} wide and gives {width_out}: the rank is above that", got=rank,
                action=f'set rank to {min(width_in, width_out)} at most, or add "{name}" to skip',
            )  # fmt: skip
        patterns = any(value for field, value in self if field.endswith("_pattern"))  # they are peft's to check
        for setting, sides in self.family.divides.items():
            size = int(setting) if setting.isdecimal() else getattr(self, setting)
            for side in sides.split():
                width = {"in": width_in, "out": width_out, "rank": rank}[side]
                if size and width and width % size and not patterns:
                    divided = {"in": "the input width", "out": "the output width", "rank": "the rank"}[side]
                    raise EdgetuneError(
                        f"{name}: {setting} must divide {divided} {width}", got=size,
                        action=f'change it, or add "{name}" to skip',
                    )  # fmt: skip

    def _refuse_rows(self, name: str, height: int) -> None:
        """Raise for rows that the table of this height has not, or has once."""
        rows: list[int] = getattr(self, self.family.rows) if self.family.rows else []
        missing = [row for row in rows if not 0 <= row < height]
        if missing or len(set(rows)) < len(rows):
            problem = f"{name} has {height} tokens" if missing else "a token is listed twice"
            action = "take the numbers that the tokenizer gives, each once"
            raise EdgetuneError(f"{self.family.rows}: {problem}", got=missing or rows, action=action)

    def _feed_forward(self, chosen: dict[str, nn.Module]) -> list[str]:
        patterns: tuple[str, ...] = getattr(self, "feedforward", ())
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in chosen):
                raise no_match_error("feedforward: the pattern matches no layer of targets", pattern, chosen)
        return [name for name in chosen if matches(name, patterns)]


def _endings(every: list[str], chosen: Mapping[str, nn.Module]) -> list[str]:
    """The last parts of the names, by which peft's Lily groups the layers that share factors."""
    endings = sorted({name.rpartition(".")[2] for name in chosen})
    others = [name for name in every if name.rpartition(".")[2] in endings and name not in chosen]
    if others:
        raise EdgetuneError(
            "lily shares factors between all layers of a name, and these are left out", got=others,
            action="choose them too, without skip and depth",
        )  # fmt: skip
    return endings


def _make(name: str) -> type[FamilyAdapter]:
    """The class of a recipe name, made from its line in the table and peft's config."""
    family, title = FAMILIES[name], PEFT_FAMILIES[name]
    peft_name = _peft_name(name)
    config = require("peft", name).mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_name]
    names = {"r": "rank", **family.names}
    fields = settings_of(config, names, family.left_out, family.described)
    theirs = {ours: peft for peft, ours in names.items()}
    extra: dict[str, Any] = {}
    if name == "ia3":
        text = "Patterns of the layers of `targets` whose inputs are scaled in place of their outputs."
        extra["feedforward"] = (tuple[str, ...], Field((), description=text))
    if family.rows:
        hint, own = fields[family.rows]
        fields[family.rows] = (hint, Field(..., min_length=1, description=own.description))
    kind = create_model(title, __base__=FamilyAdapter, __module__=__name__, __doc__=family.summary, **fields, **extra)  # type: ignore[call-overload]
    kind.name, kind.family, kind.peft_name = name, family, peft_name
    kind.peft_fields = {ours: theirs.get(ours, ours) for ours in fields}
    kind.exact, kind.adapts, kind.merges = family.exact, family.adapts, family.merges
    return kind  # type: ignore[no-any-return]


def peft_types() -> list[str]:
    """Names in peft's `PeftType` of the families that are techniques, LoRA's first."""
    return ["LORA", *map(_peft_name, FAMILIES)]


def _peft_name(name: str) -> str:
    return name.removeprefix("peft-").upper()


def from_config(config: Any, names: list[str]) -> FamilyAdapter:
    """The technique for these layers that a config of peft's describes."""
    name = next(name for name in FAMILIES if _peft_name(name) == config.peft_type)
    kind: type[FamilyAdapter] = load(TECHNIQUES[name])
    settings = {ours: getattr(config, theirs) for ours, theirs in kind.peft_fields.items()}
    if name == "ia3" and config.feedforward_modules:
        settings["feedforward"] = tuple(select_targets(config.feedforward_modules, names))
    return kind(targets=tuple(names), **settings)


if TYPE_CHECKING:

    def __getattr__(title: str) -> type[FamilyAdapter]: ...

else:

    def __getattr__(title: str) -> type[FamilyAdapter]:
        """Make a class at its first use: it needs peft, whose import takes seconds."""
        names = {title: name for name, title in PEFT_FAMILIES.items()}
        if title not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {title!r}")
        globals()[title] = kind = _make(names[title])
        return kind
