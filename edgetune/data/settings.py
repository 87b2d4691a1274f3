"""The settings of a recipe's `data` section."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from edgetune.core.technique import Settings

COLUMNS = ("messages", "text", "label", "target", "tags", "label_names")  # settings that name the columns of a table
_FIXED = ("tweets", "tweet-entities", "word-sentiment", "conversations", "fashion-mnist", "imagefolder")
_CONLL = {"text": "tokens", "label": None, "tags": "tags"}  # what the columns of such a file are
_UNREAD = {  # settings that do not apply to a kind of source
    "hf": ("test_file",),
    "conll": ("messages", "text", "label", "target", "tags", "loss_on"),
    "py": (*COLUMNS, "test_file"),
    **dict.fromkeys(_FIXED, (*COLUMNS, "test_file", "loss_on")),
}


def unread_by(source: str) -> tuple[str, ...]:
    """The settings that do not apply to this kind of source."""
    return _UNREAD.get(source.partition(":")[0], ())


class DataSettings(Settings):
    """The source of the data and how it is split. The split does not depend on the seed."""

    whole: ClassVar[bool] = False

    source: str
    """Data that come with edgetune (`tweets`, `word-sentiment`, `tweet-entities`, `conversations`, `fashion-mnist`), a
    file or folder of your own (`csv:FILE`, `jsonl:FILE`, `conll:FILE`, `imagefolder:FOLDER`), `hf:OWNER/NAME` from the
    Hugging Face hub, or `py:FILE.py:FUNCTION`, a function that returns the rows. Paths are relative to the recipe."""
    text: str | tuple[str, ...] = "text"
    """Column with the text, or a list of columns whose texts are joined with line breaks. Tables only."""
    label: str | None = "label"
    """Column with the class; `null`: no classes, the texts train a language model. Tables only."""
    target: str | None = None
    """Column with a number that the model predicts; the column `label` is not used. Tables only."""
    tags: str | None = None
    """Column with a tag for each word: `O`, `B-kind` or `I-kind`. `text` is then the column with the words, `tokens` by
    default. Both contain lists, or texts separated by spaces. Tables only."""
    messages: str | tuple[str, str] | None = None
    """Column with a conversation, as a list of `{role, content}`, or two columns with a question and its answer.
    The model's chat template turns them into text; the columns `text` and `label` are not used. Tables only."""
    loss_on: Literal["answers", "all"] = "answers"
    """Which tokens of a conversation count in the loss and the perplexity. `messages` only."""
    label_names: dict[str, str] | None = None
    """Names of the labels, as in `{"0": bad, "1": good}`; labels with the same name become one class.
    Tables only."""
    test_file: str | None = None
    """A separate file with the test rows, in the same format as the training rows. `csv` and `jsonl` only."""
    augment: tuple[Literal["flip", "crop", "colour"], ...] = ()
    """Random changes to the training images: mirror them, shift them by up to an eighth of their width, make them
    brighter or darker. Images only."""
    test_pct: float = Field(default=15.0, gt=0, lt=100)
    """Percentage of the rows held out for testing, if the data has no test set."""
    validation_pct: float = Field(default=10.0, gt=0, lt=100)
    """Percentage of the rows held out for validation, if the data has no validation set."""
    train_rows: int | None = Field(default=None, gt=0)
    """Use only this many training rows, always the same ones; `null`: all."""
    validation_rows: int | None = Field(default=None, gt=0)
    """Use only this many validation rows; `null`: all."""
    test_rows: int | None = Field(default=None, gt=0)
    """Use only this many test rows; `null`: all."""
    max_bad_rows_pct: float = Field(default=1.0, ge=0, le=100)
    """Stop if more than this percentage of the rows cannot be read; otherwise they are skipped and reported."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that form a text, or a conversation."""
        columns = self.text if self.messages is None else self.messages
        return (columns,) if isinstance(columns, str) else columns

    @property
    def columns_by_setting(self) -> tuple[tuple[str, str], ...]:
        """The columns to read, in order, each with the setting that names it."""
        text = "text" if self.messages is None else "messages"
        labels = (("label", self.label), ("target", self.target), ("tags", self.tags))
        return (
            *((text, column) for column in self.text_columns),
            *((setting, column) for setting, column in labels if column is not None),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read: those of the text, then the label's."""
        return tuple(column for _, column in self.columns_by_setting)

    @model_validator(mode="before")
    @classmethod
    def _default_label(cls, given: Any) -> Any:
        """Conversations, numbers and tags have no classes, so `label` need not be set to `null`."""
        if not isinstance(given, dict):
            return given
        if str(given.get("source", "")).partition(":")[0] == "conll":
            given = {**_CONLL, **given}
        if given.get("tags") is not None:
            given = {"text": "tokens", **given}
        others = (given.get(name) for name in ("messages", "target", "tags"))
        return {"label": None, **given} if any(other is not None for other in others) else given

    @model_validator(mode="after")
    def _consistent(self) -> DataSettings:
        kind = self.source.partition(":")[0]
        for name in unread_by(self.source):
            fixed = _CONLL.get(name) if kind == "conll" and name in _CONLL else type(self).model_fields[name].default
            if getattr(self, name) != fixed:
                raise ValueError(f"{kind} does not read {name}: leave it out")
        if self.messages is None and kind != "py" and self.loss_on != "answers":
            raise ValueError("loss_on is for conversations: set messages to their column")
        if self.messages is not None and (self.label is not None or self.text != "text"):
            raise ValueError("messages replaces text and label: leave these out")
        given = [name for name in ("label", "target", "tags", "messages") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are for different tasks: give one of them")
        if self.tags is not None and len(self.text_columns) > 1:
            raise ValueError("tags need one column of words: set text to it")
        return self

    @field_validator("label_names", mode="before")
    @classmethod
    def _stringify_labels(cls, given: Any) -> Any:
        """`{0: bad}` means the label that a table writes as 0."""
        return {str(key): value for key, value in given.items()} if isinstance(given, dict) else given


class WholeData(DataSettings):
    """The settings of data that is only evaluated: nothing is held out for training, so a few rows are enough."""

    whole: ClassVar[bool] = True
