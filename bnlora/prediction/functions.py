r"""Functions of adapters that the data can identify, as named scalars.

The factors of an adapter are not identifiable: (A, B) and (R A, B R^-1) give the same update. Ranks, R-hat,
effective sample sizes and distances between posteriors are therefore computed for functions of the update
`alpha / rank * B A`: margins of the logits at probe rows, the Frobenius norm of each family's update, and
the log-likelihood of the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.prediction.predict import log_likelihood_by_draw, outputs_with_draws
from bnlora.program.protocol import Model

PROBES = 8
"""Number of probe rows of the default functions."""

QUIET = Console(quiet=True)
"""No progress bar: the caller shows its own."""


@runtime_checkable
class Functions(Protocol):
    """Scalar functions of one draw of the adapters and of the data."""

    def __call__(self, weights: Any, adapters: Adapters, batch: Batch) -> Mapping[str, Array]:
        """Values of shape () by name."""
        ...


def identifiable(model: Model, data: Batch, *, families: Sequence[str] | None = None) -> "Identifiable":
    """The default functions: margins or values at probe rows, norms of updates, log-likelihood of the data.

    Args:
        model: A classifier.
        data: Probe rows, at which the margin of each class over class 0 is computed. Labels are not read.
        families: Families whose norms are computed; those that differ from draw to draw when omitted.

    Returns:
        Functions named `margin[row]` (`margin[row, class]` with three classes or more), `norm[family]`
        (over all layers of a family that is not fixed) and `log_likelihood`. They accept rows whose
        activations were cached for any model. Activations of a model other than `model` are recomputed for
        every draw.
    """
    model.check_tokens(data)
    return Identifiable(model, data, model.moving if families is None else tuple(families))


@dataclass(frozen=True, eq=False)  # compared by identity, as functions are: `jax.jit` needs a hash
class Identifiable:
    """The functions that `identifiable` returns, of one draw. For many draws, `evaluate` calls `by_draw`.

    Attributes:
        model: The classifier.
        probe: Rows at which margins are computed.
        families: Families whose norms are computed.
    """

    model: Model
    probe: Batch
    families: tuple[str, ...]

    def __call__(self, weights: Any, adapters: Adapters, batch: Batch) -> dict[str, Array]:
        """Values of shape () by name."""
        values = self._margins(self.model.outputs(weights, adapters, self._prepared))
        values |= {f"norm[{n}]": update_norm(adapters[n], self.model.sites[n].scale) for n in self.families}
        return values | {"log_likelihood": log_likelihood(self.model, weights, adapters, batch)}

    def by_draw(self, adapters: Adapters, batch: Batch | None) -> dict[str, Float[np.ndarray, " s"]]:
        """Values for adapters with a leading draw axis, computed by the compiled program of `predict`.

        Args:
            adapters: Draws.
            batch: Rows with labels; without it, the log-likelihood is left out.
        """
        outputs = outputs_with_draws(
            self.model, adapters, self.probe, batch_size=len(self.probe), console=QUIET
        )
        values = self.margins(outputs) | self.norms(adapters)
        if batch is None:
            return values
        self.model.check_outcomes("given", batch)
        outputs = outputs_with_draws(self.model, adapters, batch, console=QUIET)
        return values | {"log_likelihood": log_likelihood_by_draw(self.model, outputs, batch).sum(1)}

    def margins(self, outputs: Float[np.ndarray, "s n m"]) -> dict[str, Float[np.ndarray, " s"]]:
        """Margins by draw, from outputs of rows that begin with the probe rows."""
        return self._margins(np.moveaxis(outputs, 0, -1))

    def norms(self, adapters: Adapters) -> dict[str, Float[np.ndarray, " s"]]:
        """Norms of the updates by draw, without running the network."""
        return {f"norm[{n}]": _norms(adapters[n], self.model.sites[n].scale) for n in self.families}

    @cached_property
    def _prepared(self) -> Batch:
        """The probe rows with the activations that no draw changes; works while a program is traced."""
        with jax.ensure_compile_time_eval():
            # Not `prepare`: JAX accepts compiler options only for outermost programs.
            return jax.jit(self.model.prepared)(self.model.base.weights, self.probe)

    def _margins(self, outputs: Any) -> dict[str, Any]:
        classes = self.model.num_classes
        if not classes:  # the first output is the location of a value, or the log-likelihood of a text
            name = self.model.likelihood.outcome
            return {f"{name}[{row}]": outputs[row, 0] for row in range(len(self.probe))}
        return {
            f"margin[{row}]" if classes == 2 else f"margin[{row}, {c}]": outputs[row, c] - outputs[row, 0]
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

    def of_draw(weights: Any, draw: Adapters, rows: Batch) -> dict[str, Array]:
        return scalars(functions(weights, draw, rows))

    program = jax.jit(lambda weights, draws, rows: jax.lax.map(lambda x: of_draw(weights, x, rows), draws))
    return stacked(program(model.base.weights, adapters, batch))


def stacked(by_name: Mapping[str, Any]) -> tuple[tuple[str, ...], Float[np.ndarray, "s k"]]:
    """Names of functions in sorted order, and their values by draw."""
    names = tuple(sorted(by_name))
    return names, np.stack([np.asarray(by_name[name], np.float64) for name in names], axis=-1)


def scalars(values: Mapping[str, Array]) -> dict[str, Array]:
    """The values of functions by name, in sorted order.

    Raises:
        ValueError: If there are no values, or one is not a scalar.
    """
    for name, value in values.items():
        if jnp.shape(value) != ():
            raise ValueError(f"a function must be a scalar, shape (); {name!r} has shape {jnp.shape(value)}")
    if not values:
        raise ValueError("expected at least one function; got none")
    return {name: jnp.asarray(values[name]) for name in sorted(values)}


def log_likelihood(model: Model, weights: Any, adapters: Adapters, batch: Batch) -> Float[Array, ""]:
    """Log-likelihood of the labels of a batch at one draw of the adapters; NaN where a row has none."""
    return model.log_likelihood(weights, adapters, batch).sum()


def update_norm(adapter: Mapping[str, Array], scale: float) -> Float[Array, ""]:
    """Frobenius norm of `scale b a` over all layers, from the two rank x rank Gram matrices.

    |b a|^2 = sum_rs (a a^T)_rs (b^T b)_rs, so the d_out x d_in update is never formed.
    """
    a, b = adapter["a"], adapter["b"]
    inner = jnp.einsum("lri,lsi->lrs", a, a) * jnp.einsum("lor,los->lrs", b, b)
    return abs(scale) * jnp.sqrt(jnp.maximum(inner.sum(), 0.0))  # rounding may make it slightly negative


def _norms(adapter: Mapping[str, Any], scale: float) -> Float[np.ndarray, " s"]:
    """`update_norm` of every draw, in NumPy with float64."""

    def square(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(((a @ np.swapaxes(a, -1, -2)) * (np.swapaxes(b, -1, -2) @ b)).sum())

    pairs = zip(*(np.asarray(adapter[factor]) for factor in ("a", "b")), strict=True)
    return abs(scale) * np.sqrt(np.maximum([square(a, b) for a, b in pairs], 0.0))
