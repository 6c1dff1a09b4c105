"""`bnlora fit --prior core` and `bnlora refit`: the core prior on the tangent model, from table to folder.

Frames, scales and the fit follow from the rows, so most options of other priors have no meaning here. A given
option that would change nothing is an error.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from bnlora._util.display import Showable
from bnlora._util.files import room
from bnlora.app import options
from bnlora.app.kept import exit_if_elsewhere, keep, read_again, unfinished
from bnlora.app.outcome import fit_result, next_command
from bnlora.app.printing import exit_if_interrupted, print_result, reporting
from bnlora.app.recipe import PriorName, Recipe
from bnlora.base import Base
from bnlora.data.formats import ENCODING
from bnlora.data.splits import Splits
from bnlora.infer.core.fit import CoreFit, fit_core
from bnlora.infer.core.refit import refit
from bnlora.infer.core.stored import load_core, save_core
from bnlora.infer.svi.resume import Checkpoints

UNUSED = (
    "rank",
    "scale",
    "lam_max",
    "steps",
    "batch_size",
    "learning_rate",
    "validation",
    "every",
    "resume",
    "coordinator",
    "processes",
    "process",
)
"""Options of `bnlora fit` without a meaning for the core prior."""


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def require_used(context: typer.Context, prior: PriorName) -> None:
    """Raise `ValueError` if an option was typed that the core prior does not read."""
    typed = [name for name in UNUSED if is_given(context, name)]
    if prior == "core" and typed:
        option = f"--{typed[0].replace('_', '-')}"
        raise ValueError(f"{option} has no effect with --prior core; leave it out, or choose another prior")


def fit_and_print_core(
    recipe: Recipe,
    base: Base,
    data: Splits,
    out: Path,
    *,
    targets: Sequence[str] | None,
    seed: int,
    text: str,
    json: bool,
    console: Console,
) -> None:
    """Fit the core prior, write the fit with its recipe, and print it.

    Args:
        recipe: Task and base.
        base: The base.
        data: Rows to fit.
        out: Folder of the fit.
        targets: Modules, or None for those of `bnlora.fit_core`.
        seed: Random seed.
        text: Column of the texts, for the next command.
        json: Whether to print JSON.
        console: Where to report progress.

    Raises:
        ValueError: If `bnlora.fit_core` raises it.
    """
    layers = None if recipe.top_layers is None else slice(-recipe.top_layers, None)
    likelihood, key = recipe.likelihood(data), jax.random.key(seed)
    core = fit_core(
        key, base, data.train, likelihood=likelihood, targets=targets, layers=layers, console=console
    )
    recipe = replace(recipe, targets=tuple(core.frames))
    place = keep(out, lambda folder: _write(core, recipe, folder), console)
    print_core(core, place, text, core.scales.overview, json=json)
    exit_if_elsewhere(out, place)


def _write(core: CoreFit, recipe: Recipe, folder: Path) -> None:
    save_core(core, folder, notes=asdict(recipe))
    recipe.save(folder)


def print_core(core: CoreFit, place: Path, text: str, shown: Sequence[Showable], *, json: bool) -> None:
    """Print the fit, what is shown of it, and the next command."""
    result: dict[str, Any] = fit_result(core.fit, place) | {
        "scales": core.scales.by_name,
        "log_evidence": core.gaussian.log_evidence,
        "seconds": sum(core.seconds.values()),
    }
    print_result(result, *shown, next_command(place, text), json=json)
    exit_if_interrupted(core.fit)


def refit_command(
    folder: options.Folder,
    table: options.Table,
    out: Annotated[Path, typer.Option(help="Folder for the new fit.", show_default=False)],
    kept: Annotated[
        Path | None,
        typer.Option(help="Table of the earlier rows; the refit is then exact.", show_default=False),
    ] = None,
    keep_part: Annotated[
        float, typer.Option("--keep", help="Without --kept: part of what was learned that is kept, 0 to 1.")
    ] = 1.0,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Fit new labelled rows; the posterior of an earlier fit with `--prior core` is the prior."""
    out = out.expanduser()
    with reporting() as progress, room(out):
        unfinished(out, Checkpoints.every, resume=False)
        prior = Recipe.from_folder(folder).prior  # before tables are read and the base is loaded
        if prior != "core":
            raise ValueError(
                f"{str(folder)!r} has the prior {prior!r}; a refit needs a fit of `bnlora fit --prior core`"
            )
        columns = text, label, encoding
        recipe, base, data = read_again(folder, table, *columns, labels_are=labels_are)
        earlier = None
        if kept is not None:
            earlier = read_again(folder, kept, *columns, labels_are=labels_are, base=base)[2]["rows"]
        core = refit(
            jax.random.key(seed),
            load_core(folder, base),
            data["rows"],
            kept=earlier,
            keep=keep_part,
            console=progress,
        )
        place = keep(out, lambda at: _write(core, recipe, at), progress)
        print_core(core, place, text, core.gaussian.overview, json=json)
        exit_if_elsewhere(out, place)
