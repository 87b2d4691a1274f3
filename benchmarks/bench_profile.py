"""Predictions held against measurements: unseen programs on this host, and published rows of other devices.

    python benchmarks/bench_profile.py [--models BERT,Llama] [--rounds 6] [--keep] [--threads N]

The host is calibrated first (`edgetune devices calibrate`, in a folder of its own; --keep takes the calibration of the
last time). Then small models (the families of `make bench-export`), models at the sizes people use and ten networks
that were drawn by lot (`real_sizes.py`) are lowered in fp32 and in 8 or 4 bits, none of which the calibration has seen,
and timed: all of them once before any of them again, of each the least median. The layers' times are those of the same
runs. Peak memory is that of a fresh process. Writes docs/bench-profile.md and .json. Exit code 1 where a figure is
missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_export
import bench_export_worker as worker
import bench_profile_training
import torch
from real_sizes import DRAWN, REAL, name_of

from edgetune.core.errors import EdgetuneError
from edgetune.export import export
from edgetune.profile import trials
from edgetune.profile.calibrate import calibrate, noise_pct
from edgetune.profile.calls import predict_calls
from edgetune.profile.device import Device, load
from edgetune.profile.layers import predicted_layers_ms
from edgetune.profile.trials import Clocked
from edgetune.profile.validate import format_lines, validate
from edgetune.program.artifact import Artifact
from edgetune.run.environment import installed_versions
from edgetune.runtime import verify
from edgetune.runtime.hosts.host import Host
from edgetune.runtime.hosts.place import TimingRequest
from edgetune.runtime.measure import inputs_of
from edgetune.runtime.operator_times import layer_times_ms
from support.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "bench-profile"
SECONDS, LIMIT_S = 0.1, 300.0
COMPARE_S, CALIBRATION_S, DEAREST = 2.0, 360.0, 10
TASKS = ("minilm", "effnet-lite0")
Row = dict[str, Any]


MODELS = FAMILIES | REAL
GROUPS = {"small": "small programs", "real": "real sizes", "drawn": "drawn networks"}


# Programs


def group_of(model: str) -> str:
    """Which of `GROUPS` a model belongs to."""
    return "small" if model in FAMILIES else "drawn" if model.partition(" ")[0] in DRAWN else "real"


def lowered(family: str, column: str) -> None:
    """One program, unless it is there; in a process of its own."""
    chosen = MODELS[family]
    bits = "fp32" if column == "fp32" else chosen.bits
    path = WORK / f"{name_of(family, bits)}.pte"
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    model = chosen.made().eval()
    if bits != "fp32":
        model = worker.quantized(chosen, model)
    verify.run_in_child = worker.run_here
    rows = chosen.inputs(2)
    artifact = export(model, rows, path, target="xnnpack", one_row=True, min_same_prediction_pct=0.0)
    torch.save(list(inputs_of(artifact)), path.with_suffix(".pt"))


def build(models: list[str]) -> dict[str, str]:
    """The group of each program by its name; what could not be lowered is printed."""
    bench_export.load_libraries()
    built: dict[str, str] = {}
    for family in models:
        for column in ("fp32", "quantized"):
            name = name_of(family, "fp32" if column == "fp32" else MODELS[family].bits)
            if not (WORK / f"{name}.pt").is_file():
                child = multiprocessing.get_context("fork").Process(target=lowered, args=(family, column))
                child.start()
                child.join(LIMIT_S)
                if child.is_alive():
                    child.kill()
            if (WORK / f"{name}.pt").is_file():
                built[name] = group_of(family)
            print(f"{name}: {'lowered' if name in built else 'NOT lowered'}", file=sys.stderr, flush=True)
    return built


# Figures


def measured(groups: dict[str, str], host: Device, rounds: int) -> tuple[list[Row], float]:
    """Each program predicted and measured, and how far its timings lie apart."""
    assert host.calibration is not None
    for stale in WORK.glob("timings-*.jsonl"):
        stale.unlink()
    timings, failed = trials.clock(WORK, [*groups], threads=host.calibration.threads, seconds=SECONDS, rounds=rounds)
    assert not failed, failed
    rows = []
    for name, group in groups.items():
        artifact = Artifact.load(WORK / f"{name}.pte")
        (prediction,) = predict_calls(artifact, host)
        threads, inputs = host.calibration.threads, inputs_of(artifact)
        (alone,) = Host().time(TimingRequest(artifact.path, [inputs], threads, seconds=0.02, energy=False))
        own = [one for one in timings if one.name == name]
        least = min(own, key=lambda one: one.us)
        rows.append({
            "program": name, "group": group, "measured_ms": least.us / 1e3, "all_ms": [one.us / 1e3 for one in own],
            "predicted_ms": prediction.latency_ms, "low_ms": prediction.latency_low_ms,
            "high_ms": prediction.latency_high_ms, "measured_mib": alone.peak_memory_mib - alone.empty_memory_mib,
            "predicted_mib": prediction.peak_memory_mib, "measured_load_ms": alone.load_ms, "note": prediction.note,
            **layer_figures(artifact, host, least),
        })  # fmt: skip
        print(f"{name}: {prediction.latency_ms:.3f} for {least.us / 1e3:.3f} ms", file=sys.stderr, flush=True)
    return rows, noise_pct(timings)


def layer_figures(artifact: Artifact, host: Device, timing: Clocked) -> Row:
    """The sum of the layers' measured times, and the ten dearest layers: measured and predicted milliseconds."""
    times_ms = layer_times_ms(timing.instructions, artifact.manifest.main.executed)
    (predicted_ms,) = predicted_layers_ms(artifact, host)
    dearest = sorted(((ms, name) for name, ms in times_ms.items() if name), reverse=True)[:DEAREST]
    return {
        "layers_ms": sum(times_ms.values()),
        "dearest": [{"module": name, "measured_ms": ms, "predicted_ms": predicted_ms[name]} for ms, name in dearest],
    }


