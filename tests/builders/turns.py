"""Slow tests take turns: a commit runs those of a third of the files."""

import os
import subprocess
import zlib

import pytest

PARTS = 3


def part() -> int | None:
    """The third that runs, which `BNLORA_PART` names: a number, "commit" for that of HEAD, or "all" for None.

    Raises:
        pytest.UsageError: If it names nothing of these.
    """
    given = os.environ.get("BNLORA_PART", "all")
    if given == "all":
        return None
    if given == "commit":
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        return int(head.stdout[:8], 16) % PARTS if head.returncode == 0 else 0
    if given in map(str, range(PARTS)):
        return int(given)
    raise pytest.UsageError(f"BNLORA_PART must be all, commit or a number below {PARTS}; got {given!r}")


def part_of(nodeid: str) -> int:
    """The third of a test: that of its file, whose tests share programs."""
    name = nodeid.partition("::")[0].rpartition("/")[2]
    return zlib.crc32(name.encode()) % PARTS
