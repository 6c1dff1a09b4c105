r"""Inferences for simulation-based calibration of a tangent model at fixed scales.

    eta_i = z_i + Phi_i u,      u ~ N(0, I),      u = V c + (I - V V^T) n,      n ~ N(0, I)

eta_i are the contrasts of row i, u is the vector of all cores, and V is an orthonormal basis of the row space
of Phi, the directions informed by the data. The likelihood depends only on c, so an inference draws c from
the posterior and n from the prior.

| inference             | draws of c                                                                   |
|-----------------------|------------------------------------------------------------------------------|
| `laplace_inference`   | from Laplace's Gaussian                                                      |
| `nuts_inference`      | by NUTS in units of that Gaussian, with a fixed step; exact                  |
| `gaussian_inference`  | jointly with n, from a full-covariance Gaussian; SVI starts at Laplace's     |

They are pure functions in JAX's default precision. Tests compare mean and covariance in float32 with those of
`bnlora.laplace`, which uses float64.

References: Talts et al. (2018), arXiv 1804.06788; Neal (2011), MCMC using Hamiltonian dynamics, section 4.2
for the scaling of the step as d^(-1/4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_at_least, check_key, check_positive, listed
from bnlora._util.typing import Adapters, Parameters
from bnlora.assess.sbc.simulation import Inference, svi_inference
from bnlora.data.batch import Batch
from bnlora.guides import Guide, full
from bnlora.infer.mcmc.samplers import Nuts, Report, Tuning, hamiltonian
from bnlora.priors.declared import declared
from bnlora.program.density import Density, density
from bnlora.program.tangent.linear import Informed, Linear, laplace_mode, posterior
from bnlora.program.tangent.model import Tangent
from bnlora.program.tangent.where import is_standard_normal

STEP = 0.8
"""Step of NUTS in one dimension, in standard deviations of Laplace's Gaussian; times r^(-1/4) in r."""

LEAST = 0.6
"""Smallest mean acceptance probability of a valid chain; below it, the draws are too dependent."""


class Around(NamedTuple):
    """Laplace's Gaussian in the directions informed by the data.

    Attributes:
        vectors: V, rotated to the principal axes of the Gaussian, shape (p, r).
        centre: The mode of c, shape (r,).
        gains: Standard deviations of c along the columns of V, shape (r,).
        informed: The likelihood as a function of c, with contrasts at the mode.
    """

    vectors: Float[Array, "p r"]
    centre: Float[Array, " r"]
    gains: Float[Array, " r"]
    informed: Informed

    def log_density(self, z: Float[Array, " r"]) -> Float[Array, ""]:
        """Log posterior density of c = centre + gains z, in nats, up to a constant."""
        return self.informed.log_posterior(z, self.centre, self.gains)

    def vector(self, key: Array, z: Float[Array, " r"]) -> Float[Array, " p"]:
        """The vector u at z; the directions not informed by the data are drawn from the prior."""
        n = jax.random.normal(key, self.vectors.shape[:1], self.vectors.dtype)
        # V c + (I - V V^T) n without the p x p projection.
        return n + self.vectors @ (self.centre + self.gains * z - n @ self.vectors)


def laplace_inference(tangent: Tangent, *, num_draws: int, spread: float = 1.0) -> Inference:
    """Inference by draws of Laplace's Gaussian, the same as that of `bnlora.laplace`.

    Args:
        tangent: A tangent model under `priors.core` at fixed scales.
        num_draws: Number of draws.
        spread: Factor on the standard deviations along informed directions. One is Laplace's Gaussian; other
            values are wrong on purpose, to test whether a calibration detects it.

    Returns:
        An inference for `bnlora.assess.sbc.simulation.run`.

    Raises:
        ValueError: If the model is not a tangent model, its prior has other sites than standard normal
            cores, `num_draws` is below one, or `spread` is not positive.

    Example:
        >>> from bnlora.assess.sbc.core import laplace_inference
        >>> draws = laplace_inference(tangent, num_draws=5)(key, base.weights, tangent.prepare(rows))
        >>> draws["lm_head"]["b"].shape
        (5, 1, 2, 4)
    """
    view = _fixed(tangent)
    check_at_least({"num_draws": num_draws}, 1)
    check_positive({"spread": spread})

    def infer(key: Array, weights: Any, batch: Batch) -> Adapters:
        around = around_mode(view, weights, batch)
        z_key, key = jax.random.split(key)
        z = spread * jax.random.normal(z_key, (num_draws, len(around.gains)), around.gains.dtype)
        return _adapters(key, view, around, z)

    return infer


