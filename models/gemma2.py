"""Gemma 2: scaled embedding, norms before and after, soft caps, and local attention in every other layer."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bnlora.models.decoder_checkpoint import PATHS, llama_keys
from bnlora.models.decoder_config import DecoderConfig, Window, local_cycle, number, read_sizes, refuse
from bnlora.models.tensors import KeyMap

ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4096}
"""Values of transformers for keys that have other defaults in Llama."""

GEMMA_PATHS = PATHS | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def keys(config: DecoderConfig) -> KeyMap:
    """The key map. A stored gain is the difference of the factor from one."""
    return llama_keys(config, paths=GEMMA_PATHS, gain=_gain)


def _gain(stored: np.ndarray) -> np.ndarray:
    return 1 + stored


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    return DecoderConfig(
        **read_gemma(config, (True, False)),
        attention_cap=number(config, "attn_logit_softcapping", 50.0),
        logit_cap=number(config, "final_logit_softcapping", 30.0),
    )


def read_gemma(config: Mapping[str, Any], cycle: tuple[bool, ...]) -> dict[str, Any]:
    """Arguments of `DecoderConfig` that Gemma 2 and 3 read in the same way.

    Args:
        config: The parsed config.json.
        cycle: Which layers are local, unless the configuration has `layer_types`.
    """
    refuse(config, ("attention_bias", "use_bidirectional_attention"), "Gemma")
    known = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    # Old files name an exact gelu in "hidden_act" that no implementation uses; "hidden_activation" holds.
    known.pop("hidden_act", None)
    sizes = read_sizes(known, activations=("gelu_pytorch_tanh",))
    query = number(known, "query_pre_attn_scalar", 256.0)
    return sizes | {
        "post_norms": True,
        "embed_scale": sizes["d_model"] ** 0.5,
        "query_scale": (query or 256.0) ** -0.5,
        "window": Window(known["sliding_window"], local_cycle(known, cycle)),
    }
