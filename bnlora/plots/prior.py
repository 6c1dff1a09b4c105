"""What a prior says before any fit."""

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
    """What a prior says before any fit: "confident nonsense" and "no change" at a glance.

    Left, a histogram of a probability over all draws and rows, beside that of the base model; right, its
    range over draws in each row, around the base model's. With two classes it is the probability of class 1,
    with more that of the class the base model prefers in the row.

    Args:
        found: From `bnlora.assess.prior_predictive`.
        ax: Two axes to draw on; a figure of its own when omitted.
        max_rows: Rows shown on the right, evenly taken in the order of the base model's probability.

    Returns:
        The figure.
    """
    axes, figure, own = make_axes(ax, 2, width=5.0, height=3.4, columns=2)
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
        caption(
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
        ylim=(-0.02, 1.02), xlabel="rows, by the base model's probability", ylabel=f"probability of {what}"
    )
    axes.set_xticks([])
    legend_above(axes)
