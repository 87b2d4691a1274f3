"""Where things of a program lie: its memory plan, its weights in a file of their own, and the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.capture.positional import as_program
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.export import export
from edgetune.export.inspect import inspect
from edgetune.export.lower import DEFAULT_LAYOUT, Layout, Lowered, lower
from edgetune.export.targets import find
from edgetune.program.artifact import Artifact, write_pair
from edgetune.program.manifest import Manifest, data_path
from edgetune.quant.int4 import Int4
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import TimingRequest
from edgetune.runtime.run import run_in_child


class Branched(nn.Module):
    """A convolution net whose branches can run in an order that keeps less alive than the written one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.branches = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(64, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        wide = [torch.cumsum(branch(x), 1) for branch in self.branches]
        return self.head(torch.cat([branch.amax((2, 3)) for branch in wide], 1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        return self.head(x)


def branched() -> Branched:
    torch.manual_seed(0)
    return Branched().eval()


def transformer() -> Transformer:
    torch.manual_seed(0)
    return Transformer().eval()


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(2))


def lowered(model: nn.Module, inputs: Tensor, target: str = "xnnpack", layout: Layout = DEFAULT_LAYOUT) -> Lowered:
    """Without running it."""
    with as_program(model, inputs) as program:
        return lower(program, (inputs[:1],), find(target), (), layout)


def test_the_smallest_plan_is_taken() -> None:
    found = lowered(branched(), PIXELS, "portable")
    assert found.plan is not None
    sizes = found.plan.tried_bytes
    assert found.plan_bytes == sizes[found.plan.chosen] == min(sizes.values())
    assert set(sizes) >= {"greedy", "greedy_apart", "largest_first", "greedy, reordered"}
    assert found.plan_bytes < 0.8 * sizes["greedy"]  # what executorch does by itself


@pytest.mark.slow
def test_a_reordered_program_computes_the_same(tmp_path: Path) -> None:
    call = export(
        branched(), PIXELS, tmp_path / "m.pte", target="portable", one_row=True, max_abs_difference=1e-5
    ).manifest.main
    assert call.plan is not None
    assert call.plan.way.endswith(", reordered")
    assert call.plan_bytes == call.plan.tried_bytes[call.plan.way]


def test_inputs_and_outputs_may_stay_with_the_caller(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    inside = lowered(model, PIXELS).plan_bytes
    assert inside >= PIXELS[0].nbytes + 8 * 32 * 32 * 4
    outside = export(
        model, PIXELS, tmp_path / "out.pte", one_row=True, io_in_plan=False, max_abs_difference=1e-5
    ).manifest.main
    assert outside.plan is not None
    assert not outside.plan.holds_io
    assert outside.plan_bytes < 0.05 * inside


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("apart") / "model.pte"
    return export(branched(), PIXELS, path, one_row=True, external_data=True)


def test_weights_lie_apart_from_the_program(apart: Artifact) -> None:
    known = apart.manifest
    assert known.data is not None
    weights = sum(p.numel() * 4 for p in branched().parameters())
    assert apart.data_path == apart.path.with_suffix(".ptd")
    assert known.data.size_bytes == apart.data_path.stat().st_size >= 0.9 * weights
    assert known.size_bytes == apart.path.stat().st_size
    assert known.total_bytes == known.size_bytes + known.data.size_bytes
    assert known.main.parity is not None
    assert known.main.parity.max_abs_difference < 1e-5
    held = inspect(apart.path)
    assert sum(c.size_bytes for c in held.constants if c.kind != "external") < 0.1 * weights
    assert {file.name for file in apart.path.parent.iterdir()} == {"model.pte", "model.ptd", "model.json"}


@pytest.mark.slow
def test_a_quantized_table_lies_apart_too(tmp_path: Path) -> None:
    model = Int4(group_size=32).apply(transformer())
    artifact = export(model, IDS, tmp_path / "m.pte", one_row=True, external_data=True)
    held = {(c.dtype, c.shape): c.kind for c in inspect(artifact.path).constants if c.dtype}
    assert held["int8", (64, 32)] == "external"
    (timing,) = Host().time(TimingRequest(artifact.path, [(IDS[:1],)], 1, 0.05, artifact.data_path, energy=False))
    assert len(timing.latencies_ms) >= 10


def test_a_program_without_its_data_does_not_run(apart: Artifact) -> None:
    with pytest.raises(EdgetuneError, match="does not run"):
        run_in_child(apart.path, [(PIXELS[:1],)])


def test_both_files_are_checked(apart: Artifact, tmp_path: Path) -> None:
    for file in apart.path.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path, data = tmp_path / "model.pte", tmp_path / "model.ptd"
    assert Artifact.load(path).manifest == apart.manifest
    assert "the weights are in model.ptd, checksum ok" in str(inspect(path))
    data.write_bytes(data.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        EdgetuneError, match=r"model\.ptd: the file is not the one that its manifest describes"
    ) as caught:
        Artifact.load(path)
    assert caught.value.exit_code == Exit.EXPORT
    assert "checksum WRONG" in str(inspect(path))
    data.unlink()
    with pytest.raises(EdgetuneError, match=r"model\.ptd: no such file"):
        Artifact.load(path)
    assert "which is missing" in str(inspect(path))


def test_a_program_that_keeps_its_weights_takes_the_old_data_file_away(apart: Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    write_pair(path, b"program", lambda partial: apart.manifest, b"weights")
    assert {file.name for file in tmp_path.iterdir()} == {"model.pte", "model.ptd", "model.json"}
    write_pair(path, b"program", lambda partial: apart.manifest.model_copy(update={"data": None}))
    assert {file.name for file in tmp_path.iterdir()} == {"model.pte", "model.json"}


def test_a_failed_export_leaves_both_files_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "m.pte"
    path.write_bytes(b"program")
    path.with_suffix(".ptd").write_bytes(b"data")

    def refuse(partial: Path) -> Manifest:
        assert data_path(partial).read_bytes() == b"weights"
        raise EdgetuneError("differs")

    with pytest.raises(EdgetuneError, match="differs"):
        write_pair(path, b"new", refuse, b"weights")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"m.pte": b"program", "m.ptd": b"data"}


def test_what_two_operators_read_is_stored_once(tmp_path: Path) -> None:
    tied, loose = transformer(), transformer()
    loose.head.weight = nn.Parameter(torch.randn(64, 32))
    once, twice = lowered(tied, IDS).data, lowered(loose, IDS).data
    assert len(twice) - len(once) > 0.9 * 64 * 32 * 4
    (tmp_path / "once.pte").write_bytes(once)
    assert sum(part.size_bytes for part in inspect(tmp_path / "once.pte").parts) == len(once)


def test_what_keeps_its_weights_in_delegates_has_none_apart() -> None:
    with pytest.raises(EdgetuneError, match="no weight of this program can be stored separately"):
        lowered(nn.Sequential(nn.ReLU()), PIXELS, layout=Layout(external_data=True))


def programs(folder: Path, which: str) -> dict[str, str]:
    """Export one of each kind, and give the checksum of every file."""
    from edgetune.export.methods import export_methods
    from edgetune.export.training.step import export_training

    if which == "training":
        model = transformer()
        model.head.weight = nn.Parameter(torch.randn(64, 32))
        labels = torch.randint(0, 64, (2, 9))
        export_training(model, IDS, labels, folder / "train.pte", loss=_loss)
    else:
        export(branched(), PIXELS, folder / "conv.pte", one_row=True, external_data=True)
        export(Int4(group_size=32).apply(transformer()), IDS, folder / "int4.pte", one_row=True)
        export(transformer(), IDS, folder / "free.pte", one_row=True, dynamic={"tokens": (2, 9)})
        whole = transformer()
        export_methods({"forward": (whole, IDS), "embed": (whole.table, IDS)}, folder / "methods.pte")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["inference", "training"])
def test_exports_in_two_processes_give_the_same_bytes(tmp_path: Path, which: str) -> None:
    found = []
    for seed in ("0", "4242"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, __file__, str(folder), which],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert len(found[0]) >= 2


def test_exports_in_one_process_give_the_same_bytes(apart: Artifact) -> None:
    again = lowered(branched(), PIXELS, layout=Layout(external_data=True))
    assert again.data == apart.path.read_bytes()
    assert apart.data_path is not None
    assert again.weights == apart.data_path.read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(programs(Path(sys.argv[1]), sys.argv[2])))
