"""Metrics of every result of a problem, by set of rows.

Rows without a class (label -1) have no accuracy or likelihood; they count for the detection of a shift only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from sklearn.metrics import average_precision_score

from benchmarks.cells.gathered import Problem
from benchmarks.cells.rows import Predicted
from benchmarks.cells.weighted import auroc, selective_accuracy
from bnlora import metrics
from bnlora.metrics.scores import BINS, confidences, is_correct, width_bin
from bnlora.prediction.predict import Prediction

COVERAGE = 0.8
"""Share of the rows that are answered for the selective accuracy."""

NULL_REDRAWS = 50
"""Redraws for the null level of the ECE, as in the benchmark `seeds`."""

DOUBTS = ("entropy", "MI")
"""What tells a shifted row: entropy of the prediction, or mutual information of class and adapters."""


def classwise_ece(
    log_probs: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], *, bins: int = BINS
) -> float:
    """Calibration error of the probability of every class, averaged over classes (Kull et al. 2019).

    For class k and bin b of its probability: sum over b of n_b/n |share of class k - mean probability|.

    Args:
        log_probs: Log-probabilities, shape (n, c).
        labels: True classes in {0, ..., c - 1}, shape (n,).
        bins: Number of bins of equal width in (0, 1].

    Returns:
        A number in [0, 1]; lower is better.

    Raises:
        ValueError: If there are no rows.
    """
    if not len(labels):
        raise ValueError("classwise_ece needs at least one row")
    probs = np.exp(log_probs)
    total = 0.0
    for k in range(probs.shape[1]):
        gap = np.bincount(width_bin(probs[:, k], bins), weights=(labels == k) - probs[:, k], minlength=bins)
        total += np.abs(gap).sum() / len(labels)
    return float(total / probs.shape[1])


def labelled(of: Predicted) -> tuple[Float[np.ndarray, "n c"], Int[np.ndarray, " n"]]:
    """Log-probabilities and labels of the rows that have a class."""
    kept = of.labels >= 0
    return of.log_probs[kept], of.labels[kept]


def doubt(of: Predicted, by: str) -> Float[np.ndarray, " n"]:
    """Doubt of each row, by one of `DOUBTS`."""
    return of.mutual_information if by == "MI" else Prediction(of.log_probs[None]).entropy


def scores(of: Predicted) -> dict[str, float]:
    """Metrics of the labelled rows by name; empty if no row has a label."""
    log_probs, labels = labelled(of)
    if not len(labels):
        return {}
    every = {name: formula(log_probs, labels) for name, formula in FORMULAS.items()}
    null = metrics.null_ece(log_probs, redraws=NULL_REDRAWS)
    return every | {"debiased ECE": every["ECE"] - null}


def _selective(log_probs: np.ndarray, labels: np.ndarray) -> float:
    ones = np.ones((1, len(labels)))
    return float(
        selective_accuracy(ones, -confidences(log_probs), is_correct(log_probs, labels), COVERAGE)[0]
    )


FORMULAS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "ACC": metrics.accuracy,
    "NLL": metrics.nll,
    "Brier": metrics.brier,
    "ECE": metrics.ece,
    "adaptive ECE": metrics.adaptive_ece,
    "classwise ECE": classwise_ece,
    "AURC": metrics.aurc,
    "ACC at 80 %": _selective,
}

COLUMNS = (
    "ACC",
    "NLL",
    "Brier",
    "ECE",
    "debiased ECE",
    "adaptive ECE",
    "classwise ECE",
    "AURC",
    "ACC at 80 %",
    *(f"{area} {by}" for by in DOUBTS for area in ("AUROC", "AUPR")),
)
"""Metrics in the order of the tables."""


def detection(inside: Predicted, outside: Predicted) -> dict[str, float]:
    """AUROC and AUPR of telling shifted rows (positive) from rows in domain, by each doubt.

    A doubt that is equal for all rows, such as the mutual information of a single draw, has no value.

    Args:
        inside: Predictions in domain, n rows.
        outside: Predictions of the shifted rows, m rows.

    Returns:
        Values by name, as in `AUROC entropy`.
    """
    found: dict[str, float] = {}
    for by in DOUBTS:
        low, high = doubt(inside, by), doubt(outside, by)
        both = np.concatenate([low, high])
        if len(low) and len(high) and np.ptp(both) > 0:
            ones = np.ones((1, len(low))), np.ones((1, len(high)))
            found[f"AUROC {by}"] = float(auroc(*ones, low, high)[0])
            is_outside = np.arange(len(both)) >= len(low)
            found[f"AUPR {by}"] = float(average_precision_score(is_outside, both))
    return found


@dataclass(frozen=True)
class Judged:
    """A problem with the metrics of all its results.

    Attributes:
        problem: The problem.
        values: Metrics by set, method and seed. A metric without a value is absent.
    """

    problem: Problem
    values: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]

    def mean(self, name: str, method: str, metric: str, seeds: Sequence[int] | None = None) -> float:
        """Mean of a metric over seeds, all of the method by default; NaN without a value."""
        by_seed = self.values.get(name, {}).get(method, {})
        found = [
            of[metric] for seed, of in by_seed.items() if metric in of and (seeds is None or seed in seeds)
        ]
        return float(np.mean(found)) if found else float("nan")


def judge(problem: Problem) -> Judged:
    """Compute the metrics of all results of a problem."""
    first = problem.sets[0]
    values: dict[str, dict[str, dict[int, dict[str, float]]]] = {name: {} for name in problem.sets}
    for method in problem.methods:
        for seed, result in sorted(problem.results[method].items()):
            for name, of in result.predicted.items():
                found = scores(of)
                if name != first:
                    found |= detection(result.predicted[first], of)
                values[name].setdefault(method, {})[seed] = found
    return Judged(problem, values)
