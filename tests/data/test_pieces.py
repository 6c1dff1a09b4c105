"""Pieces of a table are the table, whatever its types and wherever they begin."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bnlora.data import pieces as module
from bnlora.data.pieces import open_table
from bnlora.data.tables import read_columns, write_pieces

ROWS = [
    {"text": "a", "n": 1, "mixed": 1, "late": None, "list": [], "deep": {"x": 1}, "big": 1, "odd": "x"},
    {"text": "b", "n": 2, "mixed": 2.5, "late": None, "list": [], "deep": {"x": 2}, "big": 2, "odd": "y"},
    {
        "text": "c",
        "n": 3,
        "mixed": None,
        "late": 0.5,
        "list": [1],
        "deep": {"y": 2},
        "big": 2**70,
        "odd": [1],
    },
    {"text": "d", "n": None, "mixed": True, "late": 1.5, "list": [2], "deep": None, "big": 4, "new": True},
    {"text": 'e, "f"\ng', "n": 5, "mixed": "x", "late": None, "list": None, "deep": {}, "big": 5, "odd": "z"},
]


@pytest.mark.parametrize("size", [1, 2, 5, 99])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_pieces_are_the_table(ending, size, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCANNED", 2)
    path = tmp_path / f"rows.{ending}"
    if ending == "json":
        path.write_text(json.dumps(ROWS))
    else:
        source = tmp_path / "source.jsonl"
        source.write_text("\n".join(map(json.dumps, ROWS)))
        path.write_bytes(source.read_bytes())
        if ending != "jsonl":
            write_pieces([read_columns(source)], path)
    whole, table = read_columns(path), open_table(path)
    pieces = list(table.pieces(size))
    assert [len(piece) for piece in pieces] == [min(size, 5 - i) for i in range(0, 5, size)]
    assert (table.num_rows, table.column_names) == (5, whole.column_names)
    assert pa.concat_tables(pieces).cast(whole.schema).to_pydict() == whole.to_pydict()
    assert all(piece.schema.equals(whole.schema) for piece in pieces)
    for out in ("csv", "jsonl", "parquet"):
        write_pieces(table.pieces(size), tmp_path / f"pieces.{out}")
        write_pieces([whole], tmp_path / f"whole.{out}")
        assert read_columns(tmp_path / f"pieces.{out}") == read_columns(tmp_path / f"whole.{out}")
        if out != "parquet":
            assert (tmp_path / f"pieces.{out}").read_bytes() == (tmp_path / f"whole.{out}").read_bytes()


def test_a_table_is_checked_when_it_is_opened(tmp_path):
    files = {
        "cells.csv": (b"text,label\na,1\nb\n", "line 3 of .* has 1 cells, but the header names 2 columns"),
        "twice.csv": (b"text,text\na,b\n", "has 2 columns 'text'; one is needed"),
        "blank.csv": (b"\n\n", "has only blank lines"),
        "header.csv": (b"text\n", "has no rows"),
        "quote.csv": (b'text\n"a\n', "cannot be read as csv: .*, in the row that begins on line 2"),
        "bytes.csv": (b"text\na\n\xff\n", "byte 0xff on line 3 is not valid"),
        "line.jsonl": (b'{"text": "a"}\n{\n', "line 2 of .* cannot be read as json"),
        "number.jsonl": (b'{"text": "a"}\n3\n', "line 2 of .* must be a JSON object"),
        "list.json": (b'\n [{"text": "a"}, 3]', "object 2 of .* must be a JSON object"),
        "bytes.jsonl": (b'{"text": "\xff"}\n', "byte 0xff on line 1 is not valid"),
        "none.jsonl": (b"\n", "has no rows"),
        "broken.parquet": (b"PAR1 and so on", "cannot be read as parquet"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        for read in (open_table, read_columns):
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="the nearest is '.*list.json'"):
        open_table(tmp_path / "lost.json")


def test_texts_that_are_not_utf8_are_found_in_their_piece(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"ca\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    pieces = open_table(tmp_path / "a.parquet").pieces(1)
    assert next(pieces)["text"].to_pylist() == ["good"]
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        next(pieces)
