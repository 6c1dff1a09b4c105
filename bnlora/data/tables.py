"""Tables of texts in CSV, JSON lines and Parquet files, read by one rule and written without loss.

Texts, numbers and booleans are read as strings from every kind of file: `1` in a CSV file, `1` in a JSON line
and the integer 1 in a Parquet file are the same label. An empty cell of a CSV file is an empty string; null
in JSON or Parquet is None.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnlora._util.files import write_whole
from bnlora.data.formats import ENCODING, READERS, WRITERS, as_text, place

if TYPE_CHECKING:  # otherwise imported at first use: they take as long as the rest of the library
    import pyarrow as pa
    from datasets import Dataset


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
        split: Name of the split.
        row: Index of the row in it.
    """

    def __init__(self, before: str, split: str, row: int, after: str):
        super().__init__(f"{before}row {row} of split {split!r}{after}")
        self.split, self.row = split, row
        self._around = before, after

    def at(self, place: str) -> ValueError:
        """The same error with another description of the row."""
        before, after = self._around
        return ValueError(f"{before}{place}{after}")


def read_table(
    path: str | Path, *, columns: Sequence[str] | None = None, encoding: str = ENCODING
) -> "Dataset":
    """Read a table from a file. The ending of its name determines the format.

    Texts, numbers and booleans are read as strings from every format.

    Args:
        path: A `.csv` file (with a header), a `.jsonl` or `.json` file (one object per line), or a `.parquet`
            file.
        columns: Columns to read; all columns if None.
        encoding: Encoding of a CSV or JSON file, e.g. "cp1252".

    Raises:
        FileNotFoundError: If there is no such file; the message names the nearest file in the folder.
        ValueError: If the ending or the encoding is unknown, a column is missing, or the file is empty,
            cannot be parsed or has no rows. If one line causes the error, the message has its number.
    """
    return as_strings(read_columns(path, columns=columns, encoding=encoding))


def read_columns(
    path: str | Path, *, columns: Sequence[str] | None = None, encoding: str = ENCODING
) -> "pa.Table":
    """Read a table as `read_table` does, but keep the column types of the file."""
    path = existing(path)
    read = READERS[ending_of(path, READERS)]
    table = read(path, columns=None if columns is None else list(dict.fromkeys(columns)), encoding=encoding)
    if len(table) == 0:
        raise ValueError(f"{str(path)!r} has no rows")
    return table


def existing(path: str | Path) -> Path:
    """The path of a table that is there and not empty.

    Raises:
        FileNotFoundError: If there is no such file; the message names the nearest file in the folder.
        ValueError: If the ending is unknown, or the file is empty.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; the nearest is {str(path.parent / near[0])!r}" if near else ""
        raise FileNotFoundError(f"there is no file {str(path)!r}{hint}")
    ending_of(path, READERS)
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    return path


def as_strings(table: "pa.Table") -> "Dataset":
    """A data set of strings, as `read_table` returns; named classes, lists and objects keep their types.

    Raises:
        ValueError: If the description of the columns that `datasets` writes into a file is damaged.
    """
    import pyarrow as pa
    from datasets import ClassLabel, Dataset

    named = _described(table.schema)
    arrays = [
        column
        if isinstance(named.get(name), ClassLabel) or pa.types.is_nested(column.type)
        else pa.array([as_text(value) for value in column.to_pylist()], pa.string())
        for name, column in zip(table.column_names, table.columns, strict=True)
    ]
    strings = pa.table(dict(zip(table.column_names, arrays, strict=True)))
    return Dataset(strings.replace_schema_metadata(table.schema.metadata))


def _described(schema: "pa.Schema") -> "Mapping[str, Any]":
    """The types of the columns that `datasets` wrote into the file, if it did."""
    from datasets import Features

    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return Features.from_arrow_schema(schema)
    except Exception as error:  # a damaged description can raise any exception
        raise ValueError(
            f"the description of the columns in the table is damaged ({type(error).__name__}: {error}); "
            "write the table again"
        ) from error


def require_writable(path: Path) -> None:
    """Raise `ValueError` unless `write_table` supports the ending of this name."""
    ending_of(path, WRITERS)


def write_table(rows: "Dataset | pa.Table", path: Path) -> None:
    """Write a table to a `.csv`, `.jsonl` or `.parquet` file (in UTF-8); an existing file is replaced."""
    import pyarrow as pa

    write_pieces([rows if isinstance(rows, pa.Table) else rows.with_format("arrow")[:]], path)


def write_pieces(tables: "Iterable[pa.Table]", path: Path) -> None:
    """Write tables with the same columns, one after the other, as `write_table` writes one."""
    ending = ending_of(path, WRITERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, partial(WRITERS[ending], tables))


@contextmanager
def naming_lines(
    files: Mapping[str, Path], *, encoding: str = ENCODING, first_row: int = 0
) -> Iterator[None]:
    """Replace a `RowError` by an error that names the line in the file of the split.

    Args:
        files: Files by split.
        encoding: Their encoding.
        first_row: Number of the first row of the split in its file.
    """
    try:
        yield
    except RowError as error:
        raise error.at(place(files[error.split], first_row + error.row, encoding)) from error


def ending_of(path: Path, known: Mapping[str, Any]) -> str:
    """The ending of a name in lower case; `ValueError` if it is not known."""
    if path.suffix.lower() not in known:
        raise ValueError(f"{path.name!r} must end in one of {', '.join(known)}; got {path.suffix!r}")
    return path.suffix.lower()
