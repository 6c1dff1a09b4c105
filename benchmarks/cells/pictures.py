"""The pictures of the report: reliability, risk against coverage, NLL against seconds."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells.costs import fit_seconds
from benchmarks.cells.gathered import Problem
from benchmarks.cells.judged import Judged, labelled
from benchmarks.cells.paired import seeds_with_classes
from bnlora import metrics, plots
from bnlora.metrics.scores import confidences, is_correct
from bnlora.plots.base import COLOURS
from bnlora.prediction.predict import Prediction

LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
COLUMNS = 3


def pooled(
    problem: Problem, name: str, method: str
) -> tuple[Float[np.ndarray, "n c"], Int[np.ndarray, " n"]] | None:
    """Log-probabilities and labels of a set with the rows of all seeds; None without labelled rows."""
    seeds = seeds_with_classes(problem, name, method)
    parts = [labelled(problem.results[method][seed].predicted[name]) for seed in seeds]
    if not parts:
        return None
    log_probs, labels = zip(*parts, strict=True)
    return np.concatenate(log_probs), np.concatenate(labels)


def reliability(problem: Problem, name: str) -> Figure | None:
    """A reliability diagram for each method; None without labelled rows."""
    found = {method: rows for method in problem.methods if (rows := pooled(problem, name, method))}
    if not found:
        return None
    lines = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(2.7 * COLUMNS, 2.7 * lines), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    for panel in panels[len(found) :]:
        panel.remove()
    for panel, (method, (log_probs, labels)) in zip(panels, found.items(), strict=False):
        plots.reliability({method: {name: Prediction(log_probs[None])}}, {name: labels}, ax=[panel])
        # The caption of the figure names the set, so that the titles of the panels do not overlap.
        panel.set_title(f"{method}\nECE {metrics.ece(log_probs, labels):.3f}", fontsize=9)
    return figure


def risk_coverage(problem: Problem, name: str) -> Figure | None:
    """Error rate among the most confident rows against their share; None without labelled rows."""
    found = {method: rows for method in problem.methods if (rows := pooled(problem, name, method))}
    if not found:
        return None
    figure, panel = _with_legend()
    for method, (log_probs, labels) in found.items():
        risk = metrics.selective_risks(-confidences(log_probs), ~is_correct(log_probs, labels))
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        shown = coverage >= min(0.05, coverage[-1])  # few rows have a very uncertain error rate
        colour, line, _ = style(problem, method)
        panel.plot(coverage[shown], risk[shown], color=colour, linestyle=line, linewidth=1.4, label=method)
    panel.set(xlim=(0, 1), xlabel="share of rows answered", ylabel="error rate among them")
    panel.set_ylim(bottom=0)
    _legend(figure)
    return figure


def pareto(judged: Judged, name: str) -> Figure | None:
    """NLL against seconds to fit; None without a method that has both."""
    problem = judged.problem
    points = {m: (fit_seconds(problem, m), judged.mean(name, m, "NLL")) for m in problem.methods}
    points = {m: (x, y) for m, (x, y) in points.items() if x > 0 and np.isfinite(y)}  # NaN is left out
    if not points:
        return None
    figure, panel = _with_legend()
    for method, (x, y) in points.items():
        colour, _, marker = style(problem, method)
        panel.plot(x, y, color=colour, marker=marker, linestyle="none", markersize=7, label=method)
    best = front(list(points.values()))
    panel.step(*zip(*best, strict=True), where="post", color="#666666", linewidth=1, zorder=0)
    panel.set(xscale="log", xlabel="seconds to fit", ylabel="NLL (nats per row)")
    _legend(figure)
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in one number without losing in the other, by the first number."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def style(problem: Problem, method: str) -> tuple[str, str, str]:
    """Colour, line and marker of a method: colours first, then lines and markers."""
    at = problem.methods.index(method)
    turn = at // len(COLOURS) % len(LINES)
    return COLOURS[at % len(COLOURS)], LINES[turn], MARKERS[turn]


def _with_legend() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
