"""Convert a finished model without data: its own classes, and check inputs that are given or generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.inputs import Inputs, tensors_of
from edgetune.core.other_names import nearest_file
from edgetune.core.own_code import PREFIX, call_own
from edgetune.core.registry import require
from edgetune.models.labels import output_names
from edgetune.models.loaded import ModelSettings, explain_load_errors, import_class
from edgetune.models.own import module_of
from edgetune.run.exportable import Exportable

if TYPE_CHECKING:
    from edgetune.program.carried import Carried

MADE_UP = "the program was compared with the model on made-up inputs, because no data was given"
GIVEN = "the program was compared with the model on inputs that {source} gave"
TEXTS = (
    "Yes.", "No, thank you.", "The parcel came a day late, but nothing in it was broken.",
    "I would buy this again!", "Where is the nearest station?", "12.50 EUR for two coffees - really?",
    "It rained all weekend, so we stayed in, cooked, and watched three films in a row.",
    "Worst service ever; they never called back, never apologized, and kept the deposit.",
)  # fmt: skip
_IMAGES = 8
_GENERATOR_SEED = 0


def convert_model(source: str, inputs: str | None = None, weights: Path | None = None) -> Exportable:
    """The model that `hf:PATH`, `timm:NAME` or `py:file.py:build` names, ready to be lowered.

    Args:
        source: the model.
        inputs: `py:file.py:function`, which returns one input of the model (a tensor, a tuple or a dict, batch first)
            or a list of them, on which program and model are compared; by default they are generated, if the kind of
            model determines their shape.
        weights: a state dict for `py:` models, in a `.safetensors` or `.pt` file.
    """
    kind, _, argument = source.partition(":")
    if weights is not None and kind != "py":
        raise EdgetuneError("--weights only applies to py: models", got=str(weights), action="leave out")
    makers: dict[str, Callable[[str], ConvertedModel]] = {
        "hf": _hugging_face, "timm": _timm, "py": lambda argument: _build_own(argument, weights),
    }  # fmt: skip
    if kind not in makers:
        raise EdgetuneError(f"{source} needs data", action="pass --data, which provides the classes and the check rows")
    model, made_up, carried = makers[kind](argument)
    given = _read_inputs(inputs) if inputs else None
    if given is None and not made_up:
        raise EdgetuneError(
            f"the inputs of {source} are unknown",
            got=type(model).__name__,
            action="pass --inputs py:file.py:function, which returns one input or a list of inputs of the model",
        )
    rows = given or made_up
    note = GIVEN.format(source=inputs) if given else MADE_UP
    carried = carried.model_copy(update={"notes": (note, *carried.notes)})
    one_row = all(tensor.shape[:1] == (1,) for tensor in tensors_of(rows[0]))
    return Exportable(model.eval(), rows[0], rows if len(rows) > 1 else None, carried=carried, one_row=one_row)


ConvertedModel = tuple[nn.Module, Sequence[Inputs], "Carried"]


def _hugging_face(argument: str) -> ConvertedModel:
    """Any transformers model that takes tokens or images, as its config says."""
    transformers = require("transformers", f"the model hf:{argument}")
    with explain_load_errors(f"hf:{argument}", argument):
        config = transformers.AutoConfig.from_pretrained(argument)
        says = tuple(config.architectures or ())
        if not says:
            action = 'add "architectures" to its config.json, or build it with py:file.py:build'
            raise EdgetuneError(f"the config of hf:{argument} does not name the model", action=action)
        model = import_class(transformers, says[0]).from_pretrained(argument, dtype=torch.float32)
        takes = getattr(model, "main_input_name", "input_ids")
        if takes == "pixel_values" and not hasattr(config, "vocab_size"):
            return _convert_images(transformers, argument, model, config)
        if takes == "input_ids" and not getattr(config, "is_encoder_decoder", False):
            return _convert_texts(transformers, argument, model, config)
    from edgetune.program.carried import Carried

    return model, [], Carried(model=f"hf:{argument}")  # sound, or a text and what was written of its answer


def _convert_texts(transformers: Any, argument: str, model: nn.Module, config: Any) -> ConvertedModel:
    from edgetune.models.text import TextEncoder, set_padding_token

    tokenizer = transformers.AutoTokenizer.from_pretrained(argument)
    set_padding_token(argument, tokenizer, config)
    settings = ModelSettings(source=f"hf:{argument}")
    length = min(settings.max_length, getattr(config, "max_position_embeddings", None) or settings.max_length)
    encode = TextEncoder(tokenizer, length)
    rows = [encode([text], pad_to=length) for text in TEXTS]
    return model, rows, _describe_io(f"hf:{argument}", model, encode, config)


def _convert_images(transformers: Any, argument: str, model: nn.Module, config: Any) -> ConvertedModel:
    from edgetune.models.vision import ImageEncoder

    processor = transformers.AutoImageProcessor.from_pretrained(argument, use_fast=False)
    size = processor.size
    side = size.get("height") or size.get("shortest_edge") or config.image_size
    scale = 255.0 if getattr(processor, "do_rescale", True) else 1.0
    mean, deviation = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,), (1.0,))
    channels = getattr(config, "num_channels", 3)
    encode = ImageEncoder(side, _per_channel(mean, channels, scale), _per_channel(deviation, channels, scale))
    rows: list[Inputs] = [{"pixel_values": image} for image in _random_images(encode)]
    return model, rows, _describe_io(f"hf:{argument}", model, encode, config)


def _per_channel(values: Sequence[float], channels: int, scale: float) -> tuple[float, ...]:
    return tuple(scale * value for value in (values if len(values) == channels else [*values] * channels))


def _timm(argument: str) -> ConvertedModel:
    from edgetune.models.vision import ImageEncoder, import_timm

    timm = import_timm(argument)
    with explain_load_errors(f"timm:{argument}", f"timm/{argument}"):
        model = timm.create_model(argument, pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    encode = ImageEncoder(
        config["input_size"][1], _per_channel(config["mean"], 3, 255.0), _per_channel(config["std"], 3, 255.0)
    )
    return model, _random_images(encode), _describe_io(f"timm:{argument}", model, encode, None)


def _random_images(encode: Any) -> list[Tensor]:
    """Smooth random images, similar to photographs, in the model's input format."""
    generator = torch.Generator().manual_seed(_GENERATOR_SEED)
    small = torch.rand(_IMAGES, len(encode.mean), 8, 8, generator=generator)
    smooth = nn.functional.interpolate(small, size=(encode.image_px,) * 2, mode="bicubic").clamp(0, 1)
    images = (255 * smooth).round().to(torch.uint8).movedim(1, 3).numpy()
    return [encode(images[n : n + 1]) for n in range(_IMAGES)]


