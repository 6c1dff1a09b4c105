"""`bnlora audit`: how calibrated somebody's existing LoRA is, and what would improve it.

| row | prediction |
|---|---|
| base | the base without adapters; not for an encoder without a classification head |
| adapter | the adapter of the PEFT folder |
| adapter, temperature | each half of the rows with the temperature that the other half chooses, if any |
| core posterior | `bnlora.fit_core` on the rows of `--train`, if given; the adapter is not used |

No number depends on the row that it is computed from: the temperature of a row comes from the other half.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jax import Array
from rich.console import Console
from rich.markup import escape

from bnlora import metrics, priors
from bnlora._util.checks import numpy_generator
from bnlora._util.compilation import keys_from
from bnlora._util.display import Table
from bnlora._util.files import room_for
from bnlora.app import options
from bnlora.app.kept import exit_if_elsewhere, keep
from bnlora.app.outcome import summary_result
from bnlora.app.printing import print_result, reporting, write
from bnlora.app.recipe import Recipe
from bnlora.app.report import page
from bnlora.app.tasks import Task
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.data.formats import ENCODING
from bnlora.data.tables import naming_lines, read_table
from bnlora.infer.approximate.temperature import fit_temperature, tempered
from bnlora.infer.core.fit import fit_core
from bnlora.prediction.imported import load_peft_posterior
from bnlora.prediction.posterior import PointPosterior
from bnlora.prediction.predict import Prediction, predict
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier

BASE, ADAPTER, TEMPERED, CORE = "base", "adapter", "adapter, temperature", "core posterior"
SHOWN = ("accuracy", "nll", "ece", "brier")


def audit(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of an adapter that PEFT saved.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Table of labelled texts to measure on.", show_default=False)],
    word: options.Words,
    train: Annotated[
        Path | None,
        typer.Option(help="Table of rows for a posterior; the adapter's own.", show_default=False),
    ] = None,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    task: Annotated[Task, typer.Option(help="'words', or 'labels' for an adapter of an encoder.")] = "words",
    base: options.BaseName = Recipe.base,
    template: options.Template = None,
    draws: options.Draws = 32,
    seed: options.Seed = 0,
    report: Annotated[Path, typer.Option(help="Path of the report.")] = Path("audit.html"),
    json: options.Json = False,
) -> None:
    """Measure the calibration of an existing adapter, and what a temperature or a posterior would gain."""
    with reporting() as progress, room_for(report, source=data):
        _check_task(task)
        recipe = Recipe(
            words=tuple(word), base=base, template=options.template_of(template, task),
            labels_are=labels_are, task=task,
        )  # fmt: skip
        files = {"test": data} if train is None else {"test": data, "train": train}
        tables = {name: read_table(p, columns=[text, label], encoding=encoding) for name, p in files.items()}
        model = recipe.load_base()
        with naming_lines(files, encoding=encoding):
            rows = recipe.read(tables, model, text=text, label=label)
        fit_key, key, summary_key = keys_from(jax.random.key(seed), 3)
        likelihood = recipe.likelihood(rows)
        predictions = audited(key, model, adapter, rows["test"], likelihood, console=progress)
        if train is not None:
            core = fit_core(fit_key, model, rows.train, likelihood=likelihood, console=progress)
            predictions[CORE] = predict(key, core, rows["test"], num_draws=draws, console=progress)
        labels = np.asarray(rows["test"].labels)
        summaries = {n: metrics.summary(summary_key, p, labels) for n, p in predictions.items()}
        table = scores(summary_key, predictions, summaries, labels)
        page_text = audit_page(f"{adapter.name} on {data.name}", table, predictions, labels)
        place = keep(report, lambda path: write(path, page_text), progress)
        by_name = {name: summary_result(summary) for name, summary in summaries.items()}
        print_result({"report": str(place), "methods": by_name}, table, f"report: {place}", json=json)
        exit_if_elsewhere(report, place)


def _check_task(task: Task) -> None:
    if task not in ("words", "labels"):
        raise ValueError(f"audit measures classes: --task must be 'words' or 'labels'; got {task!r}")


def audited(
    key: Array,
    base: Base,
    adapter: Path,
    test: Batch,
    likelihood: Likelihood,
    *,
    console: Console | None = None,
) -> dict[str, Prediction]:
    """Predictions of rows by the base, the adapter, and the adapter with a temperature.

    Args:
        key: Random key.
        base: The base. Without a classification head of its own it has no prediction.
        adapter: Folder of the adapter.
        test: Rows with labels.
        likelihood: The classes.
        console: Where to draw progress bars.
    """
    point = load_peft_posterior(adapter, base, likelihood=likelihood)
    posteriors = {ADAPTER: point}
    if not getattr(base.config, "new_head", False):
        model = Classifier(base, point.model.sites, priors.point(), likelihood=likelihood)
        posteriors = {BASE: PointPosterior.untouched(model), **posteriors}
    predictions = {
        name: predict(key, posterior, test, num_draws=1, console=console)
        for name, posterior in posteriors.items()
    }
    try:
        return predictions | {TEMPERED: cross_tempered(key, predictions[ADAPTER], test)}
    except ValueError as error:  # an adapter that no temperature improves is a finding, not an end
        if console is not None:
            console.print(f"no temperature: {escape(str(error))}", highlight=False, soft_wrap=True)
        return predictions


def cross_tempered(key: Array, prediction: Prediction, rows: Batch) -> Prediction:
    """Each half of the rows with the temperature that the other half chooses.

    Raises:
        ValueError: If a half has no temperature of least loss, as when all its rows are right.
    """
    labels = np.asarray(rows.labels)
    order = numpy_generator(key).permutation(len(labels))
    halves = order[::2], order[1::2]
    result = np.array(prediction.draw_log_probs, np.float64)
    for own, other in (halves, halves[::-1]):
        temperature = fit_temperature(prediction[other], labels[other])
        result[:, own] = tempered(prediction[own], temperature).draw_log_probs
    return Prediction(result)


def scores(
    key: Array,
    predictions: Mapping[str, Prediction],
    summaries: Mapping[str, metrics.Summary],
    labels: np.ndarray,
) -> Table:
    """Metrics with intervals by method, and the difference of NLL from the adapter on the same rows."""

    def gain(name: str) -> str:
        if name == ADAPTER:
            return ""
        pair = predictions[name], predictions[ADAPTER]
        return str(metrics.paired_difference(key, metrics.nll, *pair, labels))

    lines = (
        (name, *(str(summary[metric]) for metric in SHOWN), gain(name)) for name, summary in summaries.items()
    )
    header = ("method", *SHOWN, "nll minus the adapter's")
    return Table(f"{len(labels):,} rows, 95 % intervals over rows", header, tuple(lines))


def audit_page(title: str, table: Table, predictions: Mapping[str, Prediction], labels: np.ndarray) -> str:
    """HTML page with the scores and a reliability diagram of every method."""
    from bnlora import plots

    figure: Any = plots.reliability({name: {"test": p} for name, p in predictions.items()}, {"test": labels})
    return page(title, [table, (figure, plots.RELIABILITY_CAPTION)])
