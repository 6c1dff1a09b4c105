"""Readers of grades, votes, values, texts and lettered choices."""

import numpy as np
import pytest
from datasets import Dataset

import bnlora as bl
from bnlora.data.tables import RowError

TEXTS = ["the film was", "the plot is"]
WORDS = [" bad", " good"]


def read(tokenizer, outcome, kind, values, **options):
    columns = values if isinstance(values, dict) else {outcome: values}
    table = Dataset.from_dict({"text": TEXTS, **columns})
    options = {"words": WORDS, **options}
    return bl.text_outcomes(table, tokenizer, text="text", outcome=outcome, kind=kind, **options)


def test_grades_are_labels(tokenizer):
    assert read(tokenizer, "stars", "grades", ["4", "0"]).train.labels.tolist() == [4, 0]
    with pytest.raises(
        RowError, match=r"the grade in row 1 of split 'train' must be a whole number .* got 1.5"
    ):
        read(tokenizer, "stars", "grades", [0, 1.5])


def test_votes_are_outcomes_and_their_maximum_is_the_label(tokenizer):
    for outcome, values in (("votes", [[1, 3], [2, 0]]), (["no", "yes"], {"no": [1, 2], "yes": [3, 0]})):
        rows = read(
            tokenizer, outcome, "votes", values if isinstance(values, dict) else {"votes": values}
        ).train
        assert rows.outcomes.tolist() == [[1, 3], [2, 0]]
        assert rows.labels.tolist() == [1, 0]
    for broken in ([[1, 3], [0, 0]], [[1, 3], [1, 2, 3]], [[1, 3], [-1, 2]]):
        with pytest.raises(RowError, match="the votes in row 1 .* 2 numbers of at least 0, not all 0"):
            read(tokenizer, "votes", "votes", broken)


def test_values_are_outcomes(tokenizer):
    rows = read(tokenizer, "score", "values", ["1.5", "-2"]).train
    assert rows.outcomes.tolist() == [1.5, -2]
    assert rows[1:].outcomes.tolist() == [-2]
    with pytest.raises(RowError, match="the outcome in row 0 .* must be a finite number; got 'high'"):
        read(tokenizer, "score", "values", ["high", "1"])
    with pytest.raises(ValueError, match="no column 'scores'; .* nearest is 'score'"):
        read(tokenizer, "scores", "values", {"score": [1, 2]})
    with pytest.raises(ValueError, match="kind must be one of .*; got 'value'"):
        read(tokenizer, "score", "value", [1, 2])


def test_texts_are_scored_after_their_prompt(tokenizer):
    table = Dataset.from_dict({"q": ["the film", ""], "text": [" was good", "the plot is bad"]})
    rows = bl.language_modelling(table, tokenizer, text="text", prompt="q").train
    # Without a prompt nothing stands before the first token.
    assert np.asarray(rows.choices.scored).sum(-1).ravel().tolist() == [2, 3]
    assert rows.tokens.shape == (2, 1, 8)
    with pytest.raises(RowError, match="the text in row 0 .* has no token to score; got 'the'"):
        bl.language_modelling(Dataset.from_dict({"text": ["the"]}), tokenizer, text="text")
    with pytest.raises(RowError, match="the text in row 1 .* has 4 tokens, more than 3; split it"):
        bl.language_modelling(table, tokenizer, text="text", max_length=3)


def test_choices_by_letter_stand_in_the_text(tokenizer):
    table = Dataset.from_dict(
        {"q": ["the film is {choices}", "a"], "c": [["good", "bad"], ["bad", "good"]], "gold": [1, 0]}
    )
    columns = {"question": "q", "choices": "c", "label": "gold"}
    options = {"template": "{question}\n{choices}\n", "words": ["A", "B"]}
    data = bl.letter_choices(table, tokenizer, **columns, **options)
    tokens, mask = data.train.tokens[0], data.train.mask[0]
    assert tokenizer.decode(tokens[mask]) == "the film is {choices}\nA. good\nB. bad\n"
    assert tokenizer.convert_ids_to_tokens(data.label_ids.tolist()) == ["A", "B"]
    assert data.train.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="the template must contain {choices} once"):
        bl.letter_choices(table, tokenizer, **columns, template="{question}")
    with pytest.raises(ValueError, match="one word for each of the 2 choices; got .'A'"):
        bl.letter_choices(table, tokenizer, **columns, words=["A"])
    uneven = Dataset.from_dict({"q": TEXTS, "c": [["a", "b"], ["a", "b", "c"]], "gold": [0, 1]})
    with pytest.raises(ValueError, match=r"the same number of choices, .* got \[2, 3\]; bl.multiple_choice"):
        bl.letter_choices(uneven, tokenizer, **columns)
