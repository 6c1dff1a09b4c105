r"""Hamiltonian Monte Carlo and the No-U-Turn sampler on the adapters: the reference of this library.

The target is the exact posterior of the sampled sites, with all rows in every gradient. Both samplers leave
it invariant for any step size. Each chain adapts its own step and mass matrix in Stan's windows.

References: Neal (2011), MCMC using Hamiltonian dynamics; Hoffman and Gelman (2014), The No-U-Turn sampler.
"""

from collections.abc import Sequence
from typing import Unpack, get_args

from jax import Array

from bnlora._util.checks import check_at_least, check_key, check_option, check_positive
from bnlora.data.batch import Batch
from bnlora.infer.mcmc.chains import Chains
from bnlora.infer.mcmc.options import Options, sampled
from bnlora.infer.mcmc.run import Method
from bnlora.infer.mcmc.samplers import Hmc, LogDensity, Mass, Nuts, Tuning, hamiltonian, warm_up
from bnlora.infer.mcmc.whitened import Geometry
from bnlora.infer.svi.result import Fit
from bnlora.program.model import Classifier


def sample_nuts(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    num_warmup: int = 1000,
    target_acceptance: float = 0.95,
    mass: Mass | Geometry = "diagonal",
    initial_step_size: float = 0.1,
    max_doublings: int = 10,
    **options: Unpack[Options],
) -> Chains:
    r"""Sample latent sites by the No-U-Turn sampler.

    Args:
        key: Random key; the same key gives the same draws.
        model: A `Classifier`.
        train: Rows with labels; every gradient reads all of them.
        sites: The sites to sample, as names, families or patterns (`["lm_head"]`, `["tau", r".*\.V"]`); all
            when omitted.
        given: A fit of the same model, for the parameters of the prior, the values of the sites that are not
            sampled, and the starts.
        num_warmup: Transitions that adapt step and mass matrix; they are not kept.
        target_acceptance: Mean acceptance probability that the adaptation of the step aims at.
        mass: `"diagonal"` or `"dense"` mass matrix; or a Gaussian over the sampled sites
            (`bl.laplace(tangent, train)`), in whose coordinates the sampler then moves.
        initial_step_size: Step at the start of the adaptation.
        max_doublings: Largest number of doublings of a trajectory; 10 allow 1,023 gradients in a transition.
        **options: How many chains and draws, where they start, and where they are kept: `Options`.

    Returns:
        The chains, a posterior for `predict`, with a `certificate`.

    Raises:
        ValueError: If an option is out of its range, a pattern matches nothing, sites must be fixed and there
            is no fit, the log-density is not finite at a start, or the folder has the pieces of another run.

    Example:
        >>> chains = bl.sample_nuts(key, model, rows, num_warmup=20, num_draws=8, num_chains=2)
        >>> chains.certificate.passed  # eight draws are too few
        False
    """
    key = check_key(key)
    check_at_least({"max_doublings": max_doublings}, 1)
    mass, geometry = _geometry(mass)
    method = _method(Nuts(max_doublings), num_warmup, target_acceptance, mass, initial_step_size)
    return sampled(key, model, train, method, sites, given, options, geometry)


def sample_hmc(
    key: Array,
    model: Classifier,
    train: Batch,
    *,
    sites: Sequence[str] | None = None,
    given: Fit | None = None,
    num_warmup: int = 1000,
    target_acceptance: float = 0.95,
    mass: Mass | Geometry = "diagonal",
    initial_step_size: float = 0.1,
    num_integration_steps: int = 32,
    **options: Unpack[Options],
) -> Chains:
    """Sample latent sites by Hamiltonian Monte Carlo with trajectories of a fixed number of steps.

    Args:
        key: Random key; the same key gives the same draws.
        model: As in `sample_nuts`, like the arguments up to `initial_step_size`.
        train: Rows with labels.
        sites: The sites to sample.
        given: A fit of the same model.
        num_warmup: Transitions of the adaptation.
        target_acceptance: Acceptance probability that the adaptation aims at.
        mass: Shape of the mass matrix, or a Gaussian.
        initial_step_size: Step at the start of the adaptation.
        num_integration_steps: Leapfrog steps of a trajectory.
        **options: As in `sample_nuts`.

    Returns:
        The chains, with their certificate.

    Raises:
        ValueError: As `sample_nuts`.

    Example:
        >>> options = {"num_warmup": 20, "num_draws": 8, "num_chains": 2}
        >>> bl.sample_hmc(key, model, rows, num_integration_steps=2, **options).num_chains
        2
    """
    key = check_key(key)
    check_at_least({"num_integration_steps": num_integration_steps}, 1)
    mass, geometry = _geometry(mass)
    method = _method(Hmc(num_integration_steps), num_warmup, target_acceptance, mass, initial_step_size)
    return sampled(key, model, train, method, sites, given, options, geometry)


def _geometry(mass: Mass | Geometry) -> tuple[Mass, Geometry | None]:
    """Shape of the mass matrix, and the Gaussian in whose coordinates it is diagonal, if there is one."""
    return ("diagonal", mass) if isinstance(mass, Geometry) else (mass, None)


def _method(
    kind: Nuts | Hmc, num_warmup: int, target_acceptance: float, mass: Mass, initial_step_size: float
) -> Method:
    check_option("mass", mass, get_args(Mass))
    check_at_least({"num_warmup": num_warmup}, 20)
    check_positive({"initial_step_size": initial_step_size})
    if not 0 < target_acceptance < 1:
        raise ValueError(f"target_acceptance must lie in (0, 1); got {target_acceptance}")

    def tune(key: Array, log_density: LogDensity, position: Array) -> Tuning:
        return warm_up(
            key,
            kind,
            log_density,
            position,
            num_steps=num_warmup,
            target_acceptance=target_acceptance,
            mass=mass,
            initial_step_size=initial_step_size,
        )

    options = {
        "num_warmup": num_warmup,
        "target_acceptance": target_acceptance,
        "mass": mass,
        "initial_step_size": initial_step_size,
    }
    return Method(
        type(kind).__name__.upper(),
        {**kind.options(), **options},
        tune,
        lambda tuning, target, inputs: hamiltonian(kind, lambda u: target.log_density(u, inputs), tuning),
    )
