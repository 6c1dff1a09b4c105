r"""The same bound with less memory: the minibatch runs in equal parts, one after the other.

    log p(y | adapters) = sum_parts sum_{i in part} log p(y_i | adapters)

and the same holds for the gradient in the adapters. One loop over the parts adds up value and gradient of
each part, so that the activations of only one part are kept and none are computed twice. The rest of the
bound does not change: all parts share one draw of the guide, and its KL terms are counted once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax import Array
from jaxtyping import Float

from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.program.adapter_prior import parameters_of


@dataclass(frozen=True)
class InParts:
    """A classifier as a NumPyro model with the same bound, whose data term is computed in parts.

    Attributes:
        model: The classifier.
        parts: Number of equal parts; must divide the rows of every batch.
    """

    model: Any
    parts: int

    @property
    def base(self) -> Any:
        """The base of the classifier."""
        return self.model.base

    @property
    def prior(self) -> Callable[..., Adapters]:
        """The prior of the classifier."""
        return self.model.prior

    def numbers(self, shape: tuple[int, ...]) -> int:
        """As in the classifier, for one part of these rows and positions."""
        return max(self.model.numbers(shape) // self.parts, self.model.numbers(()))

    def __call__(self, weights: Any, batch: Batch, n_total: int) -> None:
        """Sample adapters and observe labels, as the classifier does.

        Args:
            weights: The frozen base weights.
            batch: Rows with labels.
            n_total: Size of the data set that `batch` is a random part of.
        """
        total, rows = self.log_likelihood(self.prior(), weights, batch), len(batch)
        # Each row gets the mean of all, so the plate's sum is `total`, which the plate scales by N / B.
        with numpyro.plate("data", n_total, subsample_size=rows if rows < n_total else None):
            numpyro.factor("y", jnp.broadcast_to(total / rows, (rows,)))

    def log_likelihood(self, adapters: Adapters, weights: Any, batch: Batch) -> Float[Array, ""]:
        """Sum of the labels' log-probabilities, in nats; it can be differentiated only in the adapters.

        Args:
            adapters: One draw of the adapters.
            weights: The frozen base weights; constants.
            batch: Rows with labels; constants.
        """
        rows = len(batch) // self.parts
        parts = jax.tree.map(lambda x: x.reshape(self.parts, rows, *x.shape[1:]), batch)
        return self._sum(adapters, *jax.lax.stop_gradient((weights, parts)))

    @property
    def _sum(self) -> Callable[..., Array]:
        """The sum over the parts, with the gradient that the same loop adds up as its derivative."""

        def of_part(adapters: Adapters, weights: Any, part: Batch) -> Array:
            logits = self.model.logits(weights, adapters, part)
            outcome = self.model.likelihood.distribution(logits, parameters_of(adapters), part)
            return outcome.log_prob(self.model.likelihood.observed(part)).sum()

        @jax.custom_vjp
        def total(adapters: Adapters, weights: Any, parts: Batch) -> Array:
            return jax.lax.map(lambda part: of_part(adapters, weights, part), parts).sum()

        def forwards(adapters: Adapters, weights: Any, parts: Batch) -> tuple[Array, Adapters]:
            def add(sums: tuple[Array, Adapters], part: Batch) -> tuple[tuple[Array, Adapters], None]:
                return jax.tree.map(jnp.add, sums, jax.value_and_grad(of_part)(adapters, weights, part)), None

            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, adapters)
            return jax.lax.scan(add, zeros, parts)[0]

        def backwards(gradient: Adapters, cotangent: Array) -> tuple[Adapters, None, None]:
            return jax.tree.map(lambda x: cotangent * x, gradient), None, None

        total.defvjp(forwards, backwards)
        return total
