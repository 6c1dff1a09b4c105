r"""R-hat, effective sample sizes, Monte Carlo errors, importance weights and what is read off them, by ArviZ.

    MCSE(mean) = sd / sqrt(ESS),    MCSE(sd) = sd(|x - mean|^2) / (2 sd sqrt(ESS of |x - mean|^2))

The one file that imports `arviz_stats`. Arrays have axes (chain, draw, function).

References: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), arXiv 1903.08008; Vehtari, Simpson,
Gelman, Yao and Gabry (2024), arXiv 1507.02646; Margossian et al. (2024), arXiv 2110.13017, for nested R-hat.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float

RANGE = 600.0
"""Most nats between the weights of a tail; the least double is e^-708 of the largest weight."""


def bulk_ess(values: Float[np.ndarray, "chain draw k"]) -> Float[np.ndarray, " k"]:
    """Effective number of draws for the bulk of each function, at most the number of draws."""
    from arviz_stats.base import array_stats

    found = np.asarray(array_stats.ess(values, chain_axis=0, draw_axis=1, method="bulk"), np.float64)
    return np.minimum(found, values.shape[0] * values.shape[1])


def tail_ess(values: Float[np.ndarray, "chain draw k"]) -> Float[np.ndarray, " k"]:
    """Effective number of draws for the 5 % and 95 % quantiles of each function, the smaller one."""
    from arviz_stats.base import array_stats

    ends = (0.05, 0.95)
    return np.asarray(
        array_stats.ess(values, chain_axis=0, draw_axis=1, method="tail", prob=ends), np.float64
    )


def rank_rhat(values: Float[np.ndarray, "chain draw k"]) -> Float[np.ndarray, " k"]:
    """Rank-normalised split R-hat of each function."""
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.rhat(values, chain_axis=0, draw_axis=1, method="rank"), np.float64)


def nested_rhat(values: Float[np.ndarray, "chain draw k"], *, size: int) -> Float[np.ndarray, " k"]:
    """Nested R-hat of each function, where every `size` chains in a row form a superchain."""
    from arviz_stats.base import array_stats

    owner = np.repeat(np.arange(len(values) // size), size)
    found = [array_stats.rhat_nested(values[..., k], owner) for k in range(values.shape[2])]
    return np.asarray(found, np.float64)


def chain_mcse(values: Float[np.ndarray, "chain draw k"]) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the mean and of the standard deviation of each function, from dependent draws."""
    from arviz_stats.base import array_stats

    # `array_stats.mcse(method="sd")` divides by the effective number for the mean. Chains that alternate have
    # more of these than draws, and the error of the standard deviation would come out too small.
    for_mean, for_sd = (
        np.asarray(array_stats.ess(values, chain_axis=0, draw_axis=1, method=method), np.float64)
        for method in ("mean", "sd")
    )
    return _errors(values.reshape(-1, values.shape[2]), for_mean, for_sd)


def independent_mcse(values: Float[np.ndarray, "s k"]) -> tuple[np.ndarray, np.ndarray]:
    """The same from independent draws."""
    count = np.full(values.shape[1], float(len(values)))
    return _errors(values, count, count)


def _errors(values: np.ndarray, for_mean: np.ndarray, for_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both errors by the formulas above, zero for functions that do not vary."""
    sd = values.std(0, ddof=1)
    fluctuation = ((values - values.mean(0)) ** 2).std(0, ddof=1)
    varies = sd > 0
    mean = sd / np.sqrt(np.where(varies, for_mean, 1.0))
    by_delta = fluctuation / np.where(varies, 2 * sd * np.sqrt(for_sd), 1.0)
    return mean, np.where(varies, by_delta, 0.0)


def pareto_k(log_weights: Float[np.ndarray, " s"]) -> float:
    """Shape of the Pareto law fitted to the largest weights.

    Minus infinity where the largest are equal, as where they differ by less than their densities are
    rounded by; infinity where the weights of the fitted tail are more than `RANGE` nats apart. In double
    precision the lower ones vanish, ArviZ drops them from the tail, and may call the weights harmless. A
    Pareto law of shape k spreads the logs of n weights over about k log n.
    """
    from arviz_stats.base import array_stats

    ordered = np.sort(np.asarray(log_weights, np.float64))
    count = len(ordered)
    tail = int(3 * count**0.5) if count > 225 else count // 5  # the tail that ArviZ fits
    if ordered[-1] - ordered[-tail - 1] > RANGE:
        return np.inf
    if np.ptp(ordered[-tail:]) < 1e-9:  # ArviZ raises an error
        return -np.inf
    # ArviZ smooths the weights of leave-one-out, 1 / likelihood, and turns the sign of what it is given.
    _, shape = array_stats.psislw(-ordered)
    return float(shape)


def smoothed_weights(log_weights: Float[np.ndarray, "s k"]) -> Float[np.ndarray, "s k"]:
    """Normalised importance weights of each column, the largest replaced by quantiles of a Pareto law."""
    from arviz_stats.base import array_stats

    smooth, _ = array_stats.psislw(-np.asarray(log_weights, np.float64), axis=0)
    weights = np.exp(np.moveaxis(smooth, -1, 0))
    return weights / weights.sum(0)


def power_sensitivity(tree: Any, group: str) -> dict[str, np.ndarray]:
    """Change of each posterior variable of a DataTree as the prior or the likelihood is raised to a power.

    Args:
        tree: With the groups `posterior`, `log_prior` and `log_likelihood`.
        group: "prior" or "likelihood".

    Returns:
        Sensitivity of each variable: distance of the distribution functions by change of log2 power.
    """
    import arviz_stats

    densities = tree[f"log_{group}"].to_dataset().to_array()
    total = densities.sum([dim for dim in densities.dims if dim not in ("chain", "draw")])
    if np.ptp(total.values) == 0:  # ArviZ fits no tail to equal weights; they change nothing
        return {name: np.zeros(x.shape[2:]) for name, x in tree["posterior"].to_dataset().items()}
    with _quiet():
        found = arviz_stats.psense(tree, group=group)
    return {name: np.asarray(found[name], np.float64) for name in found.data_vars}


def approximate_loo(
    tree: Any,
    log_p: Float[np.ndarray, " s"],
    log_q: Float[np.ndarray, " s"],
    *,
    observations: int | None = None,
    seed: int = 0,
) -> Any:
    """ArviZ's record of leave-one-out from draws of an approximation, with pointwise values.

    Args:
        tree: With the group `log_likelihood` of one variable.
        log_p: Log of the joint density at every draw.
        log_q: Log-density of every draw under the approximation.
        observations: How many rows to leave out; all when omitted.
        seed: Of the choice of rows.
    """
    import arviz_stats

    with _quiet():
        if observations is None:
            return arviz_stats.loo_approximate_posterior(tree, log_p, log_q, pointwise=True)
        options = {"log_p": log_p, "log_q": log_q, "reff": 1.0, "seed": seed}
        return arviz_stats.loo_subsample(tree, observations, pointwise=True, **options)


def compare_elpd(records: Mapping[str, Any]) -> Any:
    """ArviZ's table of several such records, best first, weights by stacking: a pandas DataFrame."""
    import arviz_stats

    with _quiet():
        return arviz_stats.compare(dict(records), method="stacking")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ArviZ's warnings of large k, which callers report themselves, and of its own inner workings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        warnings.filterwarnings("ignore", message="Number of tail draws cannot be")  # power-scaling, always
        warnings.filterwarnings("ignore", message="The inplace keyword in DataFrame")  # 0.8 on pandas 3.1
        yield
