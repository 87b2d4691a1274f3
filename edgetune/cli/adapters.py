"""The verb `combine`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli.devices import Json, print_result
from edgetune.cli.export import DataName, ModelName, Weights


def combine(
    model: ModelName,
    adapters: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Adapters of it, in peft's format.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the new adapter.")],
    method: Annotated[str, typer.Option(help="svd, linear, cat, ties, dare or dare-ties.")] = "svd",
    weight: Annotated[
        list[float] | None, typer.Option(help="Factor of an adapter; one for each, in their order; default: 1 each.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA; default: the lowest within 1 %.")] = None,
    density: Annotated[float | None, typer.Option(help="With ties and dare: share of the values to keep.")] = None,
    seed: Annotated[int, typer.Option(help="With dare: seed of what is dropped.")] = 0,
    data: DataName = None,
    weights: Weights = None,
    as_json: Json = False,
) -> int:
    """Combine adapters of one base into one LoRA.

    The adapters may be of any family that merges. The base must be the one that they were trained on.
    """
    from edgetune.adapt.combine import combine_adapters
    from edgetune.run.exporting import load_exportable

    with contextlib.redirect_stdout(sys.stderr):
        base = load_exportable(model, data, weights=weights).model
        combined = combine_adapters(
            base,
            adapters,
            out,
            method=method,  # type: ignore[arg-type]  # checked there, which names the methods
            weights=weight or None,
            rank=rank,
            density=density,
            seed=seed,
        )
    if as_json:
        print_result({"folder": str(out), "ranks": dict(combined.ranks), "error": combined.error})
        return 0
    ranks = sorted(set(combined.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    print_result(
        f"{out}: {len(combined.ranks)} layers of rank {span}, {100 * combined.error:.2g} % off what {method} gives"
    )
    return 0
