"""8-bit weights and 8-bit activations with fixed scales, for convolutions above all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta

from edgetune.capture.dynamic import free_sizes
from edgetune.capture.positional import as_plain
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, device_of, rows_of
from edgetune.core.layers import select
from edgetune.core.outputs import named_outputs
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.core.technique import Needs, Sample, Technique
from edgetune.core.traits import Trait
from edgetune.quant.in_float import describe_float_operators, float_operators
from edgetune.quant.integers import Integers
from edgetune.quant.observers import Observer
from edgetune.quant.quantizers import OWN

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # what `skip` can name


class Int8(Technique):
    """Quantize statically to 8 bits, with scales calibrated on `calibration_batches` batches of the sample.

    The model is captured with `torch.export` and rewritten by ExecuTorch's quantizer for XNNPACK, so the result is
    a `Static8` around a graph, not the original class. It runs in eager mode with any number of rows and gives the
    same results as the exported program. Batch norms are folded and dropout is removed, so it can no longer be
    trained. Layers that `skip` matches stay in floating point; a pattern that matches no layer raises
    `EdgetuneError`. `target` is the target of the later export: Ethos-U, TOSA and QNN have their own quantizers and
    observers, which support no `skip`, no other `observer` and no `bias_correction`.

    `observer` says which range of a layer's activations gets the 256 steps: all that calibration saw (`minmax`), all
    but the outermost 0.01 % (`percentile`), that of the least squared error (`mse`), or that of the least divergence,
    as TensorRT does (`entropy`). `auto` calibrates on all but the last quarter of the batches and takes the one whose
    outputs are nearest the float model's on these. `bias_correction` moves each bias by what rounding shifts in the
    mean of the layer's outputs over the calibration batches (Nagel et al., 2019, arXiv:1906.04721); it wants a hundred
    rows or more.
    """

    name: ClassVar[str] = "int8"
    leaves: ClassVar[Trait] = Trait.INTEGER

    per_channel: bool = True
    """Use one scale for each output channel of a weight; `false`: one for the whole weight."""
    calibration_batches: int = Field(default=8, ge=1)
    """Number of batches of training rows on which activation ranges are measured."""
    observer: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "minmax"
    """How ranges are found: `minmax`, `percentile` (99.99 %), `mse`, `entropy`, or the best of them on calibration
    batches held apart (`auto`)."""
    bias_correction: bool = False
    """Move each bias by what rounding shifts in the mean of a layer's outputs over the calibration batches."""
    skip: tuple[str, ...] = ()
    """Patterns of layers to keep in floating point."""
    target: str = "xnnpack"
    """The target of the later export: the same as `target` in `export`."""

    @property
    def needs(self) -> Needs:
        """Batches to calibrate on."""
        return "batches"

    def for_rehearsal(self) -> Technique:
        """Ranges by one pass over the batches, and biases as they are."""
        return self.model_copy(update={"observer": "minmax", "bias_correction": False})

    def note(self, model: nn.Module) -> str:
        """What stays in floating point, and which observer `auto` took."""
        return model.note if isinstance(model, Static8) else ""

    def apply(self, model: nn.Module, sample: Sample | None = None) -> nn.Module:
        """Return the quantized graph of `model`; `model` itself is left in eval mode."""
        sample = self.require_sample(sample)
        with silence_libraries():
            require("executorch", "int8")
            require("torchao", "int8")
        if device_of(model).type != "cpu":
            raise EdgetuneError("int8 works on the CPU", got=str(device_of(model)), action="model.cpu() first")
        if self.target in OWN and (self.observer != "minmax" or self.bias_correction):
            raise EdgetuneError(
                f"int8 for target {self.target} has its own observers and takes no other, and no bias_correction",
                got=self.observer if self.observer != "minmax" else "bias_correction",
                action="leave it out",
            )
        skipped: set[str] = set()
        if self.skip:
            layers = {name for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
            skipped = layers - select(model, ("*",), self.skip, LAYERS).keys()
        from edgetune.quant.pt2e import quantize_static

        source_parameters = sum(parameter.numel() for parameter in model.parameters())
        batches = sample.first_batches(self.calibration_batches)
        with as_plain(model.eval()) as here:
            graph, errors = quantize_static(
                here, sample.inputs, batches, per_channel=self.per_channel, observer=self.observer,
                bias_correction=self.bias_correction, skip=frozenset(skipped), target=self.target,
            )  # fmt: skip
            with silence_libraries(), torch.no_grad():
                returned = call(here, sample.inputs)
        names = tuple(sample.inputs) if isinstance(sample.inputs, dict) else ()
        keys = None if isinstance(returned, (Tensor, tuple, list)) else tuple(named_outputs(returned))
        in_float = describe_float_operators(float_operators(graph))
        note = "; ".join(filter(None, [in_float, _describe_choice(errors)]))
        return Static8(graph, names, source_parameters, integers=self.target not in OWN, keys=keys, note=note).eval()


def _describe_choice(errors: dict[Observer, float]) -> str:
    """`observer mse, of the least squared error of the outputs: mse 3.2 %, minmax 3.4 %`; empty if none was chosen."""
    if not errors:
        return ""
    compared = ", ".join(f"{observer} {100 * error:.2g} %" for observer, error in errors.items())
    return f"observer {next(iter(errors))}, of the least squared error of the outputs: {compared}"


_STORED = ("names", "source_parameters", "integers", "keys", "note")  # of a Static8, beside its graph


class Static8(nn.Module):
    """A statically quantized graph. Takes its inputs by position or by the names the model had; returns its outputs.

    With `keys` several of them come as a mapping, as the model returned them, else as a tuple.

    With `integers` it computes in whole numbers, as XNNPACK does; else row by row, each operator in floating point
    between roundings to 8 bits. `torch.export` gets the graph that a target is lowered from.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        names: tuple[str, ...],
        source_parameters: int,
        *,
        integers: bool = True,
        keys: tuple[str, ...] | None = None,
        note: str = "",
    ) -> None:
        super().__init__()
        self.graph = graph
        self.names = names
        self.keys = keys
        self.integers = integers
        self.note = note  # for the reader of a report
        self.source_parameters = source_parameters  # of the float model: the folded int8 weights are buffers
        for parameter in graph.parameters():
            parameter.requires_grad_(False)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The outputs of the model: a tensor, a tuple or a mapping of them."""
        outputs = self._outputs((*inputs, *(named[name] for name in self.names[len(inputs) :])))
        single = isinstance(outputs, Tensor)
        return outputs if single or self.keys is None else dict(zip(self.keys, outputs, strict=True))

    def _outputs(self, tensors: tuple[Tensor, ...]) -> Any:
        if self.integers and not torch.compiler.is_exporting():
            return Integers(self.graph).run(*tensors)
        if not self.integers and len(tensors[0]) != 1:
            rows = [self._outputs(rows_of(tensors, row, row + 1)) for row in range(len(tensors[0]))]  # type: ignore[arg-type]
            return torch.cat(rows) if isinstance(rows[0], Tensor) else tuple(map(torch.cat, zip(*rows, strict=True)))
        with preserve_node_meta():  # a program's operators keep the names of the float model's modules
            return fx.Interpreter(self.graph).run(*tensors)

    def write(self, path: Path, inputs: tuple[Tensor, ...]) -> None:
        """Store the graph as a program of `torch.export`; `inputs`: an example, whose rows may be of any number."""
        sizes = free_sizes(inputs, torch.export.Dim.AUTO)
        settings = {name: getattr(self, name) for name in _STORED}
        with silence_libraries():
            program = torch.export.export(self.graph, inputs, dynamic_shapes=sizes)
            torch.export.save(program, path, extra_files={"static8.json": json.dumps(settings)})

    @classmethod
    def read(cls, path: Path) -> Static8:
        """The graph that `write` stored."""
        extra = {"static8.json": ""}
        with silence_libraries():
            graph = torch.export.load(path, extra_files=extra).module(check_guards=False)
        settings: dict[str, Any] = json.loads(extra["static8.json"])
        keys = settings.pop("keys")
        return cls(graph, tuple(settings.pop("names")), keys=tuple(keys) if keys else None, **settings).eval()

    def train(self, mode: bool = True) -> Static8:
        """Set the flag only: a captured graph has a single mode."""
        self.training = mode
        return self
