"""Quantize and export language models of ordinary size with random weights: seconds, and memory at its peak.

    PYTHONPATH=tests python benchmarks/bench_big_language.py [--layers N] [--out FILE.json]

`int4` and then a text-generation program with a cache of 512, each model in its own process; its greedy tokens beside
those of the eager quantized model, and tokens per second. Writes docs/bench-big-language.md and .json. Exit code 1 if a
goal is missed. `--layers` is for trying it out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_sizes import error_of

from edgetune.run.environment import installed_versions

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A model of transformers, and what quantizing and exporting it may take, where it is held to that."""

    kind: str
    settings: dict[str, int]
    max_seconds: float = math.inf
    max_mib: float = math.inf


SIZES = {
    "SmolLM2-360M": Size(
        "Llama",
        {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
         "intermediate_size": 2560, "vocab_size": 49152},
    ),
    "Gemma 3 270M": Size(
        "Gemma3",
        {"hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 256, "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": 512},
    ),
    "Qwen3-0.6B": Size(
        "Qwen3",
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936},
        max_seconds=180, max_mib=5e9 / MIB,
    ),
    "Gemma 3 1B": Size(
        "Gemma3",
        {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
         "head_dim": 256, "intermediate_size": 6912, "vocab_size": 262144, "sliding_window": 512},
    ),
    "Llama 3.2 1B": Size(
        "Llama",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256},
        max_seconds=360, max_mib=9e9 / MIB,
    ),
}  # fmt: skip


def measure(name: str, layers: int | None, folder: Path, threads: int) -> Row:
    """Quantize, export and time in this process."""
    import torch

    from edgetune.core.quiet import silence_libraries

    with silence_libraries():
        import transformers
    from edgetune.export.language import export_language
    from edgetune.quant.int4 import Int4
    from edgetune.runtime.clock.machine import resident_mib
    from edgetune.runtime.hosts.host import Host
    from edgetune.runtime.hosts.session import measure_on
    from support.decoders import CONFIGS, tokenizer

    torch.manual_seed(0)
    size = SIZES[name]
    settings = {**size.settings, **({"num_hidden_layers": layers} if layers else {})}
    config_class = getattr(transformers, f"{CONFIGS.get(size.kind, size.kind)}Config")
    config = config_class(**settings, tie_word_embeddings=True, bos_token_id=0)
    model = getattr(transformers, f"{size.kind}ForCausalLM")(config).eval()
    damp(model)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    model = Int4().apply(model)
    quantized = time.perf_counter()
    artifact = export_language(model, tokenizer(), folder / "model.pte", min_same_prediction_pct=0)
    figures = {
        "int4_s": quantized - begun,
        "export_s": time.perf_counter() - quantized,
        "processor_s": time.process_time() - begun_cpu,
        "peak_mib": resident_mib("VmHWM"),
        "size_mib": artifact.manifest.size_bytes / MIB,
        "delegated_macs_pct": artifact.manifest.main.delegated_macs_pct,
        "first_difference": artifact.language.first_difference,
    }
    del model
    token, prompt = measure_on(Host(), artifact, threads=threads)
    tokens = artifact.language.prefill_tokens
    speeds = {"prefill_tokens_per_s": 1e3 * tokens / prompt.latency_ms, "decode_tokens_per_s": 1e3 / token.latency_ms}
    return figures | {"load_ms": token.load_ms, **speeds}


def damp(model: Any) -> None:
    """Make what a block adds small where a norm scales it, as training does: Gemma's.

    Random weights otherwise enlarge any change: of 2e-7 in the embeddings to 5 % of the logits in 4 bits.
    """
    import torch

    if "Gemma" not in type(model).__name__:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_attention" in name or "post_feedforward" in name:
                parameter.fill_(-0.8)  # its norms scale by one more than that


def document(figures: dict[str, Row], threads: int) -> str:
    """The page."""
    machine = installed_versions()
    lines = [
        "# `make bench-export`: language models of ordinary size",
        "",
        f"Made by `python benchmarks/bench_big_language.py` on {machine['cpu']}, torch {machine['torch']}, executorch "
        f"{machine['executorch']}, threads: {threads}, random weights, `int4`, a cache of 512. Peak: of the process "
        "that holds the model in fp32, quantizes and exports it. Equal: the greedy tokens before the first that the "
        "eager quantized model would not choose.",
        "",
        "| model | int4, s | export, s | processor, s | peak, MiB | `.pte`, MiB | delegated MACs | equal | load, ms | "
        "prefill, tokens/s | decode, tokens/s | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        if "failed" in row:
            lines.append(f"| {name} | not exported: {row['failed']} |" + " |" * 10)
            continue
        size, equal = SIZES[name], "all" if row["first_difference"] is None else row["first_difference"]
        goal = f"{size.max_seconds:.0f} s, {size.max_mib:,.0f} MiB: {'reached' if met(name, row) else 'MISSED'}"
        lines.append(
            f"| {name} | {row['int4_s']:.1f} | {row['export_s']:.0f} | {row['processor_s']:.0f} | "
            f"{row['peak_mib']:,.0f} | {row['size_mib']:.0f} | {row['delegated_macs_pct']:.1f} % | {equal} | "
            f"{row['load_ms']:,.0f} | {row['prefill_tokens_per_s']:.0f} | {row['decode_tokens_per_s']:.1f} | "
            f"{goal if math.isfinite(size.max_mib) else ''} |"
        )
    return "\n".join(lines) + "\n"


def met(name: str, row: Row) -> bool:
    """Whether a model stays within what it is held to."""
    size = SIZES[name]
    if "failed" in row:
        return False
    return bool(row["int4_s"] + row["export_s"] <= size.max_seconds and row["peak_mib"] <= size.max_mib)


def main() -> None:
    """Measure each model in its own process, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, help="only so many blocks: a trial, whose figures mean nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-big-language.json")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.only:
            row = measure(given.only, given.layers, Path(folder), given.threads)
            given.out.write_text(json.dumps(row), encoding="utf-8")
            return
        figures, partial = {}, Path(folder) / "figures.json"
        for name in SIZES:
            layers = ["--layers", str(given.layers)] if given.layers else []
            command = [sys.executable, __file__, "--only", name, "--out", str(partial), *layers]
            done = subprocess.run([*command, "--threads", str(given.threads)], stderr=subprocess.PIPE, text=True)
            if done.returncode == 0:
                figures[name] = json.loads(partial.read_text(encoding="utf-8"))
            else:
                figures[name] = {"failed": error_of(done)}
            print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    page = document(figures, given.threads)
    print(page)
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(page, encoding="utf-8")
    sys.exit(0 if all(met(name, row) for name, row in figures.items()) else 1)


if __name__ == "__main__":
    main()
