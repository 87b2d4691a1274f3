"""Finished models exported without data, and code of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import tensors_of
from edgetune.recipe import recipe
from edgetune.run import pipeline
from edgetune.run.exporting import export_from, load_exportable
from support.checkpoints import save_bert

NET = """
import torch
from torch import nn
from beside import WIDTH

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))

def inputs():
    return [torch.randn(1, 6) for _ in range(3)]

def nothing():
    return []

def text():
    return "a text"

def fails():
    return 1 / 0
"""
CLASSIFIER = """
import torch
from torch import nn

def build(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, len(classes)))

def splits():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(100 * n, 100 * n + 50, (16, 16, 3), dtype=torch.uint8, generator=generator).numpy(),
             ["dark", "light"][n]) for n in (0, 1) for _ in range(20)]
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text("WIDTH = 8\n", encoding="utf-8")
    (folder / "net.py").write_text(NET, encoding="utf-8")
    (folder / "broken.py").write_text("x = 1\nimport nowhere_to_be_had\n", encoding="utf-8")
    return folder / "net.py"


def test_a_module_of_ones_own_is_exported_with_its_own_inputs_and_weights(net: Path, tmp_path: Path) -> None:
    trained = load_exportable(f"py:{net}:build", inputs=f"py:{net}:inputs").model
    with torch.no_grad():
        trained[0].weight.fill_(0.5)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    artifact = export_from(
        f"py:{net}:build", tmp_path / "net.pte", inputs=f"py:{net}:inputs", weights=tmp_path / "trained.safetensors"
    )
    x = torch.randn(1, 6)
    torch.testing.assert_close(artifact.run(x)[0], trained(x))
    assert artifact.manifest.main.parity.rows == 3
    assert "net.py:inputs gave" in artifact.manifest.carried.notes[0]


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        ("build", None, "are unknown"),
        ("build", "nothing", "returns an empty list"),
        ("build", "text", "does not return inputs for a model: got 'str'"),
        ("built", "inputs", "defines no such function.*did you mean 'build'"),
        ("text", "inputs", "does not return a module: got 'str'"),
        ("fails", "inputs", r"net.py, line \d+: fails in net.py failed: ZeroDivisionError"),
    ],
)
def test_what_a_function_must_return(net: Path, function: str, inputs: str | None, message: str) -> None:
    with pytest.raises(EdgetuneError, match=message):
        load_exportable(f"py:{net}:{function}", inputs=inputs and f"py:{net}:{inputs}")


def test_a_file_that_cannot_be_run_is_named_with_the_line(net: Path) -> None:
    with pytest.raises(EdgetuneError, match=r"broken.py, line 2: broken.py cannot be run: ModuleNotFoundError"):
        load_exportable(f"py:{net.parent / 'broken.py'}:build")
    with pytest.raises(EdgetuneError, match="no such file"):
        load_exportable("py:nowhere.py:build")
    with pytest.raises(EdgetuneError, match="does not name a function in a file"):
        load_exportable("py:net.py")


def test_weights_that_do_not_fit_are_refused(net: Path, tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(EdgetuneError, match=r"the weights do not fit the model: .*0.bias"):
        load_exportable(f"py:{net}:build", inputs=f"py:{net}:inputs", weights=tmp_path / "other.safetensors")
    with pytest.raises(EdgetuneError, match="for models that are exported"):
        load_exportable("minilm", inputs=f"py:{net}:inputs")


def test_a_finished_classifier_keeps_its_classes_without_data(tmp_path: Path) -> None:
    names = {"id2label": {0: "neutral", 1: "bad", 2: "good"}, "label2id": {"neutral": 0, "bad": 1, "good": 2}}
    model = save_bert(tmp_path / "model", num_labels=3, **names)
    artifact = export_from(f"hf:{tmp_path / 'model'}", tmp_path / "model.pte")
    carried = artifact.manifest.carried
    assert carried.labels == ("neutral", "bad", "good")
    assert carried.task == "text-classification"
    assert "made-up inputs" in carried.notes[0]
    assert (tmp_path / "model.tokenizer.json").exists()
    example = load_exportable(f"hf:{tmp_path / 'model'}").example
    torch.testing.assert_close(artifact.run(example)[0], model(**example).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "outputs"), [("Model", 2), ("TokenClassification", 1)])
def test_a_model_that_chooses_no_class_of_a_text_claims_none(kind: str, outputs: int, tmp_path: Path) -> None:
    save_bert(tmp_path, kind)
    converted = load_exportable(f"hf:{tmp_path}")
    assert converted.carried.labels == ()
    assert converted.carried.postprocessing is None
    assert converted.carried.preprocessing is not None
    assert len(converted.model(**converted.example)) == outputs


def test_an_encoder_decoder_asks_for_its_inputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 10}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    source = f"hf:{tmp_path / 't5'}"
    with pytest.raises(
        EdgetuneError, match=r"the inputs of .* are unknown: got 'T5ForConditionalGeneration'"
    ) as caught:
        load_exportable(source)
    assert "--inputs" in caught.value.action
    ids = "torch.tensor([[3, 4, 5]])"
    (tmp_path / "own.py").write_text(
        f"import torch\ndef inputs():\n    return {{'input_ids': {ids}, 'decoder_input_ids': {ids}}}\n",
        encoding="utf-8",
    )
    converted = load_exportable(source, inputs=f"py:{tmp_path / 'own.py'}:inputs")
    assert set(converted.example) == {"input_ids", "decoder_input_ids"}
    assert converted.model(**converted.example).logits.shape == (1, 3, 10)


def test_a_vision_model_of_transformers_takes_made_up_pictures(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=16, patch_size=8, id2label={0: "cat", 1: "dog"}, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    transformers.ViTImageProcessor(**processor).save_pretrained(tmp_path)
    converted = load_exportable(f"hf:{tmp_path}")
    assert converted.carried.labels == ("cat", "dog")
    told: Any = converted.carried.preprocessing
    assert told.mean == pytest.approx((127.5, 102.0, 76.5))
    pixels = torch.cat([tensors_of(row)[0] for row in converted.check_inputs or ()])
    assert pixels.shape == (8, 3, 16, 16)
    assert pixels.std((0, 2, 3)).min() > 0.5, "pictures of one colour would prove nothing"


@pytest.fixture
def own_recipe(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mine.py").write_text(CLASSIFIER, encoding="utf-8")
    (tmp_path / "job" / "mine.yaml").write_text(
        "model: {source: 'py:mine.py:build', image_px: 16}\ndata: 'py:mine.py:splits'\n"
        "steps: [{train: {epochs: 1, batch_size: 8}}]\n",
        encoding="utf-8",
    )
    return tmp_path / "job" / "mine.yaml"


def test_a_recipe_runs_code_beside_it_from_any_folder(own_recipe: Path, tmp_path: Path) -> None:
    run = pipeline.run(own_recipe, out=tmp_path / "run")
    assert [row.step for row in run.ledger.rows] == ["load", "train"]
    assert run.ledger.rows[0].quality.rows == 6
    assert recipe.load(run.folder / "recipe.yaml").model.source == f"py:{own_recipe.parent / 'mine.py'}:build"
    own_recipe.with_name("mine.py").write_text(CLASSIFIER + "\n# changed\n", encoding="utf-8")
    with pytest.raises(EdgetuneError, match="nothing of this run can be reused"):
        pipeline.run(own_recipe, out=tmp_path / "run", resume=True)
