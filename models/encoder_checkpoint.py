"""Encoders out of checkpoints whose tensors have the names of BERT.

embedding                embeddings.word_embeddings.weight
positions, segment       embeddings.position_embeddings.weight, embeddings.token_type_embeddings.weight
embedding_norm           embeddings.LayerNorm.weight
pooler, lm_head          by family; absent where the checkpoint is of a body, without a classification head
layer i, dense module    encoder.layer.<i>.attention.self.query.weight and similar, (out, in)
layer i, norm            encoder.layer.<i>.output.LayerNorm.weight and similar

Classes with a head have the name of the family before those of its body. Old files call gains and biases of
norms gamma and beta.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, get_args

import jax.numpy as jnp
import numpy as np

from bnlora._util.checks import check_option
from bnlora.models.encoder import Encoder
from bnlora.models.encoder_config import EncoderConfig, Pooling
from bnlora.models.encoder_names import PATHS
from bnlora.models.loading import Checkpoint
from bnlora.models.tensors import KeyMap, Part, plain, renamed, take

_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_BUFFERS = r"embeddings\.(position_ids|token_type_ids)"


class EncoderFamily(Protocol):
    """What the module of a family of encoders has.

    Attributes:
        ARCHITECTURE: The class of transformers with a classification head.
        BODIES: Classes without one, whose body is read.
        PREFIX: What precedes the names of the body in classes with a head.
    """

    ARCHITECTURE: str
    BODIES: tuple[str, ...]
    PREFIX: str

    def read_config(self, config: Mapping[str, Any], num_labels: int | None = None) -> EncoderConfig:
        """Read the keys of a config.json."""
        ...

    def keys(self, config: EncoderConfig) -> KeyMap:
        """Where the weights are in a checkpoint."""
        ...


def encoder_keys(config: EncoderConfig, *, pooler: str, head: str, heads: str) -> KeyMap:
    """The map of an encoder whose tensors have the names of BERT.

    Args:
        config: Sizes and constants; they say whether there is a pooling layer and an output layer.
        pooler: Path of the pooling layer.
        head: Path of the output layer.
        heads: Pattern of tensors of other heads, which are ignored where the family's own is absent, or of
            tensors that its head does not read.
    """
    width, labels = config.d_model, config.num_labels
    layer: dict[str, Part] = {}
    for name, shape in config.layer_modules.items():
        layer[name] = Part(f"{PATHS[name]}.weight", shape[::-1])
        layer[f"{name}_bias"] = Part(f"{PATHS[name]}.bias", shape[1:], plain)
    for name in ("attention_norm", "mlp_norm"):
        layer[name] = Part(f"{PATHS[name]}.weight", (width,), plain)
        layer[f"{name}_bias"] = Part(f"{PATHS[name]}.bias", (width,), plain)
    offset = config.position_offset
    positions = (config.max_length + offset, width)
    outer = {
        "embedding": Part("embeddings.word_embeddings.weight", (config.vocab_size, width), plain),
        "positions": Part(
            "embeddings.position_embeddings.weight", positions, partial(_from_row, first=offset)
        ),
        "segment": Part("embeddings.token_type_embeddings.weight", (config.segments, width), _first_row),
        "embedding_norm": Part("embeddings.LayerNorm.weight", (width,), plain),
        "embedding_norm_bias": Part("embeddings.LayerNorm.bias", (width,), plain),
    }
    if config.pooled:
        outer["pooler"] = Part(f"{pooler}.weight", (width, width))
        outer["pooler_bias"] = Part(f"{pooler}.bias", (width,), plain)
    if not config.new_head:
        outer["lm_head"] = Part(f"{head}.weight", (labels, width), plain)
        outer["lm_head_bias"] = Part(f"{head}.bias", (labels,), plain)
    unread = "" if config.pooled else r"|pooler\.dense\..*"
    return KeyMap(config.num_layers, layer, outer, "encoder.layer.{}.", f"{_BUFFERS}|{heads}{unread}")


def build_encoder(
    checkpoint: Checkpoint,
    family: EncoderFamily,
    num_labels: int | None = None,
    pooling: Pooling | None = None,
) -> Encoder:
    """Build an encoder from a checkpoint.

    Args:
        checkpoint: Configuration and tensors under their Hugging Face names.
        family: The family of the configuration.
        num_labels: Outputs of the output layer, if the checkpoint has none. It is then zero, so that all
            classes have the same probability until it is adapted.
        pooling: What a new output layer reads; by default the pooling layer if the checkpoint has one, else
            the first token.

    Returns:
        The model, with float32 weights.

    Raises:
        ValueError: If the configuration is not supported, `num_labels` or `pooling` does not fit the
            checkpoint, or tensors are missing, unexpected, not floats, of another shape than the
            configuration implies, NaN or infinite.
    """
    config = family.read_config(checkpoint.config, num_labels)
    tensors = renamed(checkpoint.tensors, partial(_name, prefix=family.PREFIX))
    config = replace(config, pooling=_pooling(config, pooling, has_layer="pooler.dense.weight" in tensors))
    keys = family.keys(config)
    keys.check(tensors)
    layer_weights = {name: jnp.asarray(keys.stack(tensors, name)) for name in keys.layers}
    outer = {name: jnp.asarray(part.read(take(tensors, part.name))) for name, part in keys.outer.items()}
    if config.new_head:
        outer["lm_head"] = jnp.zeros((config.num_labels, config.d_model))
        outer["lm_head_bias"] = jnp.zeros(config.num_labels)
    return Encoder(config, layer_weights=layer_weights, outer=outer)


def _pooling(config: EncoderConfig, wanted: Pooling | None, *, has_layer: bool) -> Pooling:
    """What the output layer reads, as requested for a new one."""
    if wanted is None:
        return "pooler" if has_layer or not config.new_head else "first"
    check_option("pooling", wanted, get_args(Pooling))
    if not config.new_head:
        raise ValueError(
            "pooling is for a new classification head, and the checkpoint has one with its own: omit it; "
            f"got {wanted!r}"
        )
    if wanted == "pooler" and not has_layer:
        raise ValueError(
            "pooling='pooler' needs a pooling layer, and the checkpoint has none; use 'first' or 'mean'"
        )
    return wanted


def _name(name: str, *, prefix: str) -> str:
    """The name of a tensor without the family in front, and with today's names of norms."""
    found = re.search(r"LayerNorm\.(gamma|beta)$", name)
    today = name[: found.start()] + _OLD[found[0]] if found else name
    return today.removeprefix(prefix)


def _from_row(value: np.ndarray, *, first: int) -> np.ndarray:
    return value[first:]


def _first_row(value: np.ndarray) -> np.ndarray:
    return value[0]
