"""Methods of the grid under the core prior: on the tangent model, and on the network itself.

Frames, features, scales and Laplace's Gaussian are the same for all of them. The cells of a seed that run in
one process share these; every cell reports the seconds of all that it needs.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from jax import Array

import bnlora as bl
from benchmarks.cells.lora import NETWORK_DRAWS
from benchmarks.cells.setting import Fitted, Setting
from benchmarks.cells.tasks import QUIET, Rows
from benchmarks.timing import clock
from bnlora.app.experiment import BATCH, EPOCHS, NUTS_OPTIONS, fit_flow
from bnlora.infer.core.fit import CoreFit, fit_core
from bnlora.prediction.predict import predict_with_draws

TANGENT_DRAWS = 64
MULTIPLES = (0.03, 0.1)
"""Scales of the network as parts of those of the tangent model; its own bound chooses one."""

RATE = 1e-2
"""Of Adam on the network, with a cosine decay to zero."""

LAPLACE = ("trunk", "frames", "features", "scales by evidence", "Laplace")
"""Parts of a core fit that come before the variational fit."""


class Core(NamedTuple):
    """A core fit, the features of the rows to predict, and their seconds."""

    fit: CoreFit
    features: Mapping[str, bl.Batch]
    seconds: float


def core_of(setting: Setting) -> Core:
    """The core fit of a seed, made once for the cells that follow one another."""
    names = ("size", "targets", "within")
    options = {name: value for name in names if (value := setting.option(name, None)) is not None}
    make = partial(_core, setting.rows, setting.key("core"), options)
    return setting.shared(f"core {json.dumps(options, sort_keys=True)}", make)[0]


def _core(rows: Rows, key: Array, options: Mapping[str, Any]) -> Core:
    layers = slice(-rows.layers, None)
    fixed = {"likelihood": rows.likelihood, "layers": layers, "console": QUIET}
    core = fit_core(key, rows.base, rows.train, **fixed, **options)
    with clock() as took:
        features = {
            name: bl.cache_prefix(core.model, batch, console=QUIET) for name, batch in rows.tests.items()
        }
    return Core(core, features, took.wall)


def _tangent(setting: Setting, found: Core, posterior: Any, parameters: int, about: Mapping) -> Fitted:
    """Predictions from features, with the seconds of the core fit and of the features."""
    key, draws = setting.key("predictions"), setting.option("draws", TANGENT_DRAWS)

    def predict(name: str) -> bl.Prediction:
        return bl.predict(key, posterior, found.features[name], num_draws=draws, console=QUIET)

    core = found.fit
    chosen = {"scales": core.scales.by_name, "log_evidence": core.gaussian.log_evidence}
    seconds = {"fit": sum(core.seconds[part] for part in LAPLACE), "predict": found.seconds}
    return Fitted(predict, parameters, chosen | about, seconds)


def laplace(setting: Setting) -> Fitted:
    """Laplace's Gaussian on the tangent model."""
    found = core_of(setting)
    size = len(found.fit.gaussian.loc)
    return _tangent(setting, found, found.fit.gaussian, size * (size + 3) // 2, {})


def mode(setting: Setting) -> Fitted:
    """The mode on the tangent model: what averaging adds is the difference to Laplace's Gaussian."""
    found = core_of(setting)
    gaussian = found.fit.gaussian
    point = bl.PointPosterior(found.fit.model, gaussian.view.adapters(np.asarray(gaussian.loc)))
    return _tangent(replace_draws(setting), found, point, len(gaussian.loc), {})


def replace_draws(setting: Setting) -> Setting:
    """The setting with one draw, for a posterior that is a point."""
    return replace(setting, options={**setting.options, "draws": 1})


def gaussian(setting: Setting) -> Fitted:
    """A full Gaussian by SVI on the tangent model, from Laplace's: the library's default."""
    found = core_of(setting)
    core = found.fit
    about = {"bound": float(core.fit.history["elbo"][-20:].mean())}
    fitted = _tangent(setting, found, core, core.fit.num_parameters, about)
    spent = fitted.earlier["fit"] + core.seconds["variational fit"]
    return fitted._replace(earlier={**fitted.earlier, "fit": spent})


def site_flow(setting: Setting) -> Fitted:
    """The paper's flow by SVI on the tangent model, from Laplace's Gaussian."""
    found = core_of(setting)
    fitted = fit_flow(setting.key("flow"), found.fit, console=QUIET)
    about = {"bound": float(fitted.history["elbo"][-20:].mean())}
    return _tangent(setting, found, fitted, fitted.num_parameters, about)


def nuts(setting: Setting) -> Fitted:
    """Draws of the posterior on the tangent model."""
    found = core_of(setting)
    core = found.fit
    options = {"mass": core.gaussian, "console": QUIET, **NUTS_OPTIONS}
    chains = bl.sample_nuts(setting.key("NUTS"), core.model, core.fit.train, **options)
    about = {"certificate": chains.certificate.verdict, "passed": chains.certificate.passed}
    return _tangent(setting, found, chains, len(core.gaussian.loc), about)


def network(setting: Setting) -> Fitted:
    """The same prior on the network, at the multiple of the scales with the greatest bound on the rows."""
    found, rows = core_of(setting), setting.rows
    steps = setting.option("epochs", EPOCHS) * len(rows.train) // BATCH
    bounds, best = {}, None
    for multiple in setting.option("multiples", MULTIPLES):
        fitted = network_fit(setting, found.fit, multiple, steps)
        bounds[multiple] = bound_of(setting, fitted)
        if best is None or bounds[multiple] > bounds[best[0]]:
            best = multiple, fitted
    assert best is not None  # there is at least one multiple
    key, draws = setting.key("predictions"), setting.option("draws", NETWORK_DRAWS)

    def predict(name: str) -> bl.Prediction:
        return bl.predict(key, best[1], rows.tests[name], num_draws=draws, console=QUIET)

    about = {"multiple": best[0], "bounds": {str(multiple): bound for multiple, bound in bounds.items()}}
    earlier = {"fit": sum(found.fit.seconds[part] for part in LAPLACE)}
    return Fitted(predict, best[1].num_parameters, about, earlier)


def network_fit(setting: Setting, core: CoreFit, multiple: float, steps: int) -> bl.Fit:
    """A mean-field fit of the network that starts at the prior, where its KL divergence is zero."""
    rows = setting.rows
    scale = {name: multiple * value for name, value in core.scales.values.items()}
    prior = bl.priors.core(core.frames, scale=scale)
    model = bl.Classifier(rows.base, core.frames.sites, prior, likelihood=rows.likelihood)
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field(init_scale=1.0))
    rate = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    key = setting.key("network")
    return bl.fit(key, model, guide, rows.train, rate, num_steps=steps, batch_size=BATCH, console=QUIET)


def bound_of(setting: Setting, fitted: bl.Fit) -> float:
    """The bound on all labelled rows, in nats, by as many draws as a prediction has."""
    rows = setting.rows.train
    drawn, adapters = fitted.draws(setting.key("bound"), NETWORK_DRAWS)
    predicted = predict_with_draws(fitted.model, adapters, rows, console=QUIET)
    log_likelihood = predicted.log_probs_of(np.asarray(rows.labels)).sum(1)
    terms = log_likelihood + np.asarray(drawn.log_prior, np.float64) - np.asarray(drawn.log_q, np.float64)
    return float(terms.mean())
