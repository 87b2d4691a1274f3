"""Two processes that share the rows have the gradients of one, under every trainer; see distributed_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support import distributed_worker

WORKER = Path(distributed_worker.__file__)
FAST = ("lora", "in-backward")
SLOW = [
    ("ddp", "sparse"), ("ddp", "nf4-lora"),
    *[(trainer, kind) for trainer in ("accelerate", "trainer", "lightning") for kind in ("lora", "sparse", "nf4-lora")],
]  # fmt: skip
Results = dict[str, dict[str, Tensor]]


def launch(folder: Path, processes: int, trainer: str, *techniques: str) -> Results:
    """The result of every training, by its techniques."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), str(WORKER), str(folder), trainer, *techniques],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: load_file(folder / kind / "result.safetensors") for kind in techniques}


def check(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """The same from one process as from two, of which the first has exported its model."""
    assert {*one, "logits.program"} == two.keys()
    for kind in ("gradient", "final"):
        values = {name: value for name, value in one.items() if name.startswith(f"{kind}.")}
        largest = max(float(value.abs().max()) for value in values.values())
        assert largest > 1e-3
        for name, value in values.items():
            assert (two[name] - value).abs().max() <= 1e-5 * max(1.0, largest), name
    for stage in ("plain", "program"):
        torch.testing.assert_close(two[f"logits.{stage}"], two["logits.open"], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory.mktemp("ddp") / "2", 2, "ddp", *FAST)


@pytest.mark.parametrize("techniques", FAST)
def test_two_processes_train_as_one_does(techniques: str, together: Results, tmp_path: Path) -> None:
    distributed_worker.main(tmp_path, "ddp", techniques)  # one process: this one
    check(load_file(tmp_path / techniques / "result.safetensors"), together[techniques])


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "techniques"), SLOW)
def test_two_processes_train_as_one_does_under_every_trainer(trainer: str, techniques: str, tmp_path: Path) -> None:
    one, two = (launch(tmp_path / str(count), count, trainer, techniques)[techniques] for count in (1, 2))
    check(one, two)


@pytest.mark.slow
def test_a_sharded_model_is_refused_by_name(tmp_path: Path) -> None:
    done = launch(tmp_path / "2", 2, "fsdp2", "lora")["lora"]
    assert done["refused"].tolist() == [1, 1, 1, 1, 1]  # apply, finalize, export, save_adapter, a 4-bit layer
