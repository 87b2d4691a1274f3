"""Adapters of other families than LoRA beside one exported base, as the LoRAs nearest to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import edgetune as et
from edgetune.adapt.deltas import read_deltas
from edgetune.core.errors import EdgetuneError
from edgetune.export.inspect import inspect
from edgetune.program.artifact import Artifact
from edgetune.program.manifest import AdapterForm
from support.adapters import save_lora
from support.family_cases import BLOCK, small
from support.laws import fit, logits, mlp, vectors

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")


def trained(technique: et.Technique, folder: Path) -> Path:
    model = et.apply(mlp(), technique)
    fit(model, vectors(), steps=10)
    return et.save_adapter(model, folder)


def _described(artifact: Artifact) -> dict[str, str]:
    beside = inspect(artifact.path).beside
    assert beside is not None
    return dict(beside.adapters)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "lora": save_lora(mlp(), folder / "lora", BLOCK, seed=1),
        "loha": trained(small("loha"), folder / "loha"),
        "vera": trained(small("vera"), folder / "vera"),
        "miss": trained(small("miss"), folder / "miss"),
    }


@pytest.mark.parametrize("form", ["inputs", "files"])
def test_they_run_beside_the_base_within_the_stated_error(
    form: AdapterForm, folders: dict[str, Path], tmp_path: Path
) -> None:
    artifact = et.export(mlp(), vectors(), tmp_path / "model.pte", one_row=True, adapters=folders, form=form)
    spec = artifact.manifest.adapters
    assert spec is not None
    files = {one.name: one for one in spec.files}
    assert {name: one.family for name, one in files.items()} == {name: name.upper() for name in folders}
    assert files["lora"].error == 0
    assert files["lora"].rank == 4
    for name in ("loha", "vera", "miss"):
        assert files[name].error < 0.01
        assert 1 <= files[name].rank <= 8
        added = read_deltas(folders[name], mlp()).tensors
        adapted = logits(et.load_adapter(mlp(), folders[name]), vectors())
        for row, expected in zip(vectors(), adapted, strict=True):  # type: ignore[arg-type]
            (actual,) = artifact.run(row[None], adapter=name)
            torch.testing.assert_close(actual[0], expected, atol=1e-3, rtol=0)
        assert (adapted - logits(mlp(), vectors())).abs().max() > 0.02
        assert set(added) == {f"{layer}.weight" for layer in BLOCK}
    text = _described(artifact)
    assert f"rank {files['loha'].rank}" in text["adapter loha"]


def test_a_rank_that_is_not_enough_is_refused_unless_it_was_stated(tmp_path: Path) -> None:
    folder = trained(small("lokr", rank=8), tmp_path / "lokr")

    def export(**settings: Any) -> Any:
        return et.export(mlp(), vectors(), tmp_path / "model.pte", one_row=True, adapters={"lokr": folder}, **settings)

    with pytest.raises(
        EdgetuneError, match=r"within 1% of the adapter has rank \d+ of 32.*(?s:.*)adapter_rank \(rank 4 is"
    ):
        export()
    assert not list(tmp_path.glob("model*"))
    artifact = export(adapter_rank=6)
    (one,) = artifact.manifest.adapters.files
    assert one.rank == 6
    s = [torch.linalg.svdvals(delta.double()) ** 2 for delta in read_deltas(folder, mlp()).tensors.values()]
    left = (sum(float(v[6:].sum()) for v in s) / sum(float(v.sum()) for v in s)) ** 0.5
    assert one.error == pytest.approx(left, rel=1e-3)
    assert f"rank 6, {100 * left:.2g} % off LOKR" in _described(artifact)["adapter lokr"]


def test_what_no_lora_can_stand_for_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(problem: str, model: torch.nn.Module | None = None, **settings: Any) -> None:
        with pytest.raises(EdgetuneError, match=problem):
            et.export(model or mlp(), vectors(), tmp_path / "model.pte", **settings)

    beft = {"beft": trained(small("beft"), tmp_path / "beft")}
    refused(r"adapter beft .*BEFT changes blocks.1.up.bias, and two products", adapters=beft)
    norms = {"norms": trained(small("ln_tuning"), tmp_path / "norms")}
    refused("LN_TUNING changes blocks.1.norm.weight", adapters=norms)
    lily = {"lily": trained(small("lily"), tmp_path / "lily")}
    refused("this adapter cannot be merged", adapters=lily)
    refused("adapter_rank: there are no adapters", adapter_rank=4)
    refused("adapter_rank: must be at least 1", adapters=folders, adapter_rank=0)
    refused("these are LoRAs, which keep their ranks", adapters={"lora": folders["lora"]}, adapter_rank=4)
    refused("adapter_rank is above the layer's width 32", adapters={"loha": folders["loha"]}, adapter_rank=33)
    rounded = et.apply(mlp(), et.Int8Dynamic(), et.Sample.of(vectors()))
    refused("LOHA becomes a LoRA beside the base in floating point", rounded, adapters={"loha": folders["loha"]})


def test_over_a_quantized_base_it_is_converted_before(folders: dict[str, Path], tmp_path: Path) -> None:
    et.combine_adapters(mlp(), [folders["loha"]], tmp_path / "lora")
    rounded = et.apply(mlp(), et.Int8Dynamic(), et.Sample.of(vectors()))
    adapters = {"loha": tmp_path / "lora"}
    artifact = et.export(rounded, vectors(), tmp_path / "model.pte", one_row=True, adapters=adapters)
    assert artifact.manifest.adapters is not None
    assert artifact.manifest.adapters.files[0].family == "LORA"
