"""The user's own tables: CSV, JSON lines, CoNLL, and data sets of the Hugging Face hub or its `datasets` library."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.hub import check_hub
from edgetune.core.other_names import SUFFIXES, nearest, nearest_file
from edgetune.core.quiet import silence_libraries
from edgetune.core.registry import require
from edgetune.data.columns import LABELS, TEXTS, likely_column
from edgetune.data.dataset import BadRows, Dataset, data_error
from edgetune.data.records import Record, add_record, build_dataset
from edgetune.data.settings import DataSettings

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")

_PACKED = {  # first bytes of files that are not text, with the advice
    b"PK\x03\x04": "it is an Excel workbook or a zip archive: save the table as CSV in UTF-8",
    b"\x1f\x8b": "unpack it: it is compressed by gzip",
    b"PAR1": "it is a Parquet file: write it as CSV or JSON lines",
}

Reader = Callable[[Path, DataSettings, BadRows], "tuple[list[Record], int]"]  # the rows, and how many there are


def from_csv(argument: str, settings: DataSettings) -> Dataset:
    """A UTF-8 table with a header, separated by commas, semicolons or tabs.

    The settings name the columns; rows are split by their contents, not by their order.
    """
    return _from_files(argument, "csv", settings, _read_csv)


def _read_csv(path: Path, settings: DataSettings, bad: BadRows) -> tuple[list[Record], int]:
    text = _decode(path)
    header, delimiter = _header(text, path, settings)
    columns = [header.index(name) for name in settings.columns]
    records: list[Record] = []
    total = 0
    for row, cells in _csv_rows(text, delimiter, path):
        total += 1
        if isinstance(cells, str):
            bad.add(f"row {row}", cells)
        elif len(cells) != len(header):
            bad.add(f"row {row}", f"{len(cells)} columns where the header has {len(header)}")
        else:
            add_record(records, bad, f"row {row}", [cells[c] for c in columns], settings)
    return records, total


def from_jsonl(argument: str, settings: DataSettings) -> Dataset:
    """One JSON object per line, in UTF-8, with the fields that the settings name."""
    return _from_files(argument, "jsonl", settings, _read_jsonl)


def _read_jsonl(path: Path, settings: DataSettings, bad: BadRows) -> tuple[list[Record], int]:
    records: list[Record] = []
    fields: set[str] = set()
    wanted = settings.columns
    total, text = 0, _decode(path)
    if text.lstrip().startswith("["):
        action = 'write one object per line; pandas: to_json(path, orient="records", lines=True)'
        raise data_error(f"{path.name} is one JSON list, not one object per line", action=action)
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        total += 1
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.add(f"row {row}", f"no JSON ({error})" if isinstance(error, ValueError) else "JSON nested too deeply")
            continue
        if not isinstance(value, dict):
            bad.add(f"row {row}", "no JSON object")
            continue
        fields.update(value)
        missing = [name for name in wanted if name not in value]
        if missing:
            bad.add(f"row {row}", f"no field {missing[0]!r}")
        else:
            add_record(records, bad, f"row {row}", [value[name] for name in wanted], settings)
    if fields:
        _check_columns(path.name, sorted(fields), settings)
    return records, total


def from_conll(argument: str, settings: DataSettings) -> Dataset:
    """One word and its tag per line, separated by spaces or tabs, as in CoNLL shared tasks; an empty line ends a text.

    The first column is the word, the last one its tag; lines that begin with -DOCSTART- are skipped.
    """
    return _from_files(argument, "conll", settings, read_conll)


def read_conll(path: Path, settings: DataSettings, bad: BadRows) -> tuple[list[Record], int]:
    """The texts of a CoNLL file, and their number."""
    records: list[Record] = []
    total, lines = 0, [*_decode(path).split("\n"), ""]
    words: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if cells and cells[0] != "-DOCSTART-":
            words.append(cells)
        elif words:
            total, place = total + 1, f"text on line {number - len(words)}"
            lonely = next((cells[0] for cells in words if len(cells) < 2), None)
            if lonely is None:
                add_record(
                    records, bad, place, ([cells[0] for cells in words], [cells[-1] for cells in words]), settings
                )
            else:
                bad.add(place, f"the word {lonely!r} has no tag")
            words = []
    return records, total


def _from_files(argument: str, kind: str, settings: DataSettings, read: Reader) -> Dataset:
    """The training rows of one file, and the test rows of `settings.test_file` if it is set."""
    path, bad = _existing_file(argument, kind), BadRows(settings.max_bad_rows_pct)
    test = None if settings.test_file is None else _existing_file(settings.test_file, kind)
    records, total = read(path, settings, bad)
    if test is None:
        return build_dataset(path.name, records, bad, total, settings)
    held_out, others = read(test, settings, bad)
    return build_dataset(path.name, records, bad, total + others, settings, {"test": held_out})


def from_hub(argument: str, settings: DataSettings) -> Dataset:
    """A data set of texts by its id on the Hugging Face hub, or a local folder; `id:name` selects a configuration.

    Its own test and validation splits are used if they have labels; else they are split off the training rows.
    """
    return from_splits(argument, _load_hub(argument), settings)


def from_splits(name: str, tables: dict[str, Any], settings: DataSettings) -> Dataset:
    """The same from loaded tables of the `datasets` library, by the names of their splits."""
    bad = BadRows(settings.max_bad_rows_pct)
    parts: dict[str, list[Record]] = {}
    total = 0
    for split, table in tables.items():
        part = "validation" if split in _VALIDATION_NAMES else split
        if part not in ("train", "validation", "test"):
            continue
        _check_columns(f"{name}, split {split}", table.column_names, settings)
        names = _class_names(table, settings)
        values = [list(table[name]) for name in settings.columns]
        if part == "test" and names is not None and settings.label and set(values[-1]) <= {-1, None}:
            continue  # the labels of this test set are withheld
        total += len(table)
        records = parts.setdefault(part, [])
        for row, cells in enumerate(zip(*values, strict=True), start=1):
            if names is not None:
                cells = (*cells[:-1], _name_label(cells[-1], names))
            add_record(records, bad, f"{split}, row {row}", cells, settings)
    if "train" not in parts:
        raise data_error(f"{name} has no split called train", got=", ".join(tables))
    return build_dataset(name, parts.pop("train"), bad, total, settings, parts)


def _existing_file(argument: str, kind: str) -> Path:
    if not argument:
        raise data_error(f"{kind} needs a path", action=f"write source: {kind}:path/to/file")
    path = Path(argument).expanduser()
    written = SUFFIXES.get(path.suffix.lower(), kind)
    if written != kind:
        raise data_error(
            f"{kind} does not read {path.suffix} files", got=f"{kind}:{argument}", near=f"{written}:{argument}"
        )
    if not path.is_file():
        raise data_error(
            f"the file {path} does not exist" if not path.exists() else f"{path} is not a file",
            got=path.name,
            near=nearest_file(path),
            action="paths in a recipe are relative to the recipe, on the command line relative to the current folder",
        )
    return path


def _decode(path: Path) -> str:
    """The file as text; bytes that are not UTF-8 stay as lone surrogates, to identify their row."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise data_error(f"{path.name} is written in UTF-16", action="save it as UTF-8")
    if not content.strip():
        raise data_error(f"{path.name} is empty", action="give a file with rows")
    packed = next((action for magic, action in _PACKED.items() if content.startswith(magic)), "")
    if packed or b"\0" in content[:4096]:
        raise data_error(f"{path.name} is not a text file", action=packed or "save it as text, in UTF-8")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _header(text: str, path: Path, settings: DataSettings) -> tuple[list[str], str]:
    if text.lstrip().startswith(("{", "[")):
        raise data_error(
            f"{path.name} is JSON, not a table", action="write one object per line, and jsonl: instead of csv:"
        )
    candidates = []
    for delimiter in ",;\t":
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise data_error(f"{path.name} has no readable header ({error})") from error
        candidates.append(([name.strip() for name in cells], delimiter))
    header, delimiter = max(candidates, key=lambda item: sum(name in item[0] for name in settings.columns))
    _check_columns(path.name, header, settings)
    return header, delimiter


