"""Explanations of the page's terms: shown as tooltips, and listed at the end."""

from __future__ import annotations

from collections.abc import Mapping

TERMS: Mapping[str, str] = {
    "MiB": "1,048,576 bytes. KiB is 1,024 of them.",
    "accuracy": "The share of test rows that the model classifies correctly.",
    "perplexity": "How surprised a language model is by the test set. Lower is better; 1 means not at all.",
    "RMSE": "The root of the mean squared difference from the true values, in their unit. Lower is better.",
    "entity F1": "The harmonic mean of precision and recall of whole entities: words and kind must both be right.",
    "KL divergence": "How far two probability distributions are apart, here those of the model before and after its "
    "weights were rounded, as a mean over the predictions. 0: none.",
    "95 % interval": "The 95 % confidence interval of the accuracy (Wilson), given the number of test rows.",
    "points": "Percentage points: from 80 % to 82 % is 2 points.",
    "precision": "The share of the rows predicted as a class that belong to it.",
    "recall": "The share of the rows of a class that are predicted as it.",
    "times predicted": "The number of rows predicted as this class, correctly or not.",
    "confidence": "The softmax probability of the predicted class, which is not the probability that it is correct.",
    "baseline": "A simple method, trained and tested on the same rows. A useful model must beat it.",
    "parameters": "The learned values of the model.",
    "trainable": "The parameters that the next training step may change.",
    "MACs": "Multiply-accumulate operations of one run, a measure of its computation. M: million, G: billion.",
    "saved for backward": "Memory for the activations that the forward pass of one training batch saves for the "
    "backward pass. It is most of the memory that fine-tuning needs beyond the weights.",
    "finalize": "A step that merges what training added, such as adapters, into plain layers.",
    "program": "The exported model: a .pte file that ExecuTorch runs on a device without Python.",
    "ledger": "ledger.json, in the same folder as this page: everything that the run measured, as data.",
    "delegated": "Run by a backend with fast kernels for the device, such as XNNPACK on CPUs. "
    "Undelegated operators run on portable kernels, which are slow.",
    "target": "The ExecuTorch backend that the program was lowered for.",
    "planned activation memory": "The arena for activations, whose layout was planned at export.",
    "same prediction": "How often the program and the PyTorch model that it was exported from predict the same.",
    "latency": "Time of one run, from input to output.",
    "p10 to p90": "The 10th and the 90th percentile: eight of ten runs lie between them.",
    "load": "Time to open the program before its first run.",
    "peak memory": "Predicted: weights and planned arena, the same on every device. "
    "Measured: the memory of the process less that of an empty process, including the runtime's buffers.",
    "predicted": "Computed from a device descriptor, for the CPU. Nothing was run on the device.",
    "interval": "The prediction interval. It is designed to cover a stated share of programs, usually 80 %.",
    "calibrated": "The predictor was fitted to timings from that device (edgetune devices calibrate). "
    "For other devices it uses priors: rates for that class of cores.",
    "accelerator": "A GPU or NPU of the device. edgetune predicts CPUs only.",
    "lowest reachable": "The lowest value that this recipe can reach, for example with smaller batches.",
}
ALIASES: Mapping[str, str] = {
    "latency, median": "latency",
    "latency, measured": "latency",
    "latency, predicted": "predicted",
    "delegated, of the macs": "delegated",
    "delegated, of the operators": "delegated",
    "undelegated": "delegated",
    "same prediction as the pytorch model": "same prediction",
    "accuracy, test set": "accuracy",
    "perplexity, test set": "perplexity",
    "rmse, test set": "RMSE",
    "entity f1, test set": "entity F1",
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
