"""Why the sparse GP caps lam: variational families on the head.

If only the head is adapted, the last hidden state of a row is a fixed feature vector. The two-class problem
is then a logistic regression, whose evidence Laplace's method gives almost exactly. This is the best result
of a Bayesian treatment of this layer. The fits of `A` and `B` are compared with it: the families of the
demonstration, guides that tie `A` to `B`, and priors that contain `lam`, whose conditional weights deviate
little from their mean. All are scored on validation sentences.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from scipy.optimize import minimize
from scipy.special import expit, log_expit

import bnlora as bl
from benchmarks.report import Report
from bnlora import guides
from bnlora.app.demo import RECIPE
from bnlora.app.recipe import Recipe, Schedule
from bnlora.data.assets import vader_splits
from bnlora.models import layers

HEAD = replace(RECIPE, targets=("lm_head",), top_layers=None)
HEADER = ("family", "scale", "bound", "data", "conditional KL", "validation NLL", "ECE")


Build = Callable[[bl.Base, bl.TextData], tuple[bl.Classifier, Callable]]
"""Function from a base and its rows to a model and a guide."""


class Setting(NamedTuple):
    """One fit: name, prior scale of B, builder of model and guide, schedule, draws of a prediction."""

    name: str
    scale: str
    build: Build
    schedule: Schedule
    draws: int = 64


def of_recipe(recipe: Recipe) -> Build:
    """A head by a recipe of the demonstration."""
    return lambda base, data: recipe.build(base, data.label_ids)


def of_parts(prior: bl.priors.Prior, family: guides.Family, rank: int = 8, **options) -> Build:
    """A head of a rank, with any prior and any guide."""

    def build(base, data):
        sites = bl.select(base, ["lm_head"], rank=rank)
        model = bl.Classifier(base, sites, prior, label_ids=data.label_ids)
        return model, guides.Guide(model.prior, family, **options)

    return build


def settings(steps: int) -> Iterator[Setting]:
    """Every fit of the comparison."""
    schedule = Schedule(steps, learning_rate=1e-2, scale_learning_rate=2e-2)
    for rate in (1e-3, 3e-3, 1e-2):
        plain = of_recipe(replace(HEAD, prior="none"))
        yield Setting(f"LoRA, rate {rate:g}", "", plain, replace(schedule, learning_rate=rate), 1)
    for prior, scale in product(("sparse-gp", "normal"), (0.03, 0.3, 1.0, 3.0, 10.0)):
        whole = of_recipe(replace(HEAD, prior=prior, scale_b=scale, lam_max=1.0))
        yield Setting(f"{prior}, whole family", f"{scale:g}", whole, schedule)
    for scale in (1.0, 3.0, 10.0):
        capped = of_recipe(replace(HEAD, scale_b=scale, lam_max=0.03))
        yield Setting("sparse-gp, lam < 0.03", f"{scale:g}", capped, schedule)
    for scale in (1.0, 3.0, 10.0):
        prior = bl.priors.normal(scale={"a": 1.0, "b": scale})
        for rank, family in {8: guides.low_rank(rank=8, over="all"), 1: guides.full(over="all")}.items():
            name = f"normal of rank {rank}, {family.label}, A tied to B"
            yield Setting(name, f"{scale:g}", of_parts(prior, family, rank), schedule)
    for lam, scale in product((0.0, 0.03, 0.1), (1.0, 3.0, 10.0)):
        prior = bl.priors.sparse_gp(scale={"a": 1.0, "b": scale}, lam=lam)
        part = of_parts(prior, guides.row_shared(), noise=guides.prior_noise())
        yield Setting(f"sparse-gp with prior lam {lam:g}", f"{scale:g}", part, schedule)


def fitted(setting: Setting, base: bl.Base, data: bl.TextData) -> tuple[str, ...]:
    """One row of the table: mean bound of the last fifty steps, and scores."""
    fit = setting.schedule.fit(*setting.build(base, data), data.train, console=Console(quiet=True))
    prediction = bl.predict(jax.random.key(1), fit, data["validation"], num_draws=setting.draws)
    terms = [fit.history[term][-50:].mean() for term in ("elbo", "data", "conditional_kl")]
    return (setting.name, setting.scale, *(f"{x:.1f}" for x in terms), *scores(prediction.log_probs, data))


def scores(log_probs: np.ndarray, data: bl.TextData) -> tuple[str, str]:
    """NLL and ECE of the validation rows."""
    labels = np.asarray(data["validation"].labels)
    return tuple(f"{f(log_probs, labels):.4f}" for f in (bl.metrics.nll, bl.metrics.ece))


def label_rows(base: bl.Base, label_ids: np.ndarray) -> np.ndarray:
    """Rows of the output layer that belong to the label words, shape (class, d)."""
    module = base.module
    head = (module.embedding if module.lm_head is None else module.lm_head)[...]
    return np.asarray(head[np.asarray(label_ids)])


def features(base: bl.Base, data: bl.TextData, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalised last hidden states (n, d), log-odds of the base (n,), and labels (n,)."""
    rows, module = data[name], base.module
    last = np.asarray(rows.mask).sum(1) - 1
    hidden = layers.rms_norm(
        rows.cached.hidden[np.arange(len(rows)), last], module.final_norm[...], base.config.norm_eps
    )
    head = label_rows(base, data.label_ids)
    hidden = np.asarray(hidden, np.float64)
    return hidden, hidden @ np.asarray(head[1] - head[0], np.float64), np.asarray(rows.labels)


