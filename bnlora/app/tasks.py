"""The tasks of the command line: how a table becomes rows, and what a prediction adds to a table.

| task    | text                | label                                  | words                       |
|---------|---------------------|----------------------------------------|-----------------------------|
| words   | texts               | the words, or 0, 1, ...                | one for each class          |
| labels  | texts, for encoders | the names of the classes, or 0, 1, ... | the names of the classes    |
| choices | contexts            | number of the right choice             | none                        |
| grades  | texts               | 0, 1, ...                              | the lowest and the highest  |
| votes   | texts               | a list of numbers, one for each word   | one for each class          |
| values  | texts               | a number                               | the lowest and the highest  |
| texts   | texts to be modelled | none                                  | none                        |

A list in a cell of a CSV file is written in JSON: ["Paris", "Rome"].
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np
from rich.console import Console

from bnlora import metrics
from bnlora._util.checks import check_option
from bnlora.data.batch import Batch
from bnlora.data.choices import Normalise, multiple_choice
from bnlora.data.labels import LabelKind
from bnlora.data.outcomes import language_modelling, text_outcomes
from bnlora.data.splits import Splits
from bnlora.data.text import Truncate, text_classification
from bnlora.models.encoder_config import Pooling
from bnlora.prediction.outcomes import predict_texts, predict_values
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import Prediction, predict
from bnlora.program.likelihoods import (
    Completions,
    Labels,
    Likelihood,
    Ordinal,
    Regression,
    SoftLabels,
    Texts,
    Words,
)

if TYPE_CHECKING:
    from datasets import Dataset

Task = Literal["words", "labels", "choices", "grades", "votes", "values", "texts"]

NEEDS_WORDS: Mapping[str, int] = {"words": 2, "labels": 2, "votes": 2, "grades": 2, "values": 2}
"""Fewest words of the tasks that have some."""


@dataclass(frozen=True)
class TaskSettings:
    """Settings of a task: how a table becomes rows, and what their outcome is.

    Attributes:
        words: Word of each class, in the order of the labels; none for some tasks.
        template: Text around each row, with `{text}` in it.
        max_length: Longest row in tokens; the limit of the base if None.
        truncate: Treatment of longer rows: truncate on this side, or raise an error.
        labels_are: "words" or "integers" if a word is an integer, as in `text_classification`.
        task: What the outcome of a row is.
        choices: Column of the choices of each row; for the task "choices".
        normalise: What the log-likelihood of a choice is divided by; for the task "choices".
        prompt: Column of texts that are read before a text and not scored; for the task "texts".
        size: Number of choices or grades, from the training rows.
        location: Centre of the values, from the training rows.
        unit: Spread of the values, from the training rows.
        pooling: What a new classification head reads; for the task "labels" (`bnlora.load`).

    Raises:
        ValueError: If the task is unknown, or has not the words or the column that it needs.
    """

    words: tuple[str, ...]
    template: str = "Review: {text}\nSentiment:"
    max_length: int | None = None
    truncate: Truncate = "error"
    labels_are: LabelKind | None = None
    task: Task = "words"
    choices: str | None = None
    normalise: Normalise = "none"
    prompt: str | None = None
    size: int | None = None
    location: float = 0.0
    unit: float = 1.0
    pooling: Pooling | None = None

    def __post_init__(self):
        object.__setattr__(self, "words", tuple(self.words))  # JSON has lists but no tuples
        check_option("task", self.task, get_args(Task))
        check_option("normalise", self.normalise, get_args(Normalise))
        check_words(self.task, self.words)
        if (self.choices is None) == (self.task == "choices"):
            raise ValueError(
                "the task 'choices' and a column of choices go together; got the task "
                f"{self.task!r} and choices={self.choices!r}"
            )


def check_words(task: Task, words: Sequence[str]) -> None:
    """Raise `ValueError` unless a task has the words that it needs."""
    least = NEEDS_WORDS.get(task, 0)
    exact = task in ("grades", "values") or not least
    if len(words) < least or (exact and len(words) != least):
        needed = f"{'exactly' if exact else 'at least'} {least} words" if least else "no words"
        raise ValueError(f"the task {task!r} takes {needed} (--word); got {list(words)}")


def columns_of(recipe: TaskSettings, text: str, label: str | None) -> list[str]:
    """The columns of a table that a task reads."""
    wanted = [text, *([] if label is None else [label])]
    if recipe.task == "texts":
        wanted = [text, *([] if recipe.prompt is None else [recipe.prompt])]
    return [*wanted, *([recipe.choices] if recipe.task == "choices" and recipe.choices else [])]


def read_rows(
    recipe: TaskSettings, tables: "Mapping[str, Dataset]", base: Any, *, text: str, label: str | None
) -> Splits:
    """Tokenise tables, by split name, as the task of a recipe says; outcomes are unknown without `label`."""
    task, limit = recipe.task, recipe.max_length
    if task == "texts":
        return language_modelling(tables, base, text=text, prompt=recipe.prompt, max_length=limit)
    if task == "choices":
        lists = {name: _parsed(rows, [text, recipe.choices or ""]) for name, rows in tables.items()}
        numbered = {name: _numbered(rows, label) for name, rows in lists.items()}
        return multiple_choice(
            numbered, base, context=text, choices=recipe.choices or "", label=label,
            normalise=recipe.normalise, num_choices=recipe.size, max_length=limit,
        )  # fmt: skip
    options: dict[str, Any] = {
        "text": text, "words": recipe.words, "template": recipe.template, "max_length": limit,
        "truncate": recipe.truncate,
    }  # fmt: skip
    if task == "labels":
        names = options.pop("words")
        return text_classification(
            tables, base, label=label, classes=names, labels_are=recipe.labels_are, **options
        )
    if task == "words" or label is None:
        return text_classification(tables, base, label=label, labels_are=recipe.labels_are, **options)
    parsed = {name: _parsed(rows, [label]) for name, rows in tables.items()}
    return text_outcomes(parsed, base, outcome=label, kind=task, **options)


def measured(recipe: TaskSettings, data: Splits) -> dict[str, Any]:
    """Entries of a recipe that come from training rows: number of choices or grades, scale of values."""
    train = data.train
    if recipe.task == "choices":
        return {"size": int(max(rows.tokens.shape[1] for rows in data.splits.values()))}
    if recipe.task == "grades":
        return {"size": int(np.asarray(train.labels).max()) + 1}
    if recipe.task == "values":
        values = np.asarray(train.outcomes, np.float64)
        return {"location": float(values.mean()), "unit": float(values.std()) or 1.0}
    return {}


def likelihood_of(recipe: TaskSettings, data: Splits) -> Likelihood:
    """The likelihood of a recipe for rows that `read_rows` returned."""
    if recipe.task == "texts":
        return Texts()
    if recipe.task == "choices":
        return Completions(recipe.size or 2)
    if recipe.task == "labels":
        return Labels(len(recipe.words))
    words = Words(data.label_ids)  # type: ignore[attr-defined]
    if recipe.task == "grades":
        return Ordinal(words, recipe.size or 2)
    if recipe.task == "values":
        return Regression(words, location=recipe.location, unit=recipe.unit)
    return SoftLabels(words) if recipe.task == "votes" else words


def class_names(recipe: TaskSettings) -> list[str]:
    """Names of the classes of a task; none if its outcome is not a class."""
    if recipe.task in ("words", "labels", "votes"):
        return [word.strip() for word in recipe.words]
    named = {"choices": "choice ", "grades": "grade "}.get(recipe.task)
    return [] if named is None else [f"{named}{i}" for i in range(recipe.size or 0)]


def column_names(recipe: TaskSettings) -> list[str]:
    """Names of the columns that a prediction adds to a table."""
    if recipe.task == "values":
        return ["mean", "standard deviation", "epistemic standard deviation", "5%", "95%"]
    if recipe.task == "texts":
        return ["log likelihood", "tokens"]
    probabilities = [f"probability {name}" for name in class_names(recipe)]
    return [*probabilities, "entropy", "mutual information", "prediction"]


def predicted(
    key: jax.Array,
    recipe: TaskSettings,
    posterior: Posterior,
    rows: Batch,
    *,
    num_draws: int,
    console: Console,
) -> dict[str, list[Any]]:
    """The columns that a prediction adds to rows, under the names of `column_names`."""
    options: dict[str, Any] = {"num_draws": num_draws, "console": console}
    if recipe.task == "values":
        value = predict_values(key, posterior, rows, **options)
        low, high = value.interval(0.9)
        arrays = [value.mean, value.sd, np.sqrt(value.epistemic_variance), low, high]
    elif recipe.task == "texts":
        text = predict_texts(key, posterior, rows, **options)
        arrays = [text.log_likelihood, text.num_tokens]
    else:
        return class_columns(recipe, predict(key, posterior, rows, **options))
    return {name: array.tolist() for name, array in zip(column_names(recipe), arrays, strict=True)}


def class_columns(recipe: TaskSettings, classes: Prediction) -> dict[str, list[Any]]:
    """The columns that a prediction of classes adds to rows."""
    best = np.array(class_names(recipe))[classes.log_probs.argmax(1)]
    arrays = [*classes.probs.T, classes.entropy, classes.mutual_information, best]
    return {name: array.tolist() for name, array in zip(column_names(recipe), arrays, strict=True)}


@dataclass
class Totals:
    """What the result of a prediction needs of its rows, added up piece by piece.

    Attributes:
        rows: Number of rows.
        sums: Sum of each column of numbers.
        counts: Number of rows of each predicted class.
    """

    rows: int = 0
    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, columns: Mapping[str, list[Any]]) -> None:
        """Add the columns of more rows."""
        self.rows += len(next(iter(columns.values())))
        for name, values in columns.items():
            if name == "prediction":
                self.counts.update(values)
            else:
                self.sums[name] += np.sum(values)

    def result(self, recipe: TaskSettings, num_draws: int) -> dict[str, Any]:
        """The result as one JSON object."""
        known, means = class_names(recipe), {name: float(x / self.rows) for name, x in self.sums.items()}
        result: dict[str, Any] = {"rows": self.rows, "draws": num_draws}
        if recipe.task == "values":
            return result | {"mean": means["mean"], "mean_standard_deviation": means["standard deviation"]}
        if recipe.task == "texts":
            nll = float(-self.sums["log likelihood"] / self.sums["tokens"])
            return result | {"nll_per_token": nll, "perplexity": float(np.exp(nll))}
        return result | {
            "predicted": {name: self.counts[name] for name in known},
            "mean_entropy": means["entropy"],
            "mean_mutual_information": means["mutual information"],
        }


def outcome_summary(
    keys: Sequence[jax.Array], recipe: TaskSettings, posterior: Posterior, rows: Batch, *, num_draws: int,
    console: Console,
) -> metrics.Summary:  # fmt: skip
    """Scores of values or texts with bootstrap intervals; the keys are of the draws and of the bootstrap."""
    options: dict[str, Any] = {"num_draws": num_draws, "console": console}
    if recipe.task == "values":
        return metrics.value_summary(keys[1], predict_values(keys[0], posterior, rows, **options), rows)
    return metrics.text_summary(keys[1], predict_texts(keys[0], posterior, rows, **options))


def _parsed(rows: "Dataset", columns: Sequence[str]) -> "Dataset":
    """The rows with lists in place of their JSON text; other texts stay as they are."""

    def one(value: Any) -> Any:
        if not isinstance(value, str) or not value.lstrip().startswith("["):
            return value
        try:
            return json.loads(value)
        except ValueError:
            return value

    for name in columns:
        if name in rows.column_names:
            values = [one(value) for value in rows[name]]
            rows = rows.remove_columns(name).add_column(name, values)  # type: ignore[call-arg]
    return rows


def _numbered(rows: "Dataset", label: str | None) -> "Dataset":
    """The rows with labels as numbers, which files have as text."""
    if label is None or label not in rows.column_names:
        return rows
    values = [int(x) if isinstance(x, str) and x.strip().lstrip("-").isdigit() else x for x in rows[label]]
    return rows.remove_columns(label).add_column(label, values)  # type: ignore[call-arg]
