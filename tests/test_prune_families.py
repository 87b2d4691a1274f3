"""Pruning through the families of models that people have: equal, trained, saved, loaded, exported, run."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import call, first_rows, logits_of
from edgetune.core.technique import Sample
from edgetune.prune.layers import axis_of
from edgetune.prune.structured import grouping_of
from support.pruned import by_weight, count
from support.pruned_families import PRUNED, zeroed

FAST = ("MobileNetV4", "RegNet", "Llama", "T5")
REFUSED = {  # what, at which ratios
    "OLMoE": ("experts whose weights are raw parameters", (0.2, 0.5)),
    "Mixtral": ("rounding leaves every width of heads", (0.2,)),  # of two heads of keys; its experts are raw parameters
}
TABLE = Path(__file__).resolve().parents[1] / "docs" / "prune-families.md"
ROWS = TABLE.with_suffix(".json")  # of the table, which `--update` writes one by one


def cases() -> list[object]:
    """Every family at two ratios; most are slow."""
    pairs = [(name, ratio) for name in PRUNED for ratio in (0.2, 0.5)]
    return [
        pytest.param(name, ratio, marks=() if name in FAST and ratio == 0.5 else pytest.mark.slow)
        for name, ratio in pairs
    ]


@pytest.mark.parametrize(("name", "ratio"), cases())
def test_a_family(name: str, ratio: float, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    family = PRUNED[name]
    model, inputs = family.made(), family.inputs(3)
    prune = by_weight(ratio=ratio, round_to=1)
    reason, ratios = REFUSED.get(name, ("", ()))
    if ratio in ratios:
        with pytest.raises(EdgetuneError, match=reason):
            prune.apply(model, Sample.of(inputs))
        write_row(request, name, ratio, f"refused: {reason}")
        return
    plan, before = prune.plan(model, Sample.of(inputs)), copy.deepcopy(model)
    prune.apply(model, Sample.of(inputs))
    left = grouping_of(model).blocked
    cuts = [one for one in plan if one.group.name not in left]
    assert cuts

    reads = [
        (m.layer, axis_of(before.get_submodule(m.layer), "in"), [p for unit in one.drop for p in m.of_unit[unit]])
        for one in cuts
        for m in one.group.along("in")
    ]
    with torch.no_grad():
        outputs, expected = (logits_of(call(each, inputs)) for each in (model, zeroed(copy.deepcopy(before), reads)))
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())

    loaded = save_and_load(model, before, tmp_path, family.source == "transformers")
    with torch.no_grad():
        assert torch.equal(logits_of(call(loaded, inputs)), outputs)
    kept = count(model) / count(before)
    trained(loaded, inputs)

    artifact = et.export(model, first_rows(inputs), tmp_path / "model.pte")
    parity = artifact.manifest.main.parity
    assert parity is not None
    assert parity.max_relative_difference is not None
    assert parity.max_relative_difference < 1e-3
    reasons = sorted(set(left.values()))
    row = f"{kept:.2f}" + (f"; {len(left)} groups left: {shortened(reasons[0])}" if left else "")
    write_row(request, name, ratio, row)


def save_and_load(model: nn.Module, before: nn.Module, folder: Path, by_config: bool) -> nn.Module:
    """The model from a folder: by its class alone where transformers has it, else into the network as it was."""
    et.save_pretrained(model, folder / "saved")
    by_class = by_config and hasattr(model, "save_pretrained")
    return et.load_pretrained(folder / "saved", None if by_class else copy.deepcopy(before))


def trained(model: nn.Module, inputs: object) -> None:
    """One step, by which every parameter that matters moves."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = logits_of(call(model, inputs)).square().mean()  # type: ignore[arg-type]
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
    torch.optim.SGD(parameters, lr=1e-4).step()


def shortened(reason: str, most: int = 60) -> str:
    """The beginning of a reason."""
    return reason if len(reason) <= most else f"{reason[:most].rsplit(' ', 1)[0]} ..."


def write_row(request: pytest.FixtureRequest, name: str, ratio: float, row: str) -> None:
    """A cell of the table; with `--update` it is written, with the page that shows it."""
    rows: dict[str, dict[str, str]] = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    if request.config.getoption("--update"):
        rows.setdefault(name, {})[f"{ratio:g}"] = row
        ROWS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        TABLE.write_text(page(rows), encoding="utf-8")
    elif name in rows and f"{ratio:g}" in rows[name]:
        assert rows[name][f"{ratio:g}"] == row


def page(rows: dict[str, dict[str, str]]) -> str:
    """The page of the table."""
    ordered = [(name, rows[name]) for name in PRUNED if name in rows]
    lines = [
        "# Families that prune",
        "",
        "Share of the parameters that stays at a ratio of 0.2 and of 0.5, of small models with random weights. Each "
        "was equal to the model with the same units at zero, saved and loaded, trained for a step, and exported; its "
        "program computed the same. Made by `pytest tests/test_prune_families.py --update`.",
        "",
        "| family | 0.2 | 0.5 |",
        "|---|---|---|",
        *(f"| {name} | {of.get('0.2', '')} | {of.get('0.5', '')} |" for name, of in ordered),
    ]
    return "\n".join(lines) + "\n"