def _describe_io(source: str, model: nn.Module, encode: Any, config: Any) -> Carried:
    """The metadata that an app needs: preprocessing, and the model's own class names if it is a classifier."""
    from edgetune.data.dataset import Dataset
    from edgetune.data.rows import Rows
    from edgetune.models.loaded import LoadedModel
    from edgetune.models.metadata import describe_io
    from edgetune.tasks.causal_lm import CausalLM
    from edgetune.tasks.image_classification import ImageClassification
    from edgetune.tasks.task import Task
    from edgetune.tasks.text_classification import TextClassification

    kind = type(model).__name__
    labels: tuple[str, ...] = ()
    if config is None:
        pretrained = getattr(model, "pretrained_cfg", None) or {}
        count = int(getattr(model, "num_classes", 0))
        labels = tuple(pretrained.get("label_names") or (str(n) for n in range(count)))
    elif kind.endswith(("ForSequenceClassification", "ForImageClassification")) and config.problem_type in (
        None,
        "single_label_classification",
    ):
        labels = output_names(config)
    is_image = hasattr(encode, "image_px")
    task: type[Task] = ImageClassification if is_image else TextClassification if labels else CausalLM
    none = Rows([])
    described = describe_io(LoadedModel(source, model, encode), Dataset("", task(labels), none, none, none))
    if not labels:  # tokens, spans or vectors come out: nothing here says what they mean
        described = described.model_copy(update={"task": "", "postprocessing": None})
    return described


def _build_own(argument: str, weights: Path | None = None) -> ConvertedModel:
    from edgetune.program.carried import Carried

    source = f"{PREFIX}{argument}"
    model, _ = module_of(source, call_own(source))
    if weights is not None:
        load_weights(model, weights)
    example = getattr(model, "example_input_array", None)  # as Lightning calls it
    rows: list[Inputs] = [] if example is None else [example]
    return model, rows, Carried(model=source)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state dict of a `.safetensors` or `.pt` file into the model; every tensor must fit."""
    if not path.is_file():
        raise EdgetuneError(
            "no such file", got=str(path), near=nearest_file(path), action="give a .safetensors or .pt file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)  # a checkpoint of Lightning
        model.load_state_dict(state)
    except Exception as error:  # damaged files raise almost anything; load_state_dict lists what does not fit
        message = f"the weights do not fit the model: {' '.join(str(error).split())[:400]}"
        raise EdgetuneError(message, got=str(path), action="give the state dict of this module") from error


def _read_inputs(inputs: str) -> list[Inputs]:
    """The inputs that the user's function returned: one, or a list of them, of which the first is the example."""
    value = call_own(inputs)
    rows = list(value) if isinstance(value, list) else [value]
    for row in rows:
        flat = row.values() if isinstance(row, dict) else row if isinstance(row, tuple) else (row,)
        if not all(isinstance(each, Tensor) for each in flat):
            raise EdgetuneError(
                f"{inputs} does not return inputs for a model",
                got=type(row).__name__,
                action="return a tensor, a tuple or a dict of tensors, batch first, or a list of these",
                exit_code=Exit.USAGE,
            )
    if not rows:
        raise EdgetuneError(f"{inputs} returns an empty list", action="return at least one input of the model")
    return rows
