r"""Start values of a guide at Laplace's Gaussian: the mean, and as much covariance as the guide can hold.

| parameter of the guide | starts at                                                        |
|------------------------|------------------------------------------------------------------|
| `loc`                  | the mean                                                         |
| `scale_tril`           | Cholesky root of the covariance of its vector                    |
| `scale`                | conditional standard deviations, which a mean-field law tends to |

A flow starts near the identity, so its base has `loc` and `scale`. The factor of a low-rank law starts where
the guide starts it.

Reference: Turner and Sahani (2011), Two problems with variational expectation maximisation, for the
conditional variances of mean-field laws.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora.checks import check_key
from bnlora.elbo import initial_parameters
from bnlora.guides import Guide
from bnlora.tangent.gaussian import Gaussian
from bnlora.typing import Parameters

MOST = 8_000
"""Coordinates up to which the whole covariance is formed."""


def start_at(key: Array, guide: Guide, gaussian: Gaussian) -> Parameters:
    """Start parameters for `bl.fit(..., start=...)`.

    Args:
        key: Random key of what the Gaussian does not determine, such as the weights of a flow.
        guide: A `Guide` of the same prior.
        gaussian: Laplace's Gaussian, from `bl.laplace`.

    Returns:
        Value of every parameter of guide and prior, by name.

    Raises:
        ValueError: When the guide has other sites than the Gaussian, or there are too many coordinates.

    Example:
        >>> guide = bl.guides.Guide(tangent.prior, bl.guides.full(over="all"))
        >>> start = bl.start_at(key, guide, bl.laplace(tangent, rows))
        >>> sorted(start)
        ['lm_head.U.q.loc', 'lm_head.U.q.scale_tril']
    """
    key = check_key(key)
    view, size = gaussian.view, len(gaussian.loc)
    wanted = {name: int(np.prod(shape)) for name, shape in view.shapes.items()}
    found = {name: int(np.prod(latent.shape)) for name, latent in guide.latent.items()}
    if list(found.items()) != list(wanted.items()):
        raise ValueError(
            f"the guide must have the sites of the Gaussian, {_listed(wanted)}; it has {_listed(found)}"
        )
    if size > MOST:
        raise ValueError(
            f"the covariance of {size:,} coordinates is too large; at most {MOST:,} are possible"
        )
    free, constrain = initial_parameters(key, gaussian.model, guide)
    values = constrain(free) | {n: value for n, value in view.params.items() if n in free}
    covariance = gaussian.covariance()
    conditional = 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
    for names, coordinates in _vectors(guide, view.shapes):
        _place(values, names, coordinates, gaussian.loc, covariance, conditional)
    return values


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {size:,}" for name, size in sizes.items())


def _vectors(guide: Guide, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, np.ndarray]]:
    """First site and coordinates of what the guide treats as one: all sites of a joint family, or one."""
    begin, at = 0, {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        at[name] = np.arange(begin, begin + count)
        begin += count
    found = []
    for family, names in guide.groups:
        together = [tuple(names)] if family.joint else [(name,) for name in names]
        found += [(group[0], np.concatenate([at[name] for name in group])) for group in together]
    return found


def _place(
    values: dict[str, Any],
    name: str,
    coordinates: np.ndarray,
    loc: np.ndarray,
    covariance: np.ndarray,
    conditional: np.ndarray,
) -> None:
    """Set the parameters of one vector, which may be cut into layers."""
    for suffix, source in (("loc", loc), ("scale", conditional)):
        key = f"{name}.q.{suffix}"
        if key in values and values[key].size == len(coordinates):
            values[key] = jnp.asarray(source[coordinates].reshape(values[key].shape), values[key].dtype)
    key = f"{name}.q.scale_tril"
    if key in values:
        size = values[key].shape[-1]
        blocks = coordinates.reshape(-1, size)
        roots = np.stack([np.linalg.cholesky(covariance[np.ix_(b, b)]) for b in blocks])
        values[key] = jnp.asarray(roots.reshape(values[key].shape), values[key].dtype)
