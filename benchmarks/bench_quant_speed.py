"""MiniLM at 1 x 64 tokens, quantized each way, beside onnxruntime's and OpenVINO's programs of the same weights.

    python benchmarks/bench_quant_speed.py [--rounds 7] [--threads N]

Ours: fp32, 8-bit dynamic, 4 bits in groups of 32 and per channel. onnxruntime: fp32, its dynamic int8 (per tensor and
per channel, of which the faster counts), and its 4-bit MatMulNBits in blocks of 32, with 8-bit and with fp32
activations. OpenVINO: fp32. Each is timed in a process of its own, with as many threads, in turn, `--rounds` times; the
median of the rounds counts. Then the seconds that GPTQ takes at the sizes of MiniLM, SmolLM2-135M and Qwen3-0.6B.
Writes docs/bench-quant-speed.md and .json. Exit code 1 where something held to is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_real import exit_with, time_onnx, time_openvino, time_pte, write_results
from real_sizes import error_of

from edgetune.run.environment import installed_versions
from edgetune.runtime.clock.machine import cpuinfo
from edgetune.runtime.host import flags_of

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "bench-quant-speed"
TOKENS, MIB = 64, 2**20
FP32, INT8, INT4, CHANNEL = "fp32", "int8_dynamic", "int4 g32", "int4 channel"
ORT, ORT_INT8, ORT_INT8_CHANNEL = "onnxruntime fp32", "onnxruntime int8", "onnxruntime int8 per channel"
ORT_INT4, ORT_INT4_FP32, VINO = "onnxruntime int4", "onnxruntime int4, fp32 activations", "OpenVINO fp32"
FILES = {
    FP32: "fp32.pte", INT8: "int8.pte", INT4: "int4.pte", CHANNEL: "int4-channel.pte", ORT: "fp32.onnx",
    ORT_INT8: "int8.onnx", ORT_INT8_CHANNEL: "int8-channel.onnx", ORT_INT4: "int4.onnx",
    ORT_INT4_FP32: "int4-fp32.onnx", VINO: "fp32.onnx",
}  # fmt: skip
GOALS = (  # ours, the other's, and how many times faster ours is
    (INT4, (ORT_INT8, ORT_INT8_CHANNEL), 1.4), (INT8, (ORT_INT8, ORT_INT8_CHANNEL), 1.7),
    (INT4, (ORT_INT4, ORT_INT4_FP32), 3.0), (FP32, (ORT,), 1.0), (FP32, (VINO,), 1.0), (CHANNEL, (INT4,), 1.3),
)  # fmt: skip
GPTQ_S = {"MiniLM": 30, "SmolLM2-135M": 240, "Qwen3-0.6B": 1200}  # at most
CALIBRATION_ROWS = 16  # in each of 8 batches


def export_ours() -> dict[str, float]:
    """Our programs, and the largest difference of each from eager mode."""
    import torch
    from real_sizes import bert, sentences

    import edgetune as et

    build = functools.partial(bert, 384, 6, 12)
    inputs = sentences(2, tokens=TOKENS)
    techniques = {
        FP32: None, INT8: et.Int8Dynamic(), INT4: et.Int4(algorithm="absmax"),
        CHANNEL: et.Int4(algorithm="absmax", group_size="channel"),
    }  # fmt: skip
    differences = {}
    for name, technique in techniques.items():
        model = build()
        if technique is not None:
            et.apply(model, technique)
        path = WORK / FILES[name]
        settings: Any = {"target": "xnnpack", "one_row": True, "min_same_prediction_pct": 0.0}
        artifact = et.export(model, inputs, path, **settings)
        assert artifact.manifest.main.parity is not None
        differences[name] = artifact.manifest.main.parity.max_relative_difference
    for file in FILES.values():
        torch.save([tensor[:1] for tensor in inputs.values()], (WORK / file).with_suffix(".pt"))
    return differences


def export_others() -> None:
    """onnxruntime's programs of the same weights."""
    import torch
    from onnxruntime.quantization import matmul_nbits_quantizer, quantize_dynamic
    from real_sizes import bert, sentences

    plain = WORK / FILES[ORT]
    torch.onnx.export(
        bert(384, 6, 12), (), plain, kwargs=sentences(1, tokens=TOKENS), dynamo=True, external_data=False,
        verbose=False,
    )  # fmt: skip
    quantize_dynamic(str(plain), str(WORK / FILES[ORT_INT8]))
    quantize_dynamic(str(plain), str(WORK / FILES[ORT_INT8_CHANNEL]), per_channel=True)
    for name, level in ((ORT_INT4, 4), (ORT_INT4_FP32, 1)):
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            str(plain), block_size=32, is_symmetric=True, accuracy_level=level
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(WORK / FILES[name]), use_external_data_format=False)


