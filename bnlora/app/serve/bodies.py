"""JSON bodies of requests, which are not trusted: texts to predict, and labels of earlier predictions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_SHOWN = 40
"""Letters of a wrong value that a message repeats."""


class Refused(Exception):
    """A request that is answered with a status other than 200 and one sentence.

    Attributes:
        status: The HTTP status.
        sentence: What was expected and what came.
    """

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many requests may be open.

    Attributes:
        max_bytes: Largest body.
        max_rows: Most texts, or labels, of a request.
        max_characters: Longest text in characters.
        max_tokens: Longest row in tokens, with the template around its text.
        max_requests: Most requests for predictions at a time, those that wait included.
        batch_rows: Rows that run together.
    """

    max_bytes: int = 2**18
    max_rows: int = 64
    max_characters: int = 10_000
    max_tokens: int = 512
    max_requests: int = 16
    batch_rows: int = 8


def texts_of(body: bytes, limits: Limits) -> list[str]:
    """The texts of `{"texts": ["...", ...]}`.

    Raises:
        Refused: If the body is something else, or a text is empty or beyond a limit.
    """
    texts = _list_of(body, "texts", "strings", limits)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise Refused(422, f"texts[{row}] must be a string that is not empty; got {_shown(text)}")
        if len(text) > limits.max_characters:
            raise Refused(
                413,
                f"texts[{row}] has {len(text):,} characters; a text may have at most "
                f"{limits.max_characters:,}",
            )
        if not _is_unicode(text):
            raise Refused(422, f"texts[{row}] has half of a surrogate pair, which is no character")
    return texts


def labels_of(body: bytes, names: Sequence[str], limits: Limits) -> dict[str, int]:
    """The class of each id of `{"labels": [{"id": "...", "label": "..."}, ...]}`.

    A label is the name of a class or its number.

    Raises:
        Refused: If the body is something else, or a class is unknown.
    """
    found = {}
    for row, entry in enumerate(_list_of(body, "labels", "objects with an id and a label", limits)):
        if not isinstance(entry, dict) or set(entry) != {"id", "label"} or not isinstance(entry["id"], str):
            raise Refused(
                422, f'labels[{row}] must be {{"id": "...", "label": ...}} with the id of a prediction'
            )
        found[entry["id"]] = _class_of(row, entry["label"], names)
    return found


def _class_of(row: int, label: Any, names: Sequence[str]) -> int:
    if isinstance(label, str) and label.strip() in names:
        return names.index(label.strip())
    # JSON has one kind of numbers: 1.0 is a whole number in it, as some languages write it.
    if type(label) in (int, float) and 0 <= label < len(names) and label == int(label):
        return int(label)
    raise Refused(
        422, f"the label of labels[{row}] must be a class, one of {list(names)}; got {_shown(label)}"
    )


def _list_of(body: bytes, key: str, what: str, limits: Limits) -> list[Any]:
    """The list that is the only entry of a JSON object."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(422, "the body must be JSON in UTF-8, not too deeply nested") from None
    if not isinstance(content, dict) or set(content) != {key} or not isinstance(content[key], list):
        raise Refused(422, f'the body must be an object {{"{key}": [...]}} with a list of {what}')
    values = content[key]
    if not values:
        raise Refused(422, f"{key} must have at least one entry; got none")
    if len(values) > limits.max_rows:
        raise Refused(
            413, f"{key} has {len(values):,} entries; a request may have at most {limits.max_rows:,}"
        )
    return values


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    """A short form of a value: of a list or an object only its type."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value) if not isinstance(value, int) or abs(value) < 10**MOST_SHOWN else "a huge number"
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."
