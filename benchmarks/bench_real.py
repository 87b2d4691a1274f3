"""Models at the sizes people use: what their export takes, and their latency beside onnxruntime's and OpenVINO's.

    python benchmarks/bench_real.py [--models "resnet50 at 224,MiniLM at 128"] [--rounds 5] [--threads N]

Each model of `real_sizes.py`, with random weights, is exported in fp32 and in 8 or 4 bits, each in its own process:
seconds, memory at its peak, size, difference from eager mode, share of delegated operators. The same model goes through
torch's ONNX exporter, for 8 bits through onnxruntime's static quantization (QDQ, per channel); that file is what
onnxruntime and OpenVINO run. All use as many threads, in turn, `--rounds` times, and the least median of each counts.
`speed` is their time over ours. Writes docs/bench-real.md and .json. Exit code 1 where the geometric mean of the
networks for pictures misses its goal beside onnxruntime. An engine that is not installed has an empty column
(`pip install onnxruntime onnx onnxscript openvino`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from real_sizes import DRAWN, REAL, error_of, name_of

from edgetune.run.environment import installed_versions

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "bench-real"
GOALS = {"fp32": 1.0, "int8": 1.2}  # of speed, geometric mean over the networks for pictures
OTHERS = {"onnx": "onnxruntime", "openvino": "openvino"}  # engine -> its package
SECONDS, LIMIT_S, MIB = 1.0, 900, 2**20
Row = dict[str, Any]
Verdicts = Sequence[tuple[bool, str]]


# In a process of their own


def export_model(name: str, bits: str, path: Path) -> Row:
    """Quantize and export; the figures of the program."""
    import bench_export_worker as worker
    import torch

    from edgetune.export import export
    from edgetune.runtime.clock.machine import resident_mib

    chosen = REAL[name]
    model = chosen.made().eval()
    begun = time.perf_counter()
    if bits != "fp32":
        model = worker.quantized(chosen, model)
    quantized = time.perf_counter()
    artifact = export(model, chosen.inputs(2), path, target="xnnpack", one_row=True, min_same_prediction_pct=0.0)
    call = artifact.manifest.main
    assert call.parity is not None
    row = {
        "quantize_s": quantized - begun,
        "export_s": time.perf_counter() - quantized,
        "peak_mib": resident_mib("VmHWM"),
        "size_mib": artifact.manifest.size_bytes / MIB,
        "difference": call.parity.max_relative_difference,
        "delegated_pct": call.delegated_operators_pct,
    }
    torch.save([tensor[:1] for tensor in _tensors(chosen.inputs(2))], path.with_suffix(".pt"))
    return row


def export_onnx(name: str, bits: str, path: Path) -> Row:
    """The same model for onnxruntime."""
    import torch

    chosen = REAL[name]
    model, inputs = chosen.made().eval(), chosen.inputs(1)
    plain = path if bits == "fp32" else path.with_suffix(".fp32.onnx")
    arguments = (inputs,) if isinstance(inputs, torch.Tensor) else ()
    keywords = inputs if isinstance(inputs, dict) else None
    torch.onnx.export(model, arguments, plain, kwargs=keywords, dynamo=True, external_data=False, verbose=False)
    if bits != "fp32":
        from onnxruntime.quantization import QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(str(plain), str(plain), skip_symbolic_shape=True)
        quantize_static(str(plain), str(path), _Rows(str(plain), name), quant_format=QuantFormat.QDQ, per_channel=True)
    return {}


class _Rows:
    """Calibration rows, one at a time, as onnxruntime asks for them."""

    def __init__(self, path: str, name: str) -> None:
        import onnxruntime

        names = [one.name for one in onnxruntime.InferenceSession(path).get_inputs()]
        tensors = _tensors(REAL[name].inputs(8))
        self.rows = iter([dict(zip(names, (t[i : i + 1].numpy() for t in tensors), strict=True)) for i in range(8)])

    def get_next(self) -> dict[str, Any] | None:
        """The next row."""
        return next(self.rows, None)


def time_pte(path: Path, threads: int) -> float:
    """Median milliseconds."""
    import torch

    from edgetune.runtime.clock.runs import load_runtime

    runtime = load_runtime(threads)
    program = runtime._load_program(str(path))
    method, inputs = program.load_method("forward"), tuple(torch.load(path.with_suffix(".pt"), weights_only=True))
    return _median_ms(lambda: method.call(inputs, clone_outputs=False))


def time_onnx(path: Path, threads: int, inputs: Path) -> float:
    """Median milliseconds."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tensors = torch.load(inputs, weights_only=True)
    given = {one.name: t.numpy() for one, t in zip(session.get_inputs(), tensors, strict=True)}
    return _median_ms(lambda: session.run(None, given))


