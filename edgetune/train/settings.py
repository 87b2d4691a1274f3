"""The settings of a `train` step."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgetune.core.technique import Settings, StepSettings
from edgetune.core.traits import Trait
from edgetune.train.loggers import LoggerName


class Distill(Settings):
    """Also learn from the outputs of an earlier model."""

    teacher: str
    """Name of an earlier step of the recipe: the teacher is the model just before that step."""
    weight: float = Field(default=0.5, gt=0, le=1)
    """Weight of the teacher's loss; the loss of the labels has the remaining weight."""
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Divisor of both models' logits; values above 1 also transfer the teacher's ranking of the other classes."""
    hidden: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the difference of hidden states, which is added: after each block of the model, from the teacher's
    after as large a share of its blocks, relative to their size (TinyBERT: Jiao et al., 2020, arXiv:1909.10351,
    equation 8). Both need hidden states of the same width."""


class Train(StepSettings):
    """Settings of a `train` step. One update takes `batch_size * accumulate` rows."""

    name: ClassVar[str] = "train"
    takes: ClassVar[Trait] = ~Trait.INTEGER

    epochs: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Passes over the training rows, which may be a fraction; set either this or `updates`."""
    updates: int | None = Field(default=None, ge=1)
    """Number of optimizer steps; set either this or `epochs`."""
    batch_size: int = Field(default=32, ge=1)
    """Rows per batch. The batches of an epoch have nearly equal sizes, none larger than this."""
    accumulate: int = Field(default=1, ge=1)
    """Number of batches whose gradients are accumulated for one update."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    """Peak learning rate, reached after the warm-up."""
    learning_rate_ratio: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    """LoRA+: the learning rate of the B matrices of LoRA, those that give a layer's output, is this times that of all
    else; embeddings have none (Hayou et al., 2024, arXiv:2402.12354, who recommend 16)."""
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Weight decay; it is not applied to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two AdamW moments. `adamw` only."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD. `sgd` only."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_pct: float = Field(default=6.0, ge=0, le=100)
    """Percentage of the updates during which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Maximum norm of all gradients together; larger ones are scaled down. `null`: no limit."""
    in_backward: bool = False
    """Update each parameter as soon as its gradient exists, so that the gradients are never all in memory. Needs
    `accumulate: 1` and `clip_norm: null`."""
    state_bits: Literal[32, 8] = 32
    """Bits of the two AdamW moments. `adamw` only."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Number of updates between checkpoints."""
    cache_prefix: bool = False
    """Store the outputs of the frozen first stages on disk, so that later epochs skip these stages."""
    cache_dtype: Literal["fp32", "fp16"] = "fp32"
    """Data type of the cached values."""
    cache_max_mib: int = Field(default=4096, ge=1)
    """Maximum size of all cached values on disk, in MiB."""
    distill: Distill | None = None
    """Also learn from an earlier state of the model; `null`: only from the labels."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights in the loss. `balanced`: every class has the same weight, regardless of its number of rows."""
    keep_best: bool = False
    """Keep the weights of the epoch with the best validation quality."""
    log: tuple[LoggerName, ...] = ()
    """Additional loggers for the loss and learning rate of each update, if they are installed.
    `checkpoints/NN-train/log.jsonl` is always written."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_or_updates(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("updates") is not None and "epochs" not in data:
            return {**data, "epochs": None}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if (self.epochs is None) == (self.updates is None):
            raise ValueError("give either epochs or updates; set the other to null")
        if self.in_backward and (self.accumulate > 1 or self.clip_norm is not None):
            raise ValueError("in_backward never has all gradients at once: set accumulate: 1 and clip_norm: null")
        if self.cache_prefix and self.distill is not None and self.distill.hidden:
            raise ValueError("distill.hidden needs the hidden states of every block: leave cache_prefix out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        unused = {"betas", "state_bits"} if self.optimizer == "sgd" else {"momentum"}
        if unused & self.model_fields_set and any(
            getattr(self, f) != type(self).model_fields[f].default for f in unused
        ):
            raise ValueError(f"{self.optimizer} has no {', '.join(sorted(unused))}")
        return self
