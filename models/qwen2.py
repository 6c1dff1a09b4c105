"""Qwen2 and Qwen2.5: a Llama with biases of queries, keys and values."""

from collections.abc import Mapping
from typing import Any

from bnlora.models.decoder_checkpoint import llama_keys as keys
from bnlora.models.decoder_config import DecoderConfig, read_sizes, upper_window

ARCHITECTURE = "Qwen2ForCausalLM"

__all__ = ["ARCHITECTURE", "keys", "read_config"]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    sizes = read_sizes(config)
    return DecoderConfig(**sizes, biased=("q_proj", "k_proj", "v_proj"), window=upper_window(config))
