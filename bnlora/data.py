"""Rows of tokens: the batch that every floor above passes around, and the order in which rows come."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "labels", "hidden"],
    meta_fields=["depth"],
)
@dataclass(frozen=True)
class Batch:
    """Rows of a classification task; a pytree.

    Attributes:
        tokens: Token ids, shape (row, position).
        mask: True at real tokens, shape (row, position); padding may stand on either side.
        labels: Class of each row, shape (row,).
        hidden: Activations after the first `depth` layers, shape (row, position, width), if cached.
        depth: Number of layers that `hidden` has passed.
    """

    tokens: Int[Array, "n t"]
    mask: Bool[Array, "n t"]
    labels: Int[Array, " n"]
    hidden: Float[Array, "n t d"] | None = None
    depth: int = field(default=0)

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, rows: Any) -> "Batch":
        """The given rows, by slice or index array."""
        hidden = None if self.hidden is None else self.hidden[rows]
        return replace(
            self, tokens=self.tokens[rows], mask=self.mask[rows], labels=self.labels[rows], hidden=hidden
        )

    def __repr__(self) -> str:
        cached = "" if self.hidden is None else f", activations of depth {self.depth} cached"
        return f"Batch({len(self)} rows of {self.tokens.shape[1]} positions{cached})"


def minibatches(key: Array, num_rows: int, batch_size: int) -> Iterator[np.ndarray]:
    """An endless stream of row indices, `batch_size` at a time, from shuffled epochs.

    Epochs are joined end to end, so a batch may straddle two of them: the shape never changes, every
    row comes once an epoch, and `num_rows / batch_size` times the sum over a batch is unbiased for
    the sum over all rows, also when `batch_size` does not divide `num_rows`.
    """
    stream = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    waiting = np.empty(0, np.int32)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, stream.permutation(num_rows).astype(np.int32)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def padded_batches(batch: Batch, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """All rows in order, `batch_size` at a time, with the number of valid ones.

    The last batch is filled up by repeating row 0, so that one compiled program serves all; what is
    computed for the filling must be dropped, for which the second value is.
    """
    for start in range(0, len(batch), batch_size):
        rows = np.arange(start, start + batch_size)
        valid = int((rows < len(batch)).sum())
        yield batch[jnp.asarray(np.where(rows < len(batch), rows, 0))], valid
