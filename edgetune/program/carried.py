"""What an app needs beside a program, as data: how a picture or a text becomes its inputs, and what comes out means.

It stands in `model.json`; the tokenizer lies beside the program as a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from edgetune.core.errors import EdgetuneError
from edgetune.core.files import write_whole
from edgetune.program.beside import Record, sha256_of


class ImagePreprocessing(Record):
    """From a picture in a file to one fp32 tensor `(1, channels, size_px, size_px)`.

    In this order: turned upright as the file's orientation says, made `color`, cropped, resized, and each byte `x` of
    channel `c` becomes `(x * scale - mean[c]) / std[c]`. A grey picture fills every channel with the same values.
    """

    kind: Literal["image"] = "image"
    size_px: int  # width and height
    color: Literal["rgb", "grey"]
    crop: Literal["center", "none"]  # the largest square in the middle; "none": all of it, stretched to a square
    resize: Literal["bilinear"] = "bilinear"  # a triangle as wide as what one new pixel covers, as Pillow's BILINEAR
    rounded: bool  # to whole numbers after the resize, as where bytes are resized
    scale: float = 1.0
    mean: tuple[float, ...]  # one for each channel
    std: tuple[float, ...]
    layout: Literal["channels-first"] = "channels-first"


class WordPiece(Record):
    """A tokenizer of the BERT family: with the vocabulary of the tokenizer's file, all that an app has to know.

    The words are the text's runs of characters between blanks and around each punctuation mark; each becomes its
    longest pieces from the vocabulary, from the left, all but the first with `prefix` in front.
    """

    lowercase: bool
    strip_accents: bool
    clean: bool  # control characters go, every blank becomes a space
    chinese: bool  # each Chinese character is a word
    prefix: str
    longest_word: int  # characters; a longer one is unknown
    unknown_id: int
    before: tuple[int, ...]  # tokens put before the text's, which count for the length
    after: tuple[int, ...]


class TextPreprocessing(Record):
    """From a text to int64 `input_ids` and `attention_mask`, both `(1, tokens)`.

    `ending` is put behind the text, the tokenizer's own special tokens around it; what is longer than `max_length`
    tokens loses some at the side `cut`. What is shorter than the program's input is filled up on the right with
    `pad_id`, where the mask is 0; elsewhere it is 1.
    """

    kind: Literal["text"] = "text"
    tokenizer: str = ""  # file beside the program: tokenizer.json as Hugging Face's tokenizers write and read it
    sha256: str = ""  # of that file
    max_length: int
    cut: Literal["right", "left"] = "right"
    pad_id: int
    ending: str = ""
    wordpiece: WordPiece | None = None  # None: a tokenizer of another kind, which the file describes whole
    tokenizer_json: str = Field(default="", exclude=True, repr=False)  # until it is written beside a program


Preprocessing = Annotated[ImagePreprocessing | TextPreprocessing, Field(discriminator="kind")]


class ClassScores(Record):
    """From the logits `(1, classes)` to an answer."""

    scores: Literal["softmax"] = "softmax"  # of the logits: they add up to 1
    answer: Literal["argmax"] = "argmax"  # the place of the highest, which is the place of its name in `labels`


class ScaledValue(Record):
    """From the output `(1, 1)` to a number in the unit of the training data: `output * std + mean`."""

    same_within: ClassVar[float] = 0.05  # outputs, in standard deviations, that are the same prediction

    answer: Literal["value"] = "value"
    mean: float
    std: float


class TaggedWords(Record):
    """From the logits `(1, tokens, tags)` to the entities of a text.

    The text's words are the matches of `words`, each of which the tokenizer gets as a word of its own. A word's tag has
    the highest logit at its first token. `B-kind` begins an entity, and so does an `I-kind` that nothing of its kind
    stands before; any other `I-kind` goes on with it.
    """

    answer: Literal["entities"] = "entities"
    scheme: Literal["IOB2"] = "IOB2"
    words: str = r"\w+|[^\w\s]"  # a regular expression: words, and punctuation marks by themselves


Postprocessing = Annotated[ClassScores | ScaledValue | TaggedWords, Field(discriminator="answer")]


class Carried(Record):
    """What `model.json` says for the app. Empty: nobody said so."""

    model: str = ""  # what it was made from: "minilm"
    data: str = ""  # what it was trained on, or what named its classes
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


def write_beside(carried: Carried, path: Path) -> Carried:
    """Write the files that are carried beside the program at `path`; returns what goes into its manifest."""
    preprocessing = carried.preprocessing
    if not isinstance(preprocessing, TextPreprocessing):
        return carried
    if not preprocessing.tokenizer_json:
        raise EdgetuneError("the text's tokenizer is missing", action="make it with edgetune.program.carried")
    file = tokenizer_file(path)
    write_whole(file, preprocessing.tokenizer_json)
    changes = {"tokenizer": file.name, "sha256": sha256_of(preprocessing.tokenizer_json.encode()), "tokenizer_json": ""}
    return carried.model_copy(update={"preprocessing": preprocessing.model_copy(update=changes)})
