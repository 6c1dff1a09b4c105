r"""Distances between the predictions of two posteriors, row by row.

    TV_i = 1/2 sum_c |p_a(c | x_i) - p_r(c | x_i)|,    KL_i = sum_c p_r(c | x_i) log(p_r / p_a)(c | x_i)

p_a and p_r are the mixtures over draws of the approximation and of the reference. The mutual information of
class and adapters measures epistemic uncertainty. It is compared with that of the reference by the mean
absolute difference and by the correlation over the rows.

Mixtures over finitely many draws differ even if the posteriors are equal. Every measure is therefore computed
with m draws a side, as the mean over two disjoint pairs of halves, and reported with its null level, the same
measure between the halves of the reference (`bnlora.assess.comparison.pairs`). The p-values come from
permutation tests: all 4m draws are reassigned at random to the two sides, and the statistic is the mean over
rows of TV (or of the difference of mutual information) between the 2m draws of each side. They are exact for
independent draws.

Reference: Phipson and Smyth (2010), Permutation p-values should never be zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bnlora.prediction.predict import Prediction

LEAST_DRAWS = 4


@dataclass(frozen=True, eq=False)
class PredictiveAgreement:
    """Distances between predictions, by row, with their null levels.

    Attributes:
        posterior: Prediction by the approximation, 2m draws.
        reference: Prediction by the reference, 2m draws.
        total_variation: TV of each row with m draws.
        total_variation_null: The same between halves of the reference.
        total_variation_p: Permutation p-value of equal predictions.
        divergence: KL(reference || approximation) of each row in nats.
        divergence_null: The same between halves of the reference.
        mutual_information_gap: Absolute difference of the mutual information of each row in nats.
        mutual_information_gap_null: The same between halves of the reference.
        mutual_information_p: Permutation p-value of equal mutual information.
        correlation: Correlation over the rows of the mutual information; NaN if it does not vary, or with
            fewer than three rows.
        correlation_null: The same between halves of the reference.
    """

    posterior: Prediction
    reference: Prediction
    total_variation: Float[np.ndarray, " n"]
    total_variation_null: Float[np.ndarray, " n"]
    total_variation_p: float
    divergence: Float[np.ndarray, " n"]
    divergence_null: Float[np.ndarray, " n"]
    mutual_information_gap: Float[np.ndarray, " n"]
    mutual_information_gap_null: Float[np.ndarray, " n"]
    mutual_information_p: float
    correlation: float
    correlation_null: float


def predictive_agreement(
    random: np.random.Generator, posterior: Prediction, reference: Prediction, *, num_permutations: int = 999
) -> PredictiveAgreement:
    """Compare two predictions for the same rows.

    Args:
        random: Generator of the permutations.
        posterior: Prediction by independent draws of the approximation.
        reference: Prediction by the same number of draws of the reference, thinned until nearly
            independent, in the order of its chains.
        num_permutations: Number of permutations.

    Returns:
        Distances between the predictions by row, null levels and p-values.

    Raises:
        ValueError: If rows, classes or numbers of draws differ, there are fewer than four draws, or
            `num_permutations` is below one.
    """
    shapes = posterior.draw_log_probs.shape, reference.draw_log_probs.shape
    if shapes[0] != shapes[1] or shapes[0][0] < LEAST_DRAWS or num_permutations < 1:
        raise ValueError(
            f"expected two predictions of one shape (draw, row, class) with at least {LEAST_DRAWS} draws, "
            f"and at least one permutation; got shapes {shapes[0]} and {shapes[1]}, {num_permutations} "
            "permutations"
        )
    matched = list(zip(_halves(posterior), _halves(reference), strict=True))
    reference_halves = _halves(reference)

    def both(measure: Callable[[Prediction, Prediction], Any]) -> tuple[Any, Any]:
        return np.mean([measure(a, r) for a, r in matched], axis=0), measure(*reference_halves)

    variation, divergence, gap = both(total_variation), both(divergence_from), both(_gap)
    correlation = both(_correlation)
    variation_p, gap_p = _permuted(random, posterior, reference, num_permutations)
    return PredictiveAgreement(
        posterior=posterior,
        reference=reference,
        total_variation=variation[0],
        total_variation_null=variation[1],
        total_variation_p=variation_p,
        divergence=divergence[0],
        divergence_null=divergence[1],
        mutual_information_gap=gap[0],
        mutual_information_gap_null=gap[1],
        mutual_information_p=gap_p,
        correlation=float(correlation[0]),
        correlation_null=float(correlation[1]),
    )


def total_variation(posterior: Prediction, reference: Prediction) -> Float[np.ndarray, " n"]:
    """Total variation between the mixtures, by row."""
    return 0.5 * np.abs(posterior.probs - reference.probs).sum(-1)


def divergence_from(posterior: Prediction, reference: Prediction) -> Float[np.ndarray, " n"]:
    """KL(reference || approximation) between the mixtures in nats, by row."""
    # Clip log 0 to a finite value, because 0 * inf is NaN. A class of probability zero under the reference
    # contributes nothing (0 log 0 = 0); rounding can make the sum slightly negative.
    log_r = np.maximum(reference.log_probs, np.finfo(np.float64).min)
    log_a = np.maximum(posterior.log_probs, np.finfo(np.float64).min)
    terms = np.where(reference.probs > 0, reference.probs * (log_r - log_a), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def _halves(prediction: Prediction) -> tuple[Prediction, Prediction]:
    half = len(prediction.draw_log_probs) // 2
    values = prediction.draw_log_probs
    return Prediction(values[:half]), Prediction(values[half : 2 * half])


def _gap(x: Prediction, y: Prediction) -> np.ndarray:
    return np.abs(x.mutual_information - y.mutual_information)


def _correlation(x: Prediction, y: Prediction) -> float:
    a, b = x.mutual_information, y.mutual_information
    if len(a) < 3 or a.std() < 1e-12 or b.std() < 1e-12:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _permuted(
    random: np.random.Generator, posterior: Prediction, reference: Prediction, num_permutations: int
) -> tuple[float, float]:
    """P-values of the mean total variation and of the mean difference of mutual information."""
    draws, rows, classes = posterior.draw_log_probs.shape
    log_probs = np.concatenate([posterior.draw_log_probs, reference.draw_log_probs])
    probs = np.exp(log_probs).reshape(2 * draws, -1)
    # Entropy of the prediction of each draw, in nats, shape (draw, row); 0 log 0 = 0.
    terms = np.where(log_probs > -np.inf, np.exp(log_probs) * np.maximum(log_probs, -1e300), 0.0)
    entropies = -terms.sum(-1)
    # The second group is the total minus the first, so each permutation needs one product per array.
    total, total_entropy = probs.sum(0) / draws, entropies.sum(0) / draws

    def statistics(first: np.ndarray) -> tuple[float, float]:
        weights = first / draws
        mixture, expected_entropy = weights @ probs, weights @ entropies
        p, q = (x.reshape(rows, classes) for x in (mixture, np.maximum(total - mixture, 0.0)))
        # Mutual information: entropy of the mixture minus mean entropy of the draws.
        information = _entropy(p) - expected_entropy
        other = _entropy(q) - (total_entropy - expected_entropy)
        return 0.5 * np.abs(p - q).sum(-1).mean(), np.abs(information - other).mean()

    first = np.arange(2 * draws) < draws
    observed = np.array(statistics(first))
    # Equivalent relabellings may differ by rounding; the tolerance counts them as equal.
    as_large = sum(
        np.array(statistics(random.permutation(first))) >= observed - 1e-12 for _ in range(num_permutations)
    )
    variation_p, information_p = (1 + np.asarray(as_large)) / (1 + num_permutations)
    return float(variation_p), float(information_p)


def _entropy(probs: np.ndarray) -> np.ndarray:
    return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
