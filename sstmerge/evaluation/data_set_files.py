"""Rows of a data set, from the hub or from files on this machine, in the formats that repositories really use."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sstmerge.errors import DataError
from sstmerge.prompt_files import Row, either, hub_rows, numbered_rows
from sstmerge.untrusted import parse_json

LINES = (".txt", ".all", ".train", ".dev", ".test")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *LINES)


@dataclass(frozen=True)
class Source:
    """Where the rows of a data set are, and what their columns are called.

    Attributes:
        fields: Our names ("prompt", "response", "label", or a placeholder of a task's template) to the column's.
        splits: Our split names to the hub's, or to file names; a file name may hold "|" between several known names.
        hub_id: Data set on the hub; None for files.
        config: Its configuration.
        revision: Its branch on the hub; None for the main one.
        where: Columns and the value that a row must have there.
        columns: Names of the columns of a .csv or .tsv file without a header, or of lines ("label", "text").
        member: Name of the list of rows in a .json file that holds an object.
        encoding: Encoding of a file.
        labels: Raw labels to the label words of a classification task.
        label_files: File names, like those of `splits`, of files that hold the label of each line of the split's file; these
            two are found in a folder only.
        repository: GitHub repository ("owner/name") that has the files.
    """

    fields: Mapping[str, str]
    splits: Mapping[str, str]
    hub_id: str | None = None
    config: str | None = None
    revision: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    member: str | None = None
    encoding: str = "utf-8-sig"
    labels: Mapping[str, str] = field(default_factory=dict)
    label_files: Mapping[str, str] = field(default_factory=dict)
    repository: str = ""

    @property
    def advice(self) -> str:
        """Where to get the files, in words."""
        place = f"it is in https://github.com/{self.repository}, " if self.repository else ""
        return f"{place}docs/EVALUATION.md has all sources"

    def is_in(self, data: Path) -> bool:
        """Whether `data` is a file, or a folder that holds the file of a split."""
        return data.is_file() or any(_held(data, names) for names in self.splits.values())


def choose_source(name: str, *, hub: Source | None, local: Source, data: Path | None, missing_from_hub: bool) -> Source:
    """Decide whether a data set is read from the hub or from files.

    Args:
        name: Its name, for messages.
        hub: The data set on the hub; None where it is not there.
        local: The data set as files.
        data: A file, or a folder; None for the hub.
        missing_from_hub: Whether what a folder does not hold comes from the hub.

    Returns:
        The source.

    Raises:
        DataError: If the hub is asked for what it does not have.
    """
    if data is not None:
        # A folder that does not exist is a mistake to be told, not an empty one.
        from_hub = missing_from_hub and hub is not None and data.exists() and not local.is_in(data)
        if not from_hub:
            return local
    if hub is None:
        raise DataError(f"The data set '{name}' is not on the hub; give its file: {local.advice}.")
    return hub


def source_rows(source: Source, split: str, *, name: str, data: Path | None) -> Iterator[tuple[str, Row]]:
    """Read the rows of one split.

    Args:
        source: Where they are.
        split: One of the source's splits.
        name: Name of the data set, for messages.
        data: A file, or a folder that holds the source's file at any depth (a folder only, where labels are in files of
            their own); a source on the hub needs none.

    Yields:
        Where a row is from (as "strongreject.csv, row 3"), and the row with our field names, texts stripped.

    Raises:
        DataError: If the split, the file or a column is not there, or a row is not readable.
    """
    if split not in source.splits:
        raise DataError(f"The data set '{name}' has no split '{split}'; choose one of {sorted(source.splits)}.")
    if source.hub_id is not None:
        origin, rows = source.hub_id, _hub_rows(source, source.hub_id, source.splits[split], name)
    elif data is None:
        raise DataError(f"The data set '{name}' is not on the hub; give its file: {source.advice}.")
    else:
        if source.label_files and data.is_file():
            raise DataError(
                f"The texts and the labels of '{name}' are in two files, but '{data}' is one; give the folder that holds "
                f"both: {source.advice}."
            )
        path = _find(data, source, source.splits[split], name)
        origin, rows = path.name, _file_rows(path, source)
        if source.label_files:
            labels = _find(data, source, source.label_files[split], name)
            rows = _labelled_lines(path, labels, source.encoding)
    for number, row in rows:
        where = f"{origin}, row {number}"
        if all(str(row.get(column, "")) == value for column, value in source.where.items()):
            yield where, _renamed(row, source, where)


def _renamed(row: Row, source: Source, where: str) -> Row:
    missing = [column for column in source.fields.values() if column not in row]
    if missing:
        raise DataError(f"{where} has no column {either_or(missing)}; its columns are {sorted(map(str, row))}.")
    return {
        name: row[column].strip() if isinstance(row[column], str) else row[column]
        for name, column in source.fields.items()
    }


def either_or(words: list[str]) -> str:
    """Return one word, or several as "a, b or c"."""
    return words[0] if len(words) == 1 else either(words)


def _find(data: Path, source: Source, known_names: str, data_set: str) -> Path:
    if data.is_file():
        return data
    names = known_names.split("|")
    if not data.is_dir():
        raise DataError(
            f"'{data}' does not exist; give a file of '{data_set}' or a folder that holds {either_or(names)}."
        )
    found = _held(data, known_names)
    if not found:
        raise DataError(
            f"The folder '{data}' holds no file {either_or(names)} of the data set '{data_set}': {source.advice}."
        )
    if len(found) > 1:
        raise DataError(
            f"The folder '{data}' holds several files of '{data_set}': {either(sorted(map(str, found)))}; name one."
        )
    return found[0]


def _held(folder: Path, known_names: str) -> list[Path]:
    return sorted(path for name in known_names.split("|") for path in folder.rglob(name))


# ---- hub -----------------------------------------------------------------------------------------------------------


def _hub_rows(source: Source, hub_id: str, split: str, name: str) -> Iterator[tuple[int, Row]]:
    failure = f"The data set '{name}' cannot be loaded as {hub_id}"
    return hub_rows(hub_id, split, failure=failure, config=source.config, revision=source.revision)


# ---- files ---------------------------------------------------------------------------------------------------------


def _file_rows(path: Path, source: Source) -> Iterator[tuple[int, Row]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".parquet") or (suffix == ".csv" and not source.columns):
        yield from numbered_rows(str(path), None)[1]
        return
    if suffix not in SUFFIXES:
        raise DataError(f"{path.name} is no data set file: expected a {either(SUFFIXES)} file.")
    text = _read(path, source.encoding)
    if suffix == ".json":
        yield from enumerate(_json_rows(text, path.name, source.member), start=1)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(text, path.name, source.columns)
    else:
        yield from _line_rows(text, source.columns or ("prompt",))


def _read(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not {encoding} text ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _labelled_lines(texts: Path, labels: Path, encoding: str) -> Iterator[tuple[int, Row]]:
    """Yield the lines of a file with the lines of the file of their labels."""
    lines, marks = (_read(path, encoding).removesuffix("\n").split("\n") for path in (texts, labels))
    if len(lines) != len(marks):
        raise DataError(
            f"{texts.name} has {len(lines)} lines, but {labels.name} has {len(marks)} labels: files of two versions."
        )
    for number, (text, label) in enumerate(zip(lines, marks, strict=True), start=1):
        yield number, {"text": text, "label": label.strip()}


def _json_rows(text: str, name: str, member: str | None) -> Iterator[Row]:
    """Yield the rows of a list of objects or of texts."""
    content = parse_json(text, name, DataError)
    if member is not None:
        if not isinstance(content, dict) or member not in content:
            raise DataError(f'{name} must hold an object with a list "{member}", got {_kind(content)}.')
        content = content[member]
    if not isinstance(content, list):
        raise DataError(f"{name} must hold a list of rows or of texts, got {_kind(content)}.")
    for row in content:
        if not isinstance(row, dict | str):
            raise DataError(f"{name}: a row must be an object or a text, got {type(row).__name__}.")
        yield {"prompt": row} if isinstance(row, str) else row


def _kind(content: Any) -> str:
    return f"an object with {sorted(content)}" if isinstance(content, dict) else type(content).__name__


def _table_rows(text: str, name: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    # Tab-separated files quote nothing; a lone quotation mark is a quotation mark.
    tabs = name.lower().endswith(".tsv")
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    # Blank rows are left out after parsing: a blank line inside a quoted cell belongs to its text.
    rows = (cells for cells in csv.reader(io.StringIO(text), **style) if any(map(str.strip, cells)))
    try:
        header: Sequence[str] = columns or next(rows, [])
        for number, cells in enumerate(rows, start=1):
            yield number, dict(zip(header, cells, strict=False))  # a cell that is not there has no column
    except csv.Error as error:
        raise DataError(f"{name} is not a readable {'TSV' if tabs else 'CSV'} file: {error}.") from error


def _line_rows(text: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    # Not splitlines(): these files hold other characters that it takes for ends of lines. Some hold labels without a text.
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.split(maxsplit=len(columns) - 1)
        if len(cells) == len(columns):
            yield number, dict(zip(columns, cells, strict=True))
