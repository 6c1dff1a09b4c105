"""Readers and writers of CSV, JSON and Parquet files, and the line number of a row for messages."""

import codecs
import csv
import difflib
import encodings.aliases
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    import pyarrow as pa
    import pyarrow.parquet as pq

ENCODING = "utf-8"


def as_text(value: Any) -> str | None:
    """The text of a cell, the same for every file format; None for a missing value."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None or value != value:  # NaN: pandas stores missing values as NaN in Parquet
        return None
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def check_columns(name: str, known: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `ValueError` unless every wanted column exists exactly once; `name` is the table's name."""
    for column in wanted:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)
            hint = f", nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{name} has no column {column!r}; its columns are {list(known)}{hint}")
        if list(known).count(column) > 1:
            raise ValueError(f"{name} has {list(known).count(column)} columns {column!r}; one is needed")


def place(path: Path, row: int, encoding: str) -> str:
    """Description of the place of a row: its line in a CSV or JSON file, as an editor shows it."""
    path = path.expanduser()
    ending = path.suffix.lower()
    if ending == ".parquet":
        return f"row {row} (counted from 0) of {str(path)!r}"
    if ending == ".csv":
        with _opened(path, encoding, newline="") as file:
            return f"line {next(islice(_csv_records(path, file), row + 1, None))[0]} of {str(path)!r}"
    with _opened(path, encoding) as file:
        unit, records = _json_records(path, file)
        return f"{unit} {next(islice(records, row, None))[0]} of {str(path)!r}"


