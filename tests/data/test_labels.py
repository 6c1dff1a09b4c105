"""The class of a label: the same for every way to store it, and an error if it is ambiguous."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from bnlora.data.labels import read_labels
from bnlora.data.text import text_classification

STARS = [" 1", " 2", " 3", " 4", " 5"]
STORED = {
    "integers": int,
    "strings": str,
    "floats": float,
    "strings of floats": lambda label: str(float(label)),
    "spaced": lambda label: f" {label} ",
    "numpy": np.int64,
}


def read(column, words, **options):
    return read_labels("train", column, words, **options).tolist()


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_integers_are_the_same_however_they_are_stored(stored):
    assert read([stored(i) for i in (2, 0, 1)], [" bad", " fair", " good"]) == [2, 0, 1]
    assert read([stored(i) for i in (1, 0)], [" 0", " 1"]) == [1, 0]  # a word and a number of one meaning
    assert read([stored(i) for i in (20, 10)], [" 10", " 20"]) == [1, 0]  # no number of a class


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_labels_that_could_be_words_or_integers_are_refused_until_one_says_which(stored):
    stars = [stored(i) for i in (5, 1, 4, 2)]
    with pytest.raises(ValueError, match=r"in row 1 of split 'train' could be the word ' 1', class 0, or the "
                       r"integer 1, the class of the word ' 2'; choose with .*--labels-are"):  # fmt: skip
        read(stars, STARS)
    assert read(stars, STARS, labels_are="words") == [4, 0, 3, 1]
    assert read(stars[1:], STARS, labels_are="integers") == [1, 4, 2]
    with pytest.raises(ValueError, match="row 0 .* is not an integer from 0 to 4"):
        read(stars, STARS, labels_are="integers")
    swapped = [stored(i) for i in (0, 1)]
    with pytest.raises(ValueError, match="row 0 .* could be the word '0', class 1, or the integer 0"):
        read(swapped, ["1", "0"])
    assert read(swapped, ["1", "0"], labels_are="words") == [1, 0]
    assert read(swapped, ["1", "0"], labels_are="integers") == [0, 1]


@given(st.integers(2, 6), st.data())
def test_the_rule_against_its_definition(classes, data):
    """Every word is an integer or a letter; the expected class of every label follows from both readings."""
    pool = [*(str(i) for i in range(classes + 2)), *"abcdefgh"]
    words = data.draw(st.lists(st.sampled_from(pool), min_size=classes, max_size=classes, unique=True))
    label = data.draw(st.sampled_from(pool))
    as_word = {words.index(label)} if label in words else set()
    as_integer = {int(label)} if label.isdigit() and int(label) < classes else set()
    if len(as_word | as_integer) == 1:
        assert read([label], words) == list(as_word | as_integer)
    else:
        with pytest.raises(ValueError, match="could be the word" if as_word else "is neither an integer"):
            read([label], words)


def test_truth_values_are_the_words_true_and_false():
    for column in ([True, False], ["True", "False"], np.array([True, False])):
        assert read(column, [" False", " True"]) == [1, 0]
    with pytest.raises(
        ValueError, match="label True in row 0 .* is neither an integer from 0 to 1 nor one of"
    ):
        read([True, False], [" bad", " good"])
    with pytest.raises(ValueError, match="label 'true' in row 1 .*; nearest is 'True'"):
        read(["False", "true"], [" False", " True"])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            ["good", "bad", "0", "good"],
            "label '0' in row 2 .* is an integer, but others are words such as 'good'",
        ),
        (["0", "good", "1", "0"], "label 'good' in row 1 .* is a word, but others are integers such as '0'"),
        (["0", "good"], "label 'good' in row 1 .* is a word"),
        (["good", "0"], "label '0' in row 1 .* is an integer"),
        ([0, "ugly"], "label 'ugly' in row 1 .* is neither an integer from 0 to 1 nor one of"),
        (["good", None], "the label in row 1 of split 'train' is missing"),
        ([1.0, float("nan")], "the label in row 1 of split 'train' is missing"),
        (["good", ""], "label '' in row 1 .* is neither"),
        ([0.5, 1.0], "label 0.5 in row 0 .* is neither"),
        (["1e0", "0"], "label '1e0' in row 0 .* is neither"),
        ([-1, 0], "label -1 in row 0 .* is neither"),
        (["goood", "bad"], "label 'goood' in row 0 .*; nearest is 'good'"),
    ],
)
def test_bad_labels_are_named_with_their_row(column, message):
    with pytest.raises(ValueError, match=message):
        read(column, [" bad", " good"])


def test_a_mapping_says_what_each_label_means():
    meaning = {1: " bad", 2: " bad", 4: " good", "True": " good", "-": " bad"}
    assert read(["2", 4, 1.0, "-", "True"], [" bad", " good"], labels_are=meaning) == [0, 1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"label 3 in row 0 .* is not one of \['1', '2', '4', 'True', '-'\]"):
        read([3], [" bad", " good"], labels_are=meaning)
    with pytest.raises(
        ValueError, match=r"must map each label to one of the words \[' bad', ' good'\]; got 'good' for 1"
    ):
        read([1], [" bad", " good"], labels_are={1: "good"})
    with pytest.raises(ValueError, match="labels_are must be one of .*; got 'word', nearest is 'words'"):
        read([1], [" bad", " good"], labels_are="word")


def test_names_of_classes_decide_where_they_are_the_words(tokenizer):
    """A data set whose class 0 is named good, with words in another order, is the same task."""

    def labels(names, words=(" bad", " good"), form=None, **options):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"text": ["the plot", "the film"], "label": [0, 1]}, features).with_format(
            form
        )
        columns = {"text": "text", "label": "label"}
        data = text_classification(rows, tokenizer, **columns, words=words, template="{text} is", **options)
        return data.train.labels.tolist()

    assert labels(["neg", "pos"]) == [0, 1]
    assert labels(["bad", "good"]) == [0, 1]
    assert labels(["good", "bad"]) == labels(["good", "bad"], form="numpy") == [1, 0]
    assert labels(["good", "bad"], labels_are="integers") == [0, 1]
    assert labels(["bad", "positive"]) == [0, 1]
    with pytest.raises(ValueError, match="where 'good' is class 0; among the words it is class 1"):
        labels(["good", "positive"])
    with pytest.raises(ValueError, match="label 'neg' in row 0"):
        labels(["neg", "pos"], labels_are="words")
    assert labels(["neg", "pos"], labels_are={0: " good", 1: " bad"}) == [1, 0]
