"""Phi-3: a Llama that stores q, k and v in one matrix, and the two inner projections in another."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bnlora.models.decoder_checkpoint import llama_keys
from bnlora.models.decoder_config import DecoderConfig, Window, read_sizes
from bnlora.models.tensors import KeyMap, Part

ARCHITECTURE = "Phi3ForCausalLM"
FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
"""Modules whose rows are stored in one matrix, in this order."""


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json; the stretching of angles for long texts ("longrope") is refused.

    Raises:
        ValueError: If keys are missing or wrong, or the model needs an unsupported feature.
    """
    length = config.get("sliding_window")
    sizes = read_sizes({"rms_norm_eps": 1e-5} | dict(config))
    return DecoderConfig(**sizes, window=None if length is None else Window(length))


def keys(config: DecoderConfig) -> KeyMap:
    """The key map, with the parts of the fused matrices."""
    plain = llama_keys(config)
    layers = dict(plain.layers)
    for path, names in FUSED.items():
        ends = np.cumsum([0, *(config.modules[name][1] for name in names)]).tolist()
        for name, begin, end in zip(names, ends[:-1], ends[1:], strict=True):
            read = partial(_rows, begin=begin, end=end)
            layers[name] = Part(f"{path}.weight", (ends[-1], config.d_model), read)
    return replace(plain, layers=layers)


def _rows(value: np.ndarray, *, begin: int, end: int) -> np.ndarray:
    return value[begin:end].T
