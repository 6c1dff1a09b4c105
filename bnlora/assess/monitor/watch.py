"""One test of the monitor: its evidence, the level of its alarm, and the alert once it was raised."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from bnlora._util.finding import Finding, Status
from bnlora.assess.monitor.betting import Evidence

ACCURACY, CALIBRATION, ENTROPY, INFORMATION = "accuracy", "calibration", "entropy", "mutual information"

TESTS = (ACCURACY, CALIBRATION, ENTROPY, INFORMATION)
"""Names of the tests. Each may raise a false alarm with a quarter of the monitor's `alpha`."""

NULLS = {
    ACCURACY: "accuracy is at least that of the reference",
    CALIBRATION: "confidence is calibrated",
    ENTROPY: "entropy is that of the reference",
    INFORMATION: "mutual information is that of the reference",
}
"""What each test assumes until its alarm."""


@dataclass(frozen=True)
class Alert:
    """The first alarm of a test.

    Attributes:
        test: Name of the test.
        row: Number of monitored rows at the alarm.
        time: Time of the row that raised it; empty if no times were given.
        evidence: The evidence against the null at the alarm.

    Example:
        >>> print(Alert("accuracy", 512, "2026-03-01", 204.0))
        accuracy: alarm at row 512 (2026-03-01), evidence 204
    """

    test: str
    row: int
    time: str
    evidence: float

    def __str__(self) -> str:
        when = f" ({self.time})" if self.time else ""
        return f"{self.test}: alarm at row {self.row:,}{when}, evidence {self.evidence:.3g}"


@dataclass(frozen=True)
class Watch:
    """A test that is read after every row.

    Attributes:
        test: Name of the test.
        evidence: Its evidence.
        threshold: Evidence at which it raises an alarm.
        alert: Its first alarm, or None.

    Example:
        >>> watch = Watch("calibration", Evidence.start(1), 2.0)
        >>> watch.update(np.log([[2.0], [2.0]]), np.array([1, 2]), ["Monday", "Tuesday"]).alert.time
        'Tuesday'
    """

    test: str
    evidence: Evidence
    threshold: float
    alert: Alert | None = None

    def update(
        self, log_bets: Float[np.ndarray, "n k"], rows: Int[np.ndarray, " n"], times: Sequence[str]
    ) -> "Watch":
        """The test after more rows.

        Args:
            log_bets: Log of the payment of each bet at each row.
            rows: Number of each row in the stream.
            times: Time of each row, as text; empty texts without times.
        """
        evidence, path = self.evidence.update(log_bets)
        above = np.flatnonzero(path >= np.log(self.threshold))
        if self.alert is not None or not len(above):
            return replace(self, evidence=evidence)
        first = int(above[0])
        value = float(np.exp(min(path[first], 709.0)))
        return replace(self, evidence=evidence, alert=Alert(self.test, int(rows[first]), times[first], value))

    def finding(self, remedy: str) -> Finding:
        """The state of the test in words; `remedy` is what to do after an alarm."""
        peak, null = self.evidence.peak, NULLS[self.test]
        sentence = f"largest evidence {peak:.3g} against '{null}' (alarm at {self.threshold:.3g})"
        if self.alert is None:
            return Finding(self.test, "fine", sentence, peak, self.threshold)
        status: Status = "problem" if self.test in (ACCURACY, CALIBRATION) else "caution"
        when = f"{self.alert.row:,}" + (f" ({self.alert.time})" if self.alert.time else "")
        return Finding(self.test, status, f"alarm at row {when}: {sentence}", peak, self.threshold, remedy)
