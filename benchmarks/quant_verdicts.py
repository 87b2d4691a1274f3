"""What bench_quant.py holds its rows to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from method_rows import Row, Table, Verdict
from quant_methods import BITS, FLOAT, UNIFORM, methods_of
from quant_models import TASKS


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What the whole is held to."""
    table, checks = Table(rows), list[Verdict]()
    of_text = [name for name, task in TASKS.items() if task.kind != "image"]

    def at_most(value: float | None, limit: float, text: str) -> None:
        if value is not None:
            checks.append((value <= limit, f"{text}: {value:.3g} (at most {limit:g})"))

    for name in of_text:
        gptq = table.ratio(name, "int4 gptq g32", "int4 absmax g32", "kl")
        at_most(gptq, 0.6, f"{name}: KL of gptq over absmax, groups of 32")
        channel = table.ratio(name, "int4 gptq channel", "int4 absmax g32", "kl")
        at_most(channel, 1.0, f"{name}: KL of gptq per channel over absmax in groups of 32")
        at_most(
            table.ratio(name, BITS, UNIFORM, "kl"), 0.8, f"{name}: KL of bits over gptq in uniform 4 bits of its size"
        )
        recovered = table.ratio(name, "qat, int4 channel", "int4 absmax channel", "kl")
        at_most(recovered, 0.5, f"{name}: KL after qat over absmax, per channel")
        if TASKS[name].kind == "language":  # accuracies are too coarse
            lost = _share_lost(table, name)
            at_most(lost, 0.5, f"{name}: share of the perplexity that absmax per channel costs that stays after qat")
    for name, method, limit in (("small GPT", None, 1.02), ("small GPT", "qat", 1.01), ("SmolLM2", None, 1.05)):
        best = _best_perplexity(table, name, method)
        if best is not None:
            method_name, value = best
            at_most(value, limit, f"{name}: perplexity of {method_name} over the float model's")
    for name, method in (("MiniLM", UNIFORM), ("EfficientNet-Lite0", "int8 auto, biases")):
        whole, rounded = table.mean(name, FLOAT, "quality"), table.mean(name, method, "quality")
        if whole is not None and rounded is not None:
            at_most(whole - rounded, 0.3, f"{name}: points lost by {method}")
    at_most(table.ratio("MiniLM", UNIFORM, FLOAT, "file_mib"), 1 / 6.5, f"MiniLM: size of {UNIFORM} over fp32's")
    checks += [verdict for name in of_text for verdict in _beside_random(table, name)]
    ours, theirs = _best_perplexity(table, "SmolLM2", None), table.mean("SmolLM2", "llama.cpp Q4_K_M", "quality")
    whole = table.mean("SmolLM2", FLOAT, "quality")
    if ours and theirs and whole:
        at_most(ours[1] * whole / theirs, 1.0, f"SmolLM2: perplexity of {ours[0]} over llama.cpp's Q4_K_M")
    checks += [verdict for name in of_text for verdict in _beside_ties(table, name)]
    return checks + [verdict for name in of_text for verdict in _beside_arithmetic(table, name)]


def _beside_ties(table: Table, name: str) -> list[Verdict]:
    """How far programs are from their models, over what rounding ties alone move these by, at most."""
    rows = [row for row in table.rows if row["model"] == name and row.get("ties")]
    ratio, method = max(((row["difference"] / row["ties"], row["method"]) for row in rows), default=(0.0, ""))
    text = f"{name}: largest difference of a program over that of rounding ties: {ratio:.2g}, {method} (at most 3)"
    return [(ratio <= 3, text)] if rows else []


def _beside_arithmetic(table: Table, name: str) -> list[Verdict]:
    """How far the sizes of programs are from the bytes of their weights, at most."""
    rows = [row for row in table.rows if row["model"] == name and {"stored_mib", "file_mib"} <= row.keys()]
    off, row = max(
        ((row["file_mib"] / row["stored_mib"] - 1, row) for row in rows), key=lambda p: abs(p[0]), default=(0, {})
    )
    if not row:
        return []
    more_kib = 1024 * (row["file_mib"] - row["stored_mib"])
    text = f"file over the bytes of its weights: {100 * off:.1f} %, {more_kib:.0f} KiB, {row['method']} (at most 2 %)"
    return [(abs(off) <= 0.02, f"{name}: {text}")]


def _beside_random(table: Table, name: str) -> list[Verdict]:
    """Whether allocations of `bits` are ahead of random ones of their size with every seed, rounded alike."""
    checks = []
    for method in methods_of(TASKS[name]):
        seeds: list[Any] = table.values(name, method, "compared")
        if seeds:
            own, chance, uniform = ([seed[of] for seed in seeds] for of in ("this", "random", "uniform"))
            text = "KL x 1000 of {}, held-out batches: {:.2f}, random {:.2f} to {:.2f}, uniform {:.2f}".format(
                method, *(1000 * x for x in (statistics.mean(own), min(chance), max(chance), statistics.mean(uniform)))
            )
            checks.append((max(own) < min(chance), f"{name}: {text}"))
    return checks


def _share_lost(table: Table, name: str) -> float | None:
    """What the metric has lost after qat, as a share of what it loses without."""
    whole, rounded, trained = (
        table.mean(name, method, "quality") for method in (FLOAT, "int4 absmax channel", "qat, int4 channel")
    )
    if whole is None or rounded is None or trained is None or whole == rounded:
        return None
    return (whole - trained) / (whole - rounded)


def _best_perplexity(table: Table, name: str, method: str | None) -> tuple[str, float] | None:
    """The method that begins so, or any without training, with the least perplexity, over that of the float model."""
    names = [m for m in methods_of(TASKS[name]) if m.startswith(method or "int4") or (not method and "int4" in m)]
    names = [m for m in names if method or not m.startswith("qat")]
    ratios = [(m, table.ratio(name, m, FLOAT, "quality")) for m in names]
    measured = [(m, ratio) for m, ratio in ratios if ratio is not None]
    return min(measured, key=lambda pair: pair[1]) if measured else None
