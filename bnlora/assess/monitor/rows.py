"""What the monitor reads of new rows: probabilities, mutual information, labels and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from bnlora._util.checks import class_numbers
from bnlora.metrics.scores import checked

UNLABELLED = -1
"""Label of a row without a label."""


@runtime_checkable
class Observed(Protocol):
    """What the monitor needs of a prediction; `Prediction` and `Logged` have it."""

    @property
    def log_probs(self) -> Any:
        """Log-probabilities of the classes, shape (n, c)."""
        ...

    @property
    def entropy(self) -> Any:
        """Entropy of each row in nats, shape (n,)."""
        ...

    @property
    def mutual_information(self) -> Any:
        """Mutual information of each row in nats, shape (n,); None if it is not known."""
        ...


@dataclass(frozen=True)
class Logged:
    """A prediction read from a log: probabilities of the mixture, without draws.

    Attributes:
        probs: Probabilities of the classes. Each row is normalised.
        mutual_information: Mutual information of class and adapters in nats; None if the log has none.

    Example:
        >>> Logged(np.array([[0.5, 0.5], [1.0, 0.0]])).entropy.round(3)
        array([0.693, 0.   ])
    """

    probs: Float[np.ndarray, "n c"]
    mutual_information: Float[np.ndarray, " n"] | None = None

    @property
    def log_probs(self) -> Float[np.ndarray, "n c"]:
        """Log-probabilities of the classes."""
        with np.errstate(divide="ignore"):
            return np.log(self.probs / self.probs.sum(1, keepdims=True))

    @property
    def entropy(self) -> Float[np.ndarray, " n"]:
        """Entropy of each row in nats."""
        log_probs = self.log_probs
        return 0.0 - (np.exp(log_probs) * np.maximum(log_probs, np.finfo(np.float64).min)).sum(1)


class Labelled(NamedTuple):
    """Values of labelled rows.

    Attributes:
        numbers: Number of each row in the stream.
        times: Time of each row.
        confidence: Probability of the most probable class.
        correct: Whether it is the true class.
        brier: Squared distance of probabilities and true class.
        nll: Negative log-probability of the true class.
    """

    numbers: Int[np.ndarray, " n"]
    times: list[str]
    confidence: Float[np.ndarray, " n"]
    correct: Bool[np.ndarray, " n"]
    brier: Float[np.ndarray, " n"]
    nll: Float[np.ndarray, " n"]


def distributions(prediction: Observed) -> Float[np.ndarray, "n c"]:
    """Log-probabilities of a prediction; `ValueError` unless each row is a distribution."""
    log_probs = np.asarray(prediction.log_probs, np.float64)
    return checked(log_probs, np.zeros(len(log_probs), int))[0]


def labelled_rows(
    log_probs: Float[np.ndarray, "n c"], labels: Any, numbers: Int[np.ndarray, " n"], times: Sequence[str]
) -> Labelled:
    """Values of the rows that have a label.

    Args:
        log_probs: Log-probabilities of the classes.
        labels: Class of each row, -1 for a row without a label; or a `Batch`.
        numbers: Number of each row in the stream.
        times: Time of each row.

    Raises:
        ValueError: If there is not one label for each row, or a label is neither -1 nor a class.
    """
    classes = class_numbers("the monitored rows", getattr(labels, "labels", labels), len(log_probs))
    at = np.flatnonzero(classes != UNLABELLED)
    chosen = log_probs[at]
    classes = class_numbers("the labelled rows", classes[at], *chosen.shape)
    probs, own = np.exp(chosen), chosen[np.arange(len(at)), classes]
    return Labelled(
        numbers[at],
        [times[i] for i in at.tolist()],
        probs.max(1),
        chosen.argmax(1) == classes,
        (probs**2).sum(1) - 2 * np.exp(own) + 1,
        -own,
    )


def times_of(time: Any, num_rows: int) -> list[str]:
    """Time of each row as text.

    Args:
        time: One time for all rows, a sequence with one for each row, or None.
        num_rows: Number of rows.

    Raises:
        ValueError: If the sequence has another length.
    """
    if time is None or isinstance(time, str) or np.ndim(time) == 0:
        return ["" if time is None else str(time)] * num_rows
    if len(time) != num_rows:
        raise ValueError(f"time must be one time, or one for each of the {num_rows} rows; got {len(time)}")
    return [str(x) for x in time]
