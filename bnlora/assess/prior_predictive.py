r"""What a prior believes before it has seen a row: logits and label probabilities under its draws.

    adapters_s ~ prior,    z_s(x) = logits(x; adapters_s),    p_s(x) = softmax(z_s(x))

A prior too wide puts nearly all mass on one class in most draws, whatever the text; one too narrow leaves
the base model as it is. The *spread* of a row says where between the two a prior stands: the standard
deviation over draws of a log-odds, the root mean square over the C (C - 1) / 2 pairs of classes,

    spread(x)^2 = mean_{c < c'} Var_s(z_c - z_c') = 2 / (C - 1) sum_c Var_s(z_c - mean_c z),

which for two classes is the standard deviation of the log-odds itself. It does not see what is added to all
classes at once, as the likelihood does not.

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
from bnlora.program.model import Classifier

NAME = "prior predictive"
"""Name of the finding."""

NEARLY_ALL = 0.99
"""Probability of the top class from which a row counts as decided."""

MOST = 0.5
"""Share of the rows and draws that must be decided for the verdict "confident nonsense"."""

HARDLY = 0.02
"""Mean distance in total variation from the base below which the verdict is "no change"."""


@dataclass(frozen=True, repr=False)
class PriorPredictive(Shown, Judged):
    """Draws of the logits of some rows under a prior, beside those of the untouched base model.

    Attributes:
        logits: Logits under each draw, shape (draw, row, class).
        base_logits: Logits with all adapters at zero, shape (row, class).

    Example:
        >>> believed = bl.PriorPredictive(np.array([[[0.0, 0.0]], [[0.0, 2.0]]]), np.array([[0.0, 1.0]]))
        >>> believed.probs[0]
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
        """Standard deviation of a log-odds over draws, by row: root mean square over pairs of classes."""
        return np.asarray(_spread(np, np.asarray(self.logits, np.float64)))

    @property
    def overall_spread(self) -> float:
        """Root mean square of `spread` over rows, the number that `scale_for_spread` sets."""
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
        """Total variation between a draw's label probabilities and the base's, averaged over both."""
        return float(0.5 * np.abs(self.probs - self.base_probs).sum(-1).mean())

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding, by the first of these rules that holds.

        1. "no change", a problem: `distance_from_base` is below `HARDLY`.
        2. "sure as the base", fine: `decided` is above `MOST`, and the base model's own share too. No scale
           of the prior changes this.
        3. "confident nonsense", a caution: `decided` is above `MOST`, and the base model's own share is not.
        4. "reasonable", fine: none of these. It says that the draws are neither of the two extremes, no more.
        """
        moved, decided = self.distance_from_base, self.decided
        if moved < HARDLY:
            sentence = (
                f"no change: the draws' probabilities differ from the base model's by {moved:.3f} on average "
                f"(rule: below {HARDLY:g})"
            )
            remedy = "raise the prior's scale, so that the adapters act; bnlora.scale_for_spread finds one"
            return (Finding(NAME, "problem", sentence, moved, HARDLY, remedy),)
        own = float((self.base_probs.max(-1) > NEARLY_ALL).mean())
        shares = (
            f"{decided:.0%} of draws and rows put more than {NEARLY_ALL:.0%} on one class (rule: above "
            f"{MOST:.0%}; the base model does in {own:.0%} of the rows)"
        )
        if decided > MOST and own > MOST:
            sentence = f"sure as the base: {shares}; no scale mends that, look at template and label words"
            return (Finding(NAME, "fine", sentence, decided, MOST),)
        if decided > MOST:
            remedy = "lower the prior's scale, to leave room for doubt; bnlora.scale_for_spread finds one"
            return (Finding(NAME, "caution", f"confident nonsense: {shares}", decided, MOST, remedy),)
        sentence = f"reasonable: {shares}; probabilities differ from the base's by {moved:.3f} on average"
        return (Finding(NAME, "fine", sentence, decided, MOST),)

    @property
    def verdict(self) -> str:
        """The finding and its remedy in one sentence."""
        return self.findings[0].text

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The numbers of draws and base model, and the finding."""
        draws, rows, classes = self.logits.shape
        low, middle, high = np.quantile(self.spread, [0.0, 0.5, 1.0])
        base = self.base_probs.max(-1)
        numbers = (
            ("mean confidence", f"{self.mean_confidence:.3f}", f"{base.mean():.3f}"),
            (f"share above {NEARLY_ALL:g}", f"{self.decided:.3f}", f"{(base > NEARLY_ALL).mean():.3f}"),
            ("total variation from the base", f"{self.distance_from_base:.3f}", ""),
            ("spread of the log-odds, median row", f"{middle:.3g}", ""),
            ("spread of the log-odds, all rows", f"{low:.3g} to {high:.3g}", ""),
        )
        sizes = f"{draws} draws, {rows:,} rows, {classes} classes"
        return (
            Table(f"Prior predictive: {sizes}", ("", "prior", "base model"), numbers),
            Findings("Verdict", self.findings),
        )

    def __repr__(self) -> str:
        draws, rows, classes = self.logits.shape
        low, middle, high = np.quantile(self.spread, [0.0, 0.5, 1.0])
        base = self.base_probs.max(-1).mean()
        return (
            f"PriorPredictive({draws} draws, {rows} rows, {classes} classes)\n"
            f"  spread of the log-odds: {middle:.3g} (median row; {low:.3g} to {high:.3g})\n"
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
    """Draw from the prior and run the model: what it says of some rows before any fit.

    Args:
        key: Random key; the same key gives the same draws for any rows.
        model: A `Classifier` whose prior has sample sites.
        data: Rows; labels are not read.
        num_draws: Number of prior draws.
        batch_size: Rows to run at a time.
        params: Parameters of the prior, all of them; one start drawn from the key when omitted.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        Logits by draw and those of the base model, which run through the same program with zero adapters.

    Raises:
        ValueError: When there are no rows, fewer than two draws or one row at a time, a prior without
            random variables or that cannot be drawn from (see `draw_prior`), a name that the model owns, a
            parameter of the prior without a value, a token that the base has no row for, or logits that are
            not finite.

    Example:
        >>> bl.prior_predictive(key, model, rows, num_draws=8).probs.shape
        (8, 8, 2)
    """
    key = check_key(key)
    _check_sizes(data, num_draws, batch_size)
    model.check_tokens(data)
    _check_random(model)
    params_key, draw_key = jax.random.split(key)
    params = prior_parameters(params_key, model) if params is None else params
    draws = jax.jit(lambda k, p: _with_base(model, draw_prior(k, model, p, num_draws)))(draw_key, params)
    compiled = jax.jit(lambda weights, adapters, batch: _logits_by_draw(model, weights, adapters, batch))
    logits = np.empty((num_draws + 1, len(data), len(model.label_ids)), np.float32)
    for part in tracked_parts(data, batch_size, "prior predictive", console):
        computed = np.asarray(compiled(model.base.weights, draws, part.batch))
        logits[:, part.rows] = computed[:, : len(part.rows)]
    broken = np.array([not np.isfinite(of_draw).all() for of_draw in logits])
    if broken[0]:
        remedy = broken_weights(model.base.weights) or "look at the base, and at how it runs"
        raise ValueError(f"logits must be finite, but the base model's own are not; {remedy}")
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
    """Find the scale at which a prior has a wanted spread on given rows.

    All evaluations use the same random numbers and one compiled program, so that the spread is a smooth
    function of the scale, and `prior_predictive` with this key and number of draws repeats it. Brent's
    method on log scale; where the spread is not monotone in the scale, one of the solutions.

    Args:
        key: Random key.
        model: A `Classifier`; its own prior is not used.
        prior_at: The prior at a scale, which comes as a traced array of shape (): it must not be read in
            Python, as by `if scale > 0`.
        data: Rows, all run at once; some tens suffice.
        spread: The wanted `PriorPredictive.overall_spread`, in nats of log-odds.
        bounds: Least and greatest scale to try.
        num_draws: Number of prior draws.
        tolerance: Relative tolerance of the scale.

    Returns:
        The scale, to a relative `tolerance`.

    Raises:
        ValueError: When the wanted spread is not positive, the bounds are not increasing, or the spread
            lies outside what the bounds give.

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
    model = model.with_prior(model.prior.program)  # without what a conditional model holds
    if model.kind == "tangent":  # must stay inside its frames, which traced scales do not show
        model.with_prior(prior_at(jnp.asarray(low, jnp.float32)))
    prepared = model.prepare(data)
    params_key, draw_key = jax.random.split(key)

    @jax.jit
    def spread_at(weights: Any, rows: Batch, scale: Array) -> Array:
        at = model.under(prior_at(scale))
        draws = draw_prior(draw_key, at, prior_parameters(params_key, at), num_draws)
        return jnp.sqrt(jnp.mean(_spread(jnp, _logits_by_draw(at, weights, draws, rows)) ** 2))

    def excess(log_scale: float) -> float:
        scale = jnp.asarray(np.exp(log_scale), jnp.float32)  # of one type, or it would be traced twice
        value = float(spread_at(model.base.weights, prepared, scale))
        # A spread too small for the number format has no logarithm; it is below any wanted one.
        return float(np.log(np.maximum(value, np.finfo(np.float32).tiny) / spread))

    ends = np.log(low), np.log(high)
    at_low, at_high = map(excess, ends)
    if not at_low * at_high <= 0:  # nor where one of them is not a number
        least, greatest = spread * np.exp(at_low), spread * np.exp(at_high)
        raise ValueError(
            f"no scale in the bounds gives a spread of {spread:g}: it is {least:.3g} at scale {low:g} and "
            f"{greatest:.3g} at scale {high:g}; "
            f"{broken_weights(model.base.weights) or 'ask for one in between or move the bounds'}"
        )
    return float(np.exp(scipy.optimize.brentq(excess, *ends, xtol=tolerance)))


def _check_random(model: Classifier) -> None:
    found = declared(model.prior)
    found.check_names()
    if not found.latent:
        raise ValueError(
            "a prior predictive needs a prior with sample sites; this one has parameters alone (as "
            "`priors.point` has), so every draw would be the same"
        )


def _check_sizes(data: Batch, num_draws: int, batch_size: int) -> None:
    if len(data) < 1 or num_draws < 2 or batch_size < 1:
        raise ValueError(
            "a prior predictive needs at least one row, two draws and one row at a time; got "
            f"{len(data)} rows, num_draws={num_draws}, batch_size={batch_size}"
        )


def _with_base(model: Classifier, draws: Adapters) -> Adapters:
    """The draws after one of zeros, which is the base model in the same compiled program."""
    return jax.tree.map(lambda x: jnp.concatenate([jnp.zeros_like(x[:1]), x]), draws)


def _logits_by_draw(model: Classifier, weights: Any, adapters: Adapters, batch: Batch) -> Array:
    prepared = model.prepared(weights, batch)
    return jax.lax.map(lambda one: model.logits(weights, one, prepared), adapters)


def _spread(numbers: Any, logits: Any) -> Any:
    """Spread by row of logits (draw, row, class), in the given array library."""
    centred = logits - logits.mean(-1, keepdims=True)
    return numbers.sqrt(2 / (logits.shape[-1] - 1) * numbers.var(centred, axis=0, ddof=1).sum(-1))
