"""How far the network is from its tangent under draws of a tangent posterior, and at their mean.

    mean over rows of |p_network - p_tangent|, half the sum over the classes

A tangent posterior is right or wrong about the tangent model, whatever this distance is. It tells what would
happen if the draws, or their mean, were taken for adapters of the network.
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
"""Rows and draws that are compared. Each pair costs a pass through all layers of the network."""


@dataclass(frozen=True)
class Linearisation:
    """Total-variation distance between predictions of the network and of its tangent.

    Attributes:
        at_mean: With the mean of the draws as adapters, mean over rows.
        at_draws: With each draw as adapters, mean over draws and rows.
        error: Standard error of `at_draws` over draws.
        largest: The largest distance of a row under a draw.
        num_rows: Rows compared.
    """

    at_mean: float
    at_draws: float
    error: float
    largest: float
    num_rows: int


def linearisation(drawn: Sample, data: Batch) -> Linearisation:
    """Compare the network with its tangent.

    Args:
        drawn: A sample of a fit of the tangent model.
        data: Rows; the first 32 are used, labels are not read.
    """
    model: Any = drawn.fit.model  # a `Tangent`, whose network is read below
    every = drawn.drawn[1]
    # The mean of the updates, which factors at fixed `a` have: the mean of `b`.
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0, keepdims=True).astype(x.dtype), every)
    adapters = jax.tree.map(lambda x, y: np.concatenate([x, y]), first_draws(every, DRAWS), mean)
    pair = (drawn.predict(adapters, data[:ROWS], "linearisation", m) for m in (model.network, model))
    network, tangent = (np.exp(found.draw_log_probs) for found in pair)
    distances = 0.5 * np.abs(network - tangent).sum(-1)
    inner = distances[:-1]
    error = float(inner.mean(1).std(ddof=1)) / len(inner) ** 0.5
    return Linearisation(
        float(distances[-1].mean()), float(inner.mean()), error, float(inner.max()), distances.shape[1]
    )


def passes(num_rows: int) -> int:
    """Forward passes of both models."""
    return 2 * min(ROWS, num_rows) * (DRAWS + 1)


def distance(measured: Linearisation) -> Finding:
    """The distances in words; they are no fault of the posterior of the tangent model."""
    sentence = (
        f"a tangent posterior: with the mean of its draws as adapters the network's probabilities differ "
        f"by {measured.at_mean:.3f} from the tangent's, with single draws by {measured.at_draws:.3f} "
        f"± {measured.error:.3f} (largest {measured.largest:.2f}, {measured.num_rows} rows); its "
        "draws are no adapters of the network"
    )
    return Finding("linearisation", "fine", sentence, measured.at_draws)


LINEARISATION = Diagnostic(
    name="linearisation",
    measurement="linearisation",
    measure=lambda exam: linearisation(exam.drawn, exam.rows),
    judge=lambda measured, _: distance(measured),
    needs=("tangent",),
)