def share(errors: list[float], limit: float) -> float:
    """Of errors within the limit, in per cent."""
    return 100.0 * sum(abs(error) <= limit for error in errors) / len(errors)


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def compared_s(name: str) -> float:
    """Wall seconds of `edgetune devices compare` on a program, the interpreter's start included."""
    command = [sys.executable, "-m", "edgetune.cli.main", "devices", "compare", str(WORK / f"{name}.pte")]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def trained(threads: int) -> list[Row]:
    """Steps of training schemes predicted and measured, each task in a process of its own."""
    found: list[Row] = []
    for task in TASKS:
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_profile_training.py"), task, str(threads)]
        environment = os.environ | bench_profile_training.ENVIRONMENT
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        found += json.loads(told.splitlines()[-1])
        print(f"{task}: steps predicted and measured", file=sys.stderr, flush=True)
    return found


def held(path: Path) -> list[Row]:
    """The steps that stand in the file."""
    found: list[Row] = json.loads(path.read_text(encoding="utf-8")).get("steps", []) if path.is_file() else []
    return found


def training_verdicts(steps: list[Row]) -> list[tuple[bool, str]]:
    """Time within 20 %, memory within 10 %, of every scheme."""
    if not steps:
        return [(False, "training steps: not measured")]
    times = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in steps]
    kept = [abs(row["predicted_saved_mib"] / row["measured_saved_mib"] - 1) for row in steps]
    return [
        (max(times) <= 0.2, f"training steps within 20 % for {share(times, 0.2):.0f} % of {len(steps)} schemes (all)"),
        (max(kept) <= 0.1, f"their memory saved for backward within 10 % for {share(kept, 0.1):.0f} % of them (all)"),
    ]


