"""Where a posterior moved away from its prior: one cell for each module and layer."""

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
        "1 where the data said nothing, near 0 where they decided",
    ),
    "posterior_sd": ("posterior sd", "in the units of the adapters' entries"),
    "kl": ("KL(posterior || prior) in nats", "0 where the data said nothing"),
}


def posterior_spread(
    table: Mapping[str, Any], *, value: Spread = "ratio", factor: str = "update", ax: Axes | None = None
) -> Figure:
    """Heat map of the posterior's spread, a row for each module and a column for each layer.

    Args:
        table: Columns `module`, `layer` and the value, as the table of `diagnostics.shrinkage` or any data
            frame or mapping has them; the head stands in a column of its own.
        value: Which column is shown.
        factor: Which rows are shown of a table with a column `factor`: "update", "a" or "b".
        ax: Axes to draw on, without colour bar; a figure of its own when omitted.

    Returns:
        The figure.

    Raises:
        ValueError: When the table lacks a column, has two rows for one cell, or no finite value.

    Example:
        >>> table = {"module": ["q_proj", "q_proj"], "layer": [0, 1], "ratio": [0.9, 0.2]}
        >>> posterior_spread(table).axes[0].get_xlabel()
        'layer'
    """
    check_option("value", value, get_args(Spread))
    missing = [name for name in ("module", "layer", value) if name not in table]
    if missing:
        raise ValueError(f"the table needs the columns module, layer and {value}; it lacks {missing}")
    shown = [part == factor for part in table["factor"]] if "factor" in table else None
    named = (list(table[name]) for name in ("module", "layer", value))
    modules, columns, grid = _grid(*(x if shown is None else list(compress(x, shown)) for x in named))
    if not np.isfinite(grid).any():
        raise ValueError(f"expected a finite {value} in some row of the table; got none")
    width, height = max(1.6 + 0.42 * len(columns), 5.0), 0.34 * len(modules) + 0.9
    axes, figure, own = make_axes(ax, 1, width=width, height=height, columns=1)
    panel = axes[0]
    norm = Normalize(0, max(1.0, np.nanmax(grid)) if value == "ratio" else np.nanmax(grid) or 1.0)
    picture = panel.imshow(np.ma.masked_invalid(grid), cmap="cividis", norm=norm, aspect="auto")
    panel.set_facecolor("#e8e8e8")
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(modules)), modules)
    panel.set_xlabel("layer")
    panel.tick_params(length=0)
    _rule(panel, grid)
    for (row, column), number in np.ndenumerate(grid):
        if np.isfinite(number):
            letters = "white" if norm(number) < 0.55 else "black"
            panel.text(column, row, _short(number), ha="center", va="center", fontsize=7, color=letters)
    if own:
        name, meaning = _MEANING[value]
        figure.colorbar(picture, ax=panel, pad=0.02).set_label(name, fontsize=9)
        caption(figure, f"{name}, by module and layer: {meaning}. Grey: no adapter.")
    return figure


def _rule(panel: Axes, grid: np.ndarray) -> None:
    """White lines between the cells in place of a frame."""
    panel.set_xticks(np.arange(1, grid.shape[1]) - 0.5, minor=True)
    panel.set_yticks(np.arange(1, grid.shape[0]) - 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="minor", length=0)
    panel.spines[:].set_visible(False)


def _grid(modules: list, layers: list, values: list) -> tuple[list[str], list[str], np.ndarray]:
    """Names of rows and of columns, the head last, and the cells; NaN where there is none."""
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
    """At most four letters."""
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}".removeprefix("0")