def nuts_inference(
    tangent: Tangent, *, num_draws: int, num_warmup: int = 50, thinning: int = 4, step_size: float = STEP
) -> Inference:
    """Inference by NUTS in coordinates in which Laplace's Gaussian is standard normal; exact up to the start.

    A chain starts at a draw of Laplace's Gaussian. Its step is fixed; nothing is tuned. Ranks among dependent
    draws are not uniform, so the chain is thinned. If the step is too long, as at scales of 10 nats and more,
    the chain hardly moves; its draws are then set to NaN, so that the calibration counts the simulation as
    failed.

    Args:
        tangent: A tangent model under `priors.core` at fixed scales.
        num_draws: Number of draws.
        num_warmup: Transitions before the first draw.
        thinning: Transitions from one draw to the next.
        step_size: Step of the integrator in one dimension; it is multiplied by r^(-1/4) in r dimensions.

    Returns:
        An inference for `bnlora.assess.sbc.simulation.run`.

    Raises:
        ValueError: If the model is not a tangent model, its prior has other sites than standard normal
            cores, a number is below one (`num_warmup` below zero), or the step is not positive.

    Example:
        >>> from bnlora.assess.sbc.core import nuts_inference
        >>> calibration = bl.sbc.run(
        ...     key, tangent, nuts_inference(tangent, num_draws=7), rows, num_simulations=20
        ... )
        >>> calibration.ranks.shape
        (20, 5)
    """
    view = _fixed(tangent)
    check_at_least({"num_draws": num_draws, "thinning": thinning}, 1)
    check_at_least({"num_warmup": num_warmup}, 0)
    check_positive({"step_size": step_size})

    def infer(key: Array, weights: Any, batch: Batch) -> Adapters:
        around = around_mode(view, weights, batch)
        chain_key, key = jax.random.split(key)
        z, report = chain(chain_key, around, num_draws, num_warmup, thinning, step_size)
        moves = report.acceptance.mean() >= LEAST
        return _adapters(key, view, around, jnp.where(moves, z, jnp.nan))

    return infer


def gaussian_inference(
    key: Array,
    tangent: Tangent,
    *,
    num_draws: int,
    num_steps: int = 1000,
    learning_rate: float = 1e-3,
    num_particles: int = 8,
) -> Inference:
    """Inference by a Gaussian with a full covariance over all cores, fitted by SVI.

    The fit starts at Laplace's Gaussian. The noise of the steps keeps its bound slightly below the highest
    bound of such a Gaussian.

    Args:
        key: Random key, for `bnlora.assess.sbc.simulation.svi_inference`.
        tangent: A tangent model under `priors.core` at fixed scales.
        num_draws: Number of draws.
        num_steps: Steps of Adam on all rows.
        learning_rate: Rate of Adam at the first step; it decays to zero along a cosine.
        num_particles: Draws averaged in a step.

    Returns:
        An inference for `bnlora.assess.sbc.simulation.run`.

    Raises:
        ValueError: If the model is not a tangent model, its prior has other sites than standard normal
            cores, a number is below one, or the rate is not positive.

    Example:
        >>> from bnlora.assess.sbc.core import gaussian_inference
        >>> infer = gaussian_inference(key, tangent, num_draws=5, num_steps=4)
        >>> infer(key, base.weights, tangent.prepare(rows))["lm_head"]["b"].shape
        (5, 1, 2, 4)
    """
    key = check_key(key)
    view = _fixed(tangent)
    check_positive({"learning_rate": learning_rate})
    check_at_least({"num_steps": num_steps}, 1)
    guide = Guide(tangent.prior, full(over="all"))
    first = next(iter(view.shapes))

    def start(key: Array, weights: Any, batch: Batch) -> Parameters:
        V, centre, gains, _ = around_mode(view, weights, batch)
        # Covariance of u: V diag(gains^2) V^T on the informed directions, the identity on the others.
        covariance = jnp.eye(len(V), dtype=V.dtype) + (V * (gains**2 - 1)) @ V.T
        return {f"{first}.q.loc": V @ centre, f"{first}.q.scale_tril": jnp.linalg.cholesky(covariance)}

    return svi_inference(
        key,
        tangent,
        guide,
        optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps)),
        num_steps=num_steps,
        num_draws=num_draws,
        num_particles=num_particles,
        init_params=start,
    )


