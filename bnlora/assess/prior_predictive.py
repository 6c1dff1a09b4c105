r"""Prior predictive: logits and label probabilities under draws from the prior, before any row is seen.

    adapters_s ~ prior,    z_s(x) = logits(x; adapters_s),    p_s(x) = softmax(z_s(x))

A prior that is too wide puts nearly all mass on one class in most draws, for any text. A prior that is too
narrow does not change the base model. The *spread* of a row measures this: it is the standard deviation over
draws of the log-odds, as the root mean square over the C (C - 1) / 2 pairs of classes,

    spread(x)^2 = mean_{c < c'} Var_s(z_c - z_c') = 2 / (C - 1) sum_c Var_s(z_c - mean_c z).

For two classes it is the standard deviation of the log-odds. Like the likelihood, it does not depend on a
term that is added to the logits of all classes.

References: Box (1980), Sampling and Bayes' inference in scientific modelling and robustness; Gabry,
Simpson, Vehtari, Betancourt and Gelman (2019), Visualization in Bayesian workflow, arXiv 1709.01449.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose parts are imported when they are first used
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import broken_weights, check_key
from bnlora._util.display import Showable, Shown, Table
from bnlora._util.finding import Finding, Findings, Judged
from bnlora._util.typing import Adapters, Parameters
from bnlora.assess.prior_draws import draw_prior, prior_parameters
from bnlora.data.batch import Batch
from bnlora.priors import Prior
from bnlora.priors.declared import declared
from bnlora.program.cache import tracked_parts
from bnlora.program.likelihoods import require_softmax
from bnlora.program.model import Classifier

NAME = "prior predictive"
"""Name of the finding."""

NEARLY_ALL = 0.99
"""Probability of the top class above which a row counts as decided."""

MOST = 0.5
"""Share of decided rows and draws above which the verdict is "confident nonsense" or "sure as the base"."""

HARDLY = 0.02
"""Mean total variation from the base below which the verdict is "no change"."""


@dataclass(frozen=True, repr=False)
class PriorPredictive(Shown, Judged):
    """Logits of rows under draws from a prior, and those of the base model without adapters.

    Attributes:
        logits: Logits under each draw, shape (draw, row, class).
        base_logits: Logits with all adapters at zero, shape (row, class).

    Example:
        >>> predictive = bl.PriorPredictive(np.array([[[0.0, 0.0]], [[0.0, 2.0]]]), np.array([[0.0, 1.0]]))
        >>> predictive.probs[0]
        array([[0.5, 0.5]])
    """

    logits: Float[np.ndarray, "s n c"]
    base_logits: Float[np.ndarray, "n c"]

    @cached_property
    def probs(self) -> Float[np.ndarray, "s n c"]:
        """Label probabilities under each draw."""
        return scipy.special.softmax(np.asarray(self.logits, np.float64), axis=-1)

    @property
    def base_probs(self) -> Float[np.ndarray, "n c"]:
        """Label probabilities of the base model."""
        return scipy.special.softmax(np.asarray(self.base_logits, np.float64), axis=-1)

    @property
    def spread(self) -> Float[np.ndarray, " n"]:
        """Standard deviation of the log-odds over draws, in nats, by row; root mean square over pairs."""
        return np.asarray(_spread(np, np.asarray(self.logits, np.float64)))

    @property
    def overall_spread(self) -> float:
        """Root mean square of `spread` over rows; the target of `scale_for_spread`."""
        return float(np.sqrt(np.mean(self.spread**2)))

    @property
    def mean_confidence(self) -> float:
        """Probability of the top class, averaged over draws and rows."""
        return float(self.probs.max(-1).mean())

    @property
    def decided(self) -> float:
        """Share of draws and rows whose top class has a probability above `NEARLY_ALL`."""
        return float((self.probs.max(-1) > NEARLY_ALL).mean())

    @property
    def distance_from_base(self) -> float:
        """Total variation between label probabilities of a draw and of the base, mean over draws and rows."""
        return float(0.5 * np.abs(self.probs - self.base_probs).sum(-1).mean())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding, by the first rule that applies.

        1. "no change", a problem: `distance_from_base` is below `HARDLY`.
        2. "sure as the base", fine: `decided` is above `MOST`, and so is the base model's share. No scale of
           the prior changes this.
        3. "confident nonsense", a caution: `decided` is above `MOST`, and the base model's share is not.
        4. "reasonable", fine: none of the above. It means only that the prior is at neither extreme.
        """
        moved, decided = self.distance_from_base, self.decided
        if moved < HARDLY:
            sentence = (
                f"no change: the draws' probabilities differ from the base model's by {moved:.3f} on average "
                f"(rule: below {HARDLY:g})"
            )
            remedy = "raise the prior's scale, so that the adapters have an effect (bnlora.scale_for_spread)"
            return (Finding(NAME, "problem", sentence, moved, HARDLY, remedy),)
        base_share = float((self.base_probs.max(-1) > NEARLY_ALL).mean())
        shares = (
            f"{decided:.0%} of draws and rows put more than {NEARLY_ALL:.0%} on one class (rule: above "
            f"{MOST:.0%}; the base model does in {base_share:.0%} of the rows)"
        )
        if decided > MOST and base_share > MOST:
            sentence = f"sure as the base: {shares}; no scale changes that, check template and label words"
            return (Finding(NAME, "fine", sentence, decided, MOST),)
        if decided > MOST:
            remedy = "lower the prior's scale, so that most rows remain undecided (bnlora.scale_for_spread)"
            return (Finding(NAME, "caution", f"confident nonsense: {shares}", decided, MOST, remedy),)
        sentence = f"reasonable: {shares}; probabilities differ from the base's by {moved:.3f} on average"
        return (Finding(NAME, "fine", sentence, decided, MOST),)

    @property
    def verdict(self) -> str:
        """The finding and its remedy."""
        return self.findings[0].text

    @property
    def overview(self) -> tuple[Showable, ...]:
        """A table of the prior and the base model, and the finding."""
        draws, rows, classes = self.logits.shape
        low, median, high = np.quantile(self.spread, [0.0, 0.5, 1.0])
        base = self.base_probs.max(-1)
        numbers = (
            ("mean confidence", f"{self.mean_confidence:.3f}", f"{base.mean():.3f}"),
            (f"share above {NEARLY_ALL:g}", f"{self.decided:.3f}", f"{(base > NEARLY_ALL).mean():.3f}"),
            ("total variation from the base", f"{self.distance_from_base:.3f}", ""),
            ("spread of the log-odds, median row", f"{median:.3g}", ""),
            ("spread of the log-odds, all rows", f"{low:.3g} to {high:.3g}", ""),
        )
        sizes = f"{draws} draws, {rows:,} rows, {classes} classes"
        return (
            Table(f"Prior predictive: {sizes}", ("", "prior", "base model"), numbers),
            Findings("Verdict", self.findings),
        )

    def __repr__(self) -> str:
        draws, rows, classes = self.logits.shape
        low, median, high = np.quantile(self.spread, [0.0, 0.5, 1.0])
        base = self.base_probs.max(-1).mean()
        return (
            f"PriorPredictive({draws} draws, {rows} rows, {classes} classes)\n"
            f"  spread of the log-odds: {median:.3g} (median row; {low:.3g} to {high:.3g})\n"
            f"  mean confidence: {self.mean_confidence:.3f} (base model {base:.3f})\n"
            f"  {self.verdict}"
        )


