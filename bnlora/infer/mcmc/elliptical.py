r"""Elliptical slice sampling, for normal priors: no gradient, no step size, no tuning.

A move draws v from the prior, rotates towards it, u' = m + (u - m) cos t + (v - m) sin t, and shrinks the
range of t until the likelihood exceeds a threshold drawn beforehand. It leaves the posterior invariant. It
becomes slow if the data are much more informative than the prior.

Reference: Murray, Adams and MacKay (2010), Elliptical slice sampling.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_at_least, check_key
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.options import Options, sampled
from bnlora.infer.mcmc.run import Method
from bnlora.infer.mcmc.samplers import LogDensity, Sampler, Tuning, elliptical
from bnlora.infer.mcmc.target import Target
from bnlora.infer.svi.result import Fit
from bnlora.program.density import Density
from bnlora.program.model import Classifier


def sample_elliptical(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    num_warmup: int = 1000,
    steps_per_draw: int = 10,
    **options: Unpack[Options],
) -> Chains:
    """Sample latent sites with a normal prior by elliptical slice sampling.

    Args:
        key: Random key; the same key gives the same draws.
        model: As in `sample_nuts`, like the arguments up to `given`; the prior of the sampled sites must be
            normal with independent entries, such as `priors.normal()` or the whitened `priors.sparse_gp()`.
        train: Rows with labels.
        sites: The sites to sample.
        given: A fit of the same model.
        num_warmup: Moves before the first draw.
        steps_per_draw: Moves from one draw to the next.
        **options: As in `sample_nuts`.

    Returns:
        The chains, with their certificate.

    Raises:
        ValueError: As `sample_nuts`, and if the prior is not normal.

    Example:
        >>> chains = bl.sample_elliptical(key, model, rows, num_warmup=20, num_draws=8, num_chains=2)
        >>> chains.num_chains
        2
    """
    key = check_key(key)
    check_at_least({"num_warmup": num_warmup, "steps_per_draw": steps_per_draw}, 1)

    def build(tuning: Tuning, target: Target, inputs: Any) -> Sampler:
        mean, variance = map(jnp.asarray, normal_moments(target.view))
        warm, sampler = (
            elliptical(lambda u: target.log_likelihood(u, inputs), mean, variance, moves)
            for moves in (num_warmup, steps_per_draw)
        )
        return Sampler(lambda key, start: warm.step(key, warm.init(key, start))[0], sampler.step)

    def tune(key: Array, log_density: LogDensity, position: Array) -> Tuning:
        unused = jnp.zeros(())  # there is no step, mass or length to tune
        return Tuning(position, unused, unused, unused, jnp.asarray(0))

    method = Method(
        "elliptical slice", {"num_warmup": num_warmup, "steps_per_draw": steps_per_draw}, tune, build
    )
    return sampled(key, model, train, method, sites, given, options)


def normal_moments(view: Density) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Mean and variance of every coordinate under the prior, which must be normal with independent entries.

    They follow from the gradient of the log-density, g(u) = (mean - u) / variance. Only such a prior has a
    gradient that is linear with a constant diagonal; this is checked at three random vectors.

    Raises:
        ValueError: If the prior is not normal, or its entries are not independent.
    """
    score = jax.jit(jax.vmap(jax.grad(view.log_prior)))
    places = np.random.default_rng(0).normal(size=(4, view.size)).astype(np.float32)
    places[0] = 0
    with jax.ensure_compile_time_eval():
        gradients = np.asarray(score(places), np.float64)
    # places[0] = 0, so gradients[0] = precision * mean; the first other place gives the slope.
    precision = (gradients[0] - gradients[1]) / places[1]
    expected = gradients[0] - precision * places
    if not (np.allclose(gradients, expected, rtol=1e-3, atol=1e-3) and (precision > 0).all()):
        raise ValueError(
            "elliptical slice sampling needs sites whose prior is normal with independent entries, such as "
            "priors.normal() with constant scales; use sample_nuts for this prior"
        )
    return gradients[0] / precision, 1 / precision
