"""One model with one seed, tuned by each method of adapter_methods.py and measured; see bench_adapters.py."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import quant_models
import torch
from adapter_methods import FULL, LORA, PRETRAINED_CLASSES, PRETRAINING, SHERL, TASKS, VIT, Method, methods_of
from method_rows import Row, file_name
from safetensors.torch import save
from torch import Tensor, nn

from edgetune.adapt.files import WEIGHTS, save_adapter
from edgetune.core.apply import apply, finalize
from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs, call, logits_of
from edgetune.core.peft_layers import is_tuner
from edgetune.core.registry import DATASETS, MODELS, loader, technique_class
from edgetune.core.technique import Technique
from edgetune.data.dataset import Dataset, Split
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.lean.saved import saved_bytes
from edgetune.models.loaded import LoadedModel, ModelSettings
from edgetune.run.measures import count_macs
from edgetune.run.samples import Samples
from edgetune.tasks.quality import logits_for, quality
from edgetune.train import optimizer as optimizers
from edgetune.train.loop import seed_everything, train, trainable_parameters
from edgetune.train.settings import Train

ROUNDS = 7  # timed steps of each method, after two more
DRAWS = 3  # in which what is saved for backward is measured: a supernet saves another amount with each path
OTHER_ROWS = 1000  # added to the seed after a search, so that the training goes on with other rows
FACTOR, MOST_RATES = 3.0, 5  # between the learning rates that are tried, and of them


class Tuner:
    """A model and its data; trained anew for each method."""

    def __init__(self, name: str, seed: int) -> None:
        torch.set_num_threads(1)
        self.task, self.seed, self.rates_file = TASKS[name], seed, VIT.parent / f"{file_name(name)}-rates.json"
        self.methods = methods_of(self.task)
        if "image_px" in self.task.model and not VIT.exists():
            pretrain_vit(DataSettings(**self.task.data), self.task.model["image_px"])
        self.dataset: Dataset = loader(DATASETS, "data", self.task.data["source"])(DataSettings(**self.task.data))
        if self.task.classes is not None:
            self.dataset = only(self.dataset, self.task.classes)
        self.encode = self.load().encode
        parts = self.dataset.parts
        self.train_split, self.validation_split, self.test_split = (
            Split(self.dataset.task, rows, self.encode) for rows in (parts.train, parts.validation, parts.test)
        )
        self.samples = Samples(self.train_split, self.test_split, self.max_length, self.task.batch_size)
        rows = range(self.task.batch_size)
        self.batch = self.train_split.batch(rows, pad_to=self.train_split.pad_to(self.max_length))

    @property
    def max_length(self) -> int:
        """Tokens of a text."""
        return ModelSettings(**self.task.model).max_length

    def row(self, method: str) -> Row:
        """The quality with this seed; with the first one also what the method costs."""
        begun = time.process_time()
        rates = self.rates(method)
        rate = min(rates, key=rates.__getitem__)
        model = self.tune(method, rate, self.task.updates)
        row: Row = {"rate": rate, "rates": {f"{r:.3g}": loss for r, loss in rates.items() if math.isfinite(loss)}}
        if not self.seed:
            row |= self.size(model) | self.cost(method)
            if self.task.deeper is not None and method in (LORA, SHERL):
                row["deeper_saved_mib"] = self.saved_on_deeper(method)
        model = finalize(model)
        row["quality"] = quality(model, self.test_split).value
        if not self.seed:
            row |= {"same_program": graph_of(model, self.samples.example()) == self.base.graph}
            row |= {"macs": count_macs(model, self.samples.example()) / self.base.macs}
        return {**row, "cpu_s": time.process_time() - begun}

    # Training

    def load(self) -> LoadedModel:
        """The pretrained model, with a head drawn with the seed."""
        seed_everything(self.seed)
        settings = ModelSettings(**self.task.model)
        loaded: LoadedModel = loader(MODELS, "model", settings.source)(settings, self.dataset)
        return loaded

    def adapted(self, method: str) -> nn.Module:
        """The model as a method trains it."""
        return self.adapt(self.load().model.requires_grad_(method == FULL), self.methods[method])

    def adapt(self, model: nn.Module, method: Method) -> nn.Module:
        """A model with a method's techniques on it, and its head trainable."""
        model = apply(model, [*map(technique, method.steps)], self.samples.sample(self.loss))
        model.get_submodule(self.task.head).requires_grad_(True)
        return model

    def tune(self, method: str, rate: float, updates: int) -> nn.Module:
        """The trained model. Where there is a search, half of the updates come before it and half after."""
        model, search = self.adapted(method), self.methods[method].search
        first = updates // 2 if search else updates
        self.train(model, self.settings(method, rate, first), self.seed)
        if search:
            model = apply(model, technique(search), self.samples.sample(self.loss))
            self.train(model, self.settings(method, rate, updates - first), self.seed + OTHER_ROWS)
        return model

    def train(self, model: nn.Module, settings: Train, seed: int) -> None:
        """Train on rows in the order of a seed."""
        train(model, settings, self.train_split, self.loss, seed=seed)

    def settings(self, method: str, rate: float, updates: int) -> Train:
        """The settings of a training."""
        own = self.methods[method].train
        return Train(updates=updates, batch_size=self.task.batch_size, learning_rate=rate, **own)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The task's loss."""
        return self.dataset.task.loss(logits, labels)

    # The learning rate

    def rates(self, method: str) -> dict[float, float]:
        """The learning rates that were tried and their losses on validation rows, from the file if they are in it."""
        stored = json.loads(self.rates_file.read_text()) if self.rates_file.exists() else {}
        if method not in stored:
            stored[method] = list(self.try_rates(method).items())
            self.rates_file.parent.mkdir(parents=True, exist_ok=True)
            self.rates_file.write_text(json.dumps(stored, indent=1) + "\n")
        return dict(stored[method])

    def try_rates(self, method: str) -> dict[float, float]:
        """Three rates, and further ones while the best is the outermost, each with half the updates."""
        middle = self.methods[method].rate
        losses: dict[int, float] = {}
        wanted = [0, -1, 1]
        while wanted:
            step = wanted.pop(0)
            losses[step] = self.validation_loss(method, middle * FACTOR**step)
            best = min(losses, key=losses.__getitem__)
            if not wanted and len(losses) < MOST_RATES and best in (min(losses), max(losses)):
                wanted = [best - 1 if best == min(losses) else best + 1]
        return {middle * FACTOR**step: loss for step, loss in losses.items()}

    def validation_loss(self, method: str, rate: float) -> float:
        """The loss on validation rows after half the updates; infinite if the training diverged."""
        try:
            model = self.tune(method, rate, self.task.updates // 2)
            logits = logits_for(model, self.validation_split)
        except EdgetuneError as error:
            if "not finite" not in str(error) and "loss is" not in str(error):
                raise
            return math.inf
        return float(self.loss(logits, torch.tensor(self.validation_split.rows.labels)))

    # What it costs

    def size(self, model: nn.Module) -> Row:
        """How much of the trained model is its own."""
        head = sum(p.numel() for p in model.get_submodule(self.task.head).parameters())
        trainable = sum(p.numel() for p in trainable_parameters(model))
        return {"trainable": trainable - head, "head": head, "file_kib": file_bytes(model) / 1024}

    def cost(self, method: str) -> Row:
        """Bytes saved for backward, and the time of a step beside full fine-tuning's, taken in turn."""
        model = self.adapted(method)
        full, own = self.stepper(FULL, self.adapted(FULL)), self.stepper(method, model)
        ratios = [own() / full() for _ in range(ROUNDS + 2)][2:]
        return {"saved_mib": self.saved_mib(model), "step_ratio": statistics.median(ratios)}

    def saved_mib(self, model: nn.Module) -> float:
        """What the training forward of a batch saves for backward, the most of some draws."""
        inputs, labels = self.batch
        saved = []
        for draw in range(DRAWS):
            torch.manual_seed(draw)
            saved.append(saved_bytes(model, inputs, lambda output: self.loss(logits_of(output), labels)))
        return max(saved) / 2**20

    def saved_on_deeper(self, method: str) -> float:
        """The same on a model of more blocks, with random weights."""
        assert self.task.deeper is not None
        model, changes = self.task.deeper()
        same = methods_of(replace(self.task, **changes))[method]
        return self.saved_mib(self.adapt(model.requires_grad_(False), same))

    def stepper(self, method: str, model: nn.Module) -> Any:
        """A function that takes a training step, and returns its seconds."""
        settings, inputs = self.settings(method, 1e-5, 1), self.batch
        parameters = trainable_parameters(model)
        optimizer = optimizers.build(settings, parameters, optimizers.faster_parameters(settings, model))
        model.train()

        def step() -> float:
            begun = time.perf_counter()
            self.loss(logits_of(call(model, inputs[0])), inputs[1]).backward()
            optimizers.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - begun

        return step

    @cached_property
    def base(self) -> Base:
        """What the untuned model computes."""
        model, inputs = self.load().model, self.samples.example()
        return Base(graph_of(model, inputs), count_macs(model, inputs))


@dataclass(frozen=True)
class Base:
    """A forward of the untuned model: operators with their shapes, and multiply-accumulates."""

    graph: list[tuple[str, str]]
    macs: int


def technique(step: Mapping[str, Any]) -> Technique:
    """A step of a recipe."""
    ((name, settings),) = step.items()
    return technique_class(name)(**settings)


def only(dataset: Dataset, classes: range) -> Dataset:
    """The rows of some classes."""

    def rows_of(rows: Rows) -> Rows:
        return rows.subset([n for n, label in enumerate(rows.labels or ()) if label in classes])

    train_rows, validation, test = map(rows_of, dataset.parts)
    return replace(dataset, train=train_rows, validation=validation, test=test)


def pretrain_vit(settings: DataSettings, image_px: int) -> None:
    """Train ViT-tiny on the classes that it is not tuned to, once for all seeds."""
    dataset = only(loader(DATASETS, "data", settings.source)(settings), PRETRAINED_CLASSES)
    seed_everything(0)
    model_settings = ModelSettings(source=f"{quant_models.HERE}:vit_tiny", image_px=image_px)
    loaded: LoadedModel = loader(MODELS, "model", model_settings.source)(model_settings, dataset)
    split = Split(dataset.task, dataset.train, loaded.encode)
    train(loaded.model, Train(**PRETRAINING), split, dataset.task.loss, seed=0)
    VIT.parent.mkdir(parents=True, exist_ok=True)
    torch.save(loaded.model.state_dict(), VIT)


def file_bytes(model: nn.Module) -> int:
    """The size of what must be kept beside the base: peft's file, or for other methods the trained tensors."""
    if not any(map(is_tuner, model.modules())):
        return len(save({n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}))
    with tempfile.TemporaryDirectory() as folder:
        return (save_adapter(model, Path(folder)) / WEIGHTS).stat().st_size


def graph_of(model: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """Every operator and tensor of the captured model, with its shape."""
    positional = () if isinstance(inputs, dict) else (inputs,) if isinstance(inputs, Tensor) else inputs
    named = inputs if isinstance(inputs, dict) else {}
    program = torch.export.export(model.eval().requires_grad_(False), positional, named, strict=False)
    return [(str(n.target), str(getattr(n.meta.get("val"), "shape", ""))) for n in program.graph.nodes]
