"""Files that a command writes: a fit with its recipe, tables, pages.

A fit takes long, so a full disk must not lose its result. If a result cannot be written to the requested
path, it goes to the cache folder or the folder of temporary files, and standard error reports the path.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape

from bnlora._util.caching import cache_folder
from bnlora._util.files import written
from bnlora.app.outcome import ExitCode
from bnlora.app.recipe import Recipe, Schedule
from bnlora.base import Base
from bnlora.data.text import TextData
from bnlora.infer.svi.checkpoint import fit_size, save_fit
from bnlora.infer.svi.result import Fit, FitDiverged


class KeptFit(NamedTuple):
    """A fit on disk.

    Attributes:
        fit: The fit; if it diverged, its last finite state.
        place: The folder that it is in.
        diverged: The error of a fit that diverged, None for any other.
    """

    fit: Fit
    place: Path
    diverged: FitDiverged | None = None


def fit_and_keep(
    recipe: Recipe,
    schedule: Schedule,
    base: Base,
    data: TextData,
    out: Path,
    require: Callable[[int], None],
    console: Console,
) -> KeptFit:
    """Fit and write the fit; if it diverges, write its last finite state.

    Args:
        recipe: How model and guide are built.
        schedule: How they are fitted.
        base: The base model of the recipe.
        data: Rows to fit, and optionally a split `validation`.
        out: Folder for the fit.
        require: Raises if a number of bytes does not fit into the folder; called before the fit.
        console: Where to report progress and problems.
    """
    model, guide = recipe.build(base, data.label_ids)
    require(fit_size(model, guide, data.train, schedule.num_steps))
    diverged = None
    try:
        fit = schedule.fit(
            model, guide, data.train, validation=data.splits.get("validation"), console=console
        )
    except FitDiverged as error:
        fit, diverged = error.fit, error

    def write(folder: Path) -> None:
        save_fit(fit, folder, notes=asdict(recipe))
        recipe.save(folder)

    return KeptFit(fit, keep(out, write, console), diverged)


def keep(path: Path, write: Callable[[Path], Any], console: Console) -> Path:
    """Write a result and return its path; if that is not `path`, report where it is."""
    place, problem = written(path, write, [cache_folder() / "kept", Path(tempfile.gettempdir())])
    if problem:
        text = escape(f"{problem}; the result is in {str(place)!r} instead")
        console.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
    return place


def exit_if_elsewhere(requested: Path, place: Path) -> None:
    """Exit with the code of bad input if a result is not at the requested path."""
    if place != requested:
        raise typer.Exit(ExitCode.BAD_INPUT)
