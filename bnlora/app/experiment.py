"""Comparison of base, plain LoRA and Bayesian-LoRA on the same labelled rows and modules.

| method              | use of the labelled rows                                                             |
|---------------------|--------------------------------------------------------------------------------------|
| base                | none: the untouched base                                                             |
| LoRA                | maximum likelihood on the first part of the rows, a published recipe, the last step  |
| LoRA, careful       | the same fit; the second part of the rows chooses the best step and a temperature    |
| Bayesian-LoRA       | all rows: core prior on the tangent model (`bnlora.infer.core.fit`)                  |
| Bayesian-LoRA, NUTS | all rows: the same posterior, sampled by NUTS                                        |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np
import optax
import scipy
from jax import Array
from rich.console import Console

from bnlora import metrics
from bnlora._util.progress import timed
from bnlora.adapters.sites import select
from bnlora.assess.comparison import Comparison as Agreement
from bnlora.assess.comparison import compare as compare_posteriors
from bnlora.assess.comparison import store_reference
from bnlora.base import Base
from bnlora.data.batch import Batch
from bnlora.guides import Family, Guide, SiteFlow, delta
from bnlora.infer.approximate.temperature import tempered
from bnlora.infer.core.fit import SIZES, CoreFit, fit_core, fit_near
from bnlora.infer.core.start import start_at
from bnlora.infer.mcmc import Chains, sample_nuts
from bnlora.infer.svi.fit import fit
from bnlora.infer.svi.result import Fit
from bnlora.infer.svi.validation import EarlyStopping
from bnlora.prediction.posterior import Posterior
from bnlora.prediction.predict import Prediction, predict
from bnlora.priors import Prior, point
from bnlora.program.cache import cache_prefix
from bnlora.program.likelihoods import Likelihood
from bnlora.program.model import Classifier

BASE, LORA, CAREFUL = "base", "LoRA", "LoRA, careful"
BAYES, NUTS = "Bayesian-LoRA", "Bayesian-LoRA, NUTS"
TARGETS = (*SIZES, "lm_head")
"""Modules of plain LoRA: the modules of the core prior. Its slope corresponds to an update of the head."""

RANK, RATE, BATCH, EPOCHS, WARM_UP = 8, 5e-4, 16, 20, 0.06
"""LoRA's published recipe for sentiment: rank and alpha 8, AdamW at 5e-4 with a linear decay after a warm-up
of 6 %, 16 rows per step (Hu et al., 2022, LoRA, table 9, SST-2 with RoBERTa-base)."""


@dataclass
class Comparison:
    """The fits, their predictions, and their cost.

    Attributes:
        key: Random key of the bootstrap intervals.
        predictions: Prediction by method and set of rows.
        labels: True classes by set of rows.
        lora: The maximum-likelihood fit.
        core: The Bayesian fit.
        chains: Draws of its posterior.
        agreements: Comparison of each approximation of that posterior with the draws, by name, or the error
            that prevented it, for example too few independent draws.
        seconds: Wall time by part.
    """

    key: Array
    predictions: Mapping[str, Mapping[str, Prediction]]
    labels: Mapping[str, np.ndarray]
    lora: Fit
    core: CoreFit
    chains: Chains
    agreements: Mapping[str, Agreement | ValueError]
    seconds: dict[str, float] = field(default_factory=dict)


def fit_lora(
    key: Array,
    base: Base,
    train: Batch,
    *,
    label_ids: tuple[int, ...] | None = None,
    likelihood: Likelihood | None = None,
    epochs: int = EPOCHS,
    layers: int = 2,
    targets: Sequence[str] = TARGETS,
    rank: int = RANK,
    prior: Prior | None = None,
    family: Family | Mapping[str, Family] | None = None,
    validation: Batch | None = None,
    console: Console | None = None,
) -> Fit:
    """Fit plain LoRA with the published recipe: by maximum likelihood, unless there is a prior.

    Args:
        key: Random key of start values and the order of rows.
        base: The frozen base.
        train: Rows to fit.
        label_ids: Token id of each class.
        likelihood: Other classes than words, in place of `label_ids`.
        epochs: Passes over the rows.
        layers: Number of uppermost layers to adapt.
        targets: Modules to adapt.
        rank: Rank of every module.
        prior: A prior of the factors; none if omitted.
        family: Guide of the factors under that prior; the mode if omitted.
        validation: Rows that choose the best step; evaluated ten times during the fit.
        console: Where to report progress.
    """
    sites = select(base, targets, rank=rank, layers=slice(-layers, None))
    prior = point() if prior is None else prior
    model = Classifier(base, sites, prior, label_ids=label_ids, likelihood=likelihood)
    steps = max(epochs * len(train) // BATCH, 1)
    warm_up = max(int(WARM_UP * steps), 1)
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, RATE, warm_up), optax.linear_schedule(RATE, 0.0, steps - warm_up)],
        [warm_up],
    )
    early_stopping = EarlyStopping(every=max(steps // 10, 1), patience=steps, num_draws=1)
    return fit(
        key,
        model,
        Guide(model.prior, delta() if family is None else family),
        train,
        optax.adamw(rate),
        num_steps=steps,
        batch_size=BATCH,
        validation=validation,
        early_stopping=None if validation is None else early_stopping,
        console=console,
    )


def compare(
    key: Array,
    base: Base,
    train: Batch,
    tests: Mapping[str, Batch],
    *,
    label_ids: tuple[int, ...],
    held_out: int,
    epochs: int = EPOCHS,
    num_draws: int = 64,
    console: Console | None = None,
) -> Comparison:
    """Fit all methods and predict the test rows.

    Args:
        key: Random key.
        base: The frozen base.
        train: All labelled rows.
        tests: Rows to predict, by name.
        label_ids: Token id of each class.
        held_out: Number of labelled rows, at the end, that plain LoRA uses to choose step and temperature.
        epochs: Epochs of plain LoRA.
        num_draws: Posterior draws per prediction.
        console: Where to report progress.
    """
    lora_key, core_key, nuts_key, draw_key, flow_key, agree_key = jax.random.split(key, 6)
    seconds: dict[str, float] = {}
    with timed(seconds, "trunk, labelled rows"):
        sites = select(base, TARGETS, rank=1, layers=slice(-2, None))
        trunk = Classifier(base, sites, point(), label_ids=label_ids)
        train = cache_prefix(trunk, train, console=console)
    fitted, validation = train[: len(train) - held_out], train[len(train) - held_out :]
    with timed(seconds, "LoRA"):
        best = fit_lora(
            lora_key,
            base,
            fitted,
            label_ids=label_ids,
            epochs=epochs,
            validation=validation,
            console=console,
        )
    with timed(seconds, "Bayesian-LoRA"):
        core = fit_core(core_key, base, train, label_ids=label_ids, console=console)
    with timed(seconds, "NUTS"):
        chains = sample_nuts(
            nuts_key, core.model, core.fit.train, mass=core.gaussian, **NUTS_OPTIONS, console=console
        )
    with timed(seconds, "SiteFlow"):
        flow = fit_flow(flow_key, core, console=console)
    with timed(seconds, "posteriors against NUTS"):
        posteriors: dict[str, Posterior] = {
            "Laplace": core.gaussian,
            "Gaussian by SVI": core.fit,
            "SiteFlow by SVI": flow,
        }
        agreements = against_nuts(agree_key, posteriors, chains, core.fit.train, console=console)
    with timed(seconds, "trunk, test rows"):
        tests = {name: cache_prefix(trunk, rows, console=console) for name, rows in tests.items()}
    with timed(seconds, "features, test rows"):
        tests = {name: cache_prefix(core.model, rows, console=console) for name, rows in tests.items()}
    with timed(seconds, "predictions"):
        predictions = _predictions(draw_key, best, core, chains, validation, tests, num_draws, console)
    labels = {name: np.asarray(rows.labels) for name, rows in tests.items()}
    return Comparison(key, predictions, labels, best, core, chains, agreements, seconds)


def fit_flow(key: Array, core: CoreFit, *, console: Console | None) -> Fit:
    """Fit the paper's guide to the same posterior, from Laplace's Gaussian, with the same number of steps."""
    start_key, fit_key = jax.random.split(key)
    guide = SiteFlow(core.model.prior)
    start, steps = start_at(start_key, guide, core.gaussian), len(core.fit.step_seconds)
    return fit_near(
        fit_key, core.model, guide, core.fit.train, num_steps=steps, init_params=start, console=console
    )


def against_nuts(
    key: Array, posteriors: Mapping[str, Posterior], chains: Chains, rows: Batch, *, console: Console | None
) -> dict[str, Agreement | ValueError]:
    """Compare each posterior with the draws of NUTS; if a comparison raises, return its error instead.

    Args:
        key: Random key, the same for all comparisons.
        posteriors: Approximations by name.
        chains: The draws; without a passed certificate they are not called a reference.
        rows: Labelled rows for the comparison.
        console: Where to report progress.
    """
    passed = chains.certificate.passed
    against: Literal["reference", "anything"] = "reference" if passed else "anything"
    # Compute the functions of the reference once for all comparisons.
    reference = store_reference(chains, rows, console=console) if passed else chains
    agreements: dict[str, Agreement | ValueError] = {}
    for name, posterior in posteriors.items():
        try:
            agreements[name] = compare_posteriors(
                key, posterior, reference, rows, against=against, console=console
            )
        except ValueError as error:  # keep the other results
            agreements[name] = error
    return agreements


NUTS_OPTIONS: Mapping[str, Any] = {"num_warmup": 300, "num_draws": 500, "target_acceptance": 0.8}
"""Enough draws in the coordinates of Laplace's Gaussian; the certificate checks this."""


