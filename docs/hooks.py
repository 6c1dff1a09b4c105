"""Hooks of MkDocs: pages generated from the package, parts of other documents, mathematics.

A line of a page can include a part of another document, so that no text exists twice:

    !python FILE N         the N-th Python block of a document
    !section FILE TITLE    the text below a heading of the second level
    !table FILE N          the N-th table of any file
    !notebooks FOLDER all  a table of the notebooks: title, question, and both files
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page as SitePage

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs runs this file by its path

from mathematics import with_mathematics  # noqa: E402
from reference import ROOT, index, load, pages  # noqa: E402

PICTURES = ROOT / "build" / "gallery" / "pictures.json"
NOTEBOOKS = ROOT / "notebooks"
_PART = re.compile(r"^!(?P<kind>python|section|table|notebooks) (?P<file>\S+) (?P<which>.+)$", re.MULTILINE)

_generated: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Generate the pages of the reference and append them to the navigation."""
    package = load()
    made = pages(package)
    _generated.clear()
    _generated.update({page.path: page.markdown() for page in made})
    _generated["api/index.md"] = index(package, made)
    for entry in config.nav or []:
        if "API reference" in entry:
            entry["API reference"] = ["api/index.md", *({page.title: page.path} for page in made)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the gallery with its pictures, and the notebooks."""
    for path, text in _generated.items():
        files.append(File.generated(config, path, content=text))
    if not PICTURES.is_file():
        raise PluginError(
            "the pictures of the gallery are missing: run `make docs`, or docs/gallery.py first"
        )
    pictures = json.loads(PICTURES.read_text(encoding="utf-8"))
    for picture in pictures:
        if picture["file"]:
            content = (PICTURES.parent / picture["file"]).read_bytes()
            files.append(File.generated(config, f"pictures/{picture['file']}", content=content))
    files.append(File.generated(config, "gallery.md", content=_gallery(pictures)))
    for file in sorted([*NOTEBOOKS.glob("[0-9]*.ipynb"), *NOTEBOOKS.glob("[0-9]*.py")]):
        files.append(File.generated(config, f"notebooks/{file.name}", content=file.read_bytes()))
    return files


def _gallery(pictures: list[dict[str, Any]]) -> str:
    text = (ROOT / "docs" / "gallery_intro.txt").read_text(encoding="utf-8")
    parts = [text]
    for picture in pictures:
        name = picture["name"]
        parts.append(f"## {picture['title']} {{ #{name} }}\n")
        function = picture["function"]
        shown = function.replace("bnlora.", "bl.", 1)
        parts.append(f"[`{shown}`][{function}]: {picture['caption']}\n")
        if picture["file"]:
            where = f"pictures/{picture['file']}"
            parts.append(f"[![{picture['title']}]({where})]({where}){{ .picture }}\n")
        else:
            parts.append(f'<div class="html-picture">{picture["html"]}</div>\n')
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: SitePage, **_: Any) -> str:
    """Include the parts of other documents that a page names."""
    return _PART.sub(lambda match: part(match["kind"], match["file"], match["which"]), markdown)


def part(kind: str, file: str, which: str) -> str:
    """A part of a document.

    Raises:
        PluginError: If the document has no such part.
    """
    if kind == "notebooks":
        return "\n".join(
            ["| notebook | question | |", "|---|---|---|", *map(_notebook, _scripts(ROOT / file))]
        )
    text = (ROOT / file).read_text(encoding="utf-8")
    patterns = {
        "python": r"```python\n.*?```",
        "section": rf"(?<=^## {re.escape(which)}\n).*?(?=^## |\Z)",
        "table": r"(?:^\|.*\n)+",
    }
    flags = re.MULTILINE if kind == "table" else re.DOTALL | re.MULTILINE
    parts = re.findall(patterns[kind], text, flags)
    number = 0 if kind == "section" else int(which)
    if number >= len(parts):
        raise PluginError(f"{file} has no {kind} {which!r}")
    return parts[number]


def _scripts(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]*.py"))


def _notebook(script: Path) -> str:
    """A row of the table: the heading of a notebook, its question and its files."""
    text = re.sub(r"^# ?", "", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    question = re.search(r"^\*\*Question\.\*\* (.+?)\n\n", text, re.DOTALL | re.MULTILINE)
    if title is None or question is None:
        raise PluginError(f"{script} needs a heading and a paragraph that begins with **Question.**")
    files = ", ".join(f"[{end}](notebooks/{script.stem}{end})" for end in (".ipynb", ".py"))
    return f"| {title[1]} | {' '.join(question[1].split()).replace('|', '&#124;')} | {files} |"


def on_page_content(html: str, page: SitePage, **_: Any) -> str:
    """Formulas as MathML."""
    return with_mathematics(html)
