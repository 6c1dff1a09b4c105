"""Distance between the network and its tangent under draws of a tangent posterior, and at their mean.

    mean over rows of 1/2 sum_c |p_network(c) - p_tangent(c)|

A tangent posterior is a posterior of the tangent model; this distance does not measure its error. It measures
the error of using the draws, or their mean, as adapters of the network.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bnlora._util.finding import Finding
from bnlora.assess.diagnostics.examination import Diagnostic
from bnlora.assess.diagnostics.sample import Sample, first_draws
from bnlora.data.batch import Batch

ROWS, DRAWS = 32, 4
"""Number of rows and draws. Each pair requires a pass through all layers of the network."""


@dataclass(frozen=True)
class Linearisation:
    """Total-variation distance between predictions of the network and of its tangent.

    Attributes:
        at_mean: Distance with the mean of the draws as adapters, mean over rows.
        at_draws: Distance with each draw as adapters, mean over draws and rows.
        error: Standard error of `at_draws` over draws.
        largest: Largest distance of a row under a draw.
        num_rows: Number of rows.
    """

    at_mean: float
    at_draws: float
    error: float
    largest: float
    num_rows: int


def linearisation(sample: Sample, data: Batch) -> Linearisation:
    """Compare the network with its tangent.

    Args:
        sample: A sample of a fit of the tangent model.
        data: Rows; the first 32 are used, labels are not read.
    """
    model: Any = sample.fit.model  # a `Tangent`, whose network is read below
    every = sample.drawn[1]
    # With fixed `a`, the mean of the updates has the mean of `b` as its factor.
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0, keepdims=True).astype(x.dtype), every)
    adapters = jax.tree.map(lambda x, y: np.concatenate([x, y]), first_draws(every, DRAWS), mean)
    pair = (sample.predict(adapters, data[:ROWS], "linearisation", m) for m in (model.network, model))
    network, tangent = (np.exp(prediction.draw_log_probs) for prediction in pair)
    distances = 0.5 * np.abs(network - tangent).sum(-1)
    of_draws = distances[:-1]
    error = float(of_draws.mean(1).std(ddof=1)) / len(of_draws) ** 0.5
    return Linearisation(
        float(distances[-1].mean()), float(of_draws.mean()), error, float(of_draws.max()), distances.shape[1]
    )


def passes(num_rows: int) -> int:
    """Number of forward passes of both models."""
    return 2 * min(ROWS, num_rows) * (DRAWS + 1)


def distance(measured: Linearisation) -> Finding:
    """Finding with the distances; always "fine", because they are no error of the tangent posterior."""
    sentence = (
        f"a tangent posterior: with the mean of its draws as adapters the network's probabilities differ "
        f"by {measured.at_mean:.3f} from the tangent's, with single draws by {measured.at_draws:.3f} "
        f"± {measured.error:.3f} (largest {measured.largest:.2f}, {measured.num_rows} rows); its "
        "draws are not adapters of the network"
    )
    return Finding("linearisation", "fine", sentence, measured.at_draws)


LINEARISATION = Diagnostic(
    name="linearisation",
    measurement="linearisation",
    measure=lambda exam: linearisation(exam.drawn, exam.rows),
    judge=lambda measured, _: distance(measured),
    needs=("tangent",),
)
