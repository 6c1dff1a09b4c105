"""Pair the notebooks and execute them: python notebooks/run.py {pair,execute} [NAME ...].

The percent scripts `NN_name.py` are the source. `pair` writes a notebook next to each script, with the same
cells and without outputs. `execute` runs notebooks through a Jupyter kernel and writes them, with outputs, to
`build/notebooks` as `.ipynb` and `.html`. To add a notebook, add a script; no list of notebooks exists.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from bnlora._util.caching import programs_folder

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build" / "notebooks"
QUIET = "import rich\nrich.reconfigure(quiet=True)"


def scripts(names: Sequence[str] = ()) -> list[Path]:
    """Scripts whose file names start with one of `names`; all scripts if `names` is empty.

    Raises:
        ValueError: If no script starts with one of the names.
    """
    paths = sorted(FOLDER.glob("[0-9]*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in paths):
            raise ValueError(f"no notebook starts with {name!r}; expected {', '.join(p.stem for p in paths)}")
    return [path for path in paths if not names or path.name.startswith(tuple(names))]


def paired(script: Path) -> NotebookNode:
    """The notebook of a script. The identifier of a cell is its position, so pairing is reproducible."""
    notebook = jupytext.read(script)
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index}"
    return notebook


def executed(notebook: NotebookNode, folder: Path) -> tuple[NotebookNode, str]:
    """The notebook with its outputs, and the message of the error that stopped it, or "".

    An extra first cell, removed afterwards, turns off the progress bars of rich.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUIET))
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})
    problem = ""
    try:
        client.execute()
    except CellExecutionError as error:
        problem = str(error)
    del notebook.cells[0]
    return notebook, problem


def pair(names: Sequence[str]) -> None:
    """Write the notebooks of scripts; of all scripts if `names` is empty."""
    for script in scripts(names):
        nbformat.write(paired(script), script.with_suffix(".ipynb"))


def execute(names: Sequence[str]) -> None:
    """Execute notebooks and print the seconds of each; outputs before a failed cell are written too."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs_folder()))
    BUILD.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in scripts(names):
        start = time.perf_counter()
        notebook, problem = executed(nbformat.read(script.with_suffix(".ipynb"), as_version=4), FOLDER)
        seconds = time.perf_counter() - start
        load = os.getloadavg()[0]
        print(f"{script.stem}: {seconds:.0f} s, load average {load:.1f}", flush=True)
        nbformat.write(notebook, BUILD / f"{script.stem}.ipynb")
        page, _ = HTMLExporter().from_notebook_node(notebook)
        (BUILD / f"{script.stem}.html").write_text(page, encoding="utf-8")
        if problem:
            print(problem, flush=True)
            failed.append(script.stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("pair", "execute"))
    parser.add_argument(
        "names", nargs="*", help="prefixes of file names, such as 02; all notebooks by default"
    )
    arguments = parser.parse_args()
    {"pair": pair, "execute": execute}[arguments.action](arguments.names)


if __name__ == "__main__":
    main()
