"""Every picture of this library, and the one file that imports matplotlib.

Each function takes results, draws on given axes or on a figure of its own, and returns the figure. A figure
of its own carries a caption that stands alone, but for `reliability` and `elbo`, whose captions (constants
here) a page prints below them. Colours are those of Okabe and Ito (2008), which people with any common
colour vision tell apart.

Reference: Saeilynoja, Buerkner and Vehtari (2022), arXiv 2103.10522, for the difference of distribution
functions with simultaneous bands.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from bnlora import metrics
from bnlora.calibration import Calibration
from bnlora.predict import Prediction
from bnlora.prior_predictive import NEARLY_ALL, PriorPredictive
from bnlora.ranks import band
from bnlora.svi import Fit

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

RELIABILITY_CAPTION = (
    "Reliability: accuracy against mean confidence in 15 bins of equal width, with 95 % Wilson intervals; "
    "grey bars: share of the rows in each bin; dashed: perfect calibration. Points below the dashed line are "
    "too confident."
)

ELBO_CAPTION = (
    "Terms of the objective in nats over all training rows; pale: each step (one minibatch, one draw), full: "
    "mean of the last 15 steps, without those that were not finite."
)


def reliability(
    predictions: Mapping[str, Mapping[str, Prediction]],
    labels: Mapping[str, Int[np.ndarray, " n"]],
    *,
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Reliability diagrams: a row of panels for each method, a column for each set of rows.

    Args:
        predictions: Prediction by method and set of rows.
        labels: True classes by set of rows.
        ax: Axes to draw on, (method, set of rows); a figure of its own when omitted.
    """
    height, width = len(predictions), len(labels)
    if ax is None:
        figure = Figure(figsize=(2.6 * width + 0.6, 2.7 * height + 0.5), layout="constrained")
        grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True)
        figure.supxlabel("confidence")
        figure.supylabel("accuracy")
    else:
        given, figure, _ = _axes(ax, height * width)
        grid = np.reshape(np.array(given, object), (height, width))
    for row, (method, by_rows) in enumerate(predictions.items()):
        for column, (name, truth) in enumerate(labels.items()):
            axes = grid[row, column]
            _reliability(axes, by_rows[name], truth)
            axes.set_title(f"{method}\n{name}", fontsize=9)
    return figure


def _reliability(axes: Axes, prediction: Prediction, labels: np.ndarray) -> None:
    curve = metrics.reliability(prediction, labels)
    lowest = 1 / prediction.log_probs.shape[1]
    axes.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, linestyle="--")
    axes.bar(
        curve.confidence, curve.count / curve.count.sum(), width=0.02, color=GREY, alpha=0.35, align="center"
    )
    spread = np.abs(np.stack([curve.low, curve.high]) - curve.accuracy)
    axes.errorbar(
        curve.confidence, curve.accuracy, yerr=spread, fmt="o", markersize=3.5, linewidth=1, color=BLUE
    )
    axes.text(0.04, 0.93, f"ECE {metrics.ece(prediction.log_probs, labels):.3f}", transform=axes.transAxes)
    axes.set(xlim=(lowest - 0.02, 1.02), ylim=(0, 1.08))


def elbo(fits: Mapping[str, Fit], *, ax: Sequence[Axes] | None = None) -> Figure:
    """The bound of each fit and its terms over the steps, in nats over all training rows.

    Args:
        fits: Fit by name. Where a fit has no random variable, its bound is the log-likelihood alone.
        ax: Axes to draw on, three for each fit; a figure of its own when omitted.
    """
    if ax is not None:
        panels, figure, _ = _axes(ax, 3 * len(fits))
        for index, made in enumerate(fits.values()):
            _terms(panels[3 * index : 3 * index + 3], made)
        return figure
    figure = Figure(figsize=(10.5, 2.9 * len(fits)), layout="constrained")
    rows = figure.subfigures(len(fits), 1, squeeze=False)[:, 0]
    for row, (name, made) in zip(rows, fits.items(), strict=True):
        row.suptitle(name, fontsize=10)
        _terms(row.subplots(1, 3), made)
    return figure


def _terms(panels: Sequence[Axes], made: Fit) -> None:
    bound, data, divergences = panels
    _trace(bound, made.history["elbo"], BLUE, "ELBO")
    _trace(data, made.history["data"], BLUE, "training rows")
    looks = made.validation["step"]
    if len(looks):
        scaled = -len(made.train) * made.validation["nll"]  # as if there were as many rows
        data.plot(looks, scaled, "o-", color=ORANGE, markersize=3, label="validation rows")
        data.legend(fontsize=8)
    for term, colour in (("inducing_kl", ORANGE), ("conditional_kl", GREEN)):
        if np.any(made.history[term]):
            _trace(divergences, made.history[term], colour, term.replace("_kl", " KL"))
            divergences.set_yscale("log")
    if divergences.lines:
        divergences.legend(fontsize=8)
    else:
        divergences.text(0.5, 0.5, "no random variable", ha="center", transform=divergences.transAxes)
    for axes, title in zip(panels, ("ELBO", "data term", "KL divergences"), strict=True):
        axes.set(xlabel="step", ylabel="nats", title=title)


