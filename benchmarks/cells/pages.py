"""Web pages of the report: one file each, with its pictures inside and nothing from the network.

The frame of a page is that of `bnlora.app.report`; links, and styles for a dark ground, are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from bnlora._util.display import Table
from bnlora._util.files import write_whole
from bnlora.app.report import document, embedded

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; margin: 1rem 0 }
caption { text-align: left; padding-bottom: .4rem } .title { font-weight: 600 }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: top; white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left }
td.text { white-space: normal; min-width: 8rem } td.text:last-child { min-width: 20rem }
thead th { border-bottom: 2px solid } tr.group td { border-top: 1px solid rgba(128, 128, 128, .6) }
figure { margin: 1rem 0 } img { background: #fff; max-width: 100%; min-width: 36rem }
figcaption, .note { font-size: .9rem; opacity: .85 }
"""


@dataclass(frozen=True)
class Link:
    """A link to another page of the report.

    Attributes:
        text: Its text.
        file: Name of the file in the same folder.
    """

    text: str
    file: str


Part = str | Table | Link | tuple[Figure, str]
"""Text (a heading if it starts with `# `), a table, a link, or a picture with its caption."""


def page(title: str, parts: Sequence[Part]) -> str:
    """A page in HTML.

    Args:
        title: Title and main heading.
        parts: The content in order.
    """
    return document(title, "\n".join(map(_html, parts)), style=STYLE)


def write(folder: Path, file: str, title: str, parts: Sequence[Part]) -> Path:
    """Write a page into a folder, which is created if necessary, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    write_whole(path, lambda at: at.write_text(page(title, parts), encoding="utf-8"))
    return path


def _html(part: Part) -> str:
    if isinstance(part, Table):
        return f"<div class=wide>{part.html()}</div>"
    if isinstance(part, Link):
        return f'<p><a href="{escape(part.file)}">{escape(part.text)}</a></p>'
    if isinstance(part, str):
        return (
            f"<h2>{escape(part[2:])}</h2>" if part.startswith("# ") else f"<p class=note>{escape(part)}</p>"
        )
    figure, caption = part
    text = escape(caption)
    return (
        f'<figure><div class=wide><img src="{embedded(figure, dpi=110)}" alt="{text}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )
