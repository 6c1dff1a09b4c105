"""Colours, axes and captions shared by all figures.

The colours are those of Okabe and Ito (2008), which are distinguishable with any common colour vision.
"""

from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#000000")
"""Colours of several methods, in the order of their use."""


def make_axes(
    ax: Any,
    count: int,
    *,
    width: float = 3.0,
    height: float = 2.5,
    columns: int = 3,
    share: Literal["all", "none"] = "none",
) -> tuple[list[Axes], Figure, bool]:
    """`count` axes, their figure, and whether this function created it."""
    if ax is not None:
        panels = list(np.ravel(np.asarray(ax, object)))
        if len(panels) != count:
            raise ValueError(f"`ax` must contain {count} axes, one for each panel; got {len(panels)}")
        return panels, panels[0].figure, False
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.0), height * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=share).ravel()
    for unused in grid[count:]:
        unused.remove()
    return list(grid[:count]), figure, True


def caption(figure: Figure, text: str) -> None:
    """Write a caption below the figure."""
    width = int(figure.get_figwidth() * 16)  # about 16 letters per inch at this font size
    figure.supxlabel(fill(text, width), x=0.01, ha="left", fontsize=8, color="#444444")


def legend_above(axes: Axes, **options: Any) -> Legend:
    """Add a legend in one line above the axes; `options` are those of matplotlib's `legend`."""
    options = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3, **options}
    return axes.legend(fontsize=8, frameon=False, **options)
