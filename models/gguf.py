"""Reading GGUF files into Hugging Face terms.

GGUF differs in three ways, which this module reverses. Weights are quantised. In the files of Llama the rows
of the query and key projections are ordered for rotation of neighbouring pairs (0, 1), (2, 3), ... within a
head, whereas Hugging Face rotates (0, d/2), (1, d/2 + 1), ... The tokenizer is in the metadata
(`bnlora.models.gguf_tokenizer`). What else differs by family is in `bnlora.models.gguf_families`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from bnlora._util.checks import brief, check_size
from bnlora.models.gguf_families import GGUF_FAMILIES, OUTER, REQUIRED, GgufFamily
from bnlora.models.gguf_tokenizer import check_tokenizer, read_tokenizer
from bnlora.models.storage import Blocks
from bnlora.models.tensors import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bnlora.models.gguf_file import GgufTensor


def read_gguf(path: Path) -> "tuple[dict[str, Any], dict[str, Stored], PreTrainedTokenizerFast]":
    """Read a GGUF file, or all parts of a split one.

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
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise ValueError(
            f"{str(path)!r} has the architecture {brief(architecture)}; supported: {list(GGUF_FAMILIES)}; of "
            "other models use the Hugging Face folder"
        )
    family = GGUF_FAMILIES[architecture]
    _check_sizes(path, metadata, architecture)
    check_tokenizer(path, metadata)
    config = _config(path, metadata, architecture, {tensor.name: tensor for tensor in tensors})
    stored = dict(_stored(path, tensor, config, family) for tensor in tensors)
    length = metadata[f"{architecture}.context_length"]
    return config, stored, read_tokenizer(path, metadata, length)


def _check_sizes(path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
    """Raise `ValueError` unless the metadata has all required sizes."""
    needed = [*(f"{architecture}.{key}" for key in REQUIRED.values()), "tokenizer.ggml.tokens"]
    absent = [key for key in needed if key not in metadata]
    if absent:
        raise ValueError(f"{str(path)!r} lacks the metadata {absent}")
    sizes = [key for key in needed if key.startswith(architecture) and not key.endswith("epsilon")]
    check_size({f"{key} in {str(path)!r}": metadata[key] for key in sizes})


def _config(
    path: Path, metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{str(path)!r} stretches its rotary frequencies by a tensor (rope_freqs.weight), which is not "
            "supported; use the Hugging Face folder of the same model"
        )
    family = GGUF_FAMILIES[architecture]
    own = {
        ours: metadata.get(f"{architecture}.{theirs}")
        for ours, theirs in {**REQUIRED, **family.optional}.items()
    }
    own = {key: value for key, value in own.items() if value is not None}
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    embedding = tensors.get("token_embd.weight")
    tokens = len(metadata["tokenizer.ggml.tokens"])
    return dict(own) | {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        # The embedding can have more rows than there are tokens, to reach a round number.
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else tokens,
        "rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0),
        "rope_scaling": {"rope_type": "default" if scaling == "none" else scaling}
        | ({} if factor is None else {"factor": factor}),
        "tie_word_embeddings": "output.weight" not in tensors,
        **family.more(own),
    }


def _stored(
    path: Path, tensor: "GgufTensor", config: Mapping[str, Any], family: GgufFamily
) -> tuple[str, Stored]:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", tensor.name)
    name = tensor.name  # an unknown tensor keeps its name and is reported as unexpected
    if block and block[2] in family.tensors:
        name = f"model.layers.{block[1]}.{family.tensors[block[2]]}.{block[3]}"
    elif outer and outer[1] in OUTER:
        name = f"{OUTER[outer[1]]}.{outer[2]}"
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(block[2] if block else "")
    added = family.added if name.endswith("norm.weight") else 0.0
    grain = _rows_of_head(tensor.shape, config[heads]) if heads and family.permuted else 1

    def read(begin: int = 0, end: int | None = None) -> np.ndarray:
        values = _unpermute(_dequantised(path, tensor, tensor.read(begin, end)), grain)
        return values - np.float32(added) if added else values

    def blocks(begin: int, end: int) -> Blocks:
        return gguf_blocks(_unpermute(tensor.read(begin, end), grain), tensor.kind)

    # Quantised blocks are read as floats; plain integers are not supported.
    kind = tensor.kind if re.fullmatch(r"I\d+", tensor.kind) else "float32"
    return name, Stored(tensor.shape, kind, read, grain, blocks if tensor.kind in _FOUR_BITS else None)


_FOUR_BITS = ("Q4_0", "Q4_1")


def gguf_blocks(rows: UInt8[np.ndarray, "n bytes"], kind: str) -> Blocks:
    """The bytes of Q4_0 or Q4_1 rows as blocks: a scale, an offset in Q4_1 (-8 scales in Q4_0), 32 codes."""
    head = 2 if kind == "Q4_0" else 4
    parts = rows.reshape(len(rows), -1, head + 16)
    numbers = np.ascontiguousarray(parts[..., :head]).view(np.float16)
    scales, offset = numbers[..., 0], -8 * numbers[..., 0] if kind == "Q4_0" else numbers[..., 1]
    return Blocks(parts[..., head:], scales, offset)


def _dequantised(path: Path, tensor: "GgufTensor", rows: np.ndarray) -> np.ndarray:
    from gguf import dequantize

    try:
        return dequantize(rows, tensor.header.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"the tensor {tensor.name!r} of {str(path)!r} has the quantisation {tensor.kind}, which is not "
            "supported; use for instance Q8_0, Q4_1 or F16"
        ) from error


def _rows_of_head(shape: tuple[int, ...], heads: int) -> int:
    """Rows of a head; one if the shape does not fit the configuration, which `KeyMap.check` reports."""
    return 1 if shape[0] % (2 * heads) else shape[0] // heads


def _unpermute(rows: np.ndarray, grain: int) -> np.ndarray:
    """Reorder the rows of heads from neighbouring pairs to pairs half a head apart; (out, in)."""
    if grain == 1:
        return rows
    # (head, pair, 2, in) to (head, 2, pair, in).
    return rows.reshape(-1, grain // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
