"""From texts and labels to batches: templates, label words, lengths, and clear error messages.

The classes are words. A row is the template filled with its text. The likelihood uses the logits of one token
for each class at the position after the row (`bnlora.data.labels`). Tokens that the tokenizer adds at the
beginning of a row are kept. Tokens that it would append are dropped, so a row ends with the last token of the
template.

An encoder reads the first token of a row with its classification head. Its classes have names that are never
tokens, and rows have all tokens that the tokenizer adds: [CLS] text [SEP].
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bnlora._util.checks import check_option
from bnlora._util.display import Table
from bnlora.data.batch import Batch, check_tokens, unknown_token
from bnlora.data.labels import LabelsAre, check_words, label_tokens, read_labels
from bnlora.data.splits import Splits, check_split, filler, opened, padded
from bnlora.data.tables import RowError

if TYPE_CHECKING:
    from datasets import Dataset

Truncate = Literal["error", "left", "right"]
Encoder = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True, repr=False)
class TextData(Splits):
    """Tokenised splits of a classification task.

    Attributes:
        splits: Batches by name.
        words: Word of each class, in the order of the labels; for an encoder its name.
        label_ids: Token id of each word, shape (class,); empty for an encoder.

    Example:
        >>> bl.TextData({"train": rows}, words=(" bad", " good"), label_ids=np.array([3, 5]))
        TextData(train 8 x 8; words [' bad', ' good'])
    """

    words: tuple[str, ...]
    label_ids: Int[np.ndarray, " c"]

    @property
    def overview(self) -> tuple[Table, ...]:
        """One row for each split, and the words of the classes."""
        splits = tuple(
            (name, f"{len(rows):,}", str(rows.tokens.shape[1]), rows.lengths, rows.classes)
            for name, rows in self.splits.items()
        )
        header = ("split", "rows", "positions", "tokens in a row", "rows of each class")
        ids = map(str, self.label_ids) if len(self.label_ids) else ["none"] * len(self.words)
        words = tuple((str(c), repr(w), i) for c, (w, i) in enumerate(zip(self.words, ids, strict=True)))
        return (
            Table("Text data", header, splits, texts=frozenset({3, 4})),
            Table("Classes", ("class", "word", "token"), words, texts=frozenset({1})),
        )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name} {len(batch)} x {batch.tokens.shape[1]}" for name, batch in self.splits.items()
        )
        kind = "words" if len(self.label_ids) else "classes"
        return f"TextData({sizes}; {kind} {list(self.words)})"


def text_classification(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    text: str,
    label: str | None,
    words: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    template: str = "{text}",
    max_length: int | None = None,
    truncate: Truncate = "error",
    labels_are: LabelsAre | None = None,
) -> TextData:
    """Tokenise a classification data set whose classes are words, or the labels of an encoder.

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: The base model's tokenizer, or the base itself. With the base, tokens without an embedding
            row raise an error here; otherwise the model raises it.
        text: Column of the texts.
        label: Column of the labels: the words (ignoring spaces), or integers 0 .. C-1 of any stored type.
            None for rows of unknown class; their labels are -1.
        words: Word of each class. Begin it with a space unless the template ends with one.
        classes: Name of each class, in place of `words`, if the base is an encoder: the names need not be
            tokens, and rows keep all tokens that the tokenizer adds.
        template: Text around each row, containing `{text}`; it can include chat markup.
        max_length: Longest row in tokens; the tokenizer's own limit if omitted.
        truncate: What to do with longer texts: raise an error, or cut the *text* at its left or right end.
            The template is never cut.
        labels_are: "words" or "integers", if labels could be either (words "1", "2", "3" and a label 1); or
            a mapping from labels to words.

    Returns:
        Batches padded on the right, the words and their token ids.

    Raises:
        ValueError: If a column is missing, a split is empty, the split `"train"` has labels of only one
            class, a label is missing, unknown or ambiguous, a word is not a distinct single token, a text is
            too long, the base has no row for a token, not exactly one of `words` and `classes` is given or
            the base needs the other one, or an encoder's head has other classes.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the plot is", "the film was"], "label": ["good", "bad"]})
        >>> columns = {"text": "text", "label": "label"}
        >>> data = bl.text_classification(table, tokenizer, **columns, words=[" bad", " good"])
        >>> data.train.labels
        Array([1, 0], dtype=int32)
    """
    splits, tokenizer, base, limit = opened(dataset, tokenizer, max_length, least=1)
    if template.count("{text}") != 1:
        raise ValueError(f"the template must contain {{text}} once; got {template!r}")
    check_option("truncate", truncate, get_args(Truncate))
    named, ids, encode = _form(tokenizer, base, words, classes, template)
    batches = {}
    for name, rows in splits.items():
        check_split(name, rows, [text] if label is None else [text, label])
        labels = (
            np.full(len(rows), -1, np.int32)
            if label is None
            else _labels(name, rows, label, named, labels_are)
        )
        tokens = _tokenise(name, list(rows[text]), encode, limit, truncate)
        batches[name] = _pad(tokens, labels, tokenizer)
    if base is not None:
        _check_known(base, batches, dict(zip(named, ids.tolist(), strict=False)))
    return TextData(batches, named, ids)


def _form(
    tokenizer: Any, base: Any, words: Sequence[str] | None, classes: Sequence[str] | None, template: str
) -> tuple[tuple[str, ...], Int[np.ndarray, " c"], Encoder]:
    """The names of the classes, the tokens of their words, and the function from texts to rows."""
    is_encoder = getattr(base, "is_encoder", classes is not None)
    if (words is None) == (classes is None) or is_encoder != (words is None):
        got = {name for name, given in (("words", words), ("classes", classes)) if given is not None}
        raise ValueError(
            f"give {_NEEDED[getattr(base, 'is_encoder', None)]}; got {' and '.join(sorted(got)) or 'neither'}"
        )
    if classes is None:
        assert words is not None  # exactly one is given
        return tuple(words), label_tokens(tokenizer, words, template), _encoder(tokenizer, template)
    check_words(classes, "classes")
    if base is not None:
        _check_head(base, classes)
    return tuple(classes), np.empty(0, np.int32), _whole(tokenizer, template)


_NEEDED = {
    None: "either words, for a language model, or classes, for an encoder",
    False: "words, one token for each class, because the base is a language model",
    True: "classes, the names of the labels, because the base is an encoder",
}


def _check_head(base: Any, classes: Sequence[str]) -> None:
    """Raise `ValueError` unless the classification head has these classes, in this order if it names them."""
    size, own = base.modules["lm_head"][1], base.config.label_names
    if len(classes) != size:
        raise ValueError(
            f"classes must be {size} names, one for each output of the base's head; got {len(classes)}"
        )
    places = {name.casefold(): i for i, name in enumerate(own)}
    if any(places.get(name.strip().casefold(), i) != i for i, name in enumerate(classes)):
        raise ValueError(
            f"classes must be in the order of the base's classification head, {list(own)}; "
            f"got {list(classes)}"
        )


def _check_known(base: Any, batches: Mapping[str, Batch], label_ids: Mapping[str, int]) -> None:
    """Raise `ValueError` if rows or label words have a token without a row in the base."""
    size = base.vocab_size
    for word, index in label_ids.items():
        if index >= size:
            raise ValueError(f"the label word {word!r} is {unknown_token(index, size, base.tokenizer)}")
    for name, rows in batches.items():
        check_tokens(rows.tokens, rows.mask, size, base.tokenizer, split=name)


def _labels(
    split: str, rows: "Dataset", label: str, words: Sequence[str], labels_are: LabelsAre | None
) -> np.ndarray:
    class_names = getattr(rows.features[label], "names", None)
    labels = read_labels(split, rows[label], words, labels_are=labels_are, class_names=class_names)
    if split == "train" and len(np.unique(labels)) < 2:
        only = words[labels[0]].strip()
        raise ValueError(f"split {split!r} has rows of one class only ({only!r}); two are needed")
    return labels


def _encoder(tokenizer: Any, template: str) -> Encoder:
    """Make a function from texts to rows: the tokenizer's leading tokens, then those of the filled template.

    Tokens that the tokenizer appends are dropped, because the logits are read at the last token. Leading
    tokens are not added if the template already begins with them.
    """
    before = leading_tokens(tokenizer, template)

    def encode(texts: list[str]) -> list[list[int]]:
        filled = [template.replace("{text}", text) for text in texts]
        rows = tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"]
        return [before + ids for ids in rows]

    return encode


def _whole(tokenizer: Any, template: str) -> Encoder:
    """Make a function from texts to rows with all tokens that the tokenizer adds, for an encoder."""
    if not leading_tokens(tokenizer, template):
        raise ValueError(
            "the classification head of an encoder reads a token that the tokenizer adds before a text, as "
            f"[CLS]; this tokenizer adds none to the template {template!r}"
        )

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer([template.replace("{text}", text) for text in texts], verbose=False)["input_ids"]

    return encode


def leading_tokens(tokenizer: Any, template: str) -> list[int]:
    """The tokens that the tokenizer adds before a text, unless the template already begins with them.

    Raises:
        ValueError: If the tokenizer adds tokens within a text.
    """
    sample = template.replace("{text}", "x")
    own, whole = (tokenizer(sample, add_special_tokens=added)["input_ids"] for added in (False, True))
    starts = [i for i in range(len(whole) - len(own) + 1) if whole[i : i + len(own)] == own]
    if not starts:
        raise ValueError(
            "the tokenizer must add its special tokens before and after a text, not within it; got "
            f"{tokenizer.convert_ids_to_tokens(whole)} for {sample!r}"
        )
    before = whole[: starts[0]]
    return [] if own[: len(before)] == before else before


def _tokenise(
    split: str, texts: list[Any], encode: Encoder, limit: int, truncate: Truncate
) -> list[list[int]]:
    for row, value in enumerate(texts):
        if not isinstance(value, str) or not value.strip():
            raise RowError("the text in ", split, row, f" must be a non-empty string; got {value!r}")
    rows = encode(texts)
    too_long = [i for i, ids in enumerate(rows) if len(ids) > limit]
    if too_long and truncate == "error":
        longest = max(len(rows[i]) for i in too_long)
        count = f"{len(too_long)} of {len(rows)} texts of split {split!r}"
        raise RowError(
            f"{count} are longer than {limit} tokens (first: ",
            split,
            too_long[0],
            f", longest: {longest}); pass truncate='left' or 'right', or a larger max_length",
        )
    for i in too_long:
        shortened = _shorten(texts[i], encode, limit, truncate)
        if shortened is None:
            raise RowError(
                f"the template takes {len(encode([''])[0])} of {limit} tokens, and no letter of the text in ",
                split,
                i,
                " fits; shorten the template or increase max_length",
            )
        rows[i] = shortened
    return rows


def _shorten(text: str, encode: Encoder, limit: int, truncate: Truncate) -> list[int] | None:
    """The longest row within the limit that keeps the beginning (or end) of the text, cut between letters."""
    import regex

    cuts = [0, *(letter.end() for letter in regex.finditer(r"\X", text))]  # \X: a letter with its accents

    def row(size: int) -> list[int]:
        return encode([text[: cuts[size]] if truncate == "right" else text[cuts[-size - 1] :]])[0]

    # Token counts are not exactly monotone in the size: the result fits, but rarely a longer part fits too.
    size = bisect.bisect(range(1, len(cuts)), limit, key=lambda size: len(row(size)))
    return row(size) if size else None


def _pad(rows: list[list[int]], labels: np.ndarray, tokenizer: Any) -> Batch:
    length = padded(max(len(ids) for ids in rows))
    tokens = np.full((len(rows), length), filler(tokenizer), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return Batch(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels))
