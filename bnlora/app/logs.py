"""Logs of predictions, as `bnlora predict` writes them, read piece by piece."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnlora.assess.monitor.rows import UNLABELLED, Logged
from bnlora.data.formats import ENCODING, as_text, check_columns, place
from bnlora.data.labels import LabelKind, read_labels
from bnlora.data.pieces import open_table
from bnlora.data.tables import RowError

if TYPE_CHECKING:
    import pyarrow as pa

PROBABILITY = "probability "
"""How the names of the columns of probabilities begin; the name of the class follows."""

INFORMATION = "mutual information"

_ROUNDED = 0.01  # how far from 1 probabilities may sum that were rounded in a log


@dataclass(frozen=True)
class LogFormat:
    """Names of the columns of a log.

    Attributes:
        prefix: Prefix of the columns that `bnlora predict` added.
        probabilities: Columns of the probabilities; those whose names begin with "probability " if empty.
        mutual_information: Column of the mutual information; None for the column of that name, if any.
        label: Column of the labels; None if they are not read.
        time: Column of the times; None if they are not read.
        labels_are: Meaning of the labels if a class is named by an integer.
        encoding: Encoding of a CSV or JSON file.
    """

    prefix: str = ""
    probabilities: tuple[str, ...] = ()
    mutual_information: str | None = None
    label: str | None = None
    time: str | None = None
    labels_are: LabelKind | None = None
    encoding: str = ENCODING


class LogPiece(NamedTuple):
    """Some rows of a log.

    Attributes:
        prediction: Probabilities and mutual information.
        labels: Classes, -1 for a row without a label; None if labels are not read.
        times: Time of each row; None if times are not read.
    """

    prediction: Logged
    labels: np.ndarray | None
    times: list[str] | None


class Log:
    """A log on disk.

    Args:
        path: The file.
        columns: Names of its columns.
        optional: Columns that are left out if the file does not have them, among label and time.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or cannot be read, or a column is missing.
    """

    def __init__(self, path: Path, columns: LogFormat, *, optional: Sequence[str] = ()):
        self.path, self._source = path, open_table(path, encoding=columns.encoding)
        known, start = self._source.column_names, columns.prefix + PROBABILITY
        self._probabilities = columns.probabilities or tuple(x for x in known if x.startswith(start))
        if len(self._probabilities) < 2:
            raise ValueError(
                f"{str(path)!r} has {len(self._probabilities)} columns of probabilities, at least two are "
                f"needed: their names begin with {start!r} (see --prefix), or --probability names each; its "
                f"columns are {known}"
            )
        information = columns.prefix + INFORMATION
        self._information = columns.mutual_information or (information if information in known else None)
        self._label, self._time = (
            None if name in optional and name not in known else name for name in (columns.label, columns.time)
        )
        wanted = [*self._probabilities, self._information, self._label, self._time]
        check_columns(repr(str(path)), known, [name for name in wanted if name is not None])
        self.classes = tuple(name.removeprefix(start) for name in self._probabilities)
        self._columns = columns

    def pieces(self, size: int) -> Iterator[LogPiece]:
        """Pieces of at most `size` rows, in order.

        Raises:
            ValueError: If a row has no distribution, or a label that is no class; the message has its line.
        """
        begin = 0
        for table in self._source.pieces(size):
            yield self._piece(table, begin)
            begin += len(table)

    def _piece(self, table: "pa.Table", begin: int) -> LogPiece:
        probs = np.stack([self._numbers(table, name, begin) for name in self._probabilities], 1)
        right = (probs >= 0).all(1) & (abs(probs.sum(1) - 1) < _ROUNDED)
        if not right.all():
            row = int(np.argmin(right))
            numbers = ", ".join(f"{x:g}" for x in probs[row])
            raise ValueError(f"{self._at(begin + row)} has no distribution: its probabilities are {numbers}")
        information = None if self._information is None else self._numbers(table, self._information, begin)
        labels = None if self._label is None else self._labels(table, begin)
        times = None if self._time is None else [text or "" for text in _texts(table, self._time)]
        return LogPiece(Logged(probs, information), labels, times)

    def _numbers(self, table: "pa.Table", name: str, begin: int) -> np.ndarray:
        values = np.empty(len(table))
        for row, text in enumerate(_texts(table, name)):
            try:
                values[row] = float(text or "")
            except ValueError:
                values[row] = np.nan
            if not np.isfinite(values[row]):
                raise ValueError(
                    f"{self._at(begin + row)} has no number in the column {name!r}; got {text!r}"
                )
        return values

    def _labels(self, table: "pa.Table", begin: int) -> np.ndarray:
        texts = [(text or "").strip() for text in _texts(table, str(self._label))]
        labelled = np.array([row for row, text in enumerate(texts) if text], int)
        labels = np.full(len(texts), UNLABELLED)
        if len(labelled):
            values = [texts[row] for row in labelled]
            try:
                labels[labelled] = read_labels(
                    "log", values, self.classes, labels_are=self._columns.labels_are
                )
            except RowError as error:
                raise error.at(self._at(begin + int(labelled[error.row]))) from error
        return labels

    def _at(self, row: int) -> str:
        return place(self.path, row, self._columns.encoding)


def _texts(table: "pa.Table", name: str) -> list[Any]:
    return [as_text(value) for value in table.column(name).to_pylist()]
