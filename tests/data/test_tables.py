"""Reading and writing tables: one rule for every format, and one sentence for every error."""

import csv
import datetime
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bnlora.data.tables import (
    RowError,
    naming_lines,
    read_columns,
    read_table,
    require_writable,
    write_table,
)
from bnlora.data.text import text_classification

ENDINGS = ["csv", "jsonl", "parquet"]
ROWS = Dataset.from_dict(
    {"text": ['one, "two"', "drei\nvier"], "label": [1, 0], "p": [0.25, 1e-17], "x": [None, "y"]}
)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "PARQUET"])
def test_what_is_written_is_read_with_its_types(tmp_path, ending):
    write_table(ROWS, tmp_path / "deep" / f"rows.{ending}")
    assert read_columns(tmp_path / "deep" / f"rows.{ending}").to_pydict() == ROWS[:]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [f"rows.{ending}"]


def test_a_csv_file_holds_strings(tmp_path):
    write_table(ROWS, tmp_path / "rows.csv")
    expected = {"text": ROWS["text"][:], "label": ["1", "0"], "p": ["0.25", "1e-17"], "x": ["", "y"]}
    assert read_columns(tmp_path / "rows.csv").to_pydict() == expected == read_table(tmp_path / "rows.csv")[:]


def test_a_csv_file_holds_every_line_end(tmp_path):
    texts = ["a\rb", "a\r\nb", "\r", "a\nb", "plain"]
    write_table(Dataset.from_dict({"text": texts, "n": [1, 2, 3, 4, 5]}), tmp_path / "rows.csv")
    assert read_table(tmp_path / "rows.csv")["text"][:] == texts
    assert (tmp_path / "rows.csv").read_bytes().endswith(b"plain,5\n")


