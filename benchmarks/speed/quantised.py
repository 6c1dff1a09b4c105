"""Memory, time and predictions of SmolLM2-135M with its frozen weights in every type.

The file has four bits (Q4_1, and Q8_0 for the embedding), so "float32" is what its numbers mean. Predictions
are those of the untouched base for VADER's sentences with the prompt of the demonstration. Changes are those
of the negative log-probability of the right class.
"""

import argparse
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

import bnlora as bl
from benchmarks.report import Report
from benchmarks.timing import clock
from bnlora.app.demo import RECIPE
from bnlora.data.assets import DOMAINS, fetch_smollm2, vader_domains
from bnlora.models.decoder_storage import num_bytes, num_weights
from bnlora.models.storage import Storage


def log_probs(base: bl.Base, data: bl.TextData, rows: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Log-probabilities for some rows of each domain, their labels, and the seconds of a row."""
    sites = bl.select(base, ["lm_head"], rank=1)
    model = bl.Classifier(base, sites, bl.priors.point(), label_ids=data.label_ids)
    zeros = {
        name: {factor: jnp.zeros(shape) for factor, shape in site.shapes.items()}
        for name, site in model.sites.items()
    }
    run = jax.jit(lambda weights, batch: jax.nn.log_softmax(model.logits(weights, zeros, batch)))
    found, labels, seconds = [], [], []
    for name in DOMAINS:
        batch = data[name][:rows].plain
        for begin in range(0, rows, 16):
            part = batch[begin : begin + 16]
            with clock() as took:
                found.append(np.asarray(run(base.weights, part)))
            seconds.append(took.wall / len(part))
            labels.append(np.asarray(part.labels))
    return np.concatenate(found), np.concatenate(labels), float(np.median(seconds))


def options(parser: argparse.ArgumentParser) -> None:
    """Number of rows."""
    parser.add_argument("--rows", type=int, default=96, help="sentences of each domain, a multiple of 16")


def run(given: argparse.Namespace, report: Report) -> None:
    """Load and predict in every type."""
    sizes = ("bytes per weight", "MiB", "load", "a row")
    header = ("weights", *sizes, "NLL", "accuracy", "change of NLL", "mean absolute change")
    table = report.table("Types of the frozen weights", header)
    first = None
    for weights in get_args(Storage):
        with clock() as took:
            base = bl.load(fetch_smollm2(), weights=weights)
        data = RECIPE.read(vader_domains(), base, text="text", label="label")
        found, labels, seconds = log_probs(base, data, given.rows)
        right = found[np.arange(len(labels)), labels]
        first = right if first is None else first
        size, change = num_bytes(base.weights), first - right
        error = change.std() / len(change) ** 0.5
        table.row(
            weights,
            f"{size / num_weights(base.weights):.3f}",
            f"{size / 2**20:,.1f}",
            f"{took.wall:.1f} s",
            f"{1000 * seconds:.0f} ms",
            f"{-right.mean():.4f}",
            f"{(found.argmax(1) == labels).mean():.3f}",
            f"{change.mean():+.4f} ± {error:.4f}",
            f"{np.abs(change).mean():.4f}",
        )
