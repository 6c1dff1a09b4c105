"""Spread of the posterior relative to the prior: one cell for each module and layer."""

from collections.abc import Mapping
from itertools import compress
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from bnlora._util.checks import check_option
from bnlora.adapters.sites import HEAD
from bnlora.plots.base import caption, make_axes

Spread = Literal["ratio", "posterior_sd", "kl"]

_MEANING = {
    "ratio": (
        "posterior sd / prior sd",
        "1: the data are not informative; near 0: the data determine the update",
    ),
    "posterior_sd": ("posterior sd", "in units of the entries of the adapters"),
    "kl": ("KL(posterior || prior) in nats", "0: the data are not informative"),
}


def posterior_spread(
    table: Mapping[str, Any], *, value: Spread = "ratio", factor: str = "update", ax: Axes | None = None
) -> Figure:
    """Heat map of the posterior spread, one row for each module and one column for each layer.

    Args:
        table: Data frame or mapping with the columns `module`, `layer` and the value, for example the table
            of `diagnostics.shrinkage`. The head has a separate column of the heat map.
        value: Column to show.
        factor: If the table has a column `factor`: the rows to show, "update", "a" or "b".
        ax: Axes to draw on, without colour bar; a new figure by default.

    Returns:
        The figure.

    Raises:
        ValueError: If the table lacks a column, has two rows for one cell, or has no finite value.

    Example:
        >>> table = {"module": ["q_proj", "q_proj"], "layer": [0, 1], "ratio": [0.9, 0.2]}
        >>> posterior_spread(table).axes[0].get_xlabel()
        'layer'
    """
    check_option("value", value, get_args(Spread))
    missing = [name for name in ("module", "layer", value) if name not in table]
    if missing:
        raise ValueError(f"the table needs the columns module, layer and {value}; it lacks {missing}")
    mask = [part == factor for part in table["factor"]] if "factor" in table else None
    cells = (list(table[name]) for name in ("module", "layer", value))
    modules, columns, grid = _grid(*(x if mask is None else list(compress(x, mask)) for x in cells))
    if not np.isfinite(grid).any():
        raise ValueError(f"expected a finite {value} in some row of the table; got none")
    width, height = max(1.6 + 0.42 * len(columns), 5.0), 0.34 * len(modules) + 0.9
    axes, figure, is_new = make_axes(ax, 1, width=width, height=height, columns=1)
    panel = axes[0]
    norm = Normalize(0, max(1.0, np.nanmax(grid)) if value == "ratio" else np.nanmax(grid) or 1.0)
    image = panel.imshow(np.ma.masked_invalid(grid), cmap="cividis", norm=norm, aspect="auto")
    panel.set_facecolor("#e8e8e8")
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(modules)), modules)
    panel.set_xlabel("layer")
    panel.tick_params(length=0)
    _rule(panel, grid)
    for (row, column), number in np.ndenumerate(grid):
        if np.isfinite(number):
            letters = "white" if norm(number) < 0.55 else "black"  # contrast with the cell
            panel.text(column, row, _short(number), ha="center", va="center", fontsize=7, color=letters)
    if is_new:
        name, meaning = _MEANING[value]
        figure.colorbar(image, ax=panel, pad=0.02).set_label(name, fontsize=9)
        caption(figure, f"{name}, by module and layer: {meaning}. Grey: no adapter.")
    return figure


def _rule(panel: Axes, grid: np.ndarray) -> None:
    """Draw white lines between the cells and no frame."""
    panel.set_xticks(np.arange(1, grid.shape[1]) - 0.5, minor=True)
    panel.set_yticks(np.arange(1, grid.shape[0]) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="minor", length=0)
    panel.spines[:].set_visible(False)


def _grid(modules: list, layers: list, values: list) -> tuple[list[str], list[str], np.ndarray]:
    """Names of rows, names of columns with the head last, and the cells; NaN in empty cells."""
    rows = list(dict.fromkeys(map(str, modules)))
    places = ["head" if module == HEAD else int(layer) for module, layer in zip(modules, layers, strict=True)]
    numbers = sorted({place for place in places if place != "head"})
    columns = [*numbers, *(["head"] if "head" in places else [])]
    grid = np.full((len(rows), len(columns)), np.nan)
    for module, place, number in zip(modules, places, values, strict=True):
        cell = rows.index(str(module)), columns.index(place)
        if np.isfinite(grid[cell]):
            raise ValueError(f"expected one row for each module and layer; got two of {module!r}, {place}")
        grid[cell] = float(number)
    return rows, [str(place) for place in columns], grid


def _short(number: float) -> str:
    """The number in at most four characters."""
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}".removeprefix("0")
