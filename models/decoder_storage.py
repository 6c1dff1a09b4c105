"""The frozen weights of a decoder in another type, and how many there are."""

import math
from typing import Any

import jax
import numpy as np

from bnlora.kernels.quantised import QuantisedBlocks, QuantisedMatrix, QuantisedTable, is_quantised
from bnlora.models.decoder import Decoder
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.encoder import Encoder
from bnlora.models.storage import Storage, block_size, kernel_room, table_room


def storage_of(module: Decoder | Encoder) -> Storage:
    """The type in which a model was loaded."""
    kernels = [weight.get_value() for weight in module.layers.values()]
    table: Any = module.embedding.get_value()
    if isinstance(table, QuantisedTable):
        return "4bit" if any(isinstance(kernel, QuantisedBlocks) for kernel in kernels) else "int8"
    return "bfloat16" if table.dtype == "bfloat16" else "float32"


def converted(module: Decoder | Encoder, storage: Storage) -> Decoder | Encoder:
    """A model with its kernels and tables in another type.

    Args:
        module: A model in a floating-point type.
        storage: The other type.

    Raises:
        ValueError: If the weights are quantised: rounding them again would add the errors of both.
    """
    own = storage_of(module)
    if own == storage:
        return module
    if isinstance(module, Encoder):
        raise ValueError(f"the weights of an encoder must be float32; got {storage!r}")
    if own not in ("float32", "bfloat16"):
        raise ValueError(
            f"weights in {own} cannot be converted to {storage}, because they were rounded already; load the "
            f'model with weights="{storage}"'
        )
    config = module.config
    layers = {name: weight.get_value() for name, weight in module.layers.items()}
    for name, shape in config.layer_modules.items():
        room = kernel_room(storage, (config.num_layers, *shape))
        for layer in range(config.num_layers):
            room.write(layer, 0, np.asarray(layers[name][layer]).T)
        layers[name] = room.filled()

    def table(name: str) -> Any:
        param = getattr(module, name)
        if param is None or name not in ("embedding", "lm_head"):
            return None if param is None else param.get_value()
        room = table_room(storage, (config.vocab_size, config.d_model))
        room.write(0, 0, np.asarray(param.get_value()))
        return room.filled()

    outer = ("embedding", "lm_head", "final_norm", "final_norm_bias", "positions")
    return Decoder(
        config, layer_weights=layers, execution=module.execution, **{name: table(name) for name in outer}
    )


def num_weights(weights: Any) -> int:
    """Number of frozen weights in a tree, those that quantised arrays stand for."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights, is_leaf=is_quantised))


def num_bytes(weights: Any) -> int:
    """Bytes of the arrays of a tree; they need not exist (`jax.ShapeDtypeStruct`)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))


def abstract(config: DecoderConfig, storage: Storage) -> Decoder:
    """A model without numbers: every weight is a `jax.ShapeDtypeStruct`."""
    struct: Any = jax.ShapeDtypeStruct
    kind = storage if storage in ("float32", "bfloat16") else None

    def kernel(layers: int, d_in: int, d_out: int) -> Any:
        size = block_size(d_in)
        if kind is not None:
            return struct((layers, d_in, d_out), kind)
        if storage == "int8" or size is None:
            return QuantisedMatrix(struct((layers, d_in, d_out), "int8"), struct((layers, d_out), "float32"))
        sides = struct((layers, d_in // size, d_out), "float16")
        return QuantisedBlocks(struct((layers, d_in // size, size // 2, d_out), "uint8"), sides, sides)

    def table() -> Any:
        shape = (config.vocab_size, config.d_model)
        if kind is not None:
            return struct(shape, kind)
        return QuantisedTable(struct(shape, "int8"), struct(shape[:1], "float32"))

    width, count = struct((config.d_model,), "float32"), config.num_layers
    kernels = {name: kernel(count, *shape) for name, shape in config.layer_modules.items()}
    vectors = {name: struct((count, size), "float32") for name, size in config.vectors.items()}
    learned = struct((config.max_length, config.d_model), "float32")
    return Decoder(
        config,
        embedding=table(),
        layer_weights=kernels | vectors,
        final_norm=width,
        final_norm_bias=width if config.norm == "layer" else None,
        positions=None if config.rope_theta else learned,
        lm_head=None if config.tied else table(),
    )
