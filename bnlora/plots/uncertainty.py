"""What uncertainty is good for: refusing to answer, and noticing another domain."""

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
    """Error rate among the rows that are answered, against their share: a panel for each set of rows.

    Args:
        key: Random key of the bootstrap intervals of the areas.
        predictions: Prediction by method and set of rows, as `reliability` takes them; five methods at most.
        labels: True classes by set of rows.
        by: What orders the rows.
        ax: One axes for each set of rows; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When there are more methods than colours, the order is unknown, or labels do not fit.

    Example:
        >>> sure, right = np.array([0.9, 0.6, 0.8]), np.array([1, 0, 1])
        >>> found = Prediction(np.log([np.stack([1 - sure, sure], 1)]))
        >>> figure = risk_coverage(key, {"fit": {"films": found}}, {"films": right})
        >>> figure.axes[0].get_legend().get_title().get_text()
        'films'
    """
    key = check_key(key)
    check_option("by", by, get_args(Doubt))
    if len(predictions) > len(COLOURS):
        raise ValueError(f"at most {len(COLOURS)} methods have a colour; got {len(predictions)}")
    axes, figure, own = make_axes(ax, len(labels), width=3.9, height=3.4)
    for panel, (rows, truth) in zip(axes, labels.items(), strict=True):
        top = 0.0
        for (method, by_rows), colour in zip(predictions.items(), COLOURS, strict=False):
            found = curve(key, by_rows[rows], truth, by=by)
            panel.fill_between(found.coverage, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
            label = f"{method}: AURC {found.aurc}"
            panel.plot(found.coverage, found.risk, color=colour, linewidth=1.6, label=label)
            panel.plot([0, 1], [found.risk[-1]] * 2, color=colour, linewidth=1, linestyle=":")
            # A handful of rows has an interval of nearly everything, which would flatten the rest.
            top = max(top, found.high[found.coverage >= 0.1].max())
        panel.set(xlim=(0, 1), ylim=(0, min(1.1 * top, 1.0)))
        panel.set(xlabel="share of rows answered", ylabel="error rate among them")
        legend_above(panel, title=rows, ncols=1)
    if own:
        sizes = ", ".join(f"{len(truth)} of {rows}" for rows, truth in labels.items())
        caption(
            figure,
            f"Selective prediction: rows ordered by {_ORDER[by]} ({sizes}). Bands: pointwise 95 % Wilson "
            "intervals at a fixed threshold. Dotted: error rate without refusal, which an order at random "
            "would keep. AURC: area under the curve with its 95 % bootstrap interval; lower is better.",
        )
    return figure


def domains(
    predictions: Mapping[str, Prediction], *, inside: str | None = None, ax: Sequence[Axes] | None = None
) -> Figure:
    """Total entropy and mutual information of the rows of each domain.

    Args:
        predictions: Prediction by domain, all of one fit.
        inside: The domain that was trained on; the first when omitted.
        ax: Two axes to draw on; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When `inside` is no domain.

    Example:
        >>> random = np.random.default_rng(0)
        >>> margin = {"films": 3 + random.normal(size=(8, 20)), "tweets": random.normal(size=(8, 20))}
        >>> found = {d: Prediction(-np.logaddexp(0, np.stack([m, -m], -1))) for d, m in margin.items()}
        >>> [axes.get_xlabel() for axes in domains(found).axes]
        ['entropy (nats)', 'mutual information (nats)']
    """
    names = list(predictions)
    inside = names[0] if inside is None else inside
    check_option("inside", inside, names)
    axes, figure, own = make_axes(ax, 2, width=5.0, height=0.75 * len(names) + 0.5, columns=2)
    values = (
        {name: found.entropy for name, found in predictions.items()},
        {name: found.mutual_information for name, found in predictions.items()},
    )
    for panel, by_domain, what in zip(axes, values, ("entropy", "mutual information"), strict=True):
        _ridges(panel, by_domain, inside)
        panel.set_xlabel(f"{what} (nats)")
    most = np.log(next(iter(predictions.values())).log_probs.shape[1])
    axes[0].axvline(most, color=GREY, linewidth=1, linestyle="--")
    axes[0].set_xlim(0, 1.02 * most)
    if own:
        axes[1].set_yticklabels([])
        draws = len(predictions[inside].draw_log_probs)
        caption(
            figure,
            f"Uncertainty of each row by domain, {draws} posterior draws; blue: {inside}, in domain; orange: "
            "out of domain. Histograms, all of one height, with median, middle 50 % (thick), 90 % (thin). "
            "Left, all uncertainty, at most log(classes) (dashed); right, what more data would remove. "
            f"AUC: probability that a row of the domain is more uncertain than one of {inside}.",
        )
    return figure


def _ridges(panel: Axes, by_domain: Mapping[str, np.ndarray], inside: str) -> None:
    """A histogram for each domain, the first on top, over its median and intervals."""
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
    panel.locator_params(axis="x", nbins=5)  # small numbers have long names, which would run into each other
    panel.set(ylim=(-0.35, len(by_domain) - 0.2), xlim=(0, 1.02 * top))
