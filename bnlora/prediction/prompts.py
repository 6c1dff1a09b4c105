"""Prompts as rows of tokens, what ends a text, and the text of new tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from bnlora._util.checks import brief, check_indices, is_integer

CONTEXT = 8
"""Tokens of a prompt that new ones are decoded after: many tokenizers drop a blank before the first one."""

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for the bytes of a letter that is not complete."""


@dataclass(frozen=True)
class Stops:
    """What ends a text.

    Attributes:
        ids: Tokens.
        strings: Strings.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]

    def end(self, pieces: Sequence[str]) -> bool:
        """Whether the last of these pieces of a text completes one of the strings."""
        text = "".join(pieces) if self.strings else ""
        return any(stop in text for stop in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((text.index(stop) for stop in self.strings if stop in text), default=None)]


def read_stops(stop: Any, tokenizer: Any, vocabulary: int) -> Stops:
    """The end token of the tokenizer, and the given strings and tokens.

    Raises:
        ValueError: If one is neither a string with letters nor a token of the base, or a string is given and
            there is no tokenizer.
    """
    given = [stop] if isinstance(stop, str) or is_integer(stop) else stop
    if given is not None and not isinstance(given, Iterable):
        raise ValueError(f"stop must be strings and token ids; got {brief(stop)}")
    end = getattr(tokenizer, "eos_token_id", None)
    ids, strings = [] if end is None else [int(end)], []
    for one in given or ():
        if isinstance(one, str) and one and tokenizer is not None:
            strings.append(one)
        elif isinstance(one, str):
            reason = "the base has no tokenizer to look for it" if one else "it has no letter"
            raise ValueError(f"stop {one!r} cannot end a text, because {reason}; give token ids")
        else:
            check_indices("tokens of stop", one, vocabulary)
            ids.append(int(one))
    return Stops(tuple(dict.fromkeys(ids)), tuple(strings))


def read_prompts(prompts: Any, tokenizer: Any, vocabulary: int) -> list[list[int]]:
    """Token ids of every prompt.

    Args:
        prompts: Texts, or sequences of token ids.
        tokenizer: The tokenizer of texts, or None.
        vocabulary: Number of tokens of the base.

    Raises:
        ValueError: If it is no list or has no prompt, a prompt is empty or has a token that the base lacks,
            or a prompt is a text and there is no tokenizer.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list of texts or of token ids, such as [{brief(prompts)}]")
    read = [_tokens(index, prompt, tokenizer) for index, prompt in enumerate(prompts)]
    if not read:
        raise ValueError("prompts must have at least one prompt; got an empty list")
    for index, tokens in enumerate(read):
        if not tokens:
            raise ValueError(f"prompt {index} has no token; give at least one, such as the tokenizer's start")
        check_indices(f"tokens of prompt {index}", tokens, vocabulary)
    return read


def _tokens(index: int, prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt {index} is a text, and the base has no tokenizer; give its token ids")
        return list(tokenizer(prompt)["input_ids"])
    values = np.asarray(prompt)
    if values.ndim != 1 or values.size and values.dtype.kind not in "iu":
        raise ValueError(f"prompt {index} must be a text or a list of token ids; got {brief(prompt)}")
    return [int(token) for token in values]


def left_padded(
    prompts: Sequence[Sequence[int]], width: int
) -> tuple[Int[np.ndarray, "n t"], Bool[Any, "n t"]]:
    """Prompts of one width, and a mask that is True at their tokens."""
    tokens, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
    return tokens, mask


class Pieces:
    """The text of a row of new tokens, in one piece for each of them; joined, they are the whole text.

    A token that ends inside a letter has an empty piece. Special tokens appear under their names.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer, self.tokens = tokenizer, list(prompt[-CONTEXT:])
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.before = self._text().rstrip(BROKEN)
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        """The piece of the next token."""
        self.tokens.append(token)
        text = self._text()
        whole = text.rstrip(BROKEN)
        piece = whole[len(self.before) :]
        self.before = whole if piece else self.before
        self.pieces.append(piece)
        return piece

    def text(self, stops: Stops) -> str:
        """What was written before the token or the string that ended it, without special tokens."""
        tokens = self.tokens[len(self.tokens) - len(self.pieces) :]
        if tokens and tokens[-1] in stops.ids:
            tokens = tokens[:-1]
        kept = [piece for piece, token in zip(self.pieces, tokens, strict=False) if token not in self.special]
        return stops.cut("".join(kept))

    def _text(self) -> str:
        if self.tokenizer is None:
            return "".join(f" {token}" for token in self.tokens)
        return self.tokenizer.decode(self.tokens, clean_up_tokenization_spaces=False)
