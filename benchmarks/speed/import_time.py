"""Time of `import bnlora`, compared with `import numpyro`, on which it depends.

Each import runs in a new Python process, in alternating order, so that other work on the machine slows both
equally. `--modules` lists the slowest packages.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter

from benchmarks.report import Report
from benchmarks.timing import in_turn_of_processes, show


def own_time(report: str) -> Counter[str]:
    """Seconds by package and subpackage, from the output of `python -X importtime`."""
    taken: Counter[str] = Counter()
    for microseconds, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", report, re.MULTILINE):
        taken[".".join(name.split(".")[:2])] += int(microseconds) / 1e6
    return taken


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rounds, and number of packages to list."""
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--modules", type=int, default=0, help="number of slowest packages to list")


def run(given: argparse.Namespace, report: Report) -> None:
    """Time both imports, and their ratio."""
    commands = {f"import {n}": [sys.executable, "-c", f"import {n}"] for n in ("numpyro", "bnlora")}
    show(report, "Importing", in_turn_of_processes(commands, given.rounds), unit="run")
    if given.modules:
        command = [sys.executable, "-X", "importtime", "-c", "import bnlora"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        table = report.table("The slowest packages", ("package", "s"))
        for name, seconds in own_time(printed).most_common(given.modules):
            table.row(name, f"{seconds:.3f}")
