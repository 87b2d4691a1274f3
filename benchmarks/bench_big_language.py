"""Quantize and export language models of ordinary size with random weights: seconds, and memory at its peak.

    PYTHONPATH=tests python benchmarks/bench_big_language.py [--layers N] [--out FILE.json]

Qwen3-0.6B and Llama 3.2 1B, `int4` and then a text-generation program with a cache of 512, each in its own process.
Exit code 1 if a goal is missed. `--layers` is for trying it out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """A model of transformers, and what quantizing and exporting it may take."""

    kind: str
    settings: dict[str, int]
    max_seconds: float
    max_mib: float


SIZES = {
    "Qwen3-0.6B": Size(
        "Qwen3",
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936},
        max_seconds=180, max_mib=5e9 / MIB,
    ),
    "Llama 3.2 1B": Size(
        "Llama",
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256},
        max_seconds=360, max_mib=9e9 / MIB,
    ),
}  # fmt: skip


def measure(name: str, layers: int | None, folder: Path) -> dict[str, Any]:
    """Quantize and export in this process."""
    import torch

    from edgetune.core.quiet import silence_libraries

    with silence_libraries():
        import transformers
    from edgetune.export.language import export_language
    from edgetune.quant.int4 import Int4
    from edgetune.runtime.clock.machine import resident_mib
    from support.decoders import tokenizer

    torch.manual_seed(0)
    size = SIZES[name]
    settings = {**size.settings, **({"num_hidden_layers": layers} if layers else {})}
    config = getattr(transformers, f"{size.kind}Config")(**settings, tie_word_embeddings=True, bos_token_id=0)
    model = getattr(transformers, f"{size.kind}ForCausalLM")(config).eval()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    model = Int4().apply(model)
    quantized = time.perf_counter()
    artifact = export_language(model, tokenizer(), folder / "model.pte", min_same_prediction_pct=0)
    return {
        "int4_s": quantized - begun,
        "export_s": time.perf_counter() - quantized,
        "processor_s": time.process_time() - begun_cpu,
        "peak_mib": resident_mib("VmHWM"),
        "size_mib": artifact.manifest.size_bytes / MIB,
    }


def main() -> None:
    """Measure each model in its own process, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, help="only so many blocks: a trial, whose figures mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-big-language.json")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.only:
            given.out.write_text(json.dumps(measure(given.only, given.layers, Path(folder))), encoding="utf-8")
            return
        figures, partial = {}, Path(folder) / "figures.json"
        for name in SIZES:
            layers = ["--layers", str(given.layers)] if given.layers else []
            subprocess.run([sys.executable, __file__, "--only", name, "--out", str(partial), *layers], check=True)
            figures[name] = json.loads(partial.read_text(encoding="utf-8"))
    print("| model | int4, s | export, s | processor, s | peak of the process, MiB | `.pte`, MiB | goal |")
    print("|---|---|---|---|---|---|---|")
    missed = False
    for name, row in figures.items():
        size = SIZES[name]
        met = row["int4_s"] + row["export_s"] <= size.max_seconds and row["peak_mib"] <= size.max_mib
        missed |= not met
        goal = f"{'reached' if met else 'MISSED'}: {size.max_seconds:.0f} s, {size.max_mib:,.0f} MiB"
        print(
            f"| {name} | {row['int4_s']:.1f} | {row['export_s']:.0f} | {row['processor_s']:.0f} "
            f"| {row['peak_mib']:,.0f} | {row['size_mib']:.0f} | {goal} |"
        )
    given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
