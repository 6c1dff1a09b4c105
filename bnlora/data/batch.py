"""Rows of tokens: the batch that every floor above passes around, and the order in which rows come."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from bnlora._util.checks import brief, check_indices, class_numbers, numpy_generator
from bnlora._util.display import Showable, Shown, facts
from bnlora.data.fields import CachedActivations as CachedActivations
from bnlora.data.fields import Choices as Choices
from bnlora.data.fields import Features as Features


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "labels", "cached", "features", "choices", "outcomes"],
    meta_fields=["whole", "frames"],
)
@dataclass(frozen=True)
class Batch(Shown):
    """Rows of a classification task; a pytree.

    Rows with several choices have one more axis, of the choices, before the positions.

    Attributes:
        tokens: Token ids, shape (row, position), or (row, choice, position).
        mask: True at real tokens, of the same shape; padding may stand on either side.
        labels: Class of each row, shape (row,).
        cached: Activations after the layers that no draw changes, if cached.
        whole: False if only the last position of each row was kept, so activations cannot be computed again.
        features: What a tangent model reads, if cached.
        frames: Checksum of the tangent model that `features` belong to.
        choices: The completions, of rows with several choices.
        outcomes: What is observed in place of a class: votes for the classes, shape (row, class), or a value
            for each row, shape (row,).

    Example:
        >>> rows
        Batch(8 rows of 8 positions)
        >>> len(rows[:3])
        3
    """

    tokens: Int[Array, "n *c t"]
    mask: Bool[Array, "n *c t"]
    labels: Int[Array, " n"]
    cached: CachedActivations | None = None
    whole: bool = True
    features: Features | None = None
    frames: str = ""
    choices: Choices | None = None
    outcomes: Float[Array, "n *c"] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def first(self) -> Int[Array, " n"]:
        """Position of the first real token of each row."""
        return jnp.argmax(self.mask, axis=1)

    @property
    def last(self) -> Int[Array, " n"]:
        """Position of the last real token of each row."""
        return self.mask.shape[1] - 1 - jnp.argmax(self.mask[:, ::-1], axis=1)

    def __getitem__(self, rows: Any) -> "Batch":
        """The given rows, by slice, list of indices, or mask; `ValueError` if a row does not exist."""
        rows = chosen_rows(rows, len(self))
        return jax.tree.map(lambda x: _taken(x, rows), self)

    def cut(self, columns: slice) -> "Batch":
        """The same rows, with some of the columns."""
        tokens, mask, cached, scored = jax.tree.map(
            lambda x: _taken(x, (*(slice(None),) * (self.tokens.ndim - 1), columns)),
            (self.tokens, self.mask, self.cached, self.choices and self.choices.scored),
        )
        choices = self.choices and replace(self.choices, scored=scored)
        return replace(self, tokens=tokens, mask=mask, cached=cached, choices=choices)

    @property
    def used(self) -> Bool[np.ndarray, "n t"]:
        """Columns with a real token in each row, of any choice."""
        mask = np.asarray(self.mask)
        columns: np.ndarray = np.any(mask, axis=tuple(range(1, mask.ndim - 1)))
        return columns

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the tokens of a row: positions, or choices and positions."""
        return self.tokens.shape[1:]

    @property
    def plain(self) -> "Batch":
        """The rows without anything cached."""
        if self.cached is None and self.features is None:
            return self
        return replace(self, cached=None, features=None, frames="")

    def caches(self, depth: int, trunk: str) -> bool:
        """Whether the cached activations are those after `depth` layers of this trunk."""
        return self.cached is not None and (self.cached.depth, self.cached.trunk) == (depth, trunk)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Sizes, lengths, classes, and what is cached."""
        about = {
            "positions": str(self.tokens.shape[-1]),
            "tokens in a row": self.lengths,
            "rows of each class": self.classes,
            "cached activations": "none" if self.cached is None else f"after {self.cached.depth} layers",
            "memory": f"{sum(x.nbytes for x in jax.tree.leaves(self)) / 2**20:,.1f} MiB",
        }
        return (facts(f"Batch of {len(self):,} rows", about),)

    @property
    def lengths(self) -> str:
        """Fewest, median and most real tokens of a row, in words."""
        if not len(self):
            return "none"
        low, middle, high = np.quantile(np.asarray(self.mask).sum(-1), [0.0, 0.5, 1.0])
        return f"{low:.0f} to {high:.0f}, median {middle:g}"

    @property
    def classes(self) -> str:
        """How many rows each class has, in words."""
        found, count = np.unique(np.asarray(self.labels), return_counts=True)
        named = {int(c): "unlabelled" if c < 0 else f"class {c}" for c in found}
        return ", ".join(f"{named[int(c)]}: {n:,}" for c, n in zip(found, count, strict=True)) or "none"

    def __repr__(self) -> str:
        cached = "" if self.cached is None else f", activations of depth {self.cached.depth} cached"
        cached += "" if self.features is None else f", {self.features.phi.shape[2]:,} tangent features cached"
        choices = "" if self.choices is None else f"{self.tokens.shape[1]} choices of "
        return f"Batch({len(self)} rows of {choices}{self.tokens.shape[-1]} positions{cached})"


def _taken(x: Array, index: Any) -> Array:
    """A part of an array, taken by NumPy on a CPU, because JAX would compile a program for every shape."""
    if any(isinstance(one, jax.core.Tracer) for one in (x, index)) or jax.default_backend() != "cpu":
        return x[index]
    return jax.device_put(np.asarray(x)[np.asarray(index) if isinstance(index, Array) else index])


def check_form(name: str, rows: Batch) -> None:
    """Raise `ValueError` unless tokens are integers and the mask marks some in every row of `name`."""
    for field_name in ("tokens", "mask", "labels"):
        if not hasattr(getattr(rows, field_name), "dtype"):
            got = type(getattr(rows, field_name)).__name__
            raise ValueError(f"the {field_name} of the {name} rows must be an array; got a {got}")
    tokens, mask = np.asarray(rows.tokens), np.asarray(rows.mask)
    axes = "(row, position)" if rows.choices is None else "(row, choice, position)"
    if tokens.ndim != axes.count(",") + 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"the tokens of the {name} rows must be integers of shape {axes}; got {tokens.dtype} of shape "
            f"{tokens.shape}"
        )
    if mask.shape != tokens.shape or mask.dtype.kind not in "biu":  # any other shape may broadcast in silence
        raise ValueError(
            f"the mask of the {name} rows must be truth values of shape {tokens.shape}, that of the tokens; "
            f"got {mask.dtype} of shape {mask.shape}"
        )
    if not rows.used.any(1).all():
        raise ValueError(
            f"the mask of the {name} rows marks no token in row {int(rows.used.any(1).argmin())}"
        )


def chosen_rows(rows: Any, count: int) -> Any:
    """Rows in a form that JAX indexes correctly; `ValueError` for what JAX would clamp.

    Args:
        rows: A slice, a list of indices, or a mask.
        count: Number of rows that there are.
    """
    if isinstance(rows, slice | jax.core.Tracer):
        return rows
    found = np.asarray(rows)
    if found.ndim != 1 or (found.dtype == bool and len(found) != count):
        raise ValueError(
            f"rows must be a slice, a list of indices, or a mask of the {count} rows; got {brief(rows)}"
        )
    if found.dtype != bool:
        check_indices("rows", found, count, least=-count)
    return rows if isinstance(rows, Array) else found if found.size else found.astype(int)


@runtime_checkable
class Labelling(Protocol):
    """What knows the classes of rows: a classifier."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        ...


