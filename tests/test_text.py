"""From texts to batches with a byte-level tokenizer, and one clear sentence for what cannot be read."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from bnlora.text import text_classification

ROWS = {"sentence": ["the film was good", "bad plot", "the the the plot is bad"], "label": [1, 0, 0]}
OPTIONS = {
    "text": "sentence",
    "label": "label",
    "words": [" bad", " good"],
    "template": "Review: {text}\nSentiment:",
}


def read(tokenizer, rows=ROWS, **changes):
    return text_classification(Dataset.from_dict(rows), tokenizer, **{**OPTIONS, **changes})


def test_rows_are_templates_filled_and_padded_on_the_right(tokenizer):
    data = read(tokenizer)
    assert data.train.tokens.shape[1] % 8 == 0
    np.testing.assert_array_equal(data.train.labels, ROWS["label"])
    for ids, mask, sentence in zip(data.train.tokens, data.train.mask, ROWS["sentence"], strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert tokenizer.decode(ids[:length]) == f"Review: {sentence}\nSentiment:"
        assert tokenizer.decode(ids[length:]) == "<|end|>" * (len(ids) - length)
    assert [tokenizer.decode([i]) for i in data.label_ids] == [" bad", " good"]


def test_text_may_contain_braces(tokenizer):
    data = read(tokenizer, {"sentence": ["{text} {0} bad", "good"], "label": [0, 1]})
    assert "{text} {0} bad" in tokenizer.decode(data.train.tokens[0])


def test_splits_keep_their_names_and_unknown_ones_are_named(tokenizer):
    rows = Dataset.from_dict(ROWS)
    data = text_classification(DatasetDict(train=rows, test=rows), tokenizer, **OPTIONS)
    assert len(data.test) == 3
    assert "train 3 x" in repr(data)
    with pytest.raises(KeyError, match="no split 'validation'; the splits are train, test"):
        _ = data.validation


def test_labels_may_be_the_words(tokenizer):
    data = read(tokenizer, {**ROWS, "label": ["good", "bad", " bad"]})
    np.testing.assert_array_equal(data.train.labels, ROWS["label"])


def test_rows_without_labels_and_splits_of_one_class_may_be_predicted(tokenizer):
    np.testing.assert_array_equal(read(tokenizer, label=None).train.labels, [-1, -1, -1])
    one_class = Dataset.from_dict({"sentence": ["good", "good"], "label": [1, 1]})
    data = text_classification({"test": one_class}, tokenizer, **OPTIONS)
    np.testing.assert_array_equal(data.test.labels, [1, 1])


@pytest.mark.parametrize(("side", "kept"), [("right", "the the"), ("left", "plot is bad")])
def test_truncation_keeps_the_template_and_one_end_of_the_text(tokenizer, side, kept):
    longest = read(tokenizer).train.mask.sum(1).max()
    data = read(tokenizer, truncate=side, max_length=int(longest) - 1)
    text = tokenizer.decode(data.train.tokens[2][np.asarray(data.train.mask[2])])
    assert text.startswith("Review: ")
    assert text.endswith("\nSentiment:")
    assert kept in text
    assert data.train.mask.sum(1).max() <= longest - 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"text": "sentense"}, r"no column 'sentense'; its columns are .*, nearest is 'sentence'"),
        ({"sentence": [], "label": []}, {}, "split 'train' is empty"),
        ({**ROWS, "label": [1, 1, 1]}, {}, r"split 'train' has rows of one class only \('good'\)"),
        ({**ROWS, "label": [0, 1, 2]}, {}, "label 2 in row 2 of split 'train' is neither an integer"),
        ({**ROWS, "label": ["good", "ugly", "bad"]}, {}, r"label 'ugly' in row 1 .* nor one of \['bad'"),
        ({**ROWS, "label": [0.5, 1.0, 0.0]}, {}, "label 0.5 in row 0"),
        ({**ROWS, "sentence": ["good", "  ", "bad"]}, {}, "text in row 1 .* non-empty string; got '  '"),
        ({**ROWS, "sentence": ["good", None, "bad"]}, {}, "text in row 1 .* got None"),
        (ROWS, {"words": [" bad", " marvellous"]}, "label word ' marvellous' must be a single token"),
        (ROWS, {"words": [" bad", " bad"]}, "label words ' bad' and ' bad' are the same token"),
        (ROWS, {"words": [" bad"]}, "at least two label words"),
        (ROWS, {"template": "Review:"}, "must contain {text} once"),
        (ROWS, {"max_length": 12}, r"\d of 3 texts of split 'train' are longer than 12 tokens \(first: row"),
        (ROWS, {"max_length": 3, "truncate": "left"}, "the template alone is longer than 3 tokens"),
        (ROWS, {"max_length": 12, "truncate": "rihgt"}, "truncate must be 'error', 'left' or 'right'"),
    ],
)
def test_bad_input(tokenizer, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tokenizer, rows, **changes)


def test_a_context_longer_than_the_model_allows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="are longer than 64 tokens"):
        read(tokenizer, {"sentence": ["good " * 100, "bad"], "label": [1, 0]})
