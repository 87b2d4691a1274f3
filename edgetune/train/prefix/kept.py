"""The rows of a cached prefix: computed in chunks, identified by their inputs, stored on disk and batched again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, call, device_of, to_device
from edgetune.train.plan import TrainingRows
from edgetune.train.prefix.rows import bytes_of, digest_of, forms_in, name_arguments, stored_type, tensor_of
from edgetune.train.prefix.stages import Filler, Prefix, PrefixEnd, Stages, set_modes
from edgetune.train.prefix.store import RowStore

CacheType = Literal["fp32", "fp16"]


class CachedRows:
    """The prefix's outputs for each row of a split. `modes`: of every module, as in training."""

    def __init__(
        self,
        model: nn.Module,
        split: TrainingRows,
        prefix: Prefix,
        stages: Stages,
        dtype: CacheType,
        chunk_rows: int,
        modes: dict[nn.Module, bool],
    ) -> None:
        self.model, self.split, self.prefix, self.stages, self.modes = model, split, prefix, stages, modes
        self.forms = forms_in(prefix.boundary.template)
        self.types = [stored_type(form.dtype, dtype) for form in self.forms]
        self.device = device_of(model)
        self.autocast = autocast_of(self.device)
        # rows of like length together, in the same way in every run
        self.order = sorted(range(len(split)), key=lambda row: (self.length(row), row))
        self.chunks = [self.order[start : start + chunk_rows] for start in range(0, len(split), chunk_rows)]
        self.chunk_of = {row: n for n, chunk in enumerate(self.chunks) for row in chunk}
        self.served: set[int] = set()  # rows that this process has trained on
        self.hits = self.misses = self.computed = 0
        self.store: RowStore  # once there is room for it

    def sizes(self) -> list[list[int]]:
        """Bytes of each row, for each tensor."""
        return [
            [form.values(self.length(row)) * kind.itemsize for row in range(len(self.split))]
            for form, kind in zip(self.forms, self.types, strict=True)
        ]

    def reset(self) -> None:
        """Reset the counts of hits and misses."""
        self.served.clear()
        self.hits = self.misses = 0

    def length(self, row: int) -> int:
        """Tokens of a row; 0 if rows have none."""
        widths, lengths = self.prefix.widths, self.split.lengths
        return 0 if widths.short == widths.long or lengths is None else int(lengths[row])

    def width(self, inputs: dict[str | int, Any]) -> int:
        """Tokens that a batch is padded to; 0 if rows have none."""
        for name, form in self.prefix.inputs:
            if "tokens" in form.sizes and isinstance(inputs.get(name), Tensor):
                return int(inputs[name].shape[form.sizes.index("tokens")])
        return 0

    def width_of(self, inputs: Inputs) -> int:
        """The same for inputs that the model was not yet called with."""
        if isinstance(inputs, dict):
            return self.width(name_arguments((), inputs))
        return self.width(name_arguments((inputs,) if isinstance(inputs, Tensor) else inputs, {}))

    def digests(self, inputs: dict[str | int, Any], rows: Sequence[int]) -> list[bytes]:
        """The digest of each row's inputs, after checking that they are those of the split."""
        width = self.width(inputs)
        if width and max(self.length(row) for row in rows) > width:
            raise _other_inputs_error(f"they are {width} tokens wide, and the longest row has more")
        tensors = []
        for name, form in self.prefix.inputs:
            value = inputs.get(name)
            if not isinstance(value, Tensor) or tuple(value.shape) != form.shape(len(rows), width):
                got = tuple(value.shape) if isinstance(value, Tensor) else "missing"
                raise _other_inputs_error(f"{name} is {got} instead of {form.shape(len(rows), width)}")
            tensors.append((name, form, value.detach().cpu()))
            if name == "attention_mask" and width:
                self._refuse_other_padding(tensors[-1][2], rows, width)
        digests = []
        for n, row in enumerate(rows):
            parts = [form.row(value, n, self.length(row)) for _, form, value in tensors if form.has_rows]
            digests.append(digest_of(parts))
        return digests

    def _refuse_other_padding(self, mask: Tensor, rows: Sequence[int], width: int) -> None:
        expected = torch.arange(width)[None] < torch.tensor([self.length(row) for row in rows])[:, None]
        if mask.shape == expected.shape and not torch.equal(mask != 0, expected):
            raise EdgetuneError(
                "cache_prefix: the attention mask does not fit the rows' lengths",
                action="pad on the right and give the inputs of these rows, or leave cache_prefix out",
            )

    def inputs(self, rows: Sequence[int]) -> Inputs:
        """The inputs of these rows, on the model's device."""
        return to_device(self.split.batch(rows)[0], self.device)

    def compute(self, inputs: Inputs) -> tuple[dict[str | int, Any], list[Tensor]]:
        """The inputs that the model was called with, and the prefix's outputs."""
        filler = Filler(self.prefix)
        try:
            with self.stages.play(filler), torch.no_grad(), set_modes(self.modes):
                call(self.model, inputs)
        except PrefixEnd:
            return name_arguments(filler.args, filler.kwargs), filler.tensors
        raise EdgetuneError(
            f"cache_prefix: {self.prefix.boundary.stage} did not run as often as when the cache was opened",
            action="leave cache_prefix out for a model whose stages do not always run in the same order",
        )

    def _fill(self, chunk: Sequence[int]) -> None:
        """Compute and store the rows of a chunk; those already stored are not changed."""
        inputs, tensors = self.compute(self.inputs(chunk))
        digests, width = self.digests(inputs, chunk), self.width(inputs)
        self.computed += len(chunk)
        for form, tensor in zip(self.forms, tensors, strict=True):
            if tuple(tensor.shape) != form.shape(len(chunk), width) or tensor.dtype != form.dtype:
                raise EdgetuneError(
                    f"cache_prefix: {self.prefix.boundary.stage} gives {tuple(tensor.shape)} {tensor.dtype} instead of "
                    f"{form.shape(len(chunk), width)} {form.dtype}",
                    action="leave cache_prefix out for rows of different shapes",
                )
        stored = [_convert_to_stored(tensor, kind) for tensor, kind in zip(tensors, self.types, strict=True)]
        with self.store.lock_for_writing():
            for n, row in enumerate(chunk):
                there = self.store.read(row)
                if there is None or there[0] != digests[n]:
                    length = self.length(row)
                    values = [bytes_of(f.row(t, n, length)) for f, t in zip(self.forms, stored, strict=True)]
                    self.store.write(row, digests[n], values)

    def load(self, inputs: dict[str | int, Any], rows: Sequence[int]) -> list[Tensor]:
        """The cached tensors of these rows as one batch, padded with zeros; computes missing rows."""
        if autocast_of(self.device) != self.autocast:
            raise EdgetuneError(
                "cache_prefix: autocast differs from when the cache was opened",
                got=autocast_of(self.device),
                action=f"open the cache and train under the same autocast: {self.autocast}",
            )
        width = self.width(inputs)
        batch = [torch.zeros(form.shape(len(rows), width), dtype=form.dtype) for form in self.forms]
        for n, (row, digest) in enumerate(zip(rows, self.digests(inputs, rows), strict=True)):
            length = self.length(row)
            for tensor, form, kind, data in zip(batch, self.forms, self.types, self._row(row, digest), strict=True):
                form.row(tensor, n, length).copy_(tensor_of(data, kind, form.row_shape(length)))
        return [tensor.to(self.device) for tensor in batch]

    def _row(self, row: int, digest: bytes) -> list[bytearray]:
        """The bytes of one row, computed first if it is missing or has other inputs."""
        record = self.store.read(row)
        if record is not None and record[0] == digest:
            self.hits += 1
        else:
            self.misses += 1
            if record is None or row not in self.served:
                self._fill(self.chunks[self.chunk_of[row]])
                record = self.store.read(row)
        if record is None:
            raise EdgetuneError(
                f"cache_prefix: row {row} was stored but cannot be read back",
                got=str(self.store.folder),
                action="choose a folder on another disk",
                exit_code=Exit.DATA,
            )
        if record[0] != digest:
            raise EdgetuneError(
                f"cache_prefix: the inputs of row {row} change from time to time",
                action="leave augmentation out, or leave cache_prefix out",
            )
        self.served.add(row)
        return record[1]


def _other_inputs_error(problem: str) -> EdgetuneError:
    return EdgetuneError(
        f"cache_prefix: these inputs are not those of the rows: {problem}",
        action="call the model on the inputs of split.batch(indices), with the indices given to cache.rows",
    )


def _convert_to_stored(tensor: Tensor, kind: torch.dtype) -> Tensor:
    stored = tensor.detach().to("cpu", kind)
    if kind != tensor.dtype and not torch.isfinite(stored).all():
        raise EdgetuneError(
            "cache_prefix: the outputs of the prefix are too large for fp16",
            got=float(tensor.abs().max()),
            action="set cache_dtype to fp32",
        )
    return stored


def autocast_of(device: torch.device) -> str:
    """The dtype of autocast on this device, or `off`."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else "off"
