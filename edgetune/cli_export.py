"""The verbs around a program: `edgetune inspect` takes one apart, `edgetune export --lint` looks before."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli_devices import Json, printed

if TYPE_CHECKING:
    from edgetune.export.artifact import Artifact
    from edgetune.export.language.artifact import LanguageArtifact


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
        example = rows_of(found.example, 0, 1) if found.one_row else found.example
        findings = lint_(found.model, example, chosen)
    nothing = f"nothing to say: all of it goes to {chosen.name}"
    printed([asdict(f) for f in findings] if as_json else "\n".join(map(str, findings)) or nothing)
    return int(Exit.EXPORT) if any(finding.severity == "error" for finding in findings) else 0


def kit(
    model: str,
    platform: str,
    folder: Path | None,
    device: str | None,
    target: str | None,
    data: str | None,
    language: bool,
    max_tokens: int | None,
    as_json: bool,
) -> int:
    """`edgetune export --kit`: a folder with the program, what it carries, a sample and a README."""
    from edgetune.export.kit import check, find, kit_of, new_kit, target_for
    from edgetune.exporting import exportable, tell_run, to_program, with_cache
    from edgetune.technique import EdgetuneError

    chosen, place = find(platform), folder or Path(f"kit-{platform}")
    goal = target_for(chosen, device, target)

    def make(path: Path) -> Artifact | LanguageArtifact:
        made = to_program(found, path, device=device, target=goal)
        if found.ledger is not None:
            tell_run(made, found.ledger)
        return made

    with contextlib.redirect_stdout(sys.stderr):
        if model.endswith(".pte"):
            if device or target or data or language or max_tokens:
                what, action = "a program is lowered already", "leave out all but --kit, -o and --json"
                raise EdgetuneError(what, got=model, action=action)
            kit_of(Path(model), chosen, place)
        else:
            found = with_cache(exportable(model, data, language), max_tokens)
            if found.talk is None:
                check(chosen, found.carried)
            new_kit(chosen, place, make)
    files = sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())
    shown = {"folder": str(place), "files": files}
    printed(shown if as_json else f"{place}: begin with README.md\n" + "\n".join(f"  {file}" for file in files))
    return 0
