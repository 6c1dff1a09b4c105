"""The evidence lower bound of a fit and its terms over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from bnlora.infer.svi.fit import Fit
from bnlora.plots.base import BLUE, GREEN, ORANGE, make_axes

ELBO_CAPTION = (
    "Terms of the objective in nats, summed over all training rows. Pale: value of each step (one minibatch, "
    "one draw). Dark: mean of the finite values of the last 15 steps."
)


def elbo(fits: Mapping[str, Fit], *, ax: Sequence[Axes] | None = None) -> Figure:
    """Plot the bound of each fit and its terms over the steps, in nats summed over all training rows.

    Args:
        fits: Fit by name. The bound of a fit without random variables is the log-likelihood.
        ax: Axes to draw on, three for each fit; a new figure by default.

    Returns:
        The figure.
    """
    if ax is not None:
        panels, figure, _ = make_axes(ax, 3 * len(fits))
        for index, fit in enumerate(fits.values()):
            _terms(panels[3 * index : 3 * index + 3], fit)
        return figure
    figure = Figure(figsize=(10.5, 2.9 * len(fits)), layout="constrained")
    rows = figure.subfigures(len(fits), 1, squeeze=False)[:, 0]
    for row, (name, fit) in zip(rows, fits.items(), strict=True):
        row.suptitle(name, fontsize=10)
        _terms(row.subplots(1, 3), fit)
    return figure


def _terms(panels: Sequence[Axes], fit: Fit) -> None:
    """Draw bound, data term and KL divergences of a fit on three axes."""
    bound, data, divergences = panels
    _trace(bound, fit.history["elbo"], BLUE, "ELBO")
    _trace(data, fit.history["data"], BLUE, "training rows")
    steps = fit.validation["step"]
    if len(steps):
        # Scale from the mean over validation rows to the sum over as many rows as in training.
        log_likelihood = -len(fit.train) * fit.validation["nll"]
        data.plot(steps, log_likelihood, "o-", color=ORANGE, markersize=3, label="validation rows")
        data.legend(fontsize=8)
    for term, colour in (("inducing_kl", ORANGE), ("conditional_kl", GREEN)):
        if np.any(fit.history[term]):
            _trace(divergences, fit.history[term], colour, term.replace("_kl", " KL"))
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
    """Mean of the finite values of the last `window` steps, fewer at the start; NaN if none is finite."""
    # (step, window): NaN before the first step gives every step a full window.
    recent = sliding_window_view(np.concatenate([np.full(window, np.nan), values]), window)[1:]
    finite = np.isfinite(recent)
    count = finite.sum(1)
    return np.where(count > 0, recent.sum(1, where=finite) / np.maximum(count, 1), np.nan)
