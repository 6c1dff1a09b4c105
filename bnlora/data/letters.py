"""Multiple choice by letter: the choices stand in the text, and the class is the letter of the right one."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from bnlora.data.splits import check_split
from bnlora.data.tables import RowError
from bnlora.data.text import TextData, text_classification

if TYPE_CHECKING:
    from datasets import Dataset

TEMPLATE = "Question: {question}\n{choices}\nAnswer:"


def letter_choices(
    dataset: "Dataset | Mapping[str, Dataset]",
    tokenizer: Any,
    *,
    question: str,
    choices: str,
    label: str | None,
    template: str = TEMPLATE,
    words: Sequence[str] | None = None,
    max_length: int | None = None,
) -> TextData:
    """Tokenise a multiple-choice data set so that the classes are the letters A, B, C, ...

    Small models (below about a billion parameters) answer by letter at chance; for these read the
    completions instead (`multiple_choice`).

    Args:
        dataset: A data set, or several by split name. A single data set becomes the split `"train"`.
        tokenizer: The base model's tokenizer, or the base itself.
        question: Column of the questions.
        choices: Column of the choices, a list of texts of the same length in every row.
        label: Column of the number of the right choice; None for rows of unknown answer.
        template: Text around question and choices, containing `{question}` and `{choices}`.
        words: Words by which the letters are answered, each a single token; " A", " B", ... by default.
        max_length: Longest row in tokens; the tokenizer's own limit if omitted. Longer rows are refused.

    Returns:
        Batches, the words of the letters and their token ids.

    Raises:
        ValueError: If rows differ in their number of choices, the template lacks a part, or under the same
            conditions as `text_classification`.

    Example:
        >>> from datasets import Dataset
        >>> questions, answers = ["the film was", "the plot is"], [["good", "bad"]] * 2
        >>> table = Dataset.from_dict({"question": questions, "answers": answers, "gold": [0, 1]})
        >>> columns = {"question": "question", "choices": "answers", "label": "gold"}
        >>> options = {"template": "{question} {choices} ", "words": ["A", "B"]}
        >>> bl.letter_choices(table, tokenizer, **columns, **options).words
        ('A', 'B')
    """
    from datasets import Dataset

    for part in ("{question}", "{choices}"):
        if template.count(part) != 1:
            raise ValueError(f"the template must contain {part} once; got {template!r}")
    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    texts, sizes = {}, set()
    for name, rows in splits.items():
        check_split(name, rows, [question, choices, *([] if label is None else [label])])
        pairs = zip(rows[question], rows[choices], strict=True)
        filled = [_filled(name, row, *pair) for row, pair in enumerate(pairs)]
        sizes |= {len(options) for options in rows[choices]}
        columns = {"text": [_text(template, *parts) for parts in filled]}
        texts[name] = Dataset.from_dict(columns | ({} if label is None else {"label": rows[label]}))
    if len(sizes) != 1 or not 2 <= min(sizes) <= len(ascii_uppercase):
        raise ValueError(
            "every row must have the same number of choices, from 2 to 26, to be read by letter; got "
            f"{sorted(sizes)}; bl.multiple_choice takes rows that differ"
        )
    count = min(sizes)
    words = [f" {letter}" for letter in ascii_uppercase[:count]] if words is None else list(words)
    if len(words) != count:
        raise ValueError(f"there must be one word for each of the {count} choices; got {words}")
    return text_classification(
        texts, tokenizer, text="text", label=None if label is None else "label", words=words,
        max_length=max_length, labels_are="integers",
    )  # fmt: skip


def _filled(split: str, row: int, question: Any, choices: Any) -> tuple[str, str]:
    """Question and lettered choices of a row."""
    texts = [question, *choices] if isinstance(choices, Sequence) and not isinstance(choices, str) else []
    if not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
        got = f"{question!r} and {choices!r}"
        raise RowError("question and choices in ", split, row, f" must be non-empty texts; got {got}")
    lettered = zip(ascii_uppercase, choices, strict=False)
    return question.strip(), "\n".join(f"{letter}. {text.strip()}" for letter, text in lettered)


def _text(template: str, question: str, choices: str) -> str:
    # In one pass, so that a brace in a question is not filled.
    before, _, after = template.partition("{question}")
    return before.replace("{choices}", choices) + question + after.replace("{choices}", choices)
