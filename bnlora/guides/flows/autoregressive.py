r"""Row-shared affine autoregressive flows: masked networks and their transform.

    y_j = x_j exp(s_j(x_<j)) + t_j(x_<j),        log|det dy/dx| = sum_j s_j,

along the last axis of an array. All rows of an event share one network; each batch entry (layer) has its own.
The forward map takes one pass; the inverse takes one pass for each entry of a row. If a family flattens its
event to one row of d entries, this is the inverse autoregressive flow over all of them.

Reference: Germain et al. (2015), MADE, for the masks; Kingma et al. (2016), inverse autoregressive
flow; Lin et al. (2026), arXiv 2601.21003, for sharing one flow over the rows of an inducing matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from bnlora._util.checks import check_key
from bnlora.guides.flows.base import Flow, require_features, require_positive, standard_normals

LOG_SCALE_BOUND = 3.0
"""Bound on |s_j|. It is smooth (tanh), because the gradient vanishes beyond a hard clamp."""


class Conditioner(NamedTuple):
    """Weights of a masked residual network from a row of `f` entries to its shifts and log-scales.

    Each part is a weight and a bias. Leading axes (the layers of a family) are batch axes; each entry has its
    own network. `hidden` stacks the two layers of every residual block: weight `(..., block, 2, h, h)`, bias
    `(..., block, 2, h)`.
    """

    first: tuple[Array, Array]
    hidden: tuple[Array, Array]
    last: tuple[Array, Array]


def near_identity(
    key: Array, *, batch: tuple[int, ...], features: int, hidden: int, blocks: int
) -> Conditioner:
    """Random weights of a conditioner whose shifts and log-scales are near zero.

    The map is near the identity, |f(x) - x| < 0.15 for |x| < 3, for every width of the network. A batch entry
    has (f+1) h + 2 b h (h+1) + 2 (h+1) f weights for f features, h hidden units and b blocks.

    Args:
        key: Random key.
        batch: Batch axes; each batch entry has its own network.
        features: Entries of a row.
        hidden: Width of the hidden layers.
        blocks: Number of residual blocks.

    Raises:
        ValueError: If a size is below one.
    """
    key = check_key(key)
    require_positive(features=features, hidden=hidden, blocks=blocks)
    shapes = [(features, hidden), (blocks, 2, hidden, hidden), (hidden, 2 * features)]
    # The contributions of hidden units add up, so scale the last layer down beyond 16 units.
    sizes = [features**-0.5, hidden**-0.5, 1e-3 * min(1.0, 16 / hidden) ** 0.5]
    weights = [s * x for s, x in zip(sizes, standard_normals(key, batch, shapes), strict=True)]
    return Conditioner(*((w, jnp.zeros((*w.shape[:-2], w.shape[-1]))) for w in weights))


def conditioner_masks(features: int, hidden: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MADE masks: input to hidden, hidden to hidden, hidden to (shift, log-scale) outputs.

    Hidden units have degrees 1 .. features-1, cyclically. A connection never lowers the degree, and an output
    uses strictly lower degrees, so output j depends only on entries before j.

    If there are fewer units than degrees, they are spread evenly over the degrees, including both ends.
    Output j then depends on the entries up to the largest degree below j. The last output depends on all
    others, but an output in between may ignore its nearest predecessors: fewer than the spacing
    (features-2)/(hidden-1), rounded up. A single unit depends on the first entry only.
    """
    inputs, degrees, outputs = _degrees(features, hidden)
    return (
        (degrees[None, :] >= inputs[:, None]).astype(np.float32),
        (degrees[None, :] >= degrees[:, None]).astype(np.float32),
        (outputs[None, :] > degrees[:, None]).astype(np.float32),
    )


def _degrees(features: int, hidden: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Degrees of the inputs, the hidden units and the outputs."""
    inputs = np.arange(1, features + 1)
    degrees = np.arange(hidden) % max(features - 1, 1) + 1
    if hidden < features - 1:
        degrees = np.linspace(1, features - 1, hidden).round().astype(int)
    return inputs, degrees, np.concatenate([inputs, inputs])


@jax.jit  # sites of one shape share its text, and that of its derivative
def shift_and_log_scale(x: Float[Array, "... rows f"], net: Conditioner) -> tuple[Array, Array]:
    """Shifts and bounded log-scales of all entries of all rows; each depends on the entries before it."""
    features, hidden = net.first[0].shape[-2:]
    # Compared in the program: written out, three masks are half of its text.
    inputs, degrees, outputs = (jnp.asarray(x, jnp.int32) for x in _degrees(features, hidden))

    def dense(h: Array, weight: Array, bias: Array) -> Array:
        return h @ weight + bias

    (first, begin), hidden_layers, (last, end) = ((w, b[..., None, :]) for w, b in net)
    h = dense(x, first * (degrees >= inputs[:, None]), begin)
    weights, biases = _layers(hidden_layers[0] * (degrees >= degrees[:, None])), _layers(hidden_layers[1])
    for step in range(0, len(weights), 2):
        inner = dense(jax.nn.relu(h), weights[step], biases[step])
        h = h + dense(jax.nn.relu(inner), weights[step + 1], biases[step + 1])
    both = dense(h, last * (outputs > degrees[:, None]), end)
    shift, raw = jax.lax.split(both, (features, features), axis=x.ndim - 1)
    return shift, LOG_SCALE_BOUND * jnp.tanh(raw / LOG_SCALE_BOUND)


def _layers(stack: Float[Array, "... block 2 r h"]) -> list[Array]:
    """The layers of all blocks in turn, from axes -4 and -3.

    One split, whose derivative is one concatenation; indexing would add up an array of zeros for each layer.
    """
    batch, rest = stack.shape[:-4], stack.shape[-2:]
    joined = stack.reshape(*batch, -1, *rest)
    parts = jax.lax.split(joined, (1,) * joined.shape[-3], axis=joined.ndim - 3)
    return [part.reshape(*batch, *rest) for part in parts]


class RowSharedAffine(Flow):
    """The affine autoregressive map of the rows of an array event; all rows share one network.

    Args:
        net: The network's weights, with the batch axes of the site first.
        event_dim: Number of event axes of the site; the flow acts along the last one.

    Raises:
        ValueError: If called on an array whose last axis does not have the length of the network's input.
    """

    def __init__(self, net: Conditioner, event_dim: int):
        self.net = net
        self.event_dim = event_dim

    def _rows(self, x: Array) -> Array:
        require_features(x, self.net.first[0].shape[-2])
        batch = x.ndim - self.event_dim
        return x.reshape(*x.shape[:batch], -1, x.shape[-1])

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """The image of `x` and `sum_j s_j` over all entries of the event, in one pass."""
        rows = self._rows(x)
        shift, log_scale = shift_and_log_scale(rows, self.net)
        y = rows * jnp.exp(log_scale) + shift
        return y.reshape(x.shape), log_scale.sum((-2, -1))

    def _inverse(self, y: Array) -> Array:
        rows = self._rows(y)

        def solve_one_more(_, x):
            shift, log_scale = shift_and_log_scale(x, self.net)
            return (rows - shift) * jnp.exp(-log_scale)

        # After pass j entry j is exact, because it depends only on the entries before it.
        solved = jax.lax.fori_loop(0, rows.shape[-1], solve_one_more, jnp.zeros_like(rows))
        return solved.reshape(y.shape)

    def tree_flatten(self):
        """The weights are leaves; the number of event axes is structure."""
        return (self.net,), (("net",), {"event_dim": self.event_dim})
