"""The rows that a command line names: texts, files of texts, images, folders of images, or lines of stdin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.core.other_names import nearest_file
from edgetune.data.dataset import data_error
from edgetune.data.settings import WholeData
from edgetune.data.vision import IMAGE_SUFFIXES

TABLES = {".csv": "csv", ".jsonl": "jsonl"}  # ending -> loader of the registry
FILES = (".txt", *TABLES)
STDIN = "-"


@dataclass(frozen=True)
class InputRow:
    """One row, and its source: empty if it was given directly."""

    row: str
    source: str = ""  # "rows.csv, row 3"


def read_rows(
    arguments: Sequence[str], texts: bool, stdin: TextIO, columns: Sequence[str] = ("text",)
) -> list[InputRow]:
    """Every row that the arguments name, in order.

    A text is one row; a `.txt` has a row per line, a `.csv` and a `.jsonl` one per record (of its
    fields `columns`), `-` the lines of stdin. Images are files, folders of them, or `-`: one path per line. Raises
    `EdgetuneError` (exit code 3) for a file that cannot be read completely: no row is left out.
    """
    rows: list[InputRow] = []
    for argument in arguments:
        if argument == STDIN:
            rows += _lines(stdin.read(), "stdin")
        elif texts:
            rows += _texts(argument, columns)
        else:
            rows += _images(Path(argument).expanduser())
    if not rows:
        raise EdgetuneError(
            "there are no rows to classify", got=list(arguments), action="give a text, an image or a file"
        )
    return rows


def _texts(argument: str, columns: Sequence[str]) -> list[InputRow]:
    if not argument.strip():
        raise data_error("the text is empty", got=argument, action="give a text, an image or a file")
    path, ending = Path(argument), Path(argument).suffix.lower()
    here = _exists(path)
    if not here and not (ending in FILES and len(argument.split()) == 1):  # "open a.txt" is a text, "a.txt" a file
        return [InputRow(argument)]
    if not here:
        raise data_error(
            "no such file",
            got=argument,
            near=nearest_file(path),
            action=f"give a text, or the path of a {', '.join(FILES)}",
        )
    if path.is_dir() or ending not in FILES:
        raise data_error(
            f"the program takes texts, which are not read from {'a folder' if path.is_dir() else 'such a file'}",
            got=argument,
            allowed=FILES,
            action=f"give one of these; if this is a text, pass it on stdin with {STDIN}",
        )
    if ending in TABLES:
        return _records(path, TABLES[ending], columns)
    try:
        return _lines(path.read_text(encoding="utf-8-sig"), path.name)
    except UnicodeDecodeError as error:
        raise data_error(f"{path} is not written in UTF-8", action="save it as UTF-8") from error


def _exists(path: Path) -> bool:
    """Whether it is a file or folder; a long text, or one with a zero byte, is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _lines(text: str, source: str) -> list[InputRow]:
    """A row for each line that is not blank, with its line number."""
    lines = enumerate(text.splitlines(), start=1)
    return [InputRow(line.strip(), f"{source}, line {number}") for number, line in lines if line.strip()]


def _records(path: Path, loader: str, columns: Sequence[str]) -> list[InputRow]:
    settings = WholeData(source=f"{loader}:{path}", text=tuple(columns), label=None, max_bad_rows_pct=0)
    try:
        dataset = registry.loader(registry.DATASETS, "data", settings.source)(settings)
    except EdgetuneError as error:
        error.action = error.action.replace("set data.text to the name of the column", "name the column with --column")
        error.action = error.action.replace(", or raise data.max_bad_rows_pct", "")
        raise
    return [InputRow(text, f"{path.name}, row {number}") for number, text in enumerate(dataset.test.inputs, start=1)]


def _images(path: Path) -> Iterable[InputRow]:
    if not path.is_dir():
        if path.suffix.lower() in FILES:
            message = "the program takes images: a file of rows is for texts"
            raise data_error(
                message, got=str(path), action="give images or folders; or paths on stdin, one per line, with -"
            )
        return [InputRow(str(path))]
    images = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not images:
        raise data_error(
            "the folder contains no images", got=str(path), allowed=IMAGE_SUFFIXES, action="give another folder"
        )
    return [InputRow(str(image)) for image in images]
