"""Several adapters on one exported base: their side paths in the program, and a small file for each of them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.adapt.low_rank import LowRank, linear_widths, read_low_rank
from edgetune.capture.positional import Positional, as_plain, as_program
from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.inputs import Inputs
from edgetune.core.parity import Parity
from edgetune.core.registry import require
from edgetune.export.program_inputs import ProgramInputs
from edgetune.export.side_paths import AdaptedProgram, SidePaths, multiply_given, multiply_stored
from edgetune.export.targets.target import Target
from edgetune.program.adapters import SIGNATURE, adapter_path
from edgetune.program.manifest import AdaptedLayer, AdapterFile, AdapterForm, AdaptersSpec, TensorSpec, adapter_inputs
from edgetune.program.program_files import sha256_of
from edgetune.program.tensor_data import Weight, merge_tensor_data, read_tensor_data, write_tensor_data

FORMS: tuple[AdapterForm, ...] = ("inputs", "files", "methods")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEEPS_APART = ("xnnpack", "portable")  # targets whose weights can be in a file of their own
Proof = TypeVar("Proof", bound="tuple[Parity | None, object]")
_STORED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of a program, and the side paths that serve them all."""

    adapters: tuple[LowRank, ...]
    form: AdapterForm
    layers: tuple[AdaptedLayer, ...]
    signature: str

    def paths(self) -> SidePaths:
        """The side paths beside the layers of the base."""
        product = multiply_given if self.form == "inputs" else multiply_stored
        return SidePaths(tuple(layer.name for layer in self.layers), product)

    def tensors(self, adapter: LowRank | None) -> tuple[Tensor, ...]:
        """A and B of each layer as the program has them: filled up with zeros, which also stand for no adapter."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            none = torch.zeros(0, layer.inputs), torch.zeros(layer.outputs, 0)
            a, b = adapter.factors.get(layer.name, none) if adapter is not None else none
            missing = layer.rank - a.shape[0]
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
            tensors += [a, b] if self.form == "files" else [a.mT[None].contiguous(), b.mT[None].contiguous()]
        return tuple(tensors)

    def placeholders(self) -> tuple[Tensor, ...]:
        """Values for the lowering, of which no two tensors are equal: the runtime finds a weight by its hash.

        They depend on the signature alone, so that the keys of an adapter's file are those of any such program.
        """
        draw = torch.Generator().manual_seed(int(self.signature[:15], 16))
        return tuple(0.01 * torch.randn(tensor.shape, generator=draw) for tensor in self.tensors(None))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the program that hold an adapter."""
        return adapter_inputs(self.layers) if self.form == "inputs" else ()

    def given(self, adapter: LowRank | None) -> tuple[Tensor, ...]:
        """The values of those inputs."""
        return self.tensors(adapter) if self.form == "inputs" else ()

    def extend(self, inputs: ProgramInputs) -> ProgramInputs:
        """The inputs of the program: those of the base, and zeros for an adapter, if adapters are inputs."""
        return inputs.with_last(self.inputs, self.given(None))

    def rows_for(self, program: nn.Module, inputs: ProgramInputs, adapter: LowRank | None) -> ProgramInputs:
        """The inputs for a run with the adapter, which `program` stores if adapters are no inputs."""
        if isinstance(program, AdaptedProgram) and self.form == "files":
            program.store(self.tensors(adapter))
        return inputs.with_last(self.inputs, self.given(adapter))


@dataclass(frozen=True)
class AdapterFiles:
    """The files of a program with adapters: the base's weights, if they stand apart, and each adapter's bytes."""

    weights: bytes  # of the `.ptd`; empty if they are in the program
    adapters: Mapping[str, bytes] = field(default_factory=dict)  # by name
    form: AdapterForm = "inputs"

    def beside(self, path: Path) -> dict[Path, bytes]:
        """The adapters' files next to the program at `path`."""
        return {adapter_path(path, name, self.form): data for name, data in self.adapters.items()}


@contextmanager
def as_program_with(adapters: AdapterSet | None, model: nn.Module, inputs: Inputs) -> Iterator[Positional]:
    """The model as a program, with the side paths of the adapters if there are any."""
    if adapters is None:
        with as_program(model, inputs) as program:
            yield program
        return
    paths, stored = adapters.paths(), adapters.placeholders() if adapters.form == "files" else ()
    with as_plain(model) as here, paths.attached(here):
        yield AdaptedProgram(here, inputs, paths, stored).eval()


def read_adapters(
    folders: Mapping[str, str | Path] | None, form: str, rank: int | None, model: nn.Module, target: Target, dtype: str
) -> AdapterSet | None:
    """The adapters in `folders`, by name, for the plain base `model`; `None` if there are none to be.

    `rank`: of those of other families than LoRA. Raises `EdgetuneError` for an adapter that cannot.
    """
    if folders is None:
        if rank is not None:
            raise EdgetuneError("adapter_rank: there are no adapters", got=rank, action="leave it out")
        return None
    _check_request(folders, form, rank, target)
    adapters = tuple(read_low_rank(name, folder, model, rank) for name, folder in folders.items())
    if rank is not None and all(adapter.family == "LORA" for adapter in adapters):
        message = "adapter_rank is for adapters of other families, and these are LoRAs, which keep their ranks"
        raise EdgetuneError(message, got=rank, action="leave it out, or lower a rank with et.combine_adapters")
    layers = []
    for name, layer in model.named_modules():
        ranks = [adapter.factors[name][0].shape[0] for adapter in adapters if name in adapter.factors]
        if ranks:
            inputs, outputs = linear_widths(layer) or (0, 0)
            layers.append(AdaptedLayer(name=name, inputs=inputs, outputs=outputs, rank=max(ranks)))
    chosen: AdapterForm = next(each for each in FORMS if each == form)
    return AdapterSet(adapters, chosen, tuple(layers), _sign(model, layers, chosen, dtype))