def _predictions(
    key: Array,
    best: Fit,
    core: CoreFit,
    chains: Chains,
    validation: Batch,
    tests: Mapping[str, Batch],
    num_draws: int,
    console: Console | None,
) -> dict[str, dict[str, Prediction]]:
    """Prediction by method and set of rows."""
    temperature = temperature_of(key, best, validation, console=console)
    last = last_step(best)
    predictions: dict[str, dict[str, Prediction]] = {m: {} for m in (BASE, LORA, CAREFUL, BAYES, NUTS)}
    for name, rows in tests.items():
        predictions[BASE][name] = untouched(rows)
        predictions[LORA][name] = predict(key, last, rows, num_draws=1, console=console)
        careful = predict(key, best, rows, num_draws=1, console=console)
        predictions[CAREFUL][name] = tempered(careful, temperature)
        predictions[BAYES][name] = predict(key, core, rows, num_draws=num_draws, console=console)
        predictions[NUTS][name] = predict(key, chains, rows, num_draws=num_draws, console=console)
    return predictions


def untouched(rows: Batch) -> Prediction:
    """Prediction of the untouched base, from the logits in the features of a tangent model."""
    if rows.features is None:
        raise ValueError("the rows have no features; call cache_prefix on them with a tangent model first")
    logits = np.asarray(rows.features.offset, np.float64)
    return Prediction(scipy.special.log_softmax(logits, axis=1)[None])


def temperature_of(key: Array, fitted: Fit, validation: Batch, *, console: Console | None) -> float:
    """The temperature, between 0.1 and 10, with the lowest negative log-likelihood on validation rows."""
    prediction = predict(key, fitted, validation, num_draws=1, console=console)
    return best_temperature(prediction, validation, most=10)


def best_temperature(prediction: Prediction, rows: Batch, *, most: float) -> float:
    """The temperature, between `1 / most` and `most`, with the lowest negative log-likelihood of the rows."""
    labels = np.asarray(rows.labels)

    def loss(log_temperature: float) -> float:
        return metrics.nll(tempered(prediction, float(np.exp(log_temperature))).log_probs, labels)

    optimum = scipy.optimize.minimize_scalar(loss, bounds=(-np.log(most), np.log(most)), method="bounded")
    return float(np.exp(optimum.x))


def last_step(best: Fit) -> Fit:
    """The same fit with the parameters of its last step."""
    return replace(best, params=best.last_params, best_step=len(best.step_seconds))
