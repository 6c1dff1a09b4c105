"""Run what is slow by nature and write date, seconds and verdict of each part into tests/slow.md.

`make slow` calls this with the targets to make; it fails if one of them does.
"""

import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).parent / "slow.md"
HEAD = """# The last `make slow`

What is slow by nature and need not run for every change; `make slow` writes this page.

| part | date | revision | machine | seconds | verdict |
|---|---|---|---|---|---|
"""


def revision() -> str:
    """The commit, marked where the tree differs from it."""
    run = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip() or "no git"


def row(target: str) -> tuple[str, bool]:
    """Make a target; the line of the table about it, and whether it passed."""
    began = time.perf_counter()
    passed = subprocess.run(["make", target], check=False).returncode == 0
    seconds = time.perf_counter() - began
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    day, verdict = datetime.datetime.now(datetime.UTC).date(), "passed" if passed else "failed"
    line = f"| `make {target}` | {day} | {revision()} | {machine} | {seconds:.0f} | {verdict} |\n"
    return line, passed


def main(targets: list[str]) -> int:
    """Make all targets, whatever happens to the others."""
    lines, verdicts = zip(*map(row, targets), strict=True)
    PAGE.write_text(HEAD + "".join(lines), encoding="utf-8")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
