"""Numbers that the same keys gave before the library was rearranged; `data/held_numbers.json` has them.

A change of names, folders or programs must not move them. One that should (another default, another order of
random keys) stores them anew and says so: `python tests/project/test_held_numbers.py`, from the root.
"""

import json
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from builders.thorough import sample_of

import bnlora as bl
from bnlora.testing import tiny_base, tiny_rows

STORED = Path(__file__).parents[1] / "references" / "held_numbers.json"
KEY = jax.random.key(0)
BASE = tiny_base(jax.random.key(1), num_layers=2)
ROWS, NEW = tiny_rows(jax.random.key(2), 24), tiny_rows(jax.random.key(3), 9)


@cache
def fit_of_factors() -> bl.Fit:
    """The sparse GP on both factors under a SiteFlow."""
    sites = bl.select(BASE, ["q_proj", "lm_head"], rank=2, layers=slice(-1, None))
    prior = bl.priors.sparse_gp(rows=2, cols=2)
    model = bl.Classifier(BASE, sites, prior, label_ids=(3, 5))
    guide = bl.guides.SiteFlow(model.prior)
    # Descent without a norm by parameter: Adam's would make a step of what is only rounding.
    plain = {"optimizer": optax.sgd(1e-2), "optimisation": bl.Optimisation(scale_optimizer=optax.sgd(1e-2))}
    return bl.fit(KEY, model, guide, ROWS, num_steps=12, batch_size=8, **plain)


@cache
def fit_of_head() -> bl.Fit:
    """Independent normals on the head."""
    model = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), bl.priors.normal(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.mean_field())
    return bl.fit(KEY, model, guide, ROWS, optax.adam(0.05), num_steps=40, batch_size=24)


@cache
def core() -> bl.CoreFit:
    """The tangent model with scales by evidence."""
    return bl.fit_core(KEY, BASE, ROWS, label_ids=(3, 5), targets=["v_proj", "lm_head"], size=2)


def of_factors() -> dict:
    fit = fit_of_factors()
    return {"bound": fit.history["elbo"][-1], "conditional_kl": fit.history["conditional_kl"][-1]}


def of_predictions() -> dict:
    found = bl.predict(KEY, fit_of_factors(), NEW, num_draws=8)
    head = bl.predict(KEY, fit_of_head(), NEW, num_draws=8)
    return {"log_prob": found.log_probs[3, 1], "mutual_information": head.mutual_information[3]}


def of_prior_predictive() -> dict:
    found = bl.prior_predictive(KEY, fit_of_factors().model, NEW, num_draws=20)
    return {"spread": found.overall_spread}


def of_diagnosis() -> dict:
    page = bl.diagnose(fit_of_head().draw_key, fit_of_head(), NEW, num_draws=100)
    return {
        "khat": page.khat.overall.value,
        "log_bound": page.final_bound.value,
        "elpd": page.loo.elpd,
        "spread": np.mean([cell.ratio for cell in page.shrinkage.cells]),
    }


def of_core() -> dict:
    made = core()
    chosen = made.scales
    return {
        "log_evidence": made.gaussian.log_evidence,
        "v_proj": chosen.values["v_proj"],
        "lm_head": chosen.values["lm_head"],
        "log_prob": bl.predict(KEY, made, NEW, num_draws=8).log_probs[2, 1],
    }


def of_chains() -> dict:
    made = core()
    few = {"num_warmup": 100, "num_draws": 50, "num_chains": 2}
    chains = bl.sample_nuts(KEY, made.model, made.fit.train, mass=made.gaussian, **few)
    names, values = chains.values()
    return {"log_likelihood": values[..., names.index("log_likelihood")].mean()}


def of_point_methods() -> dict:
    model = bl.Classifier(BASE, bl.select(BASE, ["lm_head"], rank=1), bl.priors.point(), label_ids=(3, 5))
    guide = bl.guides.Guide(model.prior, bl.guides.delta())
    fit = bl.fit(KEY, model, guide, ROWS, optax.adam(0.02), num_steps=20, batch_size=8)
    laplace = bl.approximate.laplace(fit, ROWS, structure="full", precision=1.0)
    swag = bl.approximate.swag(KEY, fit, num_steps=20, rank=4, batch_size=8, learning_rate=0.01)
    return {
        "laplace": laplace.log_evidence,
        "swag": bl.predict(KEY, swag, NEW, num_draws=8).log_probs[1, 0],
    }


def of_calibration() -> dict:
    prediction = bl.predict(KEY, fit_of_head(), NEW, num_draws=16)
    summary = bl.metrics.summary(jax.random.key(0), prediction, NEW.labels)
    return {name: summary[name].value for name in ("nll", "ece", "brier")}


CASES = {
    function.__name__.removeprefix("of_"): function
    for function in (
        of_factors,
        of_predictions,
        of_prior_predictive,
        of_diagnosis,
        of_core,
        of_chains,
        of_point_methods,
        of_calibration,
    )
}


@pytest.mark.parametrize("case", sample_of(CASES, ["predictions", "core", "diagnosis", "calibration"]))
def test_numbers_stay(case):
    stored = json.loads(STORED.read_text())[case]
    found = {name: float(value) for name, value in CASES[case]().items()}
    assert found == pytest.approx(stored, rel=2e-3)


if __name__ == "__main__":
    held = {case: {n: float(v) for n, v in make().items()} for case, make in CASES.items()}
    STORED.write_text(json.dumps(held, indent=2) + "\n")
