"""From texts to batches with a byte-level tokenizer, and one clear sentence for every error."""

import ast
import copy
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import bnlora as bl
from bnlora.data.text import text_classification
from bnlora.prediction.reading import tokens_of

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


def test_a_base_refuses_tokens_that_it_has_no_row_for(tokenizer):
    """Two words were added to the tokenizer without resizing the embedding."""
    before = len(tokenizer)
    base = SimpleNamespace(tokenizer=copy.deepcopy(tokenizer), modules={}, vocab_size=before)
    np.testing.assert_array_equal(read(base).train.tokens, read(tokenizer).train.tokens)
    base.tokenizer.add_tokens([" fine", " poor"])
    sizes = f"the model has not: the tokenizer has {before + 2} tokens, the embedding {before} rows"
    with pytest.raises(
        ValueError, match=f"word ' poor' is the token ' poor' of id {before + 1}, which {sizes}"
    ):
        read(base, words=[" bad", " poor"])
    rows = {"sentence": ["the plot", "the fine plot"], "label": [0, 1]}
    with pytest.raises(
        ValueError, match=f"row 1 of split 'train' has the token ' fine' of id {before}, which {sizes}; tok"
    ):
        read(base, rows)


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


READERS = {
    "text_classification": (bl.text_classification, OPTIONS),
    "text_outcomes": (
        bl.text_outcomes,
        {"text": "sentence", "outcome": "label", "kind": "values", "words": [" bad", " good"]},
    ),
    "multiple_choice": (bl.multiple_choice, {"context": "sentence", "choices": "label", "label": "label"}),
    "letter_choices": (bl.letter_choices, {"question": "sentence", "choices": "label", "label": "label"}),
    "language_modelling": (bl.language_modelling, {"text": "sentence"}),
}


@pytest.mark.parametrize("reader", READERS)
def test_columns_and_frames_that_are_no_data_set_are_one_sentence(reader, tokenizer):
    read_rows, options = READERS[reader]
    for rows, kind in ((ROWS, "list"), (pd.DataFrame(ROWS), "DataFrame")):
        with pytest.raises(
            ValueError, match=rf"split '\w+' must be a datasets.Dataset; got {kind}. Make one"
        ):
            read_rows(rows, tokenizer, **options)


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
        (ROWS, {"words": [" bad", "bad "]}, "label words ' bad' and 'bad ' must differ by more than spaces"),
        (
            ROWS,
            {"words": [" bad", ""]},
            "label word '' must be .* it adds no token; try a more common",
        ),
        (ROWS, {"words": " bad"}, "words must be a list of strings, one for each class; got ' bad'"),
        (ROWS, {"words": [0, 1]}, r"words must be a list of strings, one for each class; got \[0, 1\]"),
        (ROWS, {"words": [" bad"]}, "at least two label words"),
        (ROWS, {"template": "Review:"}, "must contain {text} once"),
        (ROWS, {"max_length": 12}, r"\d of 3 texts of split 'train' are longer than 12 tokens \(first: row"),
        (
            ROWS,
            {"max_length": 3, "truncate": "left"},
            "the template takes .* of 3 tokens, and no letter of the text in row 0",
        ),
        (
            ROWS,
            {"max_length": 12, "truncate": "rihgt"},
            "truncate must be one of .*; got 'rihgt', nearest is 'right'",
        ),
        (ROWS, {"truncate": "rihgt"}, "truncate must be one of"),
        (ROWS, {"max_length": 0}, "max_length must be at least 1; got 0"),
    ],
)
def test_bad_input(tokenizer, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        read(tokenizer, rows, **changes)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "letter", ["\N{SLIGHTLY SMILING FACE}", "e\u0301", "\U0001f469\u200d\U0001f4bb", "\u20ac"]
)
def test_truncation_cuts_between_letters_and_never_the_template(tokenizer, side, letter):
    """At every length, for letters of several tokens: the kept part has the most whole letters possible."""
    text, pair = letter * 5, {"sentence": [letter * 5, "bad"], "label": [0, 1]}
    before, after = "Review: ", "\nSentiment:"

    def length(letters):
        return len(tokenizer(before + letter * letters + after)["input_ids"])

    for limit in range(length(1), length(5) + 1):
        train = read(tokenizer, pair, truncate=side, max_length=limit).train
        row = tokenizer.decode(train.tokens[0][np.asarray(train.mask[0])])
        kept = max(n for n in range(1, 6) if length(n) <= limit)
        assert row == before + letter * kept + after
    with pytest.raises(ValueError, match="no letter of the text in row 0 of split 'train' fits"):
        read(tokenizer, pair, truncate=side, max_length=length(1) - 1)
    assert text == letter * 5


