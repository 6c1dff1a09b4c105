"""From contexts and completions to batches: multiple choice, and classes of several tokens.

The tokens of a completion are those that the text of context and completion has beyond the context's own.
Blanks at the end of a context belong to the completion, because tokenizers join a blank with the next word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnlora._util.checks import check_option, is_integer
from bnlora._util.display import Table
from bnlora.data.batch import Batch, Choices, check_tokens
from bnlora.data.splits import Splits, check_split, filler, opened, padded
from bnlora.data.tables import RowError
from bnlora.data.text import leading_tokens

if TYPE_CHECKING:
    from datasets import Dataset

Normalise = Literal["none", "tokens", "characters"]


@dataclass(frozen=True, repr=False)
class ChoiceData(Splits):
    """Tokenised splits of a task whose classes are completions.

    Attributes:
        splits: Batches by name, with `Batch.choices`.
        num_choices: Most choices of a row.
        normalise: What the log-likelihood of a completion is divided by.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the film was", "the plot is"], "gold": [0, 1]})
        >>> words = [" good film", " bad"]  # classes of several tokens
        >>> data = bl.multiple_choice(table, tokenizer, context="text", choices=words, label="gold")
        >>> data.num_choices, data.train
        (2, Batch(2 rows of 2 choices of 8 positions))
    """

    num_choices: int
    normalise: Normalise

    @property
    def overview(self) -> tuple[Table, ...]:
        """One row for each split."""
        splits = tuple(
            (name, f"{len(rows):,}", str(rows.tokens.shape[-1]), rows.lengths, rows.classes)
            for name, rows in self.splits.items()
        )
        header = ("split", "rows", "positions", "tokens of a choice", "rows of each answer")
        return (Table(f"Multiple choice of {self.num_choices}", header, splits, texts=frozenset({3, 4})),)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self.splits.items())
        return f"ChoiceData({sizes}; {self.num_choices} choices, normalised by {self.normalise})"


def multiple_choice(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    context: str,
    choices: str | Sequence[str],
    label: str | None,
    normalise: Normalise = "none",
    num_choices: int | None = None,
    max_length: int | None = None,
) -> ChoiceData:
    """Tokenise a data set whose classes are completions of a context.

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: The base model's tokenizer, or the base itself.
        context: Column of the contexts: a text, or one text for each choice.
        choices: Column of the completions, a list of texts for each row; or one list of texts for all rows,
            the words of classes that have several tokens. Begin each with a space unless contexts end in one.
        label: Column of the number of the right choice; None for rows of unknown answer, with label -1.
        normalise: What the log-likelihood of a completion is divided by: nothing, its number of tokens, or
            its number of characters.
        num_choices: Most choices of a row, at least those of the rows, as for rows that a fitted model reads
            later; those of the rows if omitted.
        max_length: Most tokens of context and completion; the tokenizer's own limit if omitted. Longer
            contexts are cut at their beginning, behind the tokens that the tokenizer adds.

    Returns:
        Batches for a `Classifier` with `likelihood=bl.likelihoods.Completions(data.num_choices)`.

    Raises:
        ValueError: If a column is missing, a split is empty, a row has fewer than two choices or an empty
            one, contexts and choices of a row differ in number, a label is not the number of a choice, or a
            completion alone is too long.

    Example:
        >>> from datasets import Dataset
        >>> questions, answers = ["the film was", "the plot is"], [[" good", " bad"]] * 2
        >>> table = Dataset.from_dict({"question": questions, "answers": answers, "gold": [0, 1]})
        >>> bl.multiple_choice(table, tokenizer, context="question", choices="answers", label="gold")
        ChoiceData(train 2; 2 choices, normalised by none)
    """
    check_option("normalise", normalise, get_args(Normalise))
    splits, tokenizer, base, limit = opened(dataset, tokenizer, max_length, least=2)
    read = {name: _read(name, rows, context, choices, label) for name, rows in splits.items()}
    most = max(len(row.choices) for rows in read.values() for row in rows)
    if num_choices is not None and most > num_choices:
        raise ValueError(f"a row has {most} choices, more than num_choices={num_choices}")
    most = most if num_choices is None else num_choices
    batches = {name: _batch(name, rows, tokenizer, most, limit, normalise) for name, rows in read.items()}
    for name, rows in batches.items():
        if base is not None:
            check_tokens(rows.tokens, rows.mask, base.vocab_size, tokenizer, split=name)
    return ChoiceData(batches, most, normalise)


@dataclass(frozen=True)
class _Row:
    """Contexts, completions and the right answer of a row."""

    contexts: Sequence[str]
    choices: Sequence[str]
    label: int


def _read(
    split: str, rows: "Dataset", context: str, choices: str | Sequence[str], label: str | None
) -> list[_Row]:
    wanted = [context, *([choices] if isinstance(choices, str) else []), *([label] if label else [])]
    check_split(split, rows, wanted)
    given = rows[choices] if isinstance(choices, str) else [list(choices)] * len(rows)
    labels = rows[label] if label else [-1] * len(rows)
    return [
        _row(split, i, *values) for i, values in enumerate(zip(rows[context], given, labels, strict=True))
    ]


def _row(split: str, row: int, context: Any, choices: Any, label: Any) -> _Row:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise RowError(
            "the choices in ", split, row, f" must be a list of at least two texts; got {choices!r}"
        )
    if any(not isinstance(text, str) or not text.strip() for text in choices):
        raise RowError("the choices in ", split, row, f" must be non-empty texts; got {choices!r}")
    contexts = [context] * len(choices) if isinstance(context, str) else context
    if not isinstance(contexts, Sequence) or len(contexts) != len(choices):
        raise RowError(
            "the context in ", split, row, f" must be a text, or {len(choices)} texts; got {context!r}"
        )
    if any(not isinstance(text, str) or not text.strip() for text in contexts):
        raise RowError("the context in ", split, row, f" must be a non-empty text; got {context!r}")
    number = label.tolist() if hasattr(label, "tolist") else label
    if not is_integer(number) or not -1 <= number < len(choices):
        raise RowError(
            "the label in ", split, row, f" must be a number from 0 to {len(choices) - 1}; got {label!r}"
        )
    return _Row(contexts, choices, int(number))


def _batch(
    split: str, rows: Sequence[_Row], tokenizer: Any, most: int, limit: int, normalise: Normalise
) -> Batch:
    texts = [pair for row in rows for pair in zip(row.contexts, row.choices, strict=True)]
    encoded = iter(_encode(texts, tokenizer))
    before = len(leading_tokens(tokenizer, "{text}"))
    sequences: list[list[tuple[list[int], int]]] = []
    for i, row in enumerate(rows):
        own = [next(encoded) for _ in row.choices]
        longest = max(count for _, count in own)
        if longest + before >= limit:
            said = f" has {longest} tokens, which leaves no room for its context within {limit}"
            raise RowError("a choice in ", split, i, said)
        sequences.append([(_cut(ids, limit, before), count) for ids, count in own])
    size = np.ones((len(rows), most), np.float32)
    for i, pairs in enumerate(sequences):
        for c, (_, count) in enumerate(pairs):
            size[i, c] = {"none": 1, "tokens": count, "characters": len(rows[i].choices[c])}[normalise]
    return aligned(sequences, size, [row.label for row in rows], tokenizer)


def aligned(
    sequences: Sequence[Sequence[tuple[list[int], int]]],
    size: Float[np.ndarray, "n c"],
    labels: Sequence[int],
    tokenizer: Any,
) -> Batch:
    """A batch of rows with choices, all of which end at the last position.

    Args:
        sequences: For each row and choice its tokens, and how many of the last ones are scored.
        size: Number by which each log-likelihood is divided; it has a column for every choice of the batch.
        labels: Class of each row.
        tokenizer: The tokenizer, which has the token of the padding.
    """
    length = max(len(ids) for row in sequences for ids, _ in row)
    shape = (*size.shape, padded(length))
    tokens = np.full(shape, filler(tokenizer), np.int32)
    mask, scored = np.zeros(shape, bool), np.zeros(shape, bool)
    for i, row in enumerate(sequences):
        for c, (ids, count) in enumerate(row):
            tokens[i, c, -len(ids) :], mask[i, c, -len(ids) :], scored[i, c, -count:] = ids, True, True
    choices = Choices(jnp.asarray(scored), jnp.asarray(size), int(scored.sum(-1).max()))
    classes = jnp.asarray(np.array(labels, np.int32))
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), classes, choices=choices)


def _cut(ids: list[int], limit: int, before: int) -> list[int]:
    """The tokens within the limit: the leading ones, then the end."""
    return ids if len(ids) <= limit else ids[:before] + ids[len(ids) - limit + before :]


def _encode(texts: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Tokens of context and completion, and how many of them are the completion's, at least one."""
    before = leading_tokens(tokenizer, "{text}")
    stems = [context.rstrip() for context, _ in texts]
    whole = tokenizer([c + e for c, e in texts], add_special_tokens=False, verbose=False)["input_ids"]
    part = tokenizer(stems, add_special_tokens=False, verbose=False)["input_ids"]
    return [(before + ids, max(len(ids) - len(own), 1)) for ids, own in zip(whole, part, strict=True)]
