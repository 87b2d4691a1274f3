"""The cached prefix: the outputs of the frozen stages for each row are stored on disk, and training starts after them.

A row is stored without its padding; in a batch it is padded again, with zeros. A row's values do not depend on its
batch: rows are computed in chunks of similar length that are the same in every run. So a run ends with the same bits
whether the cache was empty, full, or filled by another run, and whether it was interrupted.

If all rows of a batch are cached, the skipped stages return tensors of NaN that take no memory, and the last one
returns
the cached values. Anything that reads what it must not read turns the logits into NaN, which a check detects before the
first update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit, truncate_list
from edgetune.core.inputs import Inputs, call, logits_of, tensors_of
from edgetune.core.modes import preserve_state
from edgetune.train.plan import TrainingRows
from edgetune.train.prefix.kept import CachedRows, CacheType
from edgetune.train.prefix.key import describe_cache
from edgetune.train.prefix.rows import blank_template, fill_template, name_arguments, relative_error
from edgetune.train.prefix.stages import Stages, check_order, find_prefix, find_random_modules, training_modes
from edgetune.train.prefix.store import RowStore

_CHECK_ROWS = 4
_MOST_ERROR = {"fp32": 1e-3, "fp16": 5e-2}  # of the logits in the check, relative to the largest


@dataclass(frozen=True)
class PrefixReport:
    """The figures of a cached prefix so far."""

    rows: int  # of the split
    mib: float  # on disk, once all rows are there
    hits: int  # rows that were there when a batch wanted them
    misses: int  # rows that were not
    computed: int  # rows that were computed, with those of their chunks
    damaged: int  # rows whose checksum did not hold; they were computed again
    stages_skipped: tuple[str, ...]
    boundary: str  # the stage whose output is kept
    first_trained: str  # the stage that training starts at
    check_error: float  # of the logits, cached against uncached, relative to the largest


class PrefixCache:
    """Stores and replays the outputs of a model's frozen prefix. Created by `open`; a context manager."""

    def __init__(self, model: nn.Module, stages: Stages, kept: CachedRows, dtype: CacheType) -> None:
        self.model, self.stages, self.kept, self.dtype = model, stages, kept, dtype
        self.whole = False  # stand-ins that may be written into
        self.check_error = 0.0
        self.closed = False

    @classmethod
    def open(
        cls,
        model: nn.Module,
        split: TrainingRows,
        *,
        folder: Path,
        dtype: CacheType = "fp32",
        max_mib: float = 4096,
        chunk_rows: int = 32,
    ) -> PrefixCache:
        """Find the frozen prefix, create or reuse its cache in `folder`, and check it against the model on a few rows.

        Args:
            model: with its trainable parameters already chosen, on its device, in training mode or not.
            split: the training rows; row n must always have the same inputs. Texts are padded on the right.
            folder: of all caches. Those of other models and data stay there, as far as `max_mib` allows for all of
                them.
            dtype: `fp32` keeps every bit; `fp16` takes half the space and rounds by at most 1 / 2048 of each value.
            max_mib: limit for all caches in `folder`. Those used least recently are removed first.
            chunk_rows: how many rows the prefix computes at once.

        Raises:
            EdgetuneError: nothing is frozen at the front; the prefix is random or mixes rows; something else reads
                the skipped outputs; there is not enough space. Raised before any training, with the model unchanged.
        """
        if len(split) == 0:
            raise EdgetuneError("cache_prefix: there are no rows", exit_code=Exit.DATA)
        stages = Stages(model)
        try:
            with training_modes(model) as modes:
                prefix = find_prefix(stages, split)
                stages.keep(set(prefix.stages))
                kept = CachedRows(model, split, prefix, stages, dtype, chunk_rows, modes)
                _refuse_noise(kept)
            described = describe_cache(model, split, prefix, dtype, chunk_rows, kept.autocast)
            smaller = "set cache_dtype to fp16" if dtype == "fp32" else "train on fewer rows"
            kept.store = RowStore.open(Path(folder), described, kept.sizes(), max_mib, smaller)
        except BaseException:
            stages.close()
            raise
        cache = cls(model, stages, kept, dtype)
        try:
            cache._check()
        except BaseException:
            cache.close()
            raise
        return cache

    def close(self) -> None:
        """Remove the wrappers from the model and close the files, which stay for the next training."""
        if not self.closed:
            self.closed = True
            self.stages.close()
            self.kept.store.close()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def rows(self, indices: Sequence[int]) -> Iterator[None]:
        """Inside, a call of the model on the inputs of these rows, in this order, skips the frozen stages."""
        if self.closed:
            raise EdgetuneError("this cached prefix was closed", action="open it again")
        with self.stages.play(_Replayer(self, [int(row) for row in indices])):
            yield

    @property
    def report(self) -> PrefixReport:
        """The figures so far."""
        kept = self.kept
        return PrefixReport(
            rows=len(kept.split),
            mib=kept.store.mib,
            hits=kept.hits,
            misses=kept.misses,
            computed=kept.computed,
            damaged=len(kept.store.damaged),
            stages_skipped=kept.prefix.skipped,
            boundary=kept.prefix.boundary.stage,
            first_trained=kept.prefix.first_trained,
            check_error=self.check_error,
        )

    def _check(self) -> None:
        """Compare the logits of the cached and of the full path on a few rows, with the whole model in eval mode."""
        rows = _probe(self.kept)
        reused = any(self.kept.store.inputs(row) is not None for row in rows)
        inputs = self.kept.inputs(rows)
        with preserve_state(self.model), torch.no_grad():
            full = logits_of(call(self.model, inputs))
            error = self._compare(inputs, rows, full)
            if reused and not error <= _MOST_ERROR[self.dtype]:  # kept by a model that only looked the same
                self.kept.store.clear()
                error = self._compare(inputs, rows, full)
        self.kept.reset()
        self.check_error = error
        if error <= _MOST_ERROR[self.dtype]:
            return
        if error != error:
            problem = (
                f"something reads the outputs of the stages before {self.kept.prefix.boundary.stage}, such as a skip "
                "connection, or a head on features of earlier stages"
            )
        else:
            problem = (
                f"the logits differ by {error:.2g} of the largest: what the prefix gives for a row depends on its "
            )
            problem += "batch or its padding"
        raise EdgetuneError(f"cache_prefix: {problem}", action="leave cache_prefix out for this model")

    def _compare(self, inputs: Inputs, rows: list[int], full: Tensor) -> float:
        """The error of the cached path on these rows; NaN if skipped outputs are read."""
        self.kept.reset()
        try:
            cached = self._run_cached(inputs, rows)
        except RuntimeError as error:
            if self.whole or "single memory location" not in str(error):
                raise
            self.whole = True  # something writes into the output of a skipped stage
            cached = self._run_cached(inputs, rows)
        width = self.kept.width_of(inputs)
        if not (width and full.dim() > 2 and full.shape[1] == width):
            return relative_error(full, cached)
        # logits per token: those of the padding do not count
        own = torch.arange(width)[None] < torch.tensor([self.kept.length(row) for row in rows])[:, None]
        return relative_error(full[own.to(full.device)], cached[own.to(full.device)])

    def _run_cached(self, inputs: Inputs, rows: list[int]) -> Tensor:
        with self.rows(rows):
            return logits_of(call(self.model, inputs))


