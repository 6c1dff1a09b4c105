"""Keys and values of earlier tokens, so that a longer text costs one more token and not one more text.

A cache has a slot for every token that a row will have. The slots of a call are filled layer by layer, and
its tokens attend to all slots that are filled. Rows are padded on the left, so that their next tokens share a
slot; a padding token has a slot that no query reads. Layers with a window keep all slots and read the near
ones.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.layers import weights_of


class Cache(NamedTuple):
    """Keys and values of some layers.

    Attributes:
        keys: Rotated keys, (layer, row, slot, head, dim).
        values: Values, of the same shape.
    """

    keys: Float[Array, "l b s kv dim"]
    values: Float[Array, "l b s kv dim"]


def empty_cache(config: DecoderConfig, num_layers: int, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of so many layers, rows and slots, filled with zeros."""
    shape = (num_layers, rows, slots, config.num_kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def run_with_cache(
    layer: partial,
    hidden: Float[Array, "b t d"],
    weights: Mapping[str, Array],
    adapters: Mapping[str, Mapping[str, Array]],
    cache: Cache,
    start: int | Int[Array, ""],
    *,
    first_layer: int,
) -> tuple[Float[Array, "b t d"], Cache]:
    """Run the layers of a cache on new tokens, in one `jax.lax.scan`.

    Args:
        layer: `decoder_layer` of these tokens.
        hidden: Input of the first layer at the new tokens.
        weights: Weights stacked over all layers of the model.
        adapters: Adapters stacked over the layers that run.
        cache: Keys and values of the earlier tokens in these layers.
        start: Slot of the first new token.
        first_layer: The lowest layer that runs; as many run as the cache has.

    Returns:
        Output of the last of these layers at the new tokens, and the cache with their keys and values.
    """

    # The cache is carried, not scanned over: the loop then writes one token into it instead of copying it.
    def step(carry: tuple[Array, Cache], inputs: tuple) -> tuple[tuple[Array, Cache], None]:
        (hidden, cache), (place, adapter) = carry, inputs
        filled: dict[str, Cache] = {}

        def memory(key: Array, value: Array) -> tuple[Array, Array]:
            at = (place, 0, start, 0, 0)
            new = Cache(_written(cache.keys, key, at), _written(cache.values, value, at))
            filled["cache"] = new
            keys, values = (jax.lax.dynamic_index_in_dim(x, place, keepdims=False) for x in new)
            return keys, values

        hidden = layer(hidden, weights_of(first_layer + place, weights), adapter, memory=memory)
        return (hidden, filled["cache"]), None

    places = jnp.arange(cache.keys.shape[0])
    return jax.lax.scan(step, (hidden, cache), (places, adapters))[0]


def _written(slots: Array, new: Array, at: tuple) -> Array:
    """The slots of all layers with those of new tokens in one layer."""
    return jax.lax.dynamic_update_slice(slots, new[None].astype(slots.dtype), at)
