"""Reading GGUF files of the Llama family into Hugging Face terms.

GGUF differs in three ways, which this module reverses. Weights are quantised. The rows of the query and key
projections are ordered for rotation of neighbouring pairs (0, 1), (2, 3), ... within a head, whereas Hugging
Face rotates (0, d/2), (1, d/2 + 1), ... Vocabulary, merges and chat template are in the metadata.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlora._util.checks import brief, check_indices, check_size
from bnlora.models.tensors import Stored

if TYPE_CHECKING:  # otherwise imported at first use: it takes longer than the rest of the library
    from tokenizers import Tokenizer
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
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# The metadata of a tokenizer that is used, by type.
_LISTS: dict[str, type] = {"tokens": str, "merges": str, "token_type": int}
_SINGLE: dict[str, type] = {"model": str, "pre": str, "add_space_prefix": bool, "add_bos_token": bool}
_SINGLE |= {"chat_template": str} | {f"{role}_token_id": int for role in _ROLES.values()}
# Names of the rules that split text before the merges apply, and whether they split off every digit.
_CUTS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def read_gguf(path: Path) -> "tuple[dict[str, Any], dict[str, Stored], PreTrainedTokenizerFast]":
    """Read a GGUF file of the Llama family, or all parts of a split one.

    Args:
        path: The file, or any part of a split one.

    Returns:
        The configuration, the headers of the tensors (read as float32), and the tokenizer, with the keys and
        names of Hugging Face.

    Raises:
        FileNotFoundError: If a part of a split file is missing.
        ValueError: If the file is corrupt or truncated, or its architecture, quantisation or tokenizer is not
            supported.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{str(path)!r} is not a GGUF file (it does not start with 'GGUF')")
    from bnlora.models.gguf_file import read_parts

    metadata, tensors = read_parts(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{str(path)!r} has the architecture {brief(architecture)}; supported: ['llama']")
    _check_metadata(path, metadata)
    config = _config(path, metadata, {tensor.name: tensor for tensor in tensors})
    stored = dict(_stored(path, tensor, config) for tensor in tensors)
    return config, stored, _tokenizer(path, metadata)


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the metadata has all required keys, with values of the right types."""
    needed = [*(f"llama.{key}" for key in _CONFIG.values()), "tokenizer.ggml.tokens", "tokenizer.ggml.merges"]
    absent = [key for key in needed if key not in metadata]
    if absent:
        raise ValueError(f"{str(path)!r} lacks the metadata {absent}")
    sizes = [key for key in needed if key.startswith("llama.") and not key.endswith("epsilon")]
    check_size({f"{key} in {str(path)!r}": metadata[key] for key in sizes})
    stated = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    for key, value in stated.items():
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        if name in _LISTS and not (isinstance(value, list) and all(type(x) is _LISTS[name] for x in value)):
            wanted = f"a list of {_LISTS[name].__name__}"
        elif name in _SINGLE and type(value) is not _SINGLE[name]:
            wanted = _SINGLE[name].__name__
        else:
            continue
        raise ValueError(f"{key} in {str(path)!r} must be {wanted}; got {brief(value)}")
    tokens, kinds = (len(stated.get(f"tokenizer.ggml.{key}", [])) for key in ("tokens", "token_type"))
    if kinds not in (0, tokens):
        raise ValueError(f"{str(path)!r} has {tokens:,} tokens, but the kinds of {kinds:,}")


def _config(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{str(path)!r} stretches its rotary frequencies by a tensor (rope_freqs.weight), which is not "
            "supported; use the Hugging Face folder of the same model"
        )
    scaling = metadata.get("llama.rope.scaling.type", "none")
    embedding = tensors.get("token_embd.weight")
    tokens = len(metadata["tokenizer.ggml.tokens"])
    return {ours: metadata[f"llama.{theirs}"] for ours, theirs in _CONFIG.items()} | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        # The embedding can have more rows than there are tokens, to reach a round number.
        "vocab_size": int(embedding.shape[-1]) if embedding is not None and len(embedding.shape) else tokens,
        "head_dim": metadata.get("llama.rope.dimension_count"),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "rope_scaling": {"rope_type": "default" if scaling == "none" else scaling},
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _stored(path: Path, tensor: Any, config: Mapping[str, Any]) -> tuple[str, Stored]:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", tensor.name)
    name = tensor.name  # an unknown tensor keeps its name and is reported as unexpected
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
                f"{tensor.tensor_type.name}, which is not supported; use for instance Q8_0, Q4_1 or F16"
            ) from error
        return values if heads is None else _unpermute(values, config[heads])

    # Quantised blocks are read as floats; plain integers are not supported.
    kind = tensor.tensor_type.name
    kind = kind if re.fullmatch(r"I\d+", kind) else "float32"
    return name, Stored(tuple(map(int, tensor.shape[::-1])), kind, read)


def _unpermute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows from neighbouring pairs to pairs half a head apart; shape (out, in)."""
    if weights.shape[0] % (2 * heads):
        return weights  # the shape does not fit the configuration; `check_tensors` reports it
    # (head, pair, 2, in) to (head, 2, pair, in).
    return weights.reshape(heads, -1, 2, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape)


def _tokenizer(path: Path, metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    cut = values.get("pre")
    if values.get("model") != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{str(path)!r} has a tokenizer of kind {values.get('model')!r} with the cut {cut!r}; supported "
            f"is 'gpt2' with one of {sorted(_CUTS)}, otherwise use the Hugging Face folder of the same model"
        )
    tokens = values["tokens"]
    backend = _merging(path, tokens, values["merges"])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=values.get("add_space_prefix", False))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _CUTS[cut] else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, values.get("token_type", [_NORMAL] * len(tokens)), strict=True))
    control = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    special = {f"{role}_token": values.get(f"{key}_token_id") for role, key in _ROLES.items()}
    special = {role: index for role, index in special.items() if index is not None}
    for role, index in special.items():
        check_indices(f"the id of the {role} in {str(path)!r}", index, len(tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        add_bos_token=bool(values.get("add_bos_token", False)),
        **{role: tokens[index] for role, index in special.items()},
    )


def _merging(path: Path, tokens: list[str], merges: list[str]) -> "Tokenizer":
    """A tokenizer from tokens and merges, the pairs of tokens that are joined."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    wrong = [merge for merge in merges if merge.count(" ") != 1]
    if wrong:
        raise ValueError(f"merges of {str(path)!r} must be of two tokens each; got {brief(wrong)}")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    try:
        return Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{str(path)!r} has no readable tokenizer ({str(error)[:200]})") from error
