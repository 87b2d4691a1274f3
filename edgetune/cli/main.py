"""The command line. Each verb is one function that calls the library's function of the same name.

Results go to stdout, progress and errors to stderr. Exit codes: `technique.Exit`. A stack trace only with `--debug`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from edgetune import __version__
from edgetune.cli import adapters, export, generate, predict, profile, training
from edgetune.cli.devices import PLAIN, Json, devices, print_result
from edgetune.cli.training import Overrides, RecipeName
from edgetune.core.quiet import silence_command

VERBS = (  # in the order of the work, which is the order of `edgetune --help`
    "recipes", "run", "report", "combine", "export", "kit", "lint", "inspect", "predict", "eval", "generate", "profile",
    "devices", "export-training", "train-pte", "pull", "env",
)  # fmt: skip


class InOrder(TyperGroup):
    """Lists the verbs in the order of `VERBS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order of `VERBS`, then the rest."""
        return sorted(self.commands, key=lambda verb: VERBS.index(verb) if verb in VERBS else len(VERBS))


app = typer.Typer(
    help="Fine-tune and compress PyTorch models on and for small devices.",
    cls=InOrder,
    **{**PLAIN, "add_completion": True},
)
recipes = typer.Typer(help="List, copy and check recipes.", **PLAIN)
app.add_typer(recipes, name="recipes")
app.add_typer(devices, name="devices")

app.command("combine")(adapters.combine)
app.command("export")(export.export)
app.command("kit")(export.kit)
app.command("lint")(export.lint)
app.command("inspect")(export.inspect)
app.command("generate")(generate.generate)
app.command("profile")(profile.profile)
app.command("predict")(predict.predict)
app.command("eval")(predict.evaluate)
app.command("export-training")(training.export_training)
app.command("train-pte")(training.train_pte)
app.command("pull")(training.pull)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Every error becomes plain lines on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        with contextlib.nullcontext() if debug else silence_command():
            code = app(args=[a for a in given if a != "--debug"], prog_name="edgetune", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer has taken the KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `edgetune ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        text, code = _failure(error)
        if debug:
            traceback.print_exc()
        print(text, file=sys.stderr)
        return code


def _failure(error: BaseException) -> tuple[str, int]:
    from edgetune.core.errors import EdgetuneError, Exit

    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # typer turns Ctrl-C into its own
        return "edgetune: interrupted", int(Exit.INTERRUPTED)
    if isinstance(error, EdgetuneError):
        return f"edgetune: {_shorten_paths(str(error))}", int(error.exit_code)
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(getattr(error, "message", error)), int(Exit.USAGE)
    if hasattr(error, "format_message"):  # typer's usage errors
        context = getattr(error, "ctx", None)
        hint = f"\n  next: {context.command_path} --help" if context is not None else ""
        return f"edgetune: {error.format_message()}{hint}", int(Exit.USAGE)
    if isinstance(error, OSError) and error.filename is not None:  # of a file that no check covers
        return f"edgetune: {error.filename}: {error.strerror}\n  next: choose another path", int(Exit.USAGE)
    return f"edgetune: {type(error).__name__}: {error}\n  next: run again with --debug for the trace", 1


