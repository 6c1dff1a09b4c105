"""Plain LoRA against Bayesian-LoRA: the same base, adapters, rows, order of rows and number of steps.

Plain LoRA is the maximum-likelihood fit of the adapters. It stands in the comparison twice, after the last
step and at the step with the best negative log-likelihood on validation rows, because early stopping is
what a careful user of plain LoRA does. Bayesian-LoRA is shown after its last step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from rich.console import Console

from bnlora import metrics
from bnlora.base import Base
from bnlora.cache import cache_prefix
from bnlora.display import Table
from bnlora.fits import Fit
from bnlora.predict import Prediction, predict
from bnlora.recipe import Recipe, Schedule
from bnlora.text import TextData
from bnlora.validation import EarlyStopping

LORA, EARLY, BAYES = "LoRA", "LoRA, best step", "Bayesian-LoRA"
SHOWN = {"ACC": "accuracy", "NLL": "nll", "ECE": "ece", "Brier": "brier"}


@dataclass(frozen=True)
class Comparison:
    """The fits and what they predict.

    Attributes:
        fits: Fit by method.
        predictions: Prediction by method and set of rows.
        labels: True classes by set of rows.
    """

    fits: Mapping[str, Fit]
    predictions: Mapping[str, Mapping[str, Prediction]]
    labels: Mapping[str, np.ndarray]

    @property
    def scores(self) -> Table:
        """Accuracy and calibration by set of rows and method, with 95 % bootstrap intervals."""
        rows, chosen = [], {name: metrics.METRICS[metric] for name, metric in SHOWN.items()}
        for domain, labels in self.labels.items():
            for method, predictions in self.predictions.items():
                summary = metrics.summary(predictions[domain], labels, metrics=chosen)
                cells = (f"{e.value:.3f}\n{e.low:.3f}-{e.high:.3f}" for e in summary.values())
                rows.append((domain if method == LORA else "", method, *cells))
        groups = frozenset(range(len(self.predictions), len(rows), len(self.predictions)))
        sizes = ", ".join(f"{len(labels)} {domain}" for domain, labels in self.labels.items())
        title = f"Test rows: {sizes}. Below each value its 95 % bootstrap interval."
        return Table(title, ("rows", "method", *SHOWN), tuple(rows), groups)

    @property
    def differences(self) -> Table:
        """Bayesian-LoRA minus both forms of plain LoRA, on the same rows, with paired intervals."""
        rows = []
        for domain, labels in self.labels.items():
            for method in (LORA, EARLY):
                ours, theirs = (self.predictions[m][domain] for m in (BAYES, method))
                pairs = (
                    metrics.paired_difference(metrics.METRICS[metric], ours, theirs, labels)
                    for metric in SHOWN.values()
                )
                cells = (f"{d.value:+.3f}\n{d.low:+.3f} to {d.high:+.3f}" for d in pairs)
                rows.append((domain if method == LORA else "", method, *cells))
        groups = frozenset(range(2, len(rows), 2))
        title = "Bayesian-LoRA minus plain LoRA: below zero is better, but for ACC."
        return Table(title, ("rows", "minus", *SHOWN), tuple(rows), groups)

    @property
    def costs(self) -> Table:
        """Parameters and time of both fits."""
        seconds = {m: float(np.median(self.fits[m].step_seconds[1:])) for m in (LORA, BAYES)}
        rows = []
        for method, per_step in seconds.items():
            made = self.fits[method]
            rows.append(
                (
                    method,
                    f"{made.num_parameters:,}",
                    f"{per_step:.3f}",
                    f"{per_step / seconds[LORA]:.2f}",
                    f"{made.step_seconds.sum():.0f}",
                )
            )
        header = ("method", "parameters", "s a step (median)", "ratio", "s in all, compiling included")
        return Table("Training", header, tuple(rows))


def compare(
    base: Base,
    data: TextData,
    recipe: Recipe,
    schedules: Mapping[str, Schedule],
    *,
    num_samples: int,
    console: Console | None = None,
) -> Comparison:
    """Fit both methods on `data.train` and predict every split but `train` and `validation`.

    Args:
        base: The frozen base.
        data: Splits `train`, `validation`, and any number of others, which are predicted.
        recipe: Adapters and prior of the Bayesian fit; plain LoRA has the same adapters.
        schedules: Schedule of `LORA` and of `BAYES`.
        num_samples: Posterior draws of a prediction.
        console: Where to report progress.
    """
    model, guide = replace(recipe, prior="none").build(base, data.label_ids)
    cached = {name: cache_prefix(model, rows, console=console) for name, rows in data.splits.items()}
    train, validation = cached.pop("train"), cached.pop("validation")
    every = max(schedules[LORA].num_steps // 9, 1)
    rule = EarlyStopping(every=every, patience=schedules[LORA].num_steps, num_samples=1)
    early = schedules[LORA].fit(
        model, guide, train, validation=validation, early_stopping=rule, console=console
    )
    # The Bayesian fit runs to its end: it needs no rows to tell it when to stop.
    bayes = schedules[BAYES].fit(*recipe.build(base, data.label_ids), train, console=console)
    fits = {LORA: replace(early, params=early.last_params), EARLY: early, BAYES: bayes}
    draws, key = {LORA: 1, EARLY: 1, BAYES: num_samples}, jax.random.key(schedules[BAYES].seed + 1)
    predictions = {
        method: {
            name: predict(key, made, rows, num_samples=draws[method], console=console)
            for name, rows in cached.items()
        }
        for method, made in fits.items()
    }
    labels = {name: np.asarray(rows.labels) for name, rows in cached.items()}
    return Comparison(fits, predictions, labels)