def check_rows(name: str, rows: Batch, model: Labelling) -> None:
    """Raise `ValueError` unless a model can be fitted to the rows: labels and tokens are among its own.

    Args:
        name: Which rows they are, for the message.
        rows: The rows.
        model: What has `num_classes` and, where it has a likelihood and reads tokens, `check_outcomes` and
            `check_tokens`.
    """
    if hasattr(model, "check_outcomes"):
        model.check_outcomes(name, rows)
    else:
        check_labels(name, rows, model.num_classes)
    if hasattr(model, "check_tokens"):
        model.check_tokens(rows)


def check_tokens(
    tokens: Int[Any, "n t"],
    mask: Bool[Any, "n t"],
    size: int,
    tokenizer: Any = None,
    *,
    split: str | None = None,
) -> None:
    """Raise `ValueError` where a real token has no row in an embedding of `size` rows.

    JAX would read the last row in its place. Padding is never read, so its id may be any. Tokens inside a
    compiled program are not known.
    """
    if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    ids = np.asarray(tokens)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens must be integers; got {ids.dtype}")
    unknown = np.asarray(mask) & ((ids < 0) | (ids >= size))
    if unknown.any():
        row = int(unknown.reshape(len(unknown), -1).any(1).argmax())
        said = unknown_token(int(ids[row][unknown[row]][0]), size, tokenizer)
        where = f"row {row}" if split is None else f"row {row} of split {split!r}"
        raise ValueError(f"{where} has {said}; tokenise with the tokenizer of the model")


