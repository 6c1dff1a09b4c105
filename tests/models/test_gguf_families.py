"""GGUF files of every family against the same model with Hugging Face's names, and their tokenizers."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
from builders.gguf_family_files import TOKENS, finished, reference, write_family, write_vocabulary
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GemmaTokenizer, Qwen2Tokenizer

from bnlora.models import families, gguf_tokenizer
from bnlora.models.gguf_families import GGUF_FAMILIES
from bnlora.models.loading import Checkpoint, read_checkpoint

# Keys that a GGUF file does not have get the values of transformers; the tiny models have others.
CASES = {
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {
        "query_pre_attn_scalar": 8,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "rope_scaling": None,
    },
}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}
TEXTS = ["low lower  lowest", "new\nnewer", "éclair 12 lows", "", " wide", "<pad>low"]


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_same_model_as_the_folder(tmp_path, name):
    path = write_family(tmp_path / "tiny.gguf", name, **(CAPS if name == "gemma2" else {}))
    config = reference.FAMILIES[name]
    same = families.build(Checkpoint(config | CASES[name], reference.family_tensors(config), None))
    read = read_checkpoint(path)
    model = families.build(read)
    eps = pytest.approx(same.config.norm_eps, rel=1e-7)
    assert model.config.norm_eps == eps
    assert replace(model.config, norm_eps=same.config.norm_eps) == same.config
    for weights, expected in ((model.layers, same.layers), (model, same)):
        for key in ("q_proj", "down_proj", "attention_norm", "embedding", "final_norm", "q_proj_bias"):
            ours, theirs = (getattr(x, "get", vars(x).get)(key) for x in (weights, expected))
            assert (ours is None) == (theirs is None)
            if ours is not None:  # Gemma's gains lose the last bit on the way
                np.testing.assert_allclose(ours[...], theirs[...], rtol=1e-6, atol=2e-7)
    assert read.tokenizer.convert_ids_to_tokens(list(range(61))) == TOKENS


@pytest.mark.parametrize(("layers", "scalar"), [(46, 144.0), (2, 8)])
def test_the_largest_gemma_2_scales_its_scores_by_the_width_of_a_head(layers, scalar):
    family = GGUF_FAMILIES["gemma2"]
    sizes = {"num_hidden_layers": layers, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 8}
    assert family.more(sizes) == {"query_pre_attn_scalar": scalar}


def test_scores_give_the_merges_of_sentencepiece():
    """Against transformers' Gemma tokenizer with the merges from which the scores were made."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(special_tokens=special, vocab_size=330, show_progress=False)
    backend.train_from_iterator(["▁low▁lower▁lowest▁new▁newer▁newest▁wide▁wider\n12"] * 9, trainer)
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    first = next(i for i, token in enumerate(tokens) if len(token) > 1 and i >= len(special))
    scores = [0.0] * first + [-float(i) for i in range(len(tokens) - first)]
    merges = gguf_tokenizer.scored_merges(tokens, [-1e9] * len(special) + scores[len(special) :])
    expected = GemmaTokenizer(vocab=vocabulary, merges=merges_of(backend))
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [3, 3, 3, 2, *[6] * 256, *[1] * (len(tokens) - 260)],
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    got = gguf_tokenizer.read_tokenizer("tiny.gguf", values, 64)
    assert set(merges_of(backend)) <= set(merges)
    for text in TEXTS:
        ids = got(text, add_special_tokens=False).input_ids
        assert ids == expected(text, add_special_tokens=False).input_ids
        assert got.decode(ids) == text
        assert got(text).input_ids == [2, *ids]


def merges_of(backend) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def test_the_cut_of_qwen_is_that_of_transformers():
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<|endoftext|>"],
        vocab_size=290, show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXTS * 9, trainer)
    vocabulary, merges = backend.get_vocab(), merges_of(backend)
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }
    got = gguf_tokenizer.read_tokenizer("tiny.gguf", values, 64)
    expected = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    for text in [*TEXTS, "I'll pay 1234 now", "e\u0301", "a  \n b", "I'LL"]:
        assert got(text).input_ids == expected(text).input_ids, text


def test_a_list_of_scores_must_fit(tmp_path):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    for key in ("embedding_length", "feed_forward_length", "block_count", "context_length"):
        writer.add_uint32(f"gemma3.{key}", 8)
    for key in ("head_count", "head_count_kv"):
        writer.add_uint32(f"gemma3.attention.{key}", 2)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    write_vocabulary(writer, TOKENS, scores=[0.0] * 3)
    with pytest.raises(ValueError, match=r"has 61 tokens, but the scores of 3"):
        read_checkpoint(finished(writer, path))
