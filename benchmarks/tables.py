"""Write stored tables into the documents, between `<!-- table: FILE/TITLE -->` and `<!-- end -->`.

`FILE` is a file of `benchmarks/results` without its suffix, and `TITLE` is one of its sections. The command,
the date and the machine are written below the table. With `--check` nothing is written, and the exit code is
1 if a document differs from the stored tables.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.report import RESULTS, Stored

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+)/([^>\n]+?) -->)((?!<!-- table: ).)*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """All documents that may contain a table."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with every table replaced by the stored one.

    Raises:
        ValueError: If a mark has no end, or a table is not stored.
    """
    text, count = MARKED.subn(partial(_section, folder), text)
    if not text.count("<!-- table: ") == text.count("<!-- end -->") == count:
        raise ValueError("every `<!-- table: FILE/TITLE -->` needs its own `<!-- end -->`")
    return text


def _section(folder: Path, mark: re.Match[str]) -> str:
    begin, name, title, _, end = mark.groups()
    path = folder / f"{name}.md"
    if not path.is_file():
        raise ValueError(f"a document has the table {name}/{title}, and {path} does not exist")
    stored = Stored.read(path)
    if title not in stored.sections:
        raise ValueError(f"{path} has no table {title!r}; it has {', '.join(stored.sections)}")
    return f"{begin}\n\n{stored.sections[title]}\n\n`{stored.command}` ({stored.measured})\n\n{end}"


def outdated() -> list[Path]:
    """Documents whose tables differ from the stored ones."""
    return [path for path in documents() if filled(text := path.read_text(encoding="utf-8")) != text]


def main(argv: Sequence[str]) -> int:
    """Write the tables into the documents, or compare them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    given, old = parser.parse_args(argv), outdated()
    done = "differs from" if given.check else "written from"
    for path in old:
        print(f"{path.relative_to(ROOT)}: {done} benchmarks/results")
        if not given.check:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if given.check and old else 0