def with_special_tokens(tokenizer, form):
    """The same tokenizer, with special tokens around every row."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    named = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|end|>", model_max_length=64)


@pytest.mark.parametrize("form", ["<s> $A </s>", "<s> $A", "$A </s>", "<s> <s> $A </s> </s>"])
@pytest.mark.parametrize(
    "template", ["Review: {text}\nSentiment:", "{text}", "<s>Review: {text}</s>\nSentiment:"]
)
def test_the_last_token_of_a_row_is_the_templates_own(tokenizer, form, template):
    special = with_special_tokens(tokenizer, form)
    data, plain = (
        read(special, template=template),
        read(with_special_tokens(tokenizer, "$A"), template=template),
    )
    np.testing.assert_array_equal(data.label_ids, plain.label_ids)
    begin = form.split("$A")[0].replace(" ", "")
    if template.startswith("<s>") and begin == "<s>":
        begin = ""  # one is there
    for split, expected in ((data.train, begin), (plain.train, "")):
        for ids, last, sentence in zip(split.tokens, split.last, ROWS["sentence"], strict=True):
            assert special.decode(ids[: last + 1]) == expected + template.replace("{text}", sentence)
            assert tokens_of(sentence, special, template) == tokens_of(sentence, tokenizer, "{text}")
    limit = int(data.train.mask.sum(1).max()) - 1
    cut = read(special, template=template, truncate="right", max_length=limit).train
    assert cut.mask.sum(1).max() == limit
    longest = special.decode(cut.tokens[2][np.asarray(cut.mask[2])])
    assert longest.startswith(begin + template.split("{text}")[0])
    assert longest.endswith(template.split("{text}")[1])


def test_a_tokenizer_that_puts_tokens_into_a_text_is_refused(tokenizer):
    class Inserting:
        model_max_length, pad_token_id = 64, 0

        def __call__(self, text, *, add_special_tokens=True, **options):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [ids[0], 0, *ids[1:]] if add_special_tokens else ids}

        def convert_ids_to_tokens(self, ids):
            return tokenizer.convert_ids_to_tokens(ids)

    with pytest.raises(ValueError, match="special tokens before and after a text, not within it; got .*'R'"):
        read(Inserting(), template="R{text} is")


@pytest.mark.parametrize(
    ("template", "word", "message"),
    [
        ("Review: {text}\nSentiment: ", "good", r"merges with the text before it: \['Ġ'\] becomes "
         r"\['Ġgood'\]; end the template without the space, and try ' good'"),
        ("Review: {text}\nSentiment:", " marvellous", r"it becomes \d+ tokens, \['Ġ.*; try a more common "),
        ("{text} i", "s", r"it merges with the text before it: \['Ġ', 'i'\] becomes \['Ġis'\]"),
        ("{text} is", "good", r"it becomes \d tokens, .*; try ' good'"),
    ],
)  # fmt: skip
def test_a_label_word_that_is_not_one_token_is_shown_as_what_it_becomes_there(
    tokenizer, template, word, message
):
    with pytest.raises(ValueError, match=message) as refused:
        read(tokenizer, template=template, words=[" bad", word])
    counted = re.search(r"becomes (\d+) tokens, (\[.*?\]);", str(refused.value))
    assert counted is None or int(counted[1]) == len(ast.literal_eval(counted[2])) > 1


def test_a_word_is_read_in_its_context(tokenizer):
    """A tokenizer that puts a space before every text: right after another text the word has its own."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|end|>", model_max_length=64)
    good = tokenizer(" good")["input_ids"]
    for template in ("{text} is", "{text}"):
        data = read(spaced, template=template, words=[" bad", " good"])
        assert list(data.label_ids)[1:] == good
    with pytest.raises(ValueError, match="label word 'good' must be a single token .*; try ' good'"):
        read(spaced, template="{text} is", words=[" bad", "good"])


def test_a_context_longer_than_the_model_allows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="are longer than 64 tokens"):
        read(tokenizer, {"sentence": ["good " * 100, "bad"], "label": [1, 0]})
