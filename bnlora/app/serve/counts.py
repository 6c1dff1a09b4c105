"""What the service knows of its own work: counts, means over time, and the labels that came later.

No text is stored here. Everything is bounded: a day of minutes, and the last predictions.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bnlora import metrics
from bnlora.app.serve.bodies import Refused
from bnlora.assess.monitor import Monitor
from bnlora.metrics.scores import confidences
from bnlora.prediction.predict import Prediction

MINUTES = 24 * 60
"""Minutes that `History` keeps."""

KEPT = 10_000
"""Predictions that can still get a label, and labelled predictions that count."""

ROUTES = ("/predict", "/labels", "/monitor", "/health", "/metrics", "/openapi.json", "/")


@dataclass
class Sums:
    """Sums over rows.

    Attributes:
        rows: Number of rows.
        confidence: Sum of the largest probability of each row.
        entropy: Sum of the entropies in nats.
        epistemic: Sum of their epistemic parts in nats.
    """

    rows: int = 0
    confidence: float = 0.0
    entropy: float = 0.0
    epistemic: float = 0.0

    def add(self, prediction: Prediction) -> None:
        """Add the rows of a prediction."""
        self.rows += prediction.draw_log_probs.shape[1]
        self.confidence += float(confidences(prediction.log_probs).sum())
        self.entropy += float(prediction.entropy.sum())
        self.epistemic += float(prediction.mutual_information.sum())

    def mean(self, name: str) -> float:
        """Mean of a sum over the rows; 0 without rows."""
        return getattr(self, name) / self.rows if self.rows else 0.0


class History:
    """Sums over all rows, and for each minute of the last day."""

    def __init__(self) -> None:
        self.total = Sums()
        self.minutes: OrderedDict[int, Sums] = OrderedDict()

    def add(self, prediction: Prediction) -> None:
        """Add the rows of a prediction, now."""
        now = int(time.monotonic() // 60)  # the clock of the machine may be set back
        self.total.add(prediction)
        self.minutes.setdefault(now, Sums()).add(prediction)
        while len(self.minutes) > MINUTES:
            self.minutes.popitem(last=False)


class Labelled(NamedTuple):
    """Predictions whose labels are known.

    Attributes:
        log_probs: Log-probabilities of the classes.
        labels: True classes.
    """

    log_probs: np.ndarray
    labels: np.ndarray

    def scores(self) -> dict[str, Any]:
        """Number of labels, accuracy, and negative log-likelihood in nats."""
        return {
            "labelled": len(self.labels),
            "accuracy": metrics.accuracy(self.log_probs, self.labels),
            "nll": metrics.nll(self.log_probs, self.labels),
        }


class Feedback:
    """Probabilities of the last predictions by id, and the labels that came for them."""

    def __init__(self) -> None:
        self._predicted: OrderedDict[str, np.ndarray] = OrderedDict()
        self._labelled: OrderedDict[str, tuple[np.ndarray, int]] = OrderedDict()

    def remember(self, ids: Sequence[str], prediction: Prediction) -> None:
        """Keep the probabilities of rows until their labels come."""
        self._predicted.update(zip(ids, prediction.log_probs, strict=True))
        while len(self._predicted) > KEPT:
            self._predicted.popitem(last=False)

    def label(self, labels: Mapping[str, int]) -> Labelled | None:
        """Add labels by id; a second label of an id replaces the first.

        Returns:
            The rows that had no label before, in the order of the ids; None if there are none.

        Raises:
            Refused: If an id is unknown. Then no label is added.
        """
        known = {name: self._log_probs(name) for name in labels}
        for name, log_probs in known.items():
            if log_probs is None:
                raise Refused(
                    404, f"{name[:40]!r} is no id of one of the last {KEPT:,} predictions; no label was added"
                )
        new = [name for name in known if name in self._predicted]
        for name, log_probs in known.items():
            self._predicted.pop(name, None)
            self._labelled[name] = (log_probs, labels[name])  # type: ignore[assignment]
        first = _stacked([self._labelled[name] for name in new])
        while len(self._labelled) > KEPT:
            self._labelled.popitem(last=False)
        return first

    def labelled(self) -> Labelled | None:
        """Predictions with labels; None if there are none."""
        return _stacked([*self._labelled.values()])

    def _log_probs(self, name: str) -> np.ndarray | None:
        if name in self._labelled:
            return self._labelled[name][0]
        return self._predicted.get(name)


def _stacked(rows: Sequence[tuple[np.ndarray, int]]) -> Labelled | None:
    if not rows:
        return None
    log_probs, labels = zip(*rows, strict=True)
    return Labelled(np.stack(log_probs), np.array(labels))


class Counts:
    """Metrics in a registry of their own, in Prometheus's text format."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("bnlora_requests", "Requests.", ["route", "status"], **own)
        self._errors = Counter("bnlora_errors", "Requests with a status of 400 or more.", ["status"], **own)
        self._rows = Counter("bnlora_rows", "Rows that were predicted.", **own)
        self._seconds = Histogram("bnlora_request_seconds", "Seconds of a request.", ["route"], **own)
        self.open = Gauge("bnlora_open_requests", "Requests for predictions that wait or run.", **own)
        self._means = {
            name: Gauge(f"bnlora_mean_{name}", f"Mean {name} of all rows.", **own)
            for name in ("confidence", "entropy", "epistemic")
        }
        self._accuracy = Gauge("bnlora_accuracy", "Accuracy of the labelled predictions.", **own)
        self._nll = Gauge("bnlora_nll", "Negative log-likelihood of the labelled predictions.", **own)
        self._labelled = Gauge("bnlora_labelled", "Labelled predictions.", **own)
        tests = {
            "alarm": "1 if a test of the monitor has raised an alarm, 0 otherwise.",
            "log_evidence": "Natural logarithm of the evidence of a test of the monitor.",
            "log_threshold": "Natural logarithm of the evidence at which a test raises an alarm.",
        }
        self._tests = {
            name: Gauge(f"bnlora_monitor_{name}", text, ["test"], **own) for name, text in tests.items()
        }
        self.requests, self.errors = 0, 0

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        route = route if route in ROUTES else "other"
        self.requests += 1
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if status >= 400:
            self.errors += 1
            self._errors.labels(str(status)).inc()

    def rows(self, count: int, total: Sums) -> None:
        """Count predicted rows; `total` has the means of all rows."""
        self._rows.inc(count)
        for name, gauge in self._means.items():
            gauge.set(total.mean(name))

    def labels(self, scores: Mapping[str, float]) -> None:
        """Set what is known from labels."""
        self._labelled.set(scores["labelled"])
        self._accuracy.set(scores["accuracy"])
        self._nll.set(scores["nll"])

    def watch(self, monitor: Monitor) -> None:
        """Set what is known from the monitor."""
        for test, watch in monitor.watches.items():
            self._tests["alarm"].labels(test).set(watch.alert is not None)
            self._tests["log_evidence"].labels(test).set(watch.evidence.log_value)
            self._tests["log_threshold"].labels(test).set(np.log(watch.threshold))

    def text(self) -> bytes:
        """All metrics as text."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
