r"""The evidence by bridge sampling, from draws of the posterior and of a Gaussian close to it.

    p(y) = E_q[ h(z) f(z) ] / E_post[ h(z) q(z) ],    h = 1 / (s_1 f / p(y) + s_2 q),   f(z) = p(y, z)

iterated to its fixed point. s_1 and s_2 are the shares of posterior and Gaussian draws. The Gaussian q is the
one in whose coordinates the chains moved; in these coordinates z it is standard normal. The standard error is
that of Fruehwirth-Schnatter (2004); its second term accounts for the autocorrelation of the chains.

References: Meng and Wong (1996), Simulating ratios of normalizing constants via a simple identity; Gronau et
al. (2017), A tutorial on bridge sampling.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.checks import check_at_least, check_key
from bnlora.infer.mcmc.chains import Chains
from bnlora.metrics.monte_carlo import bulk_ess

ITERATIONS = 1000
"""Most iterations of the fixed point; it usually stops earlier, at a step below 1e-9 nats."""


class LogEvidence(NamedTuple):
    """Log evidence in nats with its Monte Carlo standard error."""

    value: float
    stderr: float


def log_evidence(key: Array, chains: Chains, *, num_draws: int = 4000) -> LogEvidence:
    """Log p(y) of the model that the chains sampled.

    Args:
        key: Random key of the Gaussian's draws.
        chains: Chains that moved in the coordinates of a Gaussian: `sample_nuts(..., mass=bl.laplace(...))`.
        num_draws: Number of draws of the Gaussian.

    Returns:
        The log evidence and its standard error.

    Raises:
        ValueError: If the chains did not move in the coordinates of a Gaussian, the prior is not normalised,
            or `num_draws` is below 100.

    Example:
        >>> chains = bl.sample_nuts(key, tangent, rows, mass=bl.laplace(tangent, rows), num_warmup=100)
        >>> evidence = bl.log_evidence(key, chains)
        >>> abs(evidence.value - bl.laplace(tangent, rows).log_evidence) < 0.5
        True
    """
    key = check_key(key)
    check_at_least({"num_draws": num_draws}, 100)
    target = chains.target
    if target.affine is None:
        raise ValueError(
            "bridge sampling needs chains that moved in the coordinates of a Gaussian; sample with "
            "mass=bl.laplace(tangent, train)"
        )
    if target.view.observed:
        raise ValueError(
            f"the evidence needs a normalised prior; this one has factors or observed sites "
            f"({', '.join(target.view.observed)})"
        )
    flat = chains.vectors.reshape(-1, chains.vectors.shape[-1])
    posterior = np.asarray(target.positions(jnp.asarray(flat)))
    gaussian = np.asarray(jax.random.normal(key, (num_draws, posterior.shape[1])))

    def each(z: Array, inputs: Any) -> Array:
        return jax.lax.map(lambda one: target.log_density(one, inputs), z, batch_size=64)

    run = jax.jit(each)

    # log p(y, z) - log q(z), where q(z) = N(z; 0, I).
    def ratio(z: np.ndarray) -> np.ndarray:
        joint = (
            np.asarray(run(jnp.asarray(z, jnp.result_type(float)), target.inputs), np.float64)
            + target.log_constant
        )
        normal = -0.5 * (z.astype(np.float64) ** 2).sum(1) - 0.5 * z.shape[1] * np.log(2 * np.pi)
        return joint - normal

    return _bridge(ratio(posterior), ratio(gaussian), chains.vectors.shape[:2])


def _bridge(posterior: np.ndarray, gaussian: np.ndarray, shape: tuple[int, int]) -> LogEvidence:
    """The fixed point, from log ratios joint / Gaussian at draws of both.

    Args:
        posterior: Log ratios at the posterior's draws, in nats, chain after chain.
        gaussian: Log ratios at the Gaussian's draws, in nats.
        shape: Numbers of chains and of draws in each.
    """
    # Autocorrelated draws count as their effective number.
    effective = float(bulk_ess(posterior.reshape(*shape, 1))[0])
    share = effective / (effective + len(gaussian))
    # Ratios can be of the order of -1,000 nats: without the shift their exponentials would underflow.
    shift = float(np.median(posterior))
    p, g = posterior - shift, gaussian - shift
    value = 0.0

    # q h in the notation of the header, with f / (p(y) q) = exp(ratio - value); the cap prevents overflow.
    def weights(ratio: np.ndarray, value: float) -> np.ndarray:
        return 1 / (share * np.exp(np.minimum(ratio - value, 500.0)) + 1 - share)

    for _ in range(ITERATIONS):
        top = np.mean(weights(g, value) * np.exp(g - value))
        bottom = np.mean(weights(p, value))
        step = float(np.log(top / bottom))
        value += step
        if abs(step) < 1e-9:
            break
    first, second = weights(g, value) * np.exp(g - value), weights(p, value)
    variance = first.var() / first.mean() ** 2 / len(g) + second.var() / second.mean() ** 2 / effective
    return LogEvidence(value + shift, float(variance**0.5))
