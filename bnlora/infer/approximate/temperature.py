r"""One temperature for every draw, chosen on validation rows.

    p_T(y | x) = 1/S sum_s softmax(logits_s(x) / T)

T minimises the mean negative log-likelihood of the mixture. That may have several minima, so the search runs
around the least value on a grid of log T. For a single draw this is the temperature scaling of Guo et al.
(2017); for several, each draw is divided and the mixture taken after, so that T = 1 is the posterior's own
prediction. T belongs to the report: no posterior is tempered by it.

Reference: Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599.
"""

import numpy as np
import scipy  # whose parts are imported when they are first used
from jaxtyping import Float, Int

from bnlora import metrics
from bnlora._util.checks import check_positive
from bnlora.metrics.scores import checked
from bnlora.prediction.predict import Prediction

_LOG_TEMPERATURES = (-5.0, 5.0)  # 0.0067 to 148
_GRID = 101
_TIED = 1e-12  # nats; rows that are all right with clear margins have a loss of zero over many temperatures


def tempered(prediction: Prediction, temperature: float) -> Prediction:
    """The prediction with the log-probabilities of each draw divided by `temperature` and normalised again.

    Args:
        prediction: Log-probabilities of rows under each draw.
        temperature: What they are divided by; 1 changes nothing, more flattens.

    Returns:
        A prediction of the same shape.

    Raises:
        ValueError: When the temperature is not positive.
    """
    check_positive({"temperature": temperature})
    return Prediction(scipy.special.log_softmax(prediction.draw_log_probs / temperature, axis=-1))


def fit_temperature(prediction: Prediction, labels: Int[np.ndarray, " n"]) -> float:
    """The temperature of the least mean negative log-likelihood.

    Args:
        prediction: Prediction of validation rows.
        labels: Class of each, shape (n,).

    Returns:
        The temperature; above 1 where the prediction was overconfident.

    Raises:
        ValueError: When the labels do not fit the prediction, the true class of a row has probability zero
            under every draw, or the negative log-likelihood has no minimum inside the range searched, as when
            every row is classified rightly.
    """
    grid = np.linspace(*_LOG_TEMPERATURES, _GRID)
    exact = Prediction(np.asarray(prediction.draw_log_probs, np.float64))
    log_probs, labels = checked(exact, labels)
    _check_possible(log_probs, labels)

    def loss(t: float) -> float:
        return metrics.nll(tempered(exact, float(np.exp(t))).log_probs, labels)

    losses = np.array([loss(t) for t in grid])
    least = int(losses.argmin())
    if not losses[least] < min(losses[0], losses[-1]) - _TIED:
        raise ValueError(_no_minimum(losses))
    around = grid[least - 1], grid[least + 1]
    found = scipy.optimize.minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _check_possible(log_probs: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> None:
    """Raise `ValueError` where the true class of a row has no probability: a quotient of -inf is -inf."""
    rows = np.flatnonzero(np.isneginf(log_probs[np.arange(len(labels)), labels]))
    if len(rows):
        raise ValueError(
            "the negative log-likelihood is infinite at every temperature: the true class has probability "
            f"exactly zero under every draw in {len(rows)} of {len(labels)} rows, the first of which is row "
            f"{rows[0]}; give log-probabilities computed from logits (log_softmax), which knows no zeros, or "
            "report that the prediction rules out what happened"
        )


def _no_minimum(losses: Float[np.ndarray, " t"]) -> str:
    """Why the losses over the grid of temperatures are least at an end of it, and what to do."""
    low, high = np.exp(_LOG_TEMPERATURES)
    none = (
        "the negative log-likelihood of these rows has no minimum between the temperatures "
        f"{low:.2g} and {high:.3g}"
    )
    if np.ptp(losses) <= _TIED:
        return f"{none}: it is the same at all of them, as where every class is equally probable"
    if losses[-1] < losses[0]:
        return (
            f"{none}: it is least at the highest, so equal probabilities would do as well as these; "
            "look for the fault in labels, template or fit"
        )
    return (
        f"{none}: it is least at the lowest, as where every row is classified rightly; take more validation "
        "rows, some of which are classified wrongly"
    )
