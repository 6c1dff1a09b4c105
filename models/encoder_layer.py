"""One layer of an encoder: every token attends to all real tokens, and norms follow the sums.

    h <- norm(h + o_proj(attention(q_proj h, k_proj h, v_proj h)))
    h <- norm(h + down_proj(f(up_proj h)))

f is gelu. Reference: Devlin et al. (2019), BERT, arXiv 1810.04805.
"""

from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, Int

from bnlora.models import layers
from bnlora.models.attention import attention
from bnlora.models.decoder_layer import FUNCTIONS
from bnlora.models.encoder_config import EncoderConfig


def encoder_layer(
    config: EncoderConfig,
    implementation: str | None,
    allowed: Bool[Array, "b t t"],
    hidden: Float[Array, "b t d"],
    weights: Mapping[str, Array],
    adapters: Mapping[str, Mapping[str, Array]],
    *,
    at: Int[Array, "b n"] | None = None,
    recorded: dict[str, Array] | None = None,
) -> Float[Array, "b n d"]:
    """Run one layer.

    Args:
        config: Sizes and constants.
        implementation: Implementation of the adapted product; None for the default.
        allowed: Whether each query may attend to each key, the result of `both_ways`.
        hidden: Input of the layer, at all positions.
        weights: The layer's kernels and vectors.
        adapters: The layer's adapters by module.
        at: Positions where the output is requested; None means all.
        recorded: A dictionary that receives the input of every dense module, or None.

    Returns:
        Output of the layer at these positions.
    """

    def dense(name: str, x: Array) -> Array:
        if recorded is not None:
            recorded[name] = x
        return layers.dense(
            x, weights[name], adapters.get(name), bias=weights[f"{name}_bias"], implementation=implementation
        )

    def heads(name: str, x: Array) -> Array:
        return dense(name, x).reshape(*x.shape[:2], config.num_heads, config.head_dim)

    def normal(name: str, x: Array) -> Array:
        return layers.layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)

    key, value = heads("k_proj", hidden), heads("v_proj", hidden)
    # Keys and values are needed at all positions. All later steps are needed only at the queries' positions.
    hidden, allowed = layers.take_positions(hidden, at), layers.take_positions(allowed, at)
    attended = attention(heads("q_proj", hidden), key, value, allowed)
    hidden = normal("attention_norm", hidden + dense("o_proj", attended.reshape(hidden.shape)))
    inner = FUNCTIONS[config.activation](dense("up_proj", hidden))
    return normal("mlp_norm", hidden + dense("down_proj", inner))