class _Replayer:
    """Replays the cached values instead of running the prefix."""

    def __init__(self, cache: PrefixCache, rows: list[int]) -> None:
        self.cache, self.rows, self.place, self.width = cache, rows, 0, 0
        self.tensors: list[Tensor] = []

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Load the rows before the first stage is called."""
        inputs = name_arguments(args, kwargs)
        self.tensors, self.width = self.cache.kept.load(inputs, self.rows), self.cache.kept.width(inputs)
        self.place = 0

    def stage(self, name: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Blank outputs for skipped stages, the cached values for the last one; later stages run."""
        kept, prefix = self.cache.kept, self.cache.kept.prefix
        if self.place == len(prefix.calls):
            return plain(*args, **kwargs)
        check_order(prefix, self.place, name)
        made = prefix.calls[self.place]
        self.place += 1
        if self.place == len(prefix.calls):
            return fill_template(made.template, self.tensors)
        if not made.has_rows:
            return plain(*args, **kwargs)
        return blank_template(made.template, len(self.rows), self.width, kept.device, self.cache.whole)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _refuse_noise(kept: CachedRows) -> None:
    """Raise if the rows change, or the prefix draws random numbers, changes its buffers or is not deterministic."""
    model, rows = kept.model, _probe(kept)
    inputs, other = kept.inputs(rows), kept.inputs(rows)
    if any(not torch.equal(a, b) for a, b in zip(tensors_of(inputs), tensors_of(other), strict=True)):
        raise EdgetuneError(
            "cache_prefix: the inputs of a row are not the same each time",
            action="leave augmentation out, or leave cache_prefix out",
        )
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    states = _random_states(kept.device)
    first, again = (kept.compute(inputs)[1] for _ in range(2))
    now = dict(model.named_buffers())
    drew = any(not torch.equal(a, b) for a, b in zip(states, _random_states(kept.device), strict=True))
    went_on = any(not torch.equal(value, now[name]) for name, value in buffers.items())
    differs = any(relative_error(a, b) > 1e-3 for a, b in zip(first, again, strict=True))
    if not (drew or went_on or differs):
        return
    modules = find_random_modules(model, kept.prefix.stages)
    problem = "draws random numbers" if drew else "changes its buffers" if went_on else "gives something else each time"
    raise EdgetuneError(
        f"cache_prefix: in training mode the frozen prefix {problem}"
        + (f": {truncate_list(modules, 4)}" if modules else ""),
        action="put sparse-update first, whose frozen stages run in eval mode, or set dropout there to 0",
    )


def _probe(kept: CachedRows) -> list[int]:
    last, most = len(kept.order) - 1, min(_CHECK_ROWS, len(kept.order))
    return list(dict.fromkeys(kept.order[last * n // max(most - 1, 1)] for n in range(most)))
