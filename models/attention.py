"""Attention: which keys a query may attend to, and the weighted mean of their values.

    softmax(cap * tanh(scale * q k^T / cap) + mask) v,      several query heads share one key/value head

`jax.nn.dot_product_attention` is not used: it has no soft cap, gives a query without keys (padding on the
left) the mean of all values, and on a CPU holds the scores of all queries at once. Here long rows run in
blocks of queries, so memory grows with the length of a row and not with its square.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnlora.models.layers import soft_cap

BLOCK = 512
"""Queries of a block."""

WHOLE = 1024
"""Number of queries up to which a row runs in one block."""


def causal_mask(mask: Bool[Array, "b s"], columns: Int[Array, " t"] | None = None) -> Bool[Array, "b t s"]:
    """Whether each query may attend to each key (last axis): real tokens up to its own position.

    Args:
        mask: True at real tokens.
        columns: Column of each query; None means that every column has one.
    """
    keys = jnp.arange(mask.shape[1])
    queries = keys if columns is None else columns
    return (keys[None, :] <= queries[:, None])[None, :, :] & mask[:, None, :]


def both_ways(mask: Bool[Array, "b t"]) -> Bool[Array, "b t t"]:
    """Whether each query may attend to each key (last axis): all real tokens, before and after it."""
    return jnp.broadcast_to(mask[:, None, :], (mask.shape[0], mask.shape[1], mask.shape[1]))


def local_mask(
    mask: Bool[Array, "b s"], window: int, columns: Int[Array, " t"] | None = None
) -> Bool[Array, "b t s"]:
    """`causal_mask` with keys among the last `window` positions only, the query's own included."""
    keys = jnp.arange(mask.shape[1])
    queries = keys if columns is None else columns
    near = keys[None, :] > queries[:, None] - window
    return causal_mask(mask, columns) & near[None, :, :]


def attention(
    query: Float[Array, "b t heads dim"],
    key: Float[Array, "b s kv_heads dim"],
    value: Float[Array, "b s kv_heads dim"],
    allowed: Bool[Array, "b t s"],
    *,
    scale: float | None = None,
    cap: float | None = None,
) -> Float[Array, "b t heads dim"]:
    """Attention in which heads / kv_heads query heads share each key/value head.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        allowed: Whether each query may attend to each key, as returned by `causal_mask`.
        scale: Factor of the scores; dim^(-1/2) if omitted.
        cap: Soft cap of the scores, or None.

    Returns:
        Attended values. A query without any allowed key (padding on the left) gets zeros, not NaN.
    """
    batch, length, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale

    def attend(query: Array, allowed: Array) -> Array:
        return _attend(query, key, value, allowed, scale, cap)

    if length <= WHOLE:
        return attend(query, allowed)
    # The last block is filled up with queries that attend to nothing.
    count = -(-length // BLOCK)
    filled = ((0, 0), (0, count * BLOCK - length))
    blocks = jnp.pad(query, (*filled, (0, 0), (0, 0))).reshape(batch, count, BLOCK, heads, dim)
    masks = jnp.pad(allowed, (*filled, (0, 0))).reshape(batch, count, BLOCK, -1)
    # The backward pass recomputes the scores of a block instead of storing those of all blocks.
    turn = jax.checkpoint(lambda inputs: attend(*inputs))
    attended = jax.lax.map(turn, (jnp.swapaxes(blocks, 0, 1), jnp.swapaxes(masks, 0, 1)))
    return jnp.swapaxes(attended, 0, 1).reshape(batch, -1, heads, dim)[:, :length]


def _attend(query: Array, key: Array, value: Array, allowed: Array, scale: float, cap: float | None) -> Array:
    batch, length, heads, dim = query.shape
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", groups, key, preferred_element_type=jnp.float32) * scale
    scores, allowed = soft_cap(scores, cap), allowed[:, None, None, :, :]
    # A finite floor instead of -inf: a query without keys gets finite weights, then zeros.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(allowed, weights, 0.0).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(batch, length, heads, dim)