def prior_predictive(
    key: Array,
    model: Classifier,
    data: Batch,
    *,
    num_draws: int = 200,
    batch_size: int = 32,
    params: Parameters | None = None,
    console: Console | None = None,
) -> PriorPredictive:
    """Predict rows with draws from the prior, before any fit.

    Args:
        key: Random key; the same key gives the same draws for any rows.
        model: A `Classifier` whose prior has sample sites.
        data: Rows; labels are not read.
        num_draws: Number of prior draws.
        batch_size: Rows to run at a time.
        params: All parameters of the prior; start values drawn from the key by default.
        console: Where to draw a progress bar; the terminal or notebook by default.

    Returns:
        Logits by draw, and those of the base model, computed by the same program with adapters of zero.

    Raises:
        ValueError: If there are no rows or fewer than two draws, `batch_size` is below one, the prior has no
            random variables, cannot be drawn from (see `draw_prior`) or uses a reserved name, a parameter of
            the prior has no value, the base has no row for a token, or logits are not finite.

    Example:
        >>> bl.prior_predictive(key, model, rows, num_draws=8).probs.shape
        (8, 8, 2)
    """
    key = check_key(key)
    _check_sizes(data, num_draws, batch_size)
    require_softmax(model.likelihood, "bl.prior_predictive")
    model.check_tokens(data)
    _check_random(model)
    params_key, draw_key = jax.random.split(key)
    params = prior_parameters(params_key, model) if params is None else params
    draws = jax.jit(lambda k, p: _with_base(model, draw_prior(k, model, p, num_draws)))(draw_key, params)
    compiled = jax.jit(lambda weights, adapters, batch: _logits_by_draw(model, weights, adapters, batch))
    logits = np.empty((num_draws + 1, len(data), model.num_classes), np.float32)
    for part in tracked_parts(data, batch_size, "prior predictive", console):
        computed = np.asarray(compiled(model.base.weights, draws, part.batch))
        logits[:, part.rows] = computed[:, : len(part.rows)]
    broken = np.array([not np.isfinite(of_draw).all() for of_draw in logits])
    if broken[0]:
        remedy = broken_weights(model.base.weights) or "check the base and its options"
        raise ValueError(f"logits must be finite, but those of the base model are not; {remedy}")
    if broken.any():
        raise ValueError(f"logits are not finite in {broken.sum()} of {num_draws} draws; lower the scale")
    return PriorPredictive(logits[1:], logits[0])


