"""The part of the page that shows the monitor: what to do, its tests, and their evidence over time."""

from html import escape

import numpy as np

from bnlora._util.finding import Findings
from bnlora.app.serve.drawings import band, drawing, key, level, line
from bnlora.assess.monitor import Monitor
from bnlora.assess.monitor.tables import means
from bnlora.assess.monitor.watch import TESTS

TOP = 1.25
"""Upper end of the chart of the evidence; an alarm is at 1."""

KINDS = dict(zip(TESTS, "abcd", strict=True))
"""The kind of line of each test."""


def alarm(monitor: Monitor | None) -> str:
    """One line at the top of the page: the alarms, or that there is none."""
    if monitor is None:
        return ""
    if not monitor.alerts:
        rows = f"{monitor.num_rows:,} rows and {monitor.num_labelled:,} labels"
        return f'<p class="state">No alarm after {rows}.</p>\n'
    tests = ", ".join(alert.test for alert in monitor.alerts)
    return (
        f'<p class="state bad"><strong>Alarm: {escape(tests)}.</strong> '
        f"{escape(monitor.recommendation)}</p>\n"
    )


def watch_section(monitor: Monitor) -> str:
    """Recommendation, findings, evidence over time, and running means."""
    text = (
        f"{monitor.num_rows:,} rows, {monitor.num_labelled:,} labels; "
        f"P(any false alarm, ever) is at most {monitor.alpha:g}."
    )
    parts = [f"<p>{escape(text)}</p>"]
    if not monitor.alerts:  # otherwise it is the first line of the page
        parts.append(f"<p>{escape(monitor.recommendation)}</p>")
    parts += [f"<div class=findings>{Findings(text, monitor.findings).html()}</div>", _evidence(monitor)]
    if monitor.num_labelled:
        parts += [_accuracy(monitor), f"<div class=means>{means(monitor).html()}</div>"]
    return "\n".join(parts)


def _evidence(monitor: Monitor) -> str:
    """The evidence of each test over rows, on a logarithmic scale on which its alarm is at 1."""
    history = monitor.history
    if not history:
        return ""
    where = _where(monitor)
    lines, keys = [level(1 / TOP)], []
    for test in (test for test in TESTS if test in monitor.watches):
        top = np.log(monitor.watches[test].threshold)
        shares = [min(max(point.log_evidence.get(test, 0.0) / top, 0.0), TOP) / TOP for point in history]
        lines.append(line(KINDS[test], where, shares))
        keys.append(key(KINDS[test], test))
    return f"<p>Evidence of each test over rows; the dotted line is the alarm. {''.join(keys)}</p>" + drawing(
        "Evidence of each test over rows", "".join(lines), _ends(monitor), ("1", "")
    )


def _accuracy(monitor: Monitor) -> str:
    """Running accuracy with its confidence sequence, and the floor."""
    points = [(x, p.accuracy) for x, p in zip(_where(monitor), monitor.history, strict=True) if p.accuracy]
    if not points:
        return ""
    where = [x for x, _ in points]
    mean, low, high = zip(*[values for _, values in points], strict=True)
    floor, text = "", "with its interval"
    if monitor.floor is not None:
        floor, text = level(monitor.floor), f"{text}; the dotted line is the floor, {monitor.floor:.3f}"
    lines = band(where, low, high) + floor + line("a", where, mean)
    chart = drawing("Running accuracy over rows", lines, _ends(monitor))
    return f"<p>Running accuracy {text}.</p>{chart}"


def _where(monitor: Monitor) -> list[float]:
    """Place of each point of the record, from 0 to 1."""
    return [point.rows / max(monitor.num_rows, 1) for point in monitor.history]


def _ends(monitor: Monitor) -> tuple[str, str]:
    return "row 0", f"{monitor.num_rows:,}"
