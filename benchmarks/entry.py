"""The command line of all benchmarks.

python -m benchmarks                  list the benchmarks, one line each
python -m benchmarks NAME --help      show the options of a benchmark
python -m benchmarks NAME [options]   run a benchmark; `--store` stores its tables in benchmarks/results
python -m benchmarks tables           write stored tables into the documents (`--check`: only compare)
"""

import argparse
import ast
import difflib
import importlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks import tables
from benchmarks.report import Report

HERE = Path(__file__).parent
GROUPS = ("grid", "speed", "posterior", "calibration")
OPTIONAL = ("torch", "peft", "libtpu")


def names() -> dict[str, Path]:
    """The file of every benchmark by name, in the order of the groups."""
    return {path.stem: path for group in GROUPS for path in sorted((HERE / group).glob("[!_]*.py"))}


def first_line(path: Path) -> str:
    """The first line of the docstring of a file, without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path} needs a docstring: the list of benchmarks shows its first line")
    return text.splitlines()[0]


def listing() -> str:
    """The list of benchmarks, one line each, under the question of their group."""
    lines, paths = [], names()
    width = max(map(len, paths))
    for group in GROUPS:
        lines += ["", first_line(HERE / group / "__init__.py")]
        members = {name: path for name, path in paths.items() if path.parent.name == group}
        lines += [f"  {name:{width}}  {first_line(path)}" for name, path in members.items()]
    return "\n".join([*lines, "", "python -m benchmarks NAME --help shows the options."]).strip()


def load(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        SystemExit: If there is no such benchmark, or a package that only benchmarks need is missing.
    """
    paths = names()
    if name not in paths:
        near = difflib.get_close_matches(name, [*paths, "list", "tables"], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SystemExit(f"no benchmark is named {name!r}{hint}\n`python -m benchmarks` lists all of them")
    try:
        return importlib.import_module(f"benchmarks.{paths[name].parent.name}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        raise SystemExit(f"{name} needs {error.name}: pip install -e '.[bench]'") from error


def parser_of(name: str, module: ModuleType) -> argparse.ArgumentParser:
    """Parser with the options of a benchmark and the option `--store`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.options(parser)
    parser.add_argument(
        "--store", nargs="?", const=name, metavar="FILE", help="store tables in benchmarks/results/FILE.md"
    )
    return parser


def command_of(name: str, rest: Sequence[str], store: str | None) -> str:
    """The same command line without `--store`."""
    kept = [x for x in rest if not x.startswith("--store=")]
    if "--store" in kept:
        at = kept.index("--store")
        del kept[at : at + (2 if kept[at + 1 : at + 2] == [store] else 1)]
    return shlex.join(["python", "-m", "benchmarks", name, *kept])


def main(argv: Sequence[str]) -> int:
    """List the benchmarks, write tables into the documents, or run one benchmark."""
    name, *rest = argv or ["list"]
    if name in ("list", "-h", "--help"):
        print(listing())
        return 0
    if name == "tables":
        return tables.main(rest)
    module = load(name)
    given = parser_of(name, module).parse_args(rest)
    with Report(command_of(name, rest, given.store), store=given.store) as report:
        module.run(given, report)
    return 0
