"""Language programs beside what else runs the same weights, and MiniLM's 8da4w program beside its fp32 one.

    python benchmarks/bench_language.py [--rounds 5] [--tokens 128] [--threads 2] [--layers N] [--out FILE.json]

SmolLM2-135M in 4 bits, computed in fp32, bf16 and fp16, and with an int8 cache: size of the `.pte`, greedy tokens after
four prompts beside those of the eager quantized model, tokens per second of prefill and decode beside torch in eager
mode with a static cache, bf16 and fp32, and beside llama.cpp's Q4_0 where `llama_cpp` can be imported
(`pip install llama-cpp-python`). MiniLM: time and memory of the export, size, latency.
Every figure comes from a process of its own; what is compared is taken in turn, `--rounds` times, with as many threads.
The median and the range are given. Exit code 1 where something held to is missed. `--layers` is for trying it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgetune.run.environment import detect_environment
from edgetune.runtime.clock.runs import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("bench_language_worker.py")
PROGRAMS = ("program", "program, bf16", "program, fp16", "program, int8 cache")
ENGINES = (*PROGRAMS, "eager bf16", "eager fp32", "llama.cpp Q4_0")
MAX_PTE_BYTES, MAX_EXPORT_S, MAX_EXPORT_MIB, MAX_SIZE_SHARE, MAX_BF16_PEAK = 120e6, 60.0, 2048.0, 1 / 5, 0.75
MAX_LOAD_MS = 600.0
MIB = 2**20

Found = dict[str, Any]


def asked(verb: str, work: Path, /, **settings: Any) -> Any:
    """What a process of its own answers."""
    request, out = work / "request.json", work / "answer.json"
    request.write_text(json.dumps({"verb": verb, "settings": settings}), encoding="utf-8")
    out.unlink(missing_ok=True)
    command = [sys.executable, str(WORKER), str(request), str(out)]
    environment = os.environ | (ENVIRONMENT if settings.get("engine") in PROGRAMS else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{verb} {settings}: {done.stderr[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def told(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def language(folder: Path, given: argparse.Namespace) -> Found:
    """SmolLM2: the program, then everything that says its tokens, in turn."""
    programs: dict[str, Found] = {}
    for name in PROGRAMS:
        asking = {"folder": str(folder), "layers": given.layers, "tokens": given.tokens, "engine": name}
        programs[name] = asked("prepare", folder, **asking)
        told(f"{name}: exported in {programs[name]['export_s']:.0f} s, {programs[name]['size_bytes'] / 1e6:.1f} MB")
    plain = programs["program"]
    engines = [name for name in ENGINES if name != "llama.cpp Q4_0" or has_llama_cpp(given)]
    prompt = (plain["prompt"] * 8)[:128]  # as much as one call takes
    rows: dict[str, list[Found]] = {name: [] for name in engines}
    for number in range(given.rounds):
        for name in engines:
            settings = {"engine": name, "layers": given.layers, "threads": given.threads, "tokens": given.tokens}
            row = asked("say", folder, folder=str(folder), prompt=prompt, **settings)
            told(f"round {number + 1}, {name}: decode {row['decode_tokens_per_s']:.1f} tokens/s")
            rows[name].append(row)
    process = asked("process", folder, folder=str(folder))["peak_mib"]
    return {
        **plain,
        "prompt_tokens": len(prompt),
        "generated": given.tokens,
        "engines": rows,
        "programs": programs,
        "process_mib": process,
    }


def has_llama_cpp(given: argparse.Namespace) -> bool:
    """Whether llama.cpp is there, for the whole model: a part of one is not in its file."""
    return given.layers is None and importlib.util.find_spec("llama_cpp") is not None


def minilm(folder: Path, given: argparse.Namespace) -> Found:
    """MiniLM in both types: exports, then latencies in turn; its linears one by one."""
    found: Found = {bits: asked("minilm", folder, folder=str(folder), bits=bits) for bits in ("fp32", "8da4w")}
    for bits, row in found.items():
        told(f"minilm {bits}: exported in {row['export_s']:.0f} s, {row['size_bytes'] / MIB:.1f} MiB")
        row["latencies_ms"] = []
    for _ in range(given.rounds):
        for bits in ("fp32", "8da4w"):
            found[bits]["latencies_ms"].append(latency(folder, folder / f"minilm-{bits}.pte", given))
    layers = asked("layers", folder, folder=str(folder))
    for row in layers:
        for bits in ("fp32", "8da4w"):
            path = Path(row[bits])
            row[bits] = statistics.median(latency(folder, path, given) for _ in range(given.rounds))
    return {**found, "layers": layers}


def latency(folder: Path, path: Path, given: argparse.Namespace) -> float:
    """Milliseconds of one program."""
    found = asked("time", folder, path=str(path), threads=given.threads, seconds=given.seconds)
    return float(found["latency_ms"])


def middle(values: list[float], digits: int = 1) -> str:
    """The median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def speed(found: Found, engine: str, what: str) -> list[float]:
    """Tokens per second in each round."""
    return [row[f"{what}_tokens_per_s"] for row in found["engines"].get(engine, [])]


