"""Learning rates and prior scale of the sparse GP and of LoRA, chosen on validation rows.

Every setting is fitted to the training sentences of the demonstration and scored on its validation sentences,
over several seeds; test sentences are not used. Plain LoRA is scored after its last step and at its best
step, which early stopping would return.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import jax
import numpy as np
from rich.console import Console

import bnlora as bl
from benchmarks.report import Report
from bnlora.app.demo import RECIPE
from bnlora.app.recipe import Recipe, Schedule
from bnlora.data.assets import vader_splits

HEADER = (
    "method",
    "rate",
    "scale",
    "cap on lam",
    "seed",
    "training NLL",
    "validation NLL",
    "ECE",
    "best step",
)


def settings(given: argparse.Namespace) -> Iterator[tuple[Recipe, Schedule]]:
    """Every recipe and schedule of the grid."""
    for seed in range(given.seeds):
        for rate in (3e-4, 1e-3, 3e-3, 1e-2):
            yield replace(RECIPE, prior="none"), Schedule(given.steps, learning_rate=rate, seed=seed)
        for rate in (1e-2, 3e-2):
            for scale in (1.0, 3.0, 10.0):
                yield replace(RECIPE, scale_b=scale), Schedule(given.steps, learning_rate=rate, seed=seed)
        for scale in (0.1, 1.0):
            yield (
                replace(RECIPE, scale_b=scale, lam_max=1.0),
                Schedule(given.steps, learning_rate=3e-2, seed=seed),
            )


def scored(
    recipe: Recipe, schedule: Schedule, base: bl.Base, data: dict, label_ids: np.ndarray
) -> tuple[str, ...]:
    """Fit one setting and score it on the validation rows."""
    model, guide = recipe.build(base, label_ids)
    plain = recipe.prior == "none"
    rule = bl.EarlyStopping(every=max(schedule.num_steps // 10, 1), patience=schedule.num_steps, num_draws=1)
    looks = {"validation": data["validation"], "early_stopping": rule} if plain else {}
    fit = schedule.fit(model, guide, data["train"], console=Console(quiet=True), **looks)
    last = replace(fit, params=fit.last_params)
    draws = 1 if plain else 16
    scores = {}
    for name in ("train", "validation"):
        prediction = bl.predict(jax.random.key(1), last, data[name], num_draws=draws)
        labels = np.asarray(data[name].labels)
        scores[name] = [f(prediction.log_probs, labels) for f in (bl.metrics.nll, bl.metrics.ece)]
    best = f"{fit.validation['nll'].min():.4f} at {fit.best_step}" if plain else ""
    return (
        "LoRA" if plain else "Bayesian-LoRA",
        f"{schedule.learning_rate:g}",
        "" if plain else f"{recipe.scale_b:g}",
        "" if plain else f"{recipe.lam_max:g}",
        str(schedule.seed),
        f"{scores['train'][0]:.4f}",
        f"{scores['validation'][0]:.4f}",
        f"{scores['validation'][1]:.4f}",
        best,
    )


def options(parser: argparse.ArgumentParser) -> None:
    """Sizes."""
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds, from 0 on")
    parser.add_argument("--rows", type=int, default=320, help="training rows")
    parser.add_argument("--validation", type=int, default=320, help="validation rows")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--skip", type=int, default=0, help="settings to leave out, to go on after a stop")


def run(given: argparse.Namespace, report: Report) -> None:
    """One row for each setting of the grid."""
    base, cached, table = RECIPE.load_base(), {}, report.table("Settings", HEADER)
    for recipe, schedule in islice(settings(given), given.skip, None):
        if schedule.seed not in cached:
            splits = vader_splits(seed=schedule.seed, train=given.rows, validation=given.validation, test=1)
            data = RECIPE.read(splits, base, text="text", label="label")
            model, _ = recipe.build(base, data.label_ids)
            chosen = {name: bl.cache_prefix(model, data[name]) for name in ("train", "validation")}
            cached = {schedule.seed: (chosen, data.label_ids)}
        table.row(*scored(recipe, schedule, base, *cached[schedule.seed]))
