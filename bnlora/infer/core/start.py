r"""Start values of a guide at Laplace's Gaussian: its mean, and its covariance as far as the guide allows.

| parameter of the guide            | starts at                                                        |
|-----------------------------------|------------------------------------------------------------------|
| `loc`                             | the mean                                                         |
| `scale_tril`                      | the Cholesky root of the covariance of its vector                |
| `row_tril`, `column_tril`         | the roots of the closest matrix normal                           |
| `scale` and `factor`              | the closest law of diagonal plus low rank                        |
| only `scale`                      | conditional standard deviations, the closest diagonal law        |

"Closest" is in the KL divergence that a variational fit minimises (`bnlora.infer.core.restricted`). So a fit
to a Gaussian posterior ends where it starts. A flow starts near the identity; its base has `loc` and `scale`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from bnlora._util.checks import check_key
from bnlora._util.typing import Parameters
from bnlora.guides import Guide
from bnlora.infer.core.gaussian import Gaussian
from bnlora.infer.core.restricted import diagonal, kronecker, low_rank
from bnlora.infer.svi.elbo import initial_parameters

MOST = 8_000
"""Largest number of coordinates for which the full covariance is formed."""


def start_at(key: Array, guide: Guide, gaussian: Gaussian) -> Parameters:
    """Start parameters of a guide, for `bl.fit(..., init_params=...)`.

    Args:
        key: Random key of values that the Gaussian does not determine, such as the weights of a flow.
        guide: A `Guide` of the same prior.
        gaussian: Laplace's Gaussian, from `bl.laplace`.

    Returns:
        Value of every parameter of guide and prior, by name.

    Raises:
        ValueError: If the guide and the Gaussian have different sites, or there are too many coordinates.

    Example:
        >>> guide = bl.guides.Guide(tangent.prior, bl.guides.full(over="all"))
        >>> start = bl.start_at(key, guide, bl.laplace(tangent, rows))
        >>> sorted(start)
        ['lm_head.U.q.loc', 'lm_head.U.q.scale_tril']
    """
    key = check_key(key)
    view, size = gaussian.view, len(gaussian.loc)
    expected = {name: int(np.prod(shape)) for name, shape in view.shapes.items()}
    actual = {name: int(np.prod(latent.shape)) for name, latent in guide.latent.items()}
    if list(actual.items()) != list(expected.items()):
        raise ValueError(
            f"the guide must have the sites of the Gaussian, {_listed(expected)}; it has {_listed(actual)}"
        )
    if size > MOST:
        raise ValueError(
            f"the covariance of {size:,} coordinates is too large; at most {MOST:,} are possible"
        )
    free, constrain = initial_parameters(key, gaussian.model, guide)
    values = constrain(free) | {n: value for n, value in view.params.items() if n in free}
    precision = np.linalg.inv(gaussian.covariance())
    for name, at in _vectors(guide, view.places):
        prefix = f"{name}.q."
        own = {key.removeprefix(prefix): x for key, x in values.items() if key.startswith(prefix)}
        # The closest law that factorises over vectors has the conditional covariance of each vector, which
        # is the inverse of its block of the precision.
        for suffix, value in _starts(own, gaussian.loc[at], precision[np.ix_(at, at)]).items():
            values[prefix + suffix] = jnp.asarray(value.reshape(own[suffix].shape), own[suffix].dtype)
    return values


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {size:,}" for name, size in sizes.items())


def _vectors(guide: Guide, places: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """First site and coordinates of every vector of the guide: all sites of a joint family, or one site."""
    vectors = []
    for family, names in guide.groups:
        together = [tuple(names)] if family.joint else [(name,) for name in names]
        vectors += [(group[0], np.concatenate([places[name] for name in group])) for group in together]
    return vectors


def _starts(own: Mapping[str, Array], loc: np.ndarray, precision: np.ndarray) -> dict[str, np.ndarray]:
    """Start values of the parameters of one vector, by name; parameters of other sizes are left out."""
    starts = {"loc": loc}
    if "scale_tril" in own:
        blocks = _blocks(precision, own["scale_tril"].shape[-1])
        starts["scale_tril"] = np.linalg.cholesky(np.linalg.inv(np.stack(blocks)))
    elif "factor" in own:
        size, rank = own["factor"].shape[-2:]
        pairs = [low_rank(P, rank) for P in _blocks(precision, size)]
        starts["scale"], starts["factor"] = map(np.stack, zip(*pairs, strict=True))
    elif "row_tril" in own:
        rows, cols = own["row_tril"].shape[-1], own["column_tril"].shape[-1]
        pairs = [kronecker(P, rows, cols) for P in _blocks(precision, rows * cols)]
        A, B = map(np.stack, zip(*pairs, strict=True))
        starts["row_tril"], starts["column_tril"] = np.linalg.cholesky(A), np.linalg.cholesky(B)
    else:
        starts["scale"] = diagonal(precision)
    return {name: x for name, x in starts.items() if name in own and own[name].size == x.size}


def _blocks(precision: np.ndarray, size: int) -> list[np.ndarray]:
    """The diagonal blocks of size `size`, one for each layer of a vector."""
    return [precision[i : i + size, i : i + size] for i in range(0, len(precision), size)]
