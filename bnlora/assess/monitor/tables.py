"""What a monitor shows: its findings, its recommendation, and its tables."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from bnlora._util.display import Showable, Table
from bnlora._util.finding import Finding, Findings, count_words
from bnlora.assess.monitor.calibration import Bins
from bnlora.assess.monitor.sequences import MeanSequence
from bnlora.assess.monitor.watch import ACCURACY, CALIBRATION, ENTROPY, INFORMATION, TESTS, Alert, Watch

ENOUGH_LABELS = 100
"""Labelled rows after a shift from which on the silence of accuracy and calibration means something."""

_REMEDIES = {
    ACCURACY: "Refit on recent labelled rows.",
    CALIBRATION: "Fit a temperature on recent labelled rows (bl.approximate.fit_temperature).",
    ENTROPY: "Collect labels of recent rows.",
    INFORMATION: "Collect labels of recent rows.",
}


@runtime_checkable
class Monitored(Protocol):
    """The part of a `Monitor` that is shown."""

    @property
    def alpha(self) -> float:
        """Probability of any false alarm."""
        ...

    @property
    def level(self) -> float:
        """Probability of each confidence sequence."""
        ...

    @property
    def nll_bound(self) -> float:
        """Nats at which a row is clipped."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def num_labelled(self) -> int:
        """Number of labelled rows."""
        ...

    @property
    def history(self) -> Any:
        """The record of the chart."""
        ...

    @property
    def sequences(self) -> Mapping[str, MeanSequence]:
        """Confidence sequences by name."""
        ...

    @property
    def bins(self) -> Bins:
        """Running calibration."""
        ...

    @property
    def watches(self) -> Mapping[str, Watch]:
        """The tests that run, by name."""
        ...

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """The alarms."""
        ...


def findings(monitor: Monitored) -> tuple[Finding, ...]:
    """One finding for each test; those that do not run say what they need."""
    needs = {
        ACCURACY: "no floor: start with labels of the reference, or with floor=",
        ENTROPY: "no reference rows",
        INFORMATION: "no mutual information of reference rows",
    }

    def one(test: str) -> Finding:
        watch = monitor.watches.get(test)
        if watch is None:
            return Finding(test, "not asked", needs[test])
        if not watch.evidence.num_rows:
            what = "labelled rows" if test in (ACCURACY, CALIBRATION) else "rows"
            return Finding(test, "not asked", f"no {what} so far", None, watch.threshold)
        return watch.finding(_REMEDIES[test])

    return tuple(map(one, TESTS))


def recommendation(monitor: Monitored) -> str:
    """What to do, in a sentence or two."""
    raised = {alert.test: alert for alert in monitor.alerts}
    if ACCURACY in raised:
        return "Refit on recent labelled rows: accuracy has fallen below its floor." + _labels_first(monitor)
    if CALIBRATION in raised:
        gap = monitor.bins.confidence.sum() - monitor.bins.correct.sum()
        how = "high" if gap > 0 else "low"
        return (
            "Recalibrate by a temperature on recent labelled rows (bl.approximate.fit_temperature): "
            f"confidence is too {how}, and no decrease of accuracy was found." + _labels_first(monitor)
        )
    if raised:
        first = min(alert.row for alert in raised.values())
        since = monitor.num_labelled - _labelled_at(monitor, first)
        what = " and ".join(test for test in TESTS if test in raised)
        if since < ENOUGH_LABELS:
            return f"Collect labels of recent rows: {what} changed, with only {since:,} labels since."
        return (
            f"Nothing to do yet: {what} changed, but {since:,} labels since then raised no alarm of accuracy "
            "or calibration; go on collecting labels."
        )
    if not monitor.num_labelled:
        return "Nothing to do: no test has raised an alarm. Labels would test accuracy and calibration."
    return "Nothing to do: no test has raised an alarm."


def _labels_first(monitor: Monitored) -> str:
    """A warning where only tests that read labels found something, though others that read none also ran."""
    unlabelled = [watch for name, watch in monitor.watches.items() if name in (ENTROPY, INFORMATION)]
    if not unlabelled or any(watch.alert for watch in unlabelled):
        return ""
    return " Check first how these rows were labelled: the predictions by themselves raised no alarm."


def overview(monitor: Monitored) -> tuple[Showable, ...]:
    """Recommendation, findings, running means, and calibration by confidence."""
    found = findings(monitor)
    title = (
        f"Monitor: {monitor.num_rows:,} rows, {monitor.num_labelled:,} labelled; {count_words(found)}; "
        f"P(any false alarm, ever) at most {monitor.alpha:g}"
    )
    parts: tuple[Showable, ...] = (Findings(title, found), recommendation(monitor))
    if not monitor.num_labelled:
        return parts
    return (*parts, means(monitor), monitor.bins.table)


def means(monitor: Monitored) -> Table:
    """Running means of the labelled rows with their confidence sequences."""
    rows = []
    for name, sequence in monitor.sequences.items():
        low, high = sequence.interval
        interval = f"[{low:.3f}, {high:.3f}]" if sequence.fits else "no constant mean fits"
        shown = f"nll, at most {monitor.nll_bound:g} a row" if name == "nll" else name
        rows.append((shown, f"{sequence.mean:.3f}", interval))
    title = (
        f"{monitor.num_labelled:,} labelled rows; each interval holds at every row together with probability "
        f"{monitor.level:g} if the mean is constant"
    )
    return Table(title, ("running mean", "value", "interval"), tuple(rows))


def _labelled_at(monitor: Monitored, row: int) -> int:
    """Labelled rows at the first point of the record at or after a row."""
    return next((point.labelled for point in monitor.history if point.rows >= row), 0)
