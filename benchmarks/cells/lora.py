"""Methods of the grid that others have proposed: plain LoRA, and what makes it probabilistic.

All but the untouched base start from the recipe of `bnlora.app.experiment.fit_lora`, with the same modules,
rank, rate, order of rows and number of steps. A method that needs validation rows takes the last three
sevenths of the labelled ones; all others fit every labelled row.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import bnlora as bl
from benchmarks.cells.setting import Fitted, Setting, by_posterior
from benchmarks.cells.tasks import QUIET, Rows, untouched
from bnlora import guides
from bnlora.app.experiment import BATCH, EPOCHS, RANK, best_temperature, fit_lora, last_step
from bnlora.infer import approximate
from bnlora.infer.approximate import tempered
from bnlora.program.likelihoods import Likelihood

NETWORK_DRAWS = 10
"""Draws of a prediction where each runs the adapted layers; as many as BLoB and MC dropout report."""

MAP_SCALES = (1.0, 0.3, 0.1)
"""Prior scales of the mode, of which validation rows choose one."""

SMOOTHING = 0.1
"""Part of a label that label smoothing spreads over all classes."""

FACTORS = (r".*\.a", r".*\.b")


def fit(setting: Setting, purpose: str, train: bl.Batch | None = None, **changes: Any) -> bl.Fit:
    """A fit of LoRA by the recipe, with what a method changes."""
    rows = setting.rows
    return fit_lora(
        setting.key(purpose),
        rows.base,
        rows.train if train is None else train,
        layers=rows.layers,
        targets=setting.option("targets", rows.targets),
        rank=setting.option("rank", RANK),
        console=QUIET,
        **{"epochs": setting.option("epochs", EPOCHS), "likelihood": rows.likelihood} | changes,
    )


def plain(setting: Setting) -> tuple[bl.Fit, float]:
    """LoRA on all labelled rows, and its seconds; made once for the methods that start from it."""
    options = setting.given("targets", "rank", "epochs")
    return setting.shared(f"LoRA {json.dumps(options, sort_keys=True)}", lambda: fit(setting, "LoRA"))


def parted(setting: Setting) -> tuple[bl.Batch, bl.Batch]:
    """Labelled rows to fit and to choose on: four and three sevenths."""
    train = setting.rows.train
    first = len(train) * 4 // 7
    return train[:first], train[first:]


def base(setting: Setting) -> Fitted:
    """The base as it is."""
    rows = setting.rows
    sites = bl.select(rows.base, ["v_proj"], rank=1, layers=slice(-rows.layers, None))
    model = bl.Classifier(rows.base, sites, bl.priors.point(), likelihood=rows.likelihood)
    nothing = jax.tree.map(lambda x: x[0], untouched(model))
    return by_posterior(setting, bl.PointPosterior(model, nothing), 1, 0, {})


def epochs(count: int) -> Any:
    """LoRA by maximum likelihood as commonly fine-tuned: a fixed number of epochs and nothing else."""

    def method(setting: Setting) -> Fitted:
        if count == EPOCHS:
            fitted, seconds = plain(setting)
        else:
            fitted, seconds = fit(setting, "LoRA", epochs=count), 0.0
        about = {"steps": len(fitted.step_seconds)}
        found = by_posterior(setting, fitted, 1, fitted.num_parameters, about)
        return found._replace(earlier={"fit": seconds})

    return method


def careful(setting: Setting) -> Fitted:
    """LoRA whose step and temperature are chosen on validation rows."""
    train, held_out = parted(setting)
    fitted = fit(setting, "LoRA", train, validation=held_out)
    key = setting.key("predictions")
    chosen = bl.predict(key, fitted, held_out, num_draws=1, console=QUIET)
    temperature = best_temperature(chosen, held_out, most=100)
    about = {"step": fitted.best_step, "temperature": temperature}
    raw = by_posterior(setting, fitted, 1, fitted.num_parameters + 1, about)
    return raw._replace(predict=lambda name: tempered(raw.predict(name), temperature))


def softened(rows: Rows, part: float) -> tuple[bl.Batch, Likelihood]:
    """Labelled rows and likelihood with a part of every label spread evenly over all classes."""
    count = rows.likelihood.num_classes
    votes = (1 - part) * jax.nn.one_hot(rows.train.labels, count) + part / count
    return replace(rows.train, outcomes=votes), bl.likelihoods.SoftLabels(rows.likelihood)


def smoothed(setting: Setting) -> Fitted:
    """LoRA on labels of which a part is spread evenly over all classes (Szegedy et al. 2016)."""
    part = setting.option("smoothing", SMOOTHING)
    train, likelihood = softened(setting.rows, part)
    fitted = fit(setting, "LoRA", train, likelihood=likelihood)
    return by_posterior(setting, fitted, 1, fitted.num_parameters, {"smoothing": part})


def mode(setting: Setting) -> Fitted:
    """The mode under independent normals, whose scale is chosen on validation rows."""
    train, held_out = parted(setting)
    key, labels, found = setting.key("predictions"), np.asarray(held_out.labels), {}
    for scale in setting.option("scales", MAP_SCALES):
        fitted = fit(setting, "LoRA", train, prior=bl.priors.normal(scale=scale))
        predicted = bl.predict(key, fitted, held_out, num_draws=1, console=QUIET)
        found[scale] = bl.metrics.nll(predicted.log_probs, labels), fitted
    scale = min(found, key=lambda scale: found[scale][0])
    about = {"scale": scale, "validation NLL": {str(scale): loss for scale, (loss, _) in found.items()}}
    fitted = found[scale][1]
    return by_posterior(setting, fitted, 1, fitted.num_parameters, about)


def laplace_lora(setting: Setting) -> Fitted:
    """A Kronecker-factored Gaussian around LoRA, the network linearised (Yang et al. 2024)."""
    rows = setting.rows
    fitted, seconds = plain(setting)
    options = {"structure": "kronecker", "precision": "evidence", "console": QUIET}
    gaussian = approximate.laplace(fitted, rows.train, **options)
    about = {"precision": gaussian.precision, "log_evidence": gaussian.log_evidence}
    key, draws = setting.key("predictions"), setting.option("draws", NETWORK_DRAWS)

    def predict(name: str) -> bl.Prediction:
        return approximate.linearised(key, gaussian, rows.tests[name], num_draws=draws, console=QUIET)

    return Fitted(predict, fitted.num_parameters + 1, about, {"fit": seconds})


def randomised(family: guides.Family) -> Any:
    """The factor `a` at random and `b` a point, under an almost flat prior: MC dropout, or BLoB's guide."""

    def method(setting: Setting) -> Fitted:
        by_factor: Mapping[str, guides.Family] = dict(zip(FACTORS, (family, guides.delta()), strict=True))
        scale = setting.option("scale", 1.0)
        fitted = fit(setting, "LoRA", prior=bl.priors.normal(scale=scale), family=by_factor)
        return by_posterior(setting, fitted, NETWORK_DRAWS, fitted.num_parameters, {"scale": scale})

    return method


