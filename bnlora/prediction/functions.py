r"""Functions of adapters that the data can identify, as scalars with names.

The factors of an adapter are not identifiable: (A, B) and (R A, B R^-1) are one update. Ranks, R-hat,
effective sample sizes and distances between posteriors are therefore those of functions of the update
`alpha / rank * B A`: margins of the logits at probe rows, the Frobenius norm of each family's update, and
the log-likelihood of the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.protocol import Model

PROBES = 8
"""Rows whose margins are looked at, unless functions are given."""

QUIET = Console(quiet=True)
"""No progress bar: the caller shows its own."""


class Functions(Protocol):
    """Scalar functions of one draw of the adapters and of the data."""

    def __call__(self, weights: Any, adapters: Adapters, batch: Batch) -> Mapping[str, Array]:
        """Values of shape () by name."""
        ...


def identifiable(model: Model, data: Batch, *, families: Sequence[str] | None = None) -> "Identifiable":
    """The default functions: margins at probe rows, norms of the updates, log-likelihood of the data.

    Args:
        model: A classifier.
        data: Rows whose margins are looked at, labels unread; each class against class 0.
        families: Families whose norms are looked at; those that differ from draw to draw when omitted.

    Returns:
        Functions named `margin[row]` (`margin[row, class]` with three classes or more), `norm[family]`
        (over all layers of a family that is not fixed) and `log_likelihood`. They accept rows with
        activations cached for any model, but recompute those of another model than `model` for every draw.
    """
    model.check_tokens(data)
    return Identifiable(model, data, model.moving if families is None else tuple(families))


@dataclass(frozen=True, eq=False)  # equal by identity, as functions are: `jax.jit` wants a hash
class Identifiable:
    """What `identifiable` returns: functions of one draw. For many draws, `evaluate` calls `by_draw`.

    Attributes:
        model: The classifier.
        probe: Rows whose margins are looked at.
        families: Families whose norms are looked at.
    """

    model: Model
    probe: Batch
    families: tuple[str, ...]

    def __call__(self, weights: Any, adapters: Adapters, batch: Batch) -> dict[str, Array]:
        """Values of shape () by name."""
        found = self._margins(self.model.logits(weights, adapters, self._prepared))
        found |= {f"norm[{n}]": update_norm(adapters[n], self.model.sites[n].scale) for n in self.families}
        return found | {"log_likelihood": log_likelihood(self.model, weights, adapters, batch)}

    def by_draw(self, adapters: Adapters, batch: Batch | None) -> dict[str, Float[np.ndarray, " s"]]:
        """Values for adapters with a leading draw axis, computed by the program of predictions.

        Args:
            adapters: Draws.
            batch: Rows with labels; None leaves the log-likelihood out.
        """
        predicted = predict_with_draws(
            self.model, adapters, self.probe, batch_size=len(self.probe), console=QUIET
        )
        found = self.margins(predicted.draw_log_probs) | self.norms(adapters)
        if batch is None:
            return found
        predicted = predict_with_draws(self.model, adapters, batch, console=QUIET)
        return found | {"log_likelihood": predicted.log_probs_of(batch.labels).sum(1)}

    def margins(self, draw_log_probs: Float[np.ndarray, "s n c"]) -> dict[str, Float[np.ndarray, " s"]]:
        """Margins by draw, from predictions of the probe rows, or of more rows that begin with these."""
        return self._margins(np.moveaxis(draw_log_probs, 0, -1))

    def norms(self, adapters: Adapters) -> dict[str, Float[np.ndarray, " s"]]:
        """Norms of the updates by draw; no row is run."""
        return {f"norm[{n}]": _norms(adapters[n], self.model.sites[n].scale) for n in self.families}

    @cached_property
    def _prepared(self) -> Batch:
        """The probe rows with the activations that no draw changes; works while a program is traced."""
        with jax.ensure_compile_time_eval():
            # Not `prepare`: JAX accepts compiler options only for outermost programs.
            return jax.jit(self.model.prepared)(self.model.base.weights, self.probe)

    def _margins(self, logits: Any) -> dict[str, Any]:
        classes = len(self.model.label_ids)
        return {
            f"margin[{row}]" if classes == 2 else f"margin[{row}, {c}]": logits[row, c] - logits[row, 0]
            for row in range(len(self.probe))
            for c in range(1, classes)
        }


def evaluate(
    functions: Functions, model: Model, adapters: Adapters, batch: Batch
) -> tuple[tuple[str, ...], Float[np.ndarray, "s k"]]:
    """Names of the functions, and their values at adapters with a leading draw axis."""
    if isinstance(functions, Identifiable):
        return stacked(functions.by_draw(adapters, batch))
    batch = model.prepare(batch)

    def one(weights: Any, drawn: Adapters, rows: Batch) -> dict[str, Array]:
        return scalars(functions(weights, drawn, rows))

    program = jax.jit(lambda weights, drawn, rows: jax.lax.map(lambda x: one(weights, x, rows), drawn))
    return stacked(program(model.base.weights, adapters, batch))


def stacked(by_name: Mapping[str, Any]) -> tuple[tuple[str, ...], Float[np.ndarray, "s k"]]:
    """Names of functions in one order, whatever theirs was, and their values by draw."""
    names = tuple(sorted(by_name))
    return names, np.stack([np.asarray(by_name[name], np.float64) for name in names], axis=-1)


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


def log_likelihood(model: Model, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, ""]:
    """Log-likelihood of the labels of a batch at one draw of the adapters; NaN where a row has none."""
    log_probs = jax.nn.log_softmax(model.logits(weights, adapters, batch))
    # JAX counts -1 from the end, so the mark of a row without a label would be read as the last class.
    labels = jnp.where(batch.labels < 0, log_probs.shape[1], batch.labels)
    return jnp.take_along_axis(log_probs, labels[:, None], axis=1, mode="fill").sum()


def update_norm(adapter: Mapping[str, Array], scale: float) -> Float[Array, ""]:
    """Frobenius norm of `scale b a` over all layers, through the two rank x rank Gram matrices."""
    a, b = adapter["a"], adapter["b"]
    inner = jnp.einsum("lri,lsi->lrs", a, a) * jnp.einsum("lor,los->lrs", b, b)
    return abs(scale) * jnp.sqrt(jnp.maximum(inner.sum(), 0.0))  # rounding may leave a zero just below it


def _norms(adapter: Mapping[str, Any], scale: float) -> Float[np.ndarray, " s"]:
    """`update_norm` of every draw, by NumPy."""

    def square(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(((a @ np.swapaxes(a, -1, -2)) * (np.swapaxes(b, -1, -2) @ b)).sum())

    pairs = zip(*(np.asarray(adapter[factor]) for factor in ("a", "b")), strict=True)
    return abs(scale) * np.sqrt(np.maximum([square(a, b) for a, b in pairs], 0.0))
