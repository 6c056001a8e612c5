"""Texts of files that hold more than their text: JSON lines, JSON, CSV and Parquet, and HTML."""

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from thunderhead import extras
from thunderhead.corpus.text_files import MAX_RECORD_BYTES, is_readable, lines, named_errors, refuse_long

Record = tuple[str, str | None]
"""Where a record stands (":12"), and its text; None if it is null."""
Fault = Callable[[str], None]
"""Is told what is wrong with one record, and raises or not."""
_MAX_JSON_BYTES = 1 << 30  # a .json file is read whole


def json_lines(texts: Iterable[str], field: str, where: str, fault: Fault) -> Iterator[Record]:
    """An object in each line."""
    for number, line in enumerate(lines(texts, where), start=1):
        if not line.strip():
            continue
        try:
            if not is_readable(line):  # only where that was not refused before
                raise ValueError(f"{where}, line {number}: not text")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}, line {number}: not JSON ({error})") from None
            text = text_of(record, field, f"{where}, line {number}")
        except ValueError as error:
            fault(str(error))
        else:
            yield f":{number}", text


def whole_json(texts: Iterable[str], field: str, where: str, fault: Fault) -> Iterator[Record]:
    """A list of objects, or objects one after the other."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        if (size := size + len(text)) > _MAX_JSON_BYTES:
            raise ValueError(
                f"{where}: more than {_MAX_JSON_BYTES >> 30} GiB of JSON in one: make it .jsonl, a record a line"
            )
    content, place, number, decoder = "".join(parts), 0, 0, json.JSONDecoder()
    if not is_readable(content):
        fault(f"{where}: not text")
        return
    while place < len(content):
        if content[place].isspace():
            place += 1
            continue
        try:
            value, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError) as error:
            fault(f"{where}: not JSON ({error})")
            return
        for record in value if isinstance(value, list) else [value]:
            number += 1
            try:
                yield f":{number}", text_of(record, field, f"{where}, record {number}")
            except ValueError as error:
                fault(str(error))


def table(texts: Iterable[str], field: str, where: str, fault: Fault, *, delimiter: str) -> Iterator[Record]:
    """Rows below a line of names, as in RFC 4180: quoted values may hold delimiters and line ends."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # of the whole process: 128 KiB is too little for texts
    rows = csv.reader(lines(texts, where), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        check_field(names, field, where)
        column = names.index(field)
        for number, row in enumerate(rows, start=2):
            if len(row) == len(names):
                yield f":{number}", row[column]
            elif row:
                fault(f"{where}, row {number}: has {len(row)} values, and the first row {len(names)}")
    except csv.Error as error:
        fault(f"{where}, line {rows.line_num}: not CSV ({error})")


def parquet(file: Path, field: str, on_read: Callable[[int], None]) -> Iterator[Record]:
    """Rows of a table."""
    with named_errors(file), pq.ParquetFile(file) as content:
        check_field(content.schema_arrow.names, field, file)
        n_rows, size = content.metadata.num_rows, file.stat().st_size
        for group in map(content.metadata.row_group, range(content.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema == field:
                    refuse_long(column.total_uncompressed_size / max(group.num_rows, 1), str(file))
        number = told = 0
        # few at a time: a long text that all rows share is on the disk once
        for batch in content.iter_batches(batch_size=16, columns=[field]):
            for value in batch.column(0):
                yield f":{number}", text_of({field: value.as_py()}, field, f"{file}, row {number}")
                number += 1
            on_read(size * number // n_rows - told)
            told = size * number // n_rows


def html(texts: Iterable[str], field: str, where: str, fault: Fault) -> Iterator[Record]:
    """The main text of a page as trafilatura finds it; where it finds none, all that a browser would show."""
    try:
        import trafilatura
    except ImportError:
        raise ValueError(f"{where}: .html needs the package trafilatura: {extras.install('html')}") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it tells of each page that has no text
    page = "".join(texts)
    yield "", trafilatura.extract(page) or trafilatura.html2txt(page)


def check_field(names: Iterable[str], field: str, where: object) -> None:
    """Refuse names without the field; the ValueError says which there are."""
    if field not in names:
        raise ValueError(f"{where}: no field text_field={field}; there are: {', '.join(names)}")


def text_of(record: object, field: str, where: str) -> str | None:
    """Return the text of a record, None if it is null; raises ValueError if it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON object is needed, found {type(record).__name__}")
    check_field(record, field, where)
    text = record[field]
    if not isinstance(text, str | None):
        raise ValueError(f"{where}: {field} is {type(text).__name__}, not text")
    refuse_long(len(text or ""), where)
    return text


RECORDS: dict[str, Any] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": whole_json,
    ".csv": partial(table, delimiter=","),
    ".tsv": partial(table, delimiter="\t"),
    ".html": html,
    ".htm": html,
    ".parquet": parquet,
}
"""How the records of files with other suffixes than plain text's are found."""
