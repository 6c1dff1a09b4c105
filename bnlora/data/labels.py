"""The class that a label means, and the token of the word of a class.

One rule applies to strings, integers, booleans and whole floats:

1. A label that equals one of the words (ignoring spaces) means that word's class.
2. Otherwise an integer from 0 to C - 1 is the number of the class.

If both readings are possible and differ (the label 1 and the words "1", "2", "3"), an error is raised unless
`labels_are` decides. All labels of a column must be of the same kind.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from bnlora._util.checks import check_option
from bnlora.data.formats import as_text
from bnlora.data.tables import RowError

LabelKind = Literal["words", "integers"]
LabelsAre = LabelKind | Mapping[Any, str]


class _Meaning(NamedTuple):
    """The classes that a label could mean, as a word and as an integer; -1 for none."""

    word: int
    integer: int

    @property
    def is_ambiguous(self) -> bool:
        return min(self) >= 0 and self.word != self.integer

    @property
    def kind(self) -> str:
        """Whether the label is a "word" or an "integer"; "either" if both give the same class."""
        return "either" if min(self) >= 0 else "integer" if self.word < 0 else "word"


def read_labels(
    split: str,
    column: Sequence[Any],
    words: Sequence[str],
    *,
    labels_are: LabelsAre | None = None,
    class_names: Sequence[str] | None = None,
) -> Int[np.ndarray, " n"]:
    """Classes of a column of labels, by the rule of this module.

    Args:
        split: Name of the split, for messages.
        column: Labels.
        words: Word of each class.
        labels_are: "words" or "integers" if labels could be either; or a mapping from each label to its word.
        class_names: The names of the integers in a data set (`ClassLabel`). If the names are the words, they
            determine the classes.

    Raises:
        ValueError: If a label is missing, unknown or ambiguous, integers are mixed with words, or the names
            contradict the order of the words.
    """
    if labels_are is not None and not isinstance(labels_are, Mapping):
        check_option("labels_are", labels_are, get_args(LabelKind))
    values = [value.tolist() if hasattr(value, "tolist") else value for value in column]
    if class_names is not None and not isinstance(labels_are, Mapping):
        named = _by_names(split, class_names, words, labels_are)
        if named is not None:
            values, labels_are = [named.get(value, value) for value in values], "words"
    meaning = _reader(words, labels_are)
    meanings = []
    for row, value in enumerate(values):
        text = as_text(value)
        if text is None:
            raise RowError("the label in ", split, row, " is missing")
        meant = meaning(text)
        if meant.is_ambiguous:
            raise RowError(f"label {value!r} in ", split, row, _could_be_both(text, meant, words))
        if max(meant) < 0:
            raise RowError(f"label {value!r} in ", split, row, _unknown(text, words, labels_are))
        meanings.append(meant)
    _check_one_kind(split, values, [meant.kind for meant in meanings])
    return np.asarray([max(meant) for meant in meanings], np.int32)


def _reader(words: Sequence[str], labels_are: LabelsAre | None) -> Callable[[str], _Meaning]:
    """Make a function that returns the classes that a label could mean."""
    if isinstance(labels_are, Mapping):
        named = {}
        for label, word in labels_are.items():
            if word not in words:
                raise ValueError(
                    f"labels_are must map each label to one of the words {list(words)}; got {word!r} for "
                    f"{label!r}"
                )
            named[str(as_text(label)).strip()] = list(words).index(word)
    else:
        named = {word.strip(): i for i, word in enumerate(words)}
    numbered = {number: i for name, i in named.items() if (number := _number(name)) is not None}

    @cache
    def meaning(text: str) -> _Meaning:
        number = _number(text)
        word = named.get(text.strip(), -1 if number is None else numbered.get(number, -1))
        integer = number if number is not None and 0 <= number < len(words) else -1
        if labels_are == "integers":
            return _Meaning(-1, integer)
        return _Meaning(word, integer if labels_are is None else -1)

    return meaning


def _number(text: str) -> int | None:
    """The integer that a text represents, also if it is written as a whole float."""
    match = re.fullmatch(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*", text)
    return None if match is None else int(match[1])


def _by_names(
    split: str, class_names: Sequence[str], words: Sequence[str], labels_are: LabelKind | None
) -> dict[int, str] | None:
    """The names of the integers if the names determine the classes; None if the integers do."""
    names = [word.strip() for word in words]
    places = {
        number: names.index(name.strip()) for number, name in enumerate(class_names) if name.strip() in names
    }
    if labels_are == "integers" or (labels_are is None and not places):
        return None
    if labels_are == "words" or len(places) == len(class_names):
        return dict(enumerate(class_names))
    for number, place in places.items():
        if number != place:
            raise ValueError(
                f"the labels of split {split!r} have the names {list(class_names)}, where "
                f"{class_names[number]!r} is class {number}; among the words it is class {place}. "
                "Give the words in the order of the names, or labels_are='integers' if the words are right"
            )
    return None


def _could_be_both(text: str, meant: _Meaning, words: Sequence[str]) -> str:
    return (
        f" could be the word {words[meant.word]!r}, class {meant.word}, or the integer {_number(text)}, the "
        f"class of the word {words[meant.integer]!r}; choose with labels_are='words' or 'integers' "
        "(--labels-are on the command line)"
    )


def _unknown(text: str, words: Sequence[str], labels_are: LabelsAre | None) -> str:
    if labels_are == "integers":
        return f" is not an integer from 0 to {len(words) - 1}"
    known = labels_are if isinstance(labels_are, Mapping) else words
    names = [str(as_text(label)).strip() for label in known]
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"; nearest is {near[0]!r}" if near else ""
    if labels_are is not None:
        return f" is not one of {names}{hint}"
    return f" is neither an integer from 0 to {len(words) - 1} nor one of {names}{hint}"


def _check_one_kind(split: str, values: Sequence[Any], kinds: Sequence[str]) -> None:
    """Raise `ValueError` if words and integers are mixed; it names the first row of the rarer kind."""
    counts = {kind: kinds.count(kind) for kind in ("word", "integer")}
    if 0 in counts.values():
        return
    first = {kind: kinds.index(kind) for kind in counts}
    rare, common = sorted(counts, key=lambda kind: (counts[kind], -first[kind]))
    remedy = "use only one kind, or pass a mapping from labels to words as labels_are"
    raise RowError(
        f"label {values[first[rare]]!r} in ",
        split,
        first[rare],
        f" is {'a word' if rare == 'word' else 'an integer'}, but others are {common}s such as "
        f"{values[first[common]]!r}; {remedy}",
    )


def label_tokens(tokenizer: Any, words: Sequence[str], template: str) -> Int[np.ndarray, " c"]:
    """The token of each word at the position after the template.

    Raises:
        ValueError: If there are fewer than two words, two words are the same (ignoring spaces) or the same
            token, or a word is not a single token there. The message shows the tokens of the word.
    """
    check_words(words)
    tokens: list[int] = []
    for word in words:
        token = _token_after(tokenizer, template, word)
        if token is None:
            raise ValueError(
                f"label word {word!r} must be a single token after the template's end "
                f"{template.split('{text}')[1]!r}; {_becomes(tokenizer, template, word)}; "
                f"{_remedy(tokenizer, template, word)}"
            )
        if token in tokens:
            raise ValueError(
                f"label words {words[tokens.index(token)]!r} and {word!r} are the same token {token}"
            )
        tokens.append(token)
    return np.asarray(tokens, np.int32)


def check_words(words: Sequence[str], what: str = "words") -> None:
    """Raise `ValueError` unless there are at least two words, or names of classes, that differ."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{what} must be a list of strings, one for each class; got {words!r}")
    called = "label words" if what == "words" else what
    if len(words) < 2:
        raise ValueError(f"at least two {called} are needed; got {list(words)}")
    names = [word.strip() for word in words]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(
                f"{called} {words[names.index(name)]!r} and {words[i]!r} must differ by more than spaces: "
                "spaces are ignored in labels"
            )


