"""The tables of the report, for Markdown and HTML."""

from collections.abc import Sequence

import numpy as np

from benchmarks.cells.costs import fit_seconds, mean_of, relative_seconds
from benchmarks.cells.gathered import CAREFUL, LORA, Problem
from benchmarks.cells.judged import COLUMNS, Judged
from benchmarks.cells.paired import Comparison
from benchmarks.cells.targets import DEFAULT, GOALS, Gain, Lead, Target, equal
from bnlora._util.display import Table
from bnlora.metrics import Estimate

MEBIBYTE = 2**20


def number(value: float, form: str = ".3f") -> str:
    """A number as text; empty if it is unknown."""
    return "" if np.isnan(value) else f"{value:{form}}"


def gap(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def overview(problems: Sequence[Problem]) -> Table:
    """What the report has: a row for each task and size."""
    rows = []
    for problem in problems:
        cells = sum(map(len, problem.results.values()))
        seeds = {seed for by in problem.results.values() for seed in by}
        rows.append(
            (problem.task, f"{problem.size:,}", ", ".join(problem.sets), str(len(problem.methods)),
             str(len(seeds)), str(cells))
        )  # fmt: skip
    header = ("task", "labelled rows", "sets, the first in domain", "methods", "seeds", "cells")
    return Table("Results", header, tuple(rows), texts=frozenset({2}))


def metrics(judged: Judged) -> Table:
    """Means over seeds: a row for each set and method."""
    problem, groups = judged.problem, []
    rows: list[tuple[str, ...]] = []
    for name in problem.sets:
        groups.append(len(rows))
        for method in problem.methods:
            seeds = problem.seeds(name, method)
            if seeds:
                values = (number(judged.mean(name, method, metric)) for metric in COLUMNS)
                rows.append((name, method, str(len(seeds)), *values))
    header = ("set", "method", "seeds", *COLUMNS)
    return Table(problem.title, header, tuple(rows), frozenset(groups[1:]), frozenset({1}))


def costs(problem: Problem) -> Table:
    """Seconds, parameters and memory by method, means over seeds."""
    rows = []
    for method in problem.methods:
        fit, predict = (relative_seconds(problem, method, part) for part in ("fit", "predict"))
        rows.append(
            (
                method,
                str(len(problem.results[method])),
                number(fit_seconds(problem, method), ".1f"),
                number(fit, ".2f"),
                number(mean_of(problem, method, lambda result: result.seconds.get("predict")), ".1f"),
                number(predict, ".2f"),
                number(mean_of(problem, method, lambda result: result.parameters), ",.0f"),
                number(mean_of(problem, method, lambda result: result.peak_bytes / MEBIBYTE), ",.0f"),
            )
        )
    header = ("method", "seeds", "s to fit", "to fit / LoRA", "s to predict", "to predict / LoRA",
              "parameters", "peak MiB")  # fmt: skip
    return Table(f"{problem.title}: cost", header, tuple(rows))


def comparisons(found: Sequence[Comparison], title: str = "Paired differences") -> Table:
    """Our methods minus the rivals."""
    rows = [
        (
            *(c.problem.task, f"{c.problem.size:,}", c.set, f"{c.method} minus {c.rival}", str(c.seeds)),
            *(gap(c.nll), f"{c.p:.2g}", f"{c.adjusted:.2g}", gap(c.debiased), gap(c.accuracy)),
        )
        for c in found
    ]
    header = ("task", "rows", "set", "difference (95 % interval)", "seeds", "NLL", "p of NLL", "p, Holm",
              "debiased ECE", "ACC")  # fmt: skip
    return Table(title, header, tuple(rows), texts=frozenset({2, 3}))


def gains(found: Sequence[Gain]) -> Table:
    """Debiased ECE of our methods and of LoRA, where LoRA has learned the task."""
    rows = [
        (
            *(g.problem.task, f"{g.problem.size:,}", g.set, g.method, str(g.seeds)),
            *(number(g.ours), number(g.lora), number(g.ratio, ".2f"), number(g.plain, ".2f")),
            *(f"{g.accuracy:+.3f}", equal(g.accuracy)),
        )
        for g in found
    ]
    header = ("task", "rows", "set", "method", "seeds", "debiased ECE", "LoRA's", "ratio", "ratio of ECE",
              "ACC - LoRA's", "within 1 point")  # fmt: skip
    return Table("Calibration where LoRA has learned the task", header, tuple(rows), texts=frozenset({2, 3}))


def leads(found: Sequence[Lead]) -> Table:
    """Detection of shifted rows and selective accuracy, ours minus LoRA's."""
    rows = [
        (
            *(x.what, x.problem.task, f"{x.problem.size:,}", x.set, x.method, str(x.seeds)),
            gap(x.estimate),
        )
        for x in found
    ]
    header = ("measure", "task", "rows", "set", "method", "seeds", "difference (95 % interval)")
    return Table("Detection and selective accuracy", header, tuple(rows), texts=frozenset({1, 3, 4}))


def targets(found: Sequence[Target]) -> Table:
    """A row for each target: the value and the verdict of each method, and what the default's rests on."""
    methods = sorted({t.method for t in found}, key=lambda name: (name != DEFAULT, name))
    by = {(t.what, t.method): t for t in found}
    rows = []
    for what, goal in GOALS.items():
        first, *others = (by[what, method] for method in methods)
        cells = [f"{t.value}: {t.verdict}" if t.value else t.verdict for t in (first, *others)]
        rows.append((what, goal, *cells, first.about))
    header = ("target", "goal", *(name or "no method" for name in methods), "about the first method")
    return Table("Targets", header, tuple(rows), texts=frozenset(range(1, len(header))))


SEEDS = 5
"""Seeds that the protocol requires of every method."""


def provisional(problems: Sequence[Problem]) -> str:
    """Which methods have fewer seeds than the protocol requires; empty if none has."""
    few = [
        f"{one.title} ({', '.join(names)})"
        for one in problems
        if (names := [name for name, seeds in one.results.items() if len(seeds) < SEEDS])
    ]
    if not few:
        return ""
    return (
        f"**Provisional**: the protocol requires {SEEDS} seeds of every method; fewer have {'; '.join(few)}."
    )


NOTES = {
    "metrics": "Means over the seeds that each method has. AUROC and AUPR are about telling rows of the set "
    "(positive) from rows in domain; the AUPR depends on the numbers of rows. ACC at 80 %: accuracy of the "
    "80 % of the rows with the highest confidence.",
    "costs": f"Seconds are divided by those of {LORA!r}, over the seeds that both ran on the same machine. "
    "The cell is empty where there is none.",
    "paired": "Intervals and p-values are by bootstrap over the common seeds and the rows. From few seeds "
    "they are too optimistic: where seeds differ more than rows do, five seeds of one sign give the smallest "
    "p-value, which is chance up to one time in 16. One seed has the variance of the rows only.",
    "targets": f"LoRA is {LORA!r}, careful LoRA is {CAREFUL!r}. A cell is a task, a size and a set.",
    "gains": f"The accuracy of {LORA!r} beats those of the untouched base and of the majority class there: "
    "the lower ends of both 95 % intervals are above zero.",
}
"""Sentences below the tables."""
