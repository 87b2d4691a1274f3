from __future__ import annotations

import readme

from edgetune import recipe
from edgetune.ledger import Ledger


def test_the_generated_parts_are_what_the_code_makes() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text) == text, "run: make docs"
    for name in readme.SCRIPTS:
        assert (readme.ROOT / "tests" / f"examples_{name}.py").read_text(encoding="utf-8").strip() in text


def test_the_ledger_shown_is_of_a_finished_run_that_holds() -> None:
    ledger = Ledger.read(readme.ROOT / "docs" / "demo.json")
    assert ledger.finished
    assert ledger.settings == recipe.load("text-minilm").resolved(), "run make demo and make docs"
    assert all(verdict.holds for verdict in ledger.verdicts)
    last = ledger.rows[-1].quality
    assert last is not None
    assert all(last.value > baseline.value for baseline in ledger.baselines)


def test_every_command_is_run_or_known_to_be_run_elsewhere() -> None:
    commands = readme.commands()
    assert commands[:2] == ["make demo", "make test"]
    assert [c for c in commands if readme.instead(c) is None] == ["make test"]
