"""Tables that are read a piece at a time, so that memory does not grow with the number of rows.

A file is read once to count and check its rows, and again for each run through its pieces. The pieces
together are the table of `bnlora.data.tables.read_columns`. A JSON file that is one list is the exception: it
is kept in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from bnlora.data.formats import (
    ENCODING,
    as_text,
    check_columns,
    csv_rows,
    csv_table,
    json_column,
    json_objects,
    parquet_file,
    valid,
)
from bnlora.data.tables import ending_of, existing

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")

SCANNED = 4096
"""Rows of a JSON file of which the types are found at a time."""


@dataclass(frozen=True)
class TableFile:
    """A table on disk.

    Attributes:
        path: The file.
        column_names: Names of its columns.
        num_rows: Number of its rows, at least one.
        pieces: From a number of rows to an iterator over pieces of at most this size, in order.
    """

    path: Path
    column_names: list[str]
    num_rows: int
    pieces: "Callable[[int], Iterator[pa.Table]]"


def open_table(path: str | Path, *, encoding: str = ENCODING) -> TableFile:
    """Open a table to read its pieces; the arguments and errors are those of `read_table`.

    Errors in the texts of a Parquet file are found in the piece that has them, all others at once.
    """
    path = existing(path)
    table = _OPENERS[ending_of(path, _OPENERS)](path, encoding)
    if not table.num_rows:
        raise ValueError(f"{str(path)!r} has no rows")
    return table


def blocks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last one may be shorter."""
    while block := list(islice(items, size)):
        yield block


def _open_csv(path: Path, encoding: str) -> TableFile:
    with csv_rows(path, encoding) as (header, rows):
        check_columns(repr(str(path)), header, header)
        count = sum(1 for _ in rows)

    def pieces(size: int) -> "Iterator[pa.Table]":
        with csv_rows(path, encoding) as (header, rows):
            for block in blocks(rows, size):
                yield csv_table(header, block, header)

    return TableFile(path, header, count, pieces)


def _open_json(path: Path, encoding: str) -> TableFile:
    types: dict[str, Any] = {}
    count = 0
    with json_objects(path, encoding) as objects:
        for block in blocks(objects, SCANNED):
            count += len(block)
            for name in dict.fromkeys(name for record in block for name in record):
                found = json_column([record.get(name) for record in block]).type
                types[name] = found if name not in types else _common(types[name], found)
    return TableFile(path, list(types), count, partial(_json_pieces, path, encoding, types))


def _json_pieces(path: Path, encoding: str, types: dict[str, Any], size: int) -> "Iterator[pa.Table]":
    import pyarrow as pa

    with json_objects(path, encoding) as objects:
        for block in blocks(objects, size):
            columns = {name: [record.get(name) for record in block] for name in types}
            yield pa.table({name: _array(values, types[name]) for name, values in columns.items()})


def _array(values: list[Any], kind: Any) -> "pa.Array":
    import pyarrow as pa

    return pa.array([as_text(value) for value in values] if kind == pa.string() else values, kind)


def _common(first: Any, second: Any) -> Any:
    """The type that preserves the values of two; strings if there is no other."""
    return _joined(first, second) or _strings()


def _strings() -> Any:
    import pyarrow as pa

    return pa.string()


def _joined(first: Any, second: Any) -> Any:
    import pyarrow as pa

    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_list(first) and pa.types.is_list(second):
        inner = _joined(first.value_type, second.value_type)
        return None if inner is None else pa.list_(inner)
    return None


def _open_parquet(path: Path, encoding: str) -> TableFile:
    with parquet_file(path) as file:
        names, count = file.schema_arrow.names, file.metadata.num_rows
        check_columns(repr(str(path)), names, names)

    def pieces(size: int) -> "Iterator[pa.Table]":
        import pyarrow as pa

        with parquet_file(path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield valid(pa.Table.from_batches([batch]))

    return TableFile(path, names, count, pieces)


_OPENERS: Mapping[str, Callable[[Path, str], TableFile]] = MappingProxyType(
    {".csv": _open_csv, ".json": _open_json, ".jsonl": _open_json, ".parquet": _open_parquet}
)
