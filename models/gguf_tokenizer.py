"""The tokenizer in the metadata of a GGUF file, as a fast tokenizer of transformers.

Two kinds exist. "gpt2": bytes as letters, cut by a rule with a name, then merges in a stated order. "llama":
sentencepiece's, with "▁" for a space and a score for each token; the two neighbours whose union has the best
score are joined first, so the scores give the order of the merges.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnlora._util.checks import brief, check_indices

if TYPE_CHECKING:  # otherwise imported at first use: it takes longer than the rest of the library
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# The metadata of a tokenizer that is used, by type.
LISTS: dict[str, type] = {"tokens": str, "merges": str, "token_type": int, "scores": float}
SINGLE: dict[str, type] = {"model": str, "pre": str, "add_space_prefix": bool, "add_bos_token": bool}
SINGLE |= {"chat_template": str} | {f"{role}_token_id": int for role in ROLES.values()}

# Names of the rules that cut text before the merges apply: whether each splits off every digit.
_DIGITS = {"gpt-2": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}
# Others cut by an expression, in which {} is the most digits of a piece.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {"qwen2": _PIECES.format(""), "llama-bpe": _PIECES.format("{1,3}")}
_COMPOSED = ("qwen2",)  # letters with accents become one character first


def check_tokenizer(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise `ValueError` unless the metadata has a tokenizer, with values of the right types."""
    stated = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    for key, value in stated.items():
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        if name in LISTS and not (isinstance(value, list) and all(type(x) is LISTS[name] for x in value)):
            wanted = f"a list of {LISTS[name].__name__}"
        elif name in SINGLE and type(value) is not SINGLE[name]:
            wanted = SINGLE[name].__name__
        else:
            continue
        raise ValueError(f"{key} in {str(path)!r} must be {wanted}; got {brief(value)}")
    order = "scores" if metadata.get("tokenizer.ggml.model") == "llama" else "merges"
    absent = [k for k in (f"tokenizer.ggml.{name}" for name in ("tokens", order)) if k not in metadata]
    if absent:
        raise ValueError(f"{str(path)!r} lacks the metadata {absent}")
    tokens = len(metadata["tokenizer.ggml.tokens"])
    for name, what in (("token_type", "kinds"), ("scores", "scores")):
        count = len(stated.get(f"tokenizer.ggml.{name}", []))
        if count not in (0, tokens):
            raise ValueError(f"{str(path)!r} has {tokens:,} tokens, but the {what} of {count:,}")


def read_tokenizer(path: Path, metadata: Mapping[str, Any], max_length: int) -> "PreTrainedTokenizerFast":
    """Build the tokenizer.

    Args:
        path: The file, for messages.
        metadata: Its metadata, checked by `check_tokenizer`.
        max_length: Longest row for which the model was trained, in tokens.

    Raises:
        ValueError: If its kind is not supported, or it is broken.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    tokens = values["tokens"]
    kinds = list(zip(tokens, values.get("token_type", [NORMAL] * len(tokens)), strict=True))
    stated = {f"{role}_token": values.get(f"{key}_token_id") for role, key in ROLES.items()}
    special = {role: index for role, index in stated.items() if index is not None}
    for role, index in special.items():
        check_indices(f"the id of the {role} in {str(path)!r}", index, len(tokens))
    names = {role: tokens[index] for role, index in special.items()}
    build = _from_scores if values.get("model") == "llama" else _from_merges
    backend = build(path, values, names.get("unk_token"))
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])
    added = bool(values.get("add_bos_token", values.get("model") == "llama")) and "bos_token" in names
    if added:
        backend.post_processor = _beginning(names["bos_token"], special["bos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=max_length,
        add_bos_token=added,
        **names,
    )


def _beginning(token: str, index: int) -> Any:
    """A processor that adds a token at the beginning of a text."""
    from tokenizers.processors import TemplateProcessing

    pair = [token, "$A", token, "$B"]
    return TemplateProcessing(single=pair[:2], pair=pair, special_tokens=[(token, index)])


def _from_merges(path: Path, values: Mapping[str, Any], unknown: str | None) -> "Tokenizer":
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    cut = values.get("pre")
    if values.get("model") != "gpt2" or cut not in {*_DIGITS, *_EXPRESSIONS}:
        raise ValueError(
            f"{str(path)!r} has a tokenizer of kind {values.get('model')!r} with the cut {cut!r}; supported "
            f"are 'llama', and 'gpt2' with one of {sorted({*_DIGITS, *_EXPRESSIONS})}; otherwise use the "
            "Hugging Face folder of the same model"
        )
    backend = _merging(path, values["tokens"], list(_pairs(path, values["merges"])))
    prefix = values.get("add_space_prefix", False)
    if cut in _EXPRESSIONS:
        first: list[Any] = [pre_tokenizers.Split(Regex(_EXPRESSIONS[cut]), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS[cut] else []
    letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=cut not in _EXPRESSIONS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, letters])
    backend.decoder = decoders.ByteLevel()
    if cut in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    return backend


def _from_scores(path: Path, values: Mapping[str, Any], unknown: str | None) -> "Tokenizer":
    from tokenizers import decoders, normalizers

    merges = scored_merges(values["tokens"], values["scores"])
    backend = _merging(path, values["tokens"], merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = values.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return backend


def scored_merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a vocabulary with scores: every split of a token into two tokens, best union first."""
    ranks = {token: i for i, token in enumerate(tokens)}
    splits = [
        (-scores[i], i, ranks[token[:at]], ranks[token[at:]])
        for token, i in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    ]
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(splits)]


def _pairs(path: Path, merges: Sequence[str]) -> Iterator[tuple[str, str]]:
    wrong = [merge for merge in merges if merge.count(" ") != 1]
    if wrong:
        raise ValueError(f"merges of {str(path)!r} must be of two tokens each; got {brief(wrong)}")
    for merge in merges:
        left, right = merge.split(" ")
        yield left, right


def _merging(path: Path, tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> "Tokenizer":
    """A tokenizer from tokens and merges, the pairs of tokens that are joined."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    try:
        return Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{str(path)!r} has no readable tokenizer ({str(error)[:200]})") from error
