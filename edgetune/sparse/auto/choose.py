"""Choose the scheme for a budget from the contributions and the costs of all layers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.files import write_atomically
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.layers import parameter_layers
from edgetune.core.numbers import MIB
from edgetune.core.technique import Sample
from edgetune.data.dataset import cache_folder
from edgetune.lean.stages import blocks_of
from edgetune.sparse.auto.account import Account, CostModel, OptimizerSpec
from edgetune.sparse.auto.contribution import Contributions, analyze_contributions
from edgetune.sparse.auto.search import Limits, find_scheme
from edgetune.sparse.scheme import Part, Scheme, Under, is_norm, part_from_json, part_to_json, resolve

_MOST_ROWS = 128  # that the contribution analysis looks at


@dataclass(frozen=True)
class Chosen:
    """A scheme with its predicted costs and its contribution."""

    scheme: Scheme
    account: Account
    step_ms: float
    value: float
    contributions: Contributions

    def __str__(self) -> str:
        values = self.contributions.values
        most = sum(max(own.values(), default=0.0) for own in values.values())
        lines = [str(self.scheme), f"  predicted {self.account}; a step {self.step_ms:.0f} ms on this machine"]
        share = f"{100 * self.value / most:.0f} % of all" if most else "nothing"
        lines.append(f"  contributions by fisher: {share}")
        worth = {c.layer: values[c.layer][c.part] for c in self.scheme.choices if c.part in values.get(c.layer, {})}
        for name in sorted(worth, key=lambda name: -worth[name])[:12]:
            lines.append(f"    {100 * worth[name] / max(self.value, 1e-30):4.1f} % {self.scheme.part(name)!s} {name}")
        return "\n".join(lines)


def choose(
    model: nn.Module,
    sample: Sample,
    budget_mib: float,
    step_ms: float | None = None,
    *,
    under: Under,
    head: Part = "full",
    norms: bool = True,
    optimizer: OptimizerSpec | None = None,
) -> Chosen:
    """The scheme with the largest sum of contributions within a budget; of equally good ones the smallest.

    Args:
        model: not under a sparse update; left as it was.
        sample: `labelled` gives training batches of the size that training will use, `loss` the loss. Memory is
            counted for the largest of the first batches.
        budget_mib: weights, gradients, optimizer state and activations saved for backward together, which is what
            the ledger calls train_memory_mib.
        step_ms: most time of one training step on this machine, without loading data.
        under: puts the model under a scheme, see `SparseUpdate.under`.
        head: what of the head trains in any case (but not where it is tied to the embedding).
        norms: whether normalization layers may train.
        optimizer: the optimizer.

    Raises:
        EdgetuneError: (exit code 4) no scheme fits; it names the lowest reachable costs.
    """
    labelled, loss = sample.labels()
    optimizer = optimizer or OptimizerSpec()
    batches = list(_take_rows(labelled(), _MOST_ROWS))
    if not batches:
        raise EdgetuneError("sample.labelled gives no batch", exit_code=Exit.DATA)
    largest = max(batches, key=lambda batch: sum(t.numel() for t in tensors_of(batch[0])))
    costs = CostModel.of(model, largest, loss, under)
    fixed = _decide_head(model, costs, head, norms)
    contributed = analyze_contributions(model, batches, loss, head=list(fixed))
    values = {
        name: own
        for name, own in contributed.values.items()
        if name in {layer.name for layer in costs.layers if layer.trainable and not layer.shared}
        and (norms or not is_norm(model.get_submodule(name)))
    }
    limits = Limits(budget_mib * MIB, step_ms)
    parts = _find_or_load(costs, values, limits, fixed, optimizer)
    written = {name: parts.get(name, "frozen") for name in parameter_layers(model)}
    scheme = dataclasses.replace(resolve(model, written, "frozen", True), name="auto")
    return Chosen(
        scheme=scheme,
        account=costs.account(scheme, optimizer),
        step_ms=costs.step_ms(scheme),
        value=sum(values[name][part] for name, part in parts.items() if name in values),
        contributions=contributed,
    )


def _take_rows(batches: Iterator[tuple[Inputs, Tensor]], rows: int) -> Iterator[tuple[Inputs, Tensor]]:
    """The first batches, until they have `rows` rows."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch[1])
        if seen >= rows:
            return


def _decide_head(model: nn.Module, costs: CostModel, head: Part, norms: bool) -> dict[str, Part]:
    """The parts of the layers after the last block, or of the last layer if there are no blocks."""
    names, blocks = list(parameter_layers(model)), blocks_of(model)
    inside = [n for n, name in enumerate(names) if blocks and (name == blocks[-1] or name.startswith(blocks[-1] + "."))]
    by_name = {layer.name: layer for layer in costs.layers}
    fixed: dict[str, Part] = {}
    for name in names[inside[-1] + 1 :] if inside else [costs.layers[-1].name]:
        layer = by_name[name]
        held = not layer.trainable or layer.shared or (is_norm(model.get_submodule(name)) and not norms)
        fixed[name] = "frozen" if held or not layer.sizes(head) else head
    return fixed


def _find_or_load(
    costs: CostModel, values: Mapping[str, Mapping[Part, float]], limits: Limits, fixed: Mapping[str, Part],
    optimizer: OptimizerSpec,
) -> Mapping[str, Part]:  # fmt: skip
    """The result of the search; with a time limit it is cached on disk, as timings differ between processes."""
    if limits.step_ms is None:
        return find_scheme(costs, values, limits, fixed=fixed, optimizer=optimizer).parts
    request = (limits, sorted(fixed.items()), optimizer, sorted((n, list(own.items())) for n, own in values.items()))
    memory = [(layer.name, layer.start, layer.parameters, layer.saves) for layer in costs.layers]
    digest = hashlib.sha256(repr((request, memory, costs.between, torch.get_num_threads())).encode()).hexdigest()
    path = cache_folder() / "schemes" / f"{digest}.json"
    if not path.is_file():
        parts = find_scheme(costs, values, limits, fixed=fixed, optimizer=optimizer).parts
        write_atomically(path, json.dumps({name: part_to_json(part) for name, part in parts.items()}))
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {name: part_from_json(part) for name, part in stored.items()}
