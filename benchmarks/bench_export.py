"""Families of models through the whole line: adapted, trained, finalized, quantized, exported, run, compared.

    python benchmarks/bench_export.py [--families BERT,Llama] [--only fp32,int8,int4,coreml,vulkan] [--jobs 1] [--again]

One cell of the table is one family in one column, in a process of its own with a limit of time, so that a crash is a
cell too. What is found goes to docs/bench-export.json at once; a cell that stands there is done again with --again
alone. docs/bench-export.md is written from that file at the end: the table, what failed and why, and the figures that
the whole is held to. Exit code 1 where one of them is missed or not measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import bench_export_worker as worker
import torch

from edgetune.core.quiet import silence_libraries
from edgetune.run.environment import installed_versions
from support.families import FAMILIES, Family
from support.timm_apart import TIMM, import_timm

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900.0  # for one cell, on a machine that does other things as well
ONLY = ("fp32", "int8", "int4", "coreml", "vulkan")
MAX_RELATIVE, MIN_SAME_PCT, MIN_MACS_PCT = 1e-4, 99.0, 95.0
MIN_WHOLE, MIN_DELEGATED, MIN_LOWERED = 0.90, 0.80, 30

Found = dict[str, dict[str, Any]]  # "BERT/fp32" -> what the worker wrote


# Running


@dataclass
class Job:
    """A cell that is being worked on."""

    key: str
    child: BaseProcess
    path: Path
    begun: float


def load_libraries() -> None:
    """What every cell needs, once: the cells are forks of this process. Nothing is run, which would start threads."""
    torch.set_num_threads(1)
    with silence_libraries():
        import executorch.backends.xnnpack.quantizer.xnnpack_quantizer
        import peft
        import torchao.quantization.pt2e.quantize_pt2e
        import transformers

        if TIMM.is_dir():
            import_timm()
        worker.load_runtime(None)
    assert all((executorch, peft, torchao, transformers))
    from edgetune.export import pipeline

    row = (torch.ones(1, 2),)
    pipeline.lower(pipeline.Positional(torch.nn.Linear(2, 2), row).eval(), row, pipeline.targets.find("xnnpack"))


def start(family: Family, column: str, folder: Path) -> Job:
    """Begin a cell."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "cell.json"
    child = multiprocessing.get_context("fork").Process(target=_child, args=(family, column, path))
    child.start()
    return Job(f"{family.name}/{column}", child, path, time.perf_counter())


def _child(family: Family, column: str, path: Path) -> None:
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    worker.run(family, column, path)


def ended(job: Job, seconds: float) -> dict[str, Any] | None:
    """What a cell found, or `None` while it is still at it."""
    taken = time.perf_counter() - job.begun
    if job.child.is_alive() and taken < seconds:
        return None
    late = job.child.is_alive()
    if late:
        job.child.kill()
    job.child.join()
    found: dict[str, Any] = json.loads(job.path.read_text(encoding="utf-8")) if job.path.exists() else {}
    if found.get("state", "crashed") == "crashed":
        log = job.path.with_suffix(".log")
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:] if log.exists() else []
        why = f"no end after {seconds:.0f} s" if late else f"the process ended with code {job.child.exitcode}"
        found |= {"state": "timeout" if late else "crashed", "reason": " / ".join([why, *([] if late else last)])}
    return {**found, "seconds": round(taken, 1)}


def work(cells: list[tuple[Family, str]], jobs: int, seconds: float, done: Callable[[str, Any], None]) -> None:
    """All cells, `jobs` at a time."""
    waiting, running = list(reversed(cells)), list[Job]()
    with tempfile.TemporaryDirectory() as name:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(start(*waiting.pop(), Path(name)))
                for job in list(running):
                    found = ended(job, seconds)
                    if found is not None:
                        running.remove(job)
                        done(job.key, found)
                time.sleep(0.1)
        finally:
            for job in running:
                job.child.kill()


def chosen(families: Iterable[str], only: Iterable[str]) -> Iterator[tuple[Family, str]]:
    """The cells that the arguments name."""
    for name in families:
        family = FAMILIES[name]
        for column in worker.COLUMNS:
            if (family.bits if column == "quantized" else column) in only:
                yield family, column


# What was found


