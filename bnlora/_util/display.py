"""Display of results: tables and shaded text, on a terminal, in a notebook and in a report.

A `Shown` object defines its content in `overview`. rich prints it on a terminal; a notebook shows it as HTML.
The HTML inherits the colours of the page, so it is readable on light and dark pages. An overview only shows
what is already known: it does not run a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from bnlora._util.finding import Findings

SHADE = (213, 94, 0)
"""Red, green and blue of a full shade: the vermilion of Okabe and Ito (2008)."""

FULL = 0.7
"""Opacity of a full shade; both black and white letters are readable on it."""

_GREY = "rgba(128, 128, 128, .5)"

_STYLE = f"""<style>
.bnlora {{ color: inherit; overflow-x: auto }}
.bnlora table {{ border-collapse: collapse; border: none; margin: .4em 0 .9em; color: inherit;
  background: transparent; font-size: .92em; font-variant-numeric: tabular-nums }}
.bnlora caption {{ caption-side: top; text-align: left; color: inherit; padding: 0 0 .3em }}
.bnlora .title {{ font-weight: 600 }}
.bnlora th, .bnlora td {{ text-align: right; vertical-align: top; border: none; color: inherit;
  padding: .15em .7em; max-width: 36em; overflow-wrap: anywhere }}
.bnlora tr > :first-child, .bnlora .text {{ text-align: left }}
.bnlora tr > :first-child {{ padding-left: 0 }}
.bnlora thead th {{ border-bottom: 1px solid {_GREY}; font-weight: 600; white-space: nowrap }}
.bnlora tr.group td {{ border-top: 1px solid {_GREY} }}
.bnlora p, .bnlora ul {{ margin: .3em 0 .6em }}
.bnlora .shades {{ line-height: 1.25; margin: .4em 0 }}
.bnlora .piece {{ display: inline-block; white-space: pre; text-align: right; padding: .1em .15em;
  margin: 0 1px .35em 0; border-radius: .2em }}
.bnlora .piece small {{ display: block; font-size: .68em; opacity: .8 }}
.bnlora .scale {{ display: inline-block; width: 9em; height: .8em; margin: 0 .5em; border-radius: .2em;
  border: 1px solid {_GREY}; vertical-align: middle }}
