"""The verbs `export`, `kit`, `lint` and `inspect`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgetune.cli.complete import device_names, float_types, key_value_types, platform_names, target_names
from edgetune.cli.devices import Json, print_result
from edgetune.core.files import write_atomically

if TYPE_CHECKING:
    from edgetune.core.ledger import Program

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model (minilm, hf:PATH, timm:NAME, py:FILE.py:FUNCTION), a run folder, or a .pt2 file of torch.export.",
    ),
]
DeviceName = Annotated[
    str | None, typer.Option(help="Choose the preferred target of this device.", autocompletion=device_names)
]
TargetName = Annotated[str | None, typer.Option(help="Choose this target instead.", autocompletion=target_names)]
DataName = Annotated[
    str | None, typer.Option(help="Data with the classes and check rows of a model: tweets, csv:PATH.")
]
InputsName = Annotated[
    str | None,
    typer.Option(metavar="py:FILE.py:FUNCTION", help="Without --data: a function that returns check inputs."),
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="State dict for a py: model, in a .safetensors or .pt file.")
]
Language = Annotated[bool, typer.Option("--language", help="Export a text-generation program, with its tokenizer.")]
DtypeName = Annotated[
    str | None, typer.Option("--dtype", help="Type to compute in: fp32, bf16 or fp16.", autocompletion=float_types)
]
CacheDtypeName = Annotated[
    str | None,
    typer.Option("--cache-dtype", help="With --language: fp32, bf16, fp16 or int8.", autocompletion=key_value_types),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=2, help="With --language: size of the cache in tokens; default: 512, or that of the run."),
]


def export(
    model: ModelName,
    out: Annotated[Path, typer.Option("-o", "--out", help="Program to write.")] = Path("model.pte"),
    device: DeviceName = None,
    target: TargetName = None,
    data: DataName = None,
    inputs: InputsName = None,
    weights: Weights = None,
    language: Language = False,
    max_tokens: MaxTokens = None,
    dtype: DtypeName = None,
    cache_dtype: CacheDtypeName = None,
    dynamic: Annotated[
        list[str] | None, typer.Option(help="Dynamic size: tokens=1:64, batch=1:8, INPUT.2=1:8.")
    ] = None,
    ptd: Annotated[bool, typer.Option("--ptd", help="Store the weights in a separate .ptd file.")] = False,
    fastest_form: Annotated[
        bool,
        typer.Option(
            "--fastest-form",
            help="Quantize first, if that is faster: the fastest of float, int8_dynamic, int4 and int8, by prediction "
            "for --device, else timed here. Quality is not compared.",
        ),
    ] = False,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An adapter in peft's format; may be repeated. One FOLDER without a name is merged.",
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="With named adapters: inputs (the default), files beside the program, or methods of it."),
    ] = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the LoRAs in place of other families; default: the lowest within 1 % of them."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Export a model to an ExecuTorch program, and verify it.

    The program runs and its outputs are compared with those of the model. It takes one row. A program from a .pt2
    file takes inputs of the shapes that it was saved with.
    """
    from edgetune.capture.dynamic import parse_bounds
    from edgetune.core.errors import truncate_list
    from edgetune.run.exporting import export_from, parse_adapters

    with contextlib.redirect_stdout(sys.stderr):
        artifact = export_from(
            model,
            out,
            device=device,
            target=target,
            data=data,
            inputs=inputs,
            weights=weights,
            language=language,
            max_tokens=max_tokens,
            dynamic=parse_bounds(dynamic or []),
            external_data=ptd,
            dtype=dtype,  # type: ignore[arg-type]  # checked by the export, which names the types
            cache_dtype=cache_dtype,  # type: ignore[arg-type]
            fastest_form=fastest_form,
            adapters=parse_adapters(adapter or []),
            form=form,  # type: ignore[arg-type]  # checked by the export, which names the forms
            adapter_rank=adapter_rank,
        )
    if as_json:
        print_result(artifact.manifest.model_dump(mode="json"))
        return 0
    carried = artifact.manifest.carried
    classes = f"classes: {truncate_list(carried.labels)}" if carried and carried.labels else ""
    notes = [f"note: {note}" for note in carried.notes] if carried else []
    adapters = artifact.manifest.adapters
    notes += [f"note: adapter {one.name}: {one.in_words}" for one in adapters.files if one.error] if adapters else []
    print_result("\n".join(filter(None, [f"{artifact.path}: {_program(artifact.program())}", classes, *notes])))
    return 0


