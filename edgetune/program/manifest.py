"""The manifest of a program, `model.json`: its file, its calls, and what an app needs to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.floats import FloatType, KeyValueType
from edgetune.core.ledger import UndelegatedOperator
from edgetune.core.parity import Parity
from edgetune.program.carried import Carried, TextPreprocessing
from edgetune.program.operators import Operator
from edgetune.program.program_files import Record, check_bytes, program_at, sha256_of, unusable_error

ProgramKind = Literal["model", "language", "training", "methods"]


class TensorSpec(Record):
    """One input or output of the program."""

    name: str
    shape: tuple[int, ...]  # the largest, where sizes may differ
    dtype: str  # "int64", "float32"
    smallest: tuple[int, ...] | None = None  # None: `shape` is the only one
    free: dict[int, str] = Field(default_factory=dict)  # axes whose size may vary; equal names have equal sizes

    def __str__(self) -> str:
        pairs = zip(self.smallest or self.shape, self.shape, strict=True)
        return f"{self.dtype} ({', '.join(str(high) if low == high else f'{low} to {high}' for low, high in pairs)})"

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this type, and sizes within these bounds."""
        sizes = tuple(tensor.shape)
        pairs = zip(self.smallest or self.shape, sizes, self.shape)  # noqa: B905  their lengths are compared
        inside = len(sizes) == len(self.shape) and all(low <= size <= high for low, size, high in pairs)
        return inside and str(tensor.dtype).removeprefix("torch.") == self.dtype


class MemoryPlan(Record):
    """How the arena is laid out: the algorithm used, and the size by each one that was tried."""

    way: str
    tried_bytes: dict[str, int]
    holds_io: bool = True  # inputs and outputs are in the arena


class DataFile(Record):
    """The file with the weights, if they are not in the program."""

    file: str  # in the program's folder
    size_bytes: int
    sha256: str


class Call(Record):
    """One kind of call of the program, as lowered and as compared with eager mode.

    A plain program has the method `forward`; one with several methods, each of them; a training program, `forward` and
    `train`. A text-generation program has one method, `forward`, and two kinds of call: `token` and `prompt`.
    """

    name: str
    label: str = ""  # in words, for a report: "a token after 128"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    plan_bytes: int  # arena for the activations; each loaded method has its own
    plan: MemoryPlan | None = None
    delegates: int  # calls into the backend
    delegated_macs_pct: float
    delegated_operators_pct: float
    undelegated: tuple[UndelegatedOperator, ...]
    operators: tuple[Operator, ...]
    executed: tuple[Operator, ...] = ()  # as the runtime executes them, which a prediction sums up
    workspace_bytes: int | None = None  # of the backend, between its operators; None: of an older program
    folded: str = ""  # branches and norms that were folded into layers, and the change of the output
    parity: Parity | None = None  # None: it cannot run here (see the manifest's `note`), or see `training.parity`


class TokenizerSpec(Record):
    """The tokenizer of the program, and how a prompt becomes a chat."""

    file: str  # in the program's folder: tokenizer.json as Hugging Face's tokenizers write it
    sha256: str
    chat_template: str | None  # Jinja; None: the model takes plain text
    special_tokens: dict[str, str]  # what the template may name: bos_token, eos_token


class LanguageSpec(Record):
    """The part of the manifest for text-generation programs.

    The method `forward` takes `tokens` (1, n), n from 1 to `prefill_tokens`, and `position` (1,), the cache position of
    the first one, and returns the logits (1, 1, vocabulary) after the last. With several tokens, `position` must be a
    multiple of 32: otherwise the attention kernel masks later tokens wrongly.
    """

    architecture: str  # transformers' name of the model: "llama"
    max_tokens: int  # cache positions: prompt and answer together
    prefill_tokens: int  # most tokens of one call
    vocabulary: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    tokenizer: TokenizerSpec
    shared_bytes: int  # stored once for two operators: a tied head and embedding
    cache_bytes: int  # in the arena
    cache_dtype: KeyValueType = "fp32"
    first_difference: int | None = None  # index of the first greedy token that the model would not choose
    margin_at_difference: float | None = None  # of the model's logits there: its choice over the program's


MOMENTUM, EXP_AVG, EXP_AVG_SQ, STEP = "_momentum", "_exp_avg", "_exp_avg_sq", "optimizer_step"  # names of its state


class SliceSpec(Record):
    """Which channels of a layer's weight a `slice` stands for."""

    layer: str
    dim: int  # of the weight
    indices: tuple[int, ...]


class TrainingParity(Record):
    """Compares the program's losses with those of eager mode, from the same weights on the same batches."""

    steps: int
    learning_rate: float
    max_abs_loss_difference: float
    losses: tuple[float, ...]  # the program's


