"""Calls of the command line: in this process with what they gave, and in one of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from edgetune.cli.main import main
from edgetune.core.ledger import Ledger, Row

RECIPE = """\
name: mine
model: minilm
data: {source: tweets, train_rows: 64}
steps:
  - lora: {rank: 4, targets: ["*.query"]}
  - train: {learning_rate: 1e-3}
  - prune: {ratio: 0.5}
export: {target: xnnpack, check_rows: 100}
profile: {devices: [pixel-8]}
budget: {device: pixel-8, size_mib: 20}
"""


class Answer:
    """What one call of the command line gave."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = main(arguments)
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ledger(**changes: Any) -> Ledger:
    row = Row(index=0, step="load", parameters=10, trainable_parameters=10, size_mib=1.0, seconds=0.5)
    plain = Ledger(recipe="mine", seed=0, model="m", data="d", settings={}, environment={}, rows=(row,))
    return plain.with_(**changes)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgetune.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
