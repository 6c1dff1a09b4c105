r"""Predictions of outcomes that are not classes: values and texts.

A value has a mixture over draws of its noise distributions; its variance splits into two parts,

    Var y = mean_s Var(y | draw s) + Var_s E(y | draw s)       (aleatoric, epistemic).

A text has the mean over draws of its probability, p(text) = 1/S sum_s prod_j p(token_j | before j, draw s).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_key
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora.data.batch import Batch
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import drawn_outputs, log_mixture
from bnlora.program.likelihoods.regression import Noise, Regression

BISECTIONS = 60
"""Halvings of the interval that holds a quantile of a mixture."""


@dataclass(frozen=True, eq=False)
class ValuePrediction(Shown):
    """Predictive distribution of the value of every row.

    Attributes:
        draw_locations: Location of the value under each draw, shape (draw, row), in units of the values.
        draw_scales: Scale of the noise under each draw, shape (draw, row).
        noise: "normal" or "student_t".
        df: Degrees of freedom of Student-t noise.

    Example:
        >>> prediction = bl.ValuePrediction(np.array([[0.0], [2.0]]), np.ones((2, 1)))  # two draws of one row
        >>> prediction.mean, prediction.epistemic_variance, prediction.aleatoric_variance
        (array([1.]), array([1.]), array([1.]))
    """

    draw_locations: Float[np.ndarray, "s n"]
    draw_scales: Float[np.ndarray, "s n"]
    noise: Noise = "normal"
    df: float = 4.0

    @property
    def _noise(self) -> Any:
        import scipy.stats  # at first use: it takes long

        return scipy.stats.norm if self.noise == "normal" else scipy.stats.t(self.df)

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """Mean of the locations, which is the mean of the value where it exists (df above 1)."""
        return self.draw_locations.mean(0)

    @property
    def aleatoric_variance(self) -> Float[np.ndarray, " n"]:
        """Mean over draws of the variance of the noise; infinite for df of at most 2."""
        return (self.draw_scales**2).mean(0) * float(self._noise.var())

    @property
    def epistemic_variance(self) -> Float[np.ndarray, " n"]:
        """Variance of the location over draws."""
        return self.draw_locations.var(0)

    @property
    def sd(self) -> Float[np.ndarray, " n"]:
        """Standard deviation of the value."""
        return np.sqrt(self.aleatoric_variance + self.epistemic_variance)

    def log_density(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Log-density of one value of each row under the mixture, in nats."""
        by_draw = self._noise.logpdf(self._standard(values)) - np.log(self.draw_scales)
        return log_mixture(by_draw)

    def cdf(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Probability that the value of each row is at most the given one."""
        return self._noise.cdf(self._standard(values)).mean(0)

    def quantile(self, level: float) -> Float[np.ndarray, " n"]:
        """The quantile of the mixture of each row, by bisection.

        Raises:
            ValueError: If the level is not strictly between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"the level of a quantile must lie strictly between 0 and 1; got {level}")
        # The quantile of a mixture is between the least and the largest quantile of its parts.
        by_draw = self.draw_locations + self.draw_scales * self._noise.ppf(level)
        low, high = by_draw.min(0), by_draw.max(0)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def at(self, uniform: Float[np.ndarray, "s n"]) -> Float[np.ndarray, "s n"]:
        """One value for each draw and row: the quantiles of their noise at these levels."""
        return self.draw_locations + self.draw_scales * self._noise.ppf(uniform)

    def interval(self, level: float = 0.9) -> Float[np.ndarray, "2 n"]:
        """The central interval of this probability of each row, lower and upper ends."""
        return np.stack([self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)])

    def _standard(self, values: Float[np.ndarray, " n"]) -> np.ndarray:
        return (np.asarray(values, np.float64) - self.draw_locations) / self.draw_scales

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Distribution over rows of mean and uncertainty."""
        by_row = {
            "mean": self.mean,
            "standard deviation": self.sd,
            "noise (aleatoric sd)": np.sqrt(self.aleatoric_variance),
            "adapters (epistemic sd)": np.sqrt(self.epistemic_variance),
        }
        rows = tuple(
            (name, *(f"{x:.3g}" for x in (values.mean(), *np.quantile(values, [0.05, 0.5, 0.95]))))
            for name, values in by_row.items()
        )
        return (Table(repr(self), ("over rows", "mean", "5%", "median", "95%"), rows),)

    def __repr__(self) -> str:
        draws, rows = self.draw_locations.shape
        return f"ValuePrediction({rows} rows, {self.noise} noise, {draws} draws)"


@dataclass(frozen=True, eq=False)
class TextPrediction(Shown):
    """Predictive probability of the text of every row.

    Attributes:
        draw_log_likelihoods: Log-likelihood of each text under each draw, shape (draw, row), in nats.
        num_tokens: Number of scored tokens of each text, shape (row,).

    Example:
        >>> prediction = bl.TextPrediction(np.log([[0.25], [0.75]]), np.array([2]))  # two draws of one text
        >>> np.exp(prediction.log_likelihood), round(prediction.perplexity, 3)
        (array([0.5]), 1.414)
    """

    draw_log_likelihoods: Float[np.ndarray, "s n"]
    num_tokens: Float[np.ndarray, " n"]

    @property
    def log_likelihood(self) -> Float[np.ndarray, " n"]:
        """Log of the mean over draws of the probability of each text, in nats."""
        by_draw = self.draw_log_likelihoods
        return log_mixture(by_draw)

    @property
    def nll_per_token(self) -> float:
        """Negative log-likelihood of all texts, divided by the number of their tokens, in nats."""
        return float(-self.log_likelihood.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(`nll_per_token`)."""
        return float(np.exp(self.nll_per_token))

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Sizes and perplexity."""
        about = {
            "tokens": f"{int(self.num_tokens.sum()):,}",
            "negative log-likelihood of a token (nats)": f"{self.nll_per_token:.4f}",
            "perplexity": f"{self.perplexity:.3f}",
        }
        return (facts(repr(self), about),)

    def __repr__(self) -> str:
        draws, rows = self.draw_log_likelihoods.shape
        return f"TextPrediction({rows} texts, {draws} draws)"


def predict_values(
    key: Array,
    posterior: Posterior,
    data: Batch,
    *,
    num_draws: int = 32,
    batch_size: int = 32,
    console: Console | None = None,
) -> ValuePrediction:
    """Predict the value of every row from posterior draws.

    Args:
        key: Random key of the draws.
        posterior: A posterior of a model whose likelihood is `bl.likelihoods.Regression`.
        data: Rows to predict; values are not read.
        num_draws: Number of posterior draws S.
        batch_size: Rows to run at a time.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        The mixture of every row.

    Raises:
        ValueError: If the model is not one of values, or under the same conditions as `predict`.

    Example:
        >>> values = bl.likelihoods.Regression(model.likelihood)
        >>> regression = bl.Classifier(base, sites, bl.priors.normal(), likelihood=values)
        >>> adapters = numpyro.handlers.seed(regression.prior, key)()
        >>> bl.predict_values(key, bl.PointPosterior(regression, adapters), rows, num_draws=1)
        ValuePrediction(8 rows, normal noise, 1 draws)
    """
    key = check_key(key)
    likelihood = posterior.model.likelihood
    if not isinstance(likelihood, Regression):
        raise ValueError(
            f"bl.predict_values needs a model of values; got a model of {likelihood.outcome}s "
            f"({type(likelihood).__name__})"
        )
    outputs = drawn_outputs(key, posterior, data, num_draws=num_draws, batch_size=batch_size, console=console)
    return ValuePrediction(outputs[..., 0], outputs[..., 1], likelihood.noise, likelihood.df)


def predict_texts(
    key: Array,
    posterior: Posterior,
    data: Batch,
    *,
    num_draws: int = 32,
    batch_size: int = 32,
    console: Console | None = None,
) -> TextPrediction:
    """Predict the probability of the text of every row from posterior draws.

    Args:
        key: Random key of the draws.
        posterior: A posterior of a model whose likelihood is `bl.likelihoods.Texts`.
        data: Texts, as from `bl.language_modelling`.
        num_draws: Number of posterior draws S.
        batch_size: Rows to run at a time.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        Log-likelihoods by draw, and the mixture's.

    Raises:
        ValueError: If the model is not one of texts, or under the same conditions as `predict`.

    Example:
        >>> from datasets import Dataset
        >>> table = Dataset.from_dict({"text": ["the film was good", "the plot is bad"]})
        >>> own = bl.load(model_folder)  # with a tokenizer
        >>> texts, places = bl.language_modelling(table, own, text="text"), bl.select(own, ["v_proj"], rank=1)
        >>> language = bl.Classifier(own, places, bl.priors.normal(), likelihood=bl.likelihoods.Texts())
        >>> adapters = numpyro.handlers.seed(language.prior, key)()
        >>> bl.predict_texts(key, bl.PointPosterior(language, adapters), texts.train, num_draws=1)
        TextPrediction(2 texts, 1 draws)
    """
    key = check_key(key)
    outcome = posterior.model.likelihood.outcome
    if outcome != "text" or data.choices is None:
        raise ValueError(
            "bl.predict_texts needs a model of texts and rows as from bl.language_modelling; got a model of "
            f"{outcome}s"
        )
    outputs = drawn_outputs(key, posterior, data, num_draws=num_draws, batch_size=batch_size, console=console)
    return TextPrediction(outputs[..., 0], np.asarray(data.choices.scored).sum((1, 2)).astype(np.float64))
