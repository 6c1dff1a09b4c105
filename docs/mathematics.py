"""Convert LaTeX to MathML when the site is built. Browsers show MathML without a script."""

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_THIN = '<mspace width="0.17em"/>'
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def with_mathematics(page: str) -> str:
    """Convert every formula that `pymdownx.arithmatex` marked in a page of HTML to MathML.

    Raises:
        ValueError: If a formula has an unknown command, which the page would show as text.
    """
    page = _BLOCK.sub(lambda match: f'<div class="formula">{_mathml(match[1], "block")}</div>', page)
    return _INLINE.sub(lambda match: _mathml(match[1], "inline"), page)


def _mathml(escaped: str, display: str) -> str:
    latex = html.unescape(escaped).strip()
    mathml = convert(latex, display=display)
    if unknown := re.search(r"<m[io]>(\\\w+|&amp;)</m[io]>", mathml):
        raise ValueError(f"the formula {latex!r} has the unknown command {unknown[1]}")
    # TeX's spacing: a thin space after the name of a function, none around a slash.
    mathml = re.sub(r"(<mi>(?:log|exp)</mi>)", rf"\1{_THIN}", mathml)
    return re.sub(r"<mo>(/|&#x0002F;)</mo>", r'<mo lspace="0" rspace="0">\1</mo>', mathml)