def own_mib(lm: Found, engine: str) -> float:
    """MiB that an engine adds to the process, at its peak."""
    return statistics.median(row["peak_mib"] for row in lm["engines"][engine]) - float(lm["process_mib"])


def verdicts(found: Found) -> list[tuple[bool, str]]:
    """What is held to, and what was reached."""
    lm, bert = found["language"], found["minilm"]
    same, tokens, itself = lm["same_tokens"], lm["tokens"], lm["eager_same_as_moved"]
    decode = statistics.median(speed(lm, "program", "decode"))
    lines = [
        (lm["size_bytes"] <= MAX_PTE_BYTES, f".pte of {lm['size_bytes'] / 1e6:.1f} MB (goal: at most 120)"),
        (same == tokens, f"{same} of {tokens} greedy tokens equal those of the eager quantized model, which agrees "
         f"with itself on {itself} when its embeddings change by 2e-7"),
    ]  # fmt: skip
    if "programs" in lm:
        half, peaks = lm["programs"]["program, bf16"]["same_tokens"], [own_mib(lm, name) for name in PROGRAMS[:2]]
        lines += [
            (half >= same, f"in bf16, {half} of {tokens} greedy tokens equal those of the eager model (fp32: {same})"),
            (peaks[1] <= MAX_BF16_PEAK * peaks[0], f"in bf16, it adds {peaks[1]:,.0f} MiB to the process, fp32 adds "
             f"{peaks[0]:,.0f} (goal: 25 % less)"),
        ]  # fmt: skip
    for engine in ("eager bf16", "eager fp32"):
        other = statistics.median(speed(lm, engine, "decode"))
        lines.append((decode >= other, f"decodes {decode / other:.2f} times as fast as {engine}"))
    load_ms = statistics.median(row["load_ms"] for row in lm["engines"]["program"])
    lines.append((load_ms <= MAX_LOAD_MS, f"loads in {load_ms:,.0f} ms (goal: {MAX_LOAD_MS:.0f})"))
    for bits in ("fp32", "8da4w"):
        seconds, mib = bert[bits]["export_s"], bert[bits]["export_peak_mib"]
        text = f"MiniLM {bits}: exported in {seconds:.1f} s (goal: 60) and {mib:,.0f} MiB (goal: 2,048)"
        lines.append((seconds < MAX_EXPORT_S and mib < MAX_EXPORT_MIB, text))
    share = bert["8da4w"]["size_bytes"] / bert["fp32"]["size_bytes"]
    lines.append((share <= MAX_SIZE_SHARE, f"MiniLM 8da4w: 1/{1 / share:.2f} of fp32's size (goal: 1/5)"))
    ratio = statistics.median(bert["8da4w"]["latencies_ms"]) / statistics.median(bert["fp32"]["latencies_ms"])
    lines.append((ratio <= 1.0, f"MiniLM 8da4w: {ratio:.2f} of fp32's latency (goal: at most 1)"))
    return lines