def around_mode(view: Density, weights: Any, batch: Batch) -> Around:
    """Laplace's Gaussian in the directions informed by the rows; pure.

    Args:
        view: The unconstrained view of a tangent model at fixed scales.
        weights: The frozen weights.
        batch: Rows with labels.
    """
    model, basis = _reduced(view, weights, batch)
    flat = model.design(jnp.zeros(1, basis.dtype))
    mode = laplace_mode(model, flat, in_rows=False)
    mean, axes, values = posterior(flat, mode, in_rows=False)
    offset, (design,), labels = model
    # Recentre at the mode and rotate to the principal axes; `values` are precisions beyond the prior's.
    informed = Informed(design @ axes, offset + design @ mean, labels)
    return Around(basis @ axes, mean @ axes, (1 + values) ** -0.5, informed)


def chain(
    key: Array, around: Around, num_draws: int, num_warmup: int, thinning: int, step_size: float
) -> tuple[Float[Array, "s r"], Report]:
    """Positions z of a chain of NUTS, and the report of every transition after the warm-up."""
    start_key, warm_key, move_key = jax.random.split(key, 3)
    size, dtype = len(around.gains), around.gains.dtype
    position = jax.random.normal(start_key, (size,), dtype)
    step = jnp.asarray(step_size * size**-0.25, dtype)
    ones, zero = jnp.ones(size, dtype), jnp.zeros((), dtype)
    sampler = hamiltonian(Nuts(), around.log_density, Tuning(position, step, ones, zero, zero))

    def move(state: Any, key: Array) -> tuple[Any, Report]:
        return sampler.step(key, state)

    def draw(state: Any, key: Array) -> tuple[Any, tuple[Array, Report]]:
        state, report = jax.lax.scan(move, state, jax.random.split(key, thinning))
        return state, (state.position, report)

    state = sampler.init(start_key, position)
    state, _ = jax.lax.scan(move, state, jax.random.split(warm_key, num_warmup))
    return jax.lax.scan(draw, state, jax.random.split(move_key, num_draws))[1]


def _fixed(tangent: Any) -> Density:
    """The unconstrained view; raises `ValueError` unless the only sites are standard normal cores."""
    if not isinstance(tangent, Tangent):
        raise ValueError(f"expected a tangent model, bl.Tangent(classifier); got a {type(tangent).__name__}")
    program, cores = declared(tangent.prior), [f"{family}.U" for family in tangent.sites]
    names = [*program.latent, *program.observed, *program.params]
    if set(names) != set(cores):
        raise ValueError(
            f"the prior must have the sites of priors.core at fixed scales, {listed(cores)}; got "
            f"{listed(names)}"
        )
    view = density(tangent, {})
    if not is_standard_normal(view, jnp.zeros(view.size), np.arange(view.size), 1e-4):
        raise ValueError("the cores must be standard normal, as those of priors.core are")
    return view


def _reduced(view: Density, weights: Any, batch: Batch) -> tuple[Linear, Float[Array, "p r"]]:
    """The linear model of c, with one group of columns, and the basis V of its directions."""
    tangent: Tangent = view.model
    offset, phi = tangent.features(weights, batch)
    # The map from cores to coordinates of the update is linear, so one vjp at zero gives it exactly,
    # with the prior's scales, units and order of entries.
    zero = jnp.zeros(view.size)
    update, pull = jax.vjp(lambda u: tangent.coordinates(view.adapters(u)), zero)
    design = jax.vmap(lambda row: pull(row)[0])(phi.reshape(-1, len(update)).astype(update.dtype))
    basis = jnp.eye(view.size, dtype=design.dtype)
    if len(design) < view.size:  # fewer rows than cores: QR gives an orthonormal basis of the row space
        basis, _ = jnp.linalg.qr(design.T)
    inner = (design @ basis).reshape(*phi.shape[:2], -1)
    contrasts = (offset[:, 1:] - offset[:, :1]).astype(inner.dtype)
    return Linear(contrasts, (inner,), batch.labels), basis


def _adapters(key: Array, view: Density, around: Around, z: Float[Array, "s r"]) -> Adapters:
    """Adapters at draws of z."""
    return jax.lax.map(lambda x: view.adapters(around.vector(*x)), (jax.random.split(key, len(z)), z))
