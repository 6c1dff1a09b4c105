"""Figures of uncertainty: selective prediction, and detection of other domains."""

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from jax import Array
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora._util.checks import check_key, check_option
from bnlora.plots.base import BLUE, COLOURS, GREY, ORANGE, caption, legend_above, make_axes
from bnlora.prediction.predict import Prediction
from bnlora.prediction.selective import Doubt, separation
from bnlora.prediction.selective import risk_coverage as curve

_ORDER = {
    "confidence": "confidence, highest first",
    "entropy": "entropy, lowest first",
    "mutual_information": "mutual information, lowest first",
}


def risk_coverage(
    key: Array,
    predictions: Mapping[str, Mapping[str, Prediction]],
    labels: Mapping[str, Int[np.ndarray, " n"]],
    *,
    by: Doubt = "confidence",
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Plot risk against coverage (error rate among answered rows, share answered), a panel per set of rows.

    Args:
        key: Random key of the bootstrap intervals of the areas.
        predictions: Prediction by method and set of rows, as in `reliability`; at most five methods.
        labels: True classes by set of rows.
        by: Measure that orders the rows.
        ax: One axes for each set of rows; a new figure by default.

    Returns:
        The figure.

    Raises:
        ValueError: If there are more methods than colours, the measure is unknown, or the labels do not match
            the predictions.

    Example:
        >>> probs, labels = np.array([0.9, 0.6, 0.8]), np.array([1, 0, 1])
        >>> prediction = Prediction(np.log([np.stack([1 - probs, probs], 1)]))
        >>> figure = risk_coverage(key, {"fit": {"films": prediction}}, {"films": labels})
        >>> figure.axes[0].get_legend().get_title().get_text()
        'films'
    """
    key = check_key(key)
    check_option("by", by, get_args(Doubt))
    if len(predictions) > len(COLOURS):
        raise ValueError(f"`predictions` must have at most {len(COLOURS)} methods; got {len(predictions)}")
    axes, figure, is_new = make_axes(ax, len(labels), width=3.9, height=3.4)
    for panel, (rows, truth) in zip(axes, labels.items(), strict=True):
        top = 0.0
        for (method, by_rows), colour in zip(predictions.items(), COLOURS, strict=False):
            risk = curve(key, by_rows[rows], truth, by=by)
            panel.fill_between(risk.coverage, risk.low, risk.high, color=colour, alpha=0.15, linewidth=0)
            label = f"{method}: AURC {risk.aurc}"
            panel.plot(risk.coverage, risk.risk, color=colour, linewidth=1.6, label=label)
            panel.plot([0, 1], [risk.risk[-1]] * 2, color=colour, linewidth=1, linestyle=":")
            # At low coverage few rows have very wide intervals: ignore these for the y axis.
            top = max(top, risk.high[risk.coverage >= 0.1].max())
        panel.set(xlim=(0, 1), ylim=(0, min(1.1 * top, 1.0)))
        panel.set(xlabel="share of rows answered", ylabel="error rate among them")
        legend_above(panel, title=rows, ncols=1)
    if is_new:
        sizes = ", ".join(f"{len(truth)} of {rows}" for rows, truth in labels.items())
        caption(
            figure,
            f"Risk against coverage: rows ordered by {_ORDER[by]} ({sizes}). Bands: pointwise 95 % Wilson "
            "intervals at a fixed threshold. Dotted: error rate if all rows are answered, the expected "
            "curve of a random order. AURC: area under the curve with its 95 % bootstrap interval; lower is "
            "better.",
        )
    return figure


def domains(
    predictions: Mapping[str, Prediction], *, inside: str | None = None, ax: Sequence[Axes] | None = None
) -> Figure:
    """Plot total entropy and mutual information of the rows of each domain.

    Args:
        predictions: Prediction by domain, all from the same fit.
        inside: The training domain; the first domain by default.
        ax: Two axes to draw on; a new figure by default.

    Returns:
        The figure.

    Raises:
        ValueError: If `inside` is not one of the domains.

    Example:
        >>> random = np.random.default_rng(0)
        >>> margin = {"films": 3 + random.normal(size=(8, 20)), "tweets": random.normal(size=(8, 20))}
        >>> rows = {d: Prediction(-np.logaddexp(0, np.stack([m, -m], -1))) for d, m in margin.items()}
        >>> [axes.get_xlabel() for axes in domains(rows).axes]
        ['entropy (nats)', 'mutual information (nats)']
    """
    names = list(predictions)
    inside = names[0] if inside is None else inside
    check_option("inside", inside, names)
    axes, figure, is_new = make_axes(ax, 2, width=5.0, height=0.75 * len(names) + 0.5, columns=2)
    values = (
        {name: prediction.entropy for name, prediction in predictions.items()},
        {name: prediction.mutual_information for name, prediction in predictions.items()},
    )
    for panel, by_domain, measure in zip(axes, values, ("entropy", "mutual information"), strict=True):
        _ridges(panel, by_domain, inside)
        panel.set_xlabel(f"{measure} (nats)")
    highest = np.log(next(iter(predictions.values())).log_probs.shape[1])  # entropy of equal probabilities
    axes[0].axvline(highest, color=GREY, linewidth=1, linestyle="--")
    axes[0].set_xlim(0, 1.02 * highest)
    if is_new:
        axes[1].set_yticklabels([])
        draws = len(predictions[inside].draw_log_probs)
        caption(
            figure,
            f"Uncertainty of each row by domain, {draws} posterior draws; blue: {inside}, in domain; orange: "
            "out of domain. Histograms scaled to equal height, with median and central 50 % (thick) and 90 % "
            "(thin) intervals. Left: total uncertainty, at most log(classes) (dashed). Right: the part that "
            "more data can reduce. AUC: probability that a row of the domain is more uncertain than one of "
            f"{inside}.",
        )
    return figure


def _ridges(panel: Axes, by_domain: Mapping[str, np.ndarray], inside: str) -> None:
    """Draw a histogram for each domain, the first on top, above its median and intervals."""
    top = max(values.max() for values in by_domain.values()) or 1.0
    edges = list(np.linspace(0, top, 31))
    places = np.arange(len(by_domain))[::-1]
    for place, (name, values) in zip(places, by_domain.items(), strict=True):
        colour = BLUE if name == inside else ORANGE
        count = np.histogram(values, edges)[0]
        heights = place + 0.7 * count / count.max()
        panel.stairs(heights, edges, baseline=place, fill=True, color=colour, alpha=0.4)
        for inner, width in ((0.9, 1.5), (0.5, 4.0)):
            low, high = np.quantile(values, [(1 - inner) / 2, (1 + inner) / 2])
            panel.hlines(place - 0.12, low, high, color=colour, linewidth=width)
        panel.plot(np.median(values), place - 0.12, "o", color=colour, markersize=5)
        if name != inside:
            area = f"AUC\n{separation(by_domain[inside], values):.2f}"
            beside = panel.get_yaxis_transform()
            panel.text(1.02, place, area, transform=beside, va="bottom", fontsize=8)
    panel.set_yticks(places, [f"{name}\n{len(values)} rows" for name, values in by_domain.items()])
    panel.tick_params(axis="y", labelsize=9)
    panel.locator_params(axis="x", nbins=5)  # labels of small numbers are long and would overlap
    panel.set(ylim=(-0.35, len(by_domain) - 0.2), xlim=(0, 1.02 * top))