def scalabl(setting: Setting) -> Fitted:
    """A random diagonal core between fitted factors (Samplawski et al. 2025, ScalaBL)."""
    scale = setting.option("scale", 1.0)
    fitted = fit(setting, "LoRA", prior=bl.priors.subspace(scale=scale), family=guides.mean_field())
    return by_posterior(setting, fitted, NETWORK_DRAWS, fitted.num_parameters, {"scale": scale})


def ensemble(setting: Setting) -> Fitted:
    """Five fits of LoRA from different starts, with equal weights."""
    size = setting.option("size", 5)
    members = tuple(fit(setting, f"LoRA, member {i}") for i in range(size))
    both = approximate.Ensemble(members)
    return by_posterior(setting, both, size, sum(m.num_parameters for m in members), {"size": size})


def swag(setting: Setting) -> Fitted:
    """A Gaussian from iterates at a constant rate after LoRA (Maddox et al. 2019)."""
    rows = setting.rows
    fitted, seconds = plain(setting)
    steps = max(setting.option("epochs", EPOCHS) * len(rows.train) // (4 * BATCH), 40)
    rate = setting.option("rate", 1e-2)
    options = {"learning_rate": rate, "num_steps": steps, "batch_size": BATCH, "console": QUIET}
    found = approximate.swag(setting.key("SWAG"), fitted, rank=10, every=2, **options)
    made = by_posterior(setting, found, NETWORK_DRAWS, 12 * fitted.num_parameters, {"rate": rate})
    return made._replace(earlier={"fit": seconds})


def training_free(setting: Setting) -> Fitted:
    """Noise on LoRA's update, as much as the validation rows allow (Shi et al. 2024, TFB)."""
    train, held_out = parted(setting)
    fitted = last_step(fit(setting, "LoRA", train))
    tolerance = setting.option("tolerance", 0.003)
    found = approximate.training_free(
        setting.key("TFB"), fitted, held_out, tolerance=tolerance, num_draws=NETWORK_DRAWS, console=QUIET
    )
    about = {"sigma": found.sigma, "tolerance": tolerance}
    return by_posterior(setting, found, NETWORK_DRAWS, fitted.num_parameters + 1, about)
