"""The tiny reference Llama as a Hugging Face folder and as GGUF files, whole or with something wrong."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from builders.families import reference
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CONFIG = reference.CONFIGS["grouped"]
TENSORS = reference.tiny_tensors(CONFIG)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<|end|>", "<|user|>", *ALPHABET[: CONFIG["vocab_size"] - 4], "Ġ", "Ġ!"]
MERGES = [("Ġ", "!")]
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
TEXT = "a! 12  34 <|user|>!"


def tokenizer(tokens: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=MERGES))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(VOCABULARY[:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def write_folder(
    folder: Path, tensors=TENSORS, config=CONFIG, shards: int = 1, dtype=np.float32, tokens=VOCABULARY
) -> Path:
    """A Hugging Face folder; `dtype` None leaves every tensor as it is."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer(tokens).save_pretrained(folder)
    names = [list(tensors)[i::shards] for i in range(shards)]
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for file, part in zip(files, names, strict=True):
        save_file(
            {name: np.ascontiguousarray(tensors[name].astype(dtype or tensors[name].dtype)) for name in part},
            folder / file,
        )
    if shards > 1:
        index = {name: file for file, part in zip(files, names, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    drop: str = "",
    extra: Mapping[str, np.ndarray] = {},
    stated: Mapping[str, object] = {},
    tokens: Sequence[str] = VOCABULARY,
    parts_of: int = 0,
    kind: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A GGUF model, with some tensors and metadata changed, in files of `parts_of` tensors (0: one file).

    With `kind`, matrices whose rows have whole blocks are stored in this type.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts_of, small_first_shard=parts_of > 0)
    integers = {"embedding_length": 32, "feed_forward_length": 56, "block_count": 3, "context_length": 64}
    integers |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 8}
    for key, value in integers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 1000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in stated.items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, value in (gguf_tensors() | dict(extra)).items():
        if name != drop and kind is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        elif name != drop:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors() -> dict[str, np.ndarray]:
    """The tiny tensors under llama.cpp's names, with its order of query and key rows."""
    names = {
        "embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
    names |= {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {
        f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")
    }
    result = {}
    for name, value in TENSORS.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            pairs = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
            value = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        result[name.replace("model.", "").replace("self_attn.", "").replace("mlp.", "")] = value
    return result
