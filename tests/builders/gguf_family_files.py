"""Tiny models of several families as GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from builders.families import reference

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(chr(ord("!") + i) for i in range(57))]


def gguf_name(name: str, gemma: bool) -> str:
    """llama.cpp's name of a tensor."""
    path, kind = name.rsplit(".", 1)
    layer = ""
    if path.startswith("model.layers."):
        _, _, number, path = path.split(".", 3)
        layer = f"blk.{number}."
    after = "post_attention_norm" if gemma else "ffn_norm"
    return layer + (NAMES | {"post_attention_layernorm": after})[path] + f".{kind}"


def write_family(path: Path, name: str, **stated: Any) -> Path:
    """The tiny model of a family, `name` of the reference's; `stated` is further metadata."""
    config, tensors = reference.FAMILIES[name], reference.family_tensors(reference.FAMILIES[name])
    architecture = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    integers = {
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
    }
    if "head_dim" in config:
        integers["attention.key_length"] = config["head_dim"]
    if architecture.startswith("gemma"):
        integers["attention.sliding_window"] = config["sliding_window"]
    for key, value in integers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{architecture}.rope.freq_base", config["rope_theta"])
    write_vocabulary(writer, TOKENS, scores=[0.0] * len(TOKENS))
    for key, value in stated.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    gemma = architecture.startswith("gemma")
    for key, value in tensors.items():
        added = np.float32(gemma and key.endswith("norm.weight"))
        writer.add_tensor(gguf_name(key, gemma), value + added)
    return finished(writer, path)


def write_vocabulary(writer: Any, tokens: Sequence[str], *, scores: Sequence[float]) -> None:
    """A sentencepiece vocabulary whose first four tokens are special."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types([3, 3, 3, 2, *[1] * (len(tokens) - 4)])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)


def finished(writer: Any, path: Path) -> Path:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
