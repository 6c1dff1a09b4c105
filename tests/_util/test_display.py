"""Tables as text and as HTML."""

import re

from bnlora._util.display import Table, facts

TABLE = Table(
    "Two <b>", ("method", "NLL"), (("LoRA", "0.4\n0.3-0.5"), ("[b]ours[/b]", "0.3")), frozenset({1})
)


def test_text_shows_every_cell_and_takes_no_markup():
    text = repr(TABLE)
    for piece in ("Two <b>", "method", "LoRA", "0.4", "0.3-0.5", "[b]ours[/b]"):
        assert piece in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_html_is_escaped_and_marks_groups():
    html = TABLE._repr_html_()
    assert "Two &lt;b&gt;" in html
    assert "0.4<br>0.3-0.5" in html
    assert html.count("class=group") == 1
    assert html.count("<tr") == 3


def test_a_table_without_header_has_no_head():
    table = facts("About", {"name": "[b]x[/b]", "size": "3"})
    assert "<thead>" not in table.html()
    assert "<td class=text>[b]x[/b]</td>" in table.html()
    assert "name   [b]x[/b]" in repr(table)


def test_html_takes_its_colours_from_the_page():
    html = TABLE._repr_html_()
    assert "color: inherit" in html
    assert not re.findall(r"#[0-9a-f]{3,6}\b", html)
