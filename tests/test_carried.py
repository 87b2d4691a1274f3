"""What a program carries: an app that has nothing but the files beside it gets the model's answers from raw rows."""

from __future__ import annotations

import json
import shutil
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
from edgetune.export import Artifact
from edgetune.export.kit.linux.sample import Preparation
from edgetune.models.loaded import LoadedModel, ModelSettings
from edgetune.models.metadata import describe_io
from edgetune.models.preprocessing import text_preprocessing
from edgetune.models.text import minilm
from edgetune.models.vision import ImageEncoder, effnet_lite0
from edgetune.program.card import format_card
from edgetune.program.carried import Carried, ImagePreprocessing, TextPreprocessing, write_tokenizer
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification
from support.manifests import stored
from support.programs import (
    HARD_TEXTS,
    SAMPLE,
    TOKENS,
    Small,
    bert_tokenizer,
    check_sample,
    export_small,
    run_sample,
    save_photographs,
    small_vision,
)

with silence_libraries():  # libraries that these load warn on import
    from PIL import Image
    from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]


def test_texts_get_the_models_answers_from_what_lies_beside_the_program(text_program: Small, tmp_path: Path) -> None:
    loaded, dataset, artifact = text_program
    files = {file.name for file in artifact.path.parent.iterdir()}
    assert files == {"model.pte", "model.json", "model.tokenizer.json", "model.md"}
    shutil.copytree(artifact.path.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sample.py").write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    texts = [*map(str, dataset.test.inputs), *HARD_TEXTS]
    found = run_sample(tmp_path, texts)
    inputs = loaded.encode(texts, TOKENS)
    assert isinstance(inputs, dict)
    for name, tensor in inputs.items():
        assert [row["inputs"][name][0] for row in found["rows"]] == tensor.tolist()
    check_sample(found, loaded.model, inputs, dataset.classes)
    assert len({row["answer"][0][0] for row in found["rows"]}) > 1, "the rows must tell apart"
    assert found["heavy"] == []
    assert artifact.manifest.carried is not None
    assert artifact.manifest.carried == Artifact.load(artifact.path).manifest.carried


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A program for pictures of an array, as Fashion-MNIST's."""
    data = fashion_mnist("", DataSettings(source="fashion-mnist", test_rows=12, train_rows=200, validation_rows=8))
    loaded, dataset = small_vision(data.test.inputs, ("a", "b", "c"))
    return loaded, dataset, export_small(loaded, dataset, tmp_path_factory.mktemp("greys"))


def test_pictures_of_an_array_get_the_models_answers_from_files(greys: Small, tmp_path: Path) -> None:
    """Resized as floats, as in training; pictures in files of all kinds are test_kit's, resized as bytes."""
    loaded, dataset, artifact = greys
    folder = artifact.path.parent
    (folder / "sample.py").write_bytes(SAMPLE.read_bytes())
    paths = []
    for number, picture in enumerate(np.asarray(dataset.test.inputs)):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture).save(paths[-1])
    found = run_sample(folder, [str(path) for path in paths])
    wanted = loaded.encode(dataset.test.inputs)
    assert isinstance(wanted, Tensor)
    got = torch.cat([torch.tensor(row["inputs"]["input_0"]) for row in found["rows"]])
    assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()
    check_sample(found, loaded.model, wanted, dataset.classes)
    known = artifact.manifest.carried
    assert known is not None
    told = known.preprocessing
    assert isinstance(told, ImagePreprocessing)
    assert (told.color, told.crop, told.rounded) == ("grey", "center", False)


@pytest.mark.parametrize("kind", ["files", "array"])
def test_colours_become_grey_for_a_model_with_one_channel(kind: str, tmp_path: Path) -> None:
    """In training, in the program's manifest and in the kit's sample alike."""
    paths: list[Any] = save_photographs(tmp_path)
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
    manifest = stored(tmp_path, "model", describe_io(loaded, dataset)).manifest.model_dump(mode="json")
    preparation = Preparation(manifest, tmp_path)
    got = torch.cat([tensor for path in paths for tensor in preparation.inputs(str(path)).values()])
    assert torch.allclose(got, wanted, atol=1e-4), (got - wanted).abs().max()


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_images_of_more_than_8_bits_are_refused_not_made_white(
    kind: str, picture_program: Small, tmp_path: Path
) -> None:
    path = tmp_path / "dark" / "deep.tif"
    path.parent.mkdir()
    Image.fromarray(np.full((8, 8), 30_000, dtype=kind)).save(path)
    for read in (
        lambda: ImageEncoder(8, (127.0,), (128.0,))([path]),
        lambda: from_imagefolder(str(tmp_path), DataSettings(source="x")),
    ):
        with pytest.raises(EdgetuneError, match="bits per channel, but only 8 are supported"):
            read()
    manifest = picture_program[2].manifest.model_dump(mode="json")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
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


def test_the_card_says_what_is_known_and_no_more(greys: Small) -> None:
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
