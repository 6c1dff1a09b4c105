"""Small drawings in SVG: lines, bands and dots in a unit square between two axes."""

from collections.abc import Sequence
from html import escape

WIDE, HIGH, EDGE = 320, 160, 28

Numbers = Sequence[float]


def drawing(title: str, inside: str, across: tuple[str, str], up: tuple[str, str] = ("0", "1")) -> str:
    """What is `inside`, between two axes.

    Args:
        title: What the drawing shows, for those who cannot see it.
        inside: Lines and dots.
        across: Texts at the ends of the horizontal axis.
        up: Texts at the ends of the vertical axis.
    """
    left, right, low, high = EDGE, WIDE - EDGE / 2, HIGH - EDGE, EDGE / 2
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(title)}">'
        f'<polyline class="axis" points="{left},{high} {left},{low} {right},{low}"/>'
        f'<text x="{left - 4}" y="{low}" text-anchor="end">{escape(up[0])}</text>'
        f'<text x="{left - 4}" y="{high + 8}" text-anchor="end">{escape(up[1])}</text>'
        f'<text x="{left}" y="{HIGH - 12}">{escape(across[0])}</text>'
        f'<text x="{right}" y="{HIGH - 12}" text-anchor="end">{escape(across[1])}</text>{inside}</svg>'
    )


def line(kind: str, xs: Numbers, ys: Numbers) -> str:
    """A line through points; a single point is a dot."""
    if len(xs) == 1:
        return dot(xs[0], ys[0], 2, kind)
    return f'<polyline class="line {kind}" points="{_points(xs, ys)}"/>'


def band(xs: Numbers, lows: Numbers, highs: Numbers) -> str:
    """The area between two lines."""
    return f'<polygon class="band" points="{_points([*xs, *reversed(xs)], [*lows, *reversed(highs)])}"/>'


def level(y: float) -> str:
    """A horizontal line."""
    return f'<polyline class="axis level" points="{_points([0, 1], [y, y])}"/>'


def diagonal() -> str:
    """The line on which both coordinates are equal."""
    return f'<polyline class="axis" points="{_points([0, 1], [0, 1])}"/>'


def dot(x: float, y: float, radius: float, kind: str = "a") -> str:
    """A dot; its radius is in units of the drawing."""
    across, down = _place(x, y)
    return f'<circle class="dot {kind}" cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}"/>'


def key(kind: str, name: str) -> str:
    """A sample of a line, and its name."""
    path = f'<path class="line {kind}" d="M0 4h24"/>'
    sample = f'<svg class="sample" viewBox="0 0 24 8" aria-hidden="true">{path}</svg>'
    return f'<span class="key">{sample} {escape(name)}</span>'


def _place(x: float, y: float) -> tuple[float, float]:
    """Coordinates in the drawing of a point of the unit square."""
    return EDGE + x * (WIDE - 1.5 * EDGE), HIGH - EDGE - y * (HIGH - 1.5 * EDGE)


def _points(xs: Numbers, ys: Numbers) -> str:
    places = [_place(x, y) for x, y in zip(xs, ys, strict=True)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
