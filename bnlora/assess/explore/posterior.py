r"""Evidence, and the moments of the contrasts of validation rows, for any scales and any of the rows.

    eta_i = z_i + sum_g s_g phi_(g, i)^T u_g,      u ~ N(0, I),      g a layer of a family

In rows everything is a function of K = sum_g s_g^2 K_g, whose terms are computed once. A row that is not in
use has a kernel and an offset of zero: its probabilities are then 1 / C whatever the cores are, so it only
adds a constant to the evidence, which is subtracted. All settings therefore share one compiled program.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora.assess.explore.settings import LAWS, OFF
from bnlora.infer.core.scales import HIGHEST, Objective, maximise
from bnlora.program.tangent.linear import Linear, Mode, laplace_mode, predicted

NAMES = tuple(LAWS)

SLOPE = 1e-2
"""Slope of the evidence, in nats for a factor e, at which a choice of scales ends."""

NEAR = (0.3, 5.0)
"""Range of the scales at the start of such a choice. At a scale near zero the evidence has no slope."""


class Known(NamedTuple):
    """What a change of the settings needs of the rows, in float64.

    Attributes:
        offset: Contrasts of the base on training rows.
        labels: Their classes.
        train: K of each group (g, m, m) in rows, or all columns of Phi at scale one (m, d).
        cross: The same between validation rows and training rows (g, j, m), or Phi of the former (j, d).
        own: Prior covariance of the contrasts of each validation row, by group.
        group: Group of each coordinate; empty in rows.
    """

    offset: Float[np.ndarray, "n k"]
    labels: Int[np.ndarray, " n"]
    train: Float[np.ndarray, "..."]
    cross: Float[np.ndarray, "..."]
    own: Float[np.ndarray, "g i k k"]
    group: Int[np.ndarray, " d"]


class Moments(NamedTuple):
    """The evidence, and the contrasts of validation rows relative to the base's."""

    log_evidence: Float[np.ndarray, ""]
    mean: Float[np.ndarray, "i k"]
    covariance: Float[np.ndarray, "i k k"]
    prior: Float[np.ndarray, "i k k"]


def known(train: Linear, validation: Linear) -> Known:
    """What a change needs of two linear models with the same groups."""
    flat = [x.reshape(train.offset.size, -1) for x in map(np.asarray, train.groups)]
    other = [x.reshape(validation.offset.size, -1) for x in map(np.asarray, validation.groups)]
    own = np.stack([np.einsum("ikd,ild->ikl", x, x) for x in map(np.asarray, validation.groups)])
    offset, labels = np.asarray(train.offset), np.asarray(train.labels)
    if train.in_rows:
        grams = np.stack([x @ x.T for x in flat])
        cross = np.stack([y @ x.T for x, y in zip(flat, other, strict=True)])
        return Known(offset, labels, grams, cross, own, np.zeros(0, int))
    group = np.repeat(np.arange(len(flat)), [x.shape[1] for x in flat])
    return Known(offset, labels, np.concatenate(flat, 1), np.concatenate(other, 1), own, group)


