r"""Functions of adapters that the data can identify, as scalars with names.

The factors of an adapter are not identifiable: (A, B) and (R A, B R^-1) are one update. Ranks, R-hat,
effective sample sizes and distances between posteriors are therefore those of functions of the update
`alpha / rank * B A`: margins of the logits at probe rows, the Frobenius norm of each family's update, and
the log-likelihood of the data.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora.data import Batch
from bnlora.model import Classifier
from bnlora.typing import Adapters

PROBES = 8
"""Rows whose margins are looked at, unless functions are given."""


class Functions(Protocol):
    """Scalar functions of one draw of the adapters and of the data."""

    def __call__(self, frozen: Any, adapters: Adapters, batch: Batch) -> Mapping[str, Array]:
        """Values of shape () by name."""
        ...


def identifiable(model: Classifier, probe: Batch, *, families: Sequence[str] | None = None) -> Functions:
    """The default functions: margins at probe rows, norms of the updates, log-likelihood of the data.

    Args:
        model: A `Classifier`.
        probe: Rows whose margins are looked at, labels unread; each class against class 0.
        families: Families whose norms are looked at; those that differ from draw to draw when omitted.

    Returns:
        Functions named `margin[row]` (`margin[row, class]` with three classes or more), `norm[family]`
        (over all layers of a family that is not fixed) and `log_likelihood`. They take rows with activations
        cached for any model; for another one than `model` they compute them again at every draw.
    """
    probe = model.with_hidden(probe)
    normed = model.moving if families is None else tuple(families)
    classes = len(model.label_ids)

    def functions(frozen: Any, adapters: Adapters, batch: Batch) -> dict[str, Array]:
        logits = model.logits(frozen, adapters, probe)
        margins = {
            f"margin[{row}]" if classes == 2 else f"margin[{row}, {c}]": logits[row, c] - logits[row, 0]
            for row in range(len(probe))
            for c in range(1, classes)
        }
        norms = {f"norm[{n}]": update_norm(adapters[n], model.sites[n].scale) for n in normed}
        return margins | norms | {"log_likelihood": log_likelihood(model, frozen, adapters, batch)}

    return functions


def evaluate(
    functions: Functions, model: Classifier, adapters: Adapters, batch: Batch
) -> tuple[tuple[str, ...], Float[np.ndarray, "s k"]]:
    """Names of the functions, and their values at adapters with a leading draw axis."""
    batch = model.with_hidden(batch)

    def one(frozen: Any, drawn: Adapters, rows: Batch) -> dict[str, Array]:
        return scalars(functions(frozen, drawn, rows))

    program = jax.jit(lambda frozen, drawn, rows: jax.lax.map(lambda x: one(frozen, x, rows), drawn))
    found = program(model.base.params, adapters, batch)
    names = tuple(found)
    return names, np.stack([np.asarray(found[name], np.float64) for name in names], axis=-1)


def scalars(values: Mapping[str, Array]) -> dict[str, Array]:
    """The values of functions by name, in one order whatever theirs was.

    Raises:
        ValueError: When there are none, or one is no scalar.
    """
    for name, value in values.items():
        if jnp.shape(value) != ():
            raise ValueError(f"a function must be a scalar, shape (); {name!r} has shape {jnp.shape(value)}")
    if not values:
        raise ValueError("expected at least one function; got none")
    return {name: jnp.asarray(values[name]) for name in sorted(values)}


def log_likelihood(model: Classifier, frozen: Any, adapters: Adapters, batch: Batch) -> Float[Array, ""]:
    """Log-likelihood of the labels of a batch at one draw of the adapters; NaN where a row has none."""
    log_probs = jax.nn.log_softmax(model.logits(frozen, adapters, batch))
    # JAX counts -1 from the end, so the mark of a row without a label would be read as the last class.
    labels = jnp.where(batch.labels < 0, log_probs.shape[1], batch.labels)
    return jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="fill").sum()


def update_norm(adapter: Mapping[str, Array], scale: float) -> Float[Array, ""]:
    """Frobenius norm of `scale b a` over all layers, through the two rank x rank Gram matrices."""
    a, b = adapter["a"], adapter["b"]
    inner = jnp.einsum("lri,lsi->lrs", a, a) * jnp.einsum("lor,los->lrs", b, b)
    return abs(scale) * jnp.sqrt(jnp.maximum(inner.sum(), 0.0))  # rounding may leave a zero just below it
