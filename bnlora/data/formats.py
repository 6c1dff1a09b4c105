"""Readers and writers of CSV, JSON and Parquet files, and the line number of a row for messages."""

import codecs
import csv
import difflib
import encodings.aliases
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    import pyarrow as pa

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
    text = _decoded(path, encoding)
    if ending == ".csv":
        return f"line {_csv_records(path, text)[row + 1][0]} of {str(path)!r}"
    unit, records = _json_records(path, text)
    return f"{unit} {records[row][0]} of {str(path)!r}"


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
    import pyarrow as pa

    (_, header), *records = _csv_records(path, _decoded(path, encoding))
    check_columns(repr(str(path)), header, header if columns is None else columns)
    for line, cells in records:
        if len(cells) != len(header):
            raise ValueError(
                f"line {line} of {str(path)!r} has {len(cells)} cells, but the header names {len(header)} "
                f"columns; put texts with a comma or a new line in double quotes"
            )
    places = {name: header.index(name) for name in (header if columns is None else columns)}
    return pa.table(
        {name: pa.array([cells[at] for _, cells in records], pa.string()) for name, at in places.items()}
    )


def _csv_records(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Cells of the header and of every row, each with its first line number; blank lines are skipped."""
    records, line = [], 1
    limit = csv.field_size_limit(2**31 - 1)  # by default, a text above 131,072 letters is an error
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for cells in reader:
            if cells:
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as csv: {error}, in the row that begins on line {line}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise ValueError(f"{str(path)!r} has only blank lines")
    return records


def _read_json(path: Path, *, columns: list[str] | None, encoding: str) -> "pa.Table":
    import pyarrow as pa

    _, records = _json_records(path, _decoded(path, encoding))
    if not records:
        raise ValueError(f"{str(path)!r} has no rows")
    known = list(dict.fromkeys(name for _, record in records for name in record))
    check_columns(repr(str(path)), known, known if columns is None else columns)
    chosen = known if columns is None else columns
    return pa.table({name: _json_column([record.get(name) for _, record in records]) for name in chosen})


def _json_records(
    path: Path, text: str
) -> tuple[Literal["line", "object"], list[tuple[int, dict[str, Any]]]]:
    """Objects of a file, each with its line number or, if the file is one list, its position."""
    if text.lstrip().startswith("["):
        whole = _json_value(text, f"{str(path)!r}")
        return "object", [
            (number, _json_object(value, f"object {number} of {str(path)!r}"))
            for number, value in enumerate(whole, 1)
        ]
    lines = enumerate(io.StringIO(text, newline=None), 1)
    places = [(number, line, f"line {number} of {str(path)!r}") for number, line in lines if line.strip()]
    return "line", [(number, _json_object(_json_value(line, place), place)) for number, line, place in places]


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


def _json_column(values: list[Any]) -> "pa.Array":
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)  # not `read_table`: it would parse columns from the folder's name
        check_columns(repr(str(path)), file.schema_arrow.names, columns or file.schema_arrow.names)
        table = file.read(columns=columns)
        table.validate(full=True)  # texts are UTF-8
        for note in (table.schema.metadata or {}).values():  # names of classes, for one, which are read later
            note.decode()
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(path)!r} cannot be read as parquet ({reason})") from error


def _write_csv(table: "pa.Table", path: Path) -> None:
    columns = [[as_text(value) for value in column.to_pylist()] for column in table.columns]
    with path.open("w", encoding=ENCODING, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows(zip(*columns, strict=True))


def _write_json(table: "pa.Table", path: Path) -> None:
    with path.open("w", encoding=ENCODING, newline="\n") as file:
        for row in table.to_pylist():
            finite = {name: None if _is_infinite(value) else value for name, value in row.items()}
            file.write(json.dumps(finite, ensure_ascii=False, default=as_text) + "\n")


def _is_infinite(value: Any) -> bool:
    """Whether JSON cannot represent a value."""
    return isinstance(value, float) and not math.isfinite(value)


def _write_parquet(table: "pa.Table", path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path)


READERS: Mapping[str, Callable[..., "pa.Table"]] = MappingProxyType(
    {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_parquet}
)
WRITERS: Mapping[str, Callable[["pa.Table", Path], None]] = MappingProxyType(
    {".csv": _write_csv, ".jsonl": _write_json, ".parquet": _write_parquet}
)
