r"""Scores of predicted values and texts with bootstrap intervals.

For a row with value y and predictive distribution F with density f, mean m and quantiles q_a:

    nll   -log f(y)        rmse  sqrt(mean (y - m)^2)       mae  |y - q_0.5|
    crps  integral (F(x) - 1[y <= x])^2 dx = integral_0^1 2 (1[y <= q_a] - a)(q_a - y) da
    coverage_50, coverage_90   share of rows with y inside the central interval of this probability

CRPS is computed by the second form, at 100 levels a. NLL and CRPS are proper: lower is better. Coverage
should equal its name.

Reference: Gneiting and Raftery (2007), Strictly proper scoring rules, prediction, and estimation, JASA 102.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_key
from bnlora.metrics.summary import Estimate, Summary, bootstrap

LEVELS = (np.arange(100) + 0.5) / 100
"""Levels of the quantiles in CRPS."""


@runtime_checkable
class PredictedValues(Protocol):
    """Predictive distributions of real values, such as a `ValuePrediction`."""

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """Means."""
        ...

    def log_density(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Log-density of one value of each row, in nats."""
        ...

    def quantile(self, level: float) -> Float[np.ndarray, " n"]:
        """A quantile of each row."""
        ...


@runtime_checkable
class PredictedTexts(Protocol):
    """Predictive probabilities of texts, such as a `TextPrediction`."""

    @property
    def log_likelihood(self) -> Float[np.ndarray, " n"]:
        """Log-likelihood of each text, in nats."""
        ...

    @property
    def num_tokens(self) -> Float[np.ndarray, " n"]:
        """Number of scored tokens of each text."""
        ...


def crps(prediction: PredictedValues, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Continuous ranked probability score of each row, in units of the values.

    Args:
        prediction: Predictive distributions.
        values: Observed values, shape (n,).

    Returns:
        The scores, shape (n,); lower is better.
    """
    total = np.zeros(len(values))
    for level in LEVELS:
        quantile = prediction.quantile(float(level))
        total += 2 * ((values <= quantile) - level) * (quantile - values)
    return total / len(LEVELS)


def value_summary(
    key: Array, prediction: PredictedValues, values: Any, *, level: float = 0.95, num_resamples: int = 1000
) -> Summary:
    """Scores of predicted values with percentile bootstrap intervals over rows.

    Args:
        key: Random key of the bootstrap.
        prediction: A `ValuePrediction`.
        values: Observed values, shape (n,), or the `Batch` whose outcomes they are.
        level: Probability of the intervals.
        num_resamples: Number of bootstrap samples.

    Returns:
        Value and interval of every score; a mapping by name that prints as a table.

    Raises:
        ValueError: If there is not one finite value for each row, `level` is outside (0, 1), or
            `num_resamples` is below one.

    Example:
        >>> prediction = bl.ValuePrediction(np.zeros((1, 3)), np.ones((1, 3)))  # N(0, 1) for three rows
        >>> round(bl.metrics.value_summary(key, prediction, np.array([0.0, 1.0, -1.0]))["nll"].value, 3)
        1.252
    """
    key = check_key(key)
    observed = np.asarray(getattr(values, "outcomes", values), np.float64)
    means = prediction.mean
    if observed.shape != means.shape or not np.isfinite(observed).all():
        raise ValueError(f"expected one finite value for each of {len(means)} rows; got {observed.shape}")
    median = prediction.quantile(0.5)
    by_row = {
        "nll": -prediction.log_density(observed),
        "mae": np.abs(observed - median),
        "crps": crps(prediction, observed),
    }
    for percent in (50, 90):
        low, high = (prediction.quantile((1 + sign * percent / 100) / 2) for sign in (-1, 1))
        by_row[f"coverage_{percent}"] = (low <= observed) & (observed <= high)
    squared = (observed - means) ** 2
    scores: dict[str, Callable[[np.ndarray], float]] = {
        "rmse": lambda rows: float(squared[rows].mean() ** 0.5),
        **{name: _mean_of(x) for name, x in by_row.items()},
    }
    return _summary(key, scores, len(observed), level, num_resamples)


def text_summary(
    key: Array, prediction: PredictedTexts, *, level: float = 0.95, num_resamples: int = 1000
) -> Summary:
    """Negative log-likelihood of a token, in nats, and perplexity, with bootstrap intervals over texts.

    Args:
        key: Random key of the bootstrap.
        prediction: A `TextPrediction`.
        level: Probability of the intervals.
        num_resamples: Number of bootstrap samples.

    Returns:
        `nll_per_token` and `perplexity`; a mapping by name that prints as a table.

    Raises:
        ValueError: If `level` is outside (0, 1), or `num_resamples` is below one.

    Example:
        >>> prediction = bl.TextPrediction(np.log([[0.25, 0.5]]), np.array([2, 1]))
        >>> round(bl.metrics.text_summary(key, prediction)["perplexity"].value, 3)
        2.0
    """
    key = check_key(key)
    log_likelihood, tokens = prediction.log_likelihood, prediction.num_tokens

    def nll(rows: np.ndarray) -> float:
        return float(-log_likelihood[rows].sum() / tokens[rows].sum())

    scores = {"nll_per_token": nll, "perplexity": lambda rows: float(np.exp(nll(rows)))}
    return _summary(key, scores, len(tokens), level, num_resamples)


def _mean_of(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(values[rows].mean())


def _summary(
    key: Array,
    scores: Mapping[str, Callable[[np.ndarray], float]],
    num_rows: int,
    level: float,
    num_resamples: int,
) -> Summary:
    estimates: dict[str, Estimate] = {
        name: bootstrap(key, score, num_rows, level=level, num_resamples=num_resamples)
        for name, score in scores.items()
    }
    return Summary(estimates, level, num_rows)
