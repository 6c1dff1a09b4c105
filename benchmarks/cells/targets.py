"""The targets of the project, and whether the results of the grid reach them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from benchmarks.cells import paired
from benchmarks.cells.costs import relative_seconds
from benchmarks.cells.gathered import BASE, CAREFUL, LORA, Problem
from benchmarks.cells.judged import Judged
from benchmarks.cells.paired import DRAWS, FEW_DRAWS, LEVEL, MAJORITY, Comparison
from bnlora.metrics import Estimate

ECE_RATIO, NLL_SHARE, SECONDS_RATIO = 0.40, 2 / 3, 1.2
"""Goals: at most, at least, at most."""

ONE_POINT = 0.01
"""Accuracies within one point count as equal."""

DEFAULT = "core Gaussian"
"""The library's default, which is judged."""

PAPER = "paper: up to 84 % lower ECE"

CALIBRATION = "debiased ECE / LoRA's"
LIKELIHOOD = "cells with lower NLL than careful LoRA"
WORSE = "cells with significantly higher NLL than careful LoRA"
DETECTION = "AUROC by MI - LoRA's by entropy"
SELECTIVE = "accuracy at 80 % coverage - LoRA's"
SECONDS = "seconds to fit / LoRA's"

GOALS = {
    CALIBRATION: "at most 0.40, accuracy not more than 1 point lower",
    LIKELIHOOD: "at least 2/3",
    WORSE: "0",
    DETECTION: "interval above 0",
    SELECTIVE: "interval above 0",
    SECONDS: "at most 1.2",
}
"""Goal of each target in words."""


@dataclass(frozen=True)
class Target:
    """One target for one of our methods.

    Attributes:
        what: The target, one of `GOALS`.
        method: The method; empty if there is none.
        value: The value; empty without data.
        reached: Whether it is reached; None without data.
        about: What the value rests on.
    """

    what: str
    method: str
    value: str = ""
    reached: bool | None = None
    about: str = ""

    @property
    def verdict(self) -> str:
        """The result in words."""
        return {True: "reached", False: "missed", None: "no data"}[self.reached]


@dataclass(frozen=True)
class Gain:
    """Calibration of one of our methods and of LoRA, on rows where LoRA has learned the task.

    Attributes:
        problem: Task and size.
        set: Set of rows.
        method: Our method.
        seeds: Number of seeds that both have.
        ours: Mean debiased ECE of our method.
        lora: That of LoRA.
        plain: ECE of our method divided by that of LoRA, null level included.
        accuracy: Accuracy of our method minus that of LoRA.
    """

    problem: Problem
    set: str
    method: str
    seeds: int
    ours: float
    lora: float
    plain: float
    accuracy: float

    @property
    def ratio(self) -> float:
        """Ratio of the debiased errors; NaN if that of LoRA is not above zero."""
        return ratio(self.ours, self.lora)


@dataclass(frozen=True)
class Lead:
    """One of our methods minus LoRA on one set of rows.

    Attributes:
        what: `DETECTION` or `SELECTIVE`.
        problem: Task and size.
        set: Set of rows.
        method: Our method.
        seeds: Number of seeds that both have.
        point: The difference.
        draws: Its bootstrap draws.
    """

    what: str
    problem: Problem
    set: str
    method: str
    seeds: int
    point: float
    draws: Float[np.ndarray, " draws"]

    @property
    def estimate(self) -> Estimate:
        """The difference with its interval."""
        return paired.interval(self.point, self.draws)


def ratio(ours: float, theirs: float) -> float:
    """`ours / theirs`; an error below its null level counts as zero, and NaN without a positive `theirs`."""
    return max(ours, 0.0) / theirs if theirs > 0 else float("nan")


def cells(found: Sequence[object]) -> str:
    """A number of cells in words."""
    return "1 cell" if len(found) == 1 else f"{len(found)} cells"


def equal(accuracy: float) -> str:
    """Whether a difference of accuracy is within one point, in words."""
    if abs(accuracy) <= ONE_POINT:
        return "yes"
    return f"no, {100 * abs(accuracy):.1f} points {'higher' if accuracy > 0 else 'lower'}"


def learned(problem: Problem, name: str) -> bool:
    """Whether LoRA's accuracy beats those of the base and of the majority class.

    The lower end of the 95 % interval of both differences must be above zero. Without results of LoRA or of
    the base the answer is no.
    """
    _, hits = paired.nll_and_accuracy(problem, name, [LORA, BASE], DRAWS)
    for rival in (BASE, MAJORITY):
        gap = paired.difference(hits[LORA], hits[rival])
        if not gap or np.quantile(paired.seed_draws(gap, problem.shared(name)), LEVEL / 2) <= 0:
            return False
    return True


def gains(every: Sequence[Judged]) -> list[Gain]:
    """Calibration of our methods and of LoRA, for all sets on which LoRA has learned the task."""
    found = []
    for judged in every:
        problem = judged.problem
        for name in problem.sets:
            methods = [m for m in problem.ours if paired.seeds_with_classes(problem, name, m, LORA)]
            if methods and learned(problem, name):
                found += [_gain(judged, name, method) for method in methods]
    return found


def _gain(judged: Judged, name: str, method: str) -> Gain:
    seeds = paired.seeds_with_classes(judged.problem, name, method, LORA)

    def both(metric: str) -> tuple[float, float]:
        return judged.mean(name, method, metric, seeds), judged.mean(name, LORA, metric, seeds)

    (ours, lora), plain, accuracy = both("debiased ECE"), both("ECE"), both("ACC")
    difference = accuracy[0] - accuracy[1]
    return Gain(judged.problem, name, method, len(seeds), ours, lora, ratio(*plain), difference)


