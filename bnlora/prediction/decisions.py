r"""Decisions from predictions: the action of least expected cost, and what the decisions really cost.

Let C[y, a] be the cost of action a if the class is y. For a row with predictive probabilities p(y),

    action = argmin_a sum_y p(y) C[y, a],        expected cost = min_a sum_y p(y) C[y, a].

There can be more actions than classes. With cost 1 for a wrong class, 0 for the right one and a price for a
review by a person, a row is reviewed if and only if its largest probability is below 1 - price (Chow 1970).

The expected cost is the model's own opinion. `realised_cost` computes the cost of the decisions on rows with
labels, `cost_difference` compares two fits on the same rows, and `posterior_value` computes what decisions
from a mixture over draws save against those from a point. All are means over rows with percentile bootstrap
intervals. They hold for rows like these, and for these costs.

References: Chow (1970), IEEE Transactions on Information Theory 16; Elkan (2001), IJCAI, for cost matrices;
Berger (1985), Statistical Decision Theory and Bayesian Analysis, for expected cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from bnlora import metrics
from bnlora._util.checks import check_at_least, check_key
from bnlora._util.display import Showable, Shown, Table, facts
from bnlora.metrics.scores import Labelled, Labels, LogProbs, Predicted, checked, checked_log_probs


@dataclass(frozen=True, repr=False, eq=False)  # arrays cannot be compared by one truth value
class Costs(Shown):
    """Cost of every action for every true class. Gains are negative costs.

    Attributes:
        matrix: Cost of action a if the class is y, shape (class, action); an array or rows of numbers.
        actions: Name of each action; their numbers if omitted.

    Raises:
        ValueError: If the matrix does not have shape (class, action), a cost is not a finite number, or names
            and actions differ in number.

    Example:
        >>> costs = Costs([[0, 5, 1], [20, 0, 1]], actions=["discharge", "admit", "ask a doctor"])
        >>> costs.matrix.shape, costs.actions[2]
        ((2, 3), 'ask a doctor')
    """

    matrix: Float[Any, "c a"]
    actions: Sequence[str] = ()

    def __post_init__(self) -> None:
        try:
            matrix = np.array(self.matrix, np.float64)
        except (TypeError, ValueError):
            raise ValueError("costs must be numbers in rows of equal length, shape (class, action)") from None
        if matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"costs must have shape (class, action), at least (1, 1); got {matrix.shape}")
        if not np.isfinite(matrix).all():
            c, a = np.argwhere(~np.isfinite(matrix))[0]
            raise ValueError(f"costs must be finite; got {matrix[c, a]} for class {c} and action {a}")
        actions = tuple(self.actions) or tuple(map(str, range(matrix.shape[1])))
        if len(actions) != matrix.shape[1]:
            raise ValueError(f"expected a name for each of {matrix.shape[1]} actions; got {len(actions)}")
        matrix.flags.writeable = False
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "actions", actions)

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The matrix with its actions."""
        rows = tuple((str(c), *(f"{cost:g}" for cost in row)) for c, row in enumerate(self.matrix))
        return (Table("Costs", ("class", *self.actions), rows),)


@dataclass(frozen=True, repr=False, eq=False)
class Decisions(Shown):
    """The action of every row; made by `decide`.

    Attributes:
        actions: Number of the action of each row.
        expected: Its expected cost under the prediction.
        costs: The costs.
    """

    actions: Int[np.ndarray, " n"]
    expected: Float[np.ndarray, " n"]
    costs: Costs

    @property
    def overview(self) -> tuple[Showable, ...]:
        """How often each action is taken, and its mean expected cost."""
        rows = []
        for a, name in enumerate(self.costs.actions):
            taken = self.actions == a
            mean = f"{self.expected[taken].mean():.4g}" if taken.any() else ""
            rows.append((name, f"{taken.sum():,}", mean))
        title = f"Decisions for {len(self.actions):,} rows, expected cost {self.expected.mean():.4g} each"
        return (Table(title, ("action", "rows", "mean expected cost"), tuple(rows)),)