def _token_after(tokenizer: Any, template: str, word: str) -> int | None:
    """The single token of a word after the filled template; None if it is not a single token."""
    for context in _contexts(template):
        before, after = _with_and_without(tokenizer, context, word)
        if len(after) == len(before) + 1 and after[:-1] == before:
            return after[-1]
    return None


def _contexts(template: str) -> list[str]:
    """Contexts before a word: the filled template; also the empty one if the template ends with the text."""
    filled = template.replace("{text}", "x")
    return [filled, ""] if template.endswith("{text}") else [filled]


def _with_and_without(tokenizer: Any, context: str, word: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, and of the context followed by a word."""
    before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, context + word))
    return before, after


def _becomes(tokenizer: Any, template: str, word: str) -> str:
    """Description of the tokens of a word that is not a single token after the template."""
    before, after = _with_and_without(tokenizer, _contexts(template)[0], word)
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    gone, new = (tokenizer.convert_ids_to_tokens(ids[same:]) for ids in (before, after))
    if gone:
        return f"it merges with the text before it: {gone} becomes {new}"
    return f"it becomes {len(new)} tokens, {new}" if new else "it adds no token"


def _remedy(tokenizer: Any, template: str, word: str) -> str:
    """A word or template that works, if a common mistake explains the error."""
    shorter, spaced = template.rstrip(" "), f" {word.lstrip()}"
    if shorter != template and _token_after(tokenizer, shorter, spaced) is not None:
        return f"end the template without the space, and try {spaced!r}"
    other = word.lstrip() if word[:1].isspace() else f" {word}"
    if other.strip() and _token_after(tokenizer, template, other) is not None:
        return f"try {other!r}"
    return "try a more common word"
