"""How each family is written to GGUF, in the terms of its Hugging Face checkpoint.

Only what differs from Llama is stated: further tensors and keys, and numbers that the converter changes. It
reorders the rows of queries and keys of Llama, and adds one to the gains of Gemma.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of a layer."""

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
"""Keys of config.json and of the metadata, where the name of the architecture precedes them."""

_GEMMA_TENSORS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufFamily:
    """How a family is written.

    Attributes:
        model_type: Its `model_type` in config.json.
        architecture: Its class in transformers.
        tensors: Tensors of a layer.
        optional: Keys that a file may lack.
        permuted: Whether the rows of queries and keys are reordered.
        added: What the converter adds to the gains of norms.
        more: Further keys of config.json, from those that were read.
    """

    model_type: str
    architecture: str
    tensors: Mapping[str, str] = field(default_factory=lambda: TENSORS)
    optional: Mapping[str, str] = field(default_factory=lambda: {"head_dim": "attention.key_length"})
    permuted: bool = False
    added: float = 0.0
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}


def _gemma2(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return _query_scale(config, largest=46)


def _gemma3(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return _query_scale(config, largest=62)


def _query_scale(config: Mapping[str, Any], *, largest: int) -> Mapping[str, Any]:
    """The scale of the scores is not in the file: that of the largest model follows another rule."""
    if config["num_hidden_layers"] != largest:
        return {"query_pre_attn_scalar": config["head_dim"]}
    return {"query_pre_attn_scalar": config["hidden_size"] / config["num_attention_heads"]}


_GEMMA_KEYS = {"head_dim": "attention.key_length", "sliding_window": "attention.sliding_window"}

GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        # Mistral's files have this architecture too.
        "llama": GgufFamily(
            "llama", "LlamaForCausalLM", optional={"head_dim": "rope.dimension_count"}, permuted=True
        ),
        "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM"),
        "qwen3": GgufFamily("qwen3", "Qwen3ForCausalLM"),
        "gemma2": GgufFamily(
            "gemma2",
            "Gemma2ForCausalLM",
            tensors=TENSORS | _GEMMA_TENSORS,
            optional=_GEMMA_KEYS
            | {
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            added=1.0,
            more=_gemma2,
        ),
        "gemma3": GgufFamily(
            "gemma3_text",
            "Gemma3ForCausalLM",
            tensors=TENSORS | _GEMMA_TENSORS,
            optional=_GEMMA_KEYS,
            added=1.0,
            more=_gemma3,
        ),
    }
)
"""Families by `general.architecture`."""