def whole(cell: dict[str, Any] | None) -> bool:
    """Whether a cell came through the line with equal outputs."""
    if cell is None or cell["state"] != "done" or "relative_difference" not in cell:
        return False
    if cell["bits"] == "fp32":
        return bool(cell["relative_difference"] <= MAX_RELATIVE)
    return bool(cell["same_prediction_pct"] >= MIN_SAME_PCT)


def delegated(cell: dict[str, Any] | None) -> bool:
    """Whether a cell's work is done by the backend, all but a twentieth."""
    return cell is not None and cell["state"] == "done" and cell["delegated_macs_pct"] >= MIN_MACS_PCT


def short(text: str, most: int = 200) -> str:
    """A reason for a cell of a table: one line, no bars."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= most else line[: most - 1] + "…"


def shown(cell: dict[str, Any] | None) -> list[str]:
    """Parity, delegated share, delegates, size and what is left over, of one XNNPACK cell."""
    if cell is None:
        return ["not run", "", "", "", ""]
    if cell["state"] != "done":
        return [f"{cell['state'].upper()} ({cell['stage']})", "", "", "", ""]
    value = (
        f"{cell['relative_difference']:.1e}"
        if cell["bits"] == "fp32"
        else f"{cell['same_prediction_pct']:.1f} % ({cell['relative_difference']:.1e})"
    )
    names: dict[str, int] = {}
    for left in cell["undelegated_kernels"]:
        name = left["operator"].split(".")[1]
        names[name] = names.get(name, 0) + left["count"]
    undelegated = ", ".join(f"{count} {name}" for name, count in sorted(names.items(), key=lambda item: -item[1])[:4])
    return [
        value if whole(cell) else f"**{value}**",
        f"{cell['delegated_macs_pct']:.1f} %" if delegated(cell) else f"**{cell['delegated_macs_pct']:.1f} %**",
        str(cell["delegates"]),
        f"{cell['size_bytes'] / 2**20:.2f}",
        undelegated or "nothing",
    ]


def elsewhere(cell: dict[str, Any] | None) -> str:
    """The share that a backend takes which cannot be run here."""
    if cell is None:
        return "not run"
    if cell["state"] != "done":
        return f"{cell['state'].upper()} ({cell['stage']})"
    return f"{cell['delegated_macs_pct']:.1f} % in {cell['delegates']}"


def table(found: Found) -> list[str]:
    """One row for each family."""
    parts = ["parity", "MACs", "delegates", "MiB", "left over"]
    heads = ["family", "adapted", *(f"fp32: {p}" for p in parts), "bits", *(f"quantized: {p}" for p in parts),
             "Core ML", "Vulkan"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, family in FAMILIES.items():
        cells = {column: found.get(f"{name}/{column}") for column in worker.COLUMNS}
        values = [name, "LoRA" if family.adapt == "lora" else f"sparse, {family.adapt}", *shown(cells["fp32"])]
        values += [family.bits, *shown(cells["quantized"]), elsewhere(cells["coreml"]), elsewhere(cells["vulkan"])]
        lines.append("| " + " | ".join(values) + " |")
    return lines


def reasons(found: Found) -> list[str]:
    """Every cell that is not as it should be, with the operator and the reason."""
    lines = []
    for name in FAMILIES:
        for column in worker.COLUMNS:
            cell = found.get(f"{name}/{column}")
            what = wrong_with(cell, column) if cell is not None else ""
            if what:
                lines.append(f"- {name}, {column if column != 'quantized' else FAMILIES[name].bits}: {what}")
    return lines


def wrong_with(cell: dict[str, Any], column: str) -> str:
    """Why a cell does not count, or nothing."""
    if cell["state"] != "done":
        return f"{cell['state']} at {cell['stage']}: {short(cell['reason'], 400)}"
    said = []
    if column in ("fp32", "quantized") and not whole(cell):
        said.append(
            f"outputs differ by {cell['relative_difference']:.1e} of the largest, {cell['same_prediction_pct']:.1f} % "
            f"the same prediction"
        )
        if "eager_rounding" in cell:
            said.append(f"eager mode itself is {cell['eager_rounding']:.1e} from double precision")
    if not delegated(cell):
        most = [f"{u['operator']} in {u['module'] or 'the model itself'}" for u in cell["undelegated"][:3]]
        said.append(f"{cell['delegated_macs_pct']:.1f} % of the MACs delegated; left: {', '.join(most)}")
    return "; ".join(said)


def verdicts(found: Found) -> list[tuple[bool, str]]:
    """What the whole is held to, counted over all families: a cell that was not measured is not reached."""
    total = len(FAMILIES)
    both = {name: [found.get(f"{name}/{column}") for column in ("fp32", "quantized")] for name in FAMILIES}
    equal = sum(all(map(whole, cells)) for cells in both.values())
    taken = sum(all(map(delegated, cells)) for cells in both.values())
    lines = [
        (equal >= MIN_WHOLE * total, f"{equal} of {total} families have equal outputs, fp32 and "
         f"quantized (goal: {MIN_WHOLE:.0%})"),
        (taken >= MIN_DELEGATED * total, f"{taken} of {total} with at least {MIN_MACS_PCT:g} % of their MACs delegated "
         f"to XNNPACK, fp32 and quantized (goal: {MIN_DELEGATED:.0%})"),
    ]  # fmt: skip
    for column, name in (("coreml", "Core ML"), ("vulkan", "Vulkan")):
        cells = [found.get(f"{family}/{column}") for family in FAMILIES]
        lowered = sum(c is not None and c["state"] == "done" and c["delegates"] > 0 for c in cells)
        lines.append((lowered >= MIN_LOWERED, f"{lowered} of {total} lowered for {name} (goal: {MIN_LOWERED})"))
    return lines


def document(found: Found) -> str:
    """The page."""
    machine = installed_versions()
    measured = sum(f"{name}/{column}" in found for name in FAMILIES for column in worker.COLUMNS)
    lines = [
        "# `make bench-export`: model families, from adapter to verified program",
        "",
        f"Made by `python benchmarks/bench_export.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine.get('executorch', 'not installed')}, torchao {machine.get('torchao', 'not installed')}; {measured} "
        f"of {len(FAMILIES) * len(worker.COLUMNS)} cells measured. The models are small and have random weights: this "
        f"tests shapes, lowering and parity. Each family is adapted, trained for {worker.STEPS} steps, finalized, "
        f"quantized where the column says so, exported and run on {worker.ROWS} rows.",
        "",
        "Parity in fp32 is the largest difference from eager mode, divided by the largest output (goal: "
        f"{MAX_RELATIVE:g}); quantized, the share of rows with the prediction of the eager quantized model (goal: "
        f"{MIN_SAME_PCT:g} %), and that difference in brackets. A prediction is the index of the largest value of the "
        "last dimension: the class, the class of each pixel, the next word at each position, the position of each "
        "joint; for CLIP and the encoders of Whisper and SAM, which predict nothing, the largest feature. With random "
        "weights the predictions mean nothing: what counts is that both agree. A missed goal is bold. Core ML and "
        "Vulkan programs are lowered here from fp32, not run: the share of MACs and the number of delegates.",
        "",
        *table(found),
        "",
        *(f"- {family.name}: {family.note}" for family in FAMILIES.values() if family.note),
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in verdicts(found)),
        "",
        "## Failures and missed goals",
        "",
        *(reasons(found) or ["Nothing."]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--only", default=",".join(ONLY))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also what docs/bench-export.json holds already")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one cell")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-export.json")
    given = parser.parse_args()
    families, only = given.families.split(","), given.only.split(",")
    for asked, allowed in ((families, FAMILIES), (only, ONLY)):
        unknown = sorted(set(asked) - set(allowed))
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    path: Path = given.out
    found: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def done(key: str, cell: Any) -> None:
        found[key] = cell
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, path)
        print(f"{key}: {cell['state']}, {cell['seconds']:.0f} s {short(cell.get('reason', ''))}", file=sys.stderr)

    cells = [(f, column) for f, column in chosen(families, only) if given.again or f"{f.name}/{column}" not in found]
    if cells:
        load_libraries()
        work(cells, given.jobs, given.seconds, done)
    text = document(found)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n".join(f"{'reached' if met else 'MISSED'}: {line}" for met, line in verdicts(found)))
    sys.exit(0 if all(met for met, _ in verdicts(found)) else 1)


if __name__ == "__main__":
    main()
