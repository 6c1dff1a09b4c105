"""Files that appear whole or not at all, so that an interrupt leaves none that looks whole; reading JSON."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LARGEST_JSON = 2**26  # bytes; the index of a model of hundreds of gigabytes has a few million


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file under another name in the same folder, and then give it its own."""
    scratch = path.with_name(f".{path.name}")
    write(scratch)
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    write_whole(
        path, lambda scratch: scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that may come from anybody.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object, or one that is too large or too deeply nested to be meant.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(
            f"{str(path)!r} has {path.stat().st_size:,} bytes; JSON files of up to {LARGEST_JSON:,} are read"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(content).__name__}")
    return content
