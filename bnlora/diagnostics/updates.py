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

from bnlora.sites import HEAD, Sites


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
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


class Summaries(NamedTuple):
    """Draws of identifiable functions of the updates, with the names of their dimensions."""

    values: dict[str, np.ndarray]
    dims: dict[str, list[str]]
    coords: dict[str, list]


def summaries(sites: Sites, adapters: Any) -> Summaries:
    """Norms and singular values, on one grid of module, layer and rank where the families allow it.

    Families of other layers or another rank get variables and dimensions of their own, named after them; so
    does the head, which has no layer.
    """
    grids: dict[tuple, list[str]] = {}
    for name, site in sites.items():
        grids.setdefault((site.module == HEAD, site.layers, site.rank), []).append(name)
    several = sum(not head for head, *_ in grids) > 1
    found = Summaries({}, {}, {})
    for (head, layers, rank), names in grids.items():
        pairs = [adapters[name] for name in names]
        scales = [abs(sites[name].scale) for name in names]
        grid = np.stack([c * singular_values(x["a"], x["b"]) for c, x in zip(scales, pairs, strict=True)], 1)
        own = f"_{'_'.join(names)}" if head or several else ""
        dims = [] if head else [f"module{own}", f"layer{own}"]
        grid = grid[:, 0, 0] if head else grid
        found.values.update({f"update_norm{own}": np.sqrt((grid**2).sum(-1)), f"singular_value{own}": grid})
        found.dims.update({f"update_norm{own}": dims, f"singular_value{own}": [*dims, f"rank{own}"]})
        found.coords.update(dict(zip(dims, (names, list(layers)), strict=False)))
        found.coords[f"rank{own}"] = list(range(1, rank + 1))
    return found
