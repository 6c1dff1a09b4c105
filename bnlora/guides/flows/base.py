r"""The common part of the flows: a bijection y = f(x) of real arrays that also returns log|det f'|.

A flow acts on the event axes of a NumPyro site. Leading axes of its weights are batch axes (the layers of a
family); each batch entry has its own network:

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

    A subclass defines `call_with_intermediates`, `_inverse` and `tree_flatten`. The log-determinant has the
    shape of the batch. The objective uses this class to identify the contribution of flows to a bound.
    """

    event_dim: int = 1

    @property
    def domain(self) -> constraints.Constraint:
        """Real arrays with `event_dim` event axes."""
        return constraints.independent(constraints.real, self.event_dim)

    codomain = domain

    def __call__(self, x: Array) -> Array:
        """Map from base space to posterior space."""
        return self.call_with_intermediates(x)[0]

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Log-determinant at `x`, shape of the batch; no cost if `intermediates` is passed."""
        if intermediates is not None:
            return intermediates
        return self.call_with_intermediates(x)[1]


def flow_log_determinant(transform: Transform, intermediates: Any) -> Float[Array, ""]:
    """Sum over the batch of the log-determinants of the flows in a transform; zero without a flow.

    Args:
        transform: Any NumPyro transform. Flows inside a `ComposeTransform` count. An inverted flow does not
            count, because it stores no log-determinant.
        intermediates: The intermediates that its `call_with_intermediates` returned.
    """
    if isinstance(transform, Flow):
        return jnp.sum(intermediates)
    if isinstance(transform, ComposeTransform):
        *inner, last = intermediates
        parts = zip(transform.parts, [*(kept for _, kept in inner), last], strict=True)
        return sum((flow_log_determinant(*part) for part in parts), start=jnp.zeros(()))
    return jnp.zeros(())


def standard_normals(key: Array, batch: tuple[int, ...], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of standard normal entries, with these shapes after the batch axes.

    All arrays come from one draw: separate generators would dominate the compile time.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = jnp.split(jax.random.normal(key, (*batch, ends[-1])), ends[:-1], axis=-1)
    return [x.reshape(*batch, *shape) for x, shape in zip(parts, shapes, strict=True)]


def require_positive(**sizes: int) -> None:
    """Check that every size is a whole number of at least one.

    Raises:
        ValueError: If one is not; the message names the first.
    """
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"a flow needs a whole number of {name} of at least 1; got {name}={size!r}")


def require_features(x: Array, features: int) -> None:
    """Check that the last axis of an event has the length of the network's input.

    Raises:
        ValueError: If it does not; the message names both lengths.
    """
    if x.shape[-1] != features:
        raise ValueError(f"this flow acts on {features} entries along the last axis; got shape {x.shape}")
