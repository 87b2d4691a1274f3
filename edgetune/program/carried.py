"""What an app needs besides the program, as data: how an image or a text becomes its inputs, and what its outputs mean.

It is part of `model.json`; the tokenizer is a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_atomically
from edgetune.program.program_files import Record, sha256_of


class ImagePreprocessing(Record):
    """From an image file to one fp32 tensor `(1, channels, size_px, size_px)`.

    In this order: rotate as the file's orientation says, convert to `color`, crop, resize, and turn each byte `x` of
    channel `c` into `(x * scale - mean[c]) / std[c]`. A greyscale image has the same values in every channel.
    """

    kind: Literal["image"] = "image"
    size_px: int  # width and height
    color: Literal["rgb", "grey"]
    crop: Literal["center", "none"]  # the largest central square; "none": the whole image, stretched to a square
    resize: Literal["bilinear"] = "bilinear"  # antialiased, as Pillow's BILINEAR
    rounded: bool  # to integers after the resize, as when bytes are resized
    scale: float = 1.0
    mean: tuple[float, ...]  # one for each channel
    std: tuple[float, ...]
    layout: Literal["channels-first"] = "channels-first"


class WordPiece(Record):
    """A tokenizer of the BERT family: all that an app needs, apart from the vocabulary in the tokenizer's file.

    A text is split at whitespace and around each punctuation mark; each word becomes its longest pieces from the
    vocabulary, from the left, all but the first preceded by `prefix`.
    """

    lowercase: bool
    strip_accents: bool
    clean: bool  # remove control characters, and turn all whitespace into spaces
    chinese: bool  # each Chinese character is a word
    prefix: str
    longest_word: int  # characters; a longer one is unknown
    unknown_id: int
    before: tuple[int, ...]  # tokens put before those of the text; they count for the length
    after: tuple[int, ...]


class TextPreprocessing(Record):
    """From a text to int64 `input_ids` and `attention_mask`, both `(1, tokens)`.

    `ending` is appended to the text, and the tokenizer adds its special tokens. More than `max_length` tokens are
    truncated on the side `cut`; fewer than the program's input are padded on the right with `pad_id` and mask 0.
    """

    kind: Literal["text"] = "text"
    tokenizer: str = ""  # file next to the program, a tokenizer.json of Hugging Face's tokenizers
    sha256: str = ""  # of that file
    max_length: int
    cut: Literal["right", "left"] = "right"
    pad_id: int
    ending: str = ""
    wordpiece: WordPiece | None = None  # None: a tokenizer of another kind, described by its file alone
    tokenizer_json: str = Field(default="", exclude=True, repr=False)  # until it is written next to a program


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class ClassScores(Record):
    """From the logits `(1, classes)` to an answer."""

    scores: Literal["softmax"] = "softmax"  # of the logits: they add up to 1
    answer: Literal["argmax"] = "argmax"  # index of the highest, and of its name in `labels`


class ScaledValue(Record):
    """From the output `(1, 1)` to a number in the unit of the training data: `output * std + mean`."""

    same_within: ClassVar[float] = 0.05  # outputs, in standard deviations, that are the same prediction

    answer: Literal["value"] = "value"
    mean: float
    std: float


class TaggedWords(Record):
    """From the logits `(1, tokens, tags)` to the entities of a text.

    The words are the matches of `words`, which the tokenizer gets as separate words. A word's tag has the highest logit
    at its first token. `B-kind` begins an entity, and so does an `I-kind` that follows no word of its kind; any other
    `I-kind` continues one.
    """

    answer: Literal["entities"] = "entities"
    scheme: Literal["IOB2"] = "IOB2"
    words: str = r"\w+|[^\w\s]"  # a regular expression: words and single punctuation marks


Postprocessing = Annotated[ClassScores | ScaledValue | TaggedWords, Field(discriminator="answer")]


class Carried(Record):
    """Metadata for an app in `model.json`. Empty fields: unknown."""

    model: str = ""  # what it was made from: "minilm"
    data: str = ""  # the training data, or where the class names are from
    task: str = ""
    recipe: str = ""
    licence: str = ""  # of the pretrained weights, as their package says
    preprocessing: Preprocessing | None = None
    postprocessing: Postprocessing | None = None
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def tokenizer_file(path: Path) -> Path:
    """`model.tokenizer.json` for `model.pte`."""
    return path.with_name(f"{path.stem}.tokenizer.json")


def write_tokenizer(carried: Carried, path: Path) -> Carried:
    """Write the tokenizer next to the program at `path`. Returns the metadata for its manifest."""
    preprocessing = carried.preprocessing
    if not isinstance(preprocessing, TextPreprocessing):
        return carried
    if not preprocessing.tokenizer_json:
        raise EdgetuneError("the text's tokenizer is missing", action="make it with edgetune.program.carried")
    file = tokenizer_file(path)
    write_atomically(file, preprocessing.tokenizer_json)
    changes = {"tokenizer": file.name, "sha256": sha256_of(preprocessing.tokenizer_json.encode()), "tokenizer_json": ""}
    return carried.model_copy(update={"preprocessing": preprocessing.model_copy(update=changes)})