def _shorten_paths(text: str) -> str:
    """Make paths below the current folder relative: those of a recipe were made absolute."""
    here = f"{Path.cwd()}{os.sep}"
    return text if here == os.sep * 2 else re.sub(rf"(?<![\w/]){re.escape(here)}", "", text)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show stack traces and warnings; allowed in any position.")
    ] = False,
) -> None:
    if version:
        print_result(__version__)
        raise typer.Exit()


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan without loading or writing anything.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last run; steps before the first change are reused.")
    ] = False,
    from_step: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Repeat this step and all later steps of the last run.")
    ] = None,
    until_step: Annotated[str | None, typer.Option("--until", metavar="STEP", help="Stop after this step.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/RECIPE-NNN.")] = None,
    as_json: Json = False,
) -> int:
    """Run a recipe: train, compress, export, verify, profile."""
    from edgetune.recipe import recipe as recipes_of
    from edgetune.recipe.overrides import parse_overrides

    changes = parse_overrides(overrides or [])
    if dry_run:
        print_result(_plan(recipes_of.load(recipe, changes), out, as_json))
        return 0
    from edgetune.cli.progress import show_progress
    from edgetune.core.errors import EdgetuneError, Exit
    from edgetune.run import pipeline

    begun = False

    def report_progress(stage: str, done: int, of: int, detail: str) -> None:
        nonlocal begun
        begun = True  # the run's folder exists
        progress(stage, done, of, detail)

    try:
        with show_progress() as progress, contextlib.redirect_stdout(sys.stderr):
            done = pipeline.run(
                recipe, overrides=changes, out=out, resume=resume, from_step=from_step, until_step=until_step,
                progress=report_progress,
            )  # fmt: skip
    except KeyboardInterrupt as interrupt:
        if not begun:
            raise
        command = ["edgetune", "run", recipe, *(overrides or []), "--resume", *(["--out", str(out)] if out else [])]
        raise EdgetuneError(
            f"interrupted; continue with: {shlex.join(command)}", exit_code=Exit.INTERRUPTED
        ) from interrupt
    if until_step is not None:
        again = ["edgetune", "run", recipe, *(overrides or []), "--resume", "--out", str(done.folder)]
        print(f"edgetune: stopped after step {until_step}; continue with: {shlex.join(again)}", file=sys.stderr)
    if as_json:
        print_result({"folder": str(done.folder), **done.ledger.model_dump(mode="json")})
    else:
        _show(done.ledger)
        program = [f"program: {done.program}"] if done.program else []
        print_result("\n".join([*program, *([f"report: {done.report}"] if until_step is None else [])]))
    for verdict in done.missed:
        values = f"{verdict.value:.4g}, the limit is {verdict.limit:g}, the lowest reachable value {verdict.least:.4g}"
        print(f"edgetune: the budget for {verdict.device} is not met: {verdict.quantity} is {values}", file=sys.stderr)
    return int(Exit.BUDGET) if done.missed else 0


def _plan(recipe: Any, out: Path | None, as_json: bool) -> object:
    """What `--dry-run` prints."""
    from edgetune.core.registry import MODELS
    from edgetune.recipe.outline import outline

    planned = outline(recipe)
    is_image_model = "vision" in MODELS.get(recipe.model.source.partition(":")[0], "")
    writes = ["recipe.yaml", "environment.json", "digest.txt", "checkpoints/", "ledger.json", "report.html"]
    writes += ["model.pte", "model.json", "model.md"] if recipe.export else []
    writes += ["model.tokenizer.json"] if recipe.export and not is_image_model else []
    folder = str(out or f"runs/{recipe.name}-NNN")
    if as_json:
        steps = [{"step": p.step, "name": p.name, "detail": p.detail} for p in planned]
        return {"recipe": recipe.name, "digest": recipe.digest, "plan": steps, "folder": folder, "writes": writes}
    width = max(len(p.name) for p in planned)
    lines = [f"{p.step or '':>3}  {p.name:<{width}}  {p.detail}".rstrip() for p in planned]
    head = [f"{recipe.name}: {recipe.model.source} on {recipe.data.source}, seed {recipe.seed}"]
    return "\n".join([*head, *lines, f"would write to {folder}/: {', '.join(writes)}"])


def _show(ledger: Any) -> None:
    from rich.console import Console

    from edgetune import report as reports

    Console().print(reports.Terminal(ledger))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")],
    as_json: Json = False,
) -> int:
    """Print the report of a run again, and rewrite its page."""
    from edgetune import report as reports
    from edgetune.core.ledger import Ledger

    page = reports.report(folder)
    ledger = Ledger.read(folder / reports.LEDGER)
    if as_json:
        print_result(ledger.model_dump(mode="json"))
    else:
        _show(ledger)
        print_result(f"report: {page}")
    return 0


@app.command()
def env(as_json: Json = False) -> int:
    """Print versions, machine, extras and available targets."""
    from edgetune.run.environment import detect_environment, format_environment

    detected = detect_environment()
    print_result(detected.model_dump(mode="json") if as_json else format_environment(detected))
    return 0


@recipes.command("list")
def recipes_list(as_json: Json = False) -> int:
    """List the packaged recipes."""
    from edgetune.recipe import recipe as recipes_of

    loaded = [recipes_of.load(name) for name in recipes_of.packaged_recipes()]
    plain = [{"name": r.name, "description": r.description, "variants": list(r.variants)} for r in loaded]
    print_result(plain if as_json else "\n".join(f"{r.name}: {r.description}" for r in loaded))
    return 0


