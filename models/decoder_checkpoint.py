"""Decoder-only models out of checkpoints whose tensors have the names of Llama, or a few others.

embedding                model.embed_tokens.weight
final_norm               model.norm.weight
lm_head                  lm_head.weight, absent if it is tied to the embedding
layer i, dense module    model.layers.<i>.self_attn.q_proj.weight and similar, (out, in)
layer i, norm            model.layers.<i>.input_layernorm.weight and similar
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnlora.models.decoder import Decoder
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.loading import Checkpoint
from bnlora.models.storage import BlockKernel, Room, Storage, kernel_room, table_room
from bnlora.models.tensors import KeyMap, Part, has_blocks, plain, take, take_blocks, take_rows

PART = 2**18
"""Numbers of a tensor that are read at a time: 1 MiB in float32."""

TABLES = ("embedding", "lm_head")

Reader = Callable[[np.ndarray], np.ndarray]

PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
"""Path of every weight of a layer, in the names of Llama."""


def llama_keys(config: DecoderConfig, *, paths: Mapping[str, str] = PATHS, gain: Reader = plain) -> KeyMap:
    """The map of a model whose tensors have the names of Llama.

    Args:
        config: Sizes and constants.
        paths: Path of every weight of a layer, by our names.
        gain: From a stored gain to the factor of the norm.
    """

    def vector(name: str, size: int) -> Part:
        module = name.removesuffix("_bias")
        if module in config.biased:
            return Part(f"{paths[module]}.bias", (size,), plain)
        return Part(f"{paths[name]}.weight", (size,), gain)

    dense = {n: Part(f"{paths[n]}.weight", shape[::-1]) for n, shape in config.layer_modules.items()}
    vocab = (config.vocab_size, config.d_model)
    return KeyMap(
        config.num_layers,
        dense | {name: vector(name, size) for name, size in config.vectors.items()},
        {
            "embedding": Part("model.embed_tokens.weight", vocab, plain),
            "final_norm": Part("model.norm.weight", vocab[1:], gain),
            "lm_head": Part("lm_head.weight", vocab, plain),
        },
    )


def build_decoder(
    checkpoint: Checkpoint, config: DecoderConfig, keys: KeyMap, storage: Storage = "float32"
) -> Decoder:
    """Build a model from a checkpoint.

    Args:
        checkpoint: Configuration and tensors under their Hugging Face names.
        config: The same configuration, in our terms.
        keys: Where the weights are.
        storage: Type of the kernels and tables in memory.

    Returns:
        The model. Tensors are read in parts, straight into its arrays.

    Raises:
        ValueError: If tensors are missing, unexpected, not floats or of another shape than the configuration
            implies (a few of each are named, before any is read), or if numbers are NaN or infinite.
    """
    tensors, outer = keys.named(checkpoint.tensors), dict(keys.outer)
    # Some files store the tied output layer again. Read it, to detect one that differs from the embedding.
    if config.tied and outer["lm_head"].name not in tensors:
        del outer["lm_head"]
    keys = replace(keys, outer=outer)
    keys.check(tensors)
    if config.tied and "lm_head" in outer:
        _require_same(tensors, outer.pop("lm_head"), outer["embedding"])
    kernels = {
        name: _kernel(keys, tensors, name, kernel_room(storage, (keys.num_layers, *shape)))
        for name, shape in config.layer_modules.items()
    }
    vectors = {name: jnp.asarray(keys.stack(tensors, name)) for name in keys.layers if name not in kernels}
    arrays: dict[str, Any] = {
        name: _table(tensors, part, table_room(storage, (config.vocab_size, config.d_model)))
        if name in TABLES
        else jnp.asarray(part.read(take(tensors, part.name)))
        for name, part in outer.items()
    }
    return Decoder(config, layer_weights=kernels | vectors, **{"lm_head": None} | arrays)


def _kernel(keys: KeyMap, tensors: Mapping[str, np.ndarray], name: str, room: Room) -> Any:
    """The kernels of one module in all layers."""
    for layer in range(keys.num_layers):
        tensor, read = keys.prefix.format(layer) + keys.layers[name].name, keys.layers[name].read
        if isinstance(room, BlockKernel) and has_blocks(tensors, tensor):  # GGUF: rows are output channels
            for begin, blocks in take_blocks(tensors, tensor, PART):
                room.write_blocks(layer, begin, blocks)
        elif read is np.transpose:  # the rows of the tensor are output channels
            for begin, rows in take_rows(tensors, tensor, PART):
                room.write(layer, begin, rows)
        else:
            room.write(layer, 0, read(take(tensors, tensor)).T)
    return room.filled()


def _table(tensors: Mapping[str, np.ndarray], part: Part, room: Room) -> Any:
    """An embedding or an output layer; every family stores it as it is."""
    for begin, rows in take_rows(tensors, part.name, PART):
        room.write(0, begin, rows)
    return room.filled()


def _require_same(tensors: Mapping[str, np.ndarray], head: Part, embedding: Part) -> None:
    """Raise `ValueError` unless the output layer is the embedding, which the configuration states."""
    both = (take_rows(tensors, part.name, PART) for part in (head, embedding))
    for (_, first), (_, second) in zip(*both, strict=True):
        if not np.array_equal(first, second):
            raise ValueError(
                f"the configuration ties the output layer to the embedding, but {head.name} differs"
            )
