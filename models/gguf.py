"""Reading GGUF files of the Llama family into Hugging Face terms.

GGUF differs in three ways that are undone here. Weights are quantised. The rows of the query and key
projections are ordered for rotation of neighbouring pairs (0, 1), (2, 3), ... within a head, where Hugging
Face rotates (0, d/2), (1, d/2 + 1), ... And vocabulary, merges and chat template sit in the metadata.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # imported where it is used: it takes longer than the rest of the library
    from transformers import PreTrainedTokenizerFast

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
# Names of the rules that cut text before the merges apply, and whether they cut off every single digit.
_CUTS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_CONTROL, _USER_DEFINED = 3, 4


def read_gguf(
    path: Path,
) -> "tuple[dict[str, Any], dict[str, Callable[[], np.ndarray]], PreTrainedTokenizerFast]":
    """Read a GGUF file of the Llama family.

    Args:
        path: The file.

    Returns:
        The configuration, one function per tensor that reads it as float32, and the tokenizer; keys and names
        are those of Hugging Face.

    Raises:
        ValueError: If the file is corrupt or truncated, or its architecture, quantisation or tokenizer is not
            supported.
    """
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{str(path)!r} is not a GGUF file (it does not start with 'GGUF')")
    try:
        reader = GGUFReader(path)
        metadata = {name: entry.contents() for name, entry in reader.fields.items()}
    except Exception as error:  # the reader does no checks of its own: any error here means unreadable bytes
        raise ValueError(
            f"{str(path)!r} is corrupt or truncated, copy or download it again "
            f"({type(error).__name__}: {error})"
        ) from error
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{str(path)!r} has the architecture {architecture!r}; supported: ['llama']")
    config = _config(path, metadata, {tensor.name for tensor in reader.tensors})
    readers = dict(_tensor_reader(path, tensor, config) for tensor in reader.tensors)
    return config, readers, _tokenizer(path, metadata)


def _config(path: Path, metadata: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    if "rope_freqs.weight" in names:
        raise ValueError(
            f"{str(path)!r} stretches its rotary frequencies by a tensor (rope_freqs.weight), which is not "
            "supported; use the Hugging Face folder of the same model"
        )
    absent = [f"llama.{key}" for key in _CONFIG.values() if f"llama.{key}" not in metadata]
    absent += [key for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges") if key not in metadata]
    if absent:
        raise ValueError(f"{str(path)!r} lacks the metadata {absent}")
    config = {ours: metadata[f"llama.{theirs}"] for ours, theirs in _CONFIG.items()}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    scaling = metadata.get("llama.rope.scaling.type", "none")
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "head_dim": metadata.get("llama.rope.dimension_count", head_dim),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": {"rope_type": "default" if scaling == "none" else scaling},
        "tie_word_embeddings": "output.weight" not in names,
    }


def _tensor_reader(
    path: Path, tensor: Any, config: Mapping[str, Any]
) -> tuple[str, Callable[[], np.ndarray]]:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", tensor.name)
    name = tensor.name  # one that is not known keeps its name and is reported as unexpected
    if block and block[2] in _TENSORS:
        name = f"model.layers.{block[1]}.{_TENSORS[block[2]]}.{block[3]}"
    elif outer and outer[1] in _TENSORS:
        name = f"{_TENSORS[outer[1]]}.{outer[2]}"
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(block[2] if block else "")

    def read() -> np.ndarray:
        from gguf import dequantize

        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"the tensor {tensor.name!r} of {str(path)!r} has the quantisation "
                f"{tensor.tensor_type.name}, which cannot be read; use for instance Q8_0, Q4_1 or F16"
            ) from error
        return values if heads is None else _unpermute(values, config[heads])

    return name, read


def _unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows from neighbouring pairs to pairs half a head apart; (out, in) to (out, in)."""
    if weights.shape[0] % (2 * heads):
        return weights  # the shape does not fit the configuration, which is reported with all other tensors
    return weights.reshape(heads, -1, 2, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


def _tokenizer(path: Path, metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    cut = values.get("pre")
    if values.get("model") != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{str(path)!r} has a tokenizer of kind {values.get('model')!r} with the cut {cut!r}; supported "
            f"is 'gpt2' with one of {sorted(_CUTS)}, otherwise use the Hugging Face folder of the same model"
        )
    tokens = values["tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in values["merges"])]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=values.get("add_space_prefix", False))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _CUTS[cut] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, values.get("token_type", []), strict=False))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": values.get(f"{key}_token_id") for role, key in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        add_bos_token=bool(values.get("add_bos_token", False)),
        **{role: tokens[index] for role, index in special.items() if index is not None},
    )
