"""Files that a command writes, and the fit that it reads again: a fit with its recipe, tables, pages.

A fit takes long, so a full disk must not lose its result. If a result cannot be written to the requested
path, it goes to the cache folder or the folder of temporary files, and standard error reports the path.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import typer
from rich.console import Console
from rich.markup import escape

from bnlora._util.caching import cache_folder
from bnlora._util.files import room, written
from bnlora.app.outcome import ExitCode
from bnlora.app.recipe import Recipe, Schedule
from bnlora.app.tasks import columns_of
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.data.labels import LabelKind
from bnlora.data.splits import Splits
from bnlora.data.tables import naming_lines, read_table
from bnlora.infer.core.stored import load_core
from bnlora.infer.svi.checkpoint import RECORD, fit_size, load_fit, read_notes, save_fit
from bnlora.infer.svi.result import Fit, FitDiverged, FitOutOfMemory
from bnlora.infer.svi.resume import Checkpoints
from bnlora.models.hosts import hosts, leads
from bnlora.models.sharding import mesh

if TYPE_CHECKING:
    from datasets import Dataset


STEPS = "steps"
"""Folder of the checkpoints, in the folder of the fit."""


class KeptFit(NamedTuple):
    """A fit on disk.

    Attributes:
        fit: The fit; if it diverged, its last finite state.
        place: The folder that it is in.
        failed: The error of a fit that diverged or had not enough memory, None for any other.
    """

    fit: Fit
    place: Path
    failed: FitDiverged | FitOutOfMemory | None = None


def fit_and_keep(
    recipe: Recipe,
    schedule: Schedule,
    base: Base,
    data: Splits,
    checkpoints: Checkpoints,
    require: Callable[[int], None],
    console: Console,
) -> KeptFit:
    """Fit and write the fit beside its checkpoints, which are removed if the fit has ended.

    If it diverges or has not enough memory, its last finite state is written. Of several processes, the first
    one writes.

    Args:
        recipe: How model and guide are built.
        schedule: How they are fitted.
        base: The base model of the recipe.
        data: Rows to fit, and optionally a split `validation`.
        checkpoints: Where its state is kept, from `unfinished`.
        require: Raises if a number of bytes does not fit into the folder; called before the fit.
        console: Where to report progress and problems.
    """
    model, guide = recipe.build(base, recipe.likelihood(data))
    require(fit_size(model, guide, data.train, schedule.num_steps))
    failed, steps = None, Path(checkpoints.folder)
    try:
        fit = schedule.fit(
            model,
            guide,
            data.train,
            validation=data.splits.get("validation"),
            checkpoints=checkpoints,
            console=console,
        )
    except (FitDiverged, FitOutOfMemory) as error:
        fit, failed = error.fit, error
        if not len(fit.step_seconds):  # there is nothing to keep
            shutil.rmtree(steps, ignore_errors=True)
            raise

    def write(folder: Path) -> None:
        save_fit(fit, folder, notes=asdict(recipe))
        recipe.save(folder)

    if not leads(base.mesh):
        return KeptFit(fit, steps.parent, failed)
    place = keep(steps.parent, write, console)
    if fit.stopped not in ("interrupted", "memory") and place == steps.parent:
        shutil.rmtree(steps, ignore_errors=True)
    return KeptFit(fit, place, failed)


@contextmanager
def joined(
    out: Path, coordinator: str | None, processes: int, process: int
) -> Iterator[tuple[bool, Callable[[int], None]]]:
    """Join the processes that fit together, and let process 0 make room for the fit.

    Args:
        out: Folder of the fit.
        coordinator: Address of process 0; None for a process that fits alone.
        processes: Number of processes.
        process: Number of this one.

    Yields:
        Whether this process writes and prints, and what raises if a number of bytes does not fit.

    Raises:
        ValueError: If there is a coordinator for one process, or none for several.
    """
    if (coordinator is None) != (processes == 1):
        raise ValueError(
            "several processes need both --coordinator HOST:PORT and --processes N; got "
            f"--processes {processes} {'without' if coordinator is None else 'with'} a coordinator"
        )
    if coordinator is not None:
        hosts(coordinator, num_processes=processes, process_id=process)
    if process:
        yield False, lambda _: None
        return
    with room(out) as require:
        yield True, require


def over_all(base: Base) -> Base:
    """The base on the devices of all processes, which split the rows of a batch; unchanged for one."""
    return base if jax.process_count() == 1 else base.on(mesh(data=jax.device_count()))


def unfinished(out: Path, every: int, *, resume: bool) -> Checkpoints:
    """The checkpoints of the fit in a folder.

    Args:
        out: The folder.
        every: Steps between checkpoints.
        resume: Whether to go on with the fit that was interrupted in this folder.

    Raises:
        ValueError: If there is a fit, or an interrupted one that is not to go on; or none to go on with.
    """
    steps = out / STEPS
    if resume and not steps.is_dir():
        what = "a fit that has ended" if (out / RECORD).exists() else "no interrupted fit"
        raise ValueError(f"{str(out)!r} contains {what}; leave out --resume, and choose another folder")
    if not resume and steps.is_dir():
        raise ValueError(f"{str(out)!r} contains an interrupted fit; go on with --resume, or remove it")
    if not resume and (out / RECORD).exists():
        raise ValueError(f"{str(out)!r} already contains a fit; choose another folder or remove it")
    return Checkpoints(steps, every=every)


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


def restored(
    folder: Path,
    table: Path,
    text: str,
    label: str | None,
    encoding: str,
    *,
    labels_are: LabelKind | None = None,
    rows: "Dataset | None" = None,
) -> tuple[Fit, Recipe, Batch]:
    """The fit in a folder, its recipe, and the tokenised rows; arguments and errors of `read_again`."""
    recipe, base, data = read_again(folder, table, text, label, encoding, labels_are=labels_are, rows=rows)
    if recipe.prior == "core":
        return load_core(folder, base).fit, recipe, data["rows"]
    return load_fit(folder, *recipe.build(base, recipe.likelihood(data))), recipe, data["rows"]


def read_again(
    folder: Path,
    table: Path,
    text: str,
    label: str | None,
    encoding: str,
    *,
    labels_are: LabelKind | None = None,
    rows: "Dataset | None" = None,
    base: Base | None = None,
) -> tuple[Recipe, Base, Splits]:
    """The recipe of a fit, its base, and rows as the fit read its own; errors name lines of the table.

    Args:
        folder: Folder of the fit.
        table: The file of the rows.
        text: Column of the texts.
        label: Column of the labels, or None.
        encoding: Encoding of the file.
        labels_are: In place of what the recipe says.
        rows: The rows, if the file is read already.
        base: The base, if it is loaded already.

    Returns:
        The recipe, the base, and the rows under the name `rows`.
    """
    recipe = Recipe.from_folder(folder)
    if rows is None:
        rows = read_table(table, columns=columns_of(recipe, text, label), encoding=encoding)
    recipe.require_fitted(read_notes(folder))
    if labels_are is not None:
        recipe = replace(recipe, labels_are=labels_are)
    base = recipe.load_base() if base is None else base
    with naming_lines({"rows": table}, encoding=encoding):
        return recipe, base, recipe.read({"rows": rows}, base, text=text, label=label)
