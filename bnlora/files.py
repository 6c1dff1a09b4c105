"""Files that appear whole or not at all, so that an interrupt leaves none that looks whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