class Programs:
    """The compiled programs of one set of rows; the arrays are their arguments.

    Args:
        data: What is known of the rows.
        family: Family of each group, by number.
    """

    def __init__(self, data: Known, family: Int[np.ndarray, " g"]):
        with jax.enable_x64(new_val=True):
            self.data: Known = jax.tree.map(jnp.asarray, data)
        self.family = family
        self.in_rows = data.train.ndim == 3
        self._moments = jax.jit(partial(_moments, in_rows=self.in_rows))
        value = partial(_objective, family=jnp.asarray(family), in_rows=self.in_rows)
        self._value = jax.jit(jax.value_and_grad(value, has_aux=True))

    def moments(self, scales: Float[np.ndarray, " g"], rows: int) -> Moments:
        """The moments at a scale of each group, with the first rows in use."""
        with jax.enable_x64(new_val=True):
            return Moments(*map(np.asarray, self._moments(self.data, scales, self._used(rows))))

    def chosen(
        self, start: Float[np.ndarray, " f"], on: np.ndarray, rows: int, law: str, width: float
    ) -> Float[np.ndarray, " f"]:
        """The scale of every family that the evidence and a law choose.

        Args:
            start: Scale of every family from which the search starts.
            on: Whether each group is in use.
            rows: Number of rows in use.
            law: `"flat"`, or a name of `LAWS`.
            width: Width of that law.

        Raises:
            ValueError: If the evidence has no maximum, as on separable rows without a law.
        """
        used, number = self._used(rows), NAMES.index(law) if law in NAMES else len(NAMES)

        weights = np.zeros(self.data.train.shape[-1])

        def value(log_scales: np.ndarray, _: np.ndarray) -> tuple[float, np.ndarray, float]:
            nonlocal weights  # Newton's method starts where it ended for the scales before
            with jax.enable_x64(new_val=True):
                (total, (evidence, weights)), slope = self._value(
                    jnp.asarray(log_scales), self.data, used, on, number, np.float64(width), weights
                )
                return float(total), np.asarray(slope), float(evidence)

        count = int(self.family.max()) + 1
        active = np.bincount(self.family, weights=on, minlength=count) > 0
        objective: Objective = value
        best = maximise(objective, active, [np.log(np.clip(start, *NEAR))], slope=SLOPE)
        if law not in LAWS and (best[active] > HIGHEST - 0.01).any():
            raise ValueError(
                f"the evidence has no maximum: it still grows at a scale of {np.exp(HIGHEST):.0f} nats, as "
                'on separable rows; choose a law of the scales, such as "half-normal"'
            )
        return np.exp(best)

    def _used(self, rows: int) -> Float[np.ndarray, " n"]:
        return (np.arange(len(self.data.labels)) < rows).astype(np.float64)


def _fitted(
    data: Known, scales: Array, used: Array, *, in_rows: bool, start: Array | None = None
) -> tuple[Mode, Array]:
    """The mode, with the evidence of the rows in use, and the kernel."""
    seen = jnp.repeat(used, data.offset.shape[1])
    if in_rows:
        kernel = jnp.tensordot(scales**2, jnp.asarray(data.train), 1) * seen[:, None] * seen
    else:
        kernel = jnp.asarray(data.train) * scales[data.group] * seen[:, None]
    model = Linear(data.offset * used[:, None], (), data.labels)
    mode = laplace_mode(model, kernel, in_rows=in_rows, start=start)
    unused = (1 - used).sum() * jnp.log(data.offset.shape[1] + 1.0)
    return mode._replace(log_evidence=mode.log_evidence + unused), kernel


def _moments(data: Known, scales: Array, used: Array, *, in_rows: bool) -> tuple[Array, ...]:
    mode, kernel = _fitted(data, scales, used, in_rows=in_rows)
    prior = jnp.tensordot(scales**2, data.own, 1)
    given = jnp.asarray(data.cross)
    cross = jnp.tensordot(scales**2, given, 1) if in_rows else given * scales[data.group]
    if in_rows:
        cross = cross * jnp.repeat(used, data.offset.shape[1])
    mean, covariance = predicted(mode, kernel, cross, prior, in_rows=in_rows)
    return mode.log_evidence, mean, covariance, prior


def _objective(
    log_scales: Array,
    data: Known,
    used: Array,
    on: Array,
    law: Array,
    width: Array,
    start: Array,
    *,
    family: Array,
    in_rows: bool,
) -> tuple[Array, tuple[Array, Array]]:
    """The evidence times the density of the scales of the families in use, the evidence, and the mode."""
    scales = jnp.where(on, jnp.exp(log_scales)[family], OFF)
    mode, _ = _fitted(data, scales, used, in_rows=in_rows, start=start)
    active = jnp.zeros(len(log_scales), bool).at[family].max(on)

    def density(of: Callable) -> Callable[[Array], Array]:
        # Density of log s: p(s) times the Jacobian s, as in `bnlora.choose_scales`.
        return lambda s: jnp.where(active, of(width).log_prob(jnp.exp(s)) + s, 0.0).sum()

    laws = [*map(density, LAWS.values()), lambda s: jnp.zeros_like(s).sum()]
    total = mode.log_evidence + jax.lax.switch(law, laws, log_scales)
    return total, (mode.log_evidence, jax.lax.stop_gradient(mode.weights))
