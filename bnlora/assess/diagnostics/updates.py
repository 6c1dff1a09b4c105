r"""Functions of the update that do not depend on its factorisation: norm, singular values, effective rank.

    dW = alpha / rank * B A,    |dW|_F = (sum_i s_i^2)^(1/2)
    erank = exp(- sum_i p_i log p_i),    p_i = s_i / sum_j s_j

with the singular values s of dW. (A, B) and (R A, B R^-1) are one update, so the data identify only functions
of the update. The effective rank is between 1 (one direction) and the rank (all directions are equal); it
does not depend on the size of the update.

Reference: Roy and Vetterli (2007), The effective rank: a measure of effective dimensionality.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from bnlora.adapters.sites import HEAD, Sites


def singular_values(a: Float[Any, "... r d_in"], b: Float[Any, "... d_out r"]) -> Float[np.ndarray, "... r"]:
    """Singular values of `b @ a`, largest first, from the triangles of two thin QR factorisations.

    If `d_out` or `d_in` is below the rank, the remaining values are exactly zero.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # b = Q R and a^T = P S give b a = Q (R S^T) P^T: the product of the triangles is only (r, r).
    inner = np.linalg.qr(b).R @ np.swapaxes(np.linalg.qr(np.swapaxes(a, -1, -2)).R, -1, -2)
    values = np.linalg.svd(inner, compute_uv=False)
    missing = a.shape[-2] - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def effective_rank(values: Float[np.ndarray, "... r"]) -> Float[np.ndarray, "..."]:
    """Exponential of the entropy of the singular values as shares of their sum; zero if all are zero."""
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    # Replace zeros before division and logarithm: 0 log 0 = 0.
    shares = values / np.where(total > 0, total, 1.0)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0 * total[..., 0])  # NaN stays NaN


class Summaries(NamedTuple):
    """Draws of identifiable functions of the updates, with dimensions and coordinates for ArviZ."""

    values: dict[str, np.ndarray]
    dims: dict[str, list[str]]
    coords: dict[str, list]


class Grid(NamedTuple):
    """Families whose updates form one array, with the names of its variables and dimensions.

    Attributes:
        families: Names of the families.
        layers: Indices of their layers; empty for the head, which has no layer axis.
        rank: Their rank.
        ending: Suffix of the names if there are several grids.
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
        """Name of the layer dimension; None for the head."""
        return f"layer{self.ending}" if self.layers else None

    @property
    def rank_name(self) -> str:
        """Name of the rank dimension."""
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
    """Group the families into grids of module, layer and rank.

    Families with the same layers and rank share a grid. If there are several grids, each is named after its
    families; so is that of the head.
    """
    groups: dict[tuple, list[str]] = {}
    for name, site in sites.items():
        groups.setdefault((site.module == HEAD, site.layers, site.rank), []).append(name)
    several = sum(not head for head, *_ in groups) > 1
    return tuple(
        Grid(tuple(names), () if head else layers, rank, f"_{'_'.join(names)}" if head or several else "")
        for (head, layers, rank), names in groups.items()
    )


def summaries(sites: Sites, adapters: Any) -> Summaries:
    """Norms and singular values of the updates, one array of each for every grid of `grids`."""
    result = Summaries({}, {}, {})
    for grid in grids(sites):
        pairs = [(abs(sites[name].scale), adapters[name]) for name in grid.families]
        values = np.stack([scale * singular_values(x["a"], x["b"]) for scale, x in pairs], 1)
        values = values if grid.layers else values[:, 0, 0]
        norm, singular = grid.variables
        *places, rank = grid.coords
        result.values.update({norm: np.sqrt((values**2).sum(-1)), singular: values})
        result.dims.update({norm: places, singular: [*places, rank]})
        result.coords.update(grid.coords)
    return result
