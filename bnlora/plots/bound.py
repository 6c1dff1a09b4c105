"""The bound of a fit and its terms over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from bnlora.infer.svi.fit import Fit
from bnlora.plots.base import BLUE, GREEN, ORANGE, make_axes

ELBO_CAPTION = (
    "Terms of the objective in nats over all training rows; pale: each step (one minibatch, one draw), full: "
    "mean of the last 15 steps, without those that were not finite."
)


def elbo(fits: Mapping[str, Fit], *, ax: Sequence[Axes] | None = None) -> Figure:
    """The bound of each fit and its terms over the steps, in nats over all training rows.

    Args:
        fits: Fit by name. Where a fit has no random variable, its bound is the log-likelihood alone.
        ax: Axes to draw on, three for each fit; a figure of its own when omitted.

    Returns:
        The figure.
    """
    if ax is not None:
        panels, figure, _ = make_axes(ax, 3 * len(fits))
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
        divergences.set(xticks=[], yticks=[])
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
