"""Two processes that share the rows have the gradients of one, under every trainer; see distributed_worker.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgetune.export.targets import find
from support import distributed_worker
from support.forked import ask_fork

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
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """From this process, and from two forks of it; the slow tests start theirs with torchrun."""
    alone, together = (tmp_path_factory.mktemp("ddp") for _ in range(2))
    distributed_worker.main(alone, "ddp", *FAST)
    find("xnnpack").partitioners()  # imported once
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])

    def train(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        distributed_worker.main(together, "ddp", *FAST)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: ask_fork(lambda: train(rank)), (0, 1))) == [None, None]
    one, two = ({kind: load_file(f / kind / "result.safetensors") for kind in FAST} for f in (alone, together))
    return one, two


@pytest.mark.parametrize("techniques", FAST)
def test_two_processes_train_as_one_does(techniques: str, results: tuple[Results, Results]) -> None:
    one, two = results
    check(one[techniques], two[techniques])


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "techniques"), SLOW)
def test_two_processes_train_as_one_does_under_every_trainer(trainer: str, techniques: str, tmp_path: Path) -> None:
    one, two = (launch(tmp_path / str(count), count, trainer, techniques)[techniques] for count in (1, 2))
    check(one, two)


@pytest.mark.slow
def test_a_sharded_model_is_refused_by_name(tmp_path: Path) -> None:
    done = launch(tmp_path / "2", 2, "fsdp2", "lora")["lora"]
    assert done["refused"].tolist() == [1, 1, 1, 1, 1]  # apply, finalize, export, save_adapter, a 4-bit layer
