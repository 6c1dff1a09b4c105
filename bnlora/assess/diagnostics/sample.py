r"""Draws of a fit and of its prior, shared by all diagnostics.

Every diagnostic takes a fit, or a `Sample` of it: `khat(fit)` makes new draws, while `s = sample(key, fit)`
followed by `khat(s)` and `shrinkage(s)` draws once. Expensive results are computed at first use.

Draws are cheap; predictions of all rows by each draw are expensive. With `first_look`, rows are predicted by
that number of draws first, and the number is doubled until it is sufficient. For the training rows it is
sufficient as soon as the importance weights certainly fail, because the results that depend on them are then
not reported. They certainly fail if k-hat is two standard errors above its threshold and more than two
standard errors away from one, with

    se(k) = (1 + k) / M^(1/2),    M = min(S / 5, 3 S^(1/2)) draws in the tail,

the asymptotic error of the shape of a generalised Pareto law. If the weights work, all draws are used.

Reference for the error of the shape: Smith (1987), Estimating tails of probability distributions.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key, numpy_generator
from bnlora._util.progress import OneBar
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch
from bnlora.infer.svi.result import Fit
from bnlora.metrics.khat import LEAST_DRAWS, KHat, has_density, khat
from bnlora.prediction.predict import Prediction, log_likelihood_by_draw, predict_with_draws
from bnlora.priors.declared import require_drawable
from bnlora.program.density import check_parameters
from bnlora.program.draws import Draw, draw_from_prior


@dataclass(frozen=True, repr=False)
class Sample:
    """Draws of a fit and results computed from them; created by `sample`.

    Attributes:
        fit: The fit.
        key: Random key of the draws of the guide.
        num_draws: Number of draws S of the guide, and of the prior.
        batch_size: Rows to run at a time.
        console: Where to draw progress bars.
        first_look: Number of draws for the first predictions; None to use all draws at once.
    """

    fit: Fit
    key: Array = field(compare=False)
    num_draws: int
    batch_size: int
    console: Console | None = None
    first_look: int | None = None

    @property
    def few(self) -> int:
        """Number of draws of the first predictions."""
        return self.num_draws if self.first_look is None else self.first_look

    @cached_property
    def drawn(self) -> tuple[Draw, Adapters]:
        """Draws of the guide with their densities, and the adapters at these draws."""
        return self.fit.draws(self.key, self.num_draws)

    @cached_property
    def prior_adapters(self) -> Adapters:
        """Adapters under the prior, at the prior's fitted parameters, with a leading draw axis.

        Raises:
            ValueError: If the prior cannot be drawn from; `prior_refusal` contains the reason.
        """
        check_parameters(self.fit.model.prior, self.fit.params)
        require_drawable(self.fit.model.prior)
        sites = self.fit.by_keys(_from_prior, self.part(1), self.num_draws)
        return self.fit.at(sites, self.num_draws)[2]

    @cached_property
    def train_prediction(self) -> Prediction:
        """Predictions of the training rows by all draws, or by enough to show that the weights fail."""
        return self.predict_until(self._is_settled, self.drawn[1], self.fit.train, "training rows")

    @property
    def num_used(self) -> int:
        """Number of draws of the predictions of the training rows."""
        return len(self.train_prediction.draw_log_probs)

    @property
    def log_likelihood(self) -> Float[np.ndarray, "s n"]:
        """Log-likelihood of every training row under every used draw, in nats."""
        return self._log_likelihood(self.train_prediction)

    @property
    def log_joint(self) -> Float[np.ndarray, " s"]:
        """Log prior plus log-likelihood of the training rows under every used draw, in nats."""
        return self._log_joint(self.train_prediction)

    @property
    def log_q(self) -> Float[np.ndarray, " s"]:
        """Log-density of every used draw under the guide, in nats."""
        return np.asarray(self.drawn[0].log_q, np.float64)[: self.num_used]

    def _log_likelihood(self, prediction: Prediction) -> Float[np.ndarray, "s n"]:
        return log_likelihood_by_draw(self.fit.model, prediction.draw_log_probs, self.fit.train)

    def _log_joint(self, prediction: Prediction) -> Float[np.ndarray, " s"]:
        log_likelihood = self._log_likelihood(prediction).sum(1)
        return np.asarray(self.drawn[0].log_prior, np.float64)[: len(log_likelihood)] + log_likelihood

    def _is_settled(self, prediction: Prediction) -> bool:
        """Whether more draws are unnecessary: there are no weights, or they certainly fail."""
        if not self.has_density:
            return True
        log_joint = self._log_joint(prediction)
        return is_hopeless(khat(log_joint, np.asarray(self.drawn[0].log_q, np.float64)[: len(log_joint)]))

    def predict(self, adapters: Adapters, rows: Batch, label: str, model: Any = None) -> Prediction:
        """Predict rows by every draw of adapters.

        Args:
            adapters: Adapters with a leading draw axis.
            rows: Rows to predict.
            label: Label of the progress bar.
            model: The classifier; that of the fit by default.
        """
        work = len(rows) * len(jax.tree.leaves(adapters)[0])
        bar = self.console.part(label, work) if isinstance(self.console, OneBar) else nullcontext()
        with bar:
            classifier, size = model or self.fit.model, min(self.batch_size, len(rows))
            return predict_with_draws(classifier, adapters, rows, batch_size=size, console=self.console)

    def predict_until(
        self, enough: Callable[[Prediction], bool], adapters: Adapters, rows: Batch, label: str
    ) -> Prediction:
        """Predict rows by the first draws, and double their number until `enough` is true.

        Args:
            enough: Whether the standard errors of the predictions are small enough.
            adapters: Adapters with a leading draw axis.
            rows: Rows to predict.
            label: Label of the progress bar.
        """
        total = len(jax.tree.leaves(adapters)[0])
        used = total if self.first_look is None else min(self.first_look, total)
        prediction = self.predict(first_draws(adapters, used), rows, label)
        while used < total and not enough(prediction):
            more = jax.tree.map(lambda x, begin=used: x[begin:], first_draws(adapters, 2 * used))
            if isinstance(self.console, OneBar):
                self.console.more(len(rows) * min(used, total - used))
            added = self.predict(more, rows, f"{label}, more draws")
            joined = np.concatenate([prediction.draw_log_probs, added.draw_log_probs])
            prediction, used = Prediction(joined), len(joined)
        return prediction

    @cached_property
    def has_density(self) -> bool:
        """Whether the guide has a density over all latent sites, so that importance weights exist."""
        return has_density(self.fit.guide, self.drawn[0].sites)

    @property
    def has_prior(self) -> bool:
        """Whether the prior has a latent site; plain LoRA has none."""
        return bool(self.drawn[0].sites)

    @cached_property
    def prior_refusal(self) -> str:
        """Reason why the prior cannot be drawn from; "" if it can."""
        try:
            require_drawable(self.fit.model.prior)
        except ValueError as refusal:
            return str(refusal)
        return ""

    def require_prior(self, what: str) -> None:
        """Raise `ValueError` unless the prior has a latent site; `what` is the name of the diagnostic."""
        if not self.has_prior:
            raise ValueError(f"{what} needs a prior with sample sites; this fit has only parameters")

    def part(self, number: int) -> Array:
        """Random key for other random numbers than the draws of the guide, by number."""
        return jax.random.fold_in(self.key, number)

    def random(self, number: int) -> np.random.Generator:
        """NumPy generator seeded from `part`."""
        return numpy_generator(self.part(number))

    def __repr__(self) -> str:
        return f"Sample({self.num_draws} draws of a fit to {len(self.fit.train)} rows)"


def sample(
    key: Array,
    fit: Fit,
    *,
    num_draws: int = 400,
    batch_size: int = 32,
    console: Console | None = None,
    first_look: int | None = None,
) -> Sample:
    """Prepare draws of a fit for several diagnostics.

    Args:
        key: Random key; `fit.draw_key` gives the draws that diagnostics use for a fit itself.
        fit: A fit.
        num_draws: Number of draws of the guide, and of the prior.
        batch_size: Rows to run at a time.
        console: Where to draw progress bars; the terminal or notebook by default.
        first_look: Number of draws for the first predictions. It is doubled, up to `num_draws`, until
            standard errors are small enough. By default, all draws are used at once.

    Raises:
        ValueError: If `fit` is not a fit by `bnlora.fit`, `num_draws` or `first_look` is below 25, or
            `batch_size` is below one.
    """
    key = check_key(key)
    _require_fit(fit)
    check_at_least({"num_draws": num_draws}, LEAST_DRAWS)
    check_at_least({"batch_size": batch_size}, 1)
    if first_look is not None:
        check_at_least({"first_look": first_look}, LEAST_DRAWS)
    return Sample(fit, key, num_draws, batch_size, console, first_look)


def first_draws(stacked: Any, count: int) -> Any:
    """The first `count` entries of arrays with a leading draw axis, as NumPy arrays."""
    return jax.tree.map(lambda x: np.asarray(x)[:count], stacked)


def is_hopeless(khat: KHat) -> bool:
    """Whether k-hat is two standard errors above its threshold, and two standard errors away from one."""
    if np.isinf(khat.value):
        return khat.value > 0
    count = khat.num_draws
    tail = int(3 * count**0.5) if count > 225 else count // 5  # draws in the Pareto tail
    error = max(1 + khat.value, 0.5) / tail**0.5
    return khat.value > khat.threshold + 2 * error and abs(khat.value - 1) > 2 * error


def _from_prior(fit: Fit, params: Any, key: Array) -> dict[str, Array]:
    return draw_from_prior(key, fit.model, params)


def sample_of(fit: Fit | Sample) -> Sample:
    """A sample unchanged, or a sample of a fit with the defaults of `sample`."""
    if isinstance(fit, Sample):
        return fit
    _require_fit(fit)
    return sample(fit.draw_key, fit)


def _require_fit(fit: Any) -> None:
    """Raise `ValueError` unless it is a fit by `bnlora.fit`."""
    if not isinstance(fit, Fit):
        raise ValueError(
            f"diagnostics need a Fit, with its bound and densities; got {type(fit).__name__}: for other "
            "posteriors use bnlora.compare, predict and metrics"
        )