@contextmanager
def _opened(path: Path, encoding: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """The text of a file, which is decoded while it is read; errors are those of `_decoded`."""
    try:
        known = codecs.lookup(encoding).name
        with path.open(encoding="utf-8-sig" if known == "utf-8" else known, newline=newline) as file:
            yield file
    except (LookupError, UnicodeDecodeError):
        _decoded(path, encoding)
        raise


def _decoded(path: Path, encoding: str) -> str:
    """The text of a file, without a byte order mark."""
    content = path.read_bytes()
    try:
        known = codecs.lookup(encoding).name
        return content.decode("utf-8-sig" if known == "utf-8" else known)
    except LookupError as error:
        names = sorted({*encodings.aliases.aliases, *encodings.aliases.aliases.values()} - {encoding})
        near = difflib.get_close_matches(encoding.lower().replace("-", "_"), names, n=1, cutoff=0.0)
        raise ValueError(f"encoding {encoding!r} is not known; nearest is {near[0]!r}") from error
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(known, errors="replace")
        line, byte = io.StringIO(before, newline=None).read().count("\n") + 1, error.object[error.start]
        raise ValueError(
            f"{str(path)!r} is not in the encoding {encoding!r}: byte 0x{byte:02x} on line {line} is not "
            f"valid in it; set the encoding of the file with `encoding` (--encoding on the command "
            "line), for instance 'cp1252' or 'utf-16'"
        ) from error


def _read_csv(path: Path, *, columns: list[str] | None, encoding: str) -> "pa.Table":
    with csv_rows(path, encoding) as (header, rows):
        chosen = header if columns is None else columns
        check_columns(repr(str(path)), header, chosen)
        return csv_table(header, list(rows), chosen)


def csv_table(header: list[str], rows: Sequence[list[str]], columns: Sequence[str]) -> "pa.Table":
    """Some columns of rows of cells, as strings."""
    import pyarrow as pa

    places = {name: header.index(name) for name in columns}
    return pa.table(
        {name: pa.array([cells[at] for cells in rows], pa.string()) for name, at in places.items()}
    )


@contextmanager
def csv_rows(path: Path, encoding: str) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The header of a CSV file, and the cells of each row while the file is read."""
    with _opened(path, encoding, newline="") as file:
        records = _csv_records(path, file)
        first = next(records, None)
        if first is None:
            raise ValueError(f"{str(path)!r} has only blank lines")
        yield first[1], _whole_rows(path, first[1], records)


def _whole_rows(
    path: Path, header: list[str], records: Iterator[tuple[int, list[str]]]
) -> Iterator[list[str]]:
    for line, cells in records:
        if len(cells) != len(header):
            raise ValueError(
                f"line {line} of {str(path)!r} has {len(cells)} cells, but the header names {len(header)} "
                f"columns; put texts with a comma or a new line in double quotes"
            )
        yield cells


def _csv_records(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Cells of the header and of every row, each with its first line number; blank lines are skipped."""
    line = 1
    limit = csv.field_size_limit(2**31 - 1)  # by default, a text above 131,072 letters is an error
    try:
        reader = csv.reader(file, strict=True)
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as csv: {error}, in the row that begins on line {line}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _read_json(path: Path, *, columns: list[str] | None, encoding: str) -> "pa.Table":
    import pyarrow as pa

    with json_objects(path, encoding) as objects:
        records = list(objects)
    if not records:
        raise ValueError(f"{str(path)!r} has no rows")
    known = list(dict.fromkeys(name for record in records for name in record))
    check_columns(repr(str(path)), known, known if columns is None else columns)
    chosen = known if columns is None else columns
    return pa.table({name: json_column([record.get(name) for record in records]) for name in chosen})


@contextmanager
def json_objects(path: Path, encoding: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The objects of a JSON file, while it is read if it has one on each line."""
    with _opened(path, encoding) as file:
        _, records = _json_records(path, file)
        yield (record for _, record in records)


def _json_records(
    path: Path, file: TextIO
) -> tuple[Literal["line", "object"], Iterator[tuple[int, dict[str, Any]]]]:
    """Objects of a file, each with its line number or, if the file is one list, its position."""
    begin = ""
    while not begin.strip():
        begin = file.readline()
        if not begin:
            break
    file.seek(0)
    if begin.lstrip().startswith("["):
        whole = _json_value(file.read(), f"{str(path)!r}")
        numbered = enumerate(whole, 1)
        return "object", (
            (number, _json_object(value, f"object {number} of {str(path)!r}")) for number, value in numbered
        )
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    places = ((number, line, f"line {number} of {str(path)!r}") for number, line in lines)
    return "line", ((number, _json_object(_json_value(line, place), place)) for number, line, place in places)


def _json_value(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if "\\u" in text:  # escapes can encode half of a surrogate pair, which is not valid text
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} has half a letter, {error.object[error.start]!r}") from error
    except RecursionError as error:
        raise ValueError(f"{place} cannot be read as json: it is nested too deeply") from error
    except ValueError as error:
        reason = str(error).replace("line 1 ", "") if place.startswith("line") else str(error)
        raise ValueError(f"{place} cannot be read as json: {reason}") from error


def _json_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a JSON object, {{...}}; got {json.dumps(value)[:40]}")
    return value


def json_column(values: list[Any]) -> "pa.Array":
    """The values in their common type if that preserves them, otherwise as strings."""
    import pyarrow as pa

    if len({type(value) for value in values if value is not None}) <= 1:
        try:
            array = pa.array(values)
            if array.to_pylist() == values:
                return array
        except (pa.ArrowException, OverflowError):
            pass
    return pa.array([as_text(value) for value in values], pa.string())


def _read_parquet(path: Path, *, columns: list[str] | None, encoding: str) -> "pa.Table":
    with parquet_file(path) as file:
        check_columns(repr(str(path)), file.schema_arrow.names, columns or file.schema_arrow.names)
        return valid(file.read(columns=columns))


def valid(table: "pa.Table") -> "pa.Table":
    """The table, if its texts are UTF-8, and its notes, such as names of classes, which are read later."""
    table.validate(full=True)
    for note in (table.schema.metadata or {}).values():
        note.decode()
    return table


@contextmanager
def parquet_file(path: Path) -> "Iterator[pq.ParquetFile]":
    """An open Parquet file; what Arrow raises becomes one sentence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # not `read_table`: it would parse columns from the folder's name
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(path)!r} cannot be read as parquet ({reason})") from error


class _PlainLineEnds:
    """Text whose rows end with a line feed, whatever the writer of the rows ends them with."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, row: str) -> int:
        """Write one row."""
        return self._file.write(row.removesuffix("\r\n") + "\n")


def csv_writer(file: TextIO) -> Any:
    """A writer of CSV rows that end with a line feed.

    Python before 3.13 quotes a cell for the carriage return in it only if rows end with one.
    """
    return csv.writer(_PlainLineEnds(file), lineterminator="\r\n")


def _write_csv(tables: "Iterable[pa.Table]", path: Path) -> None:
    with path.open("w", encoding=ENCODING, newline="") as file:
        writer = csv_writer(file)
        for number, table in enumerate(tables):
            if not number:
                writer.writerow(table.column_names)
            columns = [[as_text(value) for value in column.to_pylist()] for column in table.columns]
            writer.writerows(zip(*columns, strict=True))


def _write_json(tables: "Iterable[pa.Table]", path: Path) -> None:
    with path.open("w", encoding=ENCODING, newline="\n") as file:
        for row in (row for table in tables for row in table.to_pylist()):
            finite = {name: None if _is_infinite(value) else value for name, value in row.items()}
            file.write(json.dumps(finite, ensure_ascii=False, default=as_text) + "\n")


def _is_infinite(value: Any) -> bool:
    """Whether JSON cannot represent a value."""
    return isinstance(value, float) and not math.isfinite(value)


def _write_parquet(tables: "Iterable[pa.Table]", path: Path) -> None:
    import pyarrow.parquet as pq

    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


READERS: Mapping[str, Callable[..., "pa.Table"]] = MappingProxyType(
    {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_parquet}
)
WRITERS: Mapping[str, Callable[["Iterable[pa.Table]", Path], None]] = MappingProxyType(
    {".csv": _write_csv, ".jsonl": _write_json, ".parquet": _write_parquet}
)
