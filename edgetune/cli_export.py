"""The verbs around a program: `edgetune inspect` takes one apart, `edgetune export --lint` looks before."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli_devices import Json, printed


def inspect(
    program: Annotated[
        Path, typer.Argument(metavar="MODEL.PTE", help="A program; its model.json is read if it is there.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also draw it as one page.")] = None,
    as_json: Json = False,
) -> int:
    """Print what a program holds: methods, operators, delegates, memory plan, constants by size."""
    from edgetune.export.inspect import inspect as inspect_
    from edgetune.export.inspect_page import write_page

    found = inspect_(program)
    if html is not None:
        write_page(found, html)
    if as_json:
        printed(found.model_dump(mode="json"))
    else:
        printed(str(found) + (f"\n\npage: {html}" if html is not None else ""))
    return 0


def lint(model: str, device: str | None, target: str | None, data: str | None, as_json: bool) -> int:
    """`edgetune export --lint`: print what would go wrong or slow; 5 if anything would stop the export."""
    from dataclasses import asdict

    from edgetune.export.lint import lint as lint_
    from edgetune.export.targets import for_device
    from edgetune.exporting import exportable
    from edgetune.technique import Exit, rows_of

    chosen = for_device(device, target)
    with contextlib.redirect_stdout(sys.stderr):
        found = exportable(model, data)
        findings = lint_(found.model, rows_of(found.example, 0, 1), chosen)
    nothing = f"nothing to say: all of it goes to {chosen.name}"
    printed([asdict(f) for f in findings] if as_json else "\n".join(map(str, findings)) or nothing)
    return int(Exit.EXPORT) if any(finding.severity == "error" for finding in findings) else 0
