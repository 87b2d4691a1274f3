"""Tables of the user's own: CSV, JSON lines, and data sets of the Hugging Face hub or its `datasets` library."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edgetune.core.hub import hub_for
from edgetune.core.other_names import SUFFIXES, nearest, nearest_file
from edgetune.core.quiet import quiet
from edgetune.core.registry import require
from edgetune.data.chat import ANSWERING, read_messages, split_key
from edgetune.data.columns import LABELS, TEXTS, likely_column
from edgetune.data.dataset import (
    NOT_UTF8,
    BadRows,
    Dataset,
    assemble,
    classes_of,
    data_error,
    split_indices,
    split_rows,
)
from edgetune.data.labels import check_labels, is_missing
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.task import Task
from edgetune.tasks.text_classification import TextClassification

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")

_PACKED = {  # how a file begins that is no table as it stands, and what to do with it
    b"PK\x03\x04": "it is an Excel workbook or a zip archive: save the table as CSV in UTF-8",
    b"\x1f\x8b": "unpack it: it is compressed by gzip",
    b"PAR1": "it is a Parquet file: write it as CSV or JSON lines",
}

Record = tuple[Any, str]  # text or conversation, label
Reader = Callable[[Path, DataSettings, BadRows], "tuple[list[Record], int]"]  # the rows, and how many there are


def from_csv(argument: str, settings: DataSettings) -> Dataset:
    """A table with a header in UTF-8, its columns apart by comma, semicolon or tab.

    The columns are `settings.text` and `settings.label`; rows are split by what they hold, never by their order.
    """
    return _from_files(argument, "csv", settings, _read_csv)


def _read_csv(path: Path, settings: DataSettings, bad: BadRows) -> tuple[list[Record], int]:
    text = _decoded(path)
    header, delimiter = _header(text, path, settings)
    columns = [header.index(name) for name in _wanted(settings)]
    records: list[Record] = []
    total = 0
    for row, cells in _csv_rows(text, delimiter, path, bad):
        total += 1
        if isinstance(cells, str):
            bad.add(f"row {row}", cells)
        elif len(cells) != len(header):
            bad.add(f"row {row}", f"{len(cells)} columns where the header has {len(header)}")
        else:
            _keep(records, bad, f"row {row}", [cells[c] for c in columns], settings)
    return records, total


def from_jsonl(argument: str, settings: DataSettings) -> Dataset:
    """One JSON object a line, in UTF-8, with the fields `settings.text` and `settings.label`."""
    return _from_files(argument, "jsonl", settings, _read_jsonl)


def _read_jsonl(path: Path, settings: DataSettings, bad: BadRows) -> tuple[list[Record], int]:
    records: list[Record] = []
    fields: set[str] = set()
    wanted = _wanted(settings)
    total, text = 0, _decoded(path)
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
            _keep(records, bad, f"row {row}", [value[name] for name in wanted], settings)
    if fields:
        _check_columns(path.name, sorted(fields), settings)
    return records, total


def _from_files(argument: str, kind: str, settings: DataSettings, read: Reader) -> Dataset:
    """The training rows of one file, and the test rows of another where `settings.test_file` names one."""
    path, bad = _existing(argument, kind), BadRows(settings.max_bad_rows_pct)
    test = None if settings.test_file is None else _existing(settings.test_file, kind)
    records, total = read(path, settings, bad)
    if test is None:
        return _finish(path.name, records, bad, total, settings)
    held_out, others = read(test, settings, bad)
    return _finish(path.name, records, bad, total + others, settings, {"test": held_out})


def _wanted(settings: DataSettings) -> list[str]:
    """The columns that are read: those of the text, then the label's."""
    return [*settings.text_columns, *([settings.label] if settings.label is not None else [])]


def from_hub(argument: str, settings: DataSettings) -> Dataset:
    """A data set of texts by its id on the Hugging Face hub, or a folder on this disk; `id:name` picks a configuration.

    Its own test and validation splits are used where it has them with labels; else they are cut from the training
    rows.
    """
    return from_splits(argument, _load_hub(argument), settings)


