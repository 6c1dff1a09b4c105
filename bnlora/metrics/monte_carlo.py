r"""R-hat, effective sample sizes, Monte Carlo errors and importance weights, computed by ArviZ.

    MCSE(mean) = sd / sqrt(ESS),    MCSE(sd) = sd(|x - mean|^2) / (2 sd sqrt(ESS of |x - mean|^2))

Only this file imports `arviz_stats`. Arrays have axes (chain, draw, function).

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
"""Largest difference in nats between the weights of a tail; double precision underflows at e^-708."""


def bulk_ess(values: Float[np.ndarray, "chain draw k"]) -> Float[np.ndarray, " k"]:
    """Bulk effective sample size of each function, at most the number of draws."""
    from arviz_stats.base import array_stats

    ess = np.asarray(array_stats.ess(values, chain_axis=0, draw_axis=1, method="bulk"), np.float64)
    return np.minimum(ess, values.shape[0] * values.shape[1])


def tail_ess(values: Float[np.ndarray, "chain draw k"]) -> Float[np.ndarray, " k"]:
    """Tail effective sample size of each function: the smaller of those of the 5 % and 95 % quantiles."""
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
    """Nested R-hat of each function; every `size` consecutive chains form a superchain."""
    from arviz_stats.base import array_stats

    superchain = np.repeat(np.arange(len(values) // size), size)
    rhat = [array_stats.rhat_nested(values[..., k], superchain) for k in range(values.shape[2])]
    return np.asarray(rhat, np.float64)


def chain_mcse(values: Float[np.ndarray, "chain draw k"]) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the mean and of the standard deviation of each function, from dependent draws."""
    from arviz_stats.base import array_stats

    # `array_stats.mcse(method="sd")` divides by the effective sample size of the mean. For antithetic chains
    # this exceeds the number of draws, and the error of the standard deviation would be too small.
    for_mean, for_sd = (
        np.asarray(array_stats.ess(values, chain_axis=0, draw_axis=1, method=method), np.float64)
        for method in ("mean", "sd")
    )
    return _errors(values.reshape(-1, values.shape[2]), for_mean, for_sd)


def independent_mcse(values: Float[np.ndarray, "s k"]) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors of the mean and of the standard deviation of each function, from independent draws."""
    count = np.full(values.shape[1], float(len(values)))
    return _errors(values, count, count)


def _errors(values: np.ndarray, for_mean: np.ndarray, for_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both errors by the formulas of this module; zero for constant functions."""
    sd = values.std(0, ddof=1)
    fluctuation = ((values - values.mean(0)) ** 2).std(0, ddof=1)
    varies = sd > 0
    mean = sd / np.sqrt(np.where(varies, for_mean, 1.0))
    # Delta method: the standard deviation is the root of the mean square.
    by_delta = fluctuation / np.where(varies, 2 * sd * np.sqrt(for_sd), 1.0)
    return mean, np.where(varies, by_delta, 0.0)


def pareto_k(log_weights: Float[np.ndarray, " s"]) -> float:
    """Shape of the Pareto law fitted to the largest weights.

    It is minus infinity if the largest weights are equal up to rounding. It is infinity if the weights of the
    fitted tail are more than `RANGE` nats apart: the small ones then underflow in double precision, ArviZ
    drops them from the tail, and can report a small shape. A Pareto law of shape k spreads the logs of n
    weights over about k log n.
    """
    from arviz_stats.base import array_stats

    ordered = np.sort(np.asarray(log_weights, np.float64))
    count = len(ordered)
    tail = int(3 * count**0.5) if count > 225 else count // 5  # the tail that ArviZ fits
    if ordered[-1] - ordered[-tail - 1] > RANGE:
        return np.inf
    if np.ptp(ordered[-tail:]) < 1e-9:  # ArviZ raises an error
        return -np.inf
    # ArviZ expects log-likelihoods and smooths the leave-one-out weights 1 / likelihood: pass minus the logs.
    _, shape = array_stats.psislw(-ordered)
    return float(shape)


def smoothed_weights(log_weights: Float[np.ndarray, "s k"]) -> Float[np.ndarray, "s k"]:
    """Normalised importance weights of each column; quantiles of a Pareto law replace the largest weights."""
    from arviz_stats.base import array_stats

    smooth, _ = array_stats.psislw(-np.asarray(log_weights, np.float64), axis=0)
    weights = np.exp(np.moveaxis(smooth, -1, 0))
    return weights / weights.sum(0)


def power_sensitivity(tree: Any, group: str) -> dict[str, np.ndarray]:
    """Sensitivity of each posterior variable of a DataTree to a power of the prior or of the likelihood.

    Args:
        tree: A DataTree with the groups `posterior`, `log_prior` and `log_likelihood`.
        group: "prior" or "likelihood".

    Returns:
        Sensitivity of each variable: the distance of the distribution functions per change of the log2 power.
    """
    import arviz_stats

    densities = tree[f"log_{group}"].to_dataset().to_array()
    total = densities.sum([dim for dim in densities.dims if dim not in ("chain", "draw")])
    if np.ptp(total.values) == 0:  # ArviZ cannot fit a tail to equal weights; their sensitivity is zero
        return {name: np.zeros(x.shape[2:]) for name, x in tree["posterior"].to_dataset().items()}
    with _quiet():
        sensitivity = arviz_stats.psense(tree, group=group)
    return {name: np.asarray(sensitivity[name], np.float64) for name in sensitivity.data_vars}


def approximate_loo(
    tree: Any,
    log_p: Float[np.ndarray, " s"],
    log_q: Float[np.ndarray, " s"],
    *,
    observations: int | None = None,
    seed: int = 0,
) -> Any:
    """ArviZ's leave-one-out result for draws of an approximation, with pointwise values.

    Args:
        tree: A DataTree with the group `log_likelihood` of one variable.
        log_p: Log of the joint density at every draw.
        log_q: Log-density of every draw under the approximation.
        observations: Number of rows to leave out; all if omitted.
        seed: Seed for the choice of rows.
    """
    import arviz_stats

    with _quiet():
        if observations is None:
            return arviz_stats.loo_approximate_posterior(tree, log_p, log_q, pointwise=True)
        options = {"log_p": log_p, "log_q": log_q, "reff": 1.0, "seed": seed}
        return arviz_stats.loo_subsample(tree, observations, pointwise=True, **options)


def compare_elpd(records: Mapping[str, Any]) -> Any:
    """ArviZ's comparison table of leave-one-out results, a pandas DataFrame: best first, stacking weights."""
    import arviz_stats

    with _quiet():
        return arviz_stats.compare(dict(records), method="stacking")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ArviZ's warnings about large k, which callers report, and about its own internals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
        warnings.filterwarnings("ignore", message="Number of tail draws cannot be")  # power-scaling, always
        warnings.filterwarnings("ignore", message="The inplace keyword in DataFrame")  # 0.8 on pandas 3.1
        yield
