"""LaTeX to MathML while the site is built: browsers show it by themselves, without a script."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_THIN = '<mspace width="0.17em"/>'
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def with_mathematics(page: str) -> str:
    """A page of HTML with every formula that `pymdownx.arithmatex` marked as MathML.

    Raises:
        ValueError: When a formula has a command that is not known, which would stand in the page as text.
    """
    page = _BLOCK.sub(lambda found: f'<div class="formula">{_mathml(found[1], "block")}</div>', page)
    return _INLINE.sub(lambda found: _mathml(found[1], "inline"), page)


def _mathml(escaped: str, display: str) -> str:
    latex = html.unescape(escaped).strip()
    made = convert(latex, display=display)
    if unknown := re.search(r"<m[io]>(\\\w+|&amp;)</m[io]>", made):
        raise ValueError(f"the formula {latex!r} has {unknown[1]}, which is not known")
    # As TeX sets them: a thin space after the name of a function, none around a slash.
    made = re.sub(r"(<mi>(?:log|exp)</mi>)", rf"\1{_THIN}", made)
    return re.sub(r"<mo>(/|&#x0002F;)</mo>", r'<mo lspace="0" rspace="0">\1</mo>', made)