def time_openvino(path: Path, threads: int, inputs: Path) -> float:
    """Median milliseconds."""
    import openvino
    import torch

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.compile_model(path, "CPU", settings).create_infer_request()
    given = [tensor.numpy() for tensor in torch.load(inputs, weights_only=True)]
    return _median_ms(lambda: request.infer(given, share_inputs=True, share_outputs=True))


def _median_ms(once: Any) -> float:
    times: list[float] = []
    until = time.perf_counter() + SECONDS / 3
    while time.perf_counter() < until:
        once()
    until = time.perf_counter() + SECONDS
    while len(times) < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        once()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)


def _tensors(inputs: Any) -> list[Any]:
    return list(inputs.values()) if isinstance(inputs, dict) else [inputs]


def worker_main(request: Row) -> Any:
    """Answer one request."""
    path = WORK / request["file"]
    if request["step"] == "export":
        return export_model(request["model"], request["bits"], path)
    if request["step"] == "onnx":
        return export_onnx(request["model"], request["bits"], path)
    if request["step"] == "time pte":
        return time_pte(path, request["threads"])
    timed = time_openvino if request["step"] == "time openvino" else time_onnx
    return timed(path, request["threads"], path.with_suffix(".pt"))


# The benchmark


class WorkerError(Exception):
    """Why a process gave no answer."""


def asked(**request: Any) -> Any:
    """What a process of its own answers."""
    threads = str(request.get("threads", os.cpu_count() or 1))
    command = [sys.executable, __file__, "--request", json.dumps(request)]
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    if done.returncode != 0:
        raise WorkerError(error_of(done))
    return json.loads(done.stdout.strip().splitlines()[-1])


def exported(name: str, bits: str) -> Row:
    """One model in one type: what its export took, and the file of each engine that runs it."""
    stem = name_of(name, bits)
    common = {"model": name, "bits": bits}
    try:
        row: Row = {**common, **asked(step="export", file=f"{stem}.pte", **common), "files": {"pte": f"{stem}.pte"}}
    except WorkerError as error:
        return {**common, "failed": str(error)}
    others = [engine for engine, package in OTHERS.items() if importlib.util.find_spec(package) is not None]
    if bits == "int4" or not others:
        return row
    try:
        asked(step="onnx", file=f"{stem}.onnx", **common)
        row["files"] |= dict.fromkeys(others, f"{stem}.onnx")
    except WorkerError as error:
        print(f"{name} {bits}, no ONNX: {error}", file=sys.stderr)
    return row


def time_all(rows: list[Row], rounds: int, threads: int) -> None:
    """Add the least median of each engine, one round after the other: a shared machine is slow for minutes."""
    for number in range(rounds):
        for row in rows:
            for engine, file in row.get("files", {}).items():
                settings = {"model": row["model"], "bits": row["bits"], "threads": threads, "file": file}
                try:
                    time_ms = asked(step=f"time {engine}", **settings)
                    row[f"{engine}_ms"] = min(time_ms, row.get(f"{engine}_ms", math.inf))
                except WorkerError as error:
                    print(f"{row['model']} {row['bits']}, {engine}: {error}", file=sys.stderr)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)


