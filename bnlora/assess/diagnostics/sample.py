"""Draws of a fit and of its prior, made once for all diagnostics that look at them.

Every diagnostic takes a fit, or a `Sample` of it: `khat(fit)` draws anew, while `s = sample(fit)` followed
by `khat(s)` and `shrinkage(s)` draws once. What is expensive is computed when it is first asked for.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.console import Console

from bnlora._util.checks import check_at_least, check_key
from bnlora._util.typing import Adapters
from bnlora.infer.svi.result import Fit
from bnlora.metrics.khat import LEAST_DRAWS, has_density
from bnlora.prediction.predict import Prediction, predict_with_draws
from bnlora.priors.declared import require_drawable
from bnlora.program.density import check_parameters
from bnlora.program.draws import Draw, draw_from_prior


@dataclass(frozen=True, repr=False)
class Sample:
    """Draws of a fit and what diagnostics read off them; made by `sample`.

    Attributes:
        fit: The fit.
        key: Random key of the draws of the guide.
        num_draws: Number of draws S of the guide, and of the prior.
        batch_size: Rows to run at a time.
        console: Where progress is drawn.
    """

    fit: Fit
    key: Array = field(compare=False)
    num_draws: int
    batch_size: int
    console: Console | None = None

    @cached_property
    def drawn(self) -> tuple[Draw, Adapters]:
        """Draws of the guide with their densities, and the adapters that the prior makes of them."""
        return self.fit.draws(self.key, self.num_draws)

    @cached_property
    def prior_adapters(self) -> Adapters:
        """Adapters under the prior, at the prior's fitted parameters, with a leading draw axis.

        Raises:
            ValueError: When the prior cannot be drawn from; `prior_refusal` says why.
        """
        check_parameters(self.fit.model.prior, self.fit.params)
        require_drawable(self.fit.model.prior)
        sites = self.fit.by_keys(_from_prior, self.part(1), self.num_draws)
        return self.fit.at(sites, self.num_draws)[2]

    @cached_property
    def train_prediction(self) -> Prediction:
        """Predictions of the training rows by every draw."""
        _, adapters = self.drawn
        return predict_with_draws(
            self.fit.model, adapters, self.fit.train, batch_size=self.batch_size, console=self.console
        )

    @property
    def log_likelihood(self) -> Float[np.ndarray, "s n"]:
        """Log-likelihood of every training row under every draw, in nats."""
        return self.train_prediction.log_probs_of(self.fit.train.labels)

    @property
    def log_joint(self) -> Float[np.ndarray, " s"]:
        """Log prior plus log-likelihood of the training rows, in nats."""
        return np.asarray(self.drawn[0].log_prior, np.float64) + self.log_likelihood.sum(1)

    @property
    def log_q(self) -> Float[np.ndarray, " s"]:
        """Log-density under the guide, in nats."""
        return np.asarray(self.drawn[0].log_q, np.float64)

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
        """Why there are no draws of the prior; "" where there are."""
        try:
            require_drawable(self.fit.model.prior)
        except ValueError as refusal:
            return str(refusal)
        return ""

    def require_prior(self, what: str) -> None:
        """Raise `ValueError` unless the prior has a latent site; `what` needs one."""
        if not self.has_prior:
            raise ValueError(f"{what} needs a prior with sample sites; this fit has parameters alone")

    def part(self, number: int) -> Array:
        """Random key of one of the things that are drawn beside the guide."""
        return jax.random.fold_in(self.key, number)

    def random(self, number: int) -> np.random.Generator:
        """NumPy's source of random numbers, from `part`."""
        return np.random.default_rng(np.asarray(jax.random.bits(self.part(number), (4,))))

    def __repr__(self) -> str:
        return f"Sample({self.num_draws} draws of a fit to {len(self.fit.train)} rows)"


def sample(
    fit: Fit,
    *,
    num_draws: int = 400,
    batch_size: int = 32,
    key: Array | None = None,
    console: Console | None = None,
) -> Sample:
    """Prepare draws of a fit for several diagnostics.

    Args:
        fit: A fit.
        num_draws: Number of draws of the guide, and of the prior.
        batch_size: Rows to run at a time.
        key: Random key; the fit's own when omitted, so that two calls agree.
        console: Where to draw progress bars; the terminal or notebook when omitted.

    Raises:
        ValueError: When it is no fit by `bnlora.fit`, there are fewer than 25 draws, or no row at a time.
    """
    if not isinstance(fit, Fit):
        raise ValueError(
            f"diagnostics need a Fit, whose bound and densities they read; got {type(fit).__name__}: for "
            f"other "
            "posteriors use bnlora.compare, predict and metrics"
        )
    check_at_least({"num_draws": num_draws}, LEAST_DRAWS)
    check_at_least({"batch_size": batch_size}, 1)
    return Sample(fit, fit.draw_key if key is None else check_key(key), num_draws, batch_size, console)


def _from_prior(fit: Fit, params: Any, key: Array) -> dict[str, Array]:
    return draw_from_prior(key, fit.model, params)


def sample_of(fit: Fit | Sample) -> Sample:
    """The sample itself, or one of a fit with the defaults of `sample`."""
    return fit if isinstance(fit, Sample) else sample(fit)
