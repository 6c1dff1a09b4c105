"""Small tables that read well on a terminal, in a notebook and in a report."""

from dataclasses import dataclass
from html import escape
from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        title: What the table shows.
        header: Name of each column.
        rows: Cells, one tuple a row; a cell may have several lines. The first column is set to the left, the
            others to the right.
        groups: Indices of the rows before which a line is drawn.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: frozenset[int] = frozenset()

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left")
        for index, row in enumerate(self.rows):
            table.add_row(*map(Text, row), end_section=index + 1 in self.groups)
        return table

    def __repr__(self) -> str:
        console = Console(width=100, file=StringIO())
        with console.capture() as text:
            console.print(self)
        return "\n".join(line.rstrip() for line in text.get().rstrip().splitlines())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(
            f"<tr{' class=group' if index in self.groups else ''}>{''.join(map(_cell, row))}</tr>"
            for index, row in enumerate(self.rows)
        )
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f"<td>{escape(text).replace(chr(10), '<br>')}</td>"
