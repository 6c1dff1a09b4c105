r"""Paired differences between methods, with a bootstrap over seeds and rows.

A bootstrap draw takes S of the S seeds and, under each, n of the n rows, with replacement. Both methods
get the same seeds and rows. If seeds have the same rows, all seeds of a draw get the same resampled rows:
a mean over seeds does not remove the variance of rows that they share. The two-sided p-value of B draws d_b:

    p = 2 (1 + min(#{d_b <= 0}, #{d_b >= 0})) / (B + 1),    at most 1,

so it is at least 2 / (B + 1). `draws_needed` makes B large enough for Holm's correction to reject at all.

Intervals and p-values from few seeds are too optimistic: the bootstrap over S seeds has only (S - 1)/S of
their variance, and with one seed none of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from benchmarks.cells import weighted
from benchmarks.cells.gathered import CAREFUL, LORA, Problem
from benchmarks.cells.judged import COVERAGE, Judged, doubt, labelled
from bnlora.metrics import Estimate
from bnlora.metrics.ranks import holm
from bnlora.metrics.scores import confidences, is_correct

RIVALS = (LORA, CAREFUL)
LEVEL = 0.05
DRAWS = 1000
"""Least number of draws for the differences of NLL and accuracy."""

FEW_DRAWS = 500
"""Draws for intervals of all other metrics, which take longer."""

MAJORITY = "majority class"
"""Always the most frequent class of the rows; it has an accuracy only."""

BySeed = Mapping[int, Float[np.ndarray, " draws"]]
Replicates = dict[str, dict[int, Float[np.ndarray, " draws"]]]
"""Values on resampled rows by method and seed."""

Rows = tuple[int, tuple[int, int]]
"""Number of rows, and their key for `weighted.counts`."""


@dataclass(frozen=True)
class Comparison:
    """A method minus a rival on one set of rows.

    Attributes:
        problem: Task and size.
        set: Set of rows.
        method: The method.
        rival: The rival.
        seeds: Number of seeds that both have.
        nll: Difference of NLL with its 95 % interval.
        debiased: Difference of debiased ECE.
        accuracy: Difference of accuracy.
        p: P-value of the difference of NLL.
        adjusted: The same after Holm's correction over all comparisons of the report.
    """

    problem: Problem
    set: str
    method: str
    rival: str
    seeds: int
    nll: Estimate
    debiased: Estimate
    accuracy: Estimate
    p: float
    adjusted: float = float("nan")


def draws_needed(comparisons: int) -> int:
    """Draws with which the smallest p-value is half of `LEVEL` after Holm's correction; at least `DRAWS`."""
    return max(DRAWS, int(np.ceil(4 * comparisons / LEVEL)))


def pairs(judged: Judged) -> list[tuple[str, str, str]]:
    """Set, method and rival of every comparison of a problem: labelled rows and a common seed are needed."""
    problem = judged.problem
    return [
        (name, method, rival)
        for name in problem.sets
        for method in problem.ours
        for rival in RIVALS
        if seeds_with_classes(problem, name, method, rival)
    ]


def seeds_with_classes(problem: Problem, name: str, *methods: str) -> list[int]:
    """Seeds of all these methods under which the set has rows with a class."""
    return [s for s in problem.seeds(name, *methods) if (problem.labels[name, s] >= 0).any()]


def compare(every: Sequence[Judged], draws: int | None = None) -> list[Comparison]:
    """Compare our methods with the rivals on every set of every problem.

    Args:
        every: The problems with their metrics.
        draws: Number of bootstrap draws for the p-values; `draws_needed` by default.

    Returns:
        The comparisons, in the order of `pairs`.
    """
    number = sum(len(pairs(judged)) for judged in every)
    draws = draws or draws_needed(number)
    found: list[Comparison] = []
    for judged in every:
        wanted = pairs(judged)
        for name in dict.fromkeys(name for name, *_ in wanted):
            rivals = [(method, rival) for of, method, rival in wanted if of == name]
            found += _compare_set(judged, name, rivals, draws)
    adjusted = holm(np.array([comparison.p for comparison in found]))
    return [replace(one, adjusted=float(p)) for one, p in zip(found, adjusted, strict=True)]


def _compare_set(
    judged: Judged, name: str, rivals: Sequence[tuple[str, str]], draws: int
) -> list[Comparison]:
    problem = judged.problem
    methods = list(dict.fromkeys(method for pair in rivals for method in pair))
    losses, hits = nll_and_accuracy(problem, name, methods, draws)
    errors, shared = ece(problem, name, methods, min(draws, FEW_DRAWS)), problem.shared(name)
    found = []
    for method, rival in rivals:
        seeds = seeds_with_classes(problem, name, method, rival)

        def point(metric: str, m: str = method, r: str = rival, of: Sequence[int] = tuple(seeds)) -> float:
            return judged.mean(name, m, metric, of) - judged.mean(name, r, metric, of)

        nll, accuracy, error = (
            seed_draws(difference(of[method], of[rival]), shared) for of in (losses, hits, errors)
        )
        found.append(
            Comparison(
                problem, name, method, rival, len(seeds),
                interval(point("NLL"), nll), shifted(point("debiased ECE"), error),
                interval(point("ACC"), accuracy), p_value(nll),
            )
        )  # fmt: skip
    return found


