"""What no side path can hold, or does not fit the base, is refused by its name, before a program is lowered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.export import export, pipeline
from edgetune.export.side_paths import SidePaths, multiply_given
from edgetune.run.exporting import export_from, parse_adapters
from support import laws
from support.adapters import WEIGHTS, change, save_lora

QUERY = "bert__encoder__layer__0__attention__self__query"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(laws.bert(), tmp_path_factory.mktemp("sound") / "en", ["query"], seed=0)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asserts that an export with adapters is refused, that nothing was lowered, and that nothing is left."""

    def lower(*_: Any, **__: Any) -> None:
        raise AssertionError("lowered before the adapters were checked")

    monkeypatch.setattr(pipeline, "lower", lower)

    def check(message: str, adapters: Any, model: nn.Module | None = None, **settings: Any) -> None:
        place = tmp_path / "programs" / "model.pte"
        inputs = laws.tokens()
        with pytest.raises(EdgetuneError, match=message):
            export(laws.bert() if model is None else model, inputs, place, adapters=adapters, **settings)
        assert not place.parent.exists() or not list(place.parent.iterdir())

    return check


def test_an_adapter_of_another_base(refused: Callable[..., None], sound: Path) -> None:
    message = r"adapter en \(.*\): the adapter is for another base, which has a layer that this one lacks"
    refused(message, {"en": sound}, laws.llama())
    one_layer = r"got 'bert.encoder.layer.1.attention.self.query'"
    refused(one_layer, {"en": sound}, laws.bert(layers=1))


def test_matrices_of_other_shapes(refused: Callable[..., None], sound: Path, tmp_path: Path) -> None:
    wide = change(sound, tmp_path / "wide", **{f"{QUERY}__lora_A__weight": torch.zeros(4, 48)})
    refused(r"query: the adapter's matrices do not fit the layer: got \[\(4, 48\), \(32, 4\)\]", {"en": wide})
    single = change(sound, tmp_path / "single", **{f"{QUERY}__lora_B__weight": None})
    refused("query has only one of its two matrices", {"en": single})


def test_a_rank_above_the_width(refused: Callable[..., None], sound: Path, tmp_path: Path) -> None:
    ends = {"A": torch.zeros(40, 32), "B": torch.zeros(32, 40)}
    tensors: dict[str, Tensor | None] = {f"{QUERY}__lora_{end}__weight": tensor for end, tensor in ends.items()}
    refused(
        "query: the rank is above the layer's width.*got 40; allowed: at most 32",
        {"en": change(sound, tmp_path / "r", **tensors)},
    )


def test_values_that_are_not_finite(refused: Callable[..., None], sound: Path, tmp_path: Path) -> None:
    name = f"base_model__model__{QUERY}__lora_B__weight"
    values = load_file(sound / WEIGHTS)[name.replace("__", ".")]
    values[0, 0] = float("nan")
    refused("query: lora_B has values that are NaN", {"en": change(sound, tmp_path / "nan", **{name: values})})


def test_a_pickle(refused: Callable[..., None], sound: Path, tmp_path: Path) -> None:
    pickled = change(sound, tmp_path / "pickled")
    (pickled / WEIGHTS).unlink()
    (pickled / "adapter_model.bin").write_bytes(b"never read")
    refused(r"(?s)its weights are pickled, in adapter_model\.bin.*save it anew", {"en": pickled})
    refused("the folder holds no adapter_config.json", {"en": tmp_path})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"peft_type": "ADALORA"},
            "no adapter of this family runs beside a base.*got 'ADALORA'; allowed: LORA, ADAMSS",
        ),
        ({"modules_to_save": ["classifier"]}, "layers that were trained whole.*classifier"),
        ({"init_lora_weights": "pissa_niter_4"}, "began by changing the weights of its base"),
        ({"bias": "all"}, "also trained biases"),
        ({"lora_bias": True}, "more than LoRA.*lora_bias"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_side_path_holds(
    refused: Callable[..., None], sound: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    refused(f"(?s){message}", {"en": change(sound, tmp_path / "other", config)})


def test_layers_that_are_not_linear(refused: Callable[..., None], tmp_path: Path) -> None:
    folder = save_lora(laws.bert(), tmp_path / "words", ["word_embeddings"], seed=0)
    refused("an adapter on an embedding is no product with its input", {"en": folder})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    refused("0 is no linear layer", {"en": save_lora(model, tmp_path / "conv", ["0"], seed=0, rank=2)}, model)


def test_names_and_forms(refused: Callable[..., None], sound: Path) -> None:
    for name in ("", "a/b", "..", ".hidden", "two words"):
        refused("becomes part of its file's name", {name: sound})
    refused("but for upper and lower case", {"en": sound, "EN": sound})
    refused("there are no adapters", {})
    refused(
        "adapters are inputs of the program, .*got 'input'; allowed: inputs, files, methods",
        {"en": sound},
        form="input",
    )


def test_a_layer_whose_weight_is_read_without_calling_it() -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    paths = SidePaths(("out_proj",), multiply_given)
    x = torch.randn(1, 3, 32)
    with paths.attached(model), paths.holding((torch.zeros(1, 32, 2), torch.zeros(1, 2, 32))), torch.no_grad():
        model(x, x, x)
    with pytest.raises(EdgetuneError, match=r"out_proj: the model does not call this layer"):
        paths.check_used()
    assert not model.out_proj._forward_hooks
    assert not list(model.out_proj.children()), "the model is left as it was"


def test_adapters_of_the_command_line(tmp_path: Path) -> None:
    for asked in (["one", "two"], ["en=one", "en=two"], ["en="]):
        with pytest.raises(EdgetuneError, match="several adapters need a name each"):
            parse_adapters(asked)
    (tmp_path / "a=b").mkdir()
    assert parse_adapters([str(tmp_path / "a=b")]) == tmp_path / "a=b"
    with pytest.raises(EdgetuneError, match="--form is for adapters with a name"):
        export_from("hf:nothing", tmp_path / "model.pte", adapters=tmp_path, form="files")
