"""The page of the service, without a script: monitor, reliability, means over time, counts, model, limits."""

from collections.abc import Mapping
from dataclasses import asdict
from html import escape

from bnlora._util.display import Table, facts
from bnlora.app.report import document
from bnlora.app.serve.counts import Counts, History, Labelled
from bnlora.app.serve.drawings import diagonal, dot, drawing, key, line
from bnlora.app.serve.service import Service
from bnlora.app.serve.watch_page import alarm, watch_section
from bnlora.assess.monitor import Bins, Monitor
from bnlora.metrics.scores import confidences, is_correct

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
"""Content security policy of the page: it has styles, and loads nothing."""

RELOAD_SECONDS = 30

_STYLE = """
:root { color-scheme: light dark; --a: #0072b2; --b: #b34700; --c: #00795a; --d: #a04a83; --bad: #b3261e }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
p { margin: .4rem 0 } p.state { border-left: .3rem solid var(--c); padding: .1rem .7rem }
p.state.bad { border-color: var(--bad) } .small { font-size: .88rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; margin: .3rem 0 }
caption { display: none } th, td { padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere } th { font-weight: 600 } details { margin: .3rem 0 }
svg { width: 100%; max-width: 30rem; height: auto } svg text { font-size: 10px; fill: currentColor }
svg.sample { width: 1.5rem; height: .5rem; vertical-align: middle }
.key { white-space: nowrap; margin-right: .8rem }
.axis { stroke: currentColor; stroke-opacity: .5; fill: none } .level { stroke-dasharray: 2 3 }
.line { fill: none; stroke-width: 1.6 } .line.a { stroke: var(--a) }
.line.b { stroke: var(--b); stroke-dasharray: 6 2 }
.line.c { stroke: var(--c); stroke-dasharray: 2 2 } .line.d { stroke: var(--d); stroke-dasharray: 8 2 2 2 }
.dot.a { fill: var(--a) } .dot.b { fill: var(--b) } .dot.c { fill: var(--c) } .dot.d { fill: var(--d) }
.dot { fill-opacity: .75 } .band { fill: var(--a); fill-opacity: .18 }
.wide { overflow-x: auto } .means td + td { white-space: nowrap }
@media (max-width: 34rem) { .findings td { display: block } .findings td.text { padding: 0 0 .5rem 1rem } }
@media (prefers-color-scheme: dark) {
  :root { --a: #56b4e9; --b: #f0a050; --c: #3fc79a; --d: #df9cc6; --bad: #ff8a80 }
}
"""


def status_page(
    service: Service,
    counts: Counts,
    history: History,
    labelled: Labelled | None,
    monitor: Monitor | None = None,
    *,
    reloads: bool = True,
) -> str:
    """The page as HTML.

    Args:
        service: The fit that answers.
        counts: Requests and errors.
        history: Means over time.
        labelled: Predictions with labels, if there are any.
        monitor: The monitor, if there is one.
        reloads: Whether the page reloads by itself.
    """
    limits = {name.replace("_", " "): f"{value:,}" for name, value in asdict(service.limits).items()}
    parts = {"Monitor": watch_section(monitor)} if monitor is not None else {}
    parts |= {
        "Labels": _labels(labelled, monitor),
        "Over time": _over_time(history),
        "Work": _table(_work(counts, history)),
        "Model": _table(_model(service)),
        "Limits of a request": _table(limits),
    }
    sections = "\n".join(f"<h2>{escape(name)}</h2>\n{part}" for name, part in parts.items())
    body = f"<main>\n{alarm(monitor)}{sections}\n{_reloading(reloads=reloads)}</main>"
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if reloads else ""
    title = f"bnlora: {service.name}" + (" (alarm)" if monitor is not None and monitor.alerts else "")
    return document(title, body, style=_STYLE, head=reload)


def _reloading(*, reloads: bool) -> str:
    """Whether the page changes by itself, which a reader can stop."""
    if reloads:
        text = f'This page reloads every {RELOAD_SECONDS} seconds. <a href="?reload=off">Stop that</a>.'
    else:
        text = f'This page stays as it is. <a href="?reload=on">Reload it every {RELOAD_SECONDS} seconds</a>.'
    return f'<p class="small">{text}</p>'


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


def _work(counts: Counts, history: History) -> dict[str, str]:
    total = history.total
    work = {
        "requests": f"{counts.requests:,}",
        "errors": f"{counts.errors:,}",
        "rows": f"{total.rows:,}",
    }
    if not total.rows:
        return work
    return work | {
        "mean confidence": f"{total.mean('confidence'):.3f}",
        "mean entropy": f"{total.mean('entropy'):.3f} nats",
        "of which epistemic": f"{total.mean('epistemic'):.3f} nats",
    }


def _table(values: Mapping[str, str]) -> str:
    table: Table = facts("", values)
    return table.html()


def _over_time(history: History) -> str:
    """Mean confidence and entropy of each minute that had rows."""
    minutes = [*history.minutes]
    if not minutes:
        return "<p>No rows yet.</p>"
    sums = [*history.minutes.values()]
    means = {name: [one.mean(name) for one in sums] for name in ("confidence", "entropy")}
    top = max(1.0, *means["entropy"])
    span = minutes[-1] - minutes[0]
    where = [(minute - minutes[0]) / max(span, 1) for minute in minutes]
    lines = "".join(
        line(kind, where, [y / top for y in means[name]])
        for kind, name in (("a", "confidence"), ("b", "entropy"))
    )
    first = "1 minute" if span == 1 else f"{span:,} minutes"
    return f"<p>Mean of each minute: {key('a', 'confidence')}{key('b', 'entropy (nats)')}</p>" + drawing(
        "Mean confidence and entropy over time",
        lines,
        (f"{first} before" if span else "", "last rows"),
        ("0", f"{top:.3g}"),
    )


def _labels(labelled: Labelled | None, monitor: Monitor | None) -> str:
    """Accuracy, negative log-likelihood and a reliability diagram; that of the monitor if there is one."""
    if monitor is not None and monitor.num_labelled:
        since = f"of {monitor.num_labelled:,} labels since the monitor was started"
        diagram = reliability(monitor.bins, since)
    elif labelled is not None:
        correct = is_correct(labelled.log_probs, labelled.labels)
        diagram = reliability(Bins.start().update(confidences(labelled.log_probs), correct), "")
    else:
        return "<p>No labels yet; POST /labels takes them.</p>"
    if labelled is None:
        return diagram
    scores = labelled.scores()
    shown = {
        "labelled predictions": f"{scores['labelled']:,}",
        "accuracy": f"{scores['accuracy']:.3f}",
        "negative log-likelihood": f"{scores['nll']:.3f} nats",
    }
    return _table(shown) + diagram


def reliability(bins: Bins, what: str) -> str:
    """Accuracy by confidence, drawn and as numbers; the size of a dot shows the number of rows."""
    total = bins.count.sum()
    dots = "".join(
        dot(float(sure / count), float(right / count), 2 + 7 * float(count / total) ** 0.5)
        for count, sure, right in zip(bins.count, bins.confidence, bins.correct, strict=True)
        if count
    )
    title = "Reliability diagram: accuracy (up) by confidence (across)"
    text = f"Accuracy by confidence{f' {what}' if what else ''}; calibrated predictions are on the line."
    table = f'<div class="wide" tabindex="0" role="region" aria-label="Numbers">{bins.table.html()}</div>'
    numbers = f"<details><summary>The same as numbers</summary>{table}</details>"
    return f"<p>{text}</p>" + drawing(title, diagonal() + dots, ("confidence 0", "1")) + numbers