def logistic(tau: float, base: bl.Base, data: bl.TextData) -> tuple[str, ...]:
    """Weights N(0, tau^2) on the features, added to the log-odds of the base, by Laplace's method."""
    X, offset, y = features(base, data, "train")
    sign = 2 * y - 1

    def loss(w):
        z = offset + X @ w
        return w @ w / (2 * tau**2) - log_expit(sign * z).sum(), w / tau**2 + X.T @ (expit(z) - y)

    w = minimize(loss, np.zeros(X.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000}).x
    p = expit(offset + X @ w)
    precision = (X.T * (p * (1 - p))) @ X + np.eye(len(w)) / tau**2
    # Laplace: log joint at the mode minus half the log-determinant of precision times prior variance.
    evidence = -loss(w)[0] - 0.5 * np.linalg.slogdet(precision * tau**2)[1]
    new, new_offset, _ = features(base, data, "validation")
    spread = np.sqrt(np.einsum("nd,nd->n", new, np.linalg.solve(precision, new.T).T))
    draws = (new_offset + new @ w)[:, None] + spread[:, None] * np.random.default_rng(0).normal(size=(1, 999))
    probs = expit(draws).mean(1)
    data_term = log_expit(sign * (offset + X @ w)).sum()
    log_probs = np.log(np.stack([1 - probs, probs], 1))
    name = "logistic regression"
    return (name, f"{tau:g}", f"{evidence:.1f}", f"{data_term:.1f}", "", *scores(log_probs, data))


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes and families."""
    parser.add_argument("--rows", type=int, default=320, help="training rows")
    parser.add_argument("--validation", type=int, default=320, help="validation rows")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="regular expression of the families to fit")


def run(given: argparse.Namespace, report: Report) -> None:
    """Fit every family."""
    base = HEAD.load_base()
    rows = vader_splits(seed=given.seed, train=given.rows, validation=given.validation, test=1)
    data = HEAD.read(rows, base, text="text", label="label")
    model, _ = HEAD.build(base, data.label_ids)
    cached = {name: bl.cache_prefix(model, data[name]) for name in ("train", "validation")}
    data = replace(data, splits=cached)
    X, offset, _ = features(base, data, "validation")
    untouched = np.log(np.stack([expit(-offset), expit(offset)], 1))
    table = report.table("Families", HEADER)
    table.row("base, no adapter", "", "", "", "", *scores(untouched, data))
    for tau in (0.01, 0.03, 0.1, 0.3):
        table.row(*logistic(tau, base, data))
    for setting in settings(given.steps):
        if re.search(given.only, setting.name):
            table.row(*fitted(setting, base, data))
