"""The table of data sets is complete, and the documents have the same."""

from pathlib import Path
from typing import get_args

from bnlora.data.assets import DOMAINS
from bnlora.data.catalogue import DATA_SETS, overview
from bnlora.data.medical import MedicalSet
from bnlora.data.questions import QuestionSet

ROOT = Path(__file__).parents[2]


def test_every_set_of_the_readers_is_there():
    assert [*DATA_SETS] == ["vader", "reuters", *get_args(QuestionSet), *get_args(MedicalSet)]
    assert [*DATA_SETS["vader"].rows] == [*DOMAINS]


def test_the_guide_has_the_same_table():
    table = overview()
    lines = (ROOT / "docs/guides/data.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| {' | '.join(table.header)} |") + 2
    for row, line in zip(table.rows, lines[start:], strict=False):
        name, rows, task, package, licence, source = row
        package = package.replace("\n", "").replace(", ", "`, ")
        cells = [f"`{name}`", rows.replace("\n", ", "), task, f"`{package}", licence, source]
        assert line == f"| {' | '.join(cells)} |"
    assert lines[start + len(table.rows)] == ""


def test_it_shows_names_and_sizes_as_text_and_as_html():
    for shown in (repr(overview()), overview()._repr_html_()):
        assert all(name in shown for name in DATA_SETS)
        assert "40,398" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" not in repr(overview())  # no cell is cut
