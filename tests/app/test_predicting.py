"""Predictions in pieces: those of the whole table, in the memory of a piece, and never lost."""

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from builders.commands import WORDS, call, reviews

from bnlora.app import predicting
from bnlora.app.outcome import ExitCode
from bnlora.data.tables import read_columns, write_table

SMALL = ["--steps", "2", "--batch-size", "4", "--rank", "1", "--top-layers", "1", "--target", "lm_head"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with tables of eleven rows, a fit, and the predictions in one piece."""
    folder = tmp_path_factory.mktemp("pieces")
    for ending in ("csv", "jsonl", "parquet"):
        write_table(reviews(11), folder / f"rows.{ending}")
    command = ["fit", folder / "rows.csv", "--out", folder / "fit", "--base", tiny_folder, *WORDS, *SMALL]
    assert call(*command).exit_code == 0
    assert predict(folder, "rows.csv", "whole.csv").exit_code == 0
    return folder


def predict(place: Path, table: str, out: str):
    return call("predict", place / "fit", place / table, "--out", place / out, "--draws", 2, "--json")


@pytest.fixture
def sizes(monkeypatch):
    """The rows of every piece that is predicted; pieces have four."""
    plain, counted = predicting.predicted, []

    def predicted(key, recipe, drawn, batch, **options):
        counted.append(len(batch))
        return plain(key, recipe, drawn, batch, **options)

    monkeypatch.setattr(predicting, "PIECE", 4)
    monkeypatch.setattr(predicting, "predicted", predicted)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_pieces_are_the_whole_table(ending, place, sizes):
    done = predict(place, f"rows.{ending}", f"pieces.{ending}")
    assert done.exit_code == 0, done.output
    assert sizes == [4, 4, 3]
    pieces, whole = read_columns(place / f"pieces.{ending}"), read_columns(place / "whole.csv")
    assert pieces.column_names == whole.column_names
    for name in whole.column_names:
        values = [pieces[name].to_pylist(), whole[name].to_pylist()]
        if name in ("text", "label", "prediction"):
            assert list(map(str, values[0])) == values[1]
        else:  # batches of other rows round differently
            np.testing.assert_allclose(*np.array(values, float), rtol=1e-4, atol=1e-6)
    result = json.loads(done.stdout)
    assert (result["rows"], sum(result["predicted"].values())) == (11, 11)
    assert result["mean_entropy"] == pytest.approx(np.mean(np.array(whole["entropy"].to_pylist(), float)))


def test_an_interrupt_keeps_the_rows_so_far(place, sizes, monkeypatch):
    plain = predicting.predicted

    def interrupted(*arguments, **options):
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(predicting, "predicted", interrupted)
    done = predict(place, "rows.csv", "broken.csv")
    assert done.exit_code == ExitCode.INTERRUPTED
    assert done.stdout == ""
    assert f"the first 8 of 11 rows are in '{place / 'broken.part.csv'}'" in done.stderr
    assert not (place / "broken.csv").exists()
    assert [path.name for path in place.glob(".*")] == []
    part, whole = read_columns(place / "broken.part.csv"), read_columns(place / "whole.csv")
    assert part["text"].to_pylist() == whole["text"].to_pylist()[:8]
    assert part["prediction"].to_pylist() == whole["prediction"].to_pylist()[:8]


def test_an_interrupt_while_the_table_is_written_keeps_all_rows(place, sizes, monkeypatch):
    plain = predicting.write_pieces

    def interrupted(tables, path):
        if path == place / "late.csv":
            raise KeyboardInterrupt
        plain(tables, path)

    monkeypatch.setattr(predicting, "write_pieces", interrupted)
    assert predict(place, "rows.csv", "late.csv").exit_code == ExitCode.INTERRUPTED
    assert len(read_columns(place / "late.part.csv")) == 11


def test_an_error_in_a_later_piece_names_its_line_and_keeps_the_rows_so_far(place, sizes):
    long = "the plot is good " * 30
    lines = [["text"], *[[text] for text in [*reviews(9)["text"][:], long]]]
    with (place / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    done = predict(place, "long.csv", "long-out.csv")
    assert done.exit_code == ExitCode.BAD_INPUT
    assert f"line 11 of {str(place / 'long.csv')!r}" in done.stderr
    assert "the first 8 of 10 rows are in" in done.stderr
    assert len(read_columns(place / "long-out.part.csv")) == 8


def test_a_malformed_line_is_found_before_the_first_prediction(place, sizes):
    (place / "odd.csv").write_text("text,label\n" + "good,1\n" * 9 + "bad\n")
    done = predict(place, "odd.csv", "odd-out.csv")
    assert done.exit_code == ExitCode.BAD_INPUT
    assert "line 11 of" in done.stderr
    assert sizes == []


def test_a_full_disk_keeps_the_pieces_that_were_written(tmp_path):
    """The temporary file ends in the middle of the third piece."""
    with (tmp_path / "spool").open("w+b") as file:
        spool = predicting.Spool(file)
        for number in range(2):
            spool.add(pa.table({"p": [number, 0.5], "name": ["a", "b"]}))
        file.write(b"half a piece")
        assert [table["p"].to_pylist() for table in spool.tables()] == [[0, 0.5], [1, 0.5]]


def test_every_piece_has_the_same_draws(place, sizes, monkeypatch):
    drawn = []
    plain = predicting.Drawn.draw_adapters

    def seen(self, key, num_draws):
        drawn.append(plain(self, key, num_draws))
        return drawn[-1]

    monkeypatch.setattr(predicting.Drawn, "draw_adapters", seen)
    assert predict(place, "rows.csv", "drawn.csv").exit_code == 0
    assert len(drawn) == 3
    jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[2])
