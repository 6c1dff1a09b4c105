"""One layer of a decoder-only language model.

    h <- h + p(o_proj(attention(rotate(q_proj n), rotate(k_proj n), v_proj n))),   n = norm(h)
    h <- h + p(down_proj(f(gate_proj n) * up_proj n)),                             n = norm(h)

p is the identity or another norm, f is silu or gelu; without a gate the last line is down_proj(f(up_proj n)).
Some families normalise queries and keys by head, some let a part of the layers attend to near keys only.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnlora.models import layers
from bnlora.models.attention import attention, causal_mask, local_mask
from bnlora.models.decoder_config import Activation, DecoderConfig
from bnlora.models.rotary import Scaling, rotary_frequencies, rotary_tables, rotate

FUNCTIONS: Mapping[Activation, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    }
)

Memory = Callable[[Array, Array], tuple[Array, Array]]
"""From the rotated keys and the values of the positions that run to those of all positions they may see."""


class View(NamedTuple):
    """What the queries of a layer see.

    Attributes:
        allowed: Whether each query may attend to each key, (b, t, s).
        tables: Cosines and sines of the rotation; empty without rotation.
    """

    allowed: Bool[Array, "b t s"]
    tables: tuple[Array, ...]


def positions_of(mask: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """The number of real tokens before each one, so that padding on the left shifts nothing."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def views(
    config: DecoderConfig, mask: Bool[Array, "b s"], columns: Int[Array, " t"] | None = None
) -> tuple[View, ...]:
    """The view of every kind of layer: one, or that of the other layers and that of the local ones.

    Args:
        config: Sizes and constants.
        mask: True at real tokens.
        columns: Columns of `mask` that the layer runs at; None means all.
    """
    window, positions = config.window, positions_of(mask)
    positions = positions if columns is None else positions[:, columns]

    def tables(theta: float | None, scaling: Scaling | None) -> tuple[Array, ...]:
        if theta is None:
            return ()
        return rotary_tables(positions, rotary_frequencies(config.head_dim, theta, scaling))

    everywhere = View(causal_mask(mask, columns), tables(config.rope_theta, config.rope_scaling))
    if window is None:
        return (everywhere,)
    own = window.rope_theta is not None
    local = View(
        local_mask(mask, window.length, columns),
        tables(window.rope_theta, None) if own else everywhere.tables,
    )
    kinds = set(window.is_local(config.num_layers))
    return tuple(view for view, kind in ((everywhere, False), (local, True)) if kind in kinds)


def local_marks(config: DecoderConfig) -> dict[str, Bool[Array, " layer"]]:
    """Whether each layer is local, where only some are."""
    local = () if config.window is None else config.window.is_local(config.num_layers)
    return {"is_local": jnp.array(local)} if len(set(local)) > 1 else {}


def normal(config: DecoderConfig, name: str, weights: Mapping[str, Array], x: Array) -> Array:
    """Apply the norm with the gain of this name."""
    if config.norm == "layer":
        return layers.layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)
    return layers.rms_norm(x, weights[name], config.norm_eps)


def decoder_layer(
    config: DecoderConfig,
    implementation: str | None,
    seen: tuple[View, ...],
    hidden: Float[Array, "b t d"],
    weights: Mapping[str, Array],
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    at: Int[Array, "b n"] | None = None,
    recorded: dict[str, Array] | None = None,
    memory: Memory | None = None,
) -> Float[Array, "b n d"]:
    """Run one layer.

    Args:
        config: Sizes and constants.
        implementation: Implementation of the adapted product; None for the default.
        seen: The result of `views`.
        hidden: Input of the layer, at all positions.
        weights: The layer's kernels and vectors, and its entry of `local_marks`.
        adapters: The layer's adapters by module.
        at: Positions where the output is requested; None means all.
        recorded: A dictionary that receives the input of every dense module, or None.
        memory: Gives the keys and values to attend to, out of those of these positions; None means that
            these are all.

    Returns:
        Output of the layer at these positions.
    """

    def dense(name: str, x: Array) -> Array:
        if recorded is not None:
            recorded[name] = x
        return layers.dense(
            x, weights[name], adapters.get(name), bias=weights.get(f"{name}_bias"),
            implementation=implementation,
        )  # fmt: skip

    def heads(name: str, x: Array) -> Array:
        split = dense(f"{name}_proj", x).reshape(*x.shape[:2], -1, config.head_dim)
        gain = weights.get(f"{name}_norm")
        return split if gain is None else layers.rms_norm(split, gain, config.norm_eps)

    def turned(x: Array, tables: tuple[Array, ...]) -> Array:
        return rotate(x, *tables) if tables else x

    def added(name: str, hidden: Array, change: Array) -> Array:
        if config.post_norms:
            change = normal(config, f"{name}_post_norm", weights, change)
        return hidden + change

    view = seen[0]
    if len(seen) == 2:
        view = jax.tree.map(lambda far, near: jnp.where(weights["is_local"], near, far), *seen)
    x = normal(config, "attention_norm", weights, hidden)
    key, value = turned(heads("k", x), view.tables), heads("v", x)
    if memory is not None:
        key, value = memory(key, value)
    # Keys and values are needed at all positions. All later steps are needed only at the queries' positions.
    hidden, x, view = jax.tree.map(lambda y: layers.take_positions(y, at), (hidden, x, view))
    attended = attention(
        turned(heads("q", x), view.tables), key, value, view.allowed, scale=config.query_scale,
        cap=config.attention_cap,
    )  # fmt: skip
    hidden = added("attention", hidden, dense("o_proj", attended.reshape(*hidden.shape[:2], -1)))
    x = normal(config, "mlp_norm", weights, hidden)
    inner = FUNCTIONS[config.activation](dense("gate_proj" if config.gated else "up_proj", x))
    inner = inner * dense("up_proj", x) if config.gated else inner
    return added("mlp", hidden, dense("down_proj", inner))
