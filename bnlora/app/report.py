"""An HTML page with text, tables and figures, in one file without external resources."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO

from bnlora._util.display import Table
from bnlora._util.finding import Findings
from bnlora.plots import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
div.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: 1rem 0 }
caption { text-align: left; padding-bottom: .4rem; color: #444 }
th, td { padding: .2rem .8rem; text-align: right; vertical-align: top }
th:first-child, td:first-child, td:nth-child(2):not(:last-child), .text { text-align: left }
thead th { border-bottom: 2px solid #1a1a1a } tr.group td { border-top: 1px solid #bbb }
figure { margin: 1rem 0 } img { max-width: 100% } figcaption { color: #444; font-size: .9rem }
"""


def page(title: str, parts: Sequence[str | Table | Findings | tuple[Figure, str]]) -> str:
    """A self-contained HTML page.

    Args:
        title: Title and main heading.
        parts: Text (text that starts with `# ` is a heading), tables, findings, and figures with captions.
    """
    return document(title, "\n".join(map(_html, parts)), style=_STYLE)


def document(title: str, body: str, *, style: str, head: str = "") -> str:
    """A page in HTML, with its styles inside.

    Args:
        title: Title and main heading, as text.
        body: The content, as HTML.
        style: Styles of the page.
        head: Further entries of the head, as HTML.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def embedded(figure: Figure, *, dpi: int) -> str:
    """The address of a picture that contains the picture itself."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return f"data:image/png;base64,{b64encode(picture.getvalue()).decode('ascii')}"


def _html(part: str | Table | Findings | tuple[Figure, str]) -> str:
    if isinstance(part, Table | Findings):
        return f"<div class=wide>{part.html()}</div>"
    if isinstance(part, str):
        return f"<h2>{escape(part[2:])}</h2>" if part.startswith("# ") else f"<p>{escape(part)}</p>"
    figure, caption = part
    text = escape(caption)
    return (
        f'<figure><img src="{embedded(figure, dpi=130)}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