def scale_for_spread(
    key: Array,
    model: Classifier,
    prior_at: Callable[[Array], Prior],
    data: Batch,
    *,
    spread: float,
    bounds: tuple[float, float] = (1e-3, 1e3),
    num_draws: int = 200,
    tolerance: float = 1e-4,
) -> float:
    """Find the scale at which a prior has a given spread of the log-odds.

    All evaluations use the same random numbers and one compiled program. The spread is therefore a smooth
    function of the scale, and `prior_predictive` with the same key and number of draws reproduces it. The
    scale is found by Brent's method on the log scale. If the spread is not monotone in the scale, the result
    is one of several solutions.

    Args:
        key: Random key.
        model: A `Classifier`; its prior is not used.
        prior_at: Function from a scale to a prior. The scale is a traced array of shape (): its value must
            not be used in Python, as in `if scale > 0`.
        data: Rows, all run at once; a few tens suffice.
        spread: The target of `PriorPredictive.overall_spread`, in nats of log-odds.
        bounds: Smallest and largest scale.
        num_draws: Number of prior draws.
        tolerance: Relative tolerance of the scale.

    Returns:
        The scale, to a relative `tolerance`.

    Raises:
        ValueError: If the spread is not positive, the bounds are not positive and increasing, or no scale
            within the bounds has this spread.

    Example:
        >>> def prior_at(scale):
        ...     return bl.priors.normal(scale={"a": 1.0, "b": scale})
        >>> wide = bl.scale_for_spread(key, model, prior_at, rows, spread=0.2, num_draws=8)
        >>> narrow = bl.scale_for_spread(key, model, prior_at, rows, spread=0.1, num_draws=8)
        >>> bool(wide > narrow)
        True
    """
    key = check_key(key)
    _check_sizes(data, num_draws, 1)
    low, high = bounds
    if not (spread > 0 and 0 < low < high):
        raise ValueError(f"expected spread > 0 and 0 < least < greatest scale; got {spread} and {bounds}")
    model = model.with_prior(model.prior.program)  # remove the fixed sites of a conditional model
    if model.kind == "tangent":  # check the frames once at a concrete scale: a traced one has no values
        model.with_prior(prior_at(jnp.asarray(low, jnp.float32)))
    prepared = model.prepare(data)
    params_key, draw_key = jax.random.split(key)

    @jax.jit
    def spread_at(weights: Any, rows: Batch, scale: Array) -> Array:
        at = model.under(prior_at(scale))
        draws = draw_prior(draw_key, at, prior_parameters(params_key, at), num_draws)
        return jnp.sqrt(jnp.mean(_spread(jnp, _logits_by_draw(at, weights, draws, rows)) ** 2))

    def excess(log_scale: float) -> float:
        scale = jnp.asarray(np.exp(log_scale), jnp.float32)  # always one dtype: a second would retrace
        value = float(spread_at(model.base.weights, prepared, scale))
        # A spread that underflows to zero has no logarithm; clip it, which keeps it below any target.
        return float(np.log(np.maximum(value, np.finfo(np.float32).tiny) / spread))

    ends = np.log(low), np.log(high)
    at_low, at_high = map(excess, ends)
    if not at_low * at_high <= 0:  # written so that NaN also raises
        least, greatest = spread * np.exp(at_low), spread * np.exp(at_high)
        raise ValueError(
            f"no scale in the bounds gives a spread of {spread:g}: it is {least:.3g} at scale {low:g} and "
            f"{greatest:.3g} at scale {high:g}; "
            f"{broken_weights(model.base.weights) or 'choose a spread in between or move the bounds'}"
        )
    return float(np.exp(scipy.optimize.brentq(excess, *ends, xtol=tolerance)))


def _check_random(model: Classifier) -> None:
    """Raise `ValueError` unless the prior has sample sites and valid names."""
    program = declared(model.prior)
    program.check_names()
    if not program.latent:
        raise ValueError(
            "a prior predictive needs a prior with sample sites; this one has only parameters (as "
            "`priors.point` has), so every draw would be the same"
        )


def _check_sizes(data: Batch, num_draws: int, batch_size: int) -> None:
    if len(data) < 1 or num_draws < 2 or batch_size < 1:
        raise ValueError(
            "a prior predictive needs at least one row, num_draws=2 and batch_size=1; got "
            f"{len(data)} rows, num_draws={num_draws}, batch_size={batch_size}"
        )


def _with_base(model: Classifier, draws: Adapters) -> Adapters:
    """The draws after one of zeros: adapters of zero give the base model in the same compiled program."""
    return jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x]), draws)


def _logits_by_draw(model: Classifier, weights: Any, adapters: Adapters, batch: Batch) -> Array:
    """Logits of shape (draw, row, class); the part that no adapter changes is computed once."""
    prepared = model.prepared(weights, batch)
    return jax.lax.map(lambda one: model.logits(weights, one, prepared), adapters)


def _spread(numbers: Any, logits: Any) -> Any:
    """Spread by row of logits of shape (draw, row, class); `numbers` is `numpy` or `jax.numpy`."""
    # Centring over classes gives the right-hand form of the module docstring, without a loop over pairs.
    centred = logits - logits.mean(-1, keepdims=True)
    return numbers.sqrt(2 / (logits.shape[-1] - 1) * numbers.var(centred, axis=0, ddof=1).sum(-1))
