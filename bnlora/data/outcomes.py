"""Texts whose outcome is not a class: grades, votes of raters, real values, or the text itself."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from bnlora._util.checks import check_option
from bnlora.data.batch import Batch, check_tokens
from bnlora.data.choices import ChoiceData, aligned
from bnlora.data.splits import check_split, opened
from bnlora.data.tables import RowError
from bnlora.data.text import TextData, Truncate, leading_tokens, text_classification

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["grades", "votes", "values"]


def text_outcomes(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    text: str,
    outcome: str | Sequence[str],
    kind: Kind,
    words: Sequence[str],
    template: str = "{text}",
    max_length: int | None = None,
    truncate: Truncate = "error",
) -> TextData:
    """Tokenise texts whose outcomes are grades, votes or values.

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: The base model's tokenizer, or the base itself.
        text: Column of the texts.
        outcome: Column of the outcomes; for votes also the columns of the classes, in the order of `words`.
        kind: "grades" (whole numbers from 0, for `Ordinal`), "votes" (a number for each class, for
            `SoftLabels`) or "values" (real numbers, for `Regression`).
        words: The words that the likelihood reads. Grades and values have two, at the lower and the upper
            end; votes have one for each class.
        template: As in `text_classification`.
        max_length: As in `text_classification`.
        truncate: As in `text_classification`.

    Returns:
        Batches with grades as labels, or votes or values as `Batch.outcomes`; the words and their token ids.

    Raises:
        ValueError: If an outcome is missing, is not a number of its kind, or a row has not one vote for each
            word; and under the same conditions as `text_classification`.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the plot is", "the film was"], "stars": [1.5, 4.0]})
        >>> columns = {"text": "text", "outcome": "stars", "kind": "values"}
        >>> data = bl.text_outcomes(table, tokenizer, **columns, words=[" bad", " good"])
        >>> data.train.outcomes
        Array([1.5, 4. ], dtype=float32)
    """
    check_option("kind", kind, get_args(Kind))
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    options: Any = {"template": template, "max_length": max_length, "truncate": truncate}
    data = text_classification(splits, tokenizer, text=text, label=None, words=words, **options)
    read = {name: _outcomes(name, rows, outcome, kind, len(words)) for name, rows in splits.items()}
    return replace(data, splits={name: _with(data[name], values, kind) for name, values in read.items()})


def _with(batch: Batch, values: np.ndarray, kind: Kind) -> Batch:
    """The rows with their outcomes; rows with votes also have the class with most of them."""
    if kind == "grades":
        return replace(batch, labels=jnp.asarray(values.astype(np.int32)))
    classes = values.argmax(1) if kind == "votes" else np.zeros(len(values))
    outcomes = jnp.asarray(values.astype(np.float32))
    return replace(batch, labels=jnp.asarray(classes.astype(np.int32)), outcomes=outcomes)


def _outcomes(
    split: str, rows: "Dataset", outcome: str | Sequence[str], kind: Kind, classes: int
) -> np.ndarray:
    """The outcomes of a split as numbers, shape (row,), or (row, class) for votes."""
    columns = [outcome] if isinstance(outcome, str) else list(outcome)
    check_split(split, rows, columns)
    if kind != "votes" and len(columns) != 1:
        raise ValueError(f"{kind} are in one column; got {columns}")
    table = rows[columns[0]] if len(columns) == 1 else zip(*(rows[name] for name in columns), strict=True)
    read = _vote if kind == "votes" else _number
    values = [read(split, row, value) for row, value in enumerate(table)]
    for row, value in enumerate(values):
        _check(split, row, value, kind, classes)
    return np.array(values)


def _check(split: str, row: int, value: Any, kind: Kind, classes: int) -> None:
    if kind == "grades" and (value < 0 or value != round(value)):
        raise RowError("the grade in ", split, row, f" must be a whole number from 0; got {value:g}")
    if kind == "votes" and (len(value) != classes or min(value) < 0 or not sum(value)):
        needed = f" must be {classes} numbers of at least 0, not all 0, one for each word"
        raise RowError("the votes in ", split, row, f"{needed}; got {value}")


def _number(split: str, row: int, value: Any) -> float:
    """A finite number, also from text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise RowError("the outcome in ", split, row, f" must be a finite number; got {value!r}")
    return number


def _vote(split: str, row: int, value: Any) -> list[float]:
    """The votes of a row."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise RowError("the votes in ", split, row, f" must be a list of numbers; got {value!r}")
    return [_number(split, row, one) for one in value]


def language_modelling(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    text: str,
    prompt: str | None = None,
    max_length: int | None = None,
) -> ChoiceData:
    """Tokenise texts that are themselves the outcome, token by token.

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: The base model's tokenizer, or the base itself.
        text: Column of the texts whose tokens are scored.
        prompt: Column of texts before them, which are read and not scored.
        max_length: Most tokens of a row; the tokenizer's own limit if omitted. Longer rows are refused.

    Returns:
        Batches for a `Classifier` with `likelihood=bl.likelihoods.Texts()`. Without a prompt the first token
        is scored only if the tokenizer adds one before it.

    Raises:
        ValueError: If a column is missing, a split is empty, a text is no string or has no token that can be
            scored, or a row is too long.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the film was good", "the plot is"]})
        >>> bl.language_modelling(table, tokenizer, text="text").train
        Batch(2 rows of 1 choices of 8 positions)
    """
    splits, tokenizer, base, limit = opened(dataset, tokenizer, max_length, least=2)
    batches = {}
    for name, rows in splits.items():
        check_split(name, rows, [text, *([] if prompt is None else [prompt])])
        prompts = [""] * len(rows) if prompt is None else list(rows[prompt])
        batches[name] = _texts(name, list(rows[text]), prompts, tokenizer, limit)
        if base is not None:
            check_tokens(batches[name].tokens, batches[name].mask, base.modules["lm_head"][1], tokenizer)
    return ChoiceData(batches, 1, "none")


def _texts(split: str, texts: list[Any], prompts: list[Any], tokenizer: Any, limit: int) -> Batch:
    """Rows of one text each, at the right end."""
    for row, (value, before) in enumerate(zip(texts, prompts, strict=True)):
        if not isinstance(value, str) or not isinstance(before, str):
            raise RowError("the text in ", split, row, f" must be a string; got {value!r} after {before!r}")
    start = leading_tokens(tokenizer, "{text}")
    whole = [p + t for p, t in zip(prompts, texts, strict=True)]
    encoded = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    given = tokenizer([p.rstrip() for p in prompts], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [start + ids for ids in encoded]
    # A token needs one before it.
    counts = [len(ids) - max(len(start) + len(own), 1) for ids, own in zip(rows, given, strict=True)]
    for row, (ids, count) in enumerate(zip(rows, counts, strict=True)):
        if count < 1:
            raise RowError("the text in ", split, row, f" has no token to score; got {texts[row]!r}")
        if len(ids) > limit:
            raise RowError("the text in ", split, row, f" has {len(ids)} tokens, more than {limit}; split it")
    sequences = [[pair] for pair in zip(rows, counts, strict=True)]
    return aligned(sequences, np.ones((len(rows), 1), np.float32), [0] * len(rows), tokenizer)