def unknown_token(index: int, size: int, tokenizer: Any = None) -> str:
    """A token that an embedding of `size` rows does not have, and both sizes, in words."""
    if tokenizer is None:
        return f"the token id {index}, which the model has not: its embedding has {size:,} rows"
    known = tokenizer.convert_ids_to_tokens(index) if 0 <= index < 2**31 else None
    named = f"the token {known!r} of id {index}" if known is not None else f"the token id {index}"
    return (
        f"{named}, which the model has not: the tokenizer has {len(tokenizer):,} tokens, the embedding "
        f"{size:,} rows"
    )


def check_labels(name: str, rows: Batch, classes: int) -> None:
    """Raise `ValueError` unless there are rows, each with one label below `classes`; `name` says whose."""
    check_form(name, rows)
    if not len(rows):
        raise ValueError(f"the {name} rows must be at least one; got none")
    if np.asarray(rows.labels).dtype == bool:  # JAX takes them for a mask where they should be indices
        raise ValueError(
            f"the labels of the {name} rows must be class numbers, integers; got truth values: "
            "labels.astype(int) makes them so"
        )
    labels = class_numbers(f"the {name} rows", rows.labels, rows.tokens.shape[0])
    if labels.min() < 0:
        raise ValueError(f"the {name} rows have no labels (-1); read them with `label=` naming their column")
    if labels.max() >= classes:
        raise ValueError(
            f"the {name} rows have labels up to {labels.max()}, but the model has {classes} classes; give it "
            "the label ids of the same data"
        )


def minibatches(key: Array, num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """An endless stream of row indices, `batch_size` at a time, from shuffled epochs.

    Epochs are joined end to end, so a batch may straddle two of them: the shape never changes, every
    row comes once an epoch, and `num_rows / batch_size` times the sum over a batch is unbiased for
    the sum over all rows, also when `batch_size` does not divide `num_rows`.
    """
    stream = numpy_generator(key)
    waiting = np.empty(0, np.int32)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, stream.permutation(num_rows).astype(np.int32)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


class Part(NamedTuple):
    """Some rows of a batch, cut to the columns that they use.

    Attributes:
        batch: The rows; those after the first `len(rows)` only fill it up to a fixed size.
        rows: Which rows of the whole batch they are.
        columns: Which columns of it were kept.
    """

    batch: Batch
    rows: np.ndarray
    columns: slice


def parts(
    batch: Batch, batch_size: int, *, narrow: bool = True, widths: Literal["many", "few"] = "many"
) -> Iterator[Part]:
    """All rows, `batch_size` at a time and shortest first, each part cut to the columns that it uses.

    Rows of text differ in length, and padding costs as much to run as text. The widths are rounded up to
    8, 16, 24, 32, 48, 64, 96, ... so that few of them have to be compiled; with `widths="few"` to powers of
    two, for programs that take longer to compile than to run. The last part of the rows is filled up by
    repeating row 0; results for the filling must be dropped. Without `narrow` all parts have the
    columns of the widest, so one program serves all: for small models padding costs less than compiling.
    """
    mask = batch.used
    first, last = mask.argmax(1), mask.shape[1] - mask[:, ::-1].argmax(1)
    order = np.argsort(last - first, kind="stable")
    for start in range(0, len(batch), batch_size):
        rows = order[start : start + batch_size]
        used = rows if narrow else order
        columns = _columns(int(first[used].min()), int(last[used].max()), mask.shape[1], widths)
        filled = np.concatenate([rows, np.zeros(batch_size - len(rows), rows.dtype)])
        yield Part(batch[filled].cut(columns), rows, columns)


def _columns(first: int, last: int, total: int, widths: str) -> slice:
    power = 8
    while power < last - first:
        power *= 2
    between = widths == "many" and power > 16 and last - first <= power * 3 // 4
    rounded = power * 3 // 4 if between else power
    width = min(rounded, total)
    begin = min(first, total - width)
    return slice(begin, begin + width)