class UpdateRule(Record):
    """The optimizer inside a training program: SGD, or AdamW with its two moments."""

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0  # of SGD
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 0.0  # of AdamW, for tensors of two dimensions and more

    @property
    def parts(self) -> tuple[str, ...]:
        """What it keeps for each parameter: endings of the parameter's name."""
        if self.name == "adamw":
            return EXP_AVG, EXP_AVG_SQ
        return (MOMENTUM,) if self.momentum else ()

    def state_names(self, trainable: Sequence[str]) -> tuple[str, ...]:
        """The tensors that it keeps for these parameters."""
        own = tuple(name + part for name in trainable for part in self.parts)
        return (*own, STEP) if self.name == "adamw" else own


class TrainingSpec(Record):
    """The part of the manifest for training programs.

    `train` takes the inputs, the labels and the learning rate, and updates the state that `forward` reads.
    """

    optimizer: UpdateRule
    trainable: tuple[TensorSpec, ...]
    slices: tuple[SliceSpec, ...]
    state_bytes: int  # what trains and what the optimizer keeps for it; in no arena
    parity: TrainingParity


AdapterForm = Literal["inputs", "files", "methods"]


class AdaptedLayer(Record):
    """A layer of the base that has a side path."""

    name: str
    inputs: int
    outputs: int
    rank: int  # the largest of the adapters; lower ones are filled with zeros


def adapter_inputs(layers: Sequence[AdaptedLayer]) -> tuple[TensorSpec, ...]:
    """The inputs of a program that hold an adapter for these layers."""
    return tuple(
        TensorSpec(name=f"{layer.name}.lora_{letter}", shape=shape, dtype="float32")
        for layer in layers
        for letter, shape in (("A", (1, layer.inputs, layer.rank)), ("B", (1, layer.rank, layer.outputs)))
    )


class AdapterFile(DataFile):
    """One adapter of the program, as compared with the base in eager mode with that adapter."""

    name: str
    rank: int  # its own, the largest of its layers
    family: str = "LORA"  # in peft's words, before a LoRA took its place
    error: float = 0.0  # of what that LoRA adds to the weights, relative to what the adapter adds to them
    parity: Parity | None = None  # None: the program cannot run here

    @property
    def in_words(self) -> str:
        """`rank 8`, or `rank 16, 0.7 % off LOHA`."""
        return f"rank {self.rank}" + (f", {100 * self.error:.2g} % off {self.family}" if self.error else "")


class AdaptersSpec(Record):
    """The part of the manifest for programs that run one base with one of several low-rank adapters.

    In the form `inputs`, the matrices of every layer are the last inputs of the program, named `LAYER.lora_A`
    `(1, in, rank)` and `LAYER.lora_B` `(1, rank, out)`, and an adapter is a safetensors file of tensors with those
    names; zeros are the base alone. In the form `files`, an adapter is a `.ptd` that is loaded beside the base's.
    """

    form: AdapterForm
    signature: str  # SHA-256 of the base's names and shapes and of the side paths; in each adapter's file
    layers: tuple[AdaptedLayer, ...]
    files: tuple[AdapterFile, ...] = Field(min_length=1)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(layer.rank for layer in self.layers)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the program that hold an adapter; none in the form `files`."""
        return adapter_inputs(self.layers) if self.form == "inputs" else ()


class GuardSpec(Record):
    """The part of the manifest for the method `guard` of a text-generation program: a classifier of texts.

    `carried` is about this method alone: how a text becomes its inputs, and what its outputs mean.
    """

    call: Call
    carried: Carried


class Manifest(Record):
    """The content of `model.json`."""

    format: Literal[2] = 2
    kind: ProgramKind = "model"
    target: str
    dtype: FloatType = "fp32"  # that it computes in, apart from quantized layers; it takes and returns fp32
    device: str | None = None  # the device it was exported for, if one was given
    size_bytes: int  # of the .pte; what methods share is stored once
    sha256: str
    versions: dict[str, str]
    data: DataFile | None = None  # None: the weights are in the program
    note: str = ""
    carried: Carried | None = None  # what an app needs besides the program
    language: LanguageSpec | None = None
    training: TrainingSpec | None = None
    adapters: AdaptersSpec | None = None
    guard: GuardSpec | None = None
    calls: tuple[Call, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _sections_fit_the_kind(self) -> Manifest:
        sections = {"language": self.language, "training": self.training}
        if any((section is not None) != (name == self.kind) for name, section in sections.items()):
            raise ValueError(f"the sections are not those of a program of the kind {self.kind}")
        return self

    @property
    def main(self) -> Call:
        """The call that a summary describes: the prompt of a text-generation program, the step of a training one."""
        return self.calls[-1]

    @property
    def answering(self) -> tuple[Call, Carried | None]:
        """The call that answers for single rows, and its metadata: of a text-generation program, the guard's."""
        return (self.main, self.carried) if self.guard is None else (self.guard.call, self.guard.carried)

    @property
    def total_bytes(self) -> int:
        """Size of the program, its data file and all its adapters."""
        adapters = self.adapters.files if self.adapters is not None else ()
        return self.size_bytes + sum(file.size_bytes for file in (self.data, *adapters) if file is not None)

    @property
    def files(self) -> dict[str, str]:
        """The files that the program needs, with their SHA-256."""
        files = {self.data.file: self.data.sha256} if self.data is not None else {}
        if self.adapters is not None:
            files |= {file.file: file.sha256 for file in self.adapters.files}
        if self.language is not None:
            files[self.language.tokenizer.file] = self.language.tokenizer.sha256
        if self.carried is not None and isinstance(self.carried.preprocessing, TextPreprocessing):
            files[self.carried.preprocessing.tokenizer] = self.carried.preprocessing.sha256
        return files

    def own_inputs(self, call: Call) -> tuple[TensorSpec, ...]:
        """The inputs of a call without those that hold an adapter."""
        return call.inputs[: len(call.inputs) - len(self.adapters.inputs if self.adapters is not None else ())]

    def call(self, name: str = "") -> Call:
        """The call of that name; a program with one call needs no name."""
        if self.guard is not None and name == self.guard.call.name:
            return self.guard.call
        allowed = [call.name for call in self.calls]
        if not name and len(self.calls) == 1:
            return self.calls[0]
        if name not in allowed:
            action = "" if name else "name one: run(inputs, method=...)"
            message = "no such method" if name else "the program has several methods"
            raise EdgetuneError(message, got=name or None, allowed=allowed, action=action, exit_code=Exit.EXPORT)
        return self.calls[allowed.index(name)]


