"""The classification head of an encoder under the names of transformers: taken out, and put in.

A head that was trained with an adapter belongs to it, and not to the checkpoint of the base. That of BERT is
`classifier`; that of RoBERTa has a dense layer of its own, `classifier.dense`, before `classifier.out_proj`.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from bnlora.models.encoder import Encoder
from bnlora.models.encoder_checkpoint import EncoderFamily
from bnlora.models.encoder_config import EncoderConfig
from bnlora.models.encoder_names import CLASSIFIER
from bnlora.models.tensors import Part


def head_parts(family: EncoderFamily, config: EncoderConfig) -> dict[str, Part]:
    """The weights of the head in transformers, by our names.

    Args:
        family: The family of the encoder.
        config: Its sizes.
    """
    whole = family.keys(replace(config, new_head=False, pooling="pooler")).outer
    return {name: part for name, part in whole.items() if part.name.startswith(CLASSIFIER)}


def head_tensors(encoder: Encoder, family: EncoderFamily) -> dict[str, np.ndarray]:
    """The head of an encoder as tensors with the names of transformers.

    Raises:
        ValueError: If the head reads something that the class of transformers does not.
    """
    _require_pooled(encoder.config, "transformers' classifiers read")
    return {
        part.name: part.read(np.asarray(getattr(encoder, name)[...]))  # a transposition is its own inverse
        for name, part in head_parts(family, encoder.config).items()
    }


def with_head(encoder: Encoder, family: EncoderFamily, tensors: Mapping[str, np.ndarray]) -> Encoder:
    """The same encoder with another head.

    Args:
        encoder: The encoder.
        family: Its family.
        tensors: All tensors of the head, with the names of transformers.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape, or the head of the encoder reads
            something else.
    """
    parts = head_parts(family, encoder.config)
    if "pooler" not in parts:
        _require_pooled(encoder.config, "the head was trained on")
    expected = {part.name: part.shape for part in parts.values()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(
            f"the head must have {_listed(expected)}, for {encoder.config.num_labels} labels; got "
            f"{_listed(found)}"
        )
    names = ("embedding", "positions", "segment", "embedding_norm", "embedding_norm_bias")
    config = replace(encoder.config, new_head=False, pooling="pooler", label_names=())
    kept = names if "pooler" in parts else (*names, "pooler", "pooler_bias")
    outer = {name: getattr(encoder, name)[...] for name in kept}
    outer |= {name: jnp.asarray(part.read(tensors[part.name])) for name, part in parts.items()}
    layers = {name: value[...] for name, value in encoder.layers.items()}
    return Encoder(config, layer_weights=layers, outer=outer, execution=encoder.execution)


def _require_pooled(config: EncoderConfig, what: str) -> None:
    if not config.pooled:
        raise ValueError(f"{what} the pooling layer; the base has pooling {config.pooling!r}")


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
