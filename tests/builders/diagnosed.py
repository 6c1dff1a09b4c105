"""A head whose exact posterior is a logistic regression on few numbers, for the tests of diagnostics.

The factor `a` is given and the first class has no update, so that the log-odds are linear in the weights of
the second: margin_i = c_i + sum_k h_ik w_k with w_k ~ N(0, scale^2).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import Array

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

BASE = tiny_base(jax.random.key(1), num_layers=1)


@dataclass(frozen=True)
class Problem:
    """A head, its rows, and others of the same law."""

    model: bl.Classifier
    train: bl.Batch
    others: bl.Batch

    def fit(self, family, *, num_steps: int, rate: float, decays: bool = True, seed: int = 0) -> bl.Fit:
        """A fit with all rows in every step."""
        adam = optax.adam(optax.cosine_decay_schedule(rate, num_steps) if decays else rate)
        return bl.fit(
            jax.random.key(seed),
            self.model,
            bl.guides.Guide(self.model.prior, family),
            self.train,
            adam,
            optimisation=bl.Optimisation(scale_optimizer=adam),
            num_steps=num_steps,
            batch_size=len(self.train),
        )


def inputs(rank: int, angle: float) -> Array:
    """The factor `a`: its second row at an angle to the first."""
    one, two = 0.25 * jax.random.normal(jax.random.key(5), (2, 16))
    return jnp.stack([one, one * np.cos(angle) + two * np.sin(angle)])[None, :rank]


def problem(
    *, scale: float, rank: int = 2, angle: float = 1.5, rows: int = 200, truth: float = 0.4
) -> Problem:
    """A head with N(0, scale^2) weights, and labels from weights of the size `truth`."""
    a = inputs(rank, angle)

    def prior(sites):
        w = numpyro.sample("lm_head.b", dist.Normal(0.0, scale).expand([1, 1, rank]).to_event(3))
        b = jnp.concatenate([jnp.zeros_like(w), w], axis=1)
        return {"lm_head": {"a": a, "b": b}}

    sites = bl.select(BASE, ["lm_head"], rank=rank)
    model = bl.Classifier(BASE, sites, prior, label_ids=(3, 5))
    data = tiny_rows(jax.random.key(2), 2 * rows)
    b = truth * jax.random.normal(jax.random.key(8), (1, 2, rank))
    logits = model.logits(BASE.weights, {"lm_head": {"a": a, "b": b}}, data)
    data = replace(data, labels=jax.random.categorical(jax.random.key(9), logits))
    return Problem(model, data[:rows], data[rows:])


@dataclass(frozen=True)
class Exact:
    """The posterior of the one weight at rank 1, on a fine grid."""

    grid: np.ndarray
    log_prior: np.ndarray
    log_likelihood: np.ndarray  # (grid, row)

    @property
    def log_loo(self) -> np.ndarray:
        """Log p(y_i | y_-i) of every row."""
        joint = self.log_prior + self.log_likelihood.sum(1)
        without = joint[:, None] - self.log_likelihood
        return np.logaddexp.reduce(np.broadcast_to(joint[:, None], without.shape), 0) - np.logaddexp.reduce(
            without, 0
        )


def exact(given: Problem, *, scale: float) -> Exact:
    """Quadrature of a rank-1 head."""
    a, train = inputs(1, 0.0), given.train

    def margin(weight: float) -> np.ndarray:
        b = jnp.array([0.0, weight]).reshape(1, 2, 1)
        logits = given.model.logits(BASE.weights, {"lm_head": {"a": a, "b": b}}, train)
        return np.asarray(logits[:, 1] - logits[:, 0], np.float64)

    start = margin(0.0)
    grid = np.linspace(-12 * scale, 12 * scale, 8001)
    margins = start + grid[:, None] * (margin(1.0) - start)
    sign = np.where(np.asarray(train.labels) == 1, 1.0, -1.0)
    return Exact(grid, -0.5 * (grid / scale) ** 2, -np.logaddexp(0.0, -sign * margins))
