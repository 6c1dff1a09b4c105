r"""Block neural autoregressive flows: a network that is increasing in every entry.

    y_j = exp(c_j) x_j + g_j(x_j; x_<j),      dg_j/dx_j > 0,      log|det| = sum_j log(exp(c_j) + dg_j/dx_j),

where g is a network with one block of hidden units for each entry and tanh between its layers. Diagonal
blocks are exp(W) > 0, blocks below the diagonal are free, and blocks above are zero. The derivative dg_j/dx_j
is a product of diagonal blocks and tanh', computed in logarithms. tanh is bounded, so the linear term makes
the image all of R and gives a bracket for the inverse.

Reference: De Cao, Titov and Aziz (2020), Block neural autoregressive flow, arXiv 1904.04676. The linear term
with its own slope replaces their gated residual; it can also shrink without limit.
"""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp
from jaxtyping import Float

from bnlora._util.checks import check_key
from bnlora.guides.flows.base import Flow, require_features, require_positive, standard_normals

START = 0.02
"""Scale of the network's contribution g_j at the start."""

SPREAD = 2.0
"""At the start, the biases of an entry's units in the first layer are even from -SPREAD to SPREAD."""


class Dense(NamedTuple):
    """A masked layer from d blocks of `a` units to d blocks of `b` units.

    `own`, shape `(..., d, a, b)`, has the logarithms of the diagonal blocks. `across`, shape
    `(..., d, a, d, b)`, has the other blocks; only those from an entry to later entries are used. `bias` has
    shape `(..., d, b)`.
    """

    own: Array
    across: Array
    bias: Array


class BlockNet(NamedTuple):
    """Weights of a block network: the logarithms `c` of the linear slopes `(..., d)`, and the layers."""

    log_slope: Array
    layers: tuple[Dense, ...]


def near_identity(
    key: Array, *, batch: tuple[int, ...], features: int, hidden: int, depth: int = 1
) -> BlockNet:
    """Random weights of a flow near the identity: |f(x) - x| < 0.1 for |x| < 3.

    A batch entry has d + (d+1) d (2 h + (depth-1) h^2) + d (depth h + 1) weights. Of the weights in
    blocks, d (d+1)/2 (2 h + (depth-1) h^2) are used; the others lie above the diagonal.

    Args:
        key: Random key.
        batch: Batch axes; each batch entry has its own network.
        features: Entries d of the vector.
        hidden: Hidden units h for each entry, in each hidden layer.
        depth: Number of hidden layers.

    Raises:
        ValueError: If a size is below one.
    """
    key = check_key(key)
    require_positive(features=features, hidden=hidden, depth=depth)
    widths = [1, *[hidden] * depth, 1]
    shapes: list[tuple[int, ...]] = [(features, *pair) for pair in pairwise(widths)]
    shapes += [(features, a, features, b) for a, b in pairwise(widths)]
    normals = standard_normals(key, batch, shapes)
    layers = []
    for step, (own, across) in enumerate(zip(normals[: depth + 1], normals[depth + 1 :], strict=True)):
        units = own.shape[-2]
        size = START if step == depth else 1.0
        bias = jnp.zeros((*batch, features, own.shape[-1]), own.dtype)
        if step == 0 and hidden > 1:
            bias = bias + jnp.linspace(-SPREAD, SPREAD, hidden, dtype=own.dtype)
        mean = np.log(size / units).item()  # averages the units below, so the slope stays about one
        layers.append(Dense(mean + 0.1 * own, size * (units * features) ** -0.5 * across, bias))
    return BlockNet(jnp.zeros((*batch, features), layers[0].bias.dtype), tuple(layers))


