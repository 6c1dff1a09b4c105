"""The training rows in the file of a fit: tokens, mask and labels, and the completions of several choices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnlora.data.batch import Batch, Choices

ROWS = ("tokens", "mask", "labels")
"""Arrays that all rows have."""


def rows_from(arrays: Mapping[str, np.ndarray], model: Any, folder: Path) -> Batch:
    """The training rows; raises `ValueError` if tokens or labels are not those of this model."""
    tokens, mask, labels = (arrays[f"train.{name}"] for name in ROWS)
    kinds = tokens.dtype.kind + mask.dtype.kind + labels.dtype.kind
    choices = _choices(arrays, tokens.shape, folder)
    shaped = tokens.ndim == (2 if choices is None else 3)
    if kinds != "ibi" or not shaped or mask.shape != tokens.shape or labels.shape != tokens.shape[:1]:
        raise ValueError(f"the fit in {str(folder)!r} is corrupt: its rows are not tokens, mask and labels")
    sizes = {"tokens": (tokens[mask], model.base.config.vocab_size, "tokens of the base")}
    if model.num_classes:
        sizes |= {"labels": (labels, model.num_classes, "classes of the model")}
    for name, (values, size, of) in sizes.items():
        if values.size == 0 or values.min() < 0 or values.max() >= size:
            wrong = values[(values < 0) | (values >= size)]
            raise ValueError(
                f"the {name} of the rows in {str(folder)!r} must be from 0 to {size - 1}, the {size} {of}; "
                f"got {wrong[0] if wrong.size else 'none'}"
            )
    outcomes = arrays.get("train.outcomes")
    rows = Batch(
        jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(labels), choices=choices,
        outcomes=None if outcomes is None else jnp.asarray(outcomes),
    )  # fmt: skip
    try:
        model.likelihood.check_outcomes("training", rows)
    except ValueError as error:
        raise ValueError(
            f"the fit in {str(folder)!r} is corrupt, or of another likelihood: {error}"
        ) from error
    return rows


def row_arrays(train: Batch) -> dict[str, Any]:
    """Arrays from which the rows are made again."""
    arrays = {name: getattr(train, name) for name in ROWS}
    if train.choices is not None:
        arrays |= {"scored": train.choices.scored, "size": train.choices.size}
        arrays |= {"span": np.asarray(train.choices.span)}
    return arrays if train.outcomes is None else arrays | {"outcomes": train.outcomes}


def _choices(arrays: Mapping[str, np.ndarray], shape: tuple[int, ...], folder: Path) -> Choices | None:
    """The completions of stored rows, if they have any."""
    if "train.scored" not in arrays:
        return None
    scored, size, span = (arrays.get(f"train.{name}", np.zeros(0)) for name in ("scored", "size", "span"))
    whole = span.shape == () and span.dtype.kind == "i" and 1 <= span < shape[-1]
    fits = scored.shape == shape and scored.dtype == bool and size.shape == shape[:2] and whole
    # Scores are read in the last `span` columns only.
    if not fits or scored[..., : -int(span)].any() or not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"the fit in {str(folder)!r} is corrupt: its rows have broken choices")
    return Choices(jnp.asarray(scored), jnp.asarray(size), int(span))
