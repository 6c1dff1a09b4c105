"""Llama 2 and 3.x, TinyLlama, SmolLM2: RMSNorm, rotary embedding, grouped-query attention, SwiGLU."""

from collections.abc import Mapping
from typing import Any

from bnlora.models.decoder_checkpoint import llama_keys as keys
from bnlora.models.decoder_config import DecoderConfig, read_sizes, refuse

ARCHITECTURE = "LlamaForCausalLM"

__all__ = ["ARCHITECTURE", "keys", "read_config"]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json; biases are refused.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    refuse(config, ("attention_bias", "mlp_bias"), "Llama")
    return DecoderConfig(**read_sizes(config))
