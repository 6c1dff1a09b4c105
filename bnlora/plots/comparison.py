"""Two posteriors side by side: intervals, pairs of functions, predictions, and ranks.

The approximation is orange and the reference blue wherever both are drawn.

Reference: Smirnov (1939), for the band of two empirical distribution functions.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import kstwobign

from bnlora.assess.comparison.report import Comparison
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, legend_above, make_axes


def forest(found: Comparison, *, ax: Axes | None = None) -> Figure:
    """Medians with the middle 50 % and 90 % of both posteriors, in units of the reference.

    Args:
        found: From `bnlora.compare`.
        ax: Axes to draw on; a figure of its own when omitted.

    Returns:
        The figure.
    """
    axes, figure, own = make_axes(ax, 1, width=7.0, height=0.4 * len(found.names) + 0.8, columns=1)
    panel = axes[0]
    center, unit = found.reference.mean, found.reference.sd
    place = np.arange(len(found.names))[::-1]
    sides = ((found.reference, BLUE, found.other, 0.15), (found.posterior, ORANGE, "approximation", -0.15))
    panel.axvline(0, color=GREY, linewidth=1, linestyle="--")
    for draws, colour, label, offset in sides:
        values = (draws.pooled - center) / unit
        for inner, width in ((0.9, 1.5), (0.5, 4.0)):
            low, high = np.quantile(values, [(1 - inner) / 2, (1 + inner) / 2], axis=0)
            panel.hlines(place + offset, low, high, color=colour, linewidth=width)
        panel.plot(np.median(values, axis=0), place + offset, "o", color=colour, markersize=5, label=label)
    panel.set_yticks(place, found.names)
    panel.set_ylim(-0.6, len(found.names) - 0.4)
    panel.set_xlabel(f"(value - mean of the {found.other}) / its standard deviation")
    legend_above(panel)
    if own:
        caption(
            figure,
            f"Functions under both posteriors: medians, middle 50 % (thick) and 90 % (thin). "
            f"Approximation: {found.posterior.describe}; {found.other}: {found.reference.describe}.",
        )
    return figure


def worst_pairs(found: Comparison, *, count: int = 3, ax: Sequence[Axes] | None = None) -> Figure:
    """Draws of both posteriors in the plane of each two of the functions that differ most.

    Which differ most is decided by Wasserstein-1 over its null level.

    Args:
        found: From `bnlora.compare`.
        count: Number of functions; each two of them make a panel.
        ax: One axes for each panel; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When there are fewer than two functions, or fewer are asked for.
    """
    if min(count, len(found.names)) < 2:
        raise ValueError(f"pairs need two functions; got count={count} of {len(found.names)}")
    excess = found.transport.marginal / np.maximum(found.transport.marginal_null, 1e-12)
    chosen = np.argsort(-excess, kind="stable")[:count]
    panels = list(combinations(chosen, 2))
    axes, figure, own = make_axes(ax, len(panels), width=3.3, height=3.1)
    size = min(len(found.posterior.pooled), len(found.reference.pooled), 500)
    sides = ((found.reference, BLUE, found.other), (found.posterior, ORANGE, "approximation"))
    for panel, (i, j) in zip(axes, panels, strict=True):
        for draws, colour, label in sides:
            values = draws.thinned(size)
            panel.plot(
                values[:, i], values[:, j], ".", color=colour, alpha=0.35, markersize=4, label=label, mew=0
            )
        panel.set(xlabel=found.names[i], ylabel=found.names[j])
    for handle in legend_above(axes[0], markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    if own:
        caption(
            figure,
            f"The {len(chosen)} functions that differ most (Wasserstein-1 over its null level), two by two; "
            f"{size} draws of each posterior, evenly spaced.",
        )
    return figure


def predictive_scatter(found: Comparison, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Probabilities and mutual information of each row, approximation against reference.

    Args:
        found: From `bnlora.compare`.
        ax: Two axes to draw on; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When no predictions were compared.
    """
    if found.predictive is None:
        raise ValueError("expected a comparison with predictions; this one has draws of functions alone")
    axes, figure, own = make_axes(ax, 2, width=3.9, height=3.5, columns=2)
    posterior, reference = found.predictive.posterior, found.predictive.reference
    classes = posterior.log_probs.shape[1]
    shown = slice(1, None) if classes == 2 else slice(None)
    x, y = (side.probs[:, shown].ravel() for side in (reference, posterior))
    errors = [2 * side.stderr[:, shown].ravel() for side in (reference, posterior)]
    axes[0].errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=ORANGE, markersize=4, linewidth=1)
    what = "probability of class 1" if classes == 2 else "probability of each class"
    axes[1].plot(reference.mutual_information, posterior.mutual_information, "o", color=ORANGE, markersize=4)
    top = 1.05 * max(reference.mutual_information.max(), posterior.mutual_information.max(), 1e-3)
    limits = ((-0.02, 1.02), (-0.02 * top, top))
    for panel, name, (low, high) in zip(axes, (what, "mutual information (nats)"), limits, strict=True):
        panel.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=0)
        panel.set(xlim=(low, high), ylim=(low, high), title=name, xlabel=found.other, ylabel="approximation")
    if own:
        caption(
            figure,
            f"Predictions for {len(posterior.log_probs)} rows by {len(posterior.draw_log_probs)} "
            "draws of each posterior; bars: two Monte Carlo standard errors. "
            "Right: what each does not know for want of data; below the dashed line the approximation is too "
            "sure of itself.",
        )
    return figure


def rank_difference(found: Comparison, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Ranks of the approximation's draws within the reference: distribution function minus the uniform one.

    Args:
        found: From `bnlora.compare`.
        ax: One axes for each function; a figure of its own when omitted.

    Returns:
        The figure.
    """
    axes, figure, own = make_axes(ax, len(found.names), share="all")
    size = min(found.posterior.independent_size, found.reference.independent_size)
    posterior, reference = found.posterior.thinned(size), found.reference.thinned(size)
    width = kstwobign.isf(found.level / len(found.names)) * (2 / size) ** 0.5
    z = np.arange(size + 1) / size
    for k, panel in enumerate(axes):
        # One panel is a probability plot: how many of each lie at or below every draw of the reference.
        below = np.searchsorted(np.sort(posterior[:, k]), np.sort(reference[:, k]), side="right") / size
        difference = np.concatenate([[0.0], below]) - z
        panel.axhspan(-width, width, color=GREY, alpha=0.3, linewidth=0)
        panel.axhline(0, color=GREY, linewidth=1, linestyle="--")
        colour = BLUE if np.abs(difference).max() <= width else ORANGE
        panel.plot(z, difference, color=colour, linewidth=1.6)
        panel.set_title(found.names[k], fontsize=9)
        panel.set(xlim=(0, 1), xlabel=f"rank in the {found.other}", ylabel="ECDF - uniform")
    if own:
        caption(
            figure,
            f"Ranks of {size} draws of the approximation within {size} of the {found.other}: empirical "
            "distribution function minus the uniform one. Grey: Smirnov's band, inside which equal "
            f"posteriors keep all curves with a probability of at least {1 - found.level:.0%}; orange: "
            "outside. Up on the left and down on the right: too wide; the reverse: too narrow; above zero "
            "throughout: too low.",
        )
    return figure
