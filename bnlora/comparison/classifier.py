r"""Classifier two-sample test: can a classifier tell draws of the approximation from those of the reference?

    accuracy = share of held-out draws whose side is told rightly,    1/2 where the laws are equal

Each draw is judged by a classifier that was fitted to other folds. The default is a logistic regression on
the functions, their squares and products: for Gaussians the best there is, and blind to differences that
leave means, variances and covariances alone. Any classifier of scikit-learn may be given. Its p-value takes
the number told rightly for binomial with chance 1/2, one-sided; folds share their training draws, so this is
an approximation (the tests measure it).

References: Lopez-Paz and Oquab (2017), arXiv 1610.06545; Lueckmann et al. (2021), arXiv 2101.04653.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from bnlora.comparison.pairs import Pairs


@dataclass(frozen=True)
class ClassifierTest:
    """Cross-validated accuracy of telling the two sides apart.

    Attributes:
        accuracy: Share of held-out draws told rightly.
        standard_error: Binomial standard error of the accuracy where the laws are equal.
        area: Area under the ROC curve, mean over the folds.
        p_value: One-sided p-value of an accuracy of one half.
        null: Accuracy of telling the halves of the reference apart.
        null_standard_error: Its binomial standard error; larger, for half the draws.
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
    random: np.random.Generator, samples: Pairs, *, classifier: Any = None, num_folds: int = 5
) -> ClassifierTest:
    """Fit and judge a classifier by cross-validation.

    Args:
        random: Source of the folds.
        samples: Halves of both sides.
        classifier: A classifier of scikit-learn with `decision_function` or `predict_proba`; a quadratic
            logistic regression when omitted.
        num_folds: Number of folds.

    Raises:
        ValueError: When there are fewer than two folds.
    """
    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2; got {num_folds}")
    chosen = quadratic_classifier() if classifier is None else classifier
    width = samples.approx.shape[2]
    sides = samples.approx.reshape(-1, width), samples.reference.reshape(-1, width)
    right, area = _judge(random, chosen, sides, num_folds)
    null, _ = _judge(random, chosen, tuple(samples.reference), num_folds)
    count = len(right)
    return ClassifierTest(
        float(right.mean()),
        0.5 / count**0.5,
        area,
        float(binom.sf(right.sum() - 1, count, 0.5)),
        float(null.mean()),
        0.5 / len(null) ** 0.5,
        num_folds,
    )


def quadratic_classifier() -> Any:
    """Logistic regression on the functions, their squares and their products, standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    features = (StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler())
    return make_pipeline(*features, LogisticRegression(max_iter=5000))


def _judge(
    random: np.random.Generator, classifier: Any, sides: tuple[np.ndarray, ...], num_folds: int
) -> tuple[np.ndarray, float]:
    """Which held-out draws are told rightly, and the area under the curve."""
    from sklearn.base import clone
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    values = np.concatenate(sides)
    labels = np.repeat([0, 1], [len(side) for side in sides])
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=int(random.integers(2**31)))
    right, areas = np.empty(len(labels), bool), []
    for fitted_on, held_out in folds.split(values, labels):
        fitted = clone(classifier).fit(values[fitted_on], labels[fitted_on])
        right[held_out] = fitted.predict(values[held_out]) == labels[held_out]
        areas.append(roc_auc_score(labels[held_out], _scores(fitted, values[held_out])))
    return right, float(np.mean(areas))


def _scores(classifier: Any, values: np.ndarray) -> np.ndarray:
    if hasattr(classifier, "decision_function"):
        return classifier.decision_function(values)
    return classifier.predict_proba(values)[:, 1]
