r"""Posterior prediction: the mixture over draws of the probabilities of the classes.

    p(y | x) = 1/S sum_s softmax(logits(x; adapters_s))

The definition is the same for any number of draws; for a deterministic fit it is a single softmax.
The layers below the lowest adapted one are the same for all draws and run once per row. A few draws at a time
run through the layers above, so memory does not grow with the number of draws: one on a CPU, where more gain
nothing (`python -m benchmarks step predict`), and several on an accelerator, where they share every read of
the weights.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int
from rich.console import Console

from bnlora._util.checks import check_key, class_numbers
from bnlora._util.compilation import SMALL, pieces
from bnlora._util.display import Showable, Shown, Table
from bnlora._util.exhausted import naming_memory
from bnlora._util.typing import Adapters
from bnlora.data.batch import Batch, check_form, chosen_rows
from bnlora.models.sharding import whole
from bnlora.prediction.posterior import Posterior
from bnlora.program.cache import tracked_parts
from bnlora.program.likelihoods import Likelihood
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
        >>> prediction[[0, 0]]  # some of its rows, as of a `Batch`
        Prediction(2 rows, 2 classes, 2 draws)
    """

    draw_log_probs: Float[np.ndarray, "s n c"]

    def __len__(self) -> int:
        return self.draw_log_probs.shape[1]

    def __getitem__(self, rows: Any) -> "Prediction":
        """The given rows, by slice, list of indices, or mask; `ValueError` if a row does not exist."""
        return Prediction(self.draw_log_probs[:, chosen_rows(rows, len(self))])

    @property
    def log_probs(self) -> Float[np.ndarray, "n c"]:
        """Log of the mixture over draws, normalised over the classes."""
        return log_mixture(self.draw_log_probs)

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
        MemoryError: If the device has not enough memory for a batch.

    Example:
        >>> prediction = bl.predict(key, fit, rows, num_draws=4)
        >>> prediction.probs.shape
        (8, 2)
    """
    key = check_key(key)
    require_classes(posterior.model, "bl.predict")
    return Prediction(
        drawn_outputs(
            key, posterior, data, num_draws=num_draws, batch_size=batch_size, draws_together=draws_together,
            console=console,
        )
    )  # fmt: skip


def drawn_outputs(
    key: Array,
    posterior: Posterior,
    data: Batch,
    *,
    num_draws: int,
    batch_size: int,
    draws_together: int | None = None,
    console: Console | None = None,
) -> Float[np.ndarray, "s n m"]:
    """What the likelihood's predictions keep of posterior draws; the arguments are those of `predict`."""
    key = check_key(key)
    check_form("given", data)
    together = _together(draws_together, posterior.model.base.mesh)
    if min(len(data), num_draws, batch_size, together) < 1:
        raise ValueError(
            f"rows, num_draws, batch_size and draws_together must be at least 1; got {len(data)} rows, "
            f"num_draws={num_draws}, batch_size={batch_size}, draws_together={draws_together}"
        )
    draws = posterior.draw_adapters(key, num_draws)
    return outputs_with_draws(
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
    """Like `predict`, with draws of the adapters instead of a posterior; factors have a leading draw axis."""
    require_classes(model, "bl.predict")
    options: Any = {"batch_size": batch_size, "draws_together": draws_together, "console": console}
    return Prediction(outputs_with_draws(model, draws, data, **options))


def require_classes(model: Model, what: str) -> None:
    """Raise `ValueError` unless a row has probabilities of classes; `what` needs them."""
    if not model.num_classes:
        raise ValueError(
            f"{what} needs a model of classes; got a model of {model.likelihood.outcome}s, which "
            f"bl.predict_{model.likelihood.outcome}s and bl.to_arviz accept"
        )


def require_labels(model: Model, what: str) -> None:
    """Raise `ValueError` unless the outcome of a row is one class; `what` compares it with predictions."""
    require_classes(model, what)
    if model.likelihood.outcome != "class":
        raise ValueError(
            f"{what} compares predictions with one label for each row; got a model of "
            f"{model.likelihood.outcome}, which bl.compare and bl.to_arviz accept"
        )


def outputs_with_draws(
    model: Model,
    draws: Adapters,
    data: Batch,
    *,
    batch_size: int = 32,
    draws_together: int | None = None,
    console: Console | None = None,
    widths: Literal["many", "few"] = "many",
) -> Float[np.ndarray, "s n m"]:
    """What the likelihood's predictions keep of every draw and row (`Likelihood.outputs`).

    With `widths="few"`, rows are padded to powers of two, so that fewer programs are compiled.
    """
    model.check_tokens(data)
    num_draws = len(jax.tree.leaves(draws)[0])
    if num_draws > 1 and all_equal(draws):  # those of a point: one pass serves all
        options: Any = {
            "batch_size": batch_size, "draws_together": draws_together, "console": console, "widths": widths
        }  # fmt: skip
        one = outputs_with_draws(model, jax.tree.map(lambda x: np.asarray(x)[:1], draws), data, **options)
        return np.repeat(one, num_draws, axis=0)
    over = model.base.mesh
    outputs, together = np.empty((num_draws, len(data), 0)), _together(draws_together, over)
    # On the device once, because every batch of rows reads them; the last piece is padded beyond `count`.
    with naming_memory(partial(_smaller, data, num_draws, batch_size, together)):
        on_device = [(whole(over, jax.device_put(x)), count) for x, count in pieces(draws, multiple=together)]
        narrow = model.numbers((batch_size, *data.row_shape)) > SMALL
        for part in tracked_parts(data, batch_size, "predict", console, narrow=narrow, widths=widths):
            batch, begin = model.prepare(part.batch), 0
            for piece, count in on_device:
                computed = np.asarray(whole(over, model.compiled_outputs(piece, count, batch, together)))
                if not outputs.shape[2]:  # the likelihood decides how many numbers a row has
                    outputs = np.empty((num_draws, len(data), computed.shape[2]))
                outputs[begin : begin + count, part.rows] = computed[:count, : len(part.rows)]
                begin += count
    return outputs


def _smaller(data: Batch, num_draws: int, batch_size: int, together: int) -> str:
    """What takes less memory than a prediction that did not fit, as the end of a sentence."""
    length = data.tokens.shape[-1]
    less = f"batch_size={max(batch_size // 2, 1)}"
    if together > 1:
        less += f" or draws_together={together // 2}"
    return (
        f"a prediction with batch_size={batch_size} and draws_together={together} of rows of {length} tokens "
        f"needs more than there is; pass {less} for half of the activations; "
        f"bl.estimate(base, sites, prior, batch=({batch_size}, {length}), num_draws={num_draws}).prediction "
        "has the bytes"
    )


def log_mixture(by_draw: Float[np.ndarray, "s *n"]) -> Float[np.ndarray, "*n"]:
    """Log of the mean over draws of exp(`by_draw`): log-probabilities of the mixture."""
    return np.logaddexp.reduce(by_draw, axis=0) - np.log(len(by_draw))


def log_likelihood_by_draw(
    model: Model, outputs: Float[np.ndarray, "s n m"], data: Batch
) -> Float[np.ndarray, "s n"]:
    """Log-probability of each row's outcome under each draw, in nats, from `outputs_with_draws`; float64."""
    if type(model.likelihood).log_prob is Likelihood.log_prob:  # without small programs for every shape
        return Prediction(outputs).log_probs_of(data.labels)
    with jax.enable_x64(new_val=True):
        return np.asarray(model.likelihood.log_prob(jnp.asarray(outputs, jnp.float64), data))


def all_equal(draws: Adapters) -> bool:
    """Whether all draws are the same."""
    return all(bool((np.asarray(x) == np.asarray(x)[:1]).all()) for x in jax.tree.leaves(draws))


def _together(draws_together: int | None, over: Mesh | None = None) -> int:
    """Number of draws that run at a time: at least one on each device of the axis "draw"."""
    if draws_together is not None:
        return draws_together
    beside = 1 if over is None else over.shape.get("draw", 1)
    return beside * (1 if jax.default_backend() == "cpu" else 8)


def _entropy(log_probs: np.ndarray) -> np.ndarray:
    # 0 log 0 = 0: with the smallest float instead of log 0 = -inf, the product is 0 and not NaN.
    return -(np.exp(log_probs) * np.maximum(log_probs, np.finfo(np.float64).min)).sum(-1)
