"""A file to which the service appends its predictions, with the columns that `bnlora predict` writes."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnlora.data.tables import ending_of

ENDINGS = {".csv": None, ".jsonl": None}
"""Endings of files that can be appended to."""


class PredictionLog:
    """Predictions in a `.csv` or `.jsonl` file, texts included.

    Args:
        path: The file. Rows are added to one that exists.
        columns: Names of the columns after `text`.

    Raises:
        ValueError: If the ending is another, or a CSV file has another header.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self._path, self._columns = path, ["text", *columns]
        self._is_csv = ending_of(path, ENDINGS) == ".csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8", newline="") as file:
            if not self._is_csv:
                return
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is None:
                file.write(_csv([self._columns]))
            elif header != self._columns:
                raise ValueError(
                    f"{str(path)!r} has other columns than predictions of this fit; name another file"
                )

    def append(self, texts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Add a row for each text, with one write.

        Raises:
            OSError: If the file cannot be written.
        """
        rows = [list(row) for row in zip(texts, *columns.values(), strict=True)]
        if self._is_csv:
            lines = _csv(rows)
        else:
            entries = [dict(zip(self._columns, row, strict=True)) for row in rows]
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write(lines)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
