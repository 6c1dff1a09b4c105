"""What a cell of the grid found: one row of a Parquet file.

A row keeps the predictions themselves, so that a new metric needs no new run. They are stored as half floats:
a log-probability keeps three digits. Tables are computed from what is stored, so they are the same on every
machine.
"""

import dataclasses
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from bnlora._util.files import write_whole


@dataclass(frozen=True)
class Cell:
    """One fit of one method.

    Attributes:
        task: Name of the task, which has the rows and their sets (`benchmarks.cells.tasks`).
        method: Name of the method (`benchmarks.cells.methods`).
        size: Number of labelled rows.
        seed: Seed of the labelled rows, the start values and the draws.
        options: What this cell does otherwise than the method does by itself, for ablations.
    """

    task: str
    method: str
    size: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the cell, which no other cell has, as in `vader, core Laplace, 560 rows, seed 3`."""
        return ", ".join([self.task, self.method, f"{self.size} rows", f"seed {self.seed}", *self.changes])

    @property
    def changes(self) -> list[str]:
        """The options as text, as in `rank=4`."""
        return [f"{key}={json.dumps(value)}" for key, value in sorted(self.options.items())]

    @property
    def file(self) -> str:
        """Name of the file of its row: readable, and with a checksum, so that no two cells share it."""
        readable = "-".join(re.findall(r"\w+", self.name))
        return f"{readable}-{zlib.crc32(self.name.encode()):08x}.parquet"


@dataclass(frozen=True)
class Predicted:
    """Predictions of a set of rows.

    Attributes:
        labels: True classes; -1 where a row belongs to none of the classes.
        log_probs: Log-probabilities of the mixture over draws.
        mutual_information: Mutual information of class and adapters, in nats; zero for a single draw.
    """

    labels: Int[np.ndarray, " n"]
    log_probs: Float[np.ndarray, "n c"]
    mutual_information: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Result:
    """What a cell found.

    Attributes:
        cell: The cell.
        predicted: Predictions by set of rows; the first set is in domain, all others are shifted.
        seconds: Wall time in seconds by part: `fit` and `predict`, both with compiling.
        parameters: Numbers that the method fitted.
        peak_bytes: Largest resident memory of the process until the end of this cell.
        about: What the method chose, such as its step, temperature, scales or evidence.
        provenance: `commit`, `date`, `machine`, and versions of Python, JAX and this library.
    """

    cell: Cell
    predicted: Mapping[str, Predicted]
    seconds: Mapping[str, float]
    parameters: int
    peak_bytes: int
    about: Mapping[str, Any]
    provenance: Mapping[str, str]

    def write(self, folder: Path) -> Path:
        """Write the row into a file of its own, which is either whole or not there."""
        path = folder / self.cell.file
        write_whole(path, lambda at: pq.write_table(table_of([self]), at, compression="zstd"))
        return path


def table_of(results: Iterable[Result]) -> pa.Table:
    """The rows of these results, in order."""
    return pa.Table.from_pylist([_row(result) for result in results], schema=SCHEMA)


def read(path: Path) -> list[Result]:
    """The results of a Parquet file.

    Raises:
        ValueError: If the file does not have the columns of a grid.
    """
    table = pq.read_table(path)
    if table.schema.names != SCHEMA.names:
        raise ValueError(f"{path} must have the columns {SCHEMA.names}; got {table.schema.names}")
    return [_result(row) for row in table.to_pylist()]


_SET = pa.struct(
    [
        ("set", pa.string()),
        ("classes", pa.int16()),
        ("labels", pa.list_(pa.int16())),
        ("log_probs", pa.list_(pa.float16())),
        ("mutual_information", pa.list_(pa.float16())),
    ]
)
SCHEMA = pa.schema(
    [
        *[(name, pa.string()) for name in ("task", "method")],
        *[(name, pa.int32()) for name in ("size", "seed")],
        ("options", pa.string()),
        ("predicted", pa.list_(_SET)),
        ("seconds", pa.string()),
        *[(name, pa.int64()) for name in ("parameters", "peak_bytes")],
        *[(name, pa.string()) for name in ("about", "provenance")],
    ]
)
"""Columns of a file. `options`, `seconds`, `about` and `provenance` are JSON."""

_JSON = ("options", "seconds", "about", "provenance")


def _row(result: Result) -> dict[str, Any]:
    cell = {field.name: getattr(result.cell, field.name) for field in dataclasses.fields(Cell)}
    rest = {
        name: getattr(result, name) for name in ("seconds", "parameters", "peak_bytes", "about", "provenance")
    }
    row = cell | rest | {"predicted": [_set(name, of) for name, of in result.predicted.items()]}
    return row | {name: json.dumps(dict(row[name]), sort_keys=True) for name in _JSON}


def _set(name: str, of: Predicted) -> dict[str, Any]:
    flat = np.maximum(of.log_probs, -60_000.0)  # the lowest half float is -65,504
    return {
        "set": name,
        "classes": of.log_probs.shape[1],
        "labels": np.asarray(of.labels).tolist(),
        "log_probs": flat.astype(np.float16).ravel(),
        "mutual_information": of.mutual_information.astype(np.float16),
    }


def _result(row: dict[str, Any]) -> Result:
    row |= {name: json.loads(row[name]) for name in _JSON}
    cell = Cell(**{field.name: row.pop(field.name) for field in dataclasses.fields(Cell)})
    predicted = {of["set"]: _predicted(of) for of in row.pop("predicted")}
    return Result(cell, predicted, **row)


def _predicted(of: dict[str, Any]) -> Predicted:
    rounded = np.array(of["log_probs"], np.float64).reshape(-1, of["classes"])
    normalised = rounded - np.logaddexp.reduce(rounded, axis=1, keepdims=True)
    return Predicted(np.array(of["labels"]), normalised, np.array(of["mutual_information"], np.float64))
