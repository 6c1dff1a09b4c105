"""Models with random weights, for tests and dry runs: kernels with entries of variance 1 / inputs.

Activations then have a scale of order one for every width. Gains are one and biases zero.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnlora.models.decoder import Decoder
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.encoder import Encoder
from bnlora.models.encoder_config import EncoderConfig


def random_decoder(key: jax.Array, config: DecoderConfig) -> Decoder:
    """A decoder of these sizes."""
    return Decoder(config, **_decoder_weights(key, config))


def random_encoder(key: jax.Array, config: EncoderConfig) -> Encoder:
    """An encoder of these sizes."""
    return Encoder(config, **_encoder_weights(key, config))


@partial(jax.jit, static_argnums=1)
def _decoder_weights(key: jax.Array, config: DecoderConfig) -> dict[str, Any]:
    keys = _keys(key, config)
    width, vocab = config.modules["lm_head"]
    embedding = _normal(keys["embedding"], vocab, width, fan_in=width)
    learned = jax.random.fold_in(keys["embedding"], 1)
    return {
        "embedding": embedding,
        "layer_weights": _layers(keys, config),
        "final_norm": jnp.ones(width),
        "final_norm_bias": jnp.zeros(width) if config.norm == "layer" else None,
        "positions": None if config.rope_theta else _normal(learned, config.max_length, width, fan_in=width),
        "lm_head": None if config.tied else _normal(keys["lm_head"], vocab, width, fan_in=width),
    }


@partial(jax.jit, static_argnums=1)
def _encoder_weights(key: jax.Array, config: EncoderConfig) -> dict[str, Any]:
    keys, width = _keys(key, config), config.d_model
    learned = jax.random.split(jax.random.fold_in(keys["embedding"], 1), 3)
    head = _normal(keys["lm_head"], config.num_labels, width, fan_in=width)
    outer = {
        "embedding": _normal(keys["embedding"], config.vocab_size, width, fan_in=width),
        "positions": _normal(learned[0], config.max_length, width, fan_in=width),
        "segment": _normal(learned[1], width, fan_in=width),
        "embedding_norm": jnp.ones(width),
        "embedding_norm_bias": jnp.zeros(width),
        "lm_head": jnp.zeros_like(head) if config.new_head else head,
        "lm_head_bias": jnp.zeros(config.num_labels),
    }
    if config.pooled:
        outer["pooler"] = _normal(learned[2], width, width, fan_in=width)
        outer["pooler_bias"] = jnp.zeros(width)
    return {"layer_weights": _layers(keys, config), "outer": outer}


def _keys(key: jax.Array, config: DecoderConfig | EncoderConfig) -> dict[str, jax.Array]:
    """A key for each module and the embedding."""
    names = [*config.modules, "embedding"]
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def _normal(key: jax.Array, *shape: int, fan_in: int) -> jax.Array:
    return jax.random.normal(key, shape) * fan_in**-0.5


def _layers(keys: Mapping[str, jax.Array], config: DecoderConfig | EncoderConfig) -> dict[str, jax.Array]:
    """Normal kernels, gains of one and biases of zero, stacked over layers."""

    def vector(name: str, size: int) -> jax.Array:
        number = jnp.zeros if name.endswith("_bias") else jnp.ones
        return number((config.num_layers, size))

    shapes, depth = config.layer_modules, config.num_layers
    dense = {name: _normal(keys[name], depth, i, o, fan_in=i) for name, (i, o) in shapes.items()}
    return dense | {name: vector(name, size) for name, size in config.vectors.items()}
