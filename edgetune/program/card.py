"""The model card next to a program: its manifest, and the ledger of the run it came from, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.core.errors import truncate_list
from edgetune.core.files import write_atomically
from edgetune.core.numbers import format_size
from edgetune.program.carried import (
    Carried,
    ClassScores,
    ImagePreprocessing,
    ScaledValue,
    TaggedWords,
    TextPreprocessing,
)

if TYPE_CHECKING:
    from edgetune.core.ledger import Ledger
    from edgetune.core.parity import Parity
    from edgetune.program.manifest import Manifest
    from edgetune.program.operators import Operator

_TYPES = {
    "8da4w": "in 4 bits, with 8-bit activations",
    "int8": "in 8 bits",
    "fp16": "as 16-bit floats",
    "bf16": "as 16-bit floats (bfloat16)",
    "fp32": "as 32-bit floats",
}


def card_path(path: Path) -> Path:
    """`model.md` for `model.pte`."""
    return path.with_suffix(".md")


def write_card(path: Path, manifest: Manifest, ledger: Ledger | None = None) -> None:
    """Write the card of the program at `path` next to it."""
    write_atomically(card_path(path), format_card(path.name, manifest, ledger))


def format_card(name: str, manifest: Manifest, ledger: Ledger | None = None) -> str:
    """The card of the program called `name`, as Markdown."""
    carried = manifest.carried or Carried()
    parts = [
        f"# {name}",
        _summary(carried, ledger),
        "## Inputs and outputs\n" + _shapes(manifest),
        _section("Preprocessing", preprocessing(carried)),
        _section("Outputs", postprocessing(carried)),
        _section("Program", _program(manifest)),
        _section("Adapters", _adapters(manifest)),
        _section("Guard", _guard(manifest)),
        *(_run(ledger) if ledger is not None else ()),
        _section("Notes", dict.fromkeys((*carried.notes, *(ledger.notes if ledger is not None else ())))),
        _section("Versions", [f"{package} {version}" for package, version in manifest.versions.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def preprocessing(carried: Carried) -> list[str]:
    """How an image or a text becomes the inputs, one step per line."""
    spec = carried.preprocessing
    if isinstance(spec, ImagePreprocessing):
        crop = "cropped to the largest central square" if spec.crop == "center" else "not cropped"
        rounded = "rounded to integers" if spec.rounded else "not rounded"
        channels = "RGB, three channels" if spec.color == "rgb" else "greyscale, with the same values in every channel"
        return [
            "an image, rotated as its EXIF orientation says",
            f"as {channels}",
            f"{crop}, resized to {spec.size_px} x {spec.size_px} ({spec.resize}, antialiased, {rounded})",
            f"each byte: (x * {spec.scale:g} - mean) / std, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}",
            "channels first",
        ]
    if isinstance(spec, TextPreprocessing):
        ending = f", followed by {spec.ending!r}" if spec.ending else ""
        return [
            f"a text, tokenized with `{spec.tokenizer}`{ending}",
            f"at most {spec.max_length} tokens, special tokens included; longer texts are truncated on the {spec.cut}",
            f"padded on the right with token {spec.pad_id}; `attention_mask` is 1 for the tokens of the text, else 0",
        ]
    return []


def postprocessing(carried: Carried) -> list[str]:
    """What the outputs mean, one step a line."""
    spec = carried.postprocessing
    lines, labels = [], "classes"
    if isinstance(spec, ClassScores):
        lines = [f"logits; their {spec.scores} gives the score of each class, and the highest score is the prediction"]
    elif isinstance(spec, ScaledValue):
        lines = [f"a standardized number; output * {spec.std:g} + {spec.mean:g} is the prediction"]
    elif isinstance(spec, TaggedWords):
        labels = "tags"
        lines = [
            f"a text's words are the matches of `{spec.words}`, each tokenized as a word of its own",
            f"logits; the highest at a word's first token is its tag, and the tags ({spec.scheme}) make entities",
        ]
    return lines + ([f"{labels}, in order: {', '.join(carried.labels)}"] if carried.labels else [])


def quantization(operators: Sequence[Operator]) -> str:
    """The types that weights are multiplied in, by the bytes that one run reads: of an embedding only its rows."""
    bytes_by_dtype: Counter[str] = Counter()
    for operator in operators:
        if operator.weight_bytes:
            bytes_by_dtype[operator.dtype] += operator.weight_bytes
    parts = [f"{format_size(count)} {_TYPES.get(name, name)}" for name, count in bytes_by_dtype.most_common()]
    return "; ".join(parts) or "none"


def _summary(carried: Carried, ledger: Ledger | None) -> str:
    made = [f"made from `{carried.model}`"] if carried.model else []
    made += [f"with the data `{carried.data}`"] if carried.data else []
    made += [f"by the recipe `{carried.recipe}`"] if carried.recipe else []
    made += [f"seed {ledger.seed}"] if ledger is not None else []
    task = carried.task.replace("-", " ") or "a model"
    lines = [f"{task[:1].upper()}{task[1:]}{' ' * bool(made)}{', '.join(made)}."]
    lines += [f"Licence of the pretrained weights: {carried.licence}."] if carried.licence else []
    return "\n".join(lines)


def _shapes(manifest: Manifest) -> str:
    call = manifest.main
    rows = [("input", spec) for spec in manifest.own_inputs(call)] + [("output", spec) for spec in call.outputs]
    return _table(
        ("", "name", "shape", "type"), [(way, s.name, " x ".join(map(str, s.shape)), s.dtype) for way, s in rows]
    )


def _program(manifest: Manifest) -> list[str]:
    call, parity = manifest.main, manifest.main.parity
    same = (
        f"verified against the model on {parity.rows} {parity.counted}{'s' * (parity.rows != 1)}: same "
        f"prediction on {parity.same_prediction_pct:g} %, {_values(parity)}"
        if parity is not None
        else manifest.note
    )
    outside: Counter[str] = Counter()
    for operator in call.undelegated:
        outside[operator.operator] += operator.count
    undelegated = truncate_list([f"{count} x {name}" for name, count in outside.most_common()], 6)
    language = manifest.language
    cache = f", with a cache in {language.cache_dtype}" if language is not None else ""
    return [
        f"target {manifest.target}" + (f", for {manifest.device}" if manifest.device else ""),
        *(
            [f"computed in {manifest.dtype}{cache}; inputs and outputs are as in fp32"]
            if manifest.dtype != "fp32"
            else []
        ),
        f"{format_size(manifest.size_bytes)}, and {format_size(call.plan_bytes)} of planned activation memory",
        f"weights that one run reads: {quantization(call.operators)}",
        f"{call.delegated_macs_pct:.1f} % of the multiply-accumulates run in the backend, in {call.delegates} "
        f"parts" + (f"; outside it: {undelegated}" if undelegated else ""),
        *([same] if same else []),
        *([f"branches and norms: {call.folded}"] if call.folded else []),
        f"SHA-256 `{manifest.sha256}`",
    ]


def _adapters(manifest: Manifest) -> list[str]:
    """Each adapter of the base, and how the program gets it."""
    spec = manifest.adapters
    if spec is None:
        return []
    inputs = "the last inputs of the program, named as the tensors of an adapter's file; zeros are the base alone"
    way = (
        inputs
        if spec.form == "inputs"
        else f"a file that is loaded together with `{manifest.data and manifest.data.file}`"
    )
    lines = [f"rank up to {spec.rank}, on {len(spec.layers)} layers; {way}"]
    for one in spec.files:
        proof = f": {_values(one.parity)}" if one.parity is not None else ""
        lines.append(f"`{one.name}` in `{one.file}`, {format_size(one.size_bytes)}, rank {one.rank}{proof}")
    return lines


def _guard(manifest: Manifest) -> list[str]:
    """What the method `guard` takes and returns."""
    if manifest.guard is None:
        return []
    call, carried = manifest.guard.call, manifest.guard.carried
    proof = [f"compared with the model: {_values(call.parity)}"] if call.parity is not None else []
    method = f"the method `{call.name}`, over the same weights, takes {', '.join(map(str, call.inputs))}"
    return [method, *preprocessing(carried), *postprocessing(carried), *proof]


def _values(parity: Parity) -> str:
    apart = f"values differ by at most {parity.max_abs_difference:.2g}"
    if parity.max_relative_difference is None:
        return apart
    allowed = f" ({parity.max_relative_allowed:g} allowed)" if parity.max_relative_allowed is not None else ""
    also = f"; also tried: {', '.join(parity.tried)}" if parity.tried else ""
    ties = "" if parity.ties is None else (
        f"; float noise on what is rounded to 8 bits moves the model by {parity.ties.max_relative_difference:.1e}"
    )  # fmt: skip
    return f"{apart}, which is {parity.max_relative_difference:.1e} of the largest output value{allowed}{ties}{also}"


def _run(ledger: Ledger) -> Iterable[str]:
    """Training data, quality and speed, as the ledger has them."""
    rows = [(row.step, row.quality, row.size_mib) for row in ledger.rows if row.quality is not None]
    if rows:
        body = [(step, f"{quality.value:.2f}", str(quality.rows), f"{mib:.2f}") for step, quality, mib in rows]
        metric = rows[-1][1].metric
        beside = [f"\n- {baseline.name}: {baseline.value:.2f}" for baseline in ledger.baselines]
        text = _table(("after", metric, "test rows", "MiB"), body)
        yield f"## Quality, on held-out rows of `{ledger.data}`\n{text}" + "".join(["\n", *beside] if beside else [])
    measured = [
        f"measured on {line.where}: {line.latency_ms:.2f} ms (10th to 90th percentile {line.latency_p10_ms:.2f} to "
        f"{line.latency_p90_ms:.2f}), {line.threads} threads, peak {line.peak_memory_mib:.1f} MiB"
        for line in ledger.measured
    ]
    predicted = [
        f"predicted for {line.where} ({line.runs_on}), {'calibrated' if line.calibrated else 'not calibrated'}: "
        f"{line.latency_ms:.2f} ms ({line.latency_low_ms:.2f} to {line.latency_high_ms:.2f})"
        for line in ledger.predicted
    ]
    yield _section("Speed", measured + predicted)


def _section(title: str, lines: Iterable[str]) -> str:
    items = [f"- {line}" for line in lines]
    return "\n".join((f"## {title}", *items)) if items else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in (values if len(set(values)) > 1 else values[:1]))
