r"""Functions of the update that do not depend on how it was split into factors: norm, singular values, rank.

    dW = alpha / rank * B A,    |dW|_F = (sum_i s_i^2)^(1/2)
    erank = exp(- sum_i p_i log p_i),    p_i = s_i / sum_j s_j

with the singular values s of dW. (A, B) and (R A, B R^-1) are one update, so nothing else of the factors
can be learned from data. The effective rank lies between 1, one direction does everything, and the rank,
all do the same; it does not change with the size of the update.

Reference: Roy and Vetterli (2007), The effective rank: a measure of effective dimensionality.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bnlora.adapters.sites import HEAD, Sites


def singular_values(a: Float[Any, "... r d_in"], b: Float[Any, "... d_out r"]) -> Float[np.ndarray, "... r"]:
    """Singular values of `b @ a`, largest first, from the triangles of two thin QR factorisations.

    Where `d_out` or `d_in` is below the rank the values beyond it are exactly zero.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    inner = np.linalg.qr(b).R @ np.swapaxes(np.linalg.qr(np.swapaxes(a, -1, -2)).R, -1, -2)
    values = np.linalg.svd(inner, compute_uv=False)
    missing = a.shape[-2] - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def effective_rank(values: Float[np.ndarray, "... r"]) -> Float[np.ndarray, "..."]:
    """Exponential of the entropy of singular values as shares of their sum; zero where all are zero."""
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    shares = values / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0 * total[..., 0])  # NaN stays NaN


class Summaries(NamedTuple):
    """Draws of identifiable functions of the updates, with the names of their dimensions."""

    values: dict[str, np.ndarray]
    dims: dict[str, list[str]]
    coords: dict[str, list]


class Grid(NamedTuple):
    """Families whose updates form one array, and what its variables and dimensions are called.

    Attributes:
        families: Names of the families.
        layers: Indices of their layers; none for the head, which has no axis of layers.
        rank: Their rank.
        ending: What follows the names where there are several grids.
    """

    families: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    ending: str

    @property
    def variables(self) -> tuple[str, str]:
        """Names of the norm and of the singular values."""
        return f"update_norm{self.ending}", f"singular_value{self.ending}"

    @property
    def layer_name(self) -> str | None:
        """Name of the dimension of layers."""
        return f"layer{self.ending}" if self.layers else None

    @property
    def rank_name(self) -> str:
        """Name of the dimension of ranks."""
        return f"rank{self.ending}"

    @property
    def coords(self) -> dict[str, list]:
        """Dimensions with their coordinates, in the order of the axes."""
        ranks: dict[str, list] = {self.rank_name: list(range(1, self.rank + 1))}
        if self.layer_name is None:
            return ranks
        places: dict[str, list] = {f"module{self.ending}": list(self.families)}
        return places | {self.layer_name: list(self.layers)} | ranks


def grids(sites: Sites) -> tuple[Grid, ...]:
    """One grid of module, layer and rank where the families allow it.

    Families of other layers or another rank get one of their own, named after them; so does the head.
    """
    found: dict[tuple, list[str]] = {}
    for name, site in sites.items():
        found.setdefault((site.module == HEAD, site.layers, site.rank), []).append(name)
    several = sum(not head for head, *_ in found) > 1
    return tuple(
        Grid(tuple(names), () if head else layers, rank, f"_{'_'.join(names)}" if head or several else "")
        for (head, layers, rank), names in found.items()
    )


def summaries(sites: Sites, adapters: Any) -> Summaries:
    """Norms and singular values of the updates, in the arrays of `grids`."""
    found = Summaries({}, {}, {})
    for grid in grids(sites):
        pairs = [(abs(sites[name].scale), adapters[name]) for name in grid.families]
        values = np.stack([scale * singular_values(x["a"], x["b"]) for scale, x in pairs], 1)
        values = values if grid.layers else values[:, 0, 0]
        norm, singular = grid.variables
        *places, rank = grid.coords
        found.values.update({norm: np.sqrt((values**2).sum(-1)), singular: values})
        found.dims.update({norm: places, singular: [*places, rank]})
        found.coords.update(grid.coords)
    return found