def speeds(rows: list[Row], bits: str, engine: str) -> list[float]:
    """Another engine's time over ours, for the networks for pictures."""
    own = [row for row in rows if row["bits"] == bits and REAL[row["model"]].source == "timm"]
    return [row[f"{engine}_ms"] / row["pte_ms"] for row in own if f"{engine}_ms" in row and "pte_ms" in row]


def verdicts(rows: list[Row]) -> list[tuple[bool, str]]:
    """What the whole is held to."""
    count = sum("export_s" in row for row in rows)
    checks = [(count == len(rows), f"{count} of {len(rows)} programs exported, equal to eager mode")]
    for bits, goal in GOALS.items():
        own, others = speeds(rows, bits, "onnx"), speeds(rows, bits, "openvino")
        mean, beside = (statistics.geometric_mean(values) if values else 0.0 for values in (own, others))
        text = f"speed beside onnxruntime, {bits}, geometric mean of {len(own)} networks: {mean:.2f} (goal: {goal:g})"
        checks.append((mean >= goal, f"{text}; beside OpenVINO {beside:.2f}"))
    return checks


def document(rows: list[Row], checks: list[tuple[bool, str]], threads: int) -> str:
    """The page."""
    machine = installed_versions()
    lines = [
        "# `make bench-real`: models at the sizes people use",
        "",
        f"Made by `python benchmarks/bench_real.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine['executorch']}, threads: {threads}, random weights, batch 1. Difference: the largest from eager "
        "mode, as a share of the largest output. Speed: the other engine's time over ours.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
        "",
        "| model | type | quantize, s | export, s | peak, MiB | `.pte`, MiB | difference | delegated | ms | "
        "onnxruntime, ms | speed | OpenVINO, ms | speed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "export_s" not in row:
            lines.append(f"| {row['model']} | {row['bits']} | not exported: {row['failed']} |" + " |" * 10)
            continue
        others = [row.get(f"{engine}_ms") for engine in OTHERS]
        beside = " | ".join(f"{other:.2f} | {other / row['pte_ms']:.2f}" if other else " | " for other in others)
        cells = (
            f"{row['quantize_s']:.1f} | {row['export_s']:.1f} | {row['peak_mib']:.0f} | {row['size_mib']:.1f}",
            f"{row['difference']:.1e} | {row['delegated_pct']:.0f} % | {row['pte_ms']:.2f}",
        )
        lines.append(f"| {row['model']} | {row['bits']} | {' | '.join(cells)} | {beside} |")
    return "\n".join(lines) + "\n"


def write_results(out: Path, rows: Any, checks: Verdicts, page: str) -> None:
    """Write the figures and the page beside them."""
    out.write_text(json.dumps({"rows": rows, "verdicts": checks}, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page, encoding="utf-8")


def exit_with(checks: Verdicts) -> NoReturn:
    """Print what was reached, and end with code 1 where something was missed."""
    print("\n".join(f"{'reached' if met else 'MISSED'}: {text}" for met, text in checks))
    sys.exit(0 if all(met for met, _ in checks) else 1)


def main() -> None:
    """Export, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(n for n in REAL if n.partition(" ")[0] not in DRAWN))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-real.json")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if given.request:
        print("\n" + json.dumps(worker_main(json.loads(given.request))))
        return
    models = given.models.split(",")
    unknown = sorted(set(models) - set(REAL))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(REAL)}")
    rows: list[Row] = []
    for name in models:
        for bits in ("fp32", REAL[name].bits):
            rows.append(exported(name, bits))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    time_all(rows, given.rounds, given.threads)
    checks = verdicts(rows)
    write_results(given.out, rows, checks, document(rows, checks, given.threads))
    exit_with(checks)


if __name__ == "__main__":
    main()
