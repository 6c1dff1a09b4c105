"""From tables of contexts and completions to batches."""

import numpy as np
import pytest
from datasets import Dataset

import bnlora as bl

COLUMNS = {"context": "question", "choices": "answers", "label": "gold"}


def table(**changes) -> Dataset:
    columns = {
        "question": ["the film was", "the plot is"],
        "answers": [[" good", " bad"], [" good", " bad", " bad good"]],
        "gold": [1, 0],
    }
    return Dataset.from_dict(columns | changes)


def texts(batch: bl.Batch, tokenizer) -> list[list[tuple[str, str]]]:
    """Context and completion of every choice that is there."""
    found = []
    for tokens, mask, scored in zip(
        *map(np.asarray, (batch.tokens, batch.mask, batch.choices.scored)), strict=True
    ):
        pairs = zip(tokens, mask, scored, strict=True)
        found.append(
            [(tokenizer.decode(t[m & ~s]), tokenizer.decode(t[m & s])) for t, m, s in pairs if s.any()]
        )
    return found


def test_choices_end_at_the_last_column(tokenizer):
    data = bl.multiple_choice(table(), tokenizer, **COLUMNS)
    rows = data.train
    assert (data.num_choices, rows.tokens.shape, rows.choices.span) == (3, (2, 3, 8), 2)
    assert texts(rows, tokenizer) == [
        [("the film was", " good"), ("the film was", " bad")],
        [("the plot is", " good"), ("the plot is", " bad"), ("the plot is", " bad good")],
    ]
    assert rows.choices.scored[..., -1].tolist() == [[True, True, False], [True, True, True]]
    assert rows.labels.tolist() == [1, 0]
    assert rows.choices.size.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert repr(data) == "ChoiceData(train 2; 3 choices, normalised by none)"


@pytest.mark.parametrize(("normalise", "sizes"), [("tokens", [1, 1, 2]), ("characters", [5, 4, 9])])
def test_what_the_log_likelihood_is_divided_by(tokenizer, normalise, sizes):
    rows = bl.multiple_choice(table(), tokenizer, **COLUMNS, normalise=normalise).train
    assert rows.choices.size[1].tolist() == sizes


def test_contexts_may_differ_by_choice(tokenizer):
    """As in WinoGrande, where the continuation is the same."""
    rows = table(question=[["the plot is", "the film was"], ["the plot", "the film", "was"]])
    data = bl.multiple_choice({"test": rows}, tokenizer, **COLUMNS)
    assert texts(data["test"], tokenizer)[0] == [("the plot is", " good"), ("the film was", " bad")]


def test_classes_of_several_tokens(tokenizer):
    rows = table().remove_columns("answers")
    words = [" good film", " bad"]
    data = bl.multiple_choice(rows, tokenizer, context="question", choices=words, label="gold")
    assert texts(data.train, tokenizer)[1] == [("the plot is", " good film"), ("the plot is", " bad")]


def test_a_blank_at_the_end_of_a_context_belongs_to_the_completion(tokenizer):
    rows = table(question=["the film was ", "the plot is "], answers=[["good", "bad"], ["good", "bad"]])
    data = bl.multiple_choice(rows, tokenizer, **COLUMNS)
    assert texts(data.train, tokenizer)[0] == [("the film was", " good"), ("the film was", " bad")]


def test_long_contexts_lose_their_beginning(tokenizer):
    rows = table(question=["the film was bad the film was", "the plot is"])
    data = bl.multiple_choice(rows, tokenizer, **COLUMNS, max_length=4)
    assert texts(data.train, tokenizer)[0] == [("the film was", " good"), ("the film was", " bad")]
    assert int(data.train.mask.sum(-1).max()) == 4


WRONG = {
    "one choice": ({"answers": [[" good"], [" a", " b"]]}, "the choices in row 0 .* of at least two texts"),
    "an empty choice": ({"answers": [[" good", " "], [" a", " b"]]}, "choices in row 0 .* non-empty texts"),
    "contexts": ({"question": [["a"], ["a", "b", "c"]]}, "the context in row 0 .* a text, or 2 texts"),
    "a label": ({"gold": [2, 0]}, "the label in row 0 .* a number from 0 to 1; got 2"),
    "no label": ({"gold": ["x", "y"]}, "the label in row 0 .* a number from 0 to 1; got 'x'"),
    "an empty context": ({"question": [" ", "a"]}, "the context in row 0 .* must be a non-empty text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_broken_rows_are_named(tokenizer, name):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        bl.multiple_choice(table(**changes), tokenizer, **COLUMNS)


def test_a_completion_must_leave_room_for_its_context(tokenizer):
    with pytest.raises(ValueError, match="a choice in row 1 .* has 2 tokens, which leaves no room"):
        bl.multiple_choice(table(), tokenizer, **COLUMNS, max_length=2)


def test_missing_columns_and_options_are_named(tokenizer):
    with pytest.raises(ValueError, match="answer"):
        bl.multiple_choice(table(), tokenizer, **COLUMNS | {"choices": "answer"})
    with pytest.raises(ValueError, match="normalise must be one of"):
        bl.multiple_choice(table(), tokenizer, **COLUMNS, normalise="letters")