</style>"""


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        title: What the table shows.
        header: Name of each column; empty for a table without a header.
        rows: Cells, one tuple for each row; a cell can have several lines. The first column is aligned to the
            left, the others to the right.
        groups: Indices of the rows with a line above them.
        texts: Indices of further columns that are aligned to the left.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    groups: frozenset[int] = frozenset()
    texts: frozenset[int] = frozenset()

    def html(self) -> str:
        """The table without a style sheet; the page defines its style."""
        head = f"<thead><tr>{self._cells('th', self.header)}</tr></thead>" if self.header else ""
        body = "".join(
            f"<tr{' class=group' if index in self.groups else ''}>{self._cells('td', row)}</tr>"
            for index, row in enumerate(self.rows)
        )
        name, *more = self.title.split("\n")
        caption = "<br>".join([f"<span class=title>{escape(name)}</span>", *map(escape, more)])
        return f"<table><caption>{caption}</caption>{head}<tbody>{body}</tbody></table>"

    def __rich__(self) -> Group:
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=bool(self.header))
        for index in range(len(self.header or (self.rows or ((),))[0])):
            name = self.header[index] if self.header else ""
            table.add_column(Text(name), justify="right" if index and index not in self.texts else "left")
        for index, row in enumerate(self.rows):
            table.add_row(*map(Text, row), end_section=index + 1 in self.groups)
        return Group(
            Text(self.title, "bold"), table
        )  # outside of the table, whose own title cannot be wider than it

    def __repr__(self) -> str:
        return as_text([self])

    def _repr_html_(self) -> str:
        return as_html([self])

    def _cells(self, tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if index in self.texts else ''}>{_lines(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )


def facts(title: str, values: Mapping[str, str]) -> Table:
    """A table of names and values, without a header."""
    return Table(title, (), tuple(values.items()), texts=frozenset({1}))


@dataclass(frozen=True)
class Shades:
    """A text in pieces, each shaded by a number.

    Attributes:
        label: Meaning of the shade, with its unit.
        pieces: Pieces of the text; joined, they are the whole text.
        values: Number of each piece, at least zero.
        top: Smallest number with a full shade.
        below: A few letters below each piece; only in HTML.
        notes: Tooltip of each piece; only in HTML.
    """

    label: str
    pieces: tuple[str, ...]
    values: tuple[float, ...]
    top: float
    below: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def depths(self) -> tuple[float, ...]:
        """Depth of each shade, from 0 to 1."""
        return tuple(min(value / self.top, 1.0) if self.top > 0 else 0.0 for value in self.values)

    def html(self) -> str:
        """The text with its legend, on the background of the page."""
        columns = zip(self.pieces, self.depths, self.below, self.notes, strict=True)
        text = "".join(
            f"{'<br>' * piece.count(chr(10))}"
            f'<span class=piece title="{escape(note)}" style="background:{_rgba(depth)}">'
            f"{_visible(piece)}<small>{escape(below)}</small></span>"
            for piece, depth, below, note in columns
        )
        ramp = f"linear-gradient(to right, {_rgba(0.0)}, {_rgba(1.0)})"
        legend = f'{escape(self.label)}: 0<span class=scale style="background:{ramp}"></span>{self.top:.2g}'
        return f"<div class=shades>{text}</div><p>{legend}</p>"

    def __rich__(self) -> Text:
        text = Text()
        for piece, depth in zip(self.pieces, self.depths, strict=True):
            text.append(piece, _on_white(depth))
        text.append(f"\n\n{self.label}: 0 ")
        for step in range(5):
            text.append("  ", _on_white(step / 4))
        return text.append(f" {self.top:.2g}")


Showable = Table | Shades | Findings | str | tuple[str, ...]
"""A part of an overview; a tuple of sentences becomes a list."""


class Shown:
    """An object displayed by its `overview`: HTML in a notebook, rich on a terminal, text elsewhere."""

    @property
    def overview(self) -> tuple[Showable, ...]:
        """The content to display; it must not run a model."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(self.overview)

    def __rich__(self) -> Group:
        return Group(*_renderables(self.overview))

    def _repr_html_(self) -> str:
        return as_html(self.overview)


def as_html(parts: Sequence[Showable]) -> str:
    """Parts as HTML for a notebook, with the style sheet of this library."""
    return f"{_STYLE}<div class=bnlora>{''.join(map(_html, parts))}</div>"


def as_text(parts: Sequence[Showable], *, width: int = 100) -> str:
    """Parts as plain text, at most `width` letters wide."""
    console = Console(width=width, file=StringIO(), force_jupyter=False)
    with console.capture() as text:
        console.print(Group(*_renderables(parts)))
    return "\n".join(line.rstrip() for line in text.get().rstrip().splitlines())


def percent(share: float) -> str:
    """A share as a whole percentage; 0 and 100 only if exact, otherwise "<1" and ">99"."""
    if 0 < share < 0.01:
        return "<1"
    return ">99" if 0.99 < share < 1 else f"{100 * share:.0f}"


def _renderables(parts: Sequence[Showable]) -> list[Any]:
    renderables: list[Any] = []
    for part in parts:
        if isinstance(part, tuple):
            renderables.extend(Text(f"- {sentence}") for sentence in part)
        else:
            renderables.append(Text(part) if isinstance(part, str) else part)
    return renderables


def _html(part: Showable) -> str:
    if isinstance(part, tuple):
        return f"<ul>{''.join(f'<li>{_lines(sentence)}</li>' for sentence in part)}</ul>"
    return f"<p>{_lines(part)}</p>" if isinstance(part, str) else part.html()


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _visible(piece: str) -> str:
    """A piece of text with a visible sign for each line break; the caller breaks the line."""
    return escape(piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"))


def _rgba(depth: float) -> str:
    return f"rgba({', '.join(map(str, SHADE))}, {FULL * depth:.3f})"


def _on_white(depth: float) -> str:
    """Black letters on the shade over white, which is independent of the terminal's background."""
    mixed = [round(255 + (part - 255) * FULL * depth) for part in SHADE]
    return "#000000 on #" + "".join(f"{part:02x}" for part in mixed)


def ranges(indices: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as `"0-2, 5"`."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
