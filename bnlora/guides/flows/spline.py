r"""Rational-quadratic spline coupling flows: one half of a vector transforms the other, then they swap.

With knots (x_k, y_k) and derivatives d_k > 0, w = x_{k+1} - x_k, h = y_{k+1} - y_k, s = h/w, t = (x - x_k)/w,
the spline in bin k is

    y     = y_k + h (s t^2 + d_k t (1-t)) / (s + (d_{k+1} + d_k - 2 s) t (1-t)),
    dy/dx = s^2 (d_{k+1} t^2 + 2 s t (1-t) + d_k (1-t)^2) / (s + (d_{k+1} + d_k - 2 s) t (1-t))^2,

which is increasing and once continuously differentiable. Outside [-bound, bound] it is the identity. A
coupling keeps half A and maps half B entry by entry, with knots from a network of x_A, so
log|det| = sum_B log dy/dx.

Reference: Gregory and Delbourgo (1982), Piecewise rational quadratic interpolation to monotonic data; Durkan
et al. (2019), Neural spline flows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_key
from bnlora.guides.flows.base import Flow, require_features, require_positive, standard_normals

BOUND = 5.0
"""Half-width of the interval in which a spline differs from the identity."""

MIN_SHARE = 1e-3
"""Smallest width and height of a bin as a share of the interval, so that no slope is 0 or infinite."""

MIN_DERIVATIVE = 1e-3
"""Smallest derivative at a knot."""

START = 3e-3
"""Scale of the network's outputs, which define the knots, at the start."""


class Coupling(NamedTuple):
    """Weights of the network of one coupling: from `a` entries through `h` hidden units to `b` splines.

    Each part is a weight and a bias: `(..., a, h)` and `(..., h)`, then `(..., h, b, 3 bins - 1)` and
    `(..., b, 3 bins - 1)`. Leading axes are batch axes.
    """

    first: tuple[Array, Array]
    last: tuple[Array, Array]


class Knots(NamedTuple):
    """Knots of monotone splines; each part has shape `(..., bins + 1)`."""

    x: Array
    y: Array
    derivative: Array


def near_identity(
    key: Array, *, batch: tuple[int, ...], features: int, hidden: int, bins: int = 8, couplings: int = 2
) -> tuple[Coupling, ...]:
    """Random weights of couplings whose splines are near the identity: |f(x) - x| < 0.05 for |x| < 3.

    A coupling that transforms b entries given a others has (a+1) h + (h+1) b (3 bins - 1) weights for each
    batch entry, with h hidden units. With c = d // 2 of d features, (a, b) alternates between (c, d-c) and
    (d-c, c). A single entry has nothing to condition on and always counts as (1, 1).

    Args:
        key: Random key.
        batch: Batch axes; each batch entry has its own networks.
        features: Entries of the vector.
        hidden: Width of the hidden layer.
        bins: Bins of each spline.
        couplings: Number of couplings; two couplings transform every entry once.

    Raises:
        ValueError: If a size is below one, or `bins` is so large that all bins have the smallest width.
    """
    key = check_key(key)
    require_positive(features=features, hidden=hidden, bins=bins, couplings=couplings)
    if bins * MIN_SHARE >= 1:
        raise ValueError(
            f"bins must be below {1 / MIN_SHARE:g}, where all have their least width; got {bins}"
        )
    sizes: list[tuple[int, ...]] = []
    for step in range(couplings):
        given, bent = (max(part.stop - part.start, 1) for part in roles(features, step))
        sizes += [(given, hidden), (hidden, bent, 3 * bins - 1)]
    weights = standard_normals(key, batch, sizes)

    def part(scale: float, weight: Array) -> tuple[Array, Array]:
        axis = len(batch)  # the input axis of the weight
        return scale * weight, jnp.zeros((*weight.shape[:axis], *weight.shape[axis + 1 :]), weight.dtype)

    pairs = zip(weights[::2], weights[1::2], strict=True)
    return tuple(Coupling(part(a.shape[-2] ** -0.5, a), part(START * hidden**-0.5, b)) for a, b in pairs)