def save(path, rows):
    """Write rows without this library, each format by another library."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


LABELS = {
    "words": ([" bad", " good"], ["bad", " good"]),
    "integers": ([" bad", " good"], [0, 1]),
    "floats": ([" bad", " good"], [0.0, 1.0]),
    "truth values": ([" False", " True"], [False, True]),
    "None": ([" good", " None"], ["good", "None"]),
}
TEXTS = st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=4)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, labels=st.sampled_from(sorted(LABELS)))
@example(texts=["null", "None", "NA", '"null"', "nan", "NULL", "N/A"], labels="None")
@example(texts=["1", "2.50", "true", "a,b", 'say "x"', "a\r\nb", "\u2028x", "2020-01-01"], labels="words")
def test_the_same_rows_in_three_kinds_of_file_are_the_same_batch(
    word_tokenizer, tmp_path_factory, texts, labels
):
    words, values = LABELS[labels]
    rows = [{"id": "" if i else 7, "text": t, "label": values[i % 2]} for i, t in enumerate(texts)]
    folder = tmp_path_factory.mktemp("rows")
    wanted = [i % 2 for i in range(len(texts))]
    for ending in ENDINGS:
        table = save(folder / f"rows.{ending}", [{**row, "id": str(row["id"])} for row in rows])
        read = read_table(table, columns=["text", "label"])
        assert read["text"][:] == texts
        batch = text_classification(
            read,
            word_tokenizer,
            text="text",
            label="label",
            words=words,
            template="{text} is",
            max_length=200,
        ).train
        np.testing.assert_array_equal(batch.labels, wanted)
        plain = word_tokenizer([f"{text} is" for text in texts])["input_ids"]
        assert [
            row[mask].tolist() for row, mask in zip(batch.tokens, np.asarray(batch.mask), strict=True)
        ] == plain


@pytest.fixture(scope="session")
def word_tokenizer(tokenizer):
    """The tokenizer, which also has the words False, True and None as one token each."""
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(
        tokenizer.backend_tokenizer.to_str()), pad_token="<|end|>")  # fmt: skip
    other.add_tokens([" False", " True", " None"])
    return other


def test_columns_that_are_not_needed_may_hold_anything(tmp_path):
    """An identifier that is a number 10,000 times and then is not, lists of several kinds, a date, bytes."""
    identifiers = [*range(10_000), "a1"]
    texts = [f"text {i}" for i in identifiers]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "id", "text"], *([i, i, t] for i, t in zip(identifiers, texts, strict=True))]
        )
    odd = [[1, "a"], {"b": None}, 2**70, "x", 1.5]
    records = [{"id": odd[i % 5], "text": t} for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    table = pa.table({"id": pa.array([b"\xff"] * len(texts)), "text": pa.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    for ending in ENDINGS:
        assert read_table(tmp_path / f"a.{ending}", columns=["text"])[:] == {"text": texts}


def test_odd_columns_are_written_again_as_they_were(tmp_path):
    records = [
        {"id": 7, "mixed": 1, "meta": {"a": [1, 2]}, "big": 2**70, "text": "x"},
        {"id": None, "mixed": "1", "meta": {"b": None}, "big": 1, "text": "é"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_table(read_columns(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in row.items() if k not in ("meta", "mixed", "big")} for row in records]
    strings = [{"mixed": "1", "meta": json.dumps(row["meta"]), "big": str(row["big"])} for row in records]
    assert found == [{**a, **b} for a, b in zip(kept, strings, strict=True)]

    day = datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC)
    table = pa.table({"at": [day], "list": [[1, 2]], "kind": pa.array(["k"]).dictionary_encode(), "t": ["x"]})
    pq.write_table(table, tmp_path / "in.parquet")
    write_table(read_columns(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(table)
    write_table(table, tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv")[0] == {"at": str(day), "list": "[1, 2]", "kind": "k", "t": "x"}
    write_table(pa.table({"p": [float("nan"), float("inf"), 0.1]}), tmp_path / "p.jsonl")
    assert (tmp_path / "p.jsonl").read_text() == '{"p": null}\n{"p": null}\n{"p": 0.1}\n'


def test_names_of_classes_in_a_parquet_file_stay(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features).to_parquet(tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet", columns=["text", "label"])
    assert read.features["label"].names == ["good", "bad"]
    assert read["label"][:] == [0, 1]


def test_the_name_of_a_folder_adds_no_column(tmp_path):
    write_table(ROWS, tmp_path / "split=train" / "a.parquet")
    assert read_table(tmp_path / "split=train" / "a.parquet").column_names == ROWS.column_names


def test_json_may_be_one_list_of_objects(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "x", "label": 1},\n {"text": "y"}\n]')
    assert read_table(tmp_path / "a.json")[:] == {"text": ["x", "y"], "label": ["1", None]}


def test_texts_longer_than_the_limit_of_csv_are_read_and_the_limit_stays(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_table(tmp_path / "a.csv")["text"][0]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig", "UTF8"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.csv").write_text("text\ncafé\n", encoding=encoding)
    (tmp_path / "a.jsonl").write_text('{"text": "café"}\n', encoding=encoding)
    for ending in ("csv", "jsonl"):
        assert read_table(tmp_path / f"a.{ending}", encoding=encoding)[:] == {"text": ["café"]}
        if encoding == "utf-8-sig":  # what Excel writes: the mark is no part of the first name
            assert read_table(tmp_path / f"a.{ending}")[:] == {"text": ["café"]}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_bytes_of_another_encoding_are_named_with_their_line_and_the_option(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b'\xef\xbb\xbftext\r\n"two\r\nlines"\r\ncaf\xe9\r\n')
    with pytest.raises(ValueError, match=r"'utf-8': byte 0xe9 on line 4 is not valid.*--encoding.*cp1252"):
        read_table(path)
    with pytest.raises(ValueError, match="encoding 'latin-9x' is not known; nearest is 'latin9'"):
        read_table(path, encoding="latin-9x")


def test_rows_are_named_as_an_editor_shows_them(tmp_path):
    """The third row of every file: after a text of two lines, and a blank line."""
    texts = ["one", "two\nthree", "four"]
    (tmp_path / "a.csv").write_text('text\none\n\n"two\nthree"\nfour\n')
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps({"text": t}) for t in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts], indent=1))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    places = {"csv": "line 6", "jsonl": "line 5", "json": "object 3", "parquet": "row 2 .counted from 0."}
    for ending, place in places.items():
        path = tmp_path / f"a.{ending}"
        assert read_table(path)["text"][:] == texts
        with pytest.raises(ValueError, match=f"^the text in {place} of '.*a.{ending}' is odd$"):
            with naming_lines({"train": path}):
                raise RowError("the text in ", "train", 2, " is odd")


def test_an_unknown_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'rows.xls' must end in one of .csv, .jsonl, .parquet; got '.xls'"):
        require_writable(tmp_path / "rows.xls")
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must end in one of .csv, .json, .jsonl, .parquet; got '.txt'"):
        read_table(tmp_path / "rows.txt")


def test_missing_file_names_the_nearest(tmp_path):
    write_table(ROWS, tmp_path / "reviews.csv")
    with pytest.raises(FileNotFoundError, match=r"no file '.*revews.csv'; the nearest is '.*reviews.csv'"):
        read_table(tmp_path / "revews.csv")
    with pytest.raises(FileNotFoundError, match="no file 'nowhere/reviews.csv'$"):
        read_table("nowhere/reviews.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "'.*a.csv' is empty"),
        ("a.csv", "\n\n", "'.*a.csv' has only blank lines"),
        ("a.csv", "text,label\n", "'.*a.csv' has no rows"),
        ("a.csv", 'text,label\n"a\nb",0\n1,2,3\n', "line 4 of '.*a.csv' has 3 cells, .* names 2 columns"),
        ("a.csv", 'text,label\na,0\n"x,1\n', "unexpected end of data, in the row that begins on line 3"),
        ("a.csv", "text,text\na,b\n", "'.*a.csv' has 2 columns 'text'; one is needed"),
        ("a.csv", "txt\na\n", r"has no column 'text'; its columns are \['txt'\], nearest is 'txt'"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text":',
            "line 2 of '.*a.jsonl' cannot be read as json: Expecting value",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n"b"\n',
            r"line 2 of '.*a.jsonl' must be a JSON object, \{...\}; got \"b\"",
        ),
        ("a.jsonl", '{"text": "\\ud83d"}', "line 1 of '.*a.jsonl' has half a letter"),
        (
            "a.jsonl",
            '{"text": ' + "[" * 100_000,
            "line 1 of '.*a.jsonl' cannot be read as json: it is nested too",
        ),
        ("a.jsonl", "\n", "'.*a.jsonl' has no rows"),
        ("a.json", "[1]", r"object 1 of '.*a.json' must be a JSON object, \{...\}; got 1"),
        ("a.jsonl", '{"txt": "a"}', "has no column 'text'; its columns are .*, nearest is 'txt'"),
        ("a.parquet", "PAR1", r"cannot be read as parquet \(Parquet file size is 4 bytes"),
    ],
)
def test_bad_files(tmp_path, name, content, message, capfd):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, columns=["text"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("description", ['{"info": {"features": {"text": ["x"]}}}', '{"info": 1}', "{"])
def test_a_damaged_description_of_the_columns_is_refused(tmp_path, description):
    """Found by `tests/project/test_fuzz.py`: a changed byte in what `datasets` writes into the file."""
    table = pa.table({"text": ["good"]}).replace_schema_metadata({b"huggingface": description.encode()})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="the description of the columns in the table is damaged"):
        read_table(tmp_path / "rows.parquet")
