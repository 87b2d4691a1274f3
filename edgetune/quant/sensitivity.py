"""What rounding a layer costs: its squared error weighed by Fisher information, or the error of its outputs.

For a small change D of the weights the KL divergence from the model's own predictions is sum F D^2 / 2 with F the
diagonal of the Fisher information: the expected squared gradient of the log likelihood of labels drawn from the
model's own distribution (LeCun et al., 1990; Martens, 2020, arXiv:1412.1193, section 5). Gradients of other labels
than these have no mean of zero; with these, the squared gradient of a batch's sum is an estimate of the sum over rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, device_of, logits_of, token_mask
from edgetune.core.modes import preserve_trainability
from edgetune.quant.calibration import evaluation, run_on, usable_batches, watch_inputs
from edgetune.quant.layers import Layer
from edgetune.quant.teacher import divergence

_DRAWS = 4  # of labels for each batch
_MOST_LOGITS = 2**25  # that a comparison holds at once, beyond its first batch


def fisher_information(
    model: nn.Module, layers: Mapping[str, Layer], batches: Sequence[Inputs], seed: int
) -> dict[str, Tensor]:
    """The diagonal for the weight of each layer, of one prediction: a row, or each token of a model that has one for
    each. Zero for a layer that no prediction depends on."""
    sums = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    generator = torch.Generator(device_of(model)).manual_seed(seed)
    predictions = 0
    with _separate_weights(model, layers) as weights:
        for batch in usable_batches(model, batches):
            logits = _predicted(run_on(model, batch), batch)
            for draw in range(_DRAWS):
                loss = _draw_loss(logits, generator)
                if not loss.requires_grad:
                    raise EdgetuneError(
                        "the outputs of the model have no gradients, which Fisher information is made of",
                        got=type(model).__name__,
                        action="leave torch.no_grad and detach out of its forward, or set score: output",
                    )
                gradients = torch.autograd.grad(loss, weights, retain_graph=draw + 1 < _DRAWS, allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total += gradient.float().square_()
            predictions += _DRAWS * len(logits)
    for name, total in sums.items():
        total /= max(predictions, 1)
        if not bool(torch.isfinite(total.sum())):
            raise EdgetuneError(
                "the gradients of a layer are not finite on the calibration batches",
                where=name,
                action="look for NaN or infinity in the sample and the weights",
            )
    return sums


@torch.no_grad()
def reached_layers(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Inputs]) -> set[str]:
    """The names of the layers that are called on a batch."""
    reached: set[str] = set()
    with evaluation(model), watch_inputs(layers, lambda name, _: reached.add(name)):
        for batch in usable_batches(model, batches):
            run_on(model, batch)
    return reached


@torch.no_grad()
def reference_logits(model: nn.Module, batches: Sequence[Inputs]) -> list[tuple[Inputs, Tensor]]:
    """Batches with the model's predictions on them, `(predictions, classes)`; as many batches as fit into memory."""
    pairs: list[tuple[Inputs, Tensor]] = []
    held = 0
    with evaluation(model):
        for batch in usable_batches(model, batches):
            if held > _MOST_LOGITS:
                break
            pairs.append((batch, _predicted(run_on(model, batch), batch)))
            held += pairs[-1][1].numel()
    return pairs


@torch.no_grad()
def mean_kl(model: nn.Module, reference: Sequence[tuple[Inputs, Tensor]]) -> float:
    """The mean divergence of the model's predictions from these, in nats; of single values, half the squared error."""
    total, predictions = 0.0, 0
    with evaluation(model):
        for batch, expected in reference:
            logits = _predicted(run_on(model, batch), batch)
            predictions += len(logits)
            if len(logits):
                total += len(logits) * float(divergence(logits, expected))
    return total / max(predictions, 1)


@contextmanager
def _separate_weights(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[list[Tensor]]:
    """Inside, the weights of these layers alone have gradients, and a shared one has a gradient in each layer."""
    before = [(layer, layer.weight) for layer in layers.values()]
    with evaluation(model), preserve_trainability(model), torch.enable_grad():
        model.requires_grad_(False)
        try:
            for layer, weight in before:
                layer.weight = nn.Parameter(weight.detach())
            yield [layer.weight for layer, _ in before]
        finally:
            for layer, weight in before:
                layer.weight = weight


def _predicted(output: object, batch: Inputs) -> Tensor:
    """The logits as `(predictions, classes)` in fp32, without those of padded tokens."""
    logits, mask = logits_of(output), token_mask(batch)
    if mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape:
        logits = logits[mask]
    return logits.reshape(-1, logits.shape[-1]).float()


def _draw_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The negative log likelihood of labels drawn from these predictions; single values are means of unit normals."""
    if logits.shape[-1] == 1:
        noise = torch.randn(logits.shape, generator=generator, device=logits.device)
        return (logits * noise).sum()
    probabilities = logits.detach().softmax(-1)
    if not bool(torch.isfinite(probabilities).all()):
        raise EdgetuneError(
            "the outputs of the model are not finite on the calibration batches",
            action="look for NaN or infinity in the sample and the weights",
        )
    labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return F.cross_entropy(logits, labels, reduction="sum")
