"""Colours, axes and captions that all pictures share.

The colours are those of Okabe and Ito (2008), which people with any common colour vision tell apart.
"""

from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#000000")
"""Colours of several methods, in the order in which they are given out."""


def make_axes(
    ax: Any,
    count: int,
    *,
    width: float = 3.0,
    height: float = 2.5,
    columns: int = 3,
    share: Literal["all", "none"] = "none",
) -> tuple[list[Axes], Figure, bool]:
    """`count` axes, the figure they are on, and whether it was made here."""
    if ax is not None:
        given = list(np.ravel(np.asarray(ax, object)))
        if len(given) != count:
            raise ValueError(f"`ax` must hold {count} axes, one for each panel; got {len(given)}")
        return given, given[0].figure, False
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.0), height * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=share).ravel()
    for unused in grid[count:]:
        unused.remove()
    return list(grid[:count]), figure, True


def caption(figure: Figure, text: str) -> None:
    """Write what stands below the figure."""
    letters = int(figure.get_figwidth() * 16)  # at this size an inch holds about so many
    figure.supxlabel(fill(text, letters), x=0.01, ha="left", fontsize=8, color="#444444")


def legend_above(axes: Axes, **options: Any) -> Legend:
    """A legend in one line above the axes, with further options of matplotlib's."""
    options = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, **options}
    return axes.legend(fontsize=8, frameon=False, **options)
