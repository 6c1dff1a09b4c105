r"""Classifier two-sample test: can a classifier distinguish draws of the approximation from the reference?

    accuracy = share of held-out draws that are classified correctly,    1/2 if the laws are equal

Each draw is classified by a classifier that was fitted to the other folds. The default is a logistic
regression on the functions, their squares and their products. It is optimal for Gaussians, and cannot detect
differences that leave means, variances and covariances unchanged. Any classifier of scikit-learn works.

If the laws are equal, the labels of a held-out fold are exchangeable: the number of draws of the reference
among those classified as "reference" is hypergeometric. This p-value is exact in each fold. The smallest one
times the number of folds (Bonferroni) is valid under any dependence of the folds. They do depend on each
other: pooled over five folds, the accuracy scatters a fifth more than a binomial, so a binomial test would
reject too often. The standard error is that of one fold, which bounds that of their mean.

References: Lopez-Paz and Oquab (2017), arXiv 1610.06545; Lueckmann et al. (2021), arXiv 2101.04653.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy  # whose parts are imported when they are first used

from bnlora.assess.comparison.pairs import Pairs


@dataclass(frozen=True)
class ClassifierTest:
    """Cross-validated accuracy of classifying draws by side.

    Attributes:
        accuracy: Share of held-out draws that are classified correctly.
        standard_error: Upper bound on the standard error of the accuracy under equal laws.
        area: Area under the ROC curve, mean over the folds.
        p_value: One-sided p-value of equal laws.
        null: Accuracy of classifying the halves of the reference.
        null_standard_error: The same bound for `null`; larger, because there are half as many draws.
        num_folds: Number of folds.
    """

    accuracy: float
    standard_error: float
    area: float
    p_value: float
    null: float
    null_standard_error: float
    num_folds: int


def classifier_test(
    random: np.random.Generator, samples: Pairs, *, classifier: Any = None, num_folds: int = 2
) -> ClassifierTest:
    """Fit and test a classifier by cross-validation.

    Args:
        random: Generator of the folds.
        samples: Halves of both sides.
        classifier: A classifier of scikit-learn with `decision_function` or `predict_proba`; a quadratic
            logistic regression by default.
        num_folds: Number of folds. Each fold has its own test, so few folds have the most power.

    Raises:
        ValueError: If there are fewer than two folds.
    """
    from sklearn.metrics import roc_auc_score

    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2; got {num_folds}")
    estimator = quadratic_classifier() if classifier is None else classifier
    width = samples.posterior.shape[2]
    sides = samples.posterior.reshape(-1, width), samples.reference.reshape(-1, width)
    folds = _judge(random, estimator, sides, num_folds)
    null_folds = _judge(random, estimator, tuple(samples.reference), num_folds)
    return ClassifierTest(
        _accuracy(folds),
        _bound(folds),
        float(np.mean([roc_auc_score(fold.labels, fold.scores) for fold in folds])),
        min(1.0, num_folds * min(_exact(fold) for fold in folds)),
        _accuracy(null_folds),
        _bound(null_folds),
        num_folds,
    )


def quadratic_classifier() -> Any:
    """Logistic regression on the functions, their squares and their products, standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    features = (StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler())
    return make_pipeline(*features, LogisticRegression(max_iter=5000))


class _Fold(NamedTuple):
    """Held-out draws of one fold: true side (1: second), predicted side and score, each of shape (draw,)."""

    labels: np.ndarray
    called: np.ndarray
    scores: np.ndarray


def _judge(
    random: np.random.Generator, classifier: Any, sides: tuple[np.ndarray, ...], num_folds: int
) -> list[_Fold]:
    from sklearn.base import clone
    from sklearn.model_selection import StratifiedKFold

    values = np.concatenate(sides)
    labels = np.repeat([0, 1], [len(side) for side in sides])
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=int(random.integers(2**31)))
    results = []
    for fitted_on, held_out in folds.split(values, labels):
        fitted = clone(classifier).fit(values[fitted_on], labels[fitted_on])
        scores = _scores(fitted, values[held_out])
        results.append(_Fold(labels[held_out], fitted.predict(values[held_out]), scores))
    return results


def _accuracy(folds: list[_Fold]) -> float:
    return float(np.mean(np.concatenate([fold.labels == fold.called for fold in folds])))


def _bound(folds: list[_Fold]) -> float:
    return float(0.5 / min(len(fold.labels) for fold in folds) ** 0.5)


def _exact(fold: _Fold) -> float:
    """Exact one-sided p-value of a fold: chance of at least as many correct 1s under random labels."""
    ones, called = int(fold.labels.sum()), int(fold.called.sum())
    both = int((fold.labels * fold.called).sum())
    return float(scipy.stats.hypergeom.sf(both - 1, len(fold.labels), ones, called))


def _scores(classifier: Any, values: np.ndarray) -> np.ndarray:
    if hasattr(classifier, "decision_function"):
        return classifier.decision_function(values)
    return classifier.predict_proba(values)[:, 1]
