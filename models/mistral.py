"""Mistral: a Llama whose queries attend to a window of near keys."""

from collections.abc import Mapping
from typing import Any

from bnlora.models.decoder_checkpoint import llama_keys as keys
from bnlora.models.decoder_config import DecoderConfig, Window, read_sizes

ARCHITECTURE = "MistralForCausalLM"

__all__ = ["ARCHITECTURE", "keys", "read_config"]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json; where `sliding_window` is null, attention is full.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    length = config.get("sliding_window", 4096)
    sizes = read_sizes({"num_key_value_heads": 8} | dict(config))
    return DecoderConfig(**sizes, window=None if length is None else Window(length))
