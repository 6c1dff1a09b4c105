r"""One temperature for every draw, chosen on validation rows.

    p_T(y | x) = 1/S sum_s softmax(logits_s(x) / T)

T minimises the mean negative log-likelihood of the mixture. There may be several minima, so the search starts
from the smallest value on a grid of log T. For a single draw this is the temperature scaling of Guo et al.
(2017). For several draws, the logits of each draw are divided before the mixture, so that T = 1 is the
posterior's own prediction. T changes only the prediction; the posterior is not tempered.

Reference: Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599.
"""

import numpy as np
import scipy  # imports its submodules when they are first used
from jaxtyping import Float, Int

from bnlora import metrics
from bnlora._util.checks import check_positive
from bnlora.metrics.scores import checked
from bnlora.prediction.predict import Prediction

_LOG_TEMPERATURES = (-5.0, 5.0)  # 0.0067 to 148
_GRID = 101
_TIED = 1e-12  # nats; if all rows are right with clear margins, the loss is zero at many temperatures


def tempered(prediction: Prediction, temperature: float) -> Prediction:
    """The prediction with the log-probabilities of each draw divided by `temperature` and normalised again.

    Args:
        prediction: Log-probabilities of rows under each draw.
        temperature: The divisor; 1 changes nothing, larger values flatten the probabilities.

    Returns:
        A prediction of the same shape.

    Raises:
        ValueError: If the temperature is not positive.
    """
    check_positive({"temperature": temperature})
    return Prediction(scipy.special.log_softmax(prediction.draw_log_probs / temperature, axis=-1))


def fit_temperature(prediction: Prediction, labels: Int[np.ndarray, " n"]) -> float:
    """The temperature with the smallest mean negative log-likelihood.

    Args:
        prediction: Prediction of validation rows.
        labels: Class of each, shape (n,).

    Returns:
        The temperature; above 1 if the prediction was overconfident.

    Raises:
        ValueError: If the labels do not fit the prediction, the true class of a row has probability zero
            under every draw, or the negative log-likelihood has no minimum in the range of the search, for
            example because every row is classified correctly.
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
    search = scipy.optimize.minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(search.x))


def _check_possible(log_probs: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> None:
    """Raise `ValueError` if the true class of a row has probability zero: no divisor changes log 0 = -inf."""
    rows = np.flatnonzero(np.isneginf(log_probs[np.arange(len(labels)), labels]))
    if len(rows):
        raise ValueError(
            "the negative log-likelihood is infinite at every temperature: the true class has probability "
            f"exactly zero under every draw in {len(rows)} of {len(labels)} rows, the first of which is row "
            f"{rows[0]}; pass log-probabilities computed from logits (log_softmax), which has no zeros, or "
            "report that the prediction excludes an observed class"
        )


def _no_minimum(losses: Float[np.ndarray, " t"]) -> str:
    """Why the losses over the grid of temperatures are smallest at an end of it, and the remedy."""
    low, high = np.exp(_LOG_TEMPERATURES)
    none = (
        "the negative log-likelihood of these rows has no minimum between the temperatures "
        f"{low:.2g} and {high:.3g}"
    )
    if np.ptp(losses) <= _TIED:
        return f"{none}: it is the same at all of them, as if every class were equally probable"
    if losses[-1] < losses[0]:
        return (
            f"{none}: it is smallest at the highest, so equal probabilities would do as well as these; "
            "check labels, template and fit"
        )
    return (
        f"{none}: it is smallest at the lowest, as if every row were classified correctly; use more "
        "validation rows, some of which are classified wrongly"
    )