def _program(program: Program) -> str:
    parity = program.parity
    same = ", lowered but not run"
    if parity is not None:
        same = f", same prediction on {parity.same_prediction_pct:g} % of {parity.number}"
        if parity.max_relative_difference is not None:
            same += f", outputs within {parity.max_relative_difference:.1e} of the largest value"
    return f"{program.size_mib:.2f} MiB, target {program.target}{same}"


def kit(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An exported .pte, or anything that `edgetune export` accepts.")
    ],
    platform: Annotated[
        str,
        typer.Argument(metavar="PLATFORM", help="android, ios, jetson or linux.", autocompletion=platform_names),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write; default: kit-PLATFORM.")] = None,
    device: DeviceName = None,
    target: TargetName = None,
    data: DataName = None,
    inputs: InputsName = None,
    weights: Weights = None,
    language: Language = False,
    max_tokens: MaxTokens = None,
    as_json: Json = False,
) -> int:
    """Write a folder for an app: program, sample code, README.

    It has everything that an app needs: the program, its preprocessing, tokenizer and classes, and sample code that
    uses them. A .pte is copied together with its files; anything else is exported first.
    """
    from edgetune.core.errors import EdgetuneError
    from edgetune.export.kit import check, copy_to_kit, create_kit, find, target_for
    from edgetune.run.exportable import set_cache, to_program
    from edgetune.run.exporting import load_exportable

    chosen, folder = find(platform), out or Path(f"kit-{platform}")
    goal = target_for(chosen, device, target)

    with contextlib.redirect_stdout(sys.stderr):
        if model.endswith(".pte"):
            if device or target or data or inputs or weights or language or max_tokens:
                fact, action = "the program is already lowered", "omit all options except -o and --json"
                raise EdgetuneError(fact, got=model, action=action)
            copy_to_kit(Path(model), chosen, folder)
        else:
            source = set_cache(load_exportable(model, data, language, inputs, weights), max_tokens)
            if source.generation is None:
                check(chosen, source.carried)
            create_kit(chosen, folder, lambda path: to_program(source, path, device=device, target=goal))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    as_data = {"folder": str(folder), "files": files}
    print_result(as_data if as_json else f"{folder}: start with README.md\n" + "\n".join(f"  {file}" for file in files))
    return 0


def lint(
    model: ModelName,
    device: DeviceName = None,
    target: TargetName = None,
    data: DataName = None,
    inputs: InputsName = None,
    weights: Weights = None,
    as_json: Json = False,
) -> int:
    """Report what a target would refuse or run slowly, and why.

    Nothing is written. The exit code is 5 if something would stop the export. For a language model, this checks a
    program that takes a window of tokens, not a text-generation program.
    """
    from dataclasses import asdict

    from edgetune.core.errors import Exit
    from edgetune.core.inputs import rows_of
    from edgetune.export.lint import lint as lint_model
    from edgetune.export.targets import for_device
    from edgetune.run.exporting import load_exportable

    chosen = for_device(device, target)
    with contextlib.redirect_stdout(sys.stderr):
        source = load_exportable(model, data, inputs=inputs, weights=weights)
        example = rows_of(source.example, 0, 1) if source.one_row else source.example
        findings = lint_model(source.model, example, chosen)
    nothing = f"no findings: {chosen.name} takes the whole model"
    print_result([asdict(f) for f in findings] if as_json else "\n".join(map(str, findings)) or nothing)
    return int(Exit.EXPORT) if any(finding.severity == "error" for finding in findings) else 0


def inspect(
    program: Annotated[
        Path, typer.Argument(metavar="MODEL.PTE", help="A program; its model.json is read if it exists.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
    as_json: Json = False,
) -> int:
    """Show the operators, memory plan and weights of a program.

    Lists the operators and delegates of each method, the memory plan, and the constants by size.
    """
    from edgetune.export.inspect import inspect as inspect_program

    inspection = inspect_program(program)
    if html is not None:
        from edgetune.report.inspect_page import page

        write_atomically(html, page(inspection))
    if as_json:
        print_result(inspection.model_dump(mode="json"))
    else:
        print_result(str(inspection) + (f"\n\npage: {html}" if html is not None else ""))
    return 0