def group_verdicts(rows: list[Row], group: str, interval_pct: float) -> list[tuple[bool, str]]:
    """What the programs of one group are held to."""
    latency = [row["predicted_ms"] / row["measured_ms"] - 1 for row in rows]
    memory = [row["predicted_mib"] / row["measured_mib"] - 1 for row in rows]
    sums = [row["layers_ms"] / row["measured_ms"] - 1 for row in rows]
    dearest = [one["predicted_ms"] / one["measured_ms"] - 1 for row in rows for one in row["dearest"]]
    inside = 100 * sum(row["low_ms"] <= row["measured_ms"] <= row["high_ms"] for row in rows) / len(rows)
    covers = f"the {interval_pct:.0f} % interval covers {inside:.0f} % (within 5 points)"
    name = f"{GROUPS[group]} ({len(rows)})"
    return [
        (share(latency, 0.1) >= 90, f"{name}: latency within 10 % for {share(latency, 0.1):.0f} % (90)"),
        (share(latency, 0.2) >= 99, f"{name}: latency within 20 % for {share(latency, 0.2):.0f} % (99)"),
        (abs(inside - interval_pct) <= 5, f"{name}: {covers}"),
        (share(memory, 0.1) >= 90, f"{name}: peak memory within 10 % for {share(memory, 0.1):.0f} % (90)"),
        (share(sums, 0.05) >= 95, f"{name}: layers sum to the whole within 5 % for {share(sums, 0.05):.0f} % (95)"),
        (
            share(dearest, 0.2) >= 100,
            f"{name}: the {DEAREST} dearest layers within 20 % for {share(dearest, 0.2):.0f} % (all)",
        ),
    ]


def verdicts(rows: list[Row], interval_pct: float, validation: Any, compare_s: float) -> list[tuple[bool, str]]:
    """What the whole is held to."""
    rank = rank_correlation([row["predicted_ms"] for row in rows], [row["measured_ms"] for row in rows])
    kinds = {row["program"].rsplit("-", 1)[1] for row in rows}
    found = [
        (len(rows) >= 40 and len(kinds) >= 3, f"{len(rows)} unseen programs in {', '.join(sorted(kinds))} (40, three)"),
        (rank >= 0.97, f"rank correlation {rank:.3f} (0.97)"),
    ]
    for group in GROUPS:
        own = [row for row in rows if row["group"] == group]
        found += group_verdicts(own, group, interval_pct) if own else [(False, f"{GROUPS[group]}: none")]
    shares = {(s.subject, s.basis, s.same_rows): s for s in validation.shares}
    for subject, limit, wanted in (
        ("language models, from a shell", 20, 80), ("language models, all", 20, 80), ("vision, same engine", 40, 80),
    ):  # fmt: skip
        left = shares[(subject, "device left out", False)]
        value = left.within_20_pct if limit == 20 else left.within_40_pct
        text = f"{subject}: {value:.0f} % of {left.rows} published rows within {limit} %, device left out ({wanted})"
        found.append((value >= wanted, text))
        same, used = shares.get((subject, "device left out", True)), shares.get((subject, "one row used", True))
        if same is not None and used is not None:
            before, after = ([s.within_10_pct, s.within_20_pct, s.within_40_pct] for s in (same, used))
            told = [" / ".join(f"{value:.0f}" for value in values) for values in (after, before)]
            text = f"{subject}: with one row used within 10 / 20 / 40 % {told[0]} %, the same rows without {told[1]} %"
            found.append((sum(after) > sum(before), text))
    found.append((compare_s < COMPARE_S, f"edgetune devices compare answers in {compare_s:.2f} s ({COMPARE_S:g})"))
    return found


def document(
    rows: list[Row], steps: list[Row], host: Device, noise: float, found: list[tuple[bool, str]], validation: Any
) -> str:
    """The page."""
    calibration, machine = host.calibration, installed_versions()
    assert calibration is not None
    lines = [
        "# `make bench-profile`: predicted and measured",
        "",
        f"Made by `python benchmarks/bench_profile.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine['executorch']}. Calibrated with threads: {calibration.threads}, from {calibration.programs} "
        f"micro-programs; {calibration.networks} small networks, left out in turn, are predicted within "
        f"{calibration.error_pct:g} % (median). Two timings of the same program differ by {noise:.1f} % (median).",
        "",
        *(f"- {note}" for note in calibration.notes),
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in found),
        "",
        "The kernels' terms (`edgetune/profile/terms.py`) were worked out with the small programs and those of real "
        "sizes in sight, their rates are fitted without them; the drawn networks were drawn afterwards. The constants "
        "of peak memory (`edgetune/profile/memory.py`) are fitted to small programs. Random weights, batch 1.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## On this host: {title}", "", *program_table([row for row in rows if row["group"] == group])]
    lines += [
        "",
        f"## Training steps on this host, threads: {calibration.threads}",
        "",
        "| task | scheme | measured, ms | predicted, ms | error | saved for backward, MiB | predicted, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['task']} | {r['method']} | {r['measured_ms']:.0f} | {r['predicted_ms']:.0f} | "
        f"{100 * (r['predicted_ms'] / r['measured_ms'] - 1):+.0f} % | {r['measured_saved_mib']:.1f} | "
        f"{r['predicted_saved_mib']:.1f} |"
        for r in steps
    ]  # fmt: skip
    return "\n".join([*lines, "", "## Published rows", "", "```", *format_lines(validation), "```"]) + "\n"


