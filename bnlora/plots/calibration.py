"""Figures of simulation-based calibration.

Reference for the difference of distribution functions with simultaneous bands: Saeilynoja, Buerkner and
Vehtari (2022), arXiv 2103.10522.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora.assess.sbc.calibration import Calibration
from bnlora.metrics.ranks import band
from bnlora.plots.base import BLUE, GREY, ORANGE, caption, make_axes


def sbc(result: Calibration, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Plot the distribution function of the ranks minus the uniform one, one panel for each function.

    The bands are simultaneous over each curve and, by the Bonferroni correction, over the functions: under
    exact inference all curves are inside with probability `1 - result.level`.

    Args:
        result: From `bnlora.assess.sbc.simulation.run`.
        ax: One axes for each function; a new figure by default.

    Returns:
        The figure.
    """
    axes, figure, is_new = make_axes(ax, len(result.names), share="all")
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
    if is_new:
        caption(
            figure,
            f"Simulation-based calibration, {_sizes(result)}: empirical distribution function of the ranks "
            f"of the truth minus the uniform one. Grey: {1 - result.level:.0%} band for all curves together. "
            "Orange: uniformity of the ranks is rejected. Positive on the left and negative on the right: "
            "draws too narrow; the reverse: too wide; negative throughout: draws too low; positive "
            "throughout: too high. p: adjusted for the number of functions (Holm); this test can reject a "
            "curve just inside the band.",
        )
    return figure


def vsbc(result: Calibration, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Plot a histogram of p = Pr_q(f < f(truth)) and its mirror image, one panel for each function.

    The dashed line is the share of each bin under uniform ranks. p has L + 1 possible values; each bin
    contains the same number of them if the number of bins divides L + 1.

    Args:
        result: From `bnlora.assess.sbc.simulation.run`.
        ax: One axes for each function; a new figure by default.

    Returns:
        The figure.
    """
    axes, figure, is_new = make_axes(ax, len(result.names))
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
    if is_new:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=3, frameon=False)
        caption(
            figure,
            f"Variational simulation-based calibration, {_sizes(result)}: probability that a draw is below "
            "the truth (filled) and its mirror image (outline). They are equal for unbiased draws. Orange: "
            "the test rejects symmetry. Mass on the right: draws too low; minimum in the middle: draws too "
            "narrow; maximum: too wide. p in the titles: adjusted for the number of functions (Holm).",
        )
    return figure


def _bins(num_draws: int) -> tuple[list[float], np.ndarray]:
    """Edges of at most 16 bins of p, and the share of each bin under uniform ranks, the first repeated."""
    values = num_draws + 1
    count = next(n for n in range(16, 0, -1) if values % n == 0)
    if count < min(5, values):
        count = 15  # with an odd number, no value of p, (2 r + 1) / (2 L + 2), is on an edge
    edges = np.linspace(0, 1, count + 1)
    share = np.histogram((np.arange(values) + 0.5) / values, edges)[0] / values
    return list(edges), np.concatenate([share[:1], share])


def _sizes(result: Calibration) -> str:
    failed = int(result.failed.sum())
    lost = f", {failed} more failed" if failed else ""
    return f"{len(result.ranks)} simulations{lost}, L = {result.num_draws} draws each"


def _name(panel: Axes, name: str, p_value: float, direction: str) -> None:
    shown = "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.3g}"
    panel.set_title(f"{name}   {shown}\n{direction}", fontsize=9)
