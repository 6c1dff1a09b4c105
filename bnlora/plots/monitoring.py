"""A monitored classifier over time: running accuracy, and the evidence of each test."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlora.assess.monitor import Monitor
from bnlora.assess.monitor.watch import TESTS
from bnlora.plots.base import BLUE, COLOURS, GREY, caption, legend_above, make_axes

_SHOWN = (-3.0, 5.0)  # range of the axis, in powers of ten around the alarm level


def monitoring(monitor: Monitor, *, ax: Sequence[Axes] | None = None) -> Figure:
    """Plot the running accuracy of a monitored classifier and the evidence of its tests.

    Args:
        monitor: The monitor; it needs at least one update.
        ax: Two axes to draw on; a new figure by default.

    Returns:
        The figure.

    Raises:
        ValueError: If the monitor has seen no rows.

    Example:
        >>> prediction = bl.Prediction(np.log(np.full((1, 40, 2), 0.5)))
        >>> monitor = bl.monitor.Monitor.start(key).update(prediction, np.arange(40) % 2)
        >>> [axes.get_xlabel() for axes in monitoring(monitor).axes]
        ['labelled rows', 'rows']
    """
    if not monitor.history:
        raise ValueError("the monitor has seen no rows; call monitor.update first")
    axes, figure, is_new = make_axes(ax, 2, width=5.0, height=3.2, columns=2)
    _accuracy(axes[0], monitor)
    _evidence(axes[1], monitor)
    if is_new:
        caption(
            figure,
            "Left: accuracy of the labelled rows so far with its confidence sequence, which holds at every "
            f"row together with probability {monitor.level:g} if accuracy is constant; dashed: the floor. "
            "Right: evidence of each test as a multiple of its alarm level, cut off above and below. Above "
            "the dashed line is an alarm; dotted: the first one. P(any false alarm, ever) is at most "
            f"{monitor.alpha:g}.",
        )
    return figure


def _accuracy(panel: Axes, monitor: Monitor) -> None:
    points = [point for point in monitor.history if point.accuracy is not None]
    panel.set(xlabel="labelled rows", ylabel="accuracy so far", ylim=(0, 1.02))
    if not points:
        panel.text(0.5, 0.5, "no labels", ha="center", transform=panel.transAxes)
        return
    rows = [point.labelled for point in points]
    mean, low, high = np.array([point.accuracy for point in points]).T
    panel.fill_between(rows, low, high, color=BLUE, alpha=0.2, linewidth=0)
    panel.plot(rows, mean, color=BLUE, linewidth=1.6, marker="." if len(rows) < 3 else None)
    if monitor.floor is not None:
        panel.axhline(monitor.floor, color=GREY, linewidth=1, linestyle="--")


def _evidence(panel: Axes, monitor: Monitor) -> None:
    rows = [point.rows for point in monitor.history]
    for test, colour in zip(TESTS, COLOURS, strict=False):
        if test not in monitor.watches:
            continue
        watch = monitor.watches[test]
        if not watch.evidence.num_rows:
            continue
        levels = np.array([point.log_evidence.get(test, 0.0) for point in monitor.history])
        levels = np.clip((levels - np.log(watch.threshold)) / np.log(10), *_SHOWN)
        marker = "." if len(rows) < 3 else None
        panel.plot(rows, levels, color=colour, linewidth=1.4, label=test, marker=marker)
        if watch.alert is not None:
            panel.axvline(watch.alert.row, color=colour, linewidth=1, linestyle=":")
    panel.axhline(0, color=GREY, linewidth=1, linestyle="--")
    panel.set(xlabel="rows", ylabel="log10 of evidence / alarm level")
    if panel.get_legend_handles_labels()[0]:
        legend_above(panel, ncols=2)