def program_table(rows: list[Row]) -> list[str]:
    """The programs of one group."""
    lines = [
        "| program | measured, ms | predicted, ms | error | inside | layers, ms | peak, MiB | predicted, MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = 100 * (row["predicted_ms"] / row["measured_ms"] - 1)
        memory = 100 * (row["predicted_mib"] / row["measured_mib"] - 1)
        inside = "yes" if row["low_ms"] <= row["measured_ms"] <= row["high_ms"] else "no"
        lines.append(
            f"| {row['program']} | {row['measured_ms']:.3f} | {row['predicted_ms']:.3f} | {error:+.0f} % | {inside} | "
            f"{row['layers_ms']:.3f} | {row['measured_mib']:.1f} | {row['predicted_mib']:.1f} | {memory:+.0f} % |"
        )
    return lines


def calibrated(keep: bool, threads: int | None) -> tuple[Device, float]:
    """This host, in a folder of the bench's own, and the seconds that its calibration took."""
    path, took = WORK / "host.yaml", WORK / "calibration_s.json"
    if not (keep and path.is_file() and took.is_file()):
        begun = time.perf_counter()
        calibrate(path, threads=threads, progress=_told)
        took.write_text(json.dumps(time.perf_counter() - begun), encoding="utf-8")
    return load(path), float(json.loads(took.read_text(encoding="utf-8")))


def _told(what: str, done: int, of: int, _: str) -> None:
    if done % 50 == 0 or done == of:
        print(f"{what} {done}/{of}", file=sys.stderr, flush=True)


def main() -> None:
    """Calibrate, lower, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, help="default: as `edgetune devices calibrate` chooses")
    parser.add_argument(
        "--no-training", dest="training", action="store_false", help="take the steps that were measured last"
    )
    parser.add_argument("--keep", action="store_true", help="take the last calibration")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-profile.json")
    given = parser.parse_args()
    models = given.models.split(",")
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(MODELS)}")
    WORK.mkdir(parents=True, exist_ok=True)
    groups = build(models)
    host, calibration_s = calibrated(given.keep, given.threads)
    assert host.calibration is not None
    rows, noise = measured(groups, host, given.rounds)
    validation = validate()
    mobile = next((name for name in groups if name.startswith("MobileNetV3-")), next(iter(groups)))
    try:
        compare_s = min(compared_s(mobile) for _ in range(3))
    except subprocess.CalledProcessError as error:
        raise EdgetuneError(f"devices compare failed: {error.stderr[-500:]!r}") from error
    steps = trained(host.calibration.threads) if given.training else held(given.out)
    found = verdicts(rows, host.calibration.interval_pct, validation, compare_s) + training_verdicts(steps)
    found.append((calibration_s <= CALIBRATION_S, f"calibrated in {calibration_s:.0f} s ({CALIBRATION_S:g})"))
    given.out.write_text(
        json.dumps({"rows": rows, "steps": steps, "noise_pct": noise, "verdicts": found}, indent=1) + "\n",
        encoding="utf-8",
    )
    given.out.with_suffix(".md").write_text(document(rows, steps, host, noise, found, validation), encoding="utf-8")
    print("\n".join(f"{'reached' if met else 'MISSED'}: {text}" for met, text in found))
    sys.exit(0 if all(met for met, _ in found) else 1)


if __name__ == "__main__":
    main()
