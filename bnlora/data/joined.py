"""Rows of several batches in one."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Shaped

from bnlora.data.batch import Batch
from bnlora.data.fields import Choices, Features


def join(*batches: Batch) -> Batch:
    """The rows of several batches, in the order given.

    Shorter rows are padded on the left, where `Batch.mask` is false. Features of a tangent model stay if all
    batches have those of the same model; cached activations are left out.

    Args:
        batches: Rows of the same kind: all with tokens for one text or all with the same number of choices,
            and all with the same kind of outcome.

    Returns:
        One batch.

    Raises:
        ValueError: If there is no batch, or their rows are of different kinds.

    Example:
        >>> bl.join(rows[:3], rows[5:])
        Batch(6 rows of 8 positions)
    """
    if not batches:
        raise ValueError("join needs at least one batch; got none")
    _check(batches)
    width = max(batch.tokens.shape[-1] for batch in batches)
    first = batches[0]
    return Batch(
        _together([_padded(batch.tokens, width) for batch in batches]),
        _together([_padded(batch.mask, width) for batch in batches]),
        _together([batch.labels for batch in batches]),
        whole=all(batch.whole for batch in batches),
        choices=_choices([batch.choices for batch in batches if batch.choices is not None], width),
        outcomes=None if first.outcomes is None else _together([batch.outcomes for batch in batches]),
        **_features(batches),
    )


def _check(batches: tuple[Batch, ...]) -> None:
    """Raise `ValueError` unless all rows are of the same kind."""
    kinds = [
        (
            "one text" if batch.choices is None else f"{batch.tokens.shape[1]} choices",
            "classes" if batch.outcomes is None else f"outcomes of {batch.outcomes.ndim} axes",
        )
        for batch in batches
    ]
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"all rows must be of the same kind; batch 0 has {' and '.join(kinds[0])}, batch {index} has "
                f"{' and '.join(kind)}"
            )


def _together(parts: list) -> Array:
    return jnp.asarray(np.concatenate([np.asarray(part) for part in parts]))


def _padded(x: Shaped[Array, "... t"], width: int) -> Shaped[np.ndarray, "... w"]:
    missing = [(0, 0)] * (x.ndim - 1) + [(width - x.shape[-1], 0)]
    return np.pad(np.asarray(x), missing)


def _choices(parts: list[Choices], width: int) -> Choices | None:
    if not parts:
        return None
    scored = _together([_padded(part.scored, width) for part in parts])
    return Choices(scored, _together([part.size for part in parts]), max(part.span for part in parts))


def _features(batches: tuple[Batch, ...]) -> dict:
    """The features of all rows and their mark, if all are of one tangent model."""
    known = [batch.features for batch in batches if batch.features is not None]
    if len(known) < len(batches) or len({batch.frames for batch in batches}) > 1:
        return {}
    joined = Features(*(_together(list(parts)) for parts in zip(*known, strict=True)))
    return {"features": joined, "frames": batches[0].frames}