def language_table(lm: Found) -> list[str]:
    """Speeds side by side."""
    decode = statistics.median(speed(lm, "program", "decode"))
    lines = [
        "| | prefill, tokens/s | decode, tokens/s | decode speed-up | load, ms | peak of the process, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in ENGINES:
        rows = lm["engines"].get(name)
        if not rows and name in PROGRAMS:
            continue
        if not rows:
            lines.append(f"| {name} | not measured: llama_cpp is not installed | | | | |")
            continue
        own = speed(lm, name, "decode")
        lines.append(
            f"| {name} | {middle(speed(lm, name, 'prefill'))} | {middle(own)} | {decode / statistics.median(own):.2f} "
            f"| {statistics.median(r['load_ms'] for r in rows):,.0f} "
            f"| {statistics.median(r['peak_mib'] for r in rows):,.0f} |"
        )
    return lines


def types_table(lm: Found) -> list[str]:
    """The programs by the types that they compute in."""
    lines = [
        "| | `.pte`, MB | cache, MiB | plan, MiB | delegates | tokens equal to eager's | added to the process, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in lm.get("programs", {}).items():
        lines.append(
            f"| {name} | {row['size_bytes'] / 1e6:.1f} | {row['cache_bytes'] / MIB:.1f} "
            f"| {row['plan_bytes'] / MIB:.1f} | {row['delegates']} | {row['same_tokens']} of {row['tokens']} "
            f"| {own_mib(lm, name):,.0f} |"
        )
    return lines if len(lines) > 2 else []


def minilm_table(bert: Found) -> list[str]:
    """MiniLM in both types, and its linears."""
    lines = [
        "| | export, s | peak of the export, MiB | `.pte`, MiB | delegates | delegated MACs | latency, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in ("fp32", "8da4w"):
        row = bert[bits]
        lines.append(
            f"| {bits} | {row['export_s']:.1f} | {row['export_peak_mib']:,.0f} | {row['size_bytes'] / MIB:.2f} "
            f"| {row['delegates']} | {row['delegated_macs_pct']:.1f} % | {middle(row['latencies_ms'], 2)} |"
        )
    lines += ["", "Its linear layers, each exported and timed alone:", ""]
    lines += ["| linear, in x out | count | fp32, ms each | 8da4w, ms each | 8da4w / fp32 |", "|---|---|---|---|---|"]
    for row in bert["layers"]:
        width, out = row["shape"]
        ratio = row["8da4w"] / row["fp32"]
        lines.append(f"| {width} x {out} | {row['count']} | {row['fp32']:.3f} | {row['8da4w']:.3f} | {ratio:.2f} |")
    return lines


def document(found: Found) -> str:
    """The page."""
    machine, how, lm = found["machine"], found["how"], found["language"]
    part = f" Only {how['layers']} of the model's blocks: a trial, whose figures mean nothing." if how["layers"] else ""
    lines = [
        "# `make bench-export`: a text-generation program, and MiniLM",
        "",
        f"Made by `python benchmarks/bench_language.py` on {machine['cpu']}, {how['threads']} threads, "
        f"{', '.join(f'{name} {version}' for name, version in machine['versions'].items())}; median of "
        f"{how['rounds']} interleaved rounds, and range.{part}",
        "",
        f"SmolLM2-135M-Instruct, 4-bit weights in groups of 32, 8 bits for head, embedding and down projections: "
        f"{lm['prompt_tokens']} prompt tokens, {lm['generated']} generated tokens, a cache of 512. Eager: transformers "
        "with a static cache and the unquantized weights. llama.cpp: Q4_0, converted by its own tool from the same "
        "weights. Each engine generates everything once as a warm-up.",
        "",
        *language_table(lm),
        "",
        *(["By type; the eager model computes in fp32:", "", *types_table(lm), ""] if types_table(lm) else []),
        f"Export: {lm['export_s']:.0f} s, {lm['export_peak_mib']:,.0f} MiB at its peak with the model; "
        f"{lm['delegated_macs_pct']:.1f} % of the MACs are delegated; the rest is attention.",
        "",
        "MiniLM, 1 x 64 tokens, a head of 3 classes; 8da4w has 4-bit embeddings:",
        "",
        *minilm_table(found["minilm"]),
        "",
        *(f"- {'reached' if met else 'MISSED'}: {text}" for met, text in verdicts(found)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="said by each, and compared with eager")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each latency of MiniLM")
    parser.add_argument("--layers", type=int, help="only so many blocks of SmolLM2")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-language.json")
    given = parser.parse_args()
    here = detect_environment()
    packages = ("torch", "executorch", "torchao", "transformers")
    machine = {"cpu": here.cpu, "versions": {name: here.versions[name] for name in packages}}
    how = {"rounds": given.rounds, "threads": given.threads, "layers": given.layers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "machine": machine, "how": how, "language": language(folder, given), "minilm": minilm(folder, given),
        }  # fmt: skip
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = document(found)
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(0 if all(met for met, _ in verdicts(found)) else 1)


if __name__ == "__main__":
    main()
