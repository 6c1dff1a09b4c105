"""What `import bnlora` takes beside `import numpyro`, which it cannot do without.

Each import runs in a Python of its own, in turn and in alternating order, so that a machine with other work
slows both alike; see `rounds` for what is reported. `--modules` names what the time goes to.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter

from rounds import in_turn_of_processes, show


def own_time(report: str) -> Counter[str]:
    """Seconds by top-level package and the one below it, out of what `python -X importtime` wrote."""
    taken: Counter[str] = Counter()
    for microseconds, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", report, re.MULTILINE):
        taken[".".join(name.split(".")[:2])] += int(microseconds) / 1e6
    return taken


def main() -> None:
    """Time both imports and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--modules", type=int, default=0, help="print the so many slowest packages")
    options = parser.parse_args()
    names = ("numpyro", "bnlora")
    commands = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in names}
    show("Importing, each time in a new process", in_turn_of_processes(commands, options.rounds), unit="run")
    if options.modules:
        run = [sys.executable, "-X", "importtime", "-c", "import bnlora"]
        report = subprocess.run(run, check=True, capture_output=True, text=True).stderr
        for name, seconds in own_time(report).most_common(options.modules):
            print(f"{seconds:7.3f} s  {name}")


if __name__ == "__main__":
    main()
