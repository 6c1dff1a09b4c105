r"""Microcanonical Langevin dynamics: many cheap moves, with a bias that depends on the step size.

The momentum has length one and is partly refreshed at every step. There is no accept step, so the draws
converge to a distribution that differs from the posterior; the difference grows with the step. The tuning
chooses the step by the variance of the energy error per dimension (5e-4). For a reference use `sample_nuts`.
This sampler is for targets on which NUTS is too slow; compare it with NUTS on a smaller one.

Reference: Robnik, De Luca, Silverstein and Seljak (2023), Microcanonical Hamiltonian Monte Carlo, arXiv
2212.08549.
"""

from collections.abc import Sequence
from typing import Unpack

from jax import Array

from bnlora._util.checks import check_at_least, check_key
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.options import Options, sampled
from bnlora.infer.mcmc.run import Method
from bnlora.infer.mcmc.samplers import mclmc, tune_mclmc
from bnlora.infer.svi.result import Fit
from bnlora.program.model import Classifier


def sample_mclmc(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    num_warmup: int = 5000,
    steps_per_draw: int = 32,
    **options: Unpack[Options],
) -> Chains:
    """Sample latent sites by microcanonical Langevin dynamics without an accept step.

    Args:
        key: Random key; the same key gives the same draws.
        model: As in `sample_nuts`, like the arguments up to `given`.
        train: Rows with labels.
        sites: The sites to sample.
        given: A fit of the same model.
        num_warmup: Length of the tuning; each chain takes about 0.3 times as many steps.
        steps_per_draw: Steps from one draw to the next.
        **options: As in `sample_nuts`.

    Returns:
        The chains; without an accept step they are never certified.

    Raises:
        ValueError: As `sample_nuts`, and if the target has only one dimension.

    Example:
        >>> chains = bl.sample_mclmc(key, model, rows, num_warmup=100, num_draws=8, num_chains=2)
        >>> chains.certificate.passed  # never: there is no accept step
        False
    """
    key = check_key(key)
    check_at_least({"num_warmup": num_warmup}, 100)
    check_at_least({"steps_per_draw": steps_per_draw}, 1)
    method = Method(
        "MCLMC",
        {"num_warmup": num_warmup, "steps_per_draw": steps_per_draw},
        lambda key, log_density, position: tune_mclmc(key, log_density, position, num_steps=num_warmup),
        lambda tuning, target, inputs: mclmc(lambda u: target.log_density(u, inputs), tuning, steps_per_draw),
        bias="step",
    )
    return sampled(key, model, train, method, sites, given, options)