def _trace(axes: Axes, values: np.ndarray, colour: str, label: str) -> None:
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, _smooth(values), color=colour, label=label)


def _smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    """Mean of the finite ones of the last steps, fewer at the beginning; NaN where none is finite."""
    recent = sliding_window_view(np.concatenate([np.full(window, np.nan), values]), window)[1:]
    finite = np.isfinite(recent)
    count = finite.sum(1)
    return np.where(count > 0, recent.sum(1, where=finite) / np.maximum(count, 1), np.nan)


def prior_predictive(
    found: PriorPredictive, *, ax: Sequence[Axes] | None = None, max_rows: int = 40
) -> Figure:
    """What a prior says before any fit: "confident nonsense" and "no change" at a glance.

    Left, a histogram of a probability over all draws and rows, beside that of the base model; right, its
    range over draws in each row, around the base model's. With two classes it is the probability of class 1,
    with more that of the class the base model prefers in the row.

    Args:
        found: From `bnlora.prior_predictive`.
        ax: Two axes to draw on; a figure of its own when omitted.
        max_rows: Rows shown on the right, evenly taken in the order of the base model's probability.
    """
    axes, figure, own = _axes(ax, 2, width=5.0, height=3.4, columns=2)
    chosen = np.ones(len(found.base_logits), int)
    if found.base_logits.shape[1] > 2:
        chosen = found.base_logits.argmax(1)
    rows = np.arange(len(chosen))
    draws, base = found.probs[:, rows, chosen], found.base_probs[rows, chosen]
    what = "class 1" if found.base_logits.shape[1] == 2 else "the base model's class"
    _histogram(axes[0], draws, base, what)
    _ranges(axes[1], draws, base, what, max_rows)
    if own:
        figure.suptitle(fill(found.verdict, 100), fontsize=10)
        _caption(
            figure,
            f"Prior predictive: probability of {what} under {len(draws)} draws of the prior for "
            f"{len(chosen)} rows; no label has been seen. Left, all draws and rows together: mass in the "
            f"grey edges (more than {NEARLY_ALL:g} on one side) is certainty that nothing has earned. "
            "Right, the middle 50 % and 90 % of the draws in each row: bars from edge to edge are nonsense, "
            "bars no longer than the base model's marks change nothing.",
        )
    return figure


def _histogram(axes: Axes, draws: np.ndarray, base: np.ndarray, what: str) -> None:
    for edge in ((0, 1 - NEARLY_ALL), (NEARLY_ALL, 1)):
        axes.axvspan(*edge, color=GREY, alpha=0.35, linewidth=0)
    bins = list(np.linspace(0, 1, 26))
    share = np.full(draws.size, 1 / draws.size)
    axes.hist(draws.ravel(), bins, weights=share, color=BLUE, alpha=0.55, label="prior draws")
    share = np.full(base.size, 1 / base.size)
    axes.hist(base, bins, weights=share, histtype="step", color=ORANGE, linewidth=1.5, label="base model")
    axes.set(xlim=(-0.01, 1.01), xlabel=f"probability of {what}", ylabel="share")
    _legend_above(axes)


def _ranges(axes: Axes, draws: np.ndarray, base: np.ndarray, what: str, max_rows: int) -> None:
    order = np.argsort(base, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(max_rows, len(order))).round().astype(int))]
    place = np.arange(len(order))
    for inner, width in ((0.9, 1.5), (0.5, 4.0)):
        low, high = np.quantile(draws[:, order], [(1 - inner) / 2, (1 + inner) / 2], axis=0)
        axes.vlines(place, low, high, color=BLUE, linewidth=width, label=f"{inner:.0%} of the draws")
    axes.plot(place, base[order], "o", color=ORANGE, markersize=4, label="base model")
    axes.set(
        ylim=(-0.02, 1.02), xlabel="rows, by the base model's probability", ylabel=f"probability of {what}"
    )
    axes.set_xticks([])
    _legend_above(axes)


