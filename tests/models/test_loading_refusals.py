"""Defective checkpoints: every one raises an error of one sentence, before it costs memory."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from builders.checkpoint_files import CONFIG, TENSORS, VOCABULARY, tokenizer, write_folder, write_gguf

from bnlora._util import files
from bnlora.base import load
from bnlora.models import families, llama, loading
from bnlora.models.decoder_config import DecoderConfig
from bnlora.models.loading import Checkpoint

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


def refused(source, kind=ValueError) -> str:
    """The error message for a checkpoint: one sentence of a reasonable length."""
    with pytest.raises(kind) as error:
        load(source)
    assert len(str(error.value)) < 1200
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Whatever loading imports has been imported, which takes long where memory is traced."""
    load(write_folder(tmp_path_factory.mktemp("imported") / "tiny"))


@pytest.fixture
def little_memory(imported):
    """The test allocates less than a model of the stated sizes would."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("key", SIZES)
def test_sizes_are_positive_integers(key):
    for value in ("3", 3.0, True, 0, -1, [3], float("nan"), 10**4000):
        with pytest.raises(
            ValueError, match=f"{key} in the model .* an integer from 1 to 2147483647"
        ) as error:
            llama.read_config(CONFIG | {key: value})
        assert len(str(error.value)) < 200


NUMBERS = {
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps in the model .* must be a positive number; got -1"),
    "eps nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps .* must be a positive number; got nan"),
    "eps word": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .* must be a positive number; got '1e-5'"),
    "theta": ({"rope_theta": -5}, "rope_theta .* must be a positive number; got -5"),
    "theta zero": ({"rope_theta": 0}, "rope_theta .* must be a positive number; got 0"),
    "theta beside scaling": ({"rope_parameters": {"rope_theta": True}}, "rope_theta .* number; got True"),
    "theta huge": ({"rope_theta": 10**400}, "rope_theta .* must be a positive number; got 1000"),
    "factor": (
        {"rope_scaling": LLAMA3 | {"factor": 0}},
        "factor of the 'llama3' rotary scaling must be a pos",
    ),
    "factors": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "must be below the high one; got 1.0 and",
    ),
    "scaling": ({"rope_scaling": "linear"}, "rope_scaling in the model .* must be an object; got 'linear'"),
    "kind": ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rotary scaling \['llama3'\] is not supported"),
    "tied": ({"tie_word_embeddings": "false"}, "tie_word_embeddings .* must be true or false; got 'false'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights .* has 'quantization_config'"),
}


@pytest.mark.parametrize(("change", "message"), NUMBERS.values(), ids=NUMBERS)
def test_values_that_give_no_model(change, message):
    with pytest.raises(ValueError, match=message):
        llama.read_config(CONFIG | change)


def test_the_configuration_of_a_model_of_ones_own_is_checked_as_well():
    good = llama.read_config(CONFIG)
    values = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(ValueError, match="num_layers must be an integer from 1 to 2147483647; got 3.0"):
        DecoderConfig(**values | {"num_layers": 3.0})
    with pytest.raises(ValueError, match="norm_eps must be a positive number; got nan"):
        DecoderConfig(**values | {"norm_eps": float("nan")})


@pytest.mark.parametrize("stated", [[], "LlamaForCausalLM", {}])
def test_architectures_are_a_list(tmp_path, stated):
    said = refused(write_folder(tmp_path / "tiny", config=CONFIG | {"architectures": stated}))
    assert said.startswith("architectures in the model configuration must be a non-empty list; got")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("layers", [4, 5000, 1_000_000])
def test_layers_that_the_files_have_not_cost_nothing(tmp_path, layers):
    folder = write_folder(tmp_path / "tiny", config=CONFIG | {"num_hidden_layers": layers})
    if layers == 4:
        assert "missing: model.layers.3.self_attn.q_proj.weight, model.layers.3" in refused(folder)
        assert refused(folder).endswith(" and 4 more")
        return
    for path in (folder, write_gguf(tmp_path / "tiny.gguf", stated={"llama.block_count": layers})):
        assert refused(path) == (
            f"the configuration states {layers:,} layers, but the checkpoint has only 3 (30 tensors in all)"
        )


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_widths_that_the_files_have_not_cost_nothing(tmp_path, key):
    said = refused(write_folder(tmp_path / "tiny", config=CONFIG | {key: 10**9}))
    assert said.startswith(
        "the tensors of the checkpoint do not fit its configuration; of the wrong shape: model"
    )


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_weights_are_finite_numbers(tmp_path, name, value):
    """The last is a float64 that float32 cannot hold."""
    wrong = TENSORS[name].astype(np.float64)
    wrong[1, 2] = value
    said = f"the tensor '{name}' has 1 of {wrong.size:,} numbers that are NaN or infinite in float32; "
    assert refused(write_folder(tmp_path / "tiny", TENSORS | {name: wrong}, dtype=None)).startswith(said)
    with np.errstate(over="ignore"):
        single = wrong.astype(np.float32)
    with pytest.raises(ValueError, match=f"'{name}' has 1 of"):
        families.build(Checkpoint(CONFIG, TENSORS | {name: single}, None))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(np.int32, "I32"), (np.uint8, "U8"), (bool, "BOOL"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")],
)
def test_tensors_are_of_floats(tmp_path, dtype, kind):
    name = "model.layers.2.self_attn.k_proj.weight"
    wrong = TENSORS | {name: TENSORS[name].astype(dtype)}
    assert refused(write_folder(tmp_path / "tiny", wrong, dtype=None)).endswith(
        f"of an unsupported type: {name} {kind}"
    )


def test_integers_in_a_gguf_are_no_weights(tmp_path):
    wrong = {"blk.1.ffn_up.weight": np.ones((56, 32), np.int32), "output.weight": np.ones((61, 32), np.int8)}
    assert refused(write_gguf(tmp_path / "tiny.gguf", extra=wrong)).endswith(
        "of an unsupported type: model.layers.1.mlp.up_proj.weight I32, lm_head.weight I8"
    )
    wrong = {"blk.1.ffn_up.weight": np.full((56, 32), np.nan, np.float16)}
    said = refused(write_gguf(tmp_path / "x.gguf", extra=wrong))
    assert "up_proj.weight' has 1,792 of 1,792 numbers" in said


NAMES = ["../../x.safetensors", "/tmp/x.safetensors", "sub/x", "..", "", "a\\b", "C:x", "a\0b", 3, ["x"]]


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_files_inside_its_folder(tmp_path, name):
    folder = write_folder(tmp_path / "tiny", shards=3)
    index = json.loads((folder / loading.INDEX).read_text())["weight_map"]
    (folder / loading.INDEX).write_text(json.dumps({"weight_map": index | {"lm_head.weight": name}}))
    said = f"must name files inside its folder, without a path; got {name!r} for the tensor 'lm_head.weight'"
    assert said in refused(folder)


def test_an_index_of_links_is_read_as_in_the_cache_of_the_hub(tmp_path):
    folder = write_folder(tmp_path / "tiny", shards=3)
    (tmp_path / "blobs").mkdir()
    for path in folder.glob("*.safetensors"):
        (tmp_path / "blobs" / path.name).write_bytes(path.read_bytes())
        path.unlink()
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert load(folder).num_layers == 3


def test_messages_of_an_index_name_five_files_and_a_number(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    index = {f"t{i}": f"{i:06}" for i in range(1000)}
    (folder / loading.INDEX).write_text(json.dumps({"weight_map": index}))
    said = refused(folder, FileNotFoundError)
    assert "lacks ['000000', '000001', '000002', '000003', '000004' and 995 more]; it has" in said
    index = {f"model-{i}.safetensors": f"model-{i}.safetensors" for i in range(2)}
    for name in index:
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / loading.INDEX).write_text(json.dumps({"weight_map": index}))
    assert "have the same tensors: lm_head.weight, model.embed_tokens.weight, " in refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_files_of_deep_nesting(tmp_path, text):
    folder = write_folder(tmp_path / "tiny")
    for name in ("tokenizer_config.json", "tokenizer.json", loading.INDEX, "config.json"):
        (folder / name).write_text(text)
        expected = "no readable tokenizer" if "tokenizer" in name else "JSON (it is nested too deeply)"
        assert expected in refused(folder)


@pytest.mark.parametrize("limit", ["512", -1, True, float("nan"), [512]])
def test_the_limit_of_a_tokenizer_is_a_number(tmp_path, limit):
    folder = write_folder(tmp_path / "tiny")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    said = refused(folder)
    assert said.startswith("model_max_length of the tokenizer must be a positive number; got ")


def test_files_of_absurd_size(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "tiny")
    monkeypatch.setattr(loading, "_LARGEST_TOKENIZER", 1000)
    assert "tokenizer.json' has" in refused(folder)
    assert "bytes; files of a tokenizer may have at most 1,000" in refused(folder)
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    assert "bytes; JSON files may have at most 100" in refused(folder)
    (folder / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    monkeypatch.setattr(files, "LARGEST_JSON", 10_000)
    assert "is not valid JSON (Exceeds the limit" in refused(folder)


def test_tokens_that_the_embedding_has_no_row_for(tmp_path):
    more = [*VOCABULARY, "<x>", "<y>"]
    expected = (
        "the tokenizer has the token '<x>' of id 61, which the model has not: the tokenizer has 63 tokens, "
        "the embedding 61 rows; resize the embedding, or load the model with its own tokenizer"
    )
    assert refused(write_gguf(tmp_path / "tiny.gguf", tokens=more)) == expected
    folder = write_folder(tmp_path / "tiny")
    added = tokenizer()
    added.add_tokens(["<x>", "<y>"])
    added.save_pretrained(folder)
    assert refused(folder) == expected


def test_a_token_for_padding_needs_no_row(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    added = tokenizer()
    added.add_special_tokens({"pad_token": "<pad>"})
    added.save_pretrained(folder)
    base = load(folder)
    assert base.tokenizer.pad_token_id == len(VOCABULARY) == base.config.vocab_size


# Bytes of GGUF files that no writer makes -----------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def array(kind: int, length: int) -> bytes:
    """A file of one list of the metadata, without its values: 49 bytes."""
    return header(0, 1) + text("k") + struct.pack("<IIQ", 9, kind, length)


def tensor(*dims: int) -> bytes:
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return header(1, 0) + text("t") + sizes + struct.pack("<IQ", 0, 0) + bytes(64)


ABSURD = {
    **{f"list of kind {kind}": array(kind, 2**34) for kind in (0, 6, 8)},
    "shorter list": array(8, 2**20),
    "long list": array(0, 2**23) + bytes(2**23),
    "lists of lists": header(0, 1) + text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000,
    "counts": header(2**60, 2**60),
    "string": header(0, 1) + struct.pack("<Q", 2**62) + bytes(100),
    "dimensions": tensor(2**32, 2**32),
    "length": tensor(2**62),
    "beyond the end": tensor(1000),
    "many dimensions": tensor(*[1] * 70),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("content", ABSURD.values(), ids=ABSURD)
def test_sizes_that_a_gguf_is_too_short_for(tmp_path, content):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    assert "tiny.gguf' is corrupt or truncated, copy or download it again (" in refused(path)


METADATA = {
    "llama.block_count": (3.0, "3", True, [3], -1, 0),
    "llama.attention.head_count": (0, [4]),
    "llama.attention.layer_norm_rms_epsilon": (-1.0, float("nan"), "x"),
    "llama.rope.freq_base": (-5.0, 0.0, "x"),
    "llama.rope.scaling.type": ("linear", 3, ["none"]),
    "llama.rope.dimension_count": (7, "8", 0),
    "tokenizer.ggml.tokens": ("x", [1, 2], 3),
    "tokenizer.ggml.merges": ("a b", [1], ["a"], ["a b c"], ["zz qq"]),
    "tokenizer.ggml.token_type": (3, ["a"], [3]),
    "tokenizer.ggml.pre": (["smollm"], 3),
    "tokenizer.ggml.bos_token_id": (-1, 61, "x", 1.5, True),
    "tokenizer.ggml.padding_token_id": (999,),
    "tokenizer.ggml.add_space_prefix": ("x", 3),
    "tokenizer.chat_template": (3, ["x"]),
    "general.architecture": (3, ["llama"]),
    "split.count": (3, "x", -1),
}


@pytest.mark.parametrize("key", METADATA)
def test_metadata_of_a_gguf_has_its_types(tmp_path, key):
    """Neither another exception nor acceptance of a model with this value."""
    for i, value in enumerate(METADATA[key]):
        refused(write_gguf(tmp_path / f"tiny{i}.gguf", stated={key: value}))


def test_a_gguf_tensor_without_dimensions_is_refused(tmp_path):
    """Found by `tests/project/test_fuzz.py`: a changed byte had made the number of dimensions zero."""
    path = write_gguf(tmp_path / "tiny.gguf", extra={"blk.0.x": np.array(1.0, np.float32)})
    assert refused(path).endswith("(tensor 'blk.0.x' has no dimensions)")