def manifest_path(path: Path) -> Path:
    """`model.json` for `model.pte`."""
    return path.with_suffix(".json")


def data_path(path: Path) -> Path:
    """`model.ptd` for `model.pte`."""
    return path.with_suffix(".ptd")


def data_file(path: Path, weights: bytes) -> DataFile | None:
    """The entry for the data file of the `.pte` at `path`; None if there are no weights."""
    return DataFile(file=data_path(path).name, size_bytes=len(weights), sha256=sha256_of(weights)) if weights else None


def read_manifest(path: Path, *kinds: ProgramKind) -> Manifest:
    """The manifest of the `.pte` at `path`, checked against that file, and against `kinds` if any are given."""
    manifest_file = manifest_path(program_at(path))
    if not manifest_file.is_file():
        message = f"the file that belongs to {path.name} is missing"
        action = "copy it there, or export the model again"
        raise EdgetuneError(message, where=str(manifest_file), action=action, exit_code=Exit.EXPORT)
    manifest = stored_manifest(manifest_file)
    if kinds and manifest.kind not in kinds:
        raise wrong_kind_error(path, manifest.kind, *kinds)
    check_bytes(path, manifest.sha256)
    return manifest


def stored_manifest(manifest_file: Path) -> Manifest:
    """The content of a `model.json`, without a look at the program."""
    try:
        stored = json.loads(manifest_file.read_text(encoding="utf-8"))
        if isinstance(stored, dict) and stored.get("format") != 2:
            raise EdgetuneError(
                "the manifest is of another format, and this version of edgetune reads only format 2",
                where=str(manifest_file),
                got=stored.get("format", "none"),
                action="export the model again with this version",
                exit_code=Exit.EXPORT,
            )
        return Manifest.model_validate(stored, strict=False)
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise unusable_error(f"the manifest cannot be read: {reason}", manifest_file) from error


_KINDS: dict[ProgramKind, tuple[str, str, str]] = {  # name, use, and how to make one
    "model": ("a plain program", "run it with Artifact.load(path).run(inputs)", ""),
    "language": (
        "a text-generation program",
        "run it with edgetune generate",
        "export the model with --language to have one that generates text",
    ),
    "training": (
        "a training program",
        "train it with edgetune train-pte",
        "make one with edgetune export-training",
    ),
    "methods": (
        "a program with several methods",
        "run it with Artifact.load(path).run(inputs, method=...)",
        "make one with et.export_methods",
    ),
}


def wrong_kind_error(path: Path, kind: ProgramKind, *wanted: ProgramKind) -> EdgetuneError:
    """The error for a program of the wrong kind."""
    this, use, _ = _KINDS[kind]
    needed, _, making = _KINDS[wanted[0]]
    message = f"a program of another kind: this is {this}, not {needed}"
    return EdgetuneError(message, where=str(path), action=making or use, exit_code=Exit.EXPORT)
