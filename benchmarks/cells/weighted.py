"""Metrics of resampled rows.

A bootstrap sample of n rows is a vector of n counts that sum to n. Each function here takes many samples at
once, as weights of shape (b, n), and returns one value for each. Weights of one give the metric of the rows.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float

from bnlora.metrics.scores import BINS, width_bin

CHUNK = 250
"""Samples that are drawn at once; it limits the memory."""

Weights = Float[np.ndarray, "b n"]


def counts(num_rows: int, key: tuple[int, ...], chunk: int) -> Weights:
    """Counts of `CHUNK` bootstrap samples of some rows.

    The same arguments give the same counts. Methods, metrics and sizes of a task then have the same resampled
    rows, so their covariance is part of every interval.

    Args:
        num_rows: Number of rows.
        key: Key of the rows.
        chunk: Number of the chunk.

    Returns:
        Counts, shape (CHUNK, num_rows).
    """
    index = np.random.default_rng([num_rows, *key, chunk]).integers(0, num_rows, (CHUNK, num_rows))
    index += num_rows * np.arange(CHUNK)[:, None]
    drawn = np.bincount(index.ravel(), minlength=CHUNK * num_rows)
    return drawn.reshape(CHUNK, num_rows).astype(np.float64)


def replicates(
    statistic: Callable[..., Float[np.ndarray, "b k"]],
    rows: Sequence[tuple[int, tuple[int, ...]]],
    draws: int,
) -> Float[np.ndarray, "draws k"]:
    """Values of a statistic on bootstrap samples.

    Args:
        statistic: Function of the weights of each set of rows; returns k values for each sample.
        rows: Number of rows and key of each set of rows.
        draws: Number of samples.

    Returns:
        The values, shape (draws, k).
    """
    chunks = range(-(-draws // CHUNK))
    parts = [statistic(*(counts(n, key, chunk) for n, key in rows)) for chunk in chunks]
    return np.concatenate(parts)[:draws]


def mean(weights: Weights, values: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "b k"]:
    """Mean of k values of each row."""
    return weights @ values / weights.sum(1, keepdims=True)


def ece(
    weights: Weights, confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, " b"]:
    """Expected calibration error over `BINS` bins of equal width."""
    gaps = np.zeros((len(confidence), BINS))
    gaps[np.arange(len(confidence)), width_bin(confidence, BINS)] = correct - confidence
    return np.abs(mean(weights, gaps)).sum(1)


def selective_accuracy(
    weights: Weights,
    doubt: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    coverage: float,
) -> Float[np.ndarray, " b"]:
    """Accuracy of the rows of least doubt; in expectation over the order of ties.

    Args:
        weights: Weights of the rows, shape (b, n).
        doubt: Doubt of each row.
        correct: Whether the prediction of each row is correct.
        coverage: Share of the rows that are answered, rounded up to whole rows.

    Returns:
        Accuracies, shape (b,).
    """
    order = np.argsort(doubt, kind="stable")
    starts = np.flatnonzero(np.diff(doubt[order], prepend=-np.inf))  # first row of each group of ties
    sorted_weights = weights[:, order]
    size = np.add.reduceat(sorted_weights, starts, axis=1)
    hits = np.add.reduceat(sorted_weights * correct[order], starts, axis=1)
    # The small number removes the rounding error of products such as 0.8 * 35.
    wanted = np.ceil(coverage * weights.sum(1, keepdims=True) - 1e-9)
    taken = np.clip(wanted - (np.cumsum(size, axis=1) - size), 0, size)
    return (taken * hits / np.maximum(size, 1)).sum(1) / wanted[:, 0]


def auroc(
    inside_weights: Weights,
    outside_weights: Float[np.ndarray, "b m"],
    inside: Float[np.ndarray, " n"],
    outside: Float[np.ndarray, " m"],
) -> Float[np.ndarray, " b"]:
    """Probability that a row outside has more doubt than one inside; ties count one half.

    Args:
        inside_weights: Weights of the rows in domain, shape (b, n).
        outside_weights: Weights of the shifted rows, shape (b, m).
        inside: Doubt of the rows in domain.
        outside: Doubt of the shifted rows.

    Returns:
        Areas under the ROC curve, shape (b,).
    """
    # Sorted rows outside make the look-ups below go through the memory in order, which is faster.
    order, outer = np.argsort(inside, kind="stable"), np.argsort(outside, kind="stable")
    below = np.cumsum(inside_weights[:, order], axis=1)
    below = np.concatenate([np.zeros((len(below), 1)), below], axis=1)
    # Twice the weight inside below each outside row; a tie counts once, which is half of two.
    left, right = (np.searchsorted(inside[order], outside[outer], side) for side in ("left", "right"))
    twice = np.take(below, left, axis=1) + np.take(below, right, axis=1)
    total = 2 * inside_weights.sum(1) * outside_weights.sum(1)
    return (twice * outside_weights[:, outer]).sum(1) / total
