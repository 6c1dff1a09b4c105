"""`bnlora predict`: predictions of a table of any length, a piece at a time.

Memory does not grow with the number of rows. The new columns of each piece go to a temporary file without a
name. At the end, the table is read again, and both are written together. If the command is interrupted or
fails in between, the rows so far are written to a table of their own.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape

from bnlora._util.progress import OneBar
from bnlora._util.typing import Adapters
from bnlora.app.kept import keep, restored
from bnlora.app.outcome import require_free, with_columns
from bnlora.app.recipe import Recipe
from bnlora.app.tasks import Totals, column_names, columns_of, predicted
from bnlora.data.formats import check_columns
from bnlora.data.pieces import TableFile, open_table
from bnlora.data.tables import as_strings, naming_lines, write_pieces
from bnlora.program.protocol import Model

if TYPE_CHECKING:
    import pyarrow as pa

PIECE = 4096
"""Rows that are read, predicted and written at a time."""


class Columns(NamedTuple):
    """How columns of a table are read and named.

    Attributes:
        text: Column of the texts.
        encoding: Encoding of a CSV or JSON file.
        prefix: Prefix of the names of new columns.
        overwrite: Whether new columns replace columns of the same names.
    """

    text: str
    encoding: str
    prefix: str
    overwrite: bool


@dataclass(frozen=True)
class Drawn:
    """Draws of a posterior, which are the same for every piece.

    Attributes:
        model: The classifier.
        adapters: The draws.
    """

    model: Model
    adapters: Adapters

    def draw_adapters(self, key: jax.Array, num_draws: int) -> Adapters:
        """The draws; key and number have no effect."""
        return self.adapters


class Spool:
    """Tables that wait in a temporary file.

    Args:
        file: The file, empty.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._count = file, 0
        self._writer: Any = None

    def add(self, table: "pa.Table") -> None:
        """Append a table; all have the same columns."""
        import pyarrow as pa

        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._writer.write_batch(table.combine_chunks().to_batches()[0])
        self._file.flush()
        self._count += 1

    def tables(self) -> "Iterator[pa.Table]":
        """The tables that were written completely, in order."""
        import pyarrow as pa

        if self._count:
            self._file.seek(0)
            reader = pa.ipc.open_stream(self._file)
            for _ in range(self._count):
                yield pa.Table.from_batches([reader.read_next_batch()])


def predict_table(
    key: jax.Array, folder: Path, table: Path, out: Path, columns: Columns, num_draws: int, console: Console
) -> tuple[Path, dict[str, Any]]:
    """Predict the rows of a table with the fit in a folder, and write them with the new columns.

    Args:
        key: Random key of the draws.
        folder: Folder of the fit.
        table: File of the rows.
        out: File to write; it can be written.
        columns: Which columns are read, and the names of new ones.
        num_draws: Number of posterior draws.
        console: Where to report progress and problems.

    Returns:
        The file that was written, and the result as one JSON object.
    """
    recipe = Recipe.from_folder(folder)
    source = open_table(table, encoding=columns.encoding)
    if not columns.overwrite:
        require_free(source.column_names, column_names(recipe), columns.prefix)
    check_columns(repr(str(table)), source.column_names, columns_of(recipe, columns.text, None))
    totals = Totals()
    with tempfile.TemporaryFile(dir=out.parent) as file:
        spool = Spool(file)

        def write(path: Path) -> None:
            write_pieces(_joined(source, spool, columns.prefix), path)

        with _keeping_the_part(out.with_stem(f"{out.stem}.part"), write, totals, source.num_rows, console):
            for added in _predicted(key, recipe, folder, source, columns, num_draws, console):
                spool.add(added)
                totals.add(added.to_pydict())
            place = keep(out, write, console)
    return place, {"table": str(place), **totals.result(recipe, num_draws)}


def _predicted(
    key: jax.Array,
    recipe: Recipe,
    folder: Path,
    source: TableFile,
    columns: Columns,
    num_draws: int,
    console: Console,
) -> "Iterator[pa.Table]":
    """The new columns of each piece."""
    import pyarrow as pa

    wanted = columns_of(recipe, columns.text, None)
    drawn: Drawn | None = None
    bar = OneBar(console, source.num_rows)
    begin = 0
    with bar.bar:
        for piece in source.pieces(PIECE):
            rows = as_strings(piece.select(wanted))
            if drawn is None:
                fit, _, batch = restored(folder, source.path, columns.text, None, columns.encoding, rows=rows)
                drawn = Drawn(fit.model, fit.draw_adapters(key, num_draws))
            else:
                with naming_lines({"rows": source.path}, encoding=columns.encoding, first_row=begin):
                    data = recipe.read({"rows": rows}, drawn.model.base, text=columns.text, label=None)
                batch = data["rows"]
            with bar.part("predict", len(piece)):
                yield pa.table(predicted(key, recipe, drawn, batch, num_draws=num_draws, console=bar))
            begin += len(piece)


def _joined(source: TableFile, spool: Spool, prefix: str) -> "Iterator[pa.Table]":
    """Pieces of the table with their new columns, as far as there are any."""
    for added, rows in zip(spool.tables(), source.pieces(PIECE), strict=False):
        yield with_columns(rows, added.to_pydict(), prefix=prefix)


@contextmanager
def _keeping_the_part(path: Path, write: Any, totals: Totals, total: int, console: Console) -> Iterator[None]:
    """Write the rows so far if the block fails or is interrupted, and say where they are."""
    try:
        yield
    except (KeyboardInterrupt, ValueError, OSError, MemoryError):
        if totals.rows:
            place = keep(path, write, console)
            text = f"the first {totals.rows:,} of {total:,} rows are in {str(place)!r}"
            console.print(escape(text), highlight=False, soft_wrap=True)
        raise