@recipes.command("show")
def recipes_show(
    recipe: RecipeName,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Include all defaults and overrides.")] = False,
    as_json: Json = False,
) -> int:
    """Print a recipe, as written or resolved."""
    from edgetune.recipe import recipe as recipes_of
    from edgetune.recipe.overrides import parse_overrides

    if not (resolved or overrides or as_json):
        print_result(recipes_of.read_recipe_text(recipe)[0].rstrip("\n"))
        return 0
    loaded = recipes_of.load(recipe, parse_overrides(overrides or []))
    print_result(loaded.resolve() if as_json else loaded.to_yaml().rstrip("\n"))
    return 0


@recipes.command("copy")
def recipes_copy(
    name: RecipeName,
    path: Annotated[Path | None, typer.Argument(help="A folder, or a file ending in .yaml.")] = None,
) -> int:
    """Copy a recipe to your own file."""
    from edgetune.recipe import recipe as recipes_of
    from edgetune.recipe.schema import add_editor_line

    text, shown = recipes_of.read_recipe_text(name)
    to = path or Path()
    to = to / Path(shown).name if to.is_dir() else to
    # a run is named after its recipe: runs of the copy do not mix with those of the original
    text = re.sub(r"^name:.*$", f"name: {to.stem}", text, count=1, flags=re.MULTILINE)
    _write_recipe(to, add_editor_line(text))
    print_result(str(to))
    return 0


@recipes.command("new")
def recipes_new(
    model: Annotated[str, typer.Option(metavar="MODEL", help="minilm, hf:PATH, timm:NAME, py:FILE.py:FUNCTION.")],
    data: Annotated[str, typer.Option(metavar="DATA", help="csv:FILE, jsonl:FILE, imagefolder:FOLDER, py:FILE.py:F.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write; the recipe gets its name.")] = Path(
        "recipe.yaml"
    ),
    task: Annotated[str | None, typer.Option(help="text, image or language; default: inferred from the data.")] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text; default: inferred.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class; default: inferred.")] = None,
) -> int:
    """Write a short recipe for your model and data."""
    from edgetune.core.errors import EdgetuneError
    from edgetune.recipe import recipe as recipes_of
    from edgetune.recipe.new_recipe import TaskName, new_recipe
    from edgetune.recipe.schema import add_editor_line

    if task is not None and task not in get_args(TaskName):
        raise EdgetuneError("unknown task", got=task, allowed=get_args(TaskName))
    _check_recipe_path(out)
    with contextlib.redirect_stdout(sys.stderr):
        written = new_recipe(out, model, data, task=task, text=text, label=label)  # type: ignore[arg-type]
    _write_recipe(out, add_editor_line(written))
    recipes_of.load(out)
    print_result(f"{out}: next: edgetune run {out} --dry-run")
    return 0


def _check_recipe_path(path: Path) -> None:
    from edgetune.core.errors import EdgetuneError

    if path.suffix not in (".yaml", ".yml"):
        raise EdgetuneError("the name of a recipe file must end in .yaml", got=str(path), action=f"write {path}.yaml")
    if path.exists():
        raise EdgetuneError("the file already exists", got=str(path), action="choose another name")


def _write_recipe(path: Path, text: str) -> None:
    from edgetune.core.errors import EdgetuneError

    _check_recipe_path(path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise EdgetuneError(f"cannot write the file: {error.strerror}", got=str(path)) from error


@recipes.command("validate")
def recipes_validate(recipe: RecipeName, overrides: Overrides = None, as_json: Json = False) -> int:
    """Check a recipe and all its variants; print every error."""
    from edgetune.core.errors import EdgetuneError, Exit
    from edgetune.core.places import Errors
    from edgetune.recipe import recipe as recipes_of
    from edgetune.recipe.overrides import parse_overrides

    try:
        changes = parse_overrides(overrides or [])
        loaded = recipes_of.load(recipe, changes)
        for variant in loaded.variants:
            recipes_of.load(recipe, {**changes, "variant": variant})
    except EdgetuneError as error:
        if not as_json:
            raise
        errors = error.errors if isinstance(error, Errors) else (error,)
        keys = ("where", "what", "got", "allowed", "action")
        print_result({"valid": False, "errors": [{key: getattr(e, key) for key in keys} for e in errors]})
        return int(Exit.USAGE)
    variants = f", variants: {', '.join(loaded.variants)}" if loaded.variants else ""
    text = f"{loaded.name}: valid, {len(loaded.steps)} steps{variants}"
    print_result({"valid": True, "errors": [], "digest": loaded.digest} if as_json else text)
    return 0


@recipes.command("schema")
def recipes_schema() -> int:
    """Print the JSON Schema of a recipe."""
    from edgetune.recipe.schema import build_schema

    print_result(build_schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())
