"""The page of the service: model, limits, counts, means over time, and reliability, without any script."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape

import numpy as np

from bnlora._util.display import Table, facts
from bnlora.app.report import document
from bnlora.app.serve.counts import Counts, History, Labelled
from bnlora.app.serve.service import Service
from bnlora.metrics.scores import confidences, is_correct, width_bin

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
"""Content security policy of the page: it has styles, and loads nothing."""

BINS = 10
WIDE, HIGH, EDGE = 320, 160, 28

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
caption { display: none } td { padding: .1rem .8rem .1rem 0; vertical-align: top; overflow-wrap: anywhere }
svg { width: 100%; max-width: 30rem; height: auto } svg text { font-size: 10px; fill: currentColor }
.axis { stroke: currentColor; stroke-opacity: .4; fill: none }
.a { stroke: #0072b2; fill: none; stroke-width: 1.5 } .b { stroke: #d55e00; fill: none; stroke-width: 1.5 }
.dot { fill: #0072b2; fill-opacity: .7 } .key-a { color: #0072b2 } .key-b { color: #d55e00 }
@media (prefers-color-scheme: dark) {
  .a { stroke: #56b4e9 } .b { stroke: #e69f00 } .dot { fill: #56b4e9 }
  .key-a { color: #56b4e9 } .key-b { color: #e69f00 }
}
"""


def status_page(service: Service, counts: Counts, history: History, labelled: Labelled | None) -> str:
    """The page as HTML; it reloads every 30 seconds.

    Args:
        service: The fit that answers.
        counts: Requests and errors.
        history: Means over time.
        labelled: Predictions with labels, if there are any.
    """
    limits = {name.replace("_", " "): f"{value:,}" for name, value in asdict(service.limits).items()}
    total = history.total
    work = {
        "requests": f"{counts.requests:,}",
        "errors": f"{counts.errors:,}",
        "rows": f"{total.rows:,}",
        "mean confidence": f"{total.mean('confidence'):.3f}",
        "mean entropy": f"{total.mean('entropy'):.3f} nats",
        "of which epistemic": f"{total.mean('epistemic'):.3f} nats",
    }
    parts = {
        "Model": _table(_model(service)),
        "Work": _table(work),
        "Over time": _over_time(history),
        "Labels": _labels(labelled),
        "Limits of a request": _table(limits),
    }
    body = "\n".join(f"<h2>{escape(name)}</h2>\n{part}" for name, part in parts.items())
    reload = '<meta http-equiv="refresh" content="30">'
    return document(f"bnlora: {service.name}", body, style=_STYLE, head=reload)


def _model(service: Service) -> dict[str, str]:
    recipe = service.recipe
    about = {
        "answers": f"{service.kind}, {service.num_draws} draws",
        "classes": ", ".join(service.names),
        "prior": f"{recipe.prior}, rank {recipe.rank}",
        "base": recipe.base.rstrip("/").rpartition("/")[2],  # without the folders of the machine
    }
    if service.rule is not None:
        about["prediction sets"] = f"level {service.rule.level:g}, {service.rule.num_rows[0]:,} rows"
    if service.costs is not None:
        about["actions"] = ", ".join(service.costs.actions)
    return about


def _table(values: Mapping[str, str]) -> str:
    table: Table = facts("", values)
    return table.html()


def _over_time(history: History) -> str:
    """Mean confidence and entropy of each minute that had rows."""
    minutes = [*history.minutes]
    if not minutes:
        return "<p>No rows yet.</p>"
    sums = [*history.minutes.values()]
    confidence = [one.mean("confidence") for one in sums]
    entropy = [one.mean("entropy") for one in sums]
    top = max(1.0, *entropy)
    span = max(minutes[-1] - minutes[0], 1)
    where = [(minute - minutes[0]) / span for minute in minutes]
    lines = "".join(
        f'<polyline class={name} points="{_points(where, [y / top for y in values])}"/>'
        + "".join(_dot(x, y / top, 2) for x, y in zip(where, values, strict=True) if len(where) == 1)
        for name, values in (("a", confidence), ("b", entropy))
    )
    ends = (f"{minutes[-1] - minutes[0]} minutes ago", "last")
    return (
        "<p>Mean of each minute: <b class=key-a>confidence</b>, <b class=key-b>entropy</b> (nats).</p>"
        + _drawing("Mean confidence and entropy over time", lines, ends, top)
    )


def _labels(labelled: Labelled | None) -> str:
    """Accuracy, negative log-likelihood and a reliability diagram."""
    if labelled is None:
        return "<p>No labels yet; POST /labels takes them.</p>"
    scores = labelled.scores()
    shown = {
        "labelled predictions": f"{scores['labelled']:,}",
        "accuracy": f"{scores['accuracy']:.3f}",
        "negative log-likelihood": f"{scores['nll']:.3f} nats",
    }
    sure, right = confidences(labelled.log_probs), is_correct(labelled.log_probs, labelled.labels)
    bins = width_bin(sure, BINS)
    dots = ""
    for index in np.unique(bins):
        mine = bins == index
        size = 2 + 7 * float(mine.mean()) ** 0.5
        dots += _dot(float(sure[mine].mean()), float(right[mine].mean()), size)
    lines = f'<polyline class=axis points="{_points([0, 1], [0, 1])}"/>{dots}'
    return (
        _table(shown)
        + "<p>Accuracy by confidence; calibrated predictions are on the line.</p>"
        + _drawing("Reliability diagram", lines, ("confidence 0", "1"), 1.0)
    )


def _drawing(title: str, inside: str, ends: tuple[str, str], top: float) -> str:
    """Lines and dots between two axes from 0 to 1; `top` is the number at the upper end."""
    left, right, low, high = EDGE, WIDE - EDGE / 2, HIGH - EDGE, EDGE / 2
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(title)}">'
        f'<polyline class=axis points="{left},{high} {left},{low} {right},{low}"/>'
        f'<text x="{left - 4}" y="{low}" text-anchor="end">0</text>'
        f'<text x="{left - 4}" y="{high + 8}" text-anchor="end">{top:.3g}</text>'
        f'<text x="{left}" y="{HIGH - 10}">{escape(ends[0])}</text>'
        f'<text x="{right}" y="{HIGH - 10}" text-anchor="end">{escape(ends[1])}</text>{inside}</svg>'
    )


def _place(x: float, y: float) -> tuple[float, float]:
    """Coordinates in the drawing of a point of the unit square."""
    return EDGE + x * (WIDE - 1.5 * EDGE), HIGH - EDGE - y * (HIGH - 1.5 * EDGE)


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    places = [_place(x, y) for x, y in zip(xs, ys, strict=True)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _dot(x: float, y: float, radius: float) -> str:
    across, down = _place(x, y)
    return f'<circle class=dot cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}"/>'