def roles(features: int, step: int) -> tuple[slice, slice]:
    """The entries that a coupling conditions on and those that it transforms; they swap at each step."""
    first, second = slice(0, features // 2), slice(features // 2, features)
    # With one entry the first part is empty, so the roles never swap.
    return (first, second) if step % 2 == 0 or features == 1 else (second, first)


def knots(raw: Float[Array, "... p"], bound: float) -> Knots:
    """Knots from p = 3 bins - 1 unbounded numbers; zeros give the identity."""
    bins = (raw.shape[-1] + 1) // 3
    width, height, inner = jnp.split(raw, [bins, 2 * bins], axis=-1)

    def ends(part: Array) -> Array:
        share = MIN_SHARE + (1 - bins * MIN_SHARE) * jax.nn.softmax(part, axis=-1)
        inside = 2 * bound * jnp.cumsum(share[..., :-1], axis=-1) - bound
        # Set the ends exactly instead of summing: rounding would leave a gap to the identity outside.
        left, right = (jnp.full_like(share[..., :1], end) for end in (-bound, bound))
        return jnp.concatenate([left, inside, right], axis=-1)

    one = jnp.ones_like(raw[..., :1])
    unit = jnp.log(jnp.expm1(one - MIN_DERIVATIVE))  # softplus(unit) + MIN_DERIVATIVE = 1
    derivative = MIN_DERIVATIVE + jax.nn.softplus(inner + unit)
    return Knots(ends(width), ends(height), jnp.concatenate([one, derivative, one], axis=-1))


class _Bin(NamedTuple):
    """The bin of each value: left knot, width, height, and the derivatives at both ends."""

    x: Array
    y: Array
    width: Array
    height: Array
    left: Array
    right: Array


def _bin(value: Array, along: Array, table: Knots) -> _Bin:
    """The bin that contains the value; `along` is the knot coordinate (x or y) of the value."""
    index = jnp.sum(value[..., None] >= along[..., 1:-1], axis=-1, keepdims=True)

    ends = jnp.concatenate([index, index + 1], axis=-1)[..., None, :]
    both = jnp.take_along_axis(jnp.stack(table, axis=-2), ends, axis=-1)  # one gather for all parts
    x, y, derivative = (both[..., row, :] for row in range(3))
    return _Bin(
        x[..., 0],
        y[..., 0],
        x[..., 1] - x[..., 0],
        y[..., 1] - y[..., 0],
        derivative[..., 0],
        derivative[..., 1],
    )


def spline(x: Float[Array, "..."], table: Knots) -> tuple[Array, Array]:
    """Values and log-derivatives of splines, which are the identity outside the outer knots.

    Args:
        x: Points.
        table: One spline for every point; its parts have one axis more than `x`.

    Returns:
        Values and log-derivatives, both of the shape of `x`.
    """
    # Clip points outside first: the unused branch of `where` could otherwise make gradients NaN.
    inside = jnp.clip(x, table.x[..., 0], table.x[..., -1])
    b = _bin(inside, table.x, table)
    slope = b.height / b.width
    t = (inside - b.x) / b.width
    cross = t * (1 - t)
    below = slope + (b.right + b.left - 2 * slope) * cross
    y = b.y + b.height * (slope * t**2 + b.left * cross) / below
    top = b.right * t**2 + 2 * slope * cross + b.left * (1 - t) ** 2
    log_derivative = 2 * jnp.log(slope) + jnp.log(top) - 2 * jnp.log(below)
    return jnp.where(inside == x, y, x), jnp.where(inside == x, log_derivative, 0)


def spline_inverse(y: Float[Array, "..."], table: Knots) -> Float[Array, "..."]:
    """The points at which the splines have the values `y`, by the root of a quadratic in each bin."""
    inside = jnp.clip(y, table.y[..., 0], table.y[..., -1])
    b = _bin(inside, table.y, table)
    slope = b.height / b.width
    rise = inside - b.y
    # Solve (h s - linear) t^2 + linear t - s rise = 0, with the form of the root that avoids cancellation.
    linear = b.height * b.left - rise * (b.right + b.left - 2 * slope)
    square = linear**2 + 4 * (b.height * slope - linear) * slope * rise
    root = jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
    total = jnp.abs(linear) + root
    t = jnp.where(linear >= 0, 2 * slope * rise / total, total / (2 * (b.height * slope + jnp.abs(linear))))
    return jnp.where(inside == y, b.x + t * b.width, y)


class SplineCoupling(Flow):
    """Couplings by monotone splines on a vector event, alternating between its two halves.

    Args:
        nets: One network for each coupling, with the batch axes of the site first.
        features: Entries of the vector. The networks have the same shapes for one entry and for two.
        bound: Half-width of the interval in which the splines differ from the identity. This limits the
            family.

    Raises:
        ValueError: If `bound` is not positive or `features` is below one, or if called on a vector of another
            length.
    """

    def __init__(self, nets: tuple[Coupling, ...], features: int, bound: float = BOUND):
        require_positive(features=features)
        if not bound > 0:
            raise ValueError(f"bound must be positive; got {bound}")
        self.nets = tuple(Coupling(*net) for net in nets)
        self.features = features
        self.bound = bound

    def _steps(self, x: Array) -> list[tuple[Coupling, slice, slice]]:
        require_features(x, self.features)
        return [(net, *roles(self.features, step)) for step, net in enumerate(self.nets)]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """The image of `x` and the sum of the log-derivatives of all splines, in one pass."""
        total = jnp.zeros_like(x[..., 0])
        for net, given, bent in self._steps(x):
            y, log_derivative = spline(x[..., bent], _table(net, x[..., given], self.bound))
            x, total = _with(x, bent, y), total + log_derivative.sum(-1)
        return x, total

    def _inverse(self, y: Array) -> Array:
        for net, given, bent in reversed(self._steps(y)):
            y = _with(y, bent, spline_inverse(y[..., bent], _table(net, y[..., given], self.bound)))
        return y

    def tree_flatten(self):
        """The weights are leaves; the length of the vector and the bound are structure."""
        return (self.nets,), (("nets",), {"features": self.features, "bound": self.bound})


def _table(net: Coupling, given: Array, bound: float) -> Knots:
    """Knots for the transformed entries, computed from the entries of the other half."""
    if not given.shape[-1]:  # a single entry: its spline depends only on the weights
        given = jnp.zeros((*given.shape[:-1], 1), given.dtype)
    (first, bias), (last, last_bias) = net
    # tanh keeps the knots bounded for every value of the other half.
    hidden = jnp.tanh(jnp.einsum("...a,...ah->...h", given, first) + bias)
    return knots(jnp.einsum("...h,...hbp->...bp", hidden, last) + last_bias, bound)


def _with(x: Array, place: slice, part: Array) -> Array:
    return jnp.concatenate([x[..., : place.start], part, x[..., place.stop :]], axis=-1)
