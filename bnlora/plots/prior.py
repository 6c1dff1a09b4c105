"""Figure of the prior predictive distribution."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora.assess.prior_predictive import NEARLY_ALL, PriorPredictive
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, legend_above, make_axes


def prior_predictive(
    found: PriorPredictive, *, ax: Sequence[Axes] | None = None, max_rows: int = 40
) -> Figure:
    """Plot the prior predictive probabilities, to detect "confident nonsense" and "no change".

    Left: histogram of a probability over all draws and rows, with the histogram of the base model. Right:
    intervals of the probability over draws for each row, with the probability of the base model. With two
    classes it is the probability of class 1; with more classes, of the base model's top class in the row.

    Args:
        found: From `bnlora.assess.prior_predictive`.
        ax: Two axes to draw on; a new figure by default.
        max_rows: Largest number of rows on the right, evenly spaced in the order of the base model's
            probability.

    Returns:
        The figure.
    """
    axes, figure, is_new = make_axes(ax, 2, width=5.0, height=3.4, columns=2)
    classes = np.ones(len(found.base_logits), int)  # the class shown, shape (row,)
    if found.base_logits.shape[1] > 2:
        classes = found.base_logits.argmax(1)
    rows = np.arange(len(classes))
    draws, base = found.probs[:, rows, classes], found.base_probs[rows, classes]  # (draw, row) and (row,)
    what = "class 1" if found.base_logits.shape[1] == 2 else "the base model's class"
    _histogram(axes[0], draws, base, what)
    _ranges(axes[1], draws, base, what, max_rows)
    if is_new:
        figure.suptitle(fill(found.verdict, 100), fontsize=10)
        caption(
            figure,
            f"Prior predictive: probability of {what} under {len(draws)} draws of the prior for "
            f"{len(classes)} rows; no labels are used. Left: all draws and rows; mass in the grey edges "
            f"(more than {NEARLY_ALL:g} on one side) is unjustified certainty. Right: central 50 % and 90 % "
            "intervals over draws for each row; intervals from edge to edge are confident nonsense, and "
            "intervals no longer than the marks of the base model mean no change.",
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
    legend_above(axes)


def _ranges(axes: Axes, draws: np.ndarray, base: np.ndarray, what: str, max_rows: int) -> None:
    order = np.argsort(base, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(max_rows, len(order))).round().astype(int))]
    place = np.arange(len(order))
    for inner, width in ((0.9, 1.5), (0.5, 4.0)):
        low, high = np.quantile(draws[:, order], [(1 - inner) / 2, (1 + inner) / 2], axis=0)
        axes.vlines(place, low, high, color=BLUE, linewidth=width, label=f"{inner:.0%} of the draws")
    axes.plot(place, base[order], "o", color=ORANGE, markersize=4, label="base model")
    axes.set(
        ylim=(-0.02, 1.02),
        xlabel="rows, ordered by probability of the base model",
        ylabel=f"probability of {what}",
    )
    axes.set_xticks([])
    legend_above(axes)
