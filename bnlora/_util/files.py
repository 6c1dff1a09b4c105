"""Files: atomic writes, checksums, a check for free space before long work, and safe reading of JSON."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_JSON = 2**26  # bytes; the index of a model of hundreds of gigabytes has a few million bytes
_BLOCK = 2**20


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` create the file under a temporary name in the same folder, then rename it.

    The temporary name has the number of the process, because another process may write the same file.
    """
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)  # a partial file would occupy space on a full disk


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    write_whole(
        path, lambda scratch: scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that is not trusted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a JSON object, or is too large or too deeply nested.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(
            f"{str(path)!r} has {path.stat().st_size:,} bytes; JSON files may have at most {LARGEST_JSON:,}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must contain a JSON object; got {type(content).__name__}")
    return content


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def room(folder: Path) -> Iterator[Callable[[int], None]]:
    """Create a folder for later output and check that it is writable; remove it if it stays empty.

    Args:
        folder: The folder.

    Yields:
        A function that raises `OSError` if a number of bytes does not fit into the folder.

    Raises:
        OSError: If the folder cannot be created or written to.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        _try(folder, 1)
        yield lambda size: _try(folder, size)
    finally:
        for path in new:
            try:
                path.rmdir()
            except OSError:  # it was never created, or is not empty
                continue


@contextmanager
def room_for(file: Path | None, *, source: Path | None = None) -> Iterator[None]:
    """Create the folder of a file for later output (None: no file) and check that it is writable.

    Args:
        file: The file to write.
        source: An input file that must not be overwritten.

    Raises:
        ValueError: If the file is the source, also under another name.
        OSError: If the file is a folder or is not writable, or its folder is not writable.
    """
    if file is None:
        yield
        return
    if source is not None and file.exists() and source.exists() and file.samefile(source):
        raise ValueError(f"{str(file)!r} is the input table and would be overwritten; name another file")
    if file.is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder; give the name of a file")
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(f"{str(file)!r} is not writable; give another name")
    with room(file.parent):
        yield


def written(path: Path, write: Callable[[Path], Any], spare: Sequence[Path]) -> tuple[Path, str]:
    """Call `write` on a path or, if that fails, on a path in the first spare folder where it succeeds.

    Args:
        path: Path to write to.
        write: Writes to a path whose folder exists; it can raise `OSError`.
        spare: Folders to use instead, in order.

    Returns:
        The path that was written, and the problem with `path` ("" without a problem).

    Raises:
        OSError: If writing failed everywhere.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return path, ""
    except OSError as error:
        problem = f"{str(path)!r} cannot be written ({_reason(error)})"
    for folder in spare:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            other = Path(tempfile.mkdtemp(prefix=f"{path.stem}-", dir=folder)) / path.name
            write(other)
            return other, problem
        except OSError as error:
            problem += f", nor {str(folder)!r} ({_reason(error)})"
    raise OSError(f"{problem}; the result is lost")


def _try(folder: Path, size: int) -> None:
    """Create a folder, write `size` bytes into it, and remove them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        block = os.urandom(min(size, _BLOCK))  # some file systems store zeros without using space
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as file:
            for start in range(0, size, _BLOCK):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        needed = "" if size < 2**10 else f", which needs {size / 2**20:,.1f} MiB"
        raise OSError(
            f"{str(folder)!r} cannot be written{needed} ({_reason(error)}); choose another folder"
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
