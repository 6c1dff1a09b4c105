"""Pair the notebooks and execute them: python notebooks/run.py {pair,execute} [NAME ...].

The percent scripts `NN_name.py` are the source; a notebook beside each, made by `pair`, holds the same cells
and no outputs. `execute` runs notebooks through a Jupyter kernel and leaves them, with outputs, in
`build/notebooks` as `.ipynb` and `.html`. A new notebook is a new script; nothing else has to name it.
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

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build" / "notebooks"
PROGRAMS = FOLDER.parent / ".cache" / "jax"  # where the tests keep compiled programs, too
QUIET = "import rich\nrich.reconfigure(quiet=True)"


def scripts(names: Sequence[str] = ()) -> list[Path]:
    """The scripts whose file names start with one of `names`; all when there are none.

    Raises:
        ValueError: When a name fits no script.
    """
    found = sorted(FOLDER.glob("[0-9]*.py"))
    for name in names:
        if not any(path.name.startswith(name) for path in found):
            raise ValueError(f"no notebook {name!r}; there are {', '.join(path.stem for path in found)}")
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def paired(script: Path) -> NotebookNode:
    """The notebook of a script; its cells' identifiers depend on nothing but their places."""
    made = jupytext.read(script)
    for index, cell in enumerate(made.cells):
        cell.id = f"cell-{index}"
    return made


def executed(notebook: NotebookNode, folder: Path) -> tuple[NotebookNode, str]:
    """The notebook with its outputs, and what went wrong, if anything did.

    A cell that is not kept makes rich quiet: a progress bar is for people who wait.
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
    """Write the notebook of every script."""
    for script in scripts(names):
        nbformat.write(paired(script), script.with_suffix(".ipynb"))


def execute(names: Sequence[str]) -> None:
    """Execute notebooks, print the seconds of each, and keep what was computed even where one fails."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
    BUILD.mkdir(parents=True, exist_ok=True)
    failed = []
    for script in scripts(names):
        began = time.perf_counter()
        notebook, problem = executed(nbformat.read(script.with_suffix(".ipynb"), as_version=4), FOLDER)
        seconds = time.perf_counter() - began
        load = os.getloadavg()[0]
        print(f"{script.stem}: {seconds:.0f} s, load of the last minute {load:.1f}", flush=True)
        nbformat.write(notebook, BUILD / f"{script.stem}.ipynb")
        page, _ = HTMLExporter().from_notebook_node(notebook)
        (BUILD / f"{script.stem}.html").write_text(page, encoding="utf-8")
        if problem:
            print(problem, flush=True)
            failed.append(script.stem)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    """Pair or execute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pair", "execute"))
    parser.add_argument("names", nargs="*", help="starts of file names, such as 02; all when omitted")
    arguments = parser.parse_args()
    {"pair": pair, "execute": execute}[arguments.what](arguments.names)


if __name__ == "__main__":
    main()