def split_files(adapters: AdapterSet | None, weights: bytes) -> AdapterFiles:
    """Each adapter's file; in the form `files`, cut out of the weights of the lowered program."""
    if adapters is None:
        return AdapterFiles(weights)
    if adapters.form == "inputs":
        return AdapterFiles(weights, {one.name: _safetensors(adapters, one) for one in adapters.adapters})
    every = read_tensor_data(weights)
    places = _find_placeholders(adapters, every)
    base = {key: weight for key, weight in every.items() if key not in places}
    signature = {SIGNATURE: Weight(adapters.signature.encode())}
    files = {}
    for adapter in adapters.adapters:
        tensors = adapters.tensors(adapter)
        own = {key: Weight(_bytes(tensors[place], dtype), every[key].layout) for key, (place, dtype) in places.items()}
        files[adapter.name] = write_tensor_data(own | signature)
    return AdapterFiles(write_tensor_data(base), files, adapters.form)


def prove_each(
    adapters: AdapterSet | None,
    files: AdapterFiles,
    data: Path | None,
    path: Path,
    prove: Callable[[LowRank | None, Path | None], Proof],
) -> tuple[Proof, AdaptersSpec | None]:
    """Prove the program with every adapter, and the base alone where it can run.

    `prove` gets an adapter and the data file of the program. Returns the proof of the base, or else of the first
    adapter, and the section of the manifest of the program at `path`.
    """
    if adapters is None:
        return prove(None, data), None
    proofs = [prove(None, data)] if adapters.form == "inputs" else []
    described = []
    for adapter in adapters.adapters:
        content = files.adapters[adapter.name]
        with _merged(data, content, adapters.form) as merged:
            try:
                proofs.append(prove(adapter, merged))
            except EdgetuneError as error:
                error.what = f"with adapter {adapter.name}: {error.what}"
                raise
        described.append(
            AdapterFile(
                name=adapter.name,
                file=adapter_path(path, adapter.name, adapters.form).name,
                size_bytes=len(content),
                sha256=sha256_of(content),
                rank=adapter.rank,
                family=adapter.family,
                error=adapter.error,
                parity=proofs[-1][0],
            )
        )
    section = AdaptersSpec(
        form=adapters.form, signature=adapters.signature, layers=adapters.layers, files=tuple(described)
    )
    return proofs[0], section


@contextmanager
def _merged(data: Path | None, adapter: bytes, form: AdapterForm) -> Iterator[Path | None]:
    """The data file with the adapter in it, if it is not an input."""
    if data is None or form == "inputs":
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="edgetune-") as folder:
        merged = Path(folder, data.name)
        merged.write_bytes(merge_tensor_data(data.read_bytes(), adapter))
        yield merged


def _check_request(folders: Mapping[str, str | Path], form: str, rank: int | None, target: Target) -> None:
    if rank is not None and rank < 1:
        raise EdgetuneError("adapter_rank: must be at least 1", got=rank, action="leave it out, or give a rank")
    if form not in FORMS:
        raise EdgetuneError(
            "adapters are inputs of the program, files that are loaded beside it, or methods", got=form, allowed=FORMS
        )
    if not folders:
        raise EdgetuneError("there are no adapters", action='write adapters={"en": folder}, or leave adapters out')
    for name in folders:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise EdgetuneError(
                "the name of an adapter becomes part of its file's name",
                got=name,
                action="use letters, digits, dots, dashes and underscores, a letter or digit first",
            )
    if len({name.casefold() for name in folders}) < len(folders):
        raise EdgetuneError("two adapters have one name but for upper and lower case", got=list(folders))
    if form == "files" and target.name not in _KEEPS_APART:
        raise EdgetuneError(
            f"target {target.name} keeps its weights in the program, so an adapter cannot be a file of its own",
            got=target.name,
            allowed=_KEEPS_APART,
            action="lower with target='xnnpack', or with form='inputs'",
            exit_code=Exit.EXPORT,
        )


def _sign(model: nn.Module, layers: Sequence[AdaptedLayer], form: AdapterForm, dtype: str) -> str:
    """SHA-256 of the base's names and shapes, and of what the side paths of the program are."""
    base = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    sides = [layer.model_dump(mode="json") for layer in layers]
    return hashlib.sha256(json.dumps([base, sides, form, dtype], sort_keys=True).encode()).hexdigest()


def _safetensors(adapters: AdapterSet, adapter: LowRank) -> bytes:
    save = require("safetensors.torch", "lora").save
    names = [spec.name for spec in adapters.inputs]
    tensors = dict(zip(names, adapters.tensors(adapter), strict=True))
    data: bytes = save(tensors, metadata={SIGNATURE: adapters.signature, "name": adapter.name})
    return data


def _find_placeholders(adapters: AdapterSet, weights: Mapping[str, Weight]) -> dict[str, tuple[int, torch.dtype]]:
    """By key of the lowered weights, which placeholder it is, and the type in which it is stored."""
    stored = {_bytes(t, dtype): (i, dtype) for dtype in _STORED for i, t in enumerate(adapters.placeholders())}
    places = {key: stored[weight.data] for key, weight in weights.items() if weight.data in stored}
    missing = set(range(2 * len(adapters.layers))) - {place for place, _ in places.values()}
    if missing:
        names = [adapters.layers[place // 2].name for place in sorted(missing)]
        raise EdgetuneError(
            f"the backend changed the weights of the side path of {truncate_list(dict.fromkeys(names), 4)}, and they "
            "cannot be told apart from the base's",
            action="export with form='inputs'",
            exit_code=Exit.EXPORT,
        )
    return places


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