def from_splits(name: str, tables: dict[str, Any], settings: DataSettings) -> Dataset:
    """The same from tables of the `datasets` library that are already loaded, by the names of their splits."""
    bad = BadRows(settings.max_bad_rows_pct)
    found: dict[str, list[Record]] = {}
    total = 0
    for split, table in tables.items():
        part = "validation" if split in _VALIDATION_NAMES else split
        if part not in ("train", "validation", "test"):
            continue
        _check_columns(f"{name}, split {split}", table.column_names, settings)
        names = _class_names(table, settings)
        columns = [list(table[name]) for name in settings.text_columns]
        texts = list(zip(*columns, strict=True))
        labels = list(table[settings.label]) if settings.label is not None else [None] * len(texts)
        if part == "test" and names is not None and set(labels) <= {-1, None}:
            continue  # the labels of this test set are withheld
        total += len(texts)
        records = found.setdefault(part, [])
        for row, (parts, label) in enumerate(zip(texts, labels, strict=True), start=1):
            if names is not None and isinstance(label, int):
                label = names[label] if 0 <= label < len(names) else None
            _keep(records, bad, f"{split}, row {row}", [*parts, label][: len(_wanted(settings))], settings)
    if "train" not in found:
        raise data_error(f"{name} has no split called train", got=", ".join(tables))
    return _finish(name, found.pop("train"), bad, total, settings, found)


def _existing(argument: str, kind: str) -> Path:
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


def _decoded(path: Path) -> str:
    """The file as text; bytes that are no UTF-8 stay as lone surrogates, so that the row that holds them is known."""
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
    found = []
    for delimiter in ",;\t":
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise data_error(f"{path.name} has no readable header ({error})") from error
        found.append(([name.strip() for name in cells], delimiter))
    header, delimiter = max(found, key=lambda item: sum(name in item[0] for name in _wanted(settings)))
    _check_columns(path.name, header, settings)
    return header, delimiter


def _check_columns(name: str, columns: Sequence[str], settings: DataSettings) -> None:
    given = "text" if settings.messages is None else "messages"
    for option, wanted in (*((given, name) for name in settings.text_columns), ("label", settings.label)):
        if wanted is None or columns.count(wanted) == 1:
            continue
        if wanted in columns:
            raise data_error(f"{name} has two columns of the same name", got=wanted, action="rename one of them")
        near = nearest(wanted, columns) or likely_column(columns, LABELS if option == "label" else TEXTS)
        action = f"set data.{option} to the name of the column"
        if len(columns) == 1 and "|" in columns[0]:
            near, action = "", "put a comma, a semicolon or a tab between the columns"
        elif not near and not name.endswith(".jsonl"):
            action += "; the first line must contain the names"
        raise data_error(
            f"{name} has no column for the {option}", got=wanted, allowed=columns, near=near, action=action
        )


def _csv_rows(text: str, delimiter: str, path: Path, bad: BadRows) -> Iterator[tuple[int, list[str] | str]]:
    """Each row after the header with the line it begins on, counted from 1; a string says why it cannot be read."""
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


def _keep(records: list[Record], bad: BadRows, place: str, values: Sequence[Any], settings: DataSettings) -> None:
    """Add one row to `records`, or say in `bad` why it cannot be used."""
    if settings.messages is not None:
        _keep_conversation(records, bad, place, values, settings)
        return
    *texts, label = values if settings.label is not None else (*values, "")
    other = next((text for text in texts if not isinstance(text, str)), None)
    if other is not None:
        bad.add(place, f"the text is {type(other).__name__}, not a string")
        return
    text = "\n".join(part for part in texts if part.strip()) if len(texts) > 1 else texts[0]
    if not text.strip():
        bad.add(place, "empty text")
    elif isinstance(label, float) and not math.isnan(label):
        bad.add(place, "the label is a number with a fraction, not a class (regression is not supported)")
    elif not isinstance(label, (str, int)) and not is_missing(label):
        bad.add(place, f"the label is a {type(label).__name__}, not one class")
    elif settings.label is not None and not str(label).strip():
        bad.add(place, "empty label")
    elif (
        settings.label is not None and is_missing(str(label)) and str(label).strip() not in (settings.label_names or {})
    ):
        bad.add(place, f"the label is missing: {label}")
    elif _undecoded(text) or _undecoded(str(label)):
        bad.add(place, NOT_UTF8)
    elif "\0" in text:
        bad.add(place, "a zero byte")
    else:
        records.append((text, _named(str(label).strip(), settings)))


