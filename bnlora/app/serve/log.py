"""A file to which the service appends its predictions, with the columns that `bnlora predict` writes."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnlora.data.formats import csv_writer
from bnlora.data.tables import ending_of

ENDINGS = {".csv": None, ".jsonl": None}
"""Endings of files that can be appended to."""


class PredictionLog:
    """Predictions in a `.csv` or `.jsonl` file, texts included.

    Args:
        path: The file. Rows are added to one that exists.
        columns: Names of the columns after `text`.

    Raises:
        ValueError: If the ending is another, a CSV file has another header, or its last row is cut off.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self._path, self._columns = path, ["text", *columns]
        self._is_csv = ending_of(path, ENDINGS) == ".csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None) if self._is_csv else None
        if header is not None and header != self._columns:
            raise ValueError(
                f"{str(path)!r} has other columns than predictions of this fit; name another file"
            )
        with path.open("rb") as whole:
            if whole.seek(0, os.SEEK_END) and whole.seek(-1, os.SEEK_END) and whole.read(1) != b"\n":
                raise ValueError(
                    f"the last row of {str(path)!r} has no line end, so it may be cut off; "
                    "mend it, or name another file"
                )

    def append(self, texts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Add a row for each text, or none of them.

        Raises:
            OSError: If the file cannot be written.
        """
        rows = [list(row) for row in zip(texts, *columns.values(), strict=True)]
        with self._path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            header = [] if before or not self._is_csv else [self._columns]  # new, or moved away meanwhile
            left = memoryview((_csv([*header, *rows]) if self._is_csv else self._json(rows)).encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(before)  # a part of a row would join with the next one
                raise

    def _json(self, rows: Sequence[Sequence[Any]]) -> str:
        entries = [dict(zip(self._columns, row, strict=True)) for row in rows]
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv_writer(text).writerows(rows)
    return text.getvalue()
