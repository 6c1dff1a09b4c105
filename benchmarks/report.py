"""Tables in Markdown: printed row by row during the measurement, and optionally stored in a file.

A file of `results` starts with the command, the date and the machine, followed by one section for each table.
`tables` copies sections into the documents.
"""

import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

RESULTS = Path(__file__).parent / "results"


def line(cells: Sequence[Any]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


@dataclass
class Report:
    """The output of a benchmark, printed and optionally stored.

    Attributes:
        command: The command line of this run.
        store: Name of the file in `results`, without its suffix; None to print only.
        sections: Lines by title, in order.
        folder: Folder of the stored files.
    """

    command: str
    store: str | None = None
    sections: dict[str, list[str]] = field(default_factory=dict)
    folder: Path = RESULTS

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Store the sections if the run ended without an exception."""
        if not self.sections:
            return
        self.progress(f"{time.perf_counter() - self._began:.0f} s in all; {load()}")
        if kind is None and self.store is not None:
            path = self.folder / f"{self.store}.md"
            new = written(self.command, measured(), self.sections)
            if not path.is_file() or not Stored.read(path).same(Stored.of(new)):
                path.write_text(new, encoding="utf-8")
            self.progress(f"stored in {path}")

    def table(self, title: str, header: Sequence[str]) -> "Table":
        """Start a new section with a table; add its rows with `Table.row`."""
        self.text(title, line(header), line(["---"] * len(header)).replace(" ", ""))
        return Table(self, title)

    def text(self, title: str, *lines: str) -> None:
        """Add lines to a section; a new section starts with its title."""
        if title not in self.sections:
            print(f"\n{title}\n", flush=True)
        elif self.sections[title][-1].startswith("|") != lines[0].startswith("|"):
            lines = ("", *lines)
        self.sections.setdefault(title, []).extend(lines)
        print(*lines, sep="\n", flush=True)

    def progress(self, text: str) -> None:
        """Print progress on standard error; it is not stored."""
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Table:
    """A table whose rows are printed as they are added."""

    report: Report
    title: str

    def row(self, *cells: Any) -> None:
        """Add a row."""
        self.report.text(self.title, line(cells))


def measured() -> str:
    """Date, machine, versions, and the load of the last minute."""
    python = ".".join(platform.python_version_tuple()[:2])
    machine = f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return f"{date.today():%Y-%m-%d}, {machine}, Python {python}, jax {version('jax')}"


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def load() -> str:
    """Load averages of the machine, in words."""
    values = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"load of the last 1, 5 and 15 minutes: {values}"


def written(command: str, measured: str, sections: dict[str, list[str]]) -> str:
    """The text of a file of results."""
    parts = [f"Command: `{command}`", f"Measured: {measured}"]
    parts += ["\n".join([f"## {title}", "", *lines]) for title, lines in sections.items()]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Stored:
    """The contents of a file of results."""

    command: str
    measured: str
    sections: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file."""
        return cls.of(path.read_text(encoding="utf-8"))

    @classmethod
    def of(cls, text: str) -> Self:
        """Parse a text."""
        head, *parts = text.split("\n## ")
        command, when = (line.split(": ", 1)[1] for line in head.strip().split("\n\n"))
        sections = dict(part.split("\n", 1) for part in parts)
        return cls(command.strip("`"), when, {title: body.strip() for title, body in sections.items()})

    def same(self, other: Self) -> bool:
        """Whether command and tables are equal; the older file with its date is then kept."""
        return (self.command, self.sections) == (other.command, other.sections)
