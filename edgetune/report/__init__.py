"""Reports: a ledger becomes text in a terminal, `ledger.json` and one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.core.ledger import Ledger
from edgetune.report.console import Terminal, text
from edgetune.report.run_page import page

__all__ = ["Terminal", "page", "report", "text", "write"]

LEDGER, PAGE = "ledger.json", "report.html"


def write(ledger: Ledger, folder: Path) -> None:
    """Write `ledger.json`, then `report.html`, each whole or not at all.

    The ledger comes first, so that it exists even if the page raises because plotly is missing.
    """
    write_atomically(folder / LEDGER, ledger.dumps())
    page(ledger, folder / PAGE)


def report(run_dir: Path | str) -> Path:
    """Rebuild `report.html` of a run from its `ledger.json`, and return its path.

    Raises `EdgetuneError` for a folder that does not exist or has no readable ledger.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise EdgetuneError("no such run folder", got=str(run_dir), action="give a folder that `edgetune run` wrote")
    path = folder / LEDGER
    if not path.is_file():
        raise EdgetuneError(
            f"the folder has no {LEDGER}", got=str(run_dir), action="give a folder that `edgetune run` wrote"
        )
    ledger = Ledger.read(path)
    page(ledger, folder / PAGE)
    return folder / PAGE