def _undecoded(text: str) -> bool:
    """Whether bytes that are not UTF-8 are in a text, as the lone surrogates that `_decoded` makes of them."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _keep_conversation(
    records: list[Record], bad: BadRows, place: str, values: Sequence[Any], settings: DataSettings
) -> None:
    messages = values[0]
    if not isinstance(settings.messages, str):
        messages = [{"role": role, "content": each} for role, each in zip(("user", ANSWERING), values, strict=True)]
    try:
        conversation = read_messages(messages, settings.loss_on == "answers")
    except ValueError as error:
        bad.add(place, str(error))
        return
    if any(_undecoded(content) for _, content in conversation.messages):
        bad.add(place, NOT_UTF8)
    else:
        records.append((conversation, ""))


def _named(label: str, settings: DataSettings) -> str:
    """What `settings.label_names` calls a label; raises for one that it leaves out."""
    names = settings.label_names
    if names is None or settings.label is None:
        return label
    if label not in names:
        raise data_error(
            "data.label_names lacks a label of the table",
            got=label,
            allowed=sorted(names),
            action=f"add it, as in {{{label}: its name}}",
        )
    return names[label]


def _finish(
    name: str,
    train: list[Record],
    bad: BadRows,
    total: int,
    settings: DataSettings,
    others: dict[str, list[Record]] | None = None,
) -> Dataset:
    """The data set of the rows that were read; parts that are not given are cut from the training rows."""
    others = others or {}
    notes = bad.notes(total, name)
    if settings.label:
        labels = [label for part in (train, *others.values()) for _, label in part]
        notes = (*notes, *check_labels(name, settings.label, labels))
    classes = classes_of([label for part in (train, *others.values()) for _, label in part]) if settings.label else ()
    number = {label: n for n, label in enumerate(classes)}

    def rows(records: Iterable[Record]) -> Rows:
        records = list(records)
        return Rows([text for text, _ in records], [number[label] for _, label in records] if settings.label else None)

    if not train:
        raise data_error(f"{name} contains no rows")
    keys = [split_key(row) for row, _ in train]
    given = rows(train)
    copies = len(keys) - len(set(keys))
    if copies and settings.messages is not None:
        notes = (*notes, f"{copies:,} conversations start like another one; these are put into the same split")
    elif copies:
        notes = (*notes, f"{copies:,} texts are copies of others; copies are put into the same split")
    task: Task = TextClassification(classes) if settings.label else CausalLM()
    if not others:
        return assemble(name, task, split_rows(keys, given, settings), settings, notes)
    lacking = tuple(part for part in ("test", "validation") if part not in others)
    cut = split_indices(keys, given.classes, settings, lacking)
    parts = dict(zip(lacking, (given.subset(part) for part in cut[1:]), strict=True))
    parts.update({part: rows(records) for part, records in others.items()})
    train_texts = {text for text, _ in train}
    shared = sum(text in train_texts for text, _ in others.get("test", ()))
    if shared:
        kind = "texts" if settings.messages is None else "conversations"
        notes = (*notes, f"{shared:,} test {kind} are also among the training rows")
    return assemble(name, task, (given.subset(cut[0]), parts["validation"], parts["test"]), settings, notes)


def _load_hub(argument: str) -> dict[str, Any]:
    if not argument:
        raise data_error("hf: needs a data set id or a folder", action="write source: hf:owner/name")
    datasets = require("datasets", "a data set of the Hugging Face hub")
    folder = Path(argument).expanduser()
    name, _, configuration = (argument, "", "") if folder.exists() else argument.partition(":")
    with quiet(), hub_for(argument) as silence:
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
    if settings.label is None:
        return None
    names: list[str] | None = getattr(table.features[settings.label], "names", None)
    return names
