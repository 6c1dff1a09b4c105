"""From texts and labels to batches: templates, label words, lengths, and clear refusals.

The classes are words. A row is the template filled with its text; the likelihood reads the logits
of one token for each class right after it. So every word must be a single token there, and no two
may share it.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bnlora.data import Batch
from bnlora.display import Shown, Table

if TYPE_CHECKING:
    from datasets import Dataset

Truncate = Literal["error", "left", "right"]

_MULTIPLE = 8  # rows are padded to a multiple of it, so that data sets of similar length share a program


@dataclass(frozen=True, repr=False)
class TextData(Shown):
    """Tokenised splits of a classification task.

    Attributes:
        splits: Batches by name.
        words: Word of each class, in the order of the labels.
        label_ids: Token id of each word, shape (class,).

    Example:
        >>> bl.TextData({"train": rows}, words=(" bad", " good"), label_ids=np.array([3, 5]))
        TextData(train 8 x 8; words [' bad', ' good'])
    """

    splits: Mapping[str, Batch]
    words: tuple[str, ...]
    label_ids: Int[np.ndarray, " c"]

    def __getitem__(self, name: str) -> Batch:
        """The split of this name; a `KeyError` names those that exist."""
        if name not in self.splits:
            raise KeyError(f"no split {name!r}; the splits are {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def train(self) -> Batch:
        """The split `"train"`."""
        return self["train"]

    @property
    def validation(self) -> Batch:
        """The split `"validation"`."""
        return self["validation"]

    @property
    def test(self) -> Batch:
        """The split `"test"`."""
        return self["test"]

    @property
    def overview(self) -> tuple[Table, ...]:
        """One row for each split, and the words of the classes."""
        splits = tuple(
            (name, f"{len(rows):,}", str(rows.tokens.shape[1]), rows.lengths, rows.classes)
            for name, rows in self.splits.items()
        )
        header = ("split", "rows", "positions", "tokens in a row", "rows of each class")
        words = tuple((str(c), repr(w), str(self.label_ids[c])) for c, w in enumerate(self.words))
        return (
            Table("Text data", header, splits, texts=frozenset({3, 4})),
            Table("Classes", ("class", "word", "token"), words, texts=frozenset({1})),
        )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name} {len(batch)} x {batch.tokens.shape[1]}" for name, batch in self.splits.items()
        )
        return f"TextData({sizes}; words {list(self.words)})"


def text_classification(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    text: str,
    label: str | None,
    words: Sequence[str],
    template: str = "{text}",
    max_length: int | None = None,
    truncate: Truncate = "error",
) -> TextData:
    """Tokenise a classification data set whose classes are words.

    Args:
        dataset: A data set, or several by split name; a single one becomes the split `"train"`.
        tokenizer: The base model's tokenizer.
        text: Column of the texts.
        label: Column of the labels: integers 0 .. C-1, or strings equal to the words (spaces aside).
            None for rows to predict whose class nobody knows; their labels are -1.
        words: Word of each class, with a leading space where the template ends in none.
        template: Text around each row, with `{text}` in it; it may hold chat markup.
        max_length: Longest row in tokens; the tokenizer's own limit when omitted.
        truncate: What to do with longer texts: refuse, or drop tokens of the *text* from its left or
            right. The template is never cut.

    Returns:
        Batches padded on the right, the words and their token ids.

    Raises:
        ValueError: When a column is missing, a split is empty, the split `"train"` has labels of one
            class only, a label is unknown, a word is not a single token of its own, or a text is too
            long.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the plot is", "the film was"], "label": ["good", "bad"]})
        >>> columns = {"text": "text", "label": "label"}
        >>> data = bl.text_classification(table, tokenizer, **columns, words=[" bad", " good"])
        >>> data.train.labels
        Array([1, 0], dtype=int32)
    """
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    if not splits:
        raise ValueError("the data set has no split")
    if template.count("{text}") != 1:
        raise ValueError(f"the template must contain {{text}} once; got {template!r}")
    ids = _label_ids(tokenizer, words, template)
    limit = max_length or min(int(tokenizer.model_max_length), 2**20)
    batches = {}
    for name, rows in splits.items():
        _check_columns(name, rows, *[column for column in (text, label) if column is not None])
        labels = np.full(len(rows), -1, np.int32) if label is None else _labels(name, rows[label], words)
        tokens = _tokenise(name, rows[text], tokenizer, template, limit, truncate)
        batches[name] = _pad(tokens, labels, tokenizer)
    return TextData(batches, tuple(words), ids)


def _check_columns(split: str, rows: "Dataset", *columns: str) -> None:
    for column in columns:
        if column not in rows.column_names:
            near = difflib.get_close_matches(column, rows.column_names, n=1, cutoff=0.0)
            hint = f", nearest is {near[0]!r}" if near else ""
            raise ValueError(
                f"split {split!r} has no column {column!r}; its columns are {rows.column_names}{hint}"
            )
    if len(rows) == 0:
        raise ValueError(f"split {split!r} is empty")


def _labels(split: str, column: Any, words: Sequence[str]) -> np.ndarray:
    values = list(column)
    names = [word.strip() for word in words]
    if all(isinstance(v, str) for v in values):
        values = [names.index(v.strip()) if v.strip() in names else v for v in values]
    for row, value in enumerate(values):
        whole = isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer())
        if not whole or isinstance(value, bool) or not 0 <= int(value) < len(words):
            raise ValueError(
                f"label {value!r} in row {row} of split {split!r} is neither an integer from 0 to "
                f"{len(words) - 1} nor one of {names}"
            )
    labels = np.asarray(values, np.int32)
    if split == "train" and len(np.unique(labels)) < 2:
        raise ValueError(f"split {split!r} has rows of one class only ({names[labels[0]]!r}); two are needed")
    return labels


def _label_ids(tokenizer: Any, words: Sequence[str], template: str) -> np.ndarray:
    """Token ids that the words have after the template's end, each a single one and all different."""
    if len(words) < 2:
        raise ValueError(f"at least two label words are needed; got {list(words)}")
    tail = template.split("{text}")[1]
    before = tokenizer(tail, add_special_tokens=False)["input_ids"]
    ids = []
    for word in words:
        with_word = tokenizer(tail + word, add_special_tokens=False)["input_ids"]
        if with_word[: len(before)] != before or len(with_word) != len(before) + 1:
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False)["input_ids"])
            other = word.strip() if word.startswith(" ") else f" {word}"
            raise ValueError(
                f"label word {word!r} must be a single token after the template's end {tail!r}; it becomes "
                f"{pieces}; try {other!r} or a commoner word"
            )
        ids.append(with_word[-1])
    for i, word in enumerate(words):
        if ids[i] in ids[:i]:
            raise ValueError(
                f"label words {words[ids.index(ids[i])]!r} and {word!r} are the same token {ids[i]}"
            )
    return np.asarray(ids, np.int32)