def leads(every: Sequence[Judged]) -> list[Lead]:
    """Differences of our methods from LoRA: detection of each shift, and selective accuracy on each set."""
    found = []
    for judged in every:
        for name in judged.problem.sets:
            found += _detection(judged, name) + _selective(judged, name)
    return found


def _detection(judged: Judged, name: str) -> list[Lead]:
    problem, first = judged.problem, judged.problem.sets[0]
    # A method with a single draw has no mutual information, and so no value here.
    ours = [m for m in problem.ours if not np.isnan(judged.mean(name, m, "AUROC MI"))]
    if name == first or not ours:
        return []
    doubts = {LORA: "entropy"} | dict.fromkeys(ours, "MI")
    sample = paired.auroc(problem, name, doubts, FEW_DRAWS)
    shared = problem.shared(first) | problem.shared(name)
    metrics = ("AUROC MI", "AUROC entropy")
    return _leads(DETECTION, judged, name, sample, metrics, shared)


def _selective(judged: Judged, name: str) -> list[Lead]:
    problem = judged.problem
    if not problem.ours:
        return []
    sample = paired.selective(problem, name, [LORA, *problem.ours], FEW_DRAWS)
    return _leads(SELECTIVE, judged, name, sample, ("ACC at 80 %",) * 2, problem.shared(name))


def _leads(
    what: str,
    judged: Judged,
    name: str,
    sample: paired.Replicates,
    metrics: tuple[str, str],
    shared: set[int],
) -> list[Lead]:
    found = []
    for method in [m for m in sample if m != LORA]:
        gap = paired.difference(sample[method], sample[LORA])
        if gap:
            ours, lora = (
                judged.mean(name, m, metric, list(gap))
                for m, metric in zip((method, LORA), metrics, strict=True)
            )
            draws = paired.seed_draws(gap, shared)
            found.append(Lead(what, judged.problem, name, method, len(gap), ours - lora, draws))
    return found


def targets(
    every: Sequence[Judged],
    comparisons: Sequence[Comparison],
    gained: Sequence[Gain],
    led: Sequence[Lead],
) -> list[Target]:
    """All targets for each of our methods; one line without data for each target if there is none."""
    methods = list(dict.fromkeys(m for judged in every for m in judged.problem.ours))
    careful = [c for c in comparisons if c.rival == CAREFUL]
    found = [_calibration(m, [g for g in gained if g.method == m]) for m in methods]
    found += [_likelihood(m, [c for c in careful if c.method == m]) for m in methods]
    found += [_worse(m, [c for c in careful if c.method == m]) for m in methods]
    for what in (DETECTION, SELECTIVE):
        found += [_lead(what, m, [x for x in led if (x.what, x.method) == (what, m)]) for m in methods]
    found += [_seconds(m, [judged.problem for judged in every]) for m in methods]
    return found or [Target(what, "") for what in GOALS]


def _calibration(method: str, gained: Sequence[Gain]) -> Target:
    lora = float(np.mean([g.lora for g in gained])) if gained else 0.0
    if lora <= 0:
        return Target(CALIBRATION, method, about=f"{cells(gained)} where {LORA!r} has learned the task")
    whole = ratio(float(np.mean([g.ours for g in gained])), lora)
    accuracy = float(np.mean([g.accuracy for g in gained]))
    best = min(gained, key=lambda g: (np.isnan(g.ratio), g.ratio))
    about = (
        f"{cells(gained)}; accuracy within 1 point: {equal(accuracy)}; best cell "
        f"{best.problem.title}, {best.set}: debiased ECE {100 * (1 - best.ratio):.0f} % lower, "
        f"ECE {100 * (1 - best.plain):.0f} % lower, accuracy within 1 point: {equal(best.accuracy)} ({PAPER})"
    )
    reached = whole <= ECE_RATIO and accuracy >= -ONE_POINT
    return Target(CALIBRATION, method, f"{whole:.2f}", reached, about)


def _likelihood(method: str, careful: Sequence[Comparison]) -> Target:
    if not careful:
        return Target(LIKELIHOOD, method)
    better = sum(c.nll.value < 0 for c in careful)
    share = better / len(careful)
    return Target(LIKELIHOOD, method, f"{share:.2f}", share >= NLL_SHARE, f"{better} of {cells(careful)}")


def _worse(method: str, careful: Sequence[Comparison]) -> Target:
    if not careful:
        return Target(WORSE, method)
    worse = [c for c in careful if c.nll.value > 0 and c.adjusted < LEVEL]
    where = "; ".join(f"{c.problem.title}, {c.set}" for c in worse)
    about = f"of {cells(careful)}{f': {where}' if where else ''}"
    return Target(WORSE, method, str(len(worse)), not worse, about)


def _lead(what: str, method: str, led: Sequence[Lead]) -> Target:
    """The mean over cells. Cells have the same draws of seeds and rows, so their covariance is kept."""
    if not led:
        return Target(what, method)
    point = float(np.mean([lead.point for lead in led]))
    mean = paired.interval(point, np.mean([lead.draws for lead in led], axis=0))
    value = f"{mean.value:+.3f} ({mean.low:+.3f} to {mean.high:+.3f})"
    return Target(what, method, value, mean.low > 0, f"mean of {cells(led)}")


def _seconds(method: str, problems: Sequence[Problem]) -> Target:
    ratios = np.array([relative_seconds(problem, method, "fit") for problem in problems])
    ratios = ratios[ratios > 0]  # NaN is left out too
    if not len(ratios):
        return Target(SECONDS, method)
    mean = float(np.exp(np.log(ratios).mean()))
    about = f"geometric mean of the ratios by task and size: {', '.join(f'{x:.2f}' for x in ratios)}"
    return Target(SECONDS, method, f"{mean:.2f}", mean <= SECONDS_RATIO, about)
