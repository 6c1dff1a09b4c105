"""The options of the command line: help texts and shell completion."""

from pathlib import Path
from typing import Annotated

import typer

from bnlora.app.recipe import LEARNING_RATE, LEARNING_RATE_OF_LORA, PriorName, Recipe
from bnlora.app.tasks import Task
from bnlora.data.choices import Normalise
from bnlora.data.labels import LabelKind
from bnlora.data.text import Truncate
from bnlora.models.encoder_config import Pooling

TEMPLATE = Recipe.template.replace("\n", r"\n")  # as typed in a shell
TARGETS = list(Recipe.targets)
MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()  # of all model families
RATES = f"{LEARNING_RATE:g}; {LEARNING_RATE_OF_LORA:g} without a prior"


def template_of(typed: str | None, task: Task = "words") -> str:
    """The template as typed in a shell, or that of the task: an encoder reads the text alone."""
    if typed is None:
        return "{text}" if task == "labels" else Recipe.template
    return typed.replace("\\n", "\n")


def _module_names(incomplete: str) -> list[str]:
    """Module names that start with the typed text, for shell completion."""
    return [name for name in MODULES if name.startswith(incomplete)]


Folder = Annotated[Path, typer.Argument(help="Folder that `bnlora fit` wrote.", show_default=False)]
Table = Annotated[
    Path, typer.Argument(help="A .csv, .jsonl or .parquet file with a column of texts.", show_default=False)
]
TextColumn = Annotated[str, typer.Option(help="Column with the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column with the labels: the words themselves, or 0, 1, ...")]
LabelsAre = Annotated[
    LabelKind | None,
    typer.Option(help="Meaning of the labels if a word is an integer.", show_default=False),
]
Encoding = Annotated[str, typer.Option(help="Encoding of a .csv or .jsonl table, e.g. cp1252 or utf-16.")]
Draws = Annotated[int, typer.Option(help="Number of posterior draws.", min=1)]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

_WORDS = typer.Option(
    help="Word of each class, in the order of the labels; repeat the option: --word ' negative' --word "
    "' positive'. Each word must be a single token directly after the template.",
    show_default=False,
)
Words = Annotated[list[str], _WORDS]
WordsOfTask = Annotated[list[str] | None, _WORDS]
OfTask = Annotated[
    Task,
    typer.Option(
        help="What the label of a row is: the word of its class, the number of the right choice, a grade, "
        "the votes of raters, a value; 'labels' are those of an encoder; 'texts' models the texts."
    ),
]
ChoicesColumn = Annotated[
    str | None, typer.Option(help="Column with the choices of each row, a list.", show_default=False)
]
DividedBy = Annotated[Normalise, typer.Option(help="What the log-likelihood of a choice is divided by.")]
PromptColumn = Annotated[
    str | None,
    typer.Option(help="Column with texts that come before the modelled ones.", show_default=False),
]
Validation = Annotated[
    Path | None, typer.Option(help="Table of rows that choose the best step.", show_default=False)
]
BaseName = Annotated[
    str, typer.Option(help="smollm2, a .gguf file, a Hugging Face folder, or a name on the hub.")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Text around each row, with {text} in it; \\n is a new line.",
        show_default=f"{TEMPLATE}; the text alone for the task 'labels'",
    ),
]
HeadReads = Annotated[
    Pooling | None,
    typer.Option(help="What a new head of an encoder reads; for the task 'labels'.", show_default=False),
]
Targets = Annotated[list[str], typer.Option(help="Modules to adapt.", autocompletion=_module_names)]
TopLayers = Annotated[int | None, typer.Option(help="Number of uppermost layers to adapt.", min=1)]
Prior = Annotated[
    PriorName,
    typer.Option(
        help="Prior of the adapters. 'core': the tangent model, with scales by evidence, for classes. On the "
        "network: 'sparse-gp', 'normal', or 'none', which is plain LoRA."
    ),
]
Scale = Annotated[float, typer.Option(help="Prior scale of an update for an input of unit variance.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of Adam.", min=0, show_default=RATES)]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens.", show_default="the base's")]
Every = Annotated[int, typer.Option(help="Steps between checkpoints in the folder of the fit.", min=1)]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the interrupted fit in this folder; all other options must be the same."
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Address of process 0, where several processes fit together; each runs the same command.",
        show_default=False,
    ),
]
Processes = Annotated[int, typer.Option(help="Number of processes that fit together.", min=1)]
Process = Annotated[int, typer.Option(help="Number of this process; 0 writes and prints.", min=0)]
Cut = Annotated[Truncate, typer.Option(help="Truncate longer texts on this side, or stop with an error.")]

Alpha = Annotated[
    float | None, typer.Option(help="Probability of any false alarm, ever.", show_default="0.05")
]
Floor = Annotated[
    float | None, typer.Option(help="Accuracy to keep.", show_default="that of the labelled reference")
]
Tolerance = Annotated[
    float | None,
    typer.Option(help="Decrease of accuracy below the reference that is no alarm.", show_default="0"),
]

Predictions = Annotated[Path, typer.Option(help="Table to write: .csv, .jsonl or .parquet.")]
Prefix = Annotated[str, typer.Option(help="Prefix of the names of the new columns.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace columns of the table that have the same names.")
]
