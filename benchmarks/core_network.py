"""The network under the core prior at a multiple of the scales of its tangent model, and its bound."""

import jax
import numpy as np
import optax
from rich.console import Console

import bnlora as bl
from bnlora.infer.core.fit import CoreFit
from bnlora.prediction.predict import predict_with_draws
from bnlora.program.likelihoods import Likelihood

BATCH, RATE = 16, 1e-2
QUIET = Console(quiet=True)


def network_fit(
    key: jax.Array,
    core: CoreFit,
    base: bl.Base,
    rows: bl.Batch,
    likelihood: Likelihood,
    *,
    multiple: float,
    num_steps: int,
) -> bl.Fit:
    """A mean-field fit of the network that starts at the prior, where its KL divergence is zero."""
    scale = {name: multiple * value for name, value in core.scales.values.items()}
    prior = bl.priors.core(core.frames, scale=scale)
    model = bl.Classifier(base, core.frames.sites, prior, likelihood=likelihood)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=1.0))
    rate = optax.adam(optax.cosine_decay_schedule(RATE, num_steps))
    return bl.fit(key, model, guide, rows, rate, num_steps=num_steps, batch_size=BATCH, console=QUIET)


def bound_of(key: jax.Array, fit: bl.Fit, rows: bl.Batch, *, num_draws: int) -> tuple[float, float]:
    """The bound on all rows and its Monte Carlo standard error, in nats."""
    drawn, adapters = fit.draws(key, num_draws)
    predicted = predict_with_draws(fit.model, adapters, rows, batch_size=32, console=QUIET)
    log_likelihood = predicted.log_probs_of(rows.labels).sum(1)
    terms = log_likelihood + np.asarray(drawn.log_prior, np.float64) - np.asarray(drawn.log_q, np.float64)
    return float(terms.mean()), float(terms.std(ddof=1) / num_draws**0.5)
