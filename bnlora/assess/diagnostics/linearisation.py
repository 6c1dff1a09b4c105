"""How far the network is from its tangent under draws of a tangent posterior, and at their mean.

    mean over rows of |p_network - p_tangent|, half the sum over the classes

A tangent posterior is right or wrong about the tangent model, whatever this distance is. It tells what would
happen if the draws, or their mean, were taken for adapters of the network.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bnlora.assess.diagnostics.finding import Finding
from bnlora.assess.diagnostics.sample import Sample
from bnlora.data.batch import Batch
from bnlora.prediction.predict import predict_with_draws

ROWS, DRAWS = 32, 16
"""Rows and draws that are compared: each pair costs a pass through the network."""


@dataclass(frozen=True)
class Linearisation:
    """Total-variation distance between predictions of the network and of its tangent.

    Attributes:
        at_mean: With the mean of the draws as adapters, mean over rows.
        at_draws: With each draw as adapters, mean over draws and rows.
        largest: The largest of these.
        num_rows: Rows compared.
    """

    at_mean: float
    at_draws: float
    largest: float
    num_rows: int

    @property
    def finding(self) -> Finding:
        """The distances in words."""
        measured = (
            f"a tangent posterior: with the mean of its draws as adapters the network's probabilities differ "
            f"by {self.at_mean:.3f} from the tangent's, with single draws by {self.at_draws:.3f} (largest "
            f"{self.largest:.2f}, {self.num_rows} rows); its draws are no adapters of the network"
        )
        return Finding("linearisation", "fine", measured, self.at_draws)


def linearisation(drawn: Sample, data: Batch) -> Linearisation | None:
    """Compare the network with its tangent; None where the fit is one of the network.

    Args:
        drawn: A sample of a fit.
        data: Rows; the first 32 are used, labels are not read.
    """
    model: Any = drawn.fit.model  # a `Tangent`, whose network is read below
    if model.kind == "network":
        return None
    some = jax.tree.map(lambda x: np.asarray(x[:DRAWS]), drawn.drawn[1])
    # The mean of the updates, which factors at fixed `a` have: the mean of `b`.
    mean = jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0, keepdims=True).astype(x.dtype), some)
    adapters = jax.tree.map(lambda x, y: np.concatenate([x, y]), some, mean)
    rows, size, console = data[:ROWS], drawn.batch_size, drawn.console
    models = model.network, model
    pair = (predict_with_draws(m, adapters, rows, batch_size=size, console=console) for m in models)
    network, tangent = (np.exp(found.draw_log_probs) for found in pair)
    distances = 0.5 * np.abs(network - tangent).sum(-1)
    inner = distances[:-1]
    return Linearisation(
        float(distances[-1].mean()), float(inner.mean()), float(inner.max()), distances.shape[1]
    )
