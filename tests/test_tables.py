"""Reading and writing tables, and one clear sentence for what cannot be read."""

import pytest
from datasets import Dataset

from bnlora.tables import WRITERS, read_table, require_writable, write_table

ROWS = Dataset.from_dict({"text": ['one, "two"', "drei\nvier"], "label": [1, 0], "p": [0.25, 1e-9]})


@pytest.mark.parametrize("ending", sorted(WRITERS))
def test_round_trip(tmp_path, ending):
    write_table(ROWS, tmp_path / "deep" / f"rows{ending}")
    assert read_table(tmp_path / "deep" / f"rows{ending}")[:] == ROWS[:]


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
        ("a.csv", "text,label\n", r"cannot be read as csv \(it has no rows\)"),
        ("a.csv", 'text,label\n1,2,3\n"x', r"cannot be read as csv \(.+\)"),
        ("a.jsonl", '{"text":', r"cannot be read as jsonl \(JSON parse error"),
        ("a.parquet", "PAR1", r"cannot be read as parquet \(Parquet file size is 4 bytes"),
    ],
)
def test_bad_files(tmp_path, name, content, message, capfd):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)
    assert capfd.readouterr() == ("", "")  # datasets would log the same error a second time
