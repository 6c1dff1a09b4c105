"""GPT-2: LayerNorm, biases, learned positions, no gate. Kernels are stored (in, out), q, k and v in one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from bnlora._util.checks import brief, check_positive, check_size
from bnlora.models.decoder_config import ACTIVATIONS, DecoderConfig, flag, known_keys, refuse
from bnlora.models.tensors import KeyMap, Part, plain

ARCHITECTURE = "GPT2LMHeadModel"
_SIZES = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
_FUSED = ("q_proj", "k_proj", "v_proj")
_DENSE = {"o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"}
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a config.json with the keys of GPT-2; absent ones get the defaults of transformers.

    Raises:
        ValueError: If a value is wrong, or the model needs an unsupported feature.
    """
    unsupported = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
    refuse(config, unsupported, "GPT-2")
    known = _SIZES | known_keys(config, ())
    check_size({f"{key} in the model configuration": known[key] for key in _SIZES})
    width, heads = known["n_embd"], known["n_head"]
    inner, eps = known.get("n_inner", 4 * width), known.get("layer_norm_epsilon", 1e-5)
    check_size({"n_inner in the model configuration": inner})
    check_positive({"layer_norm_epsilon in the model configuration": eps})
    activation = known.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"the activation {brief(activation)} is not supported here; supported: {list(ACTIVATIONS)}"
        )
    if width % heads:
        raise ValueError(f"n_embd must be a multiple of n_head; got {width} and {heads}")
    return DecoderConfig(
        vocab_size=known["vocab_size"],
        d_model=width,
        d_ff=inner,
        num_layers=known["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        rope_theta=None,
        norm_eps=float(eps),
        tied=flag(known, "tie_word_embeddings", default=True),
        max_length=known["n_positions"],
        activation=ACTIVATIONS[activation],
        gated=False,
        norm="layer",
        biased=(*_FUSED, *_DENSE),
        query_scale=None if flag(known, "scale_attn_weights", default=True) else 1.0,
    )


def keys(config: DecoderConfig) -> KeyMap:
    """The key map. The names have "transformer." in front, except in the oldest files."""
    width, vocab = config.d_model, (config.vocab_size, config.d_model)
    layers: dict[str, Part] = {}
    for i, name in enumerate(_FUSED):
        third = partial(_columns, begin=i * width, end=(i + 1) * width)
        layers[name] = Part("attn.c_attn.weight", (width, 3 * width), third)
        layers[f"{name}_bias"] = Part("attn.c_attn.bias", (3 * width,), third)
    for name, path in _DENSE.items():
        shape = config.modules[name]
        layers[name] = Part(f"{path}.weight", shape, plain)
        layers[f"{name}_bias"] = Part(f"{path}.bias", shape[1:], plain)
    for name, path in _NORMS.items():
        layers[name] = Part(f"{path}.weight", (width,), plain)
        layers[f"{name}_bias"] = Part(f"{path}.bias", (width,), plain)
    outer = {
        "embedding": Part("transformer.wte.weight", vocab, plain),
        "positions": Part("transformer.wpe.weight", (config.max_length, width), plain),
        "final_norm": Part("transformer.ln_f.weight", (width,), plain),
        "final_norm_bias": Part("transformer.ln_f.bias", (width,), plain),
        "lm_head": Part("lm_head.weight", vocab, plain),
    }
    masks = r"transformer\.h\.\d+\.attn\.(masked_)?bias"
    return KeyMap(config.num_layers, layers, outer, "transformer.h.{}.", masks, omitted="transformer.")


def _columns(value: np.ndarray, *, begin: int, end: int) -> np.ndarray:
    return value[..., begin:end]