def sbc(result: Calibration, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Distribution function of the ranks minus that of uniform ones, a panel for each function.

    The bands are simultaneous over each curve and, by Bonferroni's rule, over the functions: exact inference
    keeps all curves inside with probability `1 - result.level`.

    Args:
        result: From `bnlora.sbc.run`.
        ax: One axes for each function; a figure of its own when omitted.
    """
    axes, figure, own = _axes(ax, len(result.names), share="all")
    total, draws = len(result.ranks), result.num_draws
    bounds = band(total, draws, level=1 - result.level / len(result.names))
    edges = np.concatenate([[0.0], bounds.z, [1.0]])
    points = np.round(edges * (draws + 1))
    for k, panel in enumerate(axes):
        difference = (result.ranks[:, k, None] < points).mean(0) - edges
        colour = BLUE if result.adjusted[k] >= result.level else ORANGE
        panel.fill_between(
            bounds.z, bounds.low - bounds.z, bounds.high - bounds.z, color=GREY, alpha=0.3, linewidth=0
        )
        panel.axhline(0, color=GREY, linewidth=1, linestyle="--")
        panel.plot(edges, difference, color=colour, linewidth=1.6)
        _name(panel, result.names[k], result.adjusted[k], result.directions[k])
        panel.set(xlim=(0, 1), xlabel="rank / (L + 1)", ylabel="ECDF - uniform")
    if own:
        _caption(
            figure,
            f"Simulation-based calibration, {_sizes(result)}: empirical distribution function of the ranks "
            f"of the truth minus the uniform one. Grey: {1 - result.level:.0%} band for all curves together; "
            "orange: uniform ranks are rejected. Up on the left and down on the right: draws too narrow; the "
            "reverse: too wide; below zero throughout: draws too low; above: too high. p: adjusted for the "
            "number of functions by Holm's rule, which may reject a curve that just keeps inside.",
        )
    return figure


def vsbc(result: Calibration, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Histogram of p = Pr_q(f < f(truth)) with its mirror image, a panel for each function.

    Dashed is the share of each bin under uniform ranks: p takes L + 1 values, equally many in each bin where
    the number of bins divides L + 1.

    Args:
        result: From `bnlora.sbc.run`.
        ax: One axes for each function; a figure of its own when omitted.
    """
    axes, figure, own = _axes(ax, len(result.names))
    bins, uniform = _bins(result.num_draws)
    for k, panel in enumerate(axes):
        p = result.probabilities[:, k]
        colour = BLUE if result.symmetry_adjusted[k] >= result.level else ORANGE
        share = np.full(len(p), 1 / len(p))
        panel.hist(p, bins=bins, weights=share, color=colour, alpha=0.55, label="p")
        panel.hist(1 - p, bins=bins, weights=share, histtype="step", color="black", label="1 - p")
        panel.plot(bins, uniform, color=GREY, linewidth=1, linestyle="--", drawstyle="steps", label="uniform")
        _name(panel, result.names[k], result.symmetry_adjusted[k], result.directions[k])
        panel.set(xlim=(0, 1), xlabel="p = Pr(draw < truth)", ylabel="share")
    if own:
        axes[0].legend(fontsize=8)
        _caption(
            figure,
            f"Variational simulation-based calibration, {_sizes(result)}: probability that a draw lies below "
            "the truth (filled) and its mirror image (outline). Unbiased draws have the two alike, orange "
            "where the test of symmetry rejects. Mass on the right: draws too low; a valley in the middle: "
            "too narrow; a hill: too wide. p in the titles: adjusted for the number of functions (Holm).",
        )
    return figure


def _bins(num_draws: int) -> tuple[list[float], np.ndarray]:
    """Edges of at most 16 bins of p, and the share of uniform ranks left of each edge, the first repeated."""
    values = num_draws + 1
    count = next(n for n in range(16, 0, -1) if values % n == 0)
    if count < min(5, values):
        count = 15  # odd, for no value of p, (2 r + 1) / (2 L + 2), lies on an edge then
    edges = np.linspace(0, 1, count + 1)
    share = np.histogram((np.arange(values) + 0.5) / values, edges)[0] / values
    return list(edges), np.concatenate([share[:1], share])


def _legend_above(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)


def _sizes(result: Calibration) -> str:
    failed = int(result.failed.sum())
    lost = f", {failed} more failed" if failed else ""
    return f"{len(result.ranks)} simulations{lost}, L = {result.num_draws} draws each"


def _name(panel: Axes, name: str, p_value: float, direction: str) -> None:
    shown = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.3g}"
    panel.set_title(f"{name}   {shown}\n{direction}", fontsize=9)


def _axes(
    ax: Any,
    count: int,
    *,
    width: float = 3.0,
    height: float = 2.5,
    columns: int = 3,
    share: Literal["all", "none"] = "none",
) -> tuple[list[Axes], Figure, bool]:
    """`count` axes, the figure they are on, and whether it was made here."""
    if ax is not None:
        given = list(np.ravel(np.asarray(ax, object)))
        if len(given) != count:
            raise ValueError(f"`ax` must hold {count} axes, one for each panel; got {len(given)}")
        return given, given[0].figure, False
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.0), height * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=share).ravel()
    for unused in grid[count:]:
        unused.remove()
    return list(grid[:count]), figure, True


def _caption(figure: Figure, text: str) -> None:
    letters = int(figure.get_figwidth() * 16)  # at this size an inch holds about so many
    figure.supxlabel(fill(text, letters), x=0.01, ha="left", fontsize=8, color="#444444")
