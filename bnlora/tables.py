"""Tables of texts in files: CSV, JSON lines and Parquet, by way of `datasets`."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: it takes as long as the rest of the library
    from datasets import Dataset

READERS: Mapping[str, str] = MappingProxyType(
    {".csv": "from_csv", ".json": "from_json", ".jsonl": "from_json", ".parquet": "from_parquet"}
)
"""Constructor of a `Dataset` by the ending of a file's name."""

WRITERS: Mapping[str, str] = MappingProxyType(
    {".csv": "to_csv", ".jsonl": "to_json", ".parquet": "to_parquet"}
)
"""Method of a `Dataset` that writes such a file."""


def read_table(path: str | Path) -> "Dataset":
    """Read a table from a file, its kind known by the ending of its name.

    Args:
        path: A `.csv` (with a header), `.jsonl` or `.json` (one object a line), or `.parquet` file.

    Raises:
        FileNotFoundError: When there is no such file; the message names the nearest one beside it.
        ValueError: When the ending is not known, the file is empty or cannot be parsed, or has no rows.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; the nearest is {str(path.parent / near[0])!r}" if near else ""
        raise FileNotFoundError(f"there is no file {str(path)!r}{hint}")
    if path.suffix not in READERS:
        raise ValueError(f"{path.name!r} must end in one of {', '.join(READERS)}; got {path.suffix!r}")
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    table = _read(path)
    if len(table) == 0:
        raise ValueError(f"{str(path)!r} has columns {table.column_names} but no rows")
    return table


def require_writable(path: Path) -> None:
    """Raise `ValueError` unless `write_table` knows the ending of this name, before anything is computed."""
    if path.suffix not in WRITERS:
        raise ValueError(f"{path.name!r} must end in one of {', '.join(WRITERS)}; got {path.suffix!r}")


def write_table(rows: "Dataset", path: Path) -> None:
    """Write a table to a `.csv`, `.jsonl` or `.parquet` file, replacing one that is there."""
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        getattr(rows, WRITERS[path.suffix])(str(path))


def _read(path: Path) -> "Dataset":
    from datasets import Dataset

    try:
        with _quiet():
            return getattr(Dataset, READERS[path.suffix])(str(path), keep_in_memory=True)
    except Exception as error:  # datasets wraps what its parsers raise in errors of many kinds
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason = "it has no rows" if "corresponds to no data" in reason else reason
        raise ValueError(f"{str(path)!r} cannot be read as {path.suffix[1:]} ({reason})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither bars nor log lines of `datasets`: what goes wrong is said once, in the error."""
    from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
    from datasets.utils import logging

    shown, level = is_progress_bar_enabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()