def time_one(name: str, threads: int) -> float:
    """Median milliseconds."""
    path = WORK / FILES[name]
    if path.suffix == ".pte":
        return time_pte(path, threads)
    return (time_openvino if name == VINO else time_onnx)(path, threads, path.with_suffix(".pt"))


def time_gptq(name: str, threads: int) -> float:
    """Seconds that `int4` by GPTQ takes, with batches of `CALIBRATION_ROWS` x `TOKENS` random tokens."""
    import torch
    from real_sizes import bert
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    import edgetune as et

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name == "MiniLM":
        model: Any = bert(384, 6, 12)
    elif name == "SmolLM2-135M":
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
            )
        )  # fmt: skip
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                intermediate_size=3072, vocab_size=151936, tie_word_embeddings=True,
            )
        )  # fmt: skip
    batches = [{"input_ids": torch.randint(1000, (CALIBRATION_ROWS, TOKENS))} for _ in range(8)]
    sample = et.Sample(inputs=batches[0], batches=lambda: iter(batches))
    begun = time.perf_counter()
    et.apply(model.eval(), et.Int4(algorithm="gptq"), sample=sample)
    return time.perf_counter() - begun


def asked(verb: str, threads: int, name: str = "") -> Any:
    """What a process of its own answers."""
    command = [sys.executable, __file__, "--request", json.dumps([verb, threads, name])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{verb} {name}: {error_of(done)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def worker_main(verb: str, threads: int, name: str) -> Any:
    """Answer one request."""
    if verb == "time":
        return time_one(name, threads)
    if verb == "gptq":
        return time_gptq(name, threads)
    return export_ours() if verb == "export ours" else export_others()


def verdicts(medians: dict[str, float], gptq_s: dict[str, float]) -> list[tuple[bool, str]]:
    """What the whole is held to."""
    checks = []
    for ours, others, goal in GOALS:
        other = min(others, key=medians.__getitem__)
        ratio = medians[other] / medians[ours]
        checks.append((ratio >= goal, f"{ours} is {ratio:.2f} times as fast as {other} (goal: {goal:g})"))
    for name, seconds in gptq_s.items():
        checks.append((seconds <= GPTQ_S[name], f"{name}: GPTQ in {seconds:.0f} s (goal: {GPTQ_S[name]})"))
    return checks


def document(rows: dict[str, Any], checks: list[tuple[bool, str]], threads: int) -> str:
    """The page."""
    machine = installed_versions()
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "executorch"))
    flags = ", ".join(flags_of(cpuinfo()) or ["instruction sets unknown"])
    lines = [
        "# `make bench-quant`: MiniLM at 1 x 64 tokens",
        "",
        f"Made by `python benchmarks/bench_quant_speed.py` on {machine['cpu']} ({flags}), {packages}, threads: "
        f"{threads}, random weights. Milliseconds: the median and the range of the rounds. Difference: the largest "
        "from eager mode, as a share of the largest output. GPTQ: seconds of one run, 8 batches of "
        f"{CALIBRATION_ROWS} x {TOKENS} tokens.",
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in checks),
        "",
        "| program | ms | range | MiB | difference |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ms = row["ms"]
        difference = "" if row["difference"] is None else f"{row['difference']:.1e}"
        spread = f"{min(ms):.2f} to {max(ms):.2f}"
        lines.append(f"| {name} | {statistics.median(ms):.2f} | {spread} | {row['mib']:.2f} | {difference} |")
    return "\n".join(lines) + "\n"


def measure_programs(rounds: int, threads: int) -> dict[str, Any]:
    """Every program's milliseconds in each round, its size, and its difference from eager mode."""
    differences = asked("export ours", threads)
    asked("export others", threads)
    rows: dict[str, Any] = {
        name: {"ms": [], "mib": (WORK / file).stat().st_size / MIB, "difference": differences.get(name)}
        for name, file in FILES.items()
    }
    for number in range(rounds):
        for name, row in rows.items():
            row["ms"].append(asked("time", threads, name))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Export, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="the programs' times that the .json has already")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-quant-speed.json")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    if given.request:
        print("\n" + json.dumps(worker_main(*json.loads(given.request))))
        return
    kept = json.loads(given.out.read_text())["rows"] if given.keep and given.out.exists() else {}
    rows = kept.get("programs") or measure_programs(given.rounds, given.threads)
    gptq_s = {name: asked("gptq", given.threads, name) for name in GPTQ_S}
    checks = verdicts({name: statistics.median(row["ms"]) for name, row in rows.items()}, gptq_s)
    write_results(given.out, {"programs": rows, "gptq_s": gptq_s}, checks, document(rows, checks, given.threads))
    exit_with(checks)


if __name__ == "__main__":
    main()
