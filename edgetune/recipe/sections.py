"""The sections of a recipe other than model and data: steps, export, profile, budget."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, SerializeAsAny, model_validator

from edgetune.core.errors import EdgetuneError
from edgetune.core.floats import FloatType, KeyValueType
from edgetune.core.technique import Settings, StepSettings
from edgetune.program.manifest import AdapterForm

CHECK_ROWS = 500
LANGUAGE_CHECK_ROWS = 8  # a text takes a language program as long as a hundred rows take another
Positive = Annotated[float, Field(gt=0)]


class Finalize(StepSettings):
    """Finalize every applied technique: merge, freeze, pack. It has no settings, and runs automatically where
    needed."""

    name: ClassVar[str] = "finalize"
    closes: ClassVar[bool] = True


class Step(Settings):
    """One step: its recipe name and the settings object."""

    name: str
    """A technique, `train`, `eval` or `finalize`."""
    settings: SerializeAsAny[StepSettings]
    """What that step takes."""


class ExportSettings(Settings):
    """How to export the model. Without this section, nothing is exported."""

    target: str = "xnnpack"
    """The backend to lower the program for, such as `xnnpack`; `edgetune env` lists them."""
    dtype: FloatType = "fp32"
    """The type that the program computes in, next to quantized layers: `fp32`, `bf16` or `fp16`. In 16 bits, weights
    and activations take half the space; the program is called as before. XNNPACK has no convolutions in bf16."""
    language: bool = False
    """Export a text-generation program, with its cache and tokenizer; otherwise the program takes a window of
    tokens."""
    max_tokens: int = Field(512, ge=2)
    """Cache size of a text-generation program, in tokens, for prompt and answer together."""
    cache_dtype: KeyValueType | None = None
    """The type of a text-generation program's cache: `fp32`, `bf16`, `fp16`, or `int8`, which has a scale for each
    head of a position; `null`: that of `dtype`."""
    check_rows: int | None = Field(None, ge=1)
    """Number of held-out rows on which the program is compared with the eager model; a text-generation program
    continues the first half of each. `null`: 500, or 8 for a text-generation program, or all rows if there are
    fewer."""
    min_same_prediction_pct: float = Field(99.0, ge=0, le=100)
    """Percentage of these rows, or tokens, on which both must agree; otherwise the export fails."""
    adapters: dict[str, str] = {}  # noqa: RUF012  pydantic copies it
    """Adapters for the model as it ends, each by a name: folders in peft's format, relative to the recipe. One program
    then computes the model with any of them."""
    form: AdapterForm = "inputs"
    """How the program gets an adapter: as `inputs`, which change from call to call, from `files` beside it, or as
    `methods`, one for each."""
    adapter_rank: int | None = Field(None, ge=1)
    """Rank of the LoRAs in place of adapters of other families; `null`: the lowest within 1 %."""

    @model_validator(mode="after")
    def _check_cache(self) -> ExportSettings:
        if not self.language and self.max_tokens != ExportSettings.model_fields["max_tokens"].default:
            message = "max_tokens is the cache size of a text-generation program, but language is false"
            raise EdgetuneError(message, got=self.max_tokens, action="add language: true, or leave max_tokens out")
        if not self.language and self.cache_dtype is not None:
            message = "cache_dtype is the type of a text-generation program's cache, but language is false"
            raise EdgetuneError(message, got=self.cache_dtype, action="add language: true, or leave cache_dtype out")
        return self

    @model_validator(mode="after")
    def _check_adapters(self) -> ExportSettings:
        for name in ("form", "adapter_rank"):
            if not self.adapters and getattr(self, name) != ExportSettings.model_fields[name].default:
                message = f"{name} is for adapters, and there are none"
                raise EdgetuneError(message, got=getattr(self, name), action=f"add adapters, or leave {name} out")
        return self

    def rows_to_check(self, available: int) -> int:
        """Number of rows on which program and model are compared, of those in the test set."""
        if self.check_rows is not None:
            return self.check_rows
        return min(LANGUAGE_CHECK_ROWS if self.language else CHECK_ROWS, available)


class ProfileSettings(Settings):
    """Devices for which the program is profiled."""

    devices: tuple[str, ...] = ()
    """Devices to predict for: ids from `edgetune devices list`, `host`, or paths of descriptors."""
    measure: bool = True
    """Also time the program on this machine."""
    compare_float: bool = True
    """Also lower the model as it was before it was quantized and predict it, so that the report says where the
    quantized program is slower. Not of text-generation programs."""


class Budget(Settings):
    """Limits for one device. At least one limit is needed."""

    device: str
    """The device: an id from `edgetune devices list`, `host`, or the path of a descriptor."""
    latency_ms: Positive | None = None
    """Maximum latency of one call of the program, in ms; `null`: no limit."""
    size_mib: Positive | None = None
    """Maximum size of the program, in MiB; `null`: no limit."""
    train_memory_mib: Positive | None = None
    """Maximum memory during training, in MiB; `null`: no limit."""
    peak_memory_mib: Positive | None = None
    """Maximum memory while the program runs, in MiB; `null`: no limit."""

    @model_validator(mode="after")
    def _check_limits(self) -> Budget:
        if not any((self.latency_ms, self.size_mib, self.train_memory_mib, self.peak_memory_mib)):
            limits = ["latency_ms", "size_mib", "train_memory_mib", "peak_memory_mib"]
            raise EdgetuneError("limits nothing", allowed=limits, action="give at least one of them")
        return self
