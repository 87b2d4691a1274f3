"""The terms of the page in plain words: shown where a term is pointed at, and listed at the end."""

from __future__ import annotations

import html
from collections.abc import Mapping

TERMS: Mapping[str, str] = {
    "MiB": "1,048,576 bytes. KiB is 1,024 of them.",
    "accuracy": "Share of the rows of the test set that the model gets right.",
    "perplexity": "How surprised a language model is by the test set: 1 is not at all, lower is better.",
    "95 % interval": "Where the accuracy lies with 95 % certainty, given how few or many rows it was measured on.",
    "points": "Percentage points: from 80 % to 82 % is 2 points.",
    "precision": "Of the rows that the model takes for a class, the share that is of that class.",
    "recall": "Of the rows of a class, the share that the model takes for it.",
    "answered": "Rows that the model takes for this class, rightly or not.",
    "confidence": "The model's own score for its answer, as a share of all classes; not how likely it is to be right.",
    "baseline": "A simple method, trained and tested on the same rows. A model that does not beat it is of no use.",
    "parameters": "Numbers that the model has learned.",
    "trainable": "Those of them that the next training may change.",
    "MACs": "Multiply-accumulate operations of one run: how much there is to compute. M: million, G: thousand million.",
    "saved for backward": "Memory for the activations that one training batch keeps until its gradients are computed. "
    "It is most of what fine-tuning needs beyond the weights.",
    "finalize": "A step that merges what training added (adapters, slices) into plain layers again.",
    "program": "The exported model: a .pte file that ExecuTorch runs on a device, without Python.",
    "ledger": "ledger.json beside this page: everything that the run measured, as data.",
    "delegated": "Handed to a backend with fast kernels for the device (XNNPACK on CPUs). "
    "The rest runs on portable kernels, which are slow.",
    "target": "The ExecuTorch backend that the program was lowered for.",
    "memory planned for activations": "The arena that the program computes in, laid out when it was exported.",
    "same prediction": "How often the program answers as the PyTorch model does that it was made from.",
    "latency": "Time of one run, from input to output.",
    "p10 to p90": "Eight of ten runs took this long.",
    "load": "Time to open the program before its first run.",
    "peak memory": "Predicted: weights and planned arena, the same on every device. "
    "Measured: all that the process took above an empty one, the runtime's own buffers too.",
    "predicted": "Computed from a device descriptor, for the CPU. Nothing was run there.",
    "range": "The prediction interval. Where the table says so, it is meant to hold for 80 % of programs.",
    "calibrated": "The predictor was fitted to timings made on that very device (edgetune devices calibrate). "
    "Elsewhere it goes by priors: figures for that class of cores.",
    "accelerator": "A GPU or NPU that the device has beside its CPU. edgetune predicts CPUs only.",
    "lowest reachable": "The best that this recipe shows it can reach, say with smaller batches.",
}
ALIASES: Mapping[str, str] = {
    "latency, median": "latency",
    "latency, measured": "latency",
    "latency, predicted": "predicted",
    "delegated, of the macs": "delegated",
    "delegated, of the operators": "delegated",
    "not delegated": "delegated",
    "same prediction as the pytorch model": "same prediction",
    "accuracy, test set": "accuracy",
    "perplexity, test set": "perplexity",
    "model in memory": "MiB",
}
_BY_NAME = {name.casefold(): text for name, text in TERMS.items()}


def meaning(text: str) -> str:
    """What a heading means; empty for one that is no term.

    >>> meaning("points").split(":")[0], meaning("settings")
    ('Percentage points', '')
    """
    name = text.casefold()
    return _BY_NAME.get(ALIASES.get(name, name).casefold(), "")


def explained(text: str) -> str:
    """The text as HTML, with its meaning where it is a term."""
    shown = html.escape(text, quote=True)
    title = html.escape(meaning(text), quote=True)
    return f'<abbr title="{title}">{shown}</abbr>' if title else shown


def glossary() -> str:
    """All terms, as a list that can be folded away."""
    entries = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>\n" for name, text in TERMS.items())
    summary = "<summary>What the terms mean</summary>"
    return f'<details id="glossary">{summary}\n<dl class="glossary">\n{entries}</dl></details>'
