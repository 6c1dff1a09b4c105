"""Qwen3: a Llama that normalises queries and keys by head."""

from collections.abc import Mapping
from typing import Any

from bnlora.models.decoder_checkpoint import llama_keys as keys
from bnlora.models.decoder_config import DecoderConfig, flag, read_sizes, upper_window

ARCHITECTURE = "Qwen3ForCausalLM"
BIASED = ("q_proj", "k_proj", "v_proj", "o_proj")

__all__ = ["ARCHITECTURE", "keys", "read_config"]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    sizes = read_sizes({"head_dim": 128} | dict(config))
    biased = BIASED if flag(config, "attention_bias") else ()
    return DecoderConfig(**sizes, biased=biased, qk_norm=True, window=upper_window(config))
