r"""Posterior prediction: the mixture over draws of the softmax over the label words.

    p(y | x) = 1/S sum_s softmax(logits(x; adapters_s))

The definition is the same for any number of draws; for a deterministic fit it is a single softmax.
The layers below the lowest adapted one are the same for all draws and run once per row. A few draws at a time
run through the layers above, so memory does not grow with the number of draws: one on a CPU, where more gain
nothing (`python -m benchmarks step predict`), and several on an accelerator, where they share every read of
the weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from rich.console import Console

from bnlora._util.checks import check_key, class_numbers
from bnlora._util.compilation import SMALL, pieces
from bnlora._util.display import Showable, Shown, Table
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch, check_form
from bnlora.prediction.posterior import Posterior
from bnlora.program.cache import tracked_parts
from bnlora.program.protocol import Model


@dataclass(frozen=True)
class Prediction(Shown):
    """Predictive distribution of every row.

    Attributes:
        draw_log_probs: Log-probabilities of the classes under each draw, shape (draw, row, class).

    Example:
        >>> prediction = bl.Prediction(np.log([[[0.9, 0.1]], [[0.5, 0.5]]]))  # two draws of one row
        >>> prediction.probs.round(3)
        array([[0.7, 0.3]])
    """

    draw_log_probs: Float[np.ndarray, "s n c"]

    @property
    def log_probs(self) -> Float[np.ndarray, "n c"]:
        """Log of the mixture over draws, normalised over the classes."""
        return np.logaddexp.reduce(self.draw_log_probs, axis=0) - np.log(len(self.draw_log_probs))

    @property
    def probs(self) -> Float[np.ndarray, "n c"]:
        """Probabilities of the mixture."""
        return np.exp(self.log_probs)

    def log_probs_of(self, labels: Int[Any, " n"]) -> Float[np.ndarray, "s n"]:
        """Log-probability of each row's label under each draw.

        Raises:
            ValueError: If there is not one label for each row, or a label is not the number of a class.
        """
        index = class_numbers("the predicted rows", labels, *self.draw_log_probs.shape[1:])[None, :, None]
        return np.take_along_axis(self.draw_log_probs, index, axis=2)[..., 0]

    @property
    def entropy(self) -> Float[np.ndarray, " n"]:
        """Entropy of the mixture in nats: total uncertainty."""
        return _entropy(self.log_probs)

    @property
    def mutual_information(self) -> Float[np.ndarray, " n"]:
        """Mutual information of class and adapters in nats: the epistemic part of the entropy."""
        return np.maximum(self.entropy - _entropy(self.draw_log_probs).mean(0), 0.0)

    @property
    def stderr(self) -> Float[np.ndarray, "n c"]:
        """Monte Carlo standard error of `probs`; NaN for a single draw, which has no spread."""
        draws = len(self.draw_log_probs)
        if draws < 2:
            return np.full(self.draw_log_probs.shape[1:], np.nan)
        return np.exp(self.draw_log_probs).std(0, ddof=1) / draws**0.5

    @property
    def overview(self) -> tuple[Showable, ...]:
        """Distribution over rows of confidence and uncertainty, and the classes."""
        draws, rows, classes = self.draw_log_probs.shape
        log_probs, mixture = self.log_probs, self.probs
        by_row = {
            "confidence": mixture.max(1),
            "entropy (nats)": _entropy(log_probs),
            "mutual information (nats)": self.mutual_information,
            "Monte Carlo standard error": self.stderr.max(1),
        }
        spread = tuple(
            (name, *(f"{x:.3g}" for x in (values.mean(), *np.quantile(values, [0.05, 0.5, 0.95]))))
            for name, values in by_row.items()
        )
        top = np.bincount(log_probs.argmax(1), minlength=classes)
        share = tuple((str(c), f"{top[c]:,}", f"{mixture[:, c].mean():.3f}") for c in range(classes))
        title = f"Prediction: {rows:,} rows, {classes} classes, {draws} draws"
        return (
            Table(title, ("over rows", "mean", "5%", "median", "95%"), spread),
            Table("Classes", ("class", "rows where it is most probable", "mean probability"), share),
        )

    def __repr__(self) -> str:
        draws, rows, classes = self.draw_log_probs.shape
        return f"Prediction({rows} rows, {classes} classes, {draws} draws)"


def predict(
    key: Array,
    posterior: Posterior,
    data: Batch,
    *,
    num_draws: int = 32,
    batch_size: int = 32,
    draws_together: int | None = None,
    console: Console | None = None,
) -> Prediction:
    """Predict the classes of every row from posterior draws.

    Args:
        key: Random key of the draws; the same key gives the same draws for any data.
        posterior: A fit, or any other posterior.
        data: Rows to predict; labels are not read.
        num_draws: Number of posterior draws S.
        batch_size: Rows to run at a time.
        draws_together: Draws to run at a time; peak memory is that of `draws_together` draws of `batch_size`
            rows. One on a CPU and eight on an accelerator when omitted.
        console: Where to draw a progress bar; the terminal or notebook when omitted.

    Returns:
        Log-probabilities by draw, and the mixture's summaries.

    Raises:
        ValueError: If there are no rows, tokens and mask are not as `Batch` requires, a token is outside the
            base's vocabulary, or a number of draws or rows is below 1.

    Example:
        >>> prediction = bl.predict(key, fit, rows, num_draws=4)
        >>> prediction.probs.shape
        (8, 2)
    """
    key = check_key(key)
    check_form("given", data)
    together = _together(draws_together)
    if min(len(data), num_draws, batch_size, together) < 1:
        raise ValueError(
            f"rows, num_draws, batch_size and draws_together must be at least 1; got {len(data)} rows, "
            f"num_draws={num_draws}, batch_size={batch_size}, draws_together={draws_together}"
        )
    draws = posterior.draw_adapters(key, num_draws)
    return predict_with_draws(
        posterior.model, draws, data, batch_size=batch_size, draws_together=together, console=console
    )


def predict_with_draws(
    model: Model,
    draws: Adapters,
    data: Batch,
    *,
    batch_size: int = 32,
    draws_together: int | None = None,
    console: Console | None = None,
) -> Prediction:
    """Predict with given adapters, whose factors carry a leading draw axis; otherwise like `predict`."""
    model.check_tokens(data)
    sizes = len(jax.tree.leaves(draws)[0]), len(data), len(model.label_ids)
    log_probs, together = np.empty(sizes, np.float64), _together(draws_together)
    # On the device once, because every batch of rows reads them; the last piece is padded beyond `count`.
    on_device = [(jax.device_put(piece), count) for piece, count in pieces(draws, multiple=together)]
    narrow = model.numbers((batch_size, data.tokens.shape[1])) > SMALL
    for part in tracked_parts(data, batch_size, "predict", console, narrow=narrow):
        batch, begin = model.prepare(part.batch), 0
        for piece, count in on_device:
            computed = np.asarray(model.compiled_log_probs(piece, count, batch, together))
            log_probs[begin : begin + count, part.rows] = computed[:count, : len(part.rows)]
            begin += count
    return Prediction(log_probs)


def _together(draws_together: int | None) -> int:
    """Number of draws that run at a time."""
    if draws_together is not None:
        return draws_together
    return 1 if jax.default_backend() == "cpu" else 8


def _entropy(log_probs: np.ndarray) -> np.ndarray:
    # 0 log 0 = 0: the finite minimum in place of log 0 = -inf makes the product 0 instead of NaN.
    return -(np.exp(log_probs) * np.maximum(log_probs, np.finfo(np.float64).min)).sum(-1)
