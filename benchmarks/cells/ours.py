"""Methods of the grid under the core prior: on the tangent model, and on the network itself.

Frames, features, scales and Laplace's Gaussian are the same for all of them. The cells of a seed that run in
one process share these; every cell reports the seconds of all that it needs.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

import bnlora as bl
from benchmarks.cells.lora import NETWORK_DRAWS
from benchmarks.cells.setting import Fitted, Setting, by_posterior
from benchmarks.cells.tasks import QUIET, Rows
from benchmarks.core_network import BATCH, bound_of, network_fit
from benchmarks.timing import clock
from bnlora.app.experiment import EPOCHS, NUTS_OPTIONS, fit_flow
from bnlora.infer.core.fit import CoreFit, fit_core

TANGENT_DRAWS = 64
MULTIPLES = (0.03, 0.1)
"""Scales of the network as parts of those of the tangent model; its own bound chooses one."""

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Scales in nats, of which validation rows choose one for all families (option `scales_by`)."""

LAPLACE = ("trunk", "frames", "features", "scales by evidence", "Laplace")
"""Parts of a core fit that come before the variational fit."""


class Core(NamedTuple):
    """A core fit, the features of the rows to predict, and their seconds."""

    fit: CoreFit
    features: Mapping[str, bl.Batch]
    seconds: float


def core_of(setting: Setting) -> Core:
    """The core fit of a seed, made once for the cells that follow one another."""
    options = setting.given("size", "targets", "within", "source")
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


def _by_validation(core: CoreFit) -> CoreFit:
    """Laplace's Gaussian at one scale for all families, chosen by the NLL of the last three sevenths.

    The variational fit stays at the scales of the evidence.
    """
    rows = core.fit.train
    first, held_out = rows[: len(rows) * 4 // 7], rows[len(rows) * 4 // 7 :]
    with clock() as took:
        found = {}
        for scale in SCALES:
            at_scale = bl.laplace(_at(core, scale), first, console=QUIET)
            predicted = bl.predict(
                jax.random.key(0), at_scale, held_out, num_draws=TANGENT_DRAWS, console=QUIET
            )
            found[scale] = bl.metrics.nll(predicted.log_probs, np.asarray(held_out.labels))
        best = min(found, key=lambda scale: found[scale])
        gaussian = bl.laplace(_at(core, best), rows, console=QUIET)
    seconds = {**core.seconds, "scales by evidence": 0.0, "Laplace": took.wall}
    scales = replace(core.scales, values=dict.fromkeys(core.frames, best))
    return replace(core, gaussian=gaussian, scales=scales, seconds=seconds)


def _at(core: CoreFit, scale: float) -> bl.Tangent:
    return core.model.with_prior(bl.priors.core(core.frames, scale=scale))


def _tangent(
    setting: Setting,
    found: Core,
    posterior: Any,
    parameters: int,
    about: Mapping,
    num_draws: int = TANGENT_DRAWS,
) -> Fitted:
    """Predictions from features, with the seconds of the core fit and of the features."""
    core = found.fit
    chosen = {"scales": core.scales.by_name, "log_evidence": core.gaussian.log_evidence}
    made = by_posterior(setting, posterior, num_draws, parameters, chosen | about, tests=found.features)
    return made._replace(earlier={"fit": _laplace_seconds(core), "predict": found.seconds})


def _laplace_seconds(core: CoreFit) -> float:
    """Seconds of the parts of a core fit that come before the variational fit."""
    return sum(core.seconds[part] for part in LAPLACE)


def laplace(setting: Setting) -> Fitted:
    """Laplace's Gaussian on the tangent model."""
    found = core_of(setting)
    if setting.option("scales_by", "evidence") == "validation":
        found = found._replace(fit=_by_validation(found.fit))
    size = len(found.fit.gaussian.loc)
    return _tangent(setting, found, found.fit.gaussian, size * (size + 3) // 2, {})


def mode(setting: Setting) -> Fitted:
    """The mode on the tangent model: what averaging adds is the difference to Laplace's Gaussian."""
    found = core_of(setting)
    gaussian = found.fit.gaussian
    point = bl.PointPosterior(found.fit.model, gaussian.view.adapters(np.asarray(gaussian.loc)))
    return _tangent(setting, found, point, len(gaussian.loc), {}, num_draws=1)


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
    core, rows = core_of(setting).fit, setting.rows
    steps = setting.option("epochs", EPOCHS) * len(rows.train) // BATCH
    fits, bounds = {}, {}
    for multiple in setting.option("multiples", MULTIPLES):
        fits[multiple] = network_fit(
            setting.key("network"),
            core,
            rows.base,
            rows.train,
            rows.likelihood,
            multiple=multiple,
            num_steps=steps,
        )
        bounds[multiple], _ = bound_of(
            setting.key("bound"), fits[multiple], rows.train, num_draws=NETWORK_DRAWS
        )
    best = max(bounds, key=lambda multiple: bounds[multiple])
    about = {"multiple": best, "bounds": {str(multiple): bound for multiple, bound in bounds.items()}}
    made = by_posterior(setting, fits[best], NETWORK_DRAWS, fits[best].num_parameters, about)
    return made._replace(earlier={"fit": _laplace_seconds(core)})