def _check_columns(name: str, columns: Sequence[str], settings: DataSettings) -> None:
    for option, wanted in settings.columns_by_setting:
        if columns.count(wanted) == 1:
            continue
        if wanted in columns:
            raise data_error(f"{name} has two columns of the same name", got=wanted, action="rename one of them")
        near = nearest(wanted, columns) or likely_column(columns, TEXTS if option in ("text", "messages") else LABELS)
        action = f"set data.{option} to the name of the column"
        if len(columns) == 1 and "|" in columns[0]:
            near, action = "", "put a comma, a semicolon or a tab between the columns"
        elif not near and not name.endswith(".jsonl"):
            action += "; the first line must contain the names"
        raise data_error(
            f"{name} has no column for the {option}", got=wanted, allowed=columns, near=near, action=action
        )


def _csv_rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Each row after the header with its first line, counted from 1; a string is the reason why it cannot be read."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    next(reader)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise data_error(
                    f"{path.name}: a quoted field in the row that starts on line {begins} is never closed",
                    action="close the quote, or double it if it is part of the text",
                ) from error
            yield begins, str(error)
            continue
        if cells:
            yield begins, cells


def _load_hub(argument: str) -> dict[str, Any]:
    if not argument:
        raise data_error("hf: needs a data set id or a folder", action="write source: hf:owner/name")
    datasets = require("datasets", "a data set of the Hugging Face hub")
    folder = Path(argument).expanduser()
    name, _, configuration = (argument, "", "") if folder.exists() else argument.partition(":")
    with silence_libraries(), check_hub(argument) as silence:
        try:
            if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
                loaded = datasets.load_from_disk(str(folder))
            else:
                loaded = datasets.load_dataset(str(folder) if folder.exists() else name, configuration or None)
        except (OSError, ValueError) as error:
            why = f"it is not on this disk, and the Hugging Face hub does not respond ({silence})" if silence else error
            action = "check the id and the network, or give the path of a local folder"
            raise data_error(f"the data set {argument} could not be loaded: {why}", action=action) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _class_names(table: Any, settings: DataSettings) -> list[str] | None:
    """The names of the numbers in the column of labels or tags, if the table has them."""
    column = settings.label or settings.tags
    feature = table.features[column] if column is not None else None
    names: list[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _name_label(value: Any, names: list[str]) -> Any:
    """A number, or each number of a list, replaced by its name; `None` if it has none."""
    if isinstance(value, list):
        return [_name_label(each, names) for each in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