def _tokenise(
    split: str, texts: Any, tokenizer: Any, template: str, limit: int, truncate: Truncate
) -> list[list[int]]:
    texts = list(texts)
    for row, value in enumerate(texts):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"the text in row {row} of split {split!r} must be a non-empty string; got {value!r}"
            )
    rows = tokenizer([template.replace("{text}", t) for t in texts])["input_ids"]
    too_long = [i for i, ids in enumerate(rows) if len(ids) > limit]
    if not too_long:
        return rows
    if truncate == "error":
        longest = max(len(rows[i]) for i in too_long)
        raise ValueError(
            f"{len(too_long)} of {len(rows)} texts of split {split!r} are longer than {limit} tokens (first: "
            f"row {too_long[0]}, longest: {longest}); pass truncate='left' or 'right', or a larger max_length"
        )
    if truncate not in ("left", "right"):
        raise ValueError(f"truncate must be 'error', 'left' or 'right'; got {truncate!r}")
    for i in too_long:
        rows[i] = _shorten(texts[i], tokenizer, template, limit, truncate)
    return rows


def _shorten(text: str, tokenizer: Any, template: str, limit: int, truncate: Truncate) -> list[int]:
    """The longest row within the limit whose text keeps its beginning (or its end)."""
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    for size in range(min(len(pieces), limit), 0, -1):
        part = tokenizer.decode(pieces[:size] if truncate == "right" else pieces[-size:])
        ids = tokenizer(template.replace("{text}", part))["input_ids"]
        if len(ids) <= limit:
            return ids
    raise ValueError(f"the template alone is longer than {limit} tokens; shorten it or raise max_length")


def _pad(rows: list[list[int]], labels: np.ndarray, tokenizer: Any) -> Batch:
    length = -(-max(len(ids) for ids in rows) // _MULTIPLE) * _MULTIPLE
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = np.full((len(rows), length), filler, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels))