@dataclass(frozen=True, repr=False, eq=False)
class PosteriorValue(Shown):
    """What decisions from a mixture over draws save against decisions from a point; of `posterior_value`.

    Attributes:
        saving: Realised cost for each row of the point's decisions minus that of the mixture's, with its
            interval. Positive if the posterior pays.
        expected_saving: The same difference under the mixture's own probabilities; never negative.
        changed: Share of rows with another action. Without such rows there is nothing to save.
    """

    saving: metrics.Estimate
    expected_saving: float
    changed: float

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The three numbers."""
        about = {
            "realised saving for each row": str(self.saving),
            "saving that the posterior expects": f"{self.expected_saving:.3f}",
            "rows with another action": f"{self.changed:.3f}",
        }
        return (facts("Value of the posterior over the point", about),)


def zero_one(num_classes: int, *, review: float | None = None) -> Costs:
    """Costs of 1 for a wrong class and 0 for the right one, and the price of a review if there is one.

    Args:
        num_classes: Number of classes, each of which is an action.
        review: Price of a further action, "review", whatever the class; no such action if omitted.

    Returns:
        The costs, shape (c, c) or (c, c + 1).

    Raises:
        ValueError: If `num_classes` is below 1 or the price is not a number from 0 to 1.

    Example:
        >>> zero_one(2, review=0.2).matrix
        array([[0. , 1. , 0.2],
               [1. , 0. , 0.2]])
    """
    check_at_least({"num_classes": num_classes}, 1)
    matrix, names = 1 - np.eye(num_classes), [f"class {c}" for c in range(num_classes)]
    if review is not None:
        _check_price(review)
        matrix, names = np.column_stack([matrix, np.full(num_classes, review)]), [*names, "review"]
    return Costs(matrix, names)


def review_threshold(review: float) -> float:
    """Confidence below which a row is reviewed under `zero_one` costs: 1 - review (Chow 1970).

    The confidence is the largest probability of a row. It is at least 1/c, so nothing is reviewed at a price
    of (c - 1)/c or more.

    Args:
        review: Price of a review, where a wrong class costs 1.

    Returns:
        The threshold on the largest probability.

    Raises:
        ValueError: If the price is not a number from 0 to 1.

    Example:
        >>> review_threshold(0.2)
        0.8
    """
    _check_price(review)
    return 1 - review


def decide(prediction: LogProbs | Predicted, costs: Costs) -> Decisions:
    """The action of least expected cost for every row; the first one of equals.

    Args:
        prediction: A `Prediction`, or log-probabilities of shape (n, c).
        costs: Costs of shape (c, a).

    Returns:
        The actions with their expected costs.

    Raises:
        ValueError: If a row is not a distribution, or prediction and costs differ in the number of classes.

    Example:
        >>> decisions = decide(np.log([[0.9, 0.1], [0.6, 0.4]]), zero_one(2, review=0.2))
        >>> [decisions.costs.actions[a] for a in decisions.actions], decisions.expected.round(3)
        (['class 0', 'review'], array([0.1, 0.2]))
    """
    log_probs = checked_log_probs(prediction)
    if log_probs.shape[1] != len(costs.matrix):
        raise ValueError(
            f"the costs are for {len(costs.matrix)} classes and the prediction has {log_probs.shape[1]}"
        )
    expected = np.exp(log_probs) @ costs.matrix
    actions = expected.argmin(1)
    return Decisions(actions, np.take_along_axis(expected, actions[:, None], 1)[:, 0], costs)


def realised_cost(
    key: Array,
    prediction: LogProbs | Predicted,
    labels: Labels | Labelled,
    costs: Costs,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> metrics.Estimate:
    """Mean cost of the decisions of a prediction on rows with labels.

    Args:
        key: Random key of the bootstrap.
        prediction: A `Prediction`, or log-probabilities of shape (n, c).
        labels: True classes, shape (n,), or the `Batch` that has them.
        costs: Costs of shape (c, a).
        level: Probability of the interval.
        num_resamples: Number of bootstrap samples of rows.

    Returns:
        Mean cost for each row, with its percentile bootstrap interval.

    Raises:
        ValueError: As `decide`, or if the labels do not fit, `level` is outside (0, 1), or `num_resamples` is
            below 1.

    Example:
        >>> cost = realised_cost(key, np.log([[0.9, 0.1], [0.6, 0.4]]), [1, 0], zero_one(2, review=0.2))
        >>> cost.value  # one wrong class, one review
        0.6
    """
    key = check_key(key)
    return _mean(key, _row_costs(prediction, labels, costs), level, num_resamples)


def cost_difference(
    key: Array,
    first: LogProbs | Predicted,
    second: LogProbs | Predicted,
    labels: Labels | Labelled,
    costs: Costs,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> metrics.Estimate:
    """Mean cost of the decisions of a first prediction minus that of a second one, on the same rows.

    The rows are resampled together, so rows that cost both the same do not widen the interval.

    Args:
        key: Random key of the bootstrap.
        first: A `Prediction`, or log-probabilities of shape (n, c).
        second: The second prediction, for the same rows.
        labels: True classes, shape (n,), or the `Batch` that has them.
        costs: Costs of shape (c, a).
        level: Probability of the interval.
        num_resamples: Number of bootstrap samples of rows.

    Returns:
        The difference with its interval; negative if the first is cheaper.

    Raises:
        ValueError: As `realised_cost`.

    Example:
        >>> sure, unsure = np.log([[0.99, 0.01]] * 4), np.log([[0.6, 0.4]] * 4)
        >>> str(cost_difference(key, unsure, sure, [0, 0, 0, 1], zero_one(2, review=0.2)))
        '-0.050 [-0.550, 0.200]'
    """
    key = check_key(key)
    difference = _row_costs(first, labels, costs) - _row_costs(second, labels, costs)
    return _mean(key, difference, level, num_resamples)


def posterior_value(
    key: Array,
    mixture: LogProbs | Predicted,
    point: LogProbs | Predicted,
    labels: Labels | Labelled,
    costs: Costs,
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> PosteriorValue:
    """What decisions from a mixture over draws save against those from a point, on the same rows.

    Args:
        key: Random key of the bootstrap.
        mixture: Prediction with the draws of a posterior.
        point: Prediction with one point, such as that of a `PointPosterior` or of an ordinary adapter.
        labels: True classes, shape (n,), or the `Batch` that has them.
        costs: Costs of shape (c, a).
        level: Probability of the interval.
        num_resamples: Number of bootstrap samples of rows.

    Returns:
        The realised saving, the saving that the posterior expects, and the share of changed actions.

    Raises:
        ValueError: As `realised_cost`.

    Example:
        >>> point, mixture = np.log([[0.95, 0.05]] * 4), np.log([[0.7, 0.3]] * 4)
        >>> value = posterior_value(key, mixture, point, [0, 0, 1, 1], zero_one(2, review=0.2))
        >>> round(value.saving.value, 3), round(value.expected_saving, 3), value.changed
        (0.3, 0.1, 1.0)
    """
    saving = cost_difference(key, point, mixture, labels, costs, level=level, num_resamples=num_resamples)
    ours, theirs = decide(mixture, costs), decide(point, costs)
    by_action = np.exp(checked_log_probs(mixture)) @ costs.matrix
    expected = np.take_along_axis(by_action, theirs.actions[:, None], 1)[:, 0] - ours.expected
    return PosteriorValue(saving, float(expected.mean()), float((ours.actions != theirs.actions).mean()))


def _row_costs(prediction: LogProbs | Predicted, labels: Labels | Labelled, costs: Costs) -> np.ndarray:
    """Realised cost of each row."""
    log_probs, labels = checked(prediction, labels)
    return costs.matrix[labels, decide(log_probs, costs).actions]


def _mean(key: Array, values: np.ndarray, level: float, num_resamples: int) -> metrics.Estimate:
    def mean(rows: np.ndarray) -> float:
        return float(values[rows].mean())

    return metrics.bootstrap(key, mean, len(values), level=level, num_resamples=num_resamples)


def _check_price(review: float) -> None:
    if not 0 <= review <= 1:
        raise ValueError(f"the price of a review must lie in [0, 1], where an error costs 1; got {review}")
