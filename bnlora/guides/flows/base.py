r"""What the flows of this library have in common: y = f(x) on the real arrays, with log|det f'| on the way.

A flow acts on the event axes of a NumPyro site; axes of its weights in front of a network's own are batch
axes (the layers of a family), each entry with a network of its own:

    log q(y) = log q_0(x) - log|det f'(x)|,        y = f(x).

Reference: Papamakarios et al. (2021), Normalizing flows for probabilistic modeling and inference.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ComposeTransform, Transform


class Flow(Transform):
    """A bijection of real arrays whose `call_with_intermediates` returns the image and the log-determinant.

    A member defines `call_with_intermediates`, `_inverse` and `tree_flatten`; the log-determinant has the
    shape of the batch. It is the mark by which the objective finds the part of a bound that flows cause.
    """

    event_dim: int = 1

    @property
    def domain(self) -> constraints.Constraint:
        """Real arrays with this many event axes."""
        return constraints.independent(constraints.real, self.event_dim)

    codomain = domain

    def __call__(self, x: Array) -> Array:
        """Map base to posterior space."""
        return self.call_with_intermediates(x)[0]

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Log-determinant at `x`, shape of the batch; free when the intermediates were kept."""
        if intermediates is not None:
            return intermediates
        return self.call_with_intermediates(x)[1]


def flow_log_determinant(transform: Transform, intermediates: Any) -> Float[Array, ""]:
    """Sum over the batch of the log-determinants of the flows in a transform, zero where there is none.

    Args:
        transform: Any NumPyro transform; flows inside a `ComposeTransform` count. An inverted flow keeps no
            log-determinant and does not.
        intermediates: What its `call_with_intermediates` returned beside the image.
    """
    if isinstance(transform, Flow):
        return jnp.sum(intermediates)
    if isinstance(transform, ComposeTransform):
        *inner, last = intermediates
        parts = zip(transform.parts, [*(kept for _, kept in inner), last], strict=True)
        return sum((flow_log_determinant(*part) for part in parts), start=jnp.zeros(()))
    return jnp.zeros(())


def standard_normals(key: Array, batch: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of standard normal entries, of these shapes behind the batch axes.

    They come from one draw: a generator apiece would take most of the time to compile.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (*batch, ends[-1])), ends[:-1], axis=-1)
    return [x.reshape(*batch, *shape) for x, shape in zip(parts, shapes, strict=True)]


def require_positive(**sizes: int) -> None:
    """Refuse a size that is no whole number of at least one.

    Raises:
        ValueError: Names the first such size.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"a flow needs a whole number of {name} of at least 1; got {name}={size!r}")


def require_features(x: Array, features: int) -> None:
    """Refuse an event whose last axis is not the one that a network was made for.

    Raises:
        ValueError: Names both lengths.
    """
    if x.shape[-1] != features:
        raise ValueError(f"this flow acts on {features} entries along the last axis; got shape {x.shape}")
