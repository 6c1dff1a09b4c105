"""Small pictures as SVG: letters and lines in the colour of the page, so they suit light and dark pages.

They are drawn in a millisecond, are as wide as the page allows, and have a description in words for readers
who do not see them. `bnlora.plots` has figures for a text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float, Int

from bnlora import metrics
from bnlora.prediction.predict import Prediction

WIDTH, HEIGHT = 320, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 40

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#808080"
"""Colours of Okabe and Ito (2008), which are distinguishable with any common colour vision."""

DOTS = 400
"""Largest number of dots of a picture."""


@dataclass(frozen=True)
class Axes:
    """The limits of a picture, and the place of a point in it."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[str, str]:
        """Coordinates in the picture, as text."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        return f"{left:.1f}", f"{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    def line(self, points: Iterable[tuple[float, float]], colour: str, style: str = "") -> str:
        """A line through points."""
        path = " ".join(",".join(self.at(x, y)) for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" {style}/>'

    def dot(self, x: float, y: float, colour: str, size: float = 3.0, style: str = "") -> str:
        """A dot."""
        left, top = self.at(x, y)
        return f'<circle cx="{left}" cy="{top}" r="{size}" fill="{colour}" {style}/>'


def reliability(prediction: Prediction, labels: Int[np.ndarray, " n"]) -> str:
    """Accuracy against mean confidence, with Wilson intervals and the share of the rows in each bin."""
    curve, lowest = metrics.reliability(prediction, labels), 1 / prediction.draw_log_probs.shape[2]
    axes, share = Axes((lowest, 1.0), (0.0, 1.0)), curve.count / curve.count.sum()
    marks = [axes.line([(lowest, lowest), (1, 1)], GREY, 'stroke-dasharray="5 4"')]
    bins = list(zip(curve.confidence, curve.accuracy, curve.low, curve.high, share, curve.count, strict=True))
    for confidence, accuracy, low, high, part, _ in bins:
        marks.append(
            axes.line([(confidence, 0), (confidence, part)], GREY, 'style="stroke-width:5;opacity:.45"')
        )
        marks.append(axes.line([(confidence, low), (confidence, high)], BLUE))
        marks.append(axes.dot(confidence, accuracy, BLUE))
    words = "; ".join(f"confidence {c:.2f}, accuracy {a:.2f}, {n} rows" for c, a, *_, n in bins)
    return _picture(axes, marks, ("confidence", "accuracy"), f"Reliability by bin: {words}")


def spreads(prior: Float[np.ndarray, "n k"], posterior: Float[np.ndarray, "n k"]) -> str:
    """Posterior against prior standard deviation of each contrast; the dashed line is no change."""
    before, after = prior.ravel(), posterior.ravel()
    top = 1.05 * max(float(before.max()), 1e-3)
    axes = Axes((0.0, top), (0.0, top))
    marks = [axes.line([(0, 0), (top, top)], GREY, 'stroke-dasharray="5 4"')]
    some = np.linspace(0, len(before) - 1, min(len(before), DOTS)).astype(int)
    marks += [
        axes.dot(x, y, BLUE, 2.2, 'opacity=".5"') for x, y in zip(before[some], after[some], strict=True)
    ]
    (a, b, c), (d, e, f) = (np.quantile(v, [0.0, 0.5, 1.0]) for v in (before, after))
    words = f"prior {b:.2f} nats ({a:.2f} to {c:.2f}), posterior {e:.2f} ({d:.2f} to {f:.2f})"
    return _picture(
        axes, marks, ("prior spread (nats)", "posterior spread"), f"Median spread of a contrast: {words}"
    )


def confidences(by_name: Mapping[str, Float[np.ndarray, " n"]], lowest: float) -> str:
    """Share of rows by the probability of their most probable class, a line for each distribution."""
    edges = np.linspace(lowest, 1.0, 11)
    shares = {name: np.histogram(values, edges)[0] / max(values.size, 1) for name, values in by_name.items()}
    top = max(float(share.max()) for share in shares.values())
    axes, marks = Axes((lowest, 1.0), (0.0, max(1.18 * top, 1e-3))), []
    styles = ((GREY, 'stroke-dasharray="2 3"'), (ORANGE, 'stroke-dasharray="7 3"'), (BLUE, ""))
    for index, ((name, share), (colour, style)) in enumerate(zip(shares.items(), styles, strict=True)):
        marks.append(axes.line(_steps(edges, share), colour, style))
        left, top_line = LEFT + 8 + index * 84, TOP + 8
        marks.append(
            f'<line x1="{left}" x2="{left + 18}" y1="{top_line}" y2="{top_line}" stroke="{colour}" '
            f'stroke-width="2" {style}/>{_text(left + 22, top_line + 4, name, "start")}'
        )
    means = ", ".join(f"{name} {values.mean():.2f}" for name, values in by_name.items())
    return _picture(axes, marks, ("confidence", "share of rows"), f"Mean confidence: {means}")


def figure(picture: str, caption: str) -> str:
    """A picture with a caption, which stands beside others where there is room."""
    style = "margin:0;flex:1 1 250px;max-width:420px;min-width:0"
    return f"<figure style='{style}'>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def side_by_side(figures: Sequence[str]) -> str:
    """Figures beside one another, or below one another on a narrow page."""
    style = "display:flex;flex-wrap:wrap;gap:.8em 1.2em;font-size:.9em;line-height:1.3;margin:.6em 0"
    return f"<div style='{style}'>{''.join(figures)}</div>"


def _steps(edges: np.ndarray, heights: np.ndarray) -> list[tuple[float, float]]:
    """The outline of a histogram."""
    across = np.repeat(edges, 2)[1:-1]
    return list(zip(across.tolist(), np.repeat(heights, 2).tolist(), strict=True))


def _picture(axes: Axes, marks: Sequence[str], names: tuple[str, str], words: str) -> str:
    """The marks within labelled axes."""
    x_name, y_name = names
    low, high = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT},{TOP}V{high}H{low}" fill="none" stroke="currentColor" opacity=".6"/>']
    for share in (0.0, 0.5, 1.0):
        x = axes.x[0] + share * (axes.x[1] - axes.x[0])
        y = axes.y[0] + share * (axes.y[1] - axes.y[0])
        left, top = axes.at(x, y)
        anchor = "end" if share == 1 else "middle"
        parts.append(_text(float(left), high + 15, f"{x:.2g}", anchor))
        parts.append(_text(LEFT - 6, float(top) + 4, f"{y:.2g}", "end"))
    parts.append(_text((LEFT + low) / 2, HEIGHT - 6, x_name, "middle"))
    turned = f'transform="rotate(-90 11 {(TOP + high) / 2})"'
    parts.append(_text(11, (TOP + high) / 2, y_name, "middle", turned))
    style = "width:100%;height:auto;display:block;color:inherit"
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}" style="{style}">'
    return f"{head}{''.join(parts)}{''.join(marks)}</svg>"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="currentColor" {more}>'
        f"{escape(text)}</text>"
    )
