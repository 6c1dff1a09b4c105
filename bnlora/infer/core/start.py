r"""Start values of a guide at Laplace's Gaussian: the mean, and as much covariance as the guide can hold.

| parameter of the guide            | starts at                                                        |
|-----------------------------------|------------------------------------------------------------------|
| `loc`                             | the mean                                                         |
| `scale_tril`                      | Cholesky root of the covariance of its vector                    |
| `row_tril`, `column_tril`         | roots of the closest matrix normal                               |
| `scale` and `factor`              | the closest law of diagonal plus low rank                        |
| `scale` alone                     | conditional standard deviations, the closest diagonal law        |

Closest is meant as a variational fit means it (`bnlora.infer.core.restricted`), so that these starts are
where fits on a Gaussian posterior end. A flow starts near the identity: its base has `loc` and `scale`.
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
"""Coordinates up to which the whole covariance is formed."""


def start_at(key: Array, guide: Guide, gaussian: Gaussian) -> Parameters:
    """Start parameters for `bl.fit(..., init_params=...)`.

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
    precision = np.linalg.inv(gaussian.covariance())
    for name, at in _vectors(guide, view.places):
        prefix = f"{name}.q."
        own = {key.removeprefix(prefix): x for key, x in values.items() if key.startswith(prefix)}
        # A law that factorises over vectors tends to the covariance given the others.
        for suffix, value in _starts(own, gaussian.loc[at], precision[np.ix_(at, at)]).items():
            values[prefix + suffix] = jnp.asarray(value.reshape(own[suffix].shape), own[suffix].dtype)
    return values


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} of {size:,}" for name, size in sizes.items())


def _vectors(guide: Guide, places: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """First site and coordinates of what the guide treats as one: all sites of a joint family, or one."""
    found = []
    for family, names in guide.groups:
        together = [tuple(names)] if family.joint else [(name,) for name in names]
        found += [(group[0], np.concatenate([places[name] for name in group])) for group in together]
    return found


def _starts(own: Mapping[str, Array], loc: np.ndarray, precision: np.ndarray) -> dict[str, np.ndarray]:
    """Start of the parameters of one vector by their names; those of other sizes are left as they are."""
    found = {"loc": loc}
    if "scale_tril" in own:
        blocks = _blocks(precision, own["scale_tril"].shape[-1])
        found["scale_tril"] = np.linalg.cholesky(np.linalg.inv(np.stack(blocks)))
    elif "factor" in own:
        size, rank = own["factor"].shape[-2:]
        pairs = [low_rank(P, rank) for P in _blocks(precision, size)]
        found["scale"], found["factor"] = map(np.stack, zip(*pairs, strict=True))
    elif "row_tril" in own:
        rows, cols = own["row_tril"].shape[-1], own["column_tril"].shape[-1]
        pairs = [kronecker(P, rows, cols) for P in _blocks(precision, rows * cols)]
        A, B = map(np.stack, zip(*pairs, strict=True))
        found["row_tril"], found["column_tril"] = np.linalg.cholesky(A), np.linalg.cholesky(B)
    else:
        found["scale"] = diagonal(precision)
    return {name: x for name, x in found.items() if name in own and own[name].size == x.size}


def _blocks(precision: np.ndarray, size: int) -> list[np.ndarray]:
    """The diagonal blocks of a given size: the layers of a vector that is cut into them."""
    return [precision[i : i + size, i : i + size] for i in range(0, len(precision), size)]