def difference(first: BySeed, second: BySeed) -> dict[int, Float[np.ndarray, " draws"]]:
    """First minus second on the same resampled rows, for the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def seed_draws(by_seed: BySeed, shared: set[int]) -> Float[np.ndarray, " draws"]:
    """Mean over resampled seeds of values on resampled rows.

    Args:
        by_seed: Values on resampled rows by seed, shape (draws,) each.
        shared: Seeds whose rows another seed has too. They use the same resampled rows in a draw; other seeds
            use resampled rows of their own each time they are taken.

    Returns:
        The means, shape (draws,).
    """
    seeds = sorted(by_seed)
    values = np.stack([by_seed[seed] for seed in seeds])
    draws = values.shape[1]
    random = np.random.default_rng(len(seeds))  # the same seeds in every problem, as with `counts`
    taken = random.integers(0, len(seeds), (draws, len(seeds)))
    own = random.integers(0, draws, (draws, len(seeds)))
    is_shared = np.array([seed in shared for seed in seeds])
    return values[taken, np.where(is_shared[taken], np.arange(draws)[:, None], own)].mean(1)


def interval(point: float, draws: Float[np.ndarray, " draws"]) -> Estimate:
    """A value with the percentile interval of its bootstrap draws."""
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2])
    return Estimate(point, float(low), float(high))


def shifted(point: float, draws: Float[np.ndarray, " draws"]) -> Estimate:
    """The same after a shift of the draws to the value: repeated rows increase a calibration error."""
    return interval(point, draws - draws.mean() + point)


def p_value(draws: Float[np.ndarray, " draws"]) -> float:
    """Two-sided p-value of a difference of zero, from bootstrap draws of the difference."""
    least = min((draws <= 0).sum(), (draws >= 0).sum())
    return float(min(1.0, 2 * (1 + least) / (len(draws) + 1)))


def nll_and_accuracy(
    problem: Problem, name: str, methods: Sequence[str], draws: int
) -> tuple[Replicates, Replicates]:
    """NLL, and accuracy with that of `MAJORITY`, on resampled rows."""
    losses: Replicates = {method: {} for method in methods}
    hits: Replicates = {method: {} for method in (*methods, MAJORITY)}
    for rows, members in _by_rows(problem, name, methods):
        columns, places = [], []
        for (method, seed), (log_probs, labels) in members.items():
            columns += [-log_probs[np.arange(len(labels)), labels], is_correct(log_probs, labels)]
            columns += [labels == np.bincount(labels).argmax()]
            places += [(losses[method], seed), (hits[method], seed), (hits[MAJORITY], seed)]
        values = np.stack(columns, axis=1).astype(np.float64)
        table = weighted.replicates(lambda w, v=values: weighted.mean(w, v), [rows], draws)
        for k, (by_seed, seed) in enumerate(places):
            by_seed[seed] = table[:, k]
    return losses, hits


def ece(problem: Problem, name: str, methods: Sequence[str], draws: int) -> Replicates:
    """ECE on resampled rows."""
    return _replicated(problem, name, methods, draws, weighted.ece)


def selective(problem: Problem, name: str, methods: Sequence[str], draws: int) -> Replicates:
    """Accuracy at the coverage `COVERAGE`, by confidence, on resampled rows."""

    def statistic(weights: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
        return weighted.selective_accuracy(weights, -confidence, correct, COVERAGE)

    return _replicated(problem, name, methods, draws, statistic)


def auroc(problem: Problem, name: str, by: Mapping[str, str], draws: int) -> Replicates:
    """AUROC of a shifted set on resampled rows, by method; `by` has the doubt of each method."""
    found: Replicates = {method: {} for method in by}
    first = problem.sets[0]
    for seed in sorted({seed for method in by for seed in problem.seeds(name, method)}):
        present = [method for method in by if seed in problem.seeds(name, method)]
        predicted = [problem.results[method][seed].predicted for method in present]
        doubts = [
            (doubt(of[first], by[method]), doubt(of[name], by[method]))
            for method, of in zip(present, predicted, strict=True)
        ]

        def every(inside: np.ndarray, outside: np.ndarray, of: Sequence = tuple(doubts)) -> np.ndarray:
            return np.stack([weighted.auroc(inside, outside, *one) for one in of], axis=1)

        rows = [_rows(problem, of, seed, len(problem.labels[of, seed])) for of in (first, name)]
        table = weighted.replicates(every, rows, draws)
        for k, method in enumerate(present):
            found[method][seed] = table[:, k]
    return found


def _replicated(
    problem: Problem, name: str, methods: Sequence[str], draws: int, statistic: Callable[..., np.ndarray]
) -> Replicates:
    """A statistic of weights, confidences and correctness on resampled rows."""
    found: Replicates = {method: {} for method in methods}
    for rows, members in _by_rows(problem, name, methods):
        inputs = [(confidences(log_probs), is_correct(log_probs, y)) for log_probs, y in members.values()]

        def every(weights: np.ndarray, of: Sequence = tuple(inputs)) -> np.ndarray:
            return np.stack([statistic(weights, *one) for one in of], axis=1)

        table = weighted.replicates(every, [rows], draws)
        for k, (method, seed) in enumerate(members):
            found[method][seed] = table[:, k]
    return found


def _by_rows(
    problem: Problem, name: str, methods: Sequence[str]
) -> Iterator[tuple[Rows, dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]]]:
    """Rows with a class, and their log-probabilities and labels by method and seed.

    Seeds with the same rows come together, so that their rows are resampled once.
    """
    found: dict[Rows, dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]] = {}
    for method in methods:
        for seed in seeds_with_classes(problem, name, method):
            kept = labelled(problem.results[method][seed].predicted[name])
            rows = _rows(problem, name, seed, len(kept[1]))
            found.setdefault(rows, {})[method, seed] = kept
    yield from found.items()


def _rows(problem: Problem, name: str, seed: int, size: int) -> Rows:
    """Number and key of rows: seeds with the same rows get the same key, and so do sizes of a task."""
    return size, (problem.sets.index(name), problem.groups(name)[seed])