def block_network(x: Float[Array, "... d"], net: BlockNet) -> tuple[Array, Array]:
    """Images of vectors and the logarithms of dy_j/dx_j, both of the shape of `x`."""
    later = np.triu(np.ones((x.shape[-1],) * 2, dtype=bool), 1)[:, None, :, None]
    h, log_derivative = x[..., None], jnp.zeros_like(x)[..., None]
    for step, (own, across, bias) in enumerate(net.layers):
        if step:
            # log tanh'(h) = 2 (log 2 - h - softplus(-2 h)); the form 1 - tanh^2 would round to zero.
            log_derivative = log_derivative + 2 * (np.log(2).item() - h - jax.nn.softplus(-2 * h))
            h = jnp.tanh(h)
        h = (
            jnp.einsum("...ja,...jab->...jb", h, jnp.exp(own))
            + jnp.einsum("...ia,...iajb->...jb", h, jnp.where(later, across, 0))
            + bias
        )
        # Chain rule in logarithms over the units of an entry: (..., d, a) and (..., d, a, b) to (..., d, b).
        log_derivative = logsumexp(log_derivative[..., None] + own, axis=-2)
    y = jnp.exp(net.log_slope) * x + h[..., 0]
    return y, jnp.logaddexp(net.log_slope, log_derivative[..., 0])


class BlockNeural(Flow):
    """A block neural autoregressive flow on a vector event.

    The inverse is numerical: bisection for one entry after another inside an exact bracket, then Newton
    corrections, which have the derivatives of the inverse. It takes 32 d passes in float32 and 61 d in
    float64, and serves checks and densities at other points. A fit only needs the density of its own draws,
    which takes one pass. The bracket grows as exp(-log_slope), so the inverse is precise only while every
    `log_slope` (0 at the start) is above about -10 in float32 and -20 in float64.

    Args:
        net: The network's weights, with the batch axes of the site first.

    Raises:
        ValueError: If called on a vector of another length.
    """

    def __init__(self, net: BlockNet):
        self.net = BlockNet(net[0], tuple(Dense(*layer) for layer in net[1]))

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """The image of `x` and the sum of the log-derivatives on the diagonal, in one pass."""
        require_features(x, self.net.log_slope.shape[-1])
        y, log_derivative = block_network(x, self.net)
        return y, log_derivative.sum(-1)

    def _inverse(self, y: Array) -> Array:
        require_features(y, self.net.log_slope.shape[-1])
        # Bisection has no derivative; the Newton corrections after it have the right one.
        start = _bisect(*jax.lax.stop_gradient((y, self.net)))
        slope = jnp.exp(jax.lax.stop_gradient(block_network(start, self.net)[1]))

        def correct(_, x):
            return x - (block_network(x, self.net)[0] - y) / slope

        # d passes suffice: the matrix I - J / diag(J) that propagates derivatives is nilpotent.
        return jax.lax.fori_loop(0, y.shape[-1], correct, start)

    def tree_flatten(self):
        """The weights are leaves."""
        return (self.net,), (("net",), {})


def _bisect(y: Array, net: BlockNet) -> Array:
    """The point with image `y`, to floating-point precision, by bisection for one entry after another."""
    own, across, bias = net.layers[-1]
    features = y.shape[-1]
    earlier = np.triu(np.ones((features, features), dtype=bool), 1)[:, None, :, None]
    # |tanh| < 1, so the sum of absolute weights bounds |g_j|.
    reach = jnp.exp(own).sum((-2, -1)) + jnp.abs(bias)[..., 0]
    reach = reach + jnp.where(earlier, jnp.abs(across), 0).sum((-4, -3, -1))
    halvings = jnp.finfo(y.dtype).nmant + 8

    def halve(step, ends):
        lower, upper = ends
        middle = (lower + upper) / 2
        low = block_network(middle, net)[0] < y
        # Earlier entries are already solved, and later entries do not affect this one.
        here = jnp.arange(features) == step // halvings
        return jnp.where(here & low, middle, lower), jnp.where(here & ~low, middle, upper)

    ends = tuple((y + sign * reach) * jnp.exp(-net.log_slope) for sign in (-1, 1))
    return sum(jax.lax.fori_loop(0, features * halvings, halve, ends)) / 2
