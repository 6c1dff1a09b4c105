r"""Soft labels: each row has votes of several raters for the classes.

    votes_i ~ Multinomial(sum_c votes_ic, softmax(logits_i)),      log p = const + sum_c votes_ic log p_ic

A row with many raters weighs more than a row with few. Votes that are shares of one count as one rater; the
sum over c is then the negative cross-entropy, and the constant has no meaning.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln
from jaxtyping import Float

from bnlora.data.batch import Batch, check_form
from bnlora.program.likelihoods.base import Outcome, Parameters
from bnlora.program.likelihoods.reading import Reading


@dataclass(frozen=True)
class SoftLabels(Reading):
    """Votes of raters for the classes, in `Batch.outcomes`; `Batch.labels` are the classes with most votes.

    Attributes:
        reads: What reads the logits, such as `Words`.

    Example:
        >>> likelihood = bl.likelihoods.SoftLabels(bl.likelihoods.Words([3, 5]))
        >>> votes = jnp.tile(jnp.array([3.0, 1.0]), (8, 1))
        >>> rated = bl.Batch(rows.tokens, rows.mask, rows.labels, outcomes=votes)
        >>> log_prob = likelihood.log_prob(jnp.log(jnp.array([0.8, 0.2])), rated[:1])
        >>> jnp.exp(log_prob).round(4)  # 4 * 0.8^3 * 0.2
        Array([0.4096], dtype=float32)
    """

    @property
    def outcome(self) -> Outcome:
        """What is observed are votes."""
        return "votes"

    def check_outcomes(self, name: str, batch: Batch) -> None:
        """Raise `ValueError` unless every row has votes."""
        check_form(name, batch)
        votes, shape = batch.outcomes, (len(batch), self.num_classes)
        if votes is None or votes.shape != shape:
            got = "none" if votes is None else f"an array of shape {votes.shape}"
            raise ValueError(
                f"the {name} rows must have votes of shape {shape}, as from bl.text_outcomes(..., "
                f'kind="votes"); got {got}'
            )
        values = np.asarray(votes)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.sum(1).min() > 0):
            raise ValueError(f"the votes of the {name} rows must be at least 0, and not all 0 in any row")

    def distribution(
        self, logits: Float[Array, "n c"], params: Parameters, batch: Batch
    ) -> dist.Distribution:
        """The multinomial distribution of the votes."""
        votes = self.observed(batch)
        return dist.MultinomialLogits(logits, total_count=votes.sum(-1))

    def observed(self, batch: Batch) -> Float[Array, "n c"]:
        """The votes."""
        assert batch.outcomes is not None  # `check_outcomes` comes first
        return batch.outcomes

    def simulate(self, key: Array, logits: Float[Array, "n c"], params: Parameters, batch: Batch) -> Batch:
        """The rows with as many votes as they have, drawn from the softmax; votes must be whole numbers."""
        votes = self.observed(batch)
        most = int(np.asarray(votes).sum(-1).max())
        classes = jax.random.categorical(key, logits, shape=(most, len(logits)))
        counted = jnp.arange(most)[:, None] < votes.sum(-1)
        drawn = (jax.nn.one_hot(classes, self.num_classes) * counted[..., None]).sum(0)
        return replace(batch, outcomes=drawn, labels=drawn.argmax(-1).astype(batch.labels.dtype))

    def log_prob(self, outputs: Float[Array, "*s n c"], batch: Batch) -> Float[Array, "*s n"]:
        """Log-probability of the votes of each row, in nats."""
        votes = self.observed(batch)
        constant = _log_factorial(votes.sum(-1)) - _log_factorial(votes).sum(-1)
        return (outputs * votes).sum(-1) + constant

    def record(self) -> dict[str, Any]:
        """What is read."""
        return {"kind": "soft labels", "reads": self.reads.record()}


def _log_factorial(x: Array) -> Array:
    return gammaln(x + 1)
