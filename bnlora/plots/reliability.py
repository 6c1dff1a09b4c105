"""Reliability diagrams: accuracy of predictions at each level of confidence."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora import metrics
from bnlora.plots.base import BLUE, GREY, make_axes
from bnlora.prediction.predict import Prediction

RELIABILITY_CAPTION = (
    "Reliability: accuracy against mean confidence in 15 bins of equal width, with 95 % Wilson intervals. "
    "Grey bars: share of the rows in each bin. Dashed: perfect calibration. Points below the dashed line are "
    "overconfident."
)


def reliability(
    predictions: Mapping[str, Mapping[str, Prediction]],
    labels: Mapping[str, Int[np.ndarray, " n"]],
    *,
    ax: Sequence[Axes] | None = None,
) -> Figure:
    """Plot reliability diagrams: one row of panels for each method, one column for each set of rows.

    Args:
        predictions: Prediction by method and set of rows.
        labels: True classes by set of rows.
        ax: Axes to draw on, shape (method, set of rows); a new figure by default.

    Returns:
        The figure.
    """
    height, width = len(predictions), len(labels)
    if ax is None:
        figure = Figure(figsize=(2.6 * width + 0.6, 2.7 * height + 0.5), layout="constrained")
        grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey=True)
        figure.supxlabel("confidence")
        figure.supylabel("accuracy")
    else:
        panels, figure, _ = make_axes(ax, height * width)
        grid = np.reshape(np.array(panels, object), (height, width))
    for row, (method, by_rows) in enumerate(predictions.items()):
        for column, (name, truth) in enumerate(labels.items()):
            axes = grid[row, column]
            _reliability(axes, by_rows[name], truth)
            error = metrics.ece(by_rows[name].log_probs, truth)
            axes.set_title(f"{method}, {name}\nECE {error:.3f}", fontsize=9)
            if ax is not None:
                axes.set(xlabel="confidence", ylabel="accuracy")
    return figure


def _reliability(axes: Axes, prediction: Prediction, labels: np.ndarray) -> None:
    curve = metrics.reliability(prediction, labels)
    lowest = 1 / prediction.log_probs.shape[1]  # lowest possible confidence
    axes.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, linestyle="--")
    axes.bar(
        curve.confidence, curve.count / curve.count.sum(), width=0.02, color=GREY, alpha=0.35, align="center"
    )
    errors = np.abs(np.stack([curve.low, curve.high]) - curve.accuracy)  # (lower and upper, bin)
    axes.errorbar(
        curve.confidence, curve.accuracy, yerr=errors, fmt="o", markersize=3.5, linewidth=1, color=BLUE
    )
    axes.set(xlim=(lowest - 0.02, 1.02), ylim=(0, 1.08))
